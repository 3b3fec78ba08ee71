"""The ROS graph as data: nodes, topics, qualities of service, launch arguments.

The node, the launch file, `occbev run`, `occbev replay`, the RViz check and the tables of docs/topics-and-parameters.md
all read this; it imports no ROS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from occbev.share import here_or_shipped, share_path

DEFAULT_CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
"""Camera names where no parameter file says otherwise."""

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"


@dataclass(frozen=True)
class Quality:
    """Quality of service of one end of a topic."""

    reliability: str
    durability: str = "volatile"
    depth: int = 5

    def reaches(self, reader: Quality) -> bool:
        """Whether a writer with this quality matches a reader."""
        reliable = self.reliability == "reliable" or reader.reliability == "best_effort"
        lasting = self.durability == "transient_local" or reader.durability == "volatile"
        return reliable and lasting


SENSOR = Quality("best_effort")
RESULT = Quality("reliable")
LATCHED_RESULT = Quality("reliable", "transient_local", 1)
TF, TF_STATIC = Quality("reliable", depth=100), Quality("reliable", "transient_local", 100)


@dataclass(frozen=True)
class Topic:
    """One topic of a node: its name before remapping, its type and what it carries."""

    name: str
    type: str
    quality: Quality
    text: str


OUTPUT_TOPICS: dict[str, Topic] = {
    "objects": Topic(
        "~/output/objects", "vision_msgs/msg/Detection3DArray", RESULT, "boxes in base_link at the key time"
    ),
    "points": Topic(
        "~/output/occupancy/points",
        "sensor_msgs/msg/PointCloud2",
        RESULT,
        "voxel centres: x, y, z, rgb, confidence, label (Occ3D class)",
    ),
    "obstacles": Topic(
        "~/output/occupancy/obstacles",
        "sensor_msgs/msg/PointCloud2",
        RESULT,
        "voxels that block the ground grid, with the same fields; confidence: of an obstacle in that cell",
    ),
    "grid": Topic(
        "~/output/occupancy/grid",
        "nav_msgs/msg/OccupancyGrid",
        LATCHED_RESULT,
        "ground grid: 100 blocked, 0 free, -1 unknown",
    ),
    "markers": Topic(
        "~/output/markers", "visualization_msgs/msg/MarkerArray", RESULT, "boxes as cubes, velocities as arrows"
    ),
}
"""What the perception node publishes where someone listens."""

OPTIONAL_OUTPUTS: dict[str, Topic] = {
    "autoware": Topic(
        "~/output/autoware/objects",
        "autoware_perception_msgs/msg/DetectedObjects",
        RESULT,
        "the same boxes for Autoware, where autoware_perception_msgs is installed",
    ),
}
"""What the perception node publishes as well where the package of the type is installed."""

GROUND_OUTPUTS = ("obstacles", "grid")
"""Outputs that need the ground grid."""

DIAGNOSTICS = Topic(
    "/diagnostics",
    "diagnostic_msgs/msg/DiagnosticArray",
    Quality("reliable", depth=10),
    "once a second: cameras, synchroniser, transforms, ego motion, model, latency",
)

LATENCY_STAGES = (
    "sync",
    "queue",
    "decode",
    "preprocess",
    "tables",
    "inference",
    "postprocess",
    "publish",
    "total",
)
"""Stages, from the anchor's arrival on, with a latency topic each under `~/debug/processing_time/<stage>_ms`."""

DEBUG_TYPE = "std_msgs/msg/Float32"

LATENCIES = {
    **{f"processing_time/{stage}_ms": stage for stage in LATENCY_STAGES},
    "pipeline_latency_ms": "pipeline_latency",
    "cyclic_time_ms": "cyclic_time",
}
"""Topic under `~/debug` -> what it carries: stages, the age of the key time at its result, time between results."""

ACCOUNT = "~/debug/"
"""Begin of the topics, of DEBUG_TYPE, by which a recorded replay tells the fate of every key time."""

FRAME_INPUTS = (
    Topic("/tf", "tf2_msgs/msg/TFMessage", TF, "moving frames, cameras among them; ego motion where no odometry comes"),
    Topic("/tf_static", "tf2_msgs/msg/TFMessage", TF_STATIC, "camera frame to base_link"),
)

ODOMETRY = Topic(
    "~/input/odometry",
    "nav_msgs/msg/Odometry",
    Quality("best_effort", depth=50),
    "ego pose, so that cameras may fire at different times",
)

CLOCK = Topic("/clock", "rosgraph_msgs/msg/Clock", Quality("best_effort", depth=1), "time of a replayed bag")

PROFILE = "config/fastdds_large_images.xml"
"""Fast DDS profile of everything that sends or receives images."""

RECEIVER_PROFILE = "config/fastdds_receiver.xml"
"""The same for the perception node, which receives images and sends less: its own shared memory is smaller."""

PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
"""Name from Kilted on, name on Humble and Jazzy."""

VIEW_CALIBRATION = "/cam_front/image/camera_info:=/cam_front/camera_info"
"""Remapping of RViz: its camera display looks for the calibration of /a/image/compressed on /a/image/camera_info."""

NODE_NAME = "perception"
EXECUTABLE = "perception"
MODULE = "occbev.ros.perception_node"


def camera_topics(camera: str) -> tuple[Topic, Topic, Topic]:
    """Return the default image, compressed image and calibration topics of a camera."""
    base = f"~/input/{camera.lower()}"
    return (
        Topic(f"{base}/image", IMAGE, SENSOR, "raw image"),
        Topic(f"{base}/image/compressed", COMPRESSED, SENSOR, "JPEG or PNG image"),
        Topic(f"{base}/camera_info", CAMERA_INFO, SENSOR, "calibration"),
    )


@dataclass(frozen=True)
class Argument:
    """One argument of the launch file and of `occbev run`, given as name:=value."""

    name: str
    default: str
    text: str
    choices: tuple[str, ...] = ()


TRUTHS = ("true", "false")

ARGUMENTS = (
    Argument("params_file", "", "ROS parameter file; empty for the shipped config/perception.yaml"),
    Argument("model", "", "model package: a folder or the name of a shipped one"),
    Argument("rig", "", "rig YAML to use in place of CameraInfo and TF"),
    Argument("backend", "", "inference runtime", ("", "auto", "openvino", "onnxruntime", "tensorrt", "torch")),
    Argument("bag", "", "bag to replay through the node"),
    Argument("rviz", "false", "start RViz with the shipped view", TRUTHS),
    Argument("use_sim_time", "false", "take time from /clock", TRUTHS),
    Argument("namespace", "", "namespace of the node"),
    Argument("autostart", "", "configure and activate at start", ("", *TRUTHS)),
    Argument("log_level", "info", "least severity of messages", ("debug", "info", "warn", "error", "fatal")),
)
"""Arguments of `occbev run` and the launch file; an empty one leaves the parameter file's value."""

RESPAWN = Argument("respawn", "false", "start the node again when it ends", TRUTHS)
"""Argument of the launch file alone."""

PARAMETER_ARGUMENTS = ("model", "rig", "backend")
"""Arguments that set the parameter of the same name when they are not empty."""


def resolve(topic: str, namespace: str = "") -> str:
    """Return the full name of a node's topic: `~/x` -> `/namespace/perception/x`."""
    prefix = "/" + namespace.strip("/") if namespace.strip("/") else ""
    if topic.startswith("~/"):
        return f"{prefix}/{NODE_NAME}/{topic[2:]}"
    return topic if topic.startswith("/") else f"{prefix}/{topic}"


def is_output(topic: str) -> bool:
    """Whether a topic is one that a perception node publishes, in whatever namespace."""
    return f"/{NODE_NAME}/output/" in topic


def params_file(values: Mapping[str, str]) -> str:
    """Return the parameter file that the arguments ask for; a shipped one may be named from any folder."""
    return str(here_or_shipped(values.get("params_file") or "config/perception.yaml"))


def parameters(values: Mapping[str, str]) -> dict[str, str | bool]:
    """Return the parameters that the arguments set over the parameter file."""
    chosen: dict[str, str | bool] = {n: values[n] for n in PARAMETER_ARGUMENTS if values.get(n)}
    if is_true(values.get("use_sim_time", "")) or values.get("bag"):
        chosen["use_sim_time"] = True
    if values.get("autostart"):
        chosen["autostart"] = is_true(values["autostart"])
    return chosen


def check_arguments(values: Mapping[str, str]) -> None:
    """Refuse what would fail later, before anything is started.

    Raises:
        ValueError: an argument has a value that is none of its choices. FileNotFoundError: a file is absent.
    """
    for argument in (*ARGUMENTS, RESPAWN):
        value = values.get(argument.name, argument.default)
        if argument.choices and value.lower() not in argument.choices:
            raise ValueError(f"{argument.name}:={value}: want one of {', '.join(filter(None, argument.choices))}")
    if not Path(params_file(values)).is_file():
        raise FileNotFoundError(f"parameter file {params_file(values)} does not exist")
    for name in ("bag", "rig"):
        if values.get(name) and not Path(values[name]).exists():
            raise FileNotFoundError(f"{name} {values[name]} does not exist")


def rviz_file() -> str:
    """Return the shipped RViz view."""
    return str(share_path("config/rviz/occbev.rviz"))


def rviz_command(values: Mapping[str, str]) -> list[str]:
    """Return the command that shows the results of a node that was started with these arguments in RViz."""
    return ["rviz2", *rviz_arguments(values)]


def rviz_arguments(values: Mapping[str, str]) -> list[str]:
    """Return the arguments of RViz: the shipped view with its topics remapped, and the clock of the node."""
    arguments = ["-d", rviz_file(), "--ros-args", "-r", VIEW_CALIBRATION]
    namespace = values.get("namespace", "")
    for topic in OUTPUT_TOPICS.values() if namespace.strip("/") else ():
        arguments += ["-r", f"{resolve(topic.name)}:={resolve(topic.name, namespace)}"]
    if parameters(values).get("use_sim_time"):
        arguments += ["-p", "use_sim_time:=true"]
    return arguments


def player_command(values: Mapping[str, str], extra: Mapping[str, str] | None = None) -> list[str]:
    """Return the command that replays the `bag` argument through a node that runs already.

    extra: further parameters of that node by dotted name.
    """
    command = [sys.executable, "-m", "occbev", "replay", values["bag"], "--no-node"]
    command += ["--params-file", params_file(values)]
    for name, value in (extra or {}).items():
        command += ["--set", f"{name}:={value}"]
    return [*command, "--namespace", values["namespace"]] if values.get("namespace") else command


def environment(receives: bool = False) -> dict[str, str]:
    """Return the environment that large images need, unless the user has chosen a profile.

    receives: of a process that receives images and sends none.
    """
    profile = share_path(RECEIVER_PROFILE if receives else PROFILE)
    chosen = {os.environ[variable] for variable in PROFILE_VARIABLES if os.environ.get(variable)}
    if chosen - {str(share_path(PROFILE)), str(share_path(RECEIVER_PROFILE))}:
        return {}
    old = os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy")
    return {PROFILE_VARIABLES[1 if old else 0]: str(profile)}


def own_domain() -> dict[str, str]:
    """Return the environment that keeps other nodes of this network out of a run, unless the user has chosen a domain."""
    own = {"ROS_DOMAIN_ID": str(1 + os.getpid() % 100), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    return {name: value for name, value in own.items() if name not in os.environ}


def node_arguments(values: Mapping[str, str], extra: Mapping[str, str] | None = None) -> list[str]:
    """Return the `--ros-args ...` that start the perception node as the launch file would.

    extra: further parameters by dotted name, which win.
    """
    arguments = ["--ros-args", "--params-file", params_file(values)]
    for name, value in {**parameters(values), **(extra or {})}.items():
        text = str(value).lower() if isinstance(value, bool) else value
        arguments += ["-p", f"{name}:={text}"]
    if values.get("namespace", "").strip("/"):
        arguments += ["-r", f"__ns:=/{values['namespace'].strip('/')}"]
    return [*arguments, "--log-level", values.get("log_level") or "info"]


def is_true(text: str) -> bool:
    """Read a launch argument as a truth value."""
    return text.strip().lower() in ("true", "1", "yes", "on")
