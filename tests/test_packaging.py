"""The two packages agree on one version, and what the ROS package installs covers every shared file."""

from __future__ import annotations

import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import occbev
import occbev_training


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
    stated = {metadata["version"], manifest.findtext("version"), occbev_training.__version__}
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


def test_messages_that_nodes_import_are_declared(repository: Path) -> None:
    declared = {entry.text for entry in ET.parse(repository / "package.xml").getroot().iter("exec_depend")}
    imported = set()
    for path in (repository / "src/occbev/ros").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+_msgs)\b", path.read_text(), re.M))
    core = {"rosgraph_msgs", "rcl_interfaces", "lifecycle_msgs", "builtin_interfaces", "std_msgs"}
    assert imported - core <= declared, "rclpy brings the core packages; others need an exec_depend"
