"""Read ROS 2 bags as recordings: sqlite3 or MCAP, found by their usual topic names or by a given mapping.

Headers' stamps count, not log times; what was read is compared with the count that the bag
promises, since a bag that silently yields less than it holds would make silent holes in the data.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rosbags.rosbag2 import Reader
from rosbags.rosbag2.errors import ReaderError

from occbev.geometry import Array, make_transform, rotation_from_xyzw
from occbev.results import CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory
from occbev_training.sources.bag_writer import (
    BASE_FRAME,
    TF_STATIC_TOPIC,
    TF_TOPIC,
    TYPESTORE,
    BagSummary,
    write_bag,
)
from occbev_training.sources.nuscenes import CAMERA_ORDER
from occbev_training.sources.recording import RecordingError
from occbev_training.sources.truth import Truth, read_truth, write_truth

__all__ = [
    "Bag", "BagRecording", "BagSummary", "BagTopics", "Truth", "detect_topics", "read_truth",
    "write_bag", "write_truth",
]  # fmt: skip

IMAGE_TYPES = ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image")
KEY_TOLERANCE = 0.06
"""Seconds that a frame may lie from the anchor camera's, and a sweep from the frames, to be of one key."""

FIELD_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
"""numpy type of each sensor_msgs/PointField datatype."""


@dataclass(frozen=True)
class BagTopics:
    """Which topics of a bag hold what. images, infos: camera -> topic."""

    images: Mapping[str, str]
    infos: Mapping[str, str]
    lidar: str | None = None
    odometry: str | None = None


class Bag:
    """An open bag: every storage file of a bag folder, or one storage file alone.

    Storage files are read directly: joined through `metadata.yaml`, bags of ROS 2 itself can yield
    no message at all where the QoS texts of the two differ.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises RecordingError naming the path and what is wrong with it."""
        self.path = Path(path)
        self._stack = ExitStack()
        self.expected: dict[str, int] | None = None
        """Promised messages by topic, or None where there is no metadata."""
        files = self._files()
        self._readers = []
        try:
            for file in files:
                self._readers.append(self._stack.enter_context(Reader(file)))
        except (ReaderError, OSError, ValueError) as error:
            self.close()
            raise RecordingError(f"{file}: no readable ROS 2 bag: {error}") from error
        self.topics = {c.topic: c.msgtype for reader in self._readers for c in reader.connections}

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def messages(
        self, topics: Sequence[str] | None = None, start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[str, int, bytes]]:
        """Yield (topic, log time in ns, CDR bytes) of the named topics, or of all, file after file."""
        for reader in self._readers:
            wanted = [c for c in reader.connections if topics is None or c.topic in topics]
            if not wanted or _outside(reader, start, stop):
                continue
            for connection, log_ns, data in reader.messages(wanted, start, stop):
                yield connection.topic, log_ns, bytes(data)

    def parse(self, topic: str, data: bytes) -> Any:
        """Turn CDR bytes into a message object."""
        return TYPESTORE.deserialize_cdr(data, self.topics[topic])

    def check_counts(self, read: Mapping[str, int]) -> None:
        """Raise RecordingError where fewer or more messages were read than the bag promises."""
        for topic, count in read.items():
            promised = self.expected.get(topic) if self.expected is not None else None
            if promised is not None and promised != count:
                raise RecordingError(f"{self.path}: {topic}: metadata.yaml promises {promised} messages, "
                                     f"{count} were read; the bag is damaged or was cut")  # fmt: skip

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise RecordingError(f"{self.path}: no such bag")
        if self.path.is_file():
            return [self.path]
        metadata = self.path / "metadata.yaml"
        if not metadata.is_file():
            found = sorted([*self.path.glob("*.mcap"), *self.path.glob("*.db3")])
            if not found:
                raise RecordingError(
                    f"{self.path}: no metadata.yaml, *.mcap or *.db3 in it, so it is no bag folder"
                )
            return found
        return self._read_metadata(metadata)

    def _read_metadata(self, metadata: Path) -> list[Path]:
        try:
            record = yaml.safe_load(metadata.read_text())["rosbag2_bagfile_information"]
            self.expected = {
                entry["topic_metadata"]["name"]: int(entry["message_count"])
                for entry in record["topics_with_message_count"]
            }
            names = [Path(name).name for name in record["relative_file_paths"]]
            compressed = record.get("compression_mode", "")
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise RecordingError(f"{metadata}: not the metadata of a bag: {error}") from error
        if compressed and compressed.lower() != "none":
            return [self.path]  # only the joined reader unpacks compressed bags
        absent = [name for name in names if not (self.path / name).is_file()]
        if absent:
            raise RecordingError(f"{metadata}: names {absent}, which are not there")
        return [self.path / name for name in names]


def _outside(reader: Reader, start: int | None, stop: int | None) -> bool:
    return (start is not None and reader.end_time <= start) or (
        stop is not None and reader.start_time >= stop
    )


def detect_topics(topics: Mapping[str, str]) -> BagTopics:
    """Find cameras, LiDAR and odometry among topics (name -> type) by type and by name.

    A camera is an image topic with a `camera_info` beside it; it is named after that folder, in
    upper case where it begins with "cam_". Compressed images are taken before raw ones.

    Raises:
        RecordingError: no camera is found, or several topics could be the LiDAR or the odometry.
    """
    images: dict[str, str] = {}
    infos: dict[str, str] = {}
    for topic in sorted(
        topics, key=lambda name: topics[name] == IMAGE_TYPES[0]
    ):  # raw, then compressed
        folder = topic.removesuffix("/compressed").rpartition("/")[0]
        if topics[topic] not in IMAGE_TYPES or f"{folder}/camera_info" not in topics:
            continue
        name = folder.rpartition("/")[2]
        name = name.upper() if name.lower().startswith("cam_") else name
        images[name], infos[name] = topic, f"{folder}/camera_info"
    if not images:
        raise RecordingError(
            f"no image topic with a camera_info beside it; topics are {_listed(topics)}"
        )
    lidar = _only(topics, "sensor_msgs/msg/PointCloud2", "lidar")
    odometry = _only(topics, "nav_msgs/msg/Odometry", "odom")
    return BagTopics(images, infos, lidar, odometry)


def _only(topics: Mapping[str, str], msgtype: str, hint: str) -> str | None:
    """Return the topic of a type; among several, the one whose name holds the hint."""
    found = [name for name, kind in topics.items() if kind == msgtype]
    hinted = [name for name in found if hint in name.lower()]
    choice = found if len(found) < 2 else hinted
    if len(found) > 1 and len(hinted) != 1:
        raise RecordingError(f"several topics of type {msgtype}: {sorted(found)}; name one")
    return choice[0] if choice else None


def _listed(topics: Mapping[str, str]) -> str:
    return ", ".join(f"{name} [{kind}]" for name, kind in sorted(topics.items())) or "none"


@dataclass
class _Index:
    """Where the messages of a topic are: header stamps and log times (M,) in ns."""

    stamp_ns: list[int] = field(default_factory=list)
    log_ns: list[int] = field(default_factory=list)


class BagRecording:
    """A bag as a `Recording`. It holds no labels: `annotations` and `occupancy_truth` return None.

    A key frame is one exposure of the anchor camera with the nearest exposure of every other;
    its stamp is the nearest sweep's, or the last exposure's where no sweep is near.
    """

    def __init__(self, path: Path | str, topics: BagTopics | None = None, *, anchor: str | None = None,
                 key_interval: float = 0.0, base_frame: str = BASE_FRAME) -> None:  # fmt: skip
        """Index a bag.

        topics: which topic is what; detected by `detect_topics` if None.
        anchor: the camera whose exposures make key frames; CAM_FRONT or else the first.
        key_interval: least seconds between key frames.

        Raises:
            RecordingError: saying which topic, frame or count is wrong.
        """
        self._bag = Bag(path)
        self.name = self._bag.path.stem
        self._base_frame = base_frame
        self.topics = self._checked(topics) if topics else self._detected()
        self._index, kept = self._scan()
        self._static = self._static_transforms(kept[TF_STATIC_TOPIC])
        self.rig = self._rig(kept)
        self.lidar2ego = self._lidar2ego()
        self.trajectory = self._read_trajectory(kept)
        sweeps = self._index[self.topics.lidar] if self.topics.lidar else _Index()
        order = np.argsort(sweeps.stamp_ns, kind="stable")
        self.sweep_stamp_ns = np.array(sweeps.stamp_ns, np.int64)[order]
        self._sweep_log = np.array(sweeps.log_ns, np.int64)[order]
        self._keys = self._find_keys(anchor, key_interval)
        self.key_stamp_ns = np.array([stamp for stamp, _ in self._keys], np.int64)

    def close(self) -> None:
        """Close the bag."""
        self._bag.close()

    def sweep(self, index: int) -> Sweep:
        """Read one LiDAR rotation; a field of per-point times is kept as offsets from the stamp."""
        topic = self.topics.lidar
        assert topic is not None, "a bag without LiDAR has no sweep to read"
        message = self._message(topic, int(self._sweep_log[index]), int(self.sweep_stamp_ns[index]))
        return _sweep(message, topic, self.lidar2ego)

    def frame_set(self, key: int) -> FrameSet:
        """Read the images of one key frame, encoded ones as their bytes."""
        stamp, chosen = self._keys[key]
        frames: dict[str, CameraFrame | None] = {}
        missing: dict[str, str] = {}
        for name in self.rig.names:
            frames[name] = None
            if name not in chosen:
                missing[name] = f"no message on {self.topics.images[name]} within {KEY_TOLERANCE} s"
                continue
            index = self._index[self.topics.images[name]]
            exposure = index.stamp_ns[chosen[name]]
            message = self._message(self.topics.images[name], index.log_ns[chosen[name]], exposure)
            frames[name] = CameraFrame(name, exposure, _image(message, self.topics.images[name]),
                                       self._pose_or_none(exposure))  # fmt: skip
        return FrameSet(stamp, frames, missing)

    def annotations(self, key: int) -> None:
        """Bags hold no boxes."""

    def occupancy_truth(self, key: int) -> None:
        """Bags hold no dense labels."""

    def _detected(self) -> BagTopics:
        try:
            return detect_topics(self._bag.topics)
        except RecordingError as error:
            raise RecordingError(f"{self._bag.path}: {error}") from error

    def _checked(self, topics: BagTopics) -> BagTopics:
        wanted = [*topics.images.values(), *topics.infos.values()]
        wanted += [topic for topic in (topics.lidar, topics.odometry) if topic]
        absent = [topic for topic in wanted if topic not in self._bag.topics]
        if absent:
            raise RecordingError(
                f"{self._bag.path}: no topic {absent}; topics are {_listed(self._bag.topics)}"
            )
        if set(topics.images) != set(topics.infos):
            raise RecordingError(f"cameras with images {sorted(topics.images)} and with camera_info "
                                 f"{sorted(topics.infos)} differ")  # fmt: skip
        return topics

    def _scan(self) -> tuple[dict[str, _Index], dict[str, list[bytes]]]:
        """Read every message once: an index of the large topics, the bytes of the small ones."""
        large = [*self.topics.images.values(), *([self.topics.lidar] if self.topics.lidar else [])]
        small = [*self.topics.infos.values(), TF_STATIC_TOPIC]
        small += [self.topics.odometry] if self.topics.odometry else [TF_TOPIC]
        index = {topic: _Index() for topic in large}
        kept: dict[str, list[bytes]] = {topic: [] for topic in small}
        counts = Counter(dict.fromkeys([t for t in (*large, *small) if t in self._bag.topics], 0))
        for topic, log_ns, data in self._bag.messages([*large, *small]):
            counts[topic] += 1
            if topic in index:
                index[topic].stamp_ns.append(header_stamp(data))
                index[topic].log_ns.append(log_ns)
            else:
                kept[topic].append(data)
        self._bag.check_counts(counts)
        return index, kept

    def _static_transforms(self, messages: Sequence[bytes]) -> dict[str, tuple[str, Array]]:
        """Child frame -> (parent frame, child2parent)."""
        parsed = [self._bag.parse(TF_STATIC_TOPIC, data) for data in messages]
        return {t.child_frame_id: (t.header.frame_id, _transform(t.transform.translation, t.transform.rotation))
                for message in parsed for t in message.transforms}  # fmt: skip

    def _sensor2base(self, frame: str, topic: str) -> Array:
        sensor2base, at = np.eye(4), frame
        while at != self._base_frame:
            if at not in self._static:
                raise RecordingError(f"{self._bag.path}: {topic}: no transform from {frame!r} to {self._base_frame!r} "
                                     f"on {TF_STATIC_TOPIC}, which knows {sorted(self._static)}")  # fmt: skip
            at, step = self._static[at]
            sensor2base = step @ sensor2base
        return sensor2base

    def _rig(self, kept: Mapping[str, Sequence[bytes]]) -> CameraRig:
        order = {name: i for i, name in enumerate(CAMERA_ORDER)}
        names = sorted(self.topics.images, key=lambda name: (order.get(name, len(order)), name))
        return CameraRig(tuple(self._camera(name, kept[self.topics.infos[name]]) for name in names))

    def _camera(self, name: str, messages: Sequence[bytes]) -> Camera:
        topic = self.topics.infos[name]
        if not messages:
            raise RecordingError(f"{self._bag.path}: {topic}: no CameraInfo")
        infos = [self._bag.parse(topic, data) for data in messages]
        first = infos[0]
        for info in infos[1:]:
            if not (np.array_equal(info.k, first.k) and np.array_equal(info.d, first.d)):
                raise RecordingError(f"{self._bag.path}: {topic}: the calibration changes on the way, "
                                     "one rig per recording is supported")  # fmt: skip
        if not np.any(first.k):
            raise RecordingError(
                f"{self._bag.path}: {topic}: K is all zero, the camera is uncalibrated"
            )
        cam2ego = self._sensor2base(first.header.frame_id, topic)
        size = (int(first.width), int(first.height))
        if "rect" in self.topics.images[name] or not np.any(first.d):
            intrinsic = first.p.reshape(3, 4)[:, :3] if np.any(first.p) else first.k.reshape(3, 3)
            return Camera(name, *size, np.array(intrinsic), cam2ego)
        return Camera(name, *size, np.array(first.k).reshape(3, 3), cam2ego, first.distortion_model,
                      tuple(first.d.tolist()))  # fmt: skip

    def _lidar2ego(self) -> Array:
        topic = self.topics.lidar
        if topic is None or not self._index[topic].stamp_ns:
            return np.eye(4)  # without a sweep nothing can be moved by it
        index = self._index[topic]
        message = self._message(topic, index.log_ns[0], index.stamp_ns[0])
        return self._sensor2base(message.header.frame_id, topic)

    def _read_trajectory(self, kept: Mapping[str, Sequence[bytes]]) -> Trajectory:
        topic = self.topics.odometry or TF_TOPIC
        poses: dict[int, Array] = {}
        for data in kept[topic]:
            message = self._bag.parse(topic, data)
            if self.topics.odometry:
                pose = message.pose.pose
                poses[_stamp_ns(message.header)] = _transform(pose.position, pose.orientation)
                continue
            for t in message.transforms:
                if t.child_frame_id == self._base_frame:
                    poses[_stamp_ns(t.header)] = _transform(
                        t.transform.translation, t.transform.rotation
                    )
        if not poses:
            raise RecordingError(f"{self._bag.path}: no poses: neither an odometry topic nor a transform "
                                 f"to {self._base_frame!r} on {TF_TOPIC}")  # fmt: skip
        stamps = np.array(sorted(poses), np.int64)
        return Trajectory(stamps, np.stack([poses[int(stamp)] for stamp in stamps]))

    def _find_keys(
        self, anchor: str | None, key_interval: float
    ) -> list[tuple[int, dict[str, int]]]:
        """Return (key stamp, camera -> message number) of each key frame, in time order."""
        default = "CAM_FRONT" if "CAM_FRONT" in self.rig.names else self.rig.names[0]
        anchor = anchor or default
        anchor_topic = self.topics.images[self.rig[anchor].name]
        stamps = {
            name: np.array(self._index[topic].stamp_ns, np.int64)
            for name, topic in self.topics.images.items()
        }
        keys: dict[int, dict[str, int]] = {}
        for stamp in sorted(self._index[anchor_topic].stamp_ns):
            chosen = {name: near for name, of in stamps.items()
                      if (near := _nearest(of, stamp, KEY_TOLERANCE)) is not None}  # fmt: skip
            latest = max(int(stamps[name][i]) for name, i in chosen.items())
            sweep = _nearest(self.sweep_stamp_ns, latest, KEY_TOLERANCE)
            key = latest if sweep is None else int(self.sweep_stamp_ns[sweep])
            last = next(reversed(keys), None)
            if last is None or key - last >= max(key_interval * 1e9, 1):
                keys[key] = chosen
        if not keys:
            raise RecordingError(
                f"{self._bag.path}: {anchor_topic}: no image, so there is no key frame"
            )
        return list(keys.items())

    def _pose_or_none(self, stamp_ns: int) -> Array | None:
        try:
            return self.trajectory.at(stamp_ns)
        except LookupError:
            return None

    def _message(self, topic: str, log_ns: int, stamp_ns: int) -> Any:
        for _, _, data in self._bag.messages([topic], log_ns, log_ns + 1):
            if header_stamp(data) == stamp_ns:
                return self._bag.parse(topic, data)
        raise RecordingError(f"{self._bag.path}: {topic}: the message of {stamp_ns} ns is gone")


def _nearest(stamps: NDArray[np.int64], wanted: int, tolerance: float) -> int | None:
    if len(stamps) == 0:
        return None
    away = np.abs(stamps - wanted)
    index = int(np.argmin(away))
    return index if away[index] <= tolerance * 1e9 else None


def header_stamp(data: bytes) -> int:
    """Read header.stamp, the first field of every stamped message, from its CDR bytes."""
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def _stamp_ns(header: Any) -> int:
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def _transform(translation: Any, rotation: Any) -> Array:
    quaternion = (rotation.x, rotation.y, rotation.z, rotation.w)
    return make_transform(
        rotation_from_xyzw(quaternion), (translation.x, translation.y, translation.z)
    )


def _image(message: Any, topic: str) -> NDArray[np.uint8] | bytes:
    """Return the bytes of a compressed image, or the (H, W, 3) RGB array of a raw one."""
    if not hasattr(message, "encoding"):
        return bytes(message.data)
    channels = {"rgb8": 3, "bgr8": 3, "mono8": 1}.get(message.encoding)
    if channels is None:
        raise RecordingError(
            f"{topic}: encoding {message.encoding!r}; rgb8, bgr8 and mono8 are read"
        )
    if len(message.data) < message.height * message.step or message.step < message.width * channels:
        raise RecordingError(f"{topic}: {len(message.data)} bytes for {message.width}x{message.height} "
                             f"{message.encoding} with step {message.step}")  # fmt: skip
    rows = np.asarray(message.data)[: message.height * message.step].reshape(
        message.height, message.step
    )
    image = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    if message.encoding == "mono8":
        return np.repeat(image, 3, axis=2)
    return np.ascontiguousarray(image[..., ::-1] if message.encoding == "bgr8" else image)


def _sweep(message: Any, topic: str, lidar2ego: Array) -> Sweep:
    stamp = _stamp_ns(message.header)
    cloud = _structured(message, topic)
    names = cloud.dtype.names or ()
    points = np.stack([cloud[axis] for axis in "xyz"], 1).astype(np.float32)
    finite = np.isfinite(points).all(axis=1)
    intensity = cloud["intensity"].astype(np.float32)[finite] if "intensity" in names else None
    offset = _time_offset(cloud, names, stamp)
    return Sweep(
        points[finite], stamp, lidar2ego, intensity, None if offset is None else offset[finite]
    )


def _structured(message: Any, topic: str) -> NDArray[Any]:
    """View a PointCloud2 as a structured array, honouring offsets, padding and endianness."""
    known = {f.name: f for f in message.fields}
    absent = [axis for axis in "xyz" if axis not in known]
    if absent:
        raise RecordingError(f"{topic}: a cloud without field {absent}; it has {sorted(known)}")
    order = ">" if message.is_bigendian else "<"
    dtype = np.dtype({
        "names": list(known),
        "formats": [order + FIELD_DTYPES[f.datatype] for f in known.values()],
        "offsets": [f.offset for f in known.values()],
        "itemsize": message.point_step,
    })  # fmt: skip
    data = np.asarray(message.data)
    if message.height > 1 and message.row_step != message.width * message.point_step:
        rows = data[: message.height * message.row_step].reshape(message.height, message.row_step)
        data = np.ascontiguousarray(rows[:, : message.width * message.point_step]).reshape(-1)
    wanted = message.width * message.height * message.point_step
    if len(data) < wanted:
        raise RecordingError(f"{topic}: {len(data)} bytes, a cloud of its size needs {wanted}")
    return data[:wanted].view(dtype)


def _time_offset(
    cloud: NDArray[Any], names: Sequence[str], stamp_ns: int
) -> NDArray[np.float32] | None:
    """Seconds from the stamp, from the time fields that drivers use: relative s, relative ns or absolute s."""
    for name in ("time", "time_offset", "t", "timestamp"):
        if name not in names:
            continue
        values = cloud[name]
        if values.dtype.kind in "ui":  # Ouster: nanoseconds from the stamp
            return (values.astype(np.int64) / 1e9).astype(np.float32)
        seconds = values.astype(np.float64)
        absolute = len(seconds) > 0 and np.abs(seconds).max() > 1e6
        return (seconds - stamp_ns / 1e9 if absolute else seconds).astype(np.float32)
    return None
