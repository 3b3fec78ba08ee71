"""Write any recording as a ROS 2 bag: what a vehicle's drivers would have published.

Topics: `/<cam>/image/compressed`, `/<cam>/camera_info`, `/lidar_top/points`, `/odometry`, `/tf`,
`/tf_static`; every header carries the capture time and messages are logged in stamp order.
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rosbags.interfaces import (
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from occbev.geometry import Array, invert_transform, xyzw_from_rotation
from occbev.results import CameraFrame, Sweep
from occbev.rig import Camera
from occbev_training.sources.nuscenes_writer import encode_jpeg
from occbev_training.sources.recording import Recording, RecordingError

BASE_FRAME, ODOM_FRAME, LIDAR_FRAME = "base_link", "odom", "lidar_top"
LIDAR_TOPIC, ODOMETRY_TOPIC = "/lidar_top/points", "/odometry"
TF_TOPIC, TF_STATIC_TOPIC = "/tf", "/tf_static"

BAG_VERSION: Literal[8] = 8
"""Metadata version that the tools of Humble and of everything later read."""

TYPESTORE = get_typestore(Stores.ROS2_JAZZY)
"""Message definitions; those used here are the same from Humble to Kilted."""

STORAGES = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}

LOOK_AHEAD_NS = 500_000_000
"""How long before its key frame a camera may fire."""

Messages = Callable[[], Iterator[tuple[str, Any]]]
"""Makes the (topic, message) pairs of one instant."""

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


@dataclass(frozen=True)
class BagSummary:
    """What a bag got: topic -> messages, and camera -> key frames in which it was missing."""

    messages: Mapping[str, int]
    missing: Mapping[str, int]


def image_topic(camera: str) -> str:
    """Topic of a camera's compressed images."""
    return f"/{camera.lower()}/image/compressed"


def info_topic(camera: str) -> str:
    """Topic of a camera's CameraInfo."""
    return f"/{camera.lower()}/camera_info"


def write_bag(recording: Recording, path: Path, storage: str = "mcap", progress: Progress | None = None) -> BagSummary:
    """Write one recording as a bag folder; it appears at `path` only when it is complete.

    storage: "mcap" or "sqlite3".

    Raises:
        RecordingError: the path exists already or the storage is unknown.
    """
    path = Path(path)
    if storage not in STORAGES:
        raise RecordingError(f"bag storage {storage!r} is unknown, known are {sorted(STORAGES)}")
    if path.exists():
        raise RecordingError(f"{path}: is there already; bags are never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Storage files are named after the folder, so the partial bag keeps its name one level down.
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        summary = _BagWriter(recording).write(staging / path.name, STORAGES[storage], progress)
        os.replace(staging / path.name, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return summary


class _BagWriter:
    """Puts the messages of one recording in stamp order and serialises them."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._missing: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._twist = _twists(recording.trajectory.stamp_ns, recording.trajectory.ego2global)

    def write(self, path: Path, plugin: StoragePlugin, progress: Progress | None) -> BagSummary:
        keys = len(self._recording.key_stamp_ns)
        total = len(self._recording.trajectory.stamp_ns) + len(self._recording.sweep_stamp_ns) + keys
        with Writer(path, version=BAG_VERSION, storage_plugin=plugin) as writer:
            connections: dict[str, Any] = {}
            for done, (stamp, make) in enumerate(self._instants(), 1):
                for topic, message in make():
                    if topic not in connections:
                        connections[topic] = writer.add_connection(
                            topic,
                            message.__msgtype__,
                            typestore=TYPESTORE,
                            offered_qos_profiles=[_qos(topic)],
                        )
                    data = TYPESTORE.serialize_cdr(message, message.__msgtype__)
                    writer.write(connections[topic], stamp, data)
                    self._sent[topic] += 1
                if progress is not None:
                    progress(min(done, total), total)
        return BagSummary(dict(sorted(self._sent.items())), dict(sorted(self._missing.items())))

    def _instants(self) -> Iterator[tuple[int, Messages]]:
        """Yield everything that is published, in stamp order, reading each key frame once.

        A key frame's images are read `LOOK_AHEAD` before its stamp, since only reading tells when
        each camera fired.
        """
        recording = self._recording
        known: list[tuple[int, int, int]] = [(int(s), 1, i) for i, s in enumerate(recording.trajectory.stamp_ns)]
        known += [(int(s), 2, i) for i, s in enumerate(recording.sweep_stamp_ns)]
        known += [(int(s) - LOOK_AHEAD_NS, 3, i) for i, s in enumerate(recording.key_stamp_ns)]
        known.sort()
        first = (recording.trajectory.stamp_ns[0], *recording.sweep_stamp_ns[:1])
        yield int(min(first)), self._static_messages
        waiting: list[tuple[int, int, Messages]] = []
        for count, (stamp, kind, index) in enumerate(known):
            while waiting and waiting[0][0] < stamp:
                due, _, messages = heapq.heappop(waiting)
                yield due, messages
            if kind < 3:
                yield stamp, partial(self._pose_messages if kind == 1 else self._sweep_messages, index)
                continue
            for frame in self._exposures(index):
                if frame.stamp_ns < stamp:
                    raise RecordingError(
                        f"{recording.name}: {frame.camera} fired at {frame.stamp_ns} ns, over "
                        f"{LOOK_AHEAD_NS / 1e9} s before its key frame"
                    )
                order = count * len(recording.rig) + recording.rig.names.index(frame.camera)
                send: Messages = partial(self._image_messages, frame)
                heapq.heappush(waiting, (frame.stamp_ns, order, send))
        for due, _, messages in sorted(waiting, key=lambda entry: entry[:2]):
            yield due, messages

    def _exposures(self, key: int) -> list[CameraFrame]:
        frame_set = self._recording.frame_set(key)
        self._missing.update(frame_set.missing.keys())
        return [frame for frame in frame_set.frames.values() if frame is not None]

    def _static_messages(self) -> Iterator[tuple[str, Any]]:
        stamp = int(self._recording.trajectory.stamp_ns[0])
        transforms = [
            _transform(stamp, BASE_FRAME, camera.name.lower(), camera.cam2ego) for camera in self._recording.rig.cameras
        ]
        transforms.append(_transform(stamp, BASE_FRAME, LIDAR_FRAME, self._recording.lidar2ego))
        yield TF_STATIC_TOPIC, _make("tf2_msgs/msg/TFMessage", transforms=transforms)

    def _pose_messages(self, index: int) -> Iterator[tuple[str, Any]]:
        stamp = int(self._recording.trajectory.stamp_ns[index])
        pose = self._recording.trajectory.ego2global[index]
        transform = _transform(stamp, ODOM_FRAME, BASE_FRAME, pose)
        yield TF_TOPIC, _make("tf2_msgs/msg/TFMessage", transforms=[transform])
        yield ODOMETRY_TOPIC, _odometry(stamp, pose, self._twist[index])

    def _sweep_messages(self, index: int) -> Iterator[tuple[str, Any]]:
        yield LIDAR_TOPIC, cloud_message(self._recording.sweep(index))

    def _image_messages(self, frame: CameraFrame) -> Iterator[tuple[str, Any]]:
        camera = self._recording.rig[frame.camera]
        yield info_topic(frame.camera), _camera_info(camera, frame.stamp_ns)
        yield image_topic(frame.camera), _image(frame)


def cloud_message(sweep: Sweep) -> Any:
    """Turn a sweep into a PointCloud2 with x, y, z, intensity and, where known, time (s from stamp)."""
    names = ["x", "y", "z", "intensity"] + ([] if sweep.time_offset is None else ["time"])
    values = np.zeros((len(sweep.points), len(names)), "<f4")
    values[:, :3] = sweep.points
    if sweep.intensity is not None:
        values[:, 3] = sweep.intensity
    if sweep.time_offset is not None:
        values[:, 4] = sweep.time_offset
    field_type = TYPESTORE.types["sensor_msgs/msg/PointField"]
    fields = [field_type(name, 4 * i, 7, 1) for i, name in enumerate(names)]  # 7: float32
    step = 4 * len(names)
    return _make(
        "sensor_msgs/msg/PointCloud2",
        header=_header(sweep.stamp_ns, LIDAR_FRAME),
        height=1,
        width=len(values),
        fields=fields,
        is_bigendian=False,
        point_step=step,
        row_step=step * len(values),
        data=values.view(np.uint8).reshape(-1),
        is_dense=bool(np.isfinite(values[:, :3]).all()),
    )


def _image(frame: CameraFrame) -> Any:
    data = frame.image if isinstance(frame.image, bytes) else encode_jpeg(frame.image)
    kind = "png" if data[:4] == b"\x89PNG" else "jpeg"
    return _make(
        "sensor_msgs/msg/CompressedImage",
        header=_header(frame.stamp_ns, frame.camera.lower()),
        format=kind,
        data=np.frombuffer(data, np.uint8),
    )


def _camera_info(camera: Camera, stamp_ns: int) -> Any:
    model = "plumb_bob" if camera.distortion_model == "none" else camera.distortion_model
    coefficients = camera.distortion or (0.0,) * 5
    projection = np.zeros((3, 4))
    projection[:, :3] = camera.intrinsic
    region = _make("sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return _make(
        "sensor_msgs/msg/CameraInfo",
        header=_header(stamp_ns, camera.name.lower()),
        height=camera.height,
        width=camera.width,
        distortion_model=model,
        d=np.array(coefficients, np.float64),
        k=camera.intrinsic.reshape(-1),
        r=np.eye(3).reshape(-1),
        p=projection.reshape(-1),
        binning_x=0,
        binning_y=0,
        roi=region,
    )


def _odometry(stamp_ns: int, pose: Array, twist: Array) -> Any:
    point = _make("geometry_msgs/msg/Point", **_xyz(pose[:3, 3]))
    pose_message = _make("geometry_msgs/msg/Pose", position=point, orientation=_quaternion(pose))
    linear, angular = (_make("geometry_msgs/msg/Vector3", **_xyz(v)) for v in (twist[:3], twist[3:]))
    unknown = np.zeros(36)
    return _make(
        "nav_msgs/msg/Odometry",
        header=_header(stamp_ns, ODOM_FRAME),
        child_frame_id=BASE_FRAME,
        pose=_make("geometry_msgs/msg/PoseWithCovariance", pose=pose_message, covariance=unknown),
        twist=_make(
            "geometry_msgs/msg/TwistWithCovariance",
            covariance=unknown,
            twist=_make("geometry_msgs/msg/Twist", linear=linear, angular=angular),
        ),
    )


def _transform(stamp_ns: int, parent: str, child: str, child2parent: Array) -> Any:
    translation = _make("geometry_msgs/msg/Vector3", **_xyz(child2parent[:3, 3]))
    transform = _make("geometry_msgs/msg/Transform", translation=translation, rotation=_quaternion(child2parent))
    return _make(
        "geometry_msgs/msg/TransformStamped",
        header=_header(stamp_ns, parent),
        child_frame_id=child,
        transform=transform,
    )


def _quaternion(a2b: Array) -> Any:
    x, y, z, w = xyzw_from_rotation(a2b[:3, :3]).tolist()
    return _make("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)


def _xyz(vector: Array) -> dict[str, float]:
    return dict(zip("xyz", np.asarray(vector, np.float64).tolist(), strict=True))


def _header(stamp_ns: int, frame: str) -> Any:
    seconds, nanoseconds = divmod(int(stamp_ns), 1_000_000_000)
    stamp = _make("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
    return _make("std_msgs/msg/Header", stamp=stamp, frame_id=frame)


def _make(msgtype: str, **fields: Any) -> Any:
    return TYPESTORE.types[msgtype](**fields)


def _qos(topic: str) -> Qos:
    """Reliable; transient local where late joiners need the last message."""
    static = topic == TF_STATIC_TOPIC
    durability = QosDurability.TRANSIENT_LOCAL if static else QosDurability.VOLATILE
    never = QosTime(2147483647, 4294967295)
    return Qos(
        QosHistory.KEEP_LAST,
        100,
        QosReliability.RELIABLE,
        durability,
        never,
        never,
        QosLiveliness.AUTOMATIC,
        never,
        False,
    )


def _twists(stamps: Any, poses: Array) -> Array:
    """Velocities (P, 6) in base_link, linear then angular, by differences between neighbours."""
    twists = np.zeros((len(stamps), 6))
    for i in range(len(stamps)):
        before, after = max(i - 1, 0), min(i + 1, len(stamps) - 1)
        seconds = (stamps[after] - stamps[before]) / 1e9
        if seconds <= 0:
            continue
        twists[i, :3] = poses[i, :3, :3].T @ (poses[after, :3, 3] - poses[before, :3, 3]) / seconds
        turn = (invert_transform(poses[before]) @ poses[after])[:3, :3]
        axis = [turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]
        twists[i, 3:] = np.array(axis) / 2 / seconds  # small angles between neighbours
    return twists
