"""Parameters of the perception node: one dataclass is the schema, ROS declarations and YAML follow from it.

What training fixed (grids, classes, normalisation) is not here: it travels in the model package.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import inspect
import logging
import textwrap
import typing
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from occbev.config import ConfigError, bounded, from_record
from occbev.files import read_yaml
from occbev.geometry import pose_from_xyzw
from occbev.graph import COMPRESSED, DEFAULT_CAMERAS, IMAGE, ODOMETRY, camera_topics
from occbev.inference.backend import PROVIDERS
from occbev.inference.ground_grid import GroundGridConfig
from occbev.inference.tracking import TrackingConfig
from occbev.messages.image_headers import MAX_IMAGE_PIXELS
from occbev.messages.readers import is_rectified
from occbev.messages.topics import POSE_TYPES, TF_STATIC_TOPIC, TF_TOPIC, front_camera, load_topics
from occbev.results import RecordingError
from occbev.streams.sync import SyncConfig

LOG = logging.getLogger(__name__)

QOS_PREFIX = "qos_overrides."
"""How ROS 2 names the quality of service of a node's topics: qos_overrides.<topic>.<publisher|subscription>.<policy>."""

OLD_NAMES = {"sets_at_once": "max_in_flight", "waiting_sets": "max_waiting_sets", "ledger_path": "frame_log_path"}
"""Parameters that were renamed: old name -> new name. The old names work in version 0.1, with a warning."""

EXECUTORS = ("sparing", "rclpy")


@dataclass(frozen=True)
class CameraParameters:
    """Where one camera's images and calibration come from."""

    topic: str = ""
    """Image topic; one that ends in "compressed" carries CompressedImage. Empty: ~/input/<camera>/image and its compressed form."""
    info_topic: str = ""
    """CameraInfo topic; empty: ~/input/<camera>/camera_info."""
    frame_id: str = ""
    """Optical frame, where the messages' own frame_id is wrong or empty."""
    extrinsic: tuple[float, ...] = ()
    """Camera to base_link as x, y, z, qx, qy, qz, qw, used where TF has no such transform; empty for none."""
    image_is_rectified: str = "auto"
    """true uses P and no distortion, false K and D; auto is true for a topic with "rect" in its name or a zero D."""

    def __post_init__(self) -> None:
        if len(self.extrinsic) not in (0, 7):
            raise ConfigError(f"extrinsic: want 7 numbers x, y, z, qx, qy, qz, qw, got {len(self.extrinsic)}")
        if self.extrinsic:
            try:
                self.cam2ego()
            except ValueError as error:
                raise ConfigError(f"extrinsic: {error}") from error
        if self.image_is_rectified not in ("auto", "true", "false"):
            raise ConfigError(f"image_is_rectified {self.image_is_rectified!r}: must be auto, true or false")

    def cam2ego(self) -> NDArray[np.float64]:
        """Return `extrinsic` as camera to base_link (4, 4); raises ValueError where its quaternion is none."""
        x, y, z, qx, qy, qz, qw = self.extrinsic
        return pose_from_xyzw((x, y, z), (qx, qy, qz, qw))

    def is_rectified(self) -> bool | None:
        """Whether images are rectified; None leaves it to the distortion in CameraInfo."""
        if self.image_is_rectified != "auto":
            return self.image_is_rectified == "true"
        return is_rectified(self.topic)


@dataclass(frozen=True)
class EgoMotionParameters:
    """How the vehicle moved between the exposures of one set."""

    source: str = "auto"
    """odometry, tf, none, or auto: odometry if it is received, else TF."""
    odometry_topic: str = ODOMETRY.name
    """Topic of odometry or poses of the base frame."""
    odometry_type: str = ODOMETRY.type
    """nav_msgs/msg/Odometry, geometry_msgs/msg/PoseStamped or geometry_msgs/msg/PoseWithCovarianceStamped."""
    fixed_frame: str = "odom"
    """TF frame that does not move."""
    wait_s: float = bounded(0.1, 0.0, 1.0)
    """How long a frame set waits for the pose at its last exposure."""

    def __post_init__(self) -> None:
        if self.source not in ("auto", "odometry", "tf", "none"):
            raise ConfigError(f"source {self.source!r}: must be auto, odometry, tf or none")
        if self.odometry_type not in POSE_TYPES:
            raise ConfigError(f"odometry_type {self.odometry_type!r}: must be {', '.join(POSE_TYPES)}")


@dataclass(frozen=True)
class DetectionParameters:
    """Which boxes are published."""

    score_threshold: float = bounded(0.1, 0.0001, 0.9999, live=True)
    """Lowest score of a published box."""
    max_boxes: int = bounded(100, 0, 500, live=True)
    """Largest number of boxes of one result; those with the highest scores are kept."""
    marker_threshold: float = bounded(0.3, 0.0, 1.0, live=True)
    """Lowest score of a box that is drawn as a marker."""


@dataclass(frozen=True)
class OccupancyParameters:
    """Voxels that are put out."""

    publish: str = field(default="occupied", metadata={"live": True})
    """occupied: occupied voxels only; observed: free voxels too."""

    def __post_init__(self) -> None:
        if self.publish not in ("occupied", "observed"):
            raise ConfigError(f"publish {self.publish!r}: must be occupied or observed")


@dataclass(frozen=True)
class PerceptionParameters:
    """All parameters of the perception node."""

    model: str = field(default="occbev-tiny", metadata={"unconfigured": True})
    """Model package: a folder, or the name of a shipped one."""
    backend: str = field(default="auto", metadata={"unconfigured": True})
    """Inference runtime: openvino, onnxruntime, tensorrt, torch or auto."""
    device: int = bounded(0, 0, 15)
    """CUDA index of the GPU, of TensorRT and of ONNX Runtime's GPU providers."""
    provider: str = "auto"
    """Execution provider of ONNX Runtime: cpu, cuda, tensorrt, or auto: CUDA where its GPU build is installed."""
    threads: int = bounded(0, 0, 256)
    """CPU threads of the runtime; 0: the runtime decides."""
    max_in_flight: int = bounded(0, 0, 2)
    """Frame sets in the network at a time (OpenVINO): 1 for low latency, 2 for throughput; 0: 2 on up to two cores, else 1."""
    topics: str = ""
    """YAML file that names all topics, as for `bag-check` and `pairs`; other parameters that you set take precedence."""
    tf_topic: str = TF_TOPIC
    """Topic of moving transforms."""
    tf_static_topic: str = TF_STATIC_TOPIC
    """Topic of fixed transforms."""
    rig: str = field(default="", metadata={"unconfigured": True})
    """Rig file to use instead of CameraInfo and TF; empty: calibration comes from the topics."""
    base_frame: str = "base_link"
    """Frame of all results: x forward, y left, z up."""
    anchor: str = ""
    """Camera whose image stamps are the key times; empty: the front camera by its name, else the first camera."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """How images of different cameras are joined."""
    ego_motion: EgoMotionParameters = field(default_factory=EgoMotionParameters)
    """Compensation of the vehicle's motion between exposures."""
    detection: DetectionParameters = field(default_factory=DetectionParameters)
    """Boxes that are put out."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Identities of boxes over time."""
    occupancy: OccupancyParameters = field(default_factory=OccupancyParameters)
    """Voxels that are put out."""
    ground_grid: GroundGridConfig = field(default_factory=GroundGridConfig)
    """Which cells of the ground are blocked, free or unknown."""
    marker_lifetime_s: float = bounded(0.5, 0.0, 60.0, live=True)
    """Markers vanish after this time without a new result."""
    decode_threads: int = bounded(2, 1, 64)
    """Threads that decode images as they arrive."""
    queue_depth: int = bounded(5, 1, 100)
    """Depth of the middleware's queue for each image topic."""
    max_waiting_sets: int = bounded(1, 1, 100)
    """Frame sets that may wait while the network runs; a newer one replaces the oldest."""
    frozen_after: int = bounded(10, 0, 1000, live=True)
    """A camera that sends identical pixels this many times in a row is left out; 0: no check."""
    black_below: int = bounded(4, 0, 255, live=True)
    """An image whose brightest value is below this is left out as black; 0: no check."""
    max_image_pixels: int = bounded(MAX_IMAGE_PIXELS, 1, 10**9, live=True)
    """Images with more pixels are refused before memory is allocated."""
    debug_topics: bool = False
    """Publish the latency of every stage under ~/debug."""
    frame_log_path: str = ""
    """File that gets one JSON line for every key time: processed, or dropped and why; empty for none."""
    executor: str = "sparing"
    """sparing: occbev's own executor, which needs less CPU time; rclpy: its SingleThreadedExecutor."""
    autostart: bool = True
    """Configure and activate at start, without a lifecycle manager."""
    build_only: bool = False
    """Load the model (TensorRT builds and stores its engine), then exit; for the command line."""
    cameras: Mapping[str, CameraParameters] = field(
        default_factory=lambda: {name: CameraParameters() for name in DEFAULT_CAMERAS}
    )
    """Cameras by name, in order; in ROS the order is `cameras.names`."""

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ConfigError(f"executor {self.executor!r}: must be {' or '.join(EXECUTORS)}")
        if self.provider not in PROVIDERS:
            raise ConfigError(f"provider {self.provider!r}: must be one of {', '.join(PROVIDERS)}")
        if not self.base_frame:
            raise ConfigError("base_frame is empty: name the frame of the vehicle, such as base_link")
        if not self.cameras:
            raise ConfigError("cameras.names is empty: name at least one camera")
        if self.anchor and self.anchor not in self.cameras:
            raise ConfigError(f"anchor {self.anchor!r} is not one of cameras.names {list(self.cameras)}")
        self._require_own_topics()
        if self.sync.min_cameras > len(self.cameras):
            raise ConfigError(f"sync.min_cameras {self.sync.min_cameras} exceeds the {len(self.cameras)} cameras")

    def _require_own_topics(self) -> None:
        owners: dict[str, str] = {}
        for name in self.cameras:
            for topic in self.image_topics(name):
                if owners.setdefault(topic, name) != name:
                    raise ConfigError(f"cameras {owners[topic]} and {name} both read {topic}: each needs its own topic")

    @property
    def names(self) -> tuple[str, ...]:
        """Camera names in order."""
        return tuple(self.cameras)

    @property
    def anchor_camera(self) -> str:
        """The camera whose images are the key times."""
        return self.anchor or front_camera(self.names)

    def image_topics(self, camera: str) -> dict[str, str]:
        """Return image topic -> message type of one camera."""
        topic = self.cameras[camera].topic
        if topic:
            return {topic: COMPRESSED if topic.endswith("compressed") else IMAGE}
        return {t.name: t.type for t in camera_topics(camera)[:2]}

    def info_topic(self, camera: str) -> str:
        """Return the calibration topic of one camera."""
        return self.cameras[camera].info_topic or camera_topics(camera)[2].name


def read_parameters(path: Path, changes: Mapping[str, str] | None = None) -> PerceptionParameters:
    """Read a ROS parameter file: every `ros__parameters` in it, in order, laid over each other.

    changes: dotted name -> value in YAML, laid over the file.

    Raises:
        ConfigError: naming the file and the dotted key.
    """
    try:
        document = read_yaml(path)
        merged: dict[str, Any] = {}
        for node in (document or {}).values():
            merged.update(node["ros__parameters"])
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a ROS parameter file (node name, then ros__parameters): {error!r}") from error
    values = {name: parse_value(name, text) for name, text in (changes or {}).items()}
    try:
        return parameters_from_record(nest_names(values, merged))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}:={text}: not a value in YAML") from error


def parameters_from_record(record: Mapping[str, Any]) -> PerceptionParameters:
    """Build parameters from nested plain values, `cameras.names` giving the order."""
    record = {key: value for key, value in record.items() if key != "use_sim_time" and not key.startswith("qos_")}
    for warning in rename_old(record):
        LOG.warning(warning)
    if record.get("topics"):
        record = _lay_topics_under(record, read_topic_values(str(record["topics"])))
    cameras = record.pop("cameras", {}) or {}
    if not isinstance(cameras, Mapping):
        raise ConfigError(f"cameras is {cameras!r}: want keys and values, names among them")
    cameras = dict(cameras)
    names = _list_of_texts("cameras.names", cameras.pop("names", DEFAULT_CAMERAS))
    dotted = [name for name in names if "." in name]
    if dotted:
        raise ConfigError(
            f"cameras.names: {dotted[0]!r} has a dot, which divides names of ROS parameters: rename the camera"
        )
    strangers = sorted(set(cameras) - set(names))
    if strangers:
        near = difflib.get_close_matches(strangers[0], names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"cameras.{strangers[0]} is not in cameras.names {names}{hint}")
    if len(set(names)) != len(names):
        raise ConfigError(f"cameras.names holds a camera twice: {names}")
    record["cameras"] = {name: cameras.get(name, {}) for name in names}
    parameters = from_record(PerceptionParameters, record)
    for leaf in leaves(PerceptionParameters):
        _check_range(leaf, attrgetter(leaf.name)(parameters))
    return parameters


def read_topic_values(path: str) -> dict[str, Any]:
    """Return dotted parameter -> value of a file that names all topics; raises ConfigError."""
    try:
        topics = load_topics(Path(path))
    except RecordingError as error:
        raise ConfigError(f"topics: {error}") from error
    values: dict[str, Any] = {"cameras.names": list(topics.images)}
    for name, topic in topics.images.items():
        values[f"cameras.{name}.topic"] = topic
        values[f"cameras.{name}.info_topic"] = topics.infos.get(name, "")
        values[f"cameras.{name}.frame_id"] = topics.frames.get(name, "")
    pose = {"odometry_topic": topics.odometry} if topics.odometry else {"source": "tf"}
    values |= {f"ego_motion.{key}": value for key, value in pose.items()}
    return values | {"tf_topic": topics.tf, "tf_static_topic": topics.tf_static}


def _lay_topics_under(record: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Put values in where a record has none, or what a parameter is where nobody sets it.

    Where the record has the cameras that parameters have by default, those of the values take their place.
    """
    defaults = {leaf.name: leaf.default for leaf in leaves(PerceptionParameters)}
    merged = copy.deepcopy(dict(record))
    names = (record.get("cameras") or {}).get("names", values["cameras.names"])
    chosen = names
    if list(names) == list(DEFAULT_CAMERAS):
        chosen = values["cameras.names"]
        strangers = set(DEFAULT_CAMERAS) - set(chosen)
        merged["cameras"] = {key: v for key, v in (merged.get("cameras") or {}).items() if key not in strangers}
        if merged.get("anchor") in strangers:
            merged["anchor"] = ""
    for name, value in values.items():
        *parents, last = name.split(".")
        if parents[:1] == ["cameras"] and len(parents) == 2 and parents[1] not in chosen:
            continue
        place = merged
        for parent in parents:
            place = place.setdefault(parent, {})
        default = list(DEFAULT_CAMERAS) if name == "cameras.names" else defaults.get(name, "")
        if last not in place or place[last] == default:
            place[last] = value
    return merged


@dataclass(frozen=True)
class Leaf:
    """One parameter: dotted name, default, help text, range, and whether it may change while the node runs."""

    name: str
    default: Any
    text: str
    range: tuple[float, float] | None = None
    live: bool = False
    unconfigured: bool = False
    """Whether it may change before the node is configured."""


@cache
def leaves(schema: type, prefix: str = "") -> tuple[Leaf, ...]:
    """List the parameters of a dataclass, nested ones with dotted names; mappings are left out.

    It walks the schema alone, `occbev.config.from_record` the values: neither can do the other's work.
    """
    return tuple(_leaves(schema, prefix))


def _leaves(schema: type, prefix: str) -> Iterator[Leaf]:
    texts, hints = field_texts(schema), typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[entry.name]):
            yield from leaves(hints[entry.name], f"{prefix}{entry.name}.")
        elif typing.get_origin(hints[entry.name]) is not Mapping:
            yield Leaf(
                prefix + entry.name,
                entry.default,
                texts[entry.name],
                entry.metadata.get("range"),
                entry.metadata.get("live", False),
                entry.metadata.get("unconfigured", False),
            )


def read_values(given: Mapping[str, str]) -> dict[str, Any]:
    """Return parameters given as text in the type of each; raises ConfigError for an unknown name or a wrong value."""
    values = {}
    for name, text in given.items():
        leaf = find_leaf(name)
        if leaf is None:
            raise ConfigError(f"parameter {name} is unknown")
        values[name] = fit_value(leaf, parse_value(name, text))
    return values


def find_leaf(name: str) -> Leaf | None:
    """Return the parameter of a dotted name, also of one camera's; None for an unknown one."""
    known = {leaf.name: leaf for leaf in (*leaves(PerceptionParameters), CAMERA_NAMES)}
    own = {leaf.name: leaf for leaf in leaves(CameraParameters)}
    if name.startswith("cameras.") and name.count(".") == 2:
        return dataclasses.replace(own[name.split(".")[2]], name=name) if name.split(".")[2] in own else None
    return known.get(OLD_NAMES.get(name, name))


def field_texts(schema: type) -> dict[str, str]:
    """Return field -> the docstring under it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for statement, following in zip(body, body[1:], strict=False):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_text:
            texts[statement.target.id] = str(following.value.value)
    return texts


CAMERA_NAMES = Leaf(
    "cameras.names",
    list(DEFAULT_CAMERAS),
    "Cameras in order; each has its own cameras.<name>.* parameters.",
)

UNCONFIGURED = frozenset(leaf.name for leaf in leaves(PerceptionParameters) if leaf.unconfigured)
"""Parameters that may change while the node is unconfigured."""


def _list_of_texts(name: str, value: Any) -> list[str]:
    if not (isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)):
        raise ConfigError(f"{name} is {value!r}: want a list of texts")
    return list(value)


def fit_value(leaf: Leaf, value: Any) -> Any:
    """Return a value in the type of its parameter: 5 is a double where one is wanted.

    Raises:
        ConfigError: another type, or out of range.
    """
    wanted = type(leaf.default)
    if wanted is list:
        _list_of_texts(leaf.name, value)
    if wanted in (tuple, list):
        return value
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{leaf.name} is {value!r}: want a {_TYPE_NAMES[wanted]}")
    _check_range(leaf, value)
    return value


def _check_range(leaf: Leaf, value: Any) -> None:
    if leaf.range is not None and not leaf.range[0] <= value <= leaf.range[1]:
        low, high = leaf.range
        raise ConfigError(f"{leaf.name} is {value}: must be between {low} and {high}")


_TYPE_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def rename_old(values: MutableMapping[str, Any]) -> list[str]:
    """Move values of old parameter names to the new ones; return a warning for each.

    Where both are given and the new one is not at its default, the new one holds.
    """
    warnings = []
    for old, new in OLD_NAMES.items():
        if old in values:
            value = values.pop(old)
            if values.get(new, _default(new)) == _default(new):
                values[new] = value
            warnings.append(f"parameter {old} is now called {new}; the old name works for one more version")
    return warnings


def _default(name: str) -> Any:
    return next(leaf.default for leaf in leaves(PerceptionParameters) if leaf.name == name)


def is_ours(name: str) -> bool:
    """Whether a parameter is of this node's schema, not one that rclpy declares."""
    return not name.startswith(("use_sim_time", "start_type_description", QOS_PREFIX))


def nest_names(values: Mapping[str, Any], onto: dict[str, Any] | None = None) -> dict[str, Any]:
    """Turn dotted names into nested mappings, over those of `onto`."""
    record: dict[str, Any] = {} if onto is None else onto
    for name, value in values.items():
        *parents, last = name.split(".")
        place = record
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = list(value) if hasattr(value, "tolist") or isinstance(value, tuple) else value
    return record
