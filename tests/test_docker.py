"""The images cannot be built where the tests run: what they copy must be there, what they install must be declared."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from occbev.cli import COMMANDS as ROBOT_COMMANDS
from occbev.cli import monitor
from occbev.graph import ARGUMENTS, RESPAWN
from occbev_training.cli import COMMANDS as TRAINING_COMMANDS

TOOLS = {"gcc", "g++", "make", "python3-dev", "python3-venv", "python3-pip", "python3-colcon-common-extensions"}
"""What the README says a machine needs, and pip and colcon for an image."""


@pytest.fixture
def instructions(repository: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, with continued lines joined."""
    text = re.sub(r"\\\n", " ", (repository / "docker/Dockerfile").read_text())
    lines = [line.split("#")[0].strip() for line in text.splitlines() if not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in lines if line]  # type: ignore[misc]


def words(instructions: list[tuple[str, str]], command: str) -> Iterator[str]:
    """The packages that a command of the RUN lines names."""
    for name, text in instructions:
        for part in re.split(r"&&", text) if name == "RUN" else ():
            if command in part:
                named = part.split(command, 1)[1].split()
                yield from (w.strip("'\"") for w in named if not w.startswith("-"))


def test_every_copied_path_is_there_and_sent(repository: Path, instructions: list[tuple[str, str]]) -> None:
    copied = [path for name, text in instructions if name == "COPY" for path in text.split()[:-1]]
    assert len(copied) > 8
    kept = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in copied:
        assert (repository / path).exists(), path
        assert path in kept, f".dockerignore leaves {path} out"


def test_the_targets_are_those_that_compose_builds(repository: Path, instructions: list[tuple[str, str]]) -> None:
    targets = {text.split()[-1] for name, text in instructions if name == "FROM"}
    assert targets == {"runtime-cpu", "runtime-cuda", "demo", "training"}
    compose = yaml.safe_load((repository / "docker/compose.yaml").read_text())
    assert {s["build"]["target"] for s in compose["services"].values()} == targets
    for service in compose["services"].values():
        assert (repository / "docker" / service["build"]["context"]).resolve() == repository
        assert service["ipc"] == "host"
    for name in ("perception", "perception-cuda", "demo"):
        assert compose["services"][name]["network_mode"] == "host"


def test_every_service_has_a_profile_and_nodes_start_again_and_are_checked(repository: Path) -> None:
    services = yaml.safe_load((repository / "docker/compose.yaml").read_text())["services"]
    assert {profile for s in services.values() for profile in s["profiles"]} == {"cpu", "cuda", "demo", "training"}
    for name in ("perception", "perception-cuda"):
        assert services[name]["restart"] == "unless-stopped"
        check = services[name]["healthcheck"]
        assert check["test"] == ["CMD", "/entrypoint.sh", "occbev", "monitor", "--check"]
        assert {"interval", "timeout", "start_period", "retries"} <= set(check)
    allowed = {
        "profiles",
        "image",
        "build",
        "command",
        "restart",
        "healthcheck",
        "environment",
        "volumes",
        "user",
        "network_mode",
        "ipc",
        "init",
        "deploy",
        "stop_signal",
        "stop_grace_period",
    }
    for name, service in services.items():
        assert set(service) <= allowed, f"{name}: a key that Compose would refuse"


def test_the_check_of_the_image_is_a_command_that_knows_its_options(instructions: list[tuple[str, str]]) -> None:
    checks = [text for name, text in instructions if name == "HEALTHCHECK" and text != "NONE"]
    assert len(checks) == 1
    words = json.loads(checks[0].split("CMD", 1)[1])
    assert words[:3] == ["/entrypoint.sh", "occbev", "monitor"]
    parser = argparse.ArgumentParser()
    monitor.add_arguments(parser)
    assert parser.parse_args(words[3:]).check


def test_tags_are_pinned(repository: Path, instructions: list[tuple[str, str]]) -> None:
    bases = [text.split("=", 1)[1] for name, text in instructions if name == "ARG"]
    assert len(bases) == 2
    container = json.loads((repository / ".devcontainer/devcontainer.json").read_text())["image"]
    for base in (*bases, container):
        assert re.fullmatch(r"[\w./-]+:[\w.]+(-[\w.]+)+", base), base
        assert "latest" not in base
    for workflow in (repository / ".github/workflows").glob("*.yaml"):
        for action in re.findall(r"uses: (\S+)", workflow.read_text()):
            assert re.search(r"@v\d", action), action


def test_the_workflow_builds_every_target(repository: Path, instructions: list[tuple[str, str]]) -> None:
    jobs = yaml.safe_load((repository / ".github/workflows/images.yaml").read_text())["jobs"]
    built = jobs["build"]["strategy"]["matrix"]["include"]
    targets = {text.split()[-1] for name, text in instructions if name == "FROM"}
    assert {entry["target"] for entry in built} == targets
    for entry in built:
        words = entry["check"].split()
        known = ROBOT_COMMANDS if words[0] == "occbev" else TRAINING_COMMANDS
        assert (words[1] if words[0] == "occbev" else words[0]) in known


def test_the_devcontainer_builds_environments_that_make_knows(repository: Path) -> None:
    command = json.loads((repository / ".devcontainer/devcontainer.json").read_text())["postCreateCommand"].split()
    assert command[0] == "make"
    rules = (repository / "Makefile").read_text()
    assert all(re.search(rf"^{re.escape(target)}:", rules, re.M) for target in command[1:])


def test_every_apt_package_is_declared(repository: Path, instructions: list[tuple[str, str]]) -> None:
    manifest = ET.parse(repository / "package.xml").getroot()
    declared = {entry.text.replace("_", "-") for entry in manifest.iter("exec_depend") if entry.text}
    installed = set(words(instructions, "apt-get install"))
    assert installed >= {"ros-${ROS_DISTRO}-vision-msgs", "python3-venv"}
    for package in installed - TOOLS:
        assert package.removeprefix("ros-${ROS_DISTRO}-") in declared, package


def test_every_pip_requirement_is_declared(
    repository: Path, instructions: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    setuptools, handed = pytest.importorskip("setuptools"), dict[str, Any]()
    monkeypatch.setattr(setuptools, "setup", handed.update)
    monkeypatch.chdir(repository)
    runpy.run_path(str(repository / "setup.py"))
    names = {re.split(r"[<>=]", text)[0] for text in handed["install_requires"]}
    wanted = list(words(instructions, "pip install"))
    assert ".[robot]" in wanted
    for requirement in wanted:
        extras = re.fullmatch(r"[\w./]*\[([\w,]+)\]", requirement)
        if extras:
            assert set(extras[1].split(",")) <= set(handed["extras_require"])
        else:
            assert requirement == "training" or re.split(r"[<>=]", requirement)[0] in names


def test_compose_names_arguments_that_the_launch_file_knows(repository: Path) -> None:
    compose = yaml.safe_load((repository / "docker/compose.yaml").read_text())
    commands = [service["command"] for service in compose["services"].values() if "command" in service]
    assert len(commands) == 2
    for command in commands:
        assert command[:4] == ["ros2", "launch", "occbev", "perception.launch.py"]
        assert {a.split(":=")[0] for a in command[4:]} <= {a.name for a in (*ARGUMENTS, RESPAWN)}


def test_robot_images_start_by_ros2_launch(instructions: list[tuple[str, str]], repository: Path) -> None:
    starts = [json.loads(text) for name, text in instructions if name == "CMD"]
    nodes = [words for words in starts if words[:2] == ["ros2", "launch"]]
    assert [words[2:4] for words in nodes] == [["occbev", "perception.launch.py"]] * 2
    assert (repository / "launch/perception.launch.py").is_file()
    assert ["occbev", "demo", "--out", "/out/demo"] in starts
    robot = instructions[: instructions.index(("FROM", "runtime-cpu AS runtime-cuda"))]
    assert ("STOPSIGNAL", "SIGINT") in robot, "ros2 launch leaves its nodes behind at SIGTERM"


def test_robot_images_hold_the_package_as_a_workspace_does(
    repository: Path, instructions: list[tuple[str, str]]
) -> None:
    runs = [text for name, text in instructions if name == "RUN"]
    (build,) = [text for text in runs if "colcon" in text and " build " in text]
    assert '--install-base "$OCCBEV_INSTALL"' in build
    assert "OCCBEV_INSTALL=/opt/ws/install" in dict.fromkeys(text for name, text in instructions if name == "ENV")
    robot = [text for text in runs if "[robot" in text and "-e training" not in text]
    assert len(robot) == 3
    assert all("pip uninstall --yes occbev" in text for text in robot), "the workspace holds it, once"


def test_numpy_of_the_distribution_is_not_upgraded(instructions: list[tuple[str, str]]) -> None:
    texts = [text for _, text in instructions]
    constraint = texts.index("PIP_CONSTRAINT=/opt/numpy.txt")
    assert constraint < min(i for i, text in enumerate(texts) if "pip install" in text)
    assert any(text.startswith("python3 -c 'import numpy") and '> "$PIP_CONSTRAINT"' in text for text in texts)
    assert not any("numpy<2" in text for text in texts), "Lyrical has NumPy 2"


def test_the_entry_point_sources_every_workspace_before_it_becomes_the_command(
    repository: Path, tmp_path: Path
) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    for name in ("own", "mounted/install"):
        (tmp_path / name).mkdir(parents=True)
        text = f"export SOURCED=$SOURCED:{name}; export PYTHONPATH={name}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        (tmp_path / name / "setup.bash").write_text(text)
    own = {"OCCBEV_INSTALL": str(tmp_path / "own"), "OCCBEV_WORKSPACE": str(tmp_path / "mounted"), "ROS_DISTRO": "none"}
    environment = {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SOURCED": ""}
    environment.pop("PYTHONPATH", None)
    command = [bash, str(repository / "docker/entrypoint.sh"), "bash", "-c", "echo $SOURCED; echo $PYTHONPATH"]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert lines == [":own:mounted/install", f"mounted/install:own:{sysconfig.get_path('purelib')}"]


def test_the_entry_point_is_a_script_that_becomes_its_command(repository: Path, tmp_path: Path) -> None:
    script = repository / "docker/entrypoint.sh"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith('exec "$@"')
    bash = shutil.which("bash")
    if bash:
        assert subprocess.run([bash, "-n", str(script)], check=False).returncode == 0
