"""The launch file, with recorders in place of `launch` and `launch_ros`, which come only with a ROS distribution."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from occbev import graph


class Action:
    """Remembers what it was made of."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        self.positional = positional
        self.__dict__.update(named)


@pytest.fixture
def launch_file(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    names = "DeclareLaunchArgument", "ExecuteProcess", "OpaqueFunction", "SetEnvironmentVariable", "Shutdown"
    actions = {name: type(name, (Action,), {}) for name in names}
    modules = {
        "launch": {"LaunchDescription": list},
        "launch.actions": actions,
        "launch_ros": {},
        "launch_ros.actions": {"Node": type("Node", (Action,), {})},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("perception_launch", repository / "launch/perception.launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def context(**given: str) -> Any:
    defaults = {a.name: a.default for a in (*graph.ARGUMENTS, graph.RESPAWN)}
    return SimpleNamespace(launch_configurations={**defaults, **given})


def test_every_argument_is_declared_with_its_choices(launch_file: Any) -> None:
    declared = {a.positional[0]: a for a in launch_file.generate_launch_description() if hasattr(a, "default_value")}
    assert set(declared) == {a.name for a in (*graph.ARGUMENTS, graph.RESPAWN)}
    assert declared["rviz"].choices == ("true", "false")
    assert declared["model"].choices is None


def test_nothing_is_started_where_a_file_is_absent(launch_file: Any) -> None:
    for name in ("params_file", "bag", "rig"):
        with pytest.raises(FileNotFoundError, match="/no/such"):
            launch_file.start(context(**{name: "/no/such"}))


def test_the_end_of_the_node_ends_the_launch_with_its_status(launch_file: Any) -> None:
    (node,) = launch_file.start(context())
    (shutdown,) = node.on_exit(SimpleNamespace(returncode=0), None)
    assert type(shutdown).__name__ == "Shutdown"
    with pytest.raises(RuntimeError, match="ended with status 2"):
        node.on_exit(SimpleNamespace(returncode=2), None)
    (again,) = launch_file.start(context(respawn="true"))
    assert (again.respawn, again.on_exit) == (True, None)


def test_parameters_namespace_and_bag_are_handed_on(launch_file: Any, tmp_path: Path) -> None:
    given = {"namespace": "car", "rviz": "true", "bag": str(tmp_path), "autostart": "false", "sync.timeout_s": "1"}
    node, rviz, player = launch_file.start(context(**given, stranger="of another launch file"))
    assert node.parameters[1] == {"use_sim_time": True, "autostart": False, "sync.timeout_s": 1.0}
    assert "/perception/output/objects:=/car/perception/output/objects" in rviz.arguments
    assert player.cmd[-4:] == ["--set", "sync.timeout_s:=1", "--namespace", "car"]
    with pytest.raises(ValueError, match="sync.timeout_s is 'soon'"):
        launch_file.start(context(**{"sync.timeout_s": "soon"}))
