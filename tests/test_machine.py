"""The set-up's machine check passes here and, for each missing thing, stops with the line that installs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[1] / ".ci/machine"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def check(path: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    shell = shutil.which("sh")
    assert shell is not None
    return subprocess.run([shell, str(CHECK), python], env={"PATH": path}, capture_output=True, text=True, check=False)


def folder_with(folder: Path, *tools: str) -> str:
    """Make a PATH that holds only the named tools."""
    folder.mkdir()
    for tool in tools:
        real = shutil.which(tool)
        if real is None:
            pytest.skip(f"this machine has no {tool}")
        (folder / tool).symlink_to(real)
    return str(folder)


def fake_python(folder: Path, body: str) -> str:
    folder.mkdir()
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_this_machine_passes() -> None:
    done = check(os.environ["PATH"])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("present", "line"),
    [((), "apt-get install gcc g++"), (("gcc",), "apt-get install g++")],
)
def test_a_missing_compiler_is_named(tmp_path: Path, present: tuple[str, ...], line: str) -> None:
    done = check(folder_with(tmp_path / "bin", *present))
    assert done.returncode == 1
    assert line in done.stderr


def test_fedora_gets_its_own_line(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "bin")
    (Path(path) / "dnf").symlink_to(shutil.which("true") or "/bin/true")
    assert "sudo dnf install gcc gcc-c++" in check(path).stderr


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    done = check(folder_with(tmp_path / "bin"), "python3")
    assert done.returncode == 1
    assert "apt-get install python3 python3-venv python3-dev" in done.stderr


def test_an_unsupported_python_is_refused_with_the_range(tmp_path: Path) -> None:
    done = check(os.environ["PATH"], fake_python(tmp_path / "old", "echo 3.9"))
    assert done.returncode == 1
    assert "is Python 3.9; the ROS 2 wheels exist for 3.10 to 3.13" in done.stderr


@pytest.mark.parametrize(("word", "package"), [("ensurepip", "venv"), ("Python.h", "dev")])
def test_missing_parts_of_python_are_named(tmp_path: Path, word: str, package: str) -> None:
    body = f'case "$2" in *{word}*) exit 1;; esac; exec {sys.executable} "$@"'
    done = check(os.environ["PATH"], fake_python(tmp_path / "bin", body))
    assert done.returncode == 1
    assert f"apt-get install python{PYTHON}-{package}" in done.stderr
