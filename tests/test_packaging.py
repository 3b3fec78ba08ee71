"""The two packages agree on one version, and what the ROS package installs covers every shared file."""

from __future__ import annotations

import configparser
import os
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import occbev
import occbev_training
from occbev import graph

KEYS = {
    "numpy": "python3-numpy",
    "PyYAML": "python3-yaml",
    "opencv-python-headless": "python3-opencv",
    "rich": "python3-rich",
    "onnxruntime": "python3-onnxruntime-pip",
    "rosbags": "python3-rosbags-pip",
}
"""Requirement -> its key in rosdep's python.yaml and base.yaml."""

WITHOUT_KEY = {"openvino", "lz4", "backports.zstd"}


@pytest.fixture
def metadata(repository: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    handed: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", handed.update)
    monkeypatch.chdir(repository)
    runpy.run_path(str(repository / "setup.py"))
    return handed


def test_every_version_is_the_same(repository: Path, metadata: dict[str, Any]) -> None:
    manifest = ET.parse(repository / "package.xml").getroot()
    newest = re.search(r"^## (\S+) ", (repository / "CHANGELOG.md").read_text(), re.M)[1]
    stated = {metadata["version"], manifest.findtext("version"), occbev_training.__version__, newest}
    assert stated == {occbev.__version__}


def test_launch_config_and_models_are_installed(repository: Path, metadata: dict[str, Any]) -> None:
    placed = {name: folder for folder, names in metadata["data_files"] for name in names}
    shared = [path for folder in ("launch", "config") for path in (repository / folder).rglob("*")]
    for path in (path.relative_to(repository) for path in shared if path.is_file()):
        assert placed[str(path)] == f"share/occbev/{path.parent}"
    assert placed["resource/occbev"] == "share/ament_index/resource_index/packages"
    assert placed["package.xml"] == "share/occbev"


def test_every_source_package_is_installed(repository: Path, metadata: dict[str, Any]) -> None:
    folders = {path.parent for path in (repository / "src/occbev").rglob("*.py")}
    names = {".".join(folder.relative_to(repository / "src").parts) for folder in folders}
    assert names == set(metadata["packages"])


def test_what_ros2_starts_is_executable_and_takes_the_python_of_the_path(
    repository: Path, metadata: dict[str, Any]
) -> None:
    scripts = dict(metadata["data_files"])["lib/occbev"]
    assert scripts == ["scripts/occbev", f"scripts/{graph.EXECUTABLE}"]
    for name in scripts:
        assert os.access(repository / name, os.X_OK)
        assert (repository / name).read_text().startswith("#!/usr/bin/env python3\n")
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    command = [sys.executable, str(repository / "scripts/occbev"), "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "monitor" in shown.stdout
    assert "occbev.ros.perception_node import main" in (repository / "scripts/perception").read_text()


def test_a_sourced_workspace_has_occbev_on_its_path(repository: Path, metadata: dict[str, Any]) -> None:
    """colcon puts a package's bin on the path, and scripts go there unless setup.cfg says otherwise."""
    config = configparser.ConfigParser()
    config.read(repository / "setup.cfg")
    assert not config.has_option("install", "install_scripts")
    assert not config.has_option("develop", "script_dir")
    assert config["build_scripts"]["executable"] == "/usr/bin/env python3"
    assert metadata["entry_points"]["console_scripts"] == ["occbev = occbev.cli:main"]


def test_messages_that_nodes_import_are_declared(repository: Path) -> None:
    imported = set()
    for path in (repository / "src/occbev/ros").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+_msgs)\b", path.read_text(), re.M))
    core = {"rosgraph_msgs", "builtin_interfaces"}
    assert imported - core <= depends(repository), "rclpy brings the core packages; others need an exec_depend"


def test_every_python_requirement_is_a_rosdep_key_or_is_said(repository: Path, metadata: dict[str, Any]) -> None:
    wanted = {
        re.split(r"[<>=;]", text)[0] for text in (*metadata["install_requires"], *metadata["extras_require"]["robot"])
    }
    assert set(KEYS) | WITHOUT_KEY == wanted
    assert set(KEYS.values()) <= depends(repository)
    page = (repository / "docs/install.md").read_text()
    note = re.search(r"<!-- No rosdep key.*?-->", (repository / "package.xml").read_text(), re.S)
    assert note is not None
    for name in WITHOUT_KEY:
        assert name in note[0]
        assert f"'{name}>=" in page, "the line for pip"


def test_extras_of_the_page_are_those_of_the_package(repository: Path, metadata: dict[str, Any]) -> None:
    page = (repository / "docs/install.md").read_text()
    told = set(re.findall(r"^\| `(\w+)` \|", page.split("## With pip")[1].split("## ")[0], re.M))
    assert told == set(metadata["extras_require"]) - {"test"}
    for extras in re.findall(r"pip install '\.\[([\w,]+)\]'", page):
        assert set(extras.split(",")) <= set(metadata["extras_require"])


def test_colcon_test_runs_pytest(repository: Path, metadata: dict[str, Any]) -> None:
    wanted = {re.split(r"[<>=]", text)[0] for text in metadata["extras_require"]["test"]}
    assert wanted == {"pytest", "hypothesis"}, "colcon takes pytest where the extra `test` names it"
    assert {f"python3-{name}" for name in wanted} <= depends(repository, "test_depend")


def test_numpy_of_a_distribution_is_not_upgraded(repository: Path) -> None:
    rules = (repository / "Makefile").read_text()
    assert "NUMPY = $(if $(AMENT_PREFIX_PATH),'numpy<$(NEXT_NUMPY)')" in rules
    assert "-m pip install --quiet $(2) $(NUMPY)" in rules
    page = (repository / "docs/install.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("python3 -c 'import numpy"))
    code = line.split("'")[1]
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"numpy<{int(np.__version__.split('.')[0]) + 1}"
    assert page.index("PIP_CONSTRAINT=") < page.index("rosdep install") < page.index("pip install 'openvino")


def test_what_is_untested_is_said(repository: Path) -> None:
    assert "Python 3.14 is not tested" in (repository / "docs/install.md").read_text()


def depends(repository: Path, kind: str = "exec_depend") -> set[str]:
    """The names that package.xml gives of one kind of dependency."""
    return {str(entry.text) for entry in ET.parse(repository / "package.xml").getroot().iter(kind)}
