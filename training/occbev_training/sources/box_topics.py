"""Boxes that a bag itself holds, so that a LiDAR detector teaches the cameras: its topics, and frames over time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from occbev.geometry import Array, invert_transform, make_transform, rotation_from_xyzw
from occbev.messages.bags import INTERFACES, BagReader
from occbev.messages.readers import header_stamp
from occbev.messages.tf import Buffer, InvalidArgumentException, clean_frame
from occbev.messages.topics import BagTopics
from occbev.trajectory import Trajectory
from occbev_training.sources.box_labels import LabelBox, LabelFrame
from occbev_training.sources.recording import RecordingError

DETECTIONS = "vision_msgs/msg/Detection3DArray"
AUTOWARE_PACKAGES = ("autoware_perception_msgs", "autoware_auto_perception_msgs")
AUTOWARE = tuple(
    f"{package}/msg/{kind}" for package in AUTOWARE_PACKAGES for kind in ("DetectedObjects", "TrackedObjects")
)
BOX_TYPES = (DETECTIONS, *AUTOWARE)
"""Message types that hold boxes; Autoware's older package has the same fields."""

AUTOWARE_CLASSES = (
    "unknown",
    "car",
    "truck",
    "bus",
    "trailer",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "animal",
    "hazard",
)
"""Categories by Autoware's label number; higher ones are called by their number."""

NO_ORIENTATION = 0
"""Autoware's orientation_availability of a box whose rotation is not known."""

BOX_MIN_SIZE = 1e-3


def box_topics(bag: Path) -> dict[str, str]:
    """List the topics of a bag that hold boxes, with their types."""
    with BagReader(bag) as reader:
        return {topic: kind for topic, kind in reader.topics.items() if kind in BOX_TYPES}


def read_box_topic(bag: Path, topic: str) -> tuple[list[LabelFrame], dict[str, int]]:
    """Read every message of a topic as one frame of boxes, in time order, and count the boxes left out by reason.

    Raises:
        RecordingError: no such topic, one of another type, or one without messages.
    """
    with BagReader(bag) as reader:
        kind = reader.topics.get(topic)
        if kind not in BOX_TYPES:
            found = {name: k for name, k in reader.topics.items() if k in BOX_TYPES}
            what = f"is a {kind}" if kind else "is not there"
            raise RecordingError(
                f"{bag}: {topic} {what}; want one of {', '.join(BOX_TYPES)}; topics of boxes are {found or 'none'}"
            )
        store, left_out = _type_store(), dict[str, int]()
        frames = {}
        for message in reader.messages([topic]):
            boxes = _frame_of(store.deserialize_cdr(message.data, kind), header_stamp(message.data), kind, left_out)
            frames[boxes.stamp_ns] = boxes
    if not frames:
        raise RecordingError(f"{bag}: {topic} has no message")
    return [frames[stamp] for stamp in sorted(frames)], left_out


def _type_store() -> Typestore:
    store = get_typestore(Stores.ROS2_JAZZY)
    folders = {"vision_msgs": "vision_msgs", **dict.fromkeys(AUTOWARE_PACKAGES, AUTOWARE_PACKAGES[0])}
    for package, folder in folders.items():
        types: dict[str, Any] = {}
        for file in sorted((INTERFACES / folder / "msg").glob("*.msg")):
            types |= get_types_from_msg(file.read_text(), f"{package}/msg/{file.stem}")
        store.register({name: fields for name, fields in types.items() if name not in store.types})
    return store


def _frame_of(message: Any, stamp_ns: int, kind: str, left_out: dict[str, int]) -> LabelFrame:
    items = message.detections if kind == DETECTIONS else message.objects
    read: Callable[[Any], LabelBox | str] = _box_of_detection if kind == DETECTIONS else _box_of_object
    boxes = []
    for item in items:
        box = read(item)
        if isinstance(box, str):
            left_out[box] = left_out.get(box, 0) + 1
        else:
            boxes.append(box)
    return LabelFrame(stamp_ns, clean_frame(message.header.frame_id), tuple(boxes))


def _box_of_detection(detection: Any) -> LabelBox | str:
    best = max((result.hypothesis for result in detection.results), key=lambda h: h.score, default=None)
    if best is None:
        return "without a class"
    size = detection.bbox.size
    return _make_box(best.class_id, detection.bbox.center, (size.x, size.y, size.z), None, detection.id, best.score)


def _box_of_object(item: Any) -> LabelBox | str:
    best = max(item.classification, key=lambda c: c.probability, default=None)
    if best is None:
        return "without a class"
    label = int(best.label)
    category = AUTOWARE_CLASSES[label] if label < len(AUTOWARE_CLASSES) else f"autoware {label}"
    motion, size = item.kinematics, item.shape.dimensions
    pose, velocity = motion.pose_with_covariance.pose, None
    if motion.orientation_availability == NO_ORIENTATION and category not in ("pedestrian", "unknown"):
        return "without an orientation"
    if getattr(motion, "has_twist", True):
        linear = motion.twist_with_covariance.twist.linear
        velocity = np.array([linear.x, linear.y, linear.z])
    track = bytes(item.object_id.uuid).hex() if hasattr(item, "object_id") else ""
    return _make_box(category, pose, (size.x, size.y, size.z), velocity, track, float(item.existence_probability))


def _make_box(
    category: str, pose: Any, size: tuple[float, float, float], own_velocity: Array | None, track: str, score: float
) -> LabelBox | str:
    """Make a box; own_velocity: (3,) along the box's own axes, as Autoware has it."""
    p, q = pose.position, pose.orientation
    if not np.isfinite([p.x, p.y, p.z, *size]).all():
        return "not finite"
    if min(size) < BOX_MIN_SIZE:
        return "without a size"
    quaternion = (q.x, q.y, q.z, q.w)
    if not any(quaternion):
        quaternion = (0.0, 0.0, 0.0, 1.0)  # of what has no orientation, such as a pedestrian
    try:
        rotation = rotation_from_xyzw(quaternion)
    except ValueError:
        return "with a broken orientation"
    velocity = None if own_velocity is None or not np.isfinite(own_velocity).all() else rotation @ own_velocity
    lwh = (float(size[0]), float(size[1]), float(size[2]))
    return LabelBox(category, make_transform(rotation, (p.x, p.y, p.z)), lwh, velocity, track, score)


class BagFrames:
    """Every frame that a bag's transforms and odometry know, over its whole time."""

    def __init__(self, bag: Path, base_frame: str, trajectory: Trajectory, topics: BagTopics) -> None:
        """trajectory: of the vehicle, in the frame of the odometry topic, if there is one."""
        self._base, self._trajectory, self._odometry_frame = base_frame, trajectory, ""
        self._buffer = Buffer(cache_s=1e9)
        store = _type_store()
        with BagReader(bag) as reader:
            trees = [topic for topic in (topics.tf_static, topics.tf) if topic in reader.topics]
            for message in reader.messages(trees):
                self._add(store.deserialize_cdr(message.data, message.type), message.topic == topics.tf_static)
            for message in reader.messages([] if topics.odometry is None else [topics.odometry]):
                pose: Any = store.deserialize_cdr(message.data, message.type)
                self._odometry_frame = clean_frame(pose.header.frame_id)
                break

    def frame2base(self, frame: str, stamp_ns: int) -> Array:
        """Return (4, 4) of a frame at one time; raises TransformException or PoseError where it is not known."""
        frame = clean_frame(frame)
        if frame == self._base:
            return np.eye(4)
        if frame == self._odometry_frame:
            return invert_transform(self._trajectory.at(stamp_ns))
        return self._buffer.lookup_matrix(self._base, frame, stamp_ns)

    def _add(self, message: Any, static: bool) -> None:
        add = self._buffer.set_transform_static if static else self._buffer.set_transform
        for transform in message.transforms:
            with suppress(InvalidArgumentException):  # what the tree cannot hold, no box needs
                add(transform)
