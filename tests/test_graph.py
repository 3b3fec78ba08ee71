"""One description of the graph: parameter file, RViz view, launch file and `occbev run` agree with it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from occbev import graph
from occbev.cli.run import split_assignments, write_values
from occbev.config import ConfigError
from occbev.streams.kept_inputs import DROPPED, MISSING, STAGE
from occbev.streams.parameters import (
    CameraParameters,
    PerceptionParameters,
    leaves,
    parameters_from_record,
    read_parameters,
)

RVIZ_CLASSES = {
    "rviz_common": {"Displays", "Selection", "Tool Properties", "Views", "Time", "Group"},
    "rviz_default_plugins": {
        "Grid",
        "TF",
        "Axes",
        "PointCloud2",
        "MarkerArray",
        "Image",
        "Camera",
        "Map",
        "Path",
        "Odometry",
        "RobotModel",
        "MoveCamera",
        "Interact",
        "Select",
        "FocusCamera",
        "Measure",
        "SetInitialPose",
        "SetGoal",
        "PublishPoint",
        "Orbit",
        "ThirdPersonFollower",
        "TopDownOrtho",
        "FPS",
    },
    "vision_msgs_rviz_plugins": {"Detection3DArray"},
}
"""Classes that RViz 2 has; those of vision_msgs_rviz_plugins only where it is installed."""


@pytest.fixture
def view(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "config/rviz/occbev.rviz").read_text())


def classes(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        own = [tree["Class"]] if tree.get("Class") else []
        return own + [c for value in tree.values() for c in classes(value)]
    return [c for value in tree for c in classes(value)] if isinstance(tree, list) else []


def test_the_view_uses_classes_that_exist(view: dict[str, Any]) -> None:
    found = [name.split("/") for name in classes(view)]
    assert len(found) > 8
    for package, name in found:
        assert name in RVIZ_CLASSES[package], f"{package}/{name}"
    optional = [d for d in view["Visualization Manager"]["Displays"] if d["Class"].startswith("vision_msgs")]
    assert not any(display["Enabled"] for display in optional)


def test_the_view_listens_to_what_the_node_publishes(view: dict[str, Any]) -> None:
    outputs = {graph.resolve(t.name): t for t in graph.OUTPUT_TOPICS.values()}
    displays = [d for d in view["Visualization Manager"]["Displays"] if "Topic" in d]
    displays = [d for d in displays if not d["Class"].endswith("/Camera")]
    assert {d["Topic"]["Value"] for d in displays} == set(outputs)
    for display in displays:
        topic = display["Topic"]
        reader = graph.Quality(
            topic["Reliability Policy"].lower().replace(" ", "_"),
            topic["Durability Policy"].lower().replace(" ", "_"),
        )
        assert outputs[topic["Value"]].quality.reaches(reader)
        kind = outputs[topic["Value"]].type.rsplit("/", 1)[1]
        shown = {"Map": "OccupancyGrid"}.get(display["Class"].split("/")[1], display["Class"].split("/")[1])
        assert shown == kind
    assert view["Visualization Manager"]["Global Options"]["Fixed Frame"] == PerceptionParameters().base_frame


def test_the_view_shows_a_camera_of_the_shipped_parameters(view: dict[str, Any], repository: Path) -> None:
    parameters = read_parameters(repository / "config/perception.yaml")
    (camera,) = [d for d in view["Visualization Manager"]["Displays"] if d["Class"].endswith("/Camera")]
    topic = camera["Topic"]["Value"]
    assert topic in parameters.image_topics("CAM_FRONT")
    # RViz replaces the last part of the image topic, which is its transport.
    sought = topic.rsplit("/", 1)[0] + "/camera_info"
    assert f"{sought}:={parameters.info_topic('CAM_FRONT')}" in graph.rviz_arguments({})
    page = (repository / "docs/viewing.md").read_text()
    assert f"rviz2 -d config/rviz/occbev.rviz --ros-args -r {sought}:={parameters.info_topic('CAM_FRONT')}" in page
    assert camera["Topic"]["Reliability Policy"] == "Best Effort"
    names = {d["Name"] for d in view["Visualization Manager"]["Displays"]}
    assert set(camera["Visibility"]) - {"Value"} <= names


def test_the_foxglove_layout_shows_what_a_recorded_replay_holds(repository: Path) -> None:
    layout = json.loads((repository / "config/foxglove/occbev.json").read_text())
    panels, parameters = layout["configById"], read_parameters(repository / "config/perception.yaml")

    def placed(tree: Any) -> list[str]:
        return [tree] if isinstance(tree, str) else [*placed(tree["first"]), *placed(tree["second"])]

    assert sorted(placed(layout["layout"])) == sorted(panels)
    outputs = {graph.resolve(t.name) for t in graph.OUTPUT_TOPICS.values()}
    for panel in panels.values():
        assert set(panel.get("topics", {})) <= outputs
    assert panels["3D!space"]["followTf"] == parameters.base_frame
    shown = {
        p["imageMode"]["imageTopic"]: p["imageMode"]["calibrationTopic"] for p in panels.values() if p.get("imageMode")
    }
    assert shown == {next(iter(parameters.image_topics(n))): parameters.info_topic(n) for n in parameters.names}
    paths = {path["value"] for name, p in panels.items() if name.startswith("Plot") for path in p["paths"]}
    stages = {f"{graph.resolve(STAGE)}{stage}_ms.data" for stage in graph.LATENCY_STAGES}
    assert {path for path in paths if "processing_time" in path} <= stages
    others = {path for path in paths if "processing_time" not in path}
    assert f"{graph.resolve(MISSING)}.data" in others
    assert all(p.startswith((graph.resolve(DROPPED), graph.resolve(MISSING))) for p in others)


def test_a_reliable_reader_needs_a_reliable_writer() -> None:
    assert graph.RESULT.reaches(graph.SENSOR)
    assert not graph.SENSOR.reaches(graph.RESULT)
    assert not graph.TF.reaches(graph.TF_STATIC)


def test_the_shipped_parameter_file_names_every_parameter(repository: Path) -> None:
    path = repository / "config/perception.yaml"
    parameters = read_parameters(path)
    assert parameters.names == graph.DEFAULT_CAMERAS
    assert parameters.image_topics("CAM_FRONT") == {"/cam_front/image/compressed": graph.COMPRESSED}
    record = yaml.safe_load(path.read_text())["/**"]["ros__parameters"]
    given = {leaf for leaf in flat(record) if not leaf.startswith("cameras.")}
    assert given == {leaf.name for leaf in leaves(PerceptionParameters)} - {"build_only"}


def test_the_shipped_values_are_the_defaults_but_for_topics(repository: Path) -> None:
    record = yaml.safe_load((repository / "config/perception.yaml").read_text())["/**"]["ros__parameters"]
    values = flat(record)
    different = {
        leaf.name for leaf in leaves(PerceptionParameters) if values.get(leaf.name, leaf.default) != leaf.default
    }
    assert different == {"anchor", "ego_motion.odometry_topic"}


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in record.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def test_every_parameter_has_a_description() -> None:
    for schema in (PerceptionParameters, CameraParameters):
        for leaf in leaves(schema):
            assert leaf.text.endswith("."), leaf.name


def test_default_topics_are_private_to_the_node() -> None:
    parameters = PerceptionParameters()
    assert parameters.image_topics("CAM_BACK") == {
        "~/input/cam_back/image": graph.IMAGE,
        "~/input/cam_back/image/compressed": graph.COMPRESSED,
    }
    assert graph.resolve("~/input/cam_back/image", "car") == "/car/perception/input/cam_back/image"
    assert graph.resolve("/tf", "car") == "/tf"
    assert graph.resolve("points", "/car/") == "/car/points"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"modell": "x"}, "did you mean 'model'"),
        ({"cameras": {"names": ["A"], "B": {}}}, r"cameras.B is not in cameras.names \['A'\]"),
        ({"cameras": {"names": ["A"], "A": {"topik": ""}}}, "did you mean 'topic'"),
        ({"cameras": {"names": ["A", "A"]}}, "twice"),
        ({"cameras": {"names": []}}, "at least one camera"),
        ({"cameras": {"names": "CAM_A"}}, "cameras.names is 'CAM_A': want a list of texts"),
        ({"cameras": {"names": None}}, "cameras.names is None: want a list of texts"),
        ({"cameras": ["CAM_A"]}, r"cameras is \['CAM_A'\]: want keys and values"),
        ({"base_frame": ""}, "base_frame is empty"),
        ({"anchor": "REAR"}, "anchor 'REAR' is not one of"),
        ({"occupancy": {"publish": "all"}}, "occupied or observed"),
        ({"sync": {"tolerance_s": -1}}, "must be positive"),
        ({"sync": {"tolerance_s": 5.0}}, "sync.tolerance_s is 5.0: must be between 0.001 and 1"),
        ({"threads": -1}, "threads is -1: must be between 0 and 256"),
        ({"cameras": {"names": ["A"]}, "sync": {"min_cameras": 2}}, "exceeds the 1 cameras"),
        ({"cameras": {"names": ["A"], "A": {"extrinsic": [1, 2]}}}, "want 7 numbers"),
        (
            {"cameras": {"names": ["A"], "A": {"extrinsic": [0] * 7}}},
            r"A.*extrinsic: not a unit quaternion \(x, y, z, w\)",
        ),
        (
            {"cameras": {"names": ["A", "B"], "A": {"topic": "/a"}, "B": {"topic": "/a"}}},
            "cameras A and B both read /a: each needs its own topic",
        ),
        ({"cameras": {"names": ["A", "a"]}}, "cameras A and a both read ~/input/a/image"),
    ],
)
def test_wrong_parameters_are_named(record: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parameters_from_record(record)


def test_a_file_that_is_no_parameter_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: occbev-tiny\n")
    with pytest.raises(ConfigError, match=r"x\.yaml: not a ROS parameter file"):
        read_parameters(path)


def test_run_splits_launch_arguments_from_parameters() -> None:
    values, extra = split_assignments(["model:=m", "detection.score_threshold:=0.2", "namespace:=car"])
    assert (values["model"], values["namespace"], extra) == (
        "m",
        "car",
        {"detection.score_threshold": "0.2"},
    )
    arguments = graph.node_arguments(values, extra)
    assert arguments[:2] == ["--ros-args", "--params-file"]
    assert "model:=m" in arguments
    assert "detection.score_threshold:=0.2" in arguments
    assert "__ns:=/car" in arguments
    with pytest.raises(ValueError, match="'model=m' is not name:=value"):
        split_assignments(["model=m"])


def test_run_writes_values_as_their_parameters_are_typed() -> None:
    given = {"sync.timeout_s": "1", "threads": "1", "debug_topics": "true", "cameras.A.extrinsic": "[]", "odd": "5"}
    assert write_values(given) == {**given, "sync.timeout_s": "1.0"}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("sync.timeout_s", "soon", "sync.timeout_s is 'soon': want a number"),
        ("threads", "2.5", "threads is 2.5: want a whole number"),
        ("threads", "-1", "must be between 0 and 256"),
        ("debug_topics", "1", "debug_topics is 1: want a true or false"),
        ("model", "5", "model is 5: want a text"),
        ("cameras.names", "CAM", "cameras.names is 'CAM': want a list of texts"),
        ("waiting_sets", "many", "want a whole number"),
    ],
)
def test_run_refuses_wrong_values_like_the_node(name: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        write_values({name: text})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"rviz": "maybe"}, "rviz:=maybe: want one of true, false"),
        ({"log_level": "loud"}, "want one of debug, info"),
        ({"params_file": "/no/such.yaml"}, "parameter file /no/such.yaml does not exist"),
        ({"bag": "/no/bag"}, "bag /no/bag does not exist"),
        ({"rig": "/no/rig.yaml"}, "rig /no/rig.yaml does not exist"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_starts(values: dict[str, str], problem: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        graph.check_arguments(values)
    graph.check_arguments({})


def test_rviz_follows_the_namespace() -> None:
    command = graph.rviz_command({"namespace": "/car"})
    assert "/perception/output/objects:=/car/perception/output/objects" in command
    assert not any("objects" in argument for argument in graph.rviz_command({}))


@pytest.mark.parametrize(
    ("values", "simulated"), [({"bag": "drive"}, True), ({"use_sim_time": "true"}, True), ({}, False)]
)
def test_rviz_takes_the_clock_of_the_node(values: dict[str, str], simulated: bool) -> None:
    assert ("use_sim_time:=true" in graph.rviz_command(values)) == simulated


def test_the_player_plays_for_the_node_with_all_its_parameters() -> None:
    values, extra = split_assignments(["bag:=drive", "cameras.CAM_FRONT.topic:=/front"])
    command = graph.player_command(values, extra)
    assert command[3:6] == ["replay", "drive", "--no-node"]
    assert command[-2:] == ["--set", "cameras.CAM_FRONT.topic:=/front"]


def test_a_bag_or_sim_time_sets_the_clock() -> None:
    assert graph.parameters({"bag": "drive"}) == {"use_sim_time": True}
    assert graph.parameters({"use_sim_time": "True"}) == {"use_sim_time": True}
    assert graph.parameters({"use_sim_time": "false", "backend": "torch"}) == {"backend": "torch"}


def test_the_launch_file_holds_no_logic_of_its_own(repository: Path) -> None:
    tree = ast.parse((repository / "launch/perception.launch.py").read_text())
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported == {"launch", "launch_ros", "occbev"}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "graph"}
    assert used <= set(dir(graph))


def test_the_transport_profile_is_well_formed_and_large_enough(repository: Path) -> None:
    root = ElementTree.parse(repository / graph.PROFILE).getroot()
    space = "{http://www.eprosima.com}"
    segment = int(root.find(f".//{space}segment_size").text)  # type: ignore[union-attr,arg-type]
    largest = int(root.find(f".//{space}maxMessageSize").text)  # type: ignore[union-attr,arg-type]
    assert segment >= 64 << 20
    assert largest >= 1600 * 900 * 3
    kinds = [t.text for t in root.iter(f"{space}type")]
    assert kinds == ["SHM", "UDPv4"]
    assert set(graph.environment().values()) <= {str(repository / graph.PROFILE)}


def test_the_node_keeps_less_shared_memory_than_cameras_and_a_users_profile_holds(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = "{http://www.eprosima.com}"
    sender, receiver = (ElementTree.parse(repository / p).getroot() for p in (graph.PROFILE, graph.RECEIVER_PROFILE))
    segments = [int(root.find(f".//{space}segment_size").text) for root in (sender, receiver)]  # type: ignore[union-attr,arg-type]
    assert segments[1] < segments[0]
    rest = [[(e.tag, e.text) for e in root.iter() if not e.tag.endswith("segment_size")] for root in (sender, receiver)]
    assert rest[0] == rest[1]
    largest = int(receiver.find(f".//{space}maxMessageSize").text)  # type: ignore[union-attr,arg-type]
    assert segments[1] >= 2 * largest
    for variable in graph.PROFILE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    variable = graph.PROFILE_VARIABLES[0]
    assert graph.environment(receives=True) == {variable: str(repository / graph.RECEIVER_PROFILE)}
    monkeypatch.setenv(variable, str(repository / graph.PROFILE))
    assert graph.environment(receives=True) == {variable: str(repository / graph.RECEIVER_PROFILE)}
    monkeypatch.setenv(variable, "/own/profile.xml")
    assert graph.environment(receives=True) == graph.environment() == {}


def test_the_security_policy_allows_what_the_node_does_and_no_more(repository: Path) -> None:
    root = ElementTree.parse(repository / "config/sros2/perception.policy.xml").getroot()
    allowed = {
        direction: {graph.resolve(topic.text or "") for topic in group}
        for group in root.iter("topics")
        for direction in ("subscribe", "publish")
        if group.get(direction) == "ALLOW"
    }
    parameters = read_parameters(repository / "config/perception.yaml")
    inputs = {topic for name in parameters.names for topic in parameters.image_topics(name)}
    inputs |= {parameters.info_topic(name) for name in parameters.names}
    inputs |= {parameters.ego_motion.odometry_topic, graph.CLOCK.name}
    inputs |= {topic.name for topic in graph.FRAME_INPUTS}
    assert allowed["subscribe"] == inputs
    outputs = {graph.resolve(topic.name) for topic in (graph.OUTPUT_TOPICS | graph.OPTIONAL_OUTPUTS).values()}
    outputs |= {graph.DIAGNOSTICS.name}
    of_every_node = {"/rosout", "/parameter_events", "/perception/transition_event"}
    assert allowed["publish"] == outputs | of_every_node


def test_old_parameter_names_work_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("/**: {ros__parameters: {sets_at_once: 2, waiting_sets: 3, max_waiting_sets: 1}}")
    parameters = read_parameters(path, {"ledger_path": "log.jsonl"})
    assert (parameters.max_in_flight, parameters.max_waiting_sets) == (2, 3)
    assert parameters.frame_log_path == "log.jsonl"
    assert "parameter sets_at_once is now called max_in_flight" in caplog.text
    newer = parameters_from_record({"waiting_sets": 3, "max_waiting_sets": 4})
    assert newer.max_waiting_sets == 4
