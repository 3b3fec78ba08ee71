"""Read ROS 2 bags as recordings: sqlite3 or MCAP, found by their usual topic names or by a given mapping.

Headers' stamps count, not log times; what was read is compared with the count that the bag
promises, since a bag that silently yields less than it holds would make silent holes in the data.
"""

from __future__ import annotations

import logging
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray
from rosbags.rosbag2 import Reader
from rosbags.rosbag2.errors import ReaderError
from rosbags.serde import SerdeError

from occbev.geometry import Array, invert_transform, make_transform, rotation_from_xyzw
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
from occbev_training.sources.clocks import ClockCorrection, TopicTimes
from occbev_training.sources.foxglove import FoxgloveBag, is_foxglove
from occbev_training.sources.images import image_fault
from occbev_training.sources.nuscenes import CAMERA_ORDER
from occbev_training.sources.point_times import PointTimes, find_point_times
from occbev_training.sources.recording import RecordingError
from occbev_training.sources.topics import BagTopics, detect_topics, is_compensated, listed
from occbev_training.sources.truth import Truth, read_truth, write_truth

__all__ = [
    "Bag", "BagOptions", "BagRecording", "BagSummary", "BagTopics", "Truth", "detect_topics", "open_bag",
    "read_truth", "write_bag", "write_truth",
]  # fmt: skip

log = logging.getLogger(__name__)

KEY_TOLERANCE = 0.06
"""Seconds that a frame may lie from the anchor camera's, and a sweep from the frames, to be of one key."""

STATIC_TOLERANCE = 0.01, np.deg2rad(0.1)
"""Metres and radians by which publishers of one static transform may differ."""

JUMP_NS = 2_000_000_000
"""Clock jumps that the bag logged within this time of each other are one."""

FIELD_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
"""numpy type of each sensor_msgs/PointField datatype."""


TF_TYPE = "tf2_msgs/msg/TFMessage"

_BROKEN = (
    ReaderError,
    OSError,
    ValueError,
    AssertionError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
)
"""What rosbags raises at damaged bytes, beside its own errors."""


class BrokenImageError(RecordingError):
    """One image whose bytes are not all there; the others may be whole."""


class AnyBag(Protocol):
    """An open recording of messages, whatever its container."""

    path: Path
    topics: Mapping[str, str]
    expected: Mapping[str, int] | None

    def messages(
        self, topics: Sequence[str] | None = None, start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[str, int, bytes]]:
        """Yield (topic, log time in ns, encoded message)."""
        ...

    def parse(self, topic: str, data: bytes) -> Any:
        """Turn an encoded message into an object with the fields of the ROS message."""
        ...

    def stamp(self, topic: str, data: bytes) -> int:
        """Return the stamp of an encoded message in ns."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


def open_bag(path: Path | str) -> AnyBag:
    """Open a bag of ROS 2 or an MCAP file of foxglove; raises RecordingError."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.mcap")) if path.is_dir() else []
    if len(files) == 1 and is_foxglove(files[0]):
        return FoxgloveBag(files[0])
    return Bag(path)


def check_counts(bag: AnyBag, read: Mapping[str, int]) -> None:
    """Raise RecordingError where fewer or more messages were read than the bag promises."""
    for topic, count in read.items():
        promised = bag.expected.get(topic) if bag.expected is not None else None
        if promised is not None and promised != count:
            raise RecordingError(f"{bag.path}: {topic}: metadata promises {promised} messages, "
                                 f"{count} were read; the bag is damaged or was cut")  # fmt: skip


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
        except _BROKEN as error:
            self.close()
            raise RecordingError(
                f"{file}: no readable ROS 2 bag: {str(error) or type(error).__name__}"
            ) from error
        self.topics: Mapping[str, str] = {
            c.topic: c.msgtype for reader in self._readers for c in reader.connections
        }

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
            try:
                for connection, log_ns, data in reader.messages(wanted, start, stop):
                    yield connection.topic, log_ns, bytes(data)
            except _BROKEN as error:
                raise RecordingError(
                    f"{self.path}: breaks off while it is read: {type(error).__name__}: {error}"
                ) from error

    def parse(self, topic: str, data: bytes) -> Any:
        """Turn CDR bytes into a message object; raises RecordingError where they are none."""
        try:
            return TYPESTORE.deserialize_cdr(data, self.topics[topic])
        except (*_BROKEN, SerdeError) as error:
            raise RecordingError(
                f"{self.path}: {topic}: no {self.topics[topic]}: {type(error).__name__}: {error}"
            ) from error

    def stamp(self, topic: str, data: bytes) -> int:
        """Read header.stamp in ns, or that of the first transform; raises RecordingError without one."""
        at = 8 if self.topics[topic] == TF_TYPE else 4  # after the number of transforms
        try:
            return header_stamp(data, at)
        except (IndexError, struct.error) as error:
            raise RecordingError(
                f"{self.path}: {topic}: a message without stamp: {error}"
            ) from error

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
        except (yaml.YAMLError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
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


@dataclass(frozen=True)
class BagOptions:
    """How a bag is read; everything has a default that suits most bags."""

    topics: BagTopics | None = None
    """Which topic is what; found by name and type if None."""
    profile: str = "auto"
    """Naming scheme to look for."""
    anchor: str | None = None
    """The camera whose exposures make key frames; CAM_FRONT or else the first."""
    key_interval: float = 0.0
    """Least seconds between key frames."""
    base_frame: str = BASE_FRAME
    """The vehicle's frame: x forward, y left, z up."""
    rig: CameraRig | None = None
    """Calibration of the cameras in place of the bag's own."""
    point_times: str = "auto"
    """How points know their time; see `point_times.MODES`."""
    clock: Mapping[str, ClockCorrection] = field(default_factory=dict)
    """Topic -> correction of its stamps."""
    part: int = 0
    """Which part of a bag that a clock jump or a new calibration divides."""


@dataclass
class _Index:
    """Where the messages of a topic are, in bag order: stamps as written, stamps that count, log times; in ns."""

    raw_ns: list[int] = field(default_factory=list)
    stamp_ns: list[int] = field(default_factory=list)
    log_ns: list[int] = field(default_factory=list)

    def only(self, keep: Sequence[int]) -> _Index:
        """Return some of the messages."""
        parts = (self.raw_ns, self.stamp_ns, self.log_ns)
        return _Index(*([part[i] for i in keep] for part in parts))


@dataclass(frozen=True)
class _Scan:
    """A bag read once: an index of the large topics, the bytes of the small ones with their log times.

    Of calibrations, only the first message of each new content is kept. cuts: log times at which a
    clock jumped back or a calibration changed. skipped: what was left out and why -> how often.
    """

    index: Mapping[str, _Index]
    kept: Mapping[str, Sequence[tuple[int, bytes]]]
    cuts: Sequence[int]
    skipped: Mapping[str, int]


class BagRecording:
    """A bag as a `Recording`. It holds no labels: `annotations` and `occupancy_truth` return None.

    A key frame is one exposure of the anchor camera with the nearest exposure of every other; its
    stamp is the middle of the nearest sweep, or the last exposure where no sweep is near. parts: how
    many stretches the bag falls into, of which this is one. skipped: messages left out, by reason.
    location: what all parts of a bag share, in whose coordinates their poses are.
    """

    def __init__(self, path: Path | str, options: BagOptions | None = None) -> None:
        """Index a bag; raises RecordingError saying which topic, frame or count is wrong."""
        self.options = options or BagOptions()
        self._bag = open_bag(path)
        self.name = self.location = self._bag.path.stem
        self._base_frame = self.options.base_frame
        self.topics = self._found_topics()
        scan = self._part_of(self._scan())
        self._index, kept, self.skipped = scan.index, scan.kept, dict(scan.skipped)
        self._static = self._static_transforms(kept)
        self.rig = self.options.rig or self._rig(kept)
        self.lidar2ego = self._lidar2ego()
        self.trajectory = self._read_trajectory(kept)
        poses = kept[self.topics.odometry] if self.topics.odometry else ()
        stamps = [self._bag.stamp(str(self.topics.odometry), data) for _, data in poses]
        self._odometry_times = TopicTimes(
            np.array(stamps, np.int64), np.array([at for at, _ in poses], np.int64)
        )
        sweeps = self._index[self.topics.lidar] if self.topics.lidar else _Index()
        order = np.argsort(sweeps.stamp_ns, kind="stable")
        self.sweep_stamp_ns = np.array(sweeps.stamp_ns, np.int64)[order]
        self._sweep_order = order
        self._keys = self._find_keys()
        self.key_stamp_ns = np.array([stamp for stamp, _ in self._keys], np.int64)

    def close(self) -> None:
        """Close the bag."""
        self._bag.close()

    @property
    def deskew(self) -> str:
        """How the motion within a sweep is known: point_times, azimuth or compensated."""
        return self.point_times.kind if self.point_times else "compensated"

    def sweep(self, index: int) -> Sweep:
        """Read one LiDAR rotation, points without a finite place included, with times from its stamp."""
        topic = self.topics.lidar
        assert topic is not None, "a bag without LiDAR has no sweep to read"
        number = int(self._sweep_order[index])
        raw_ns = self._index[topic].raw_ns[number]
        message = self._message(topic, self._index[topic].log_ns[number], raw_ns)
        cloud = _structured(message, topic)
        points, offsets = _points(cloud), None
        if self.point_times is not None:
            offsets = self.point_times.offsets(cloud, points, raw_ns)
        names = cloud.dtype.names or ()
        intensity = cloud["intensity"].astype(np.float32) if "intensity" in names else None
        return Sweep(points, int(self.sweep_stamp_ns[index]), self.lidar2ego, intensity, offsets)

    def frame_set(self, key: int) -> FrameSet:
        """Read the images of one key frame, encoded ones as their bytes; a broken image is a missing camera."""
        stamp, chosen = self._keys[key]
        frames: dict[str, CameraFrame | None] = {}
        missing: dict[str, str] = {}
        for camera in self.rig.cameras:
            name, topic = camera.name, self.topics.images[camera.name]
            frames[name] = None
            if name not in chosen:
                missing[name] = f"no message on {topic} within {KEY_TOLERANCE} s or half its period"
                continue
            index, number = self._index[topic], chosen[name]
            exposure = index.stamp_ns[number]
            try:
                message = self._message(topic, index.log_ns[number], index.raw_ns[number])
                image = _image(message, topic)
            except BrokenImageError as error:
                missing[name] = f"broken image: {error}"
                continue
            size = (camera.width, camera.height)
            fault = (
                image_fault(image, size) if isinstance(image, bytes) else _size_fault(image, size)
            )
            if fault is not None:
                missing[name] = f"broken image: {fault}"
                continue
            frames[name] = CameraFrame(name, exposure, image, self._pose_or_none(exposure))
        return FrameSet(stamp, frames, missing)

    def exposures(self, camera: str) -> NDArray[np.int64]:
        """Return the stamps (E,) of every image of a camera, in bag order."""
        return np.array(self._index[self.topics.images[camera]].stamp_ns, np.int64)

    def exposure(self, camera: str, number: int) -> NDArray[np.uint8] | bytes:
        """Read one image of a camera by its place in `exposures`."""
        topic = self.topics.images[camera]
        index = self._index[topic]
        return _image(self._message(topic, index.log_ns[number], index.raw_ns[number]), topic)

    def times(self) -> dict[str, TopicTimes]:
        """Return stamps and log times of the usable messages of cameras, LiDAR and odometry."""
        found = {topic: TopicTimes(np.array(own.stamp_ns, np.int64), np.array(own.log_ns, np.int64))
                 for topic, own in self._index.items()}  # fmt: skip
        return found | (
            {} if self.topics.odometry is None else {self.topics.odometry: self._odometry_times}
        )

    def annotations(self, key: int) -> None:
        """Bags hold no boxes."""

    def occupancy_truth(self, key: int) -> None:
        """Bags hold no dense labels."""

    @cached_property
    def point_times(self) -> PointTimes | None:
        """How points know their time, told by a sweep in the middle; None without LiDAR.

        Raises RecordingError where it cannot be told, or where no sweep can be read.
        """
        if self._probe is None:
            return None
        (raw_ns, cloud), topic = self._probe, self.topics.lidar
        stamps = np.sort(self._index[str(topic)].stamp_ns)
        period = float(np.median(np.diff(stamps)) / 1e9) if len(stamps) > 1 else 0.1
        try:
            return find_point_times(cloud, _points(cloud), raw_ns, period, self.options.point_times,
                                    is_compensated(self.topics.profile))  # fmt: skip
        except RecordingError as error:
            raise RecordingError(f"{self._bag.path}: {topic}: {error}") from error

    def probed_offsets(self) -> NDArray[np.float32]:
        """Return the seconds (M,) from the stamp of the points of a cloud in the middle; empty without times."""
        offsets = None
        if self.point_times is not None and self._probe is not None:
            raw_ns, cloud = self._probe
            offsets = self.point_times.offsets(cloud, _points(cloud), raw_ns)
        return np.zeros(0, np.float32) if offsets is None else offsets

    @cached_property
    def _probe(self) -> tuple[int, NDArray[np.void]] | None:
        """A cloud from the middle of the recording with its stamp as written, None without LiDAR.

        Raises RecordingError where none of a few clouds can be read.
        """
        topic = self.topics.lidar
        if topic is None or not self._index[topic].stamp_ns:
            return None
        index, problem = self._index[topic], RecordingError(f"{topic}: every cloud is empty")
        middle = len(index.stamp_ns) // 2
        for number in dict.fromkeys([middle, 0, len(index.stamp_ns) - 1, middle // 2]):
            raw_ns = index.raw_ns[number]
            try:
                cloud = _structured(self._message(topic, index.log_ns[number], raw_ns), topic)
            except RecordingError as error:
                problem = error
                continue
            if len(cloud):
                return raw_ns, cloud
        raise RecordingError(f"{self._bag.path}: {problem}")

    def _found_topics(self) -> BagTopics:
        """Return the topics that were given, after a look whether they are there, or find them."""
        given = self.options.topics
        try:
            topics = given or detect_topics(self._bag.topics, self.options.profile)
        except RecordingError as error:
            raise RecordingError(f"{self._bag.path}: {error}") from error
        absent = [topic for topic in topics.all if topic not in self._bag.topics]
        if absent:
            raise RecordingError(
                f"{self._bag.path}: no topic {absent}; topics are {listed(self._bag.topics)}"
            )
        rig = self.options.rig
        if rig is not None and set(rig.names) != set(topics.images):
            raise RecordingError(f"{self._bag.path}: the rig has cameras {list(rig.names)}, the bag "
                                 f"{sorted(topics.images)}")  # fmt: skip
        bare = sorted(set(topics.images) - set(topics.infos))
        if rig is None and bare:
            raise RecordingError(f"{self._bag.path}: no camera_info of {bare} (profile {topics.profile}); "
                                 "give their calibration as a rig file")  # fmt: skip
        return topics

    def _scan(self) -> _Scan:
        """Read every message once."""
        topics = self.topics
        large = [*topics.images.values(), *([topics.lidar] if topics.lidar else [])]
        infos = set(topics.infos.values())
        small = [*infos, TF_STATIC_TOPIC]
        # Without a topic of its own for them, fixed transforms are repeated among the moving ones.
        if topics.odometry is None or TF_STATIC_TOPIC not in self._bag.topics:
            small.append(TF_TOPIC)
        small += [topics.odometry] if topics.odometry else []
        index = {topic: _Index() for topic in large}
        kept: dict[str, list[tuple[int, bytes]]] = {topic: [] for topic in small}
        counts = Counter(dict.fromkeys([t for t in (*large, *small) if t in self._bag.topics], 0))
        for topic, log_ns, data in self._bag.messages([*large, *small]):
            counts[topic] += 1
            if topic in index:
                raw = self._bag.stamp(topic, data)
                index[topic].raw_ns.append(raw)
                index[topic].log_ns.append(log_ns)
            elif topic not in infos or not kept[topic] or kept[topic][-1][1][12:] != data[12:]:
                kept[topic].append((log_ns, data))
        check_counts(self._bag, counts)
        skipped: Counter[str] = Counter()
        cuts = [log_ns for topic in infos for log_ns in self._changes(topic, kept[topic])]
        for topic, entries in index.items():
            correction = self.options.clock.get(topic)
            entries.stamp_ns = (entries.raw_ns if correction is None
                                else [correction.apply(raw) for raw in entries.raw_ns])  # fmt: skip
            keep, jumps, reasons = usable_stamps(entries.raw_ns)
            cuts += [entries.log_ns[i] for i in jumps]
            index[topic] = entries.only(keep)
            skipped.update({f"{topic}: {reason}": n for reason, n in reasons.items()})
        if topics.odometry:
            raw_ns = [self._bag.stamp(topics.odometry, data) for _, data in kept[topics.odometry]]
            keep, jumps, reasons = usable_stamps(raw_ns)
            cuts += [kept[topics.odometry][i][0] for i in jumps]
            kept[topics.odometry] = [kept[topics.odometry][i] for i in keep]
            skipped.update({f"{topics.odometry}: {reason}": n for reason, n in reasons.items()})
        return _Scan(index, kept, sorted(cuts), {k: n for k, n in sorted(skipped.items()) if n})

    def _changes(self, topic: str, messages: Sequence[tuple[int, bytes]]) -> list[int]:
        """Return the log times at which the calibration on a topic becomes another."""
        found: list[int] = []
        before: Any = None
        for log_ns, data in messages:
            info = self._bag.parse(topic, data)
            if before is not None and not _same_calibration(info, before):
                found.append(log_ns)
            before = info
        return found

    def _part_of(self, scan: _Scan) -> _Scan:
        """Return the chosen part of a bag that clock jumps or new calibrations divide."""
        starts, ends = [-(2**62)], []
        for cut in scan.cuts:
            if ends and cut - starts[-1] <= JUMP_NS:
                starts[-1] = cut  # the topics of one jump follow each other
            else:
                ends.append(cut)
                starts.append(cut)
        ends.append(2**62)
        self.parts = len(starts)
        if not 0 <= self.options.part < self.parts:
            raise RecordingError(
                f"{self._bag.path}: no part {self.options.part}, it has {self.parts}"
            )
        first, last = starts[self.options.part], ends[self.options.part]
        index = {
            topic: entries.only([i for i, at in enumerate(entries.log_ns) if first <= at < last])
            for topic, entries in scan.index.items()
        }
        kept: dict[str, Sequence[tuple[int, bytes]]] = {}
        for topic, messages in scan.kept.items():
            inside = [m for m in messages if first <= m[0] < last]
            if topic in self.topics.infos.values():
                inside = inside or [m for m in messages if m[0] < last][-1:]
            kept[topic] = messages if topic == TF_STATIC_TOPIC else inside
        return _Scan(index, kept, scan.cuts, scan.skipped)

    def _static_transforms(
        self, kept: Mapping[str, Sequence[tuple[int, bytes]]]
    ) -> dict[str, list[tuple[str, Array]]]:
        """Child frame -> (parent frame, child2parent) of every message that tells it."""
        topic = TF_STATIC_TOPIC if TF_STATIC_TOPIC in self._bag.topics else TF_TOPIC
        found: dict[str, list[tuple[str, Array]]] = {}
        if topic not in self._bag.topics:
            return found
        for _, data in kept.get(topic, ()):
            for t in self._bag.parse(topic, data).transforms:
                matrix = _transform(t.transform.translation, t.transform.rotation)
                known = found.setdefault(_frame(t.child_frame_id), [])
                parent = _frame(t.header.frame_id)
                if not any(p == parent and np.array_equal(m, matrix) for p, m in known):
                    known.append((parent, matrix))
        return found

    def _sensor2base(self, frame: str, topic: str) -> Array:
        """Follow the fixed transforms from a sensor's frame to the vehicle's."""
        sensor2base, at = np.eye(4), _frame(frame)
        while at != self._base_frame:
            if at not in self._static:
                raise RecordingError(f"{self._bag.path}: {topic}: no transform from {frame!r} to {self._base_frame!r} "
                                     f"on {TF_STATIC_TOPIC}, which knows {sorted(self._static)}")  # fmt: skip
            at, step = self._agreed(at, topic)
            sensor2base = step @ sensor2base
        return sensor2base

    def _agreed(self, child: str, topic: str) -> tuple[str, Array]:
        """Return the parent and transform of a frame; raises RecordingError where publishers differ."""
        (parent, first), *others = self._static[child]
        for other_parent, other in others:
            apart, turned = _difference(first, other)
            if (
                other_parent != parent
                or apart > STATIC_TOLERANCE[0]
                or turned > STATIC_TOLERANCE[1]
            ):
                raise RecordingError(
                    f"{self._bag.path}: {topic}: transforms of {child!r} conflict: to {parent!r} and to "
                    f"{other_parent!r}, {apart * 100:.1f} cm and {np.rad2deg(turned):.2f} degrees apart"
                )
        return parent, first

    def _rig(self, kept: Mapping[str, Sequence[tuple[int, bytes]]]) -> CameraRig:
        order = {name: i for i, name in enumerate(CAMERA_ORDER)}
        names = sorted(self.topics.images, key=lambda name: (order.get(name, len(order)), name))
        return CameraRig(tuple(self._camera(name, kept[self.topics.infos[name]]) for name in names))

    def _camera(self, name: str, messages: Sequence[tuple[int, bytes]]) -> Camera:
        topic = self.topics.infos[name]
        if not messages:
            raise RecordingError(f"{self._bag.path}: {topic}: no CameraInfo")
        info = self._bag.parse(topic, messages[0][1])
        if not np.any(info.k):
            raise RecordingError(
                f"{self._bag.path}: {topic}: K is all zero, the camera is uncalibrated"
            )
        cam2ego = self._sensor2base(info.header.frame_id, topic)
        size = (int(info.width), int(info.height))
        if "rect" in self.topics.images[name] or not np.any(info.d):
            intrinsic = info.p.reshape(3, 4)[:, :3] if np.any(info.p) else info.k.reshape(3, 3)
            return Camera(name, *size, np.array(intrinsic), cam2ego)
        return Camera(name, *size, np.array(info.k).reshape(3, 3), cam2ego, info.distortion_model,
                      tuple(info.d.tolist()))  # fmt: skip

    def _lidar2ego(self) -> Array:
        topic = self.topics.lidar
        if topic is None or not self._index[topic].stamp_ns:
            return np.eye(4)  # without a sweep nothing can be moved by it
        index = self._index[topic]
        message = self._message(topic, index.log_ns[0], index.raw_ns[0])
        return self._sensor2base(message.header.frame_id, topic)

    def _read_trajectory(self, kept: Mapping[str, Sequence[tuple[int, bytes]]]) -> Trajectory:
        topic = self.topics.odometry or TF_TOPIC
        poses: dict[int, Array] = {}
        for _, data in kept.get(topic, ()):
            message = self._bag.parse(topic, data)
            if self.topics.odometry:
                poses[_stamp_ns(message.header)] = self._base_pose(message)
                continue
            for t in message.transforms:
                if _frame(t.child_frame_id) == self._base_frame:
                    poses[_stamp_ns(t.header)] = _transform(
                        t.transform.translation, t.transform.rotation
                    )
        poses.pop(0, None)
        if not poses:
            raise RecordingError(f"{self._bag.path}: no poses: neither an odometry topic nor a transform "
                                 f"to {self._base_frame!r} on {TF_TOPIC}")  # fmt: skip
        stamps = np.array(sorted(poses), np.int64)
        return Trajectory(stamps, np.stack([poses[int(stamp)] for stamp in stamps]))

    def _base_pose(self, message: Any) -> Array:
        """Return base2global of an Odometry or PoseStamped, which may tell of another frame of the vehicle."""
        if _frame(message.header.frame_id) == self._base_frame:
            raise RecordingError(f"{self._bag.path}: {self.topics.odometry}: poses in {self._base_frame!r} itself do "
                                 "not tell where the vehicle is; name another topic in a file for --topics")  # fmt: skip
        pose = getattr(message.pose, "pose", message.pose)
        child2global = _transform(pose.position, pose.orientation)
        child = _frame(getattr(message, "child_frame_id", "") or self._base_frame)
        if child == self._base_frame:
            return child2global
        return child2global @ invert_transform(self._sensor2base(child, str(self.topics.odometry)))

    def _find_keys(self) -> list[tuple[int, dict[str, int]]]:
        """Return (key stamp, camera -> message number) of each key frame, in time order."""
        default = "CAM_FRONT" if "CAM_FRONT" in self.rig.names else self.rig.names[0]
        anchor = self.rig[self.options.anchor or default].name
        stamps = {
            name: np.array(self._index[topic].stamp_ns, np.int64)
            for name, topic in self.topics.images.items()
        }
        reach = {name: _half_period(of) for name, of in stamps.items()}
        middle = self._sweep_middle_ns()
        keys: dict[int, dict[str, int]] = {}
        for stamp in sorted(stamps[anchor].tolist()):
            chosen = {name: near for name, of in stamps.items()
                      if (near := _nearest(of, stamp, reach[name])) is not None}  # fmt: skip
            latest = max(int(stamps[name][i]) for name, i in chosen.items())
            sweep = _nearest(self.sweep_stamp_ns + middle, latest, KEY_TOLERANCE)
            key = latest if sweep is None else int(self.sweep_stamp_ns[sweep]) + middle
            last = next(reversed(keys), None)
            if last is None or key - last >= max(self.options.key_interval * 1e9, 1):
                keys[key] = chosen
        if not keys:
            raise RecordingError(
                f"{self._bag.path}: {self.topics.images[anchor]}: no image, so there is no key frame"
            )
        return list(keys.items())

    def _sweep_middle_ns(self) -> int:
        """Return how long after its stamp the middle of a sweep is, 0 where the stamp is near the middle."""
        if self.point_times is None or self.point_times.kind == "compensated":
            return 0
        offset = self.probed_offsets()
        low, high = float(np.nanmin(offset)), float(np.nanmax(offset))
        middle = (low + high) / 2
        return round(middle * 1e3) * 1_000_000 if abs(middle) > 0.2 * (high - low) else 0

    def _pose_or_none(self, stamp_ns: int) -> Array | None:
        try:
            return self.trajectory.at(stamp_ns)
        except LookupError:
            return None

    def _message(self, topic: str, log_ns: int, stamp_ns: int) -> Any:
        for _, _, data in self._bag.messages([topic], log_ns, log_ns + 1):
            if self._bag.stamp(topic, data) == stamp_ns:
                return self._bag.parse(topic, data)
        raise RecordingError(f"{self._bag.path}: {topic}: the message of {stamp_ns} ns is gone")


def usable_stamps(stamp_ns: Sequence[int]) -> tuple[list[int], list[int], dict[str, int]]:
    """Sort out the stamps of one topic in bag order.

    Returns: the messages to use, those of them at which the clock jumped back for good, and how many
    were left out by reason: zero stamps, repeated ones, single ones that come late.
    """
    keep: list[int] = []
    jumps: list[int] = []
    reasons = {"zero stamp": 0, "repeated stamp": 0, "late stamp": 0}
    for i, stamp in enumerate(stamp_ns):
        last = stamp_ns[keep[-1]] if keep else 0
        if stamp <= 0:
            reasons["zero stamp"] += 1
        elif stamp == last:
            reasons["repeated stamp"] += 1
        elif stamp > last:
            keep.append(i)
        elif next((later for later in stamp_ns[i + 1 :] if later > 0), 0) > last:
            reasons["late stamp"] += 1
        else:
            jumps.append(i)
            keep.append(i)
    return keep, jumps, reasons


def _half_period(stamp_ns: NDArray[np.int64]) -> float:
    """Return how far from a key time an image may be: half its camera's period, at most `KEY_TOLERANCE`."""
    if len(stamp_ns) < 2:
        return KEY_TOLERANCE
    return min(KEY_TOLERANCE, float(np.median(np.diff(np.sort(stamp_ns)))) / 2e9)


def _same_calibration(one: Any, other: Any) -> bool:
    sizes = (one.width, one.height) == (other.width, other.height)
    return sizes and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("k", "d", "p")
    )


def _difference(one: Array, other: Array) -> tuple[float, float]:
    """Return how far two transforms are apart, in metres and radians."""
    step = invert_transform(one) @ other
    cosine = np.clip((np.trace(step[:3, :3]) - 1) / 2, -1, 1)
    return float(np.linalg.norm(step[:3, 3])), float(np.arccos(cosine))


def _frame(name: str) -> str:
    """Frames are named without the leading slash of ROS 1."""
    return name.lstrip("/")


def _size_fault(image: NDArray[np.uint8], size: tuple[int, int]) -> str | None:
    found = image.shape[1], image.shape[0]
    wanted = f"the calibration is for {size[0]}x{size[1]}"
    return None if found == size else f"{found[0]}x{found[1]} pixels, {wanted}"


def _nearest(stamps: NDArray[np.int64], wanted: int, tolerance: float) -> int | None:
    if len(stamps) == 0:
        return None
    away = np.abs(stamps - wanted)
    index = int(np.argmin(away))
    return index if away[index] <= tolerance * 1e9 else None


def header_stamp(data: bytes, at: int = 4) -> int:
    """Read header.stamp, the first field of every stamped message, from its CDR bytes."""
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, at)
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
        raise BrokenImageError(f"{topic}: {len(message.data)} bytes for {message.width}x{message.height} "
                             f"{message.encoding} with step {message.step}")  # fmt: skip
    rows = np.asarray(message.data)[: message.height * message.step].reshape(
        message.height, message.step
    )
    image = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    if message.encoding == "mono8":
        return np.repeat(image, 3, axis=2)
    return np.ascontiguousarray(image[..., ::-1] if message.encoding == "bgr8" else image)


def _points(cloud: NDArray[np.void]) -> NDArray[np.float32]:
    return np.stack([cloud[axis] for axis in "xyz"], 1).astype(np.float32)


def _structured(message: Any, topic: str) -> NDArray[Any]:
    """View a PointCloud2 as a structured array, honouring offsets, padding and endianness."""
    known = {f.name: f for f in message.fields}
    absent = [axis for axis in "xyz" if axis not in known]
    if absent:
        raise RecordingError(f"{topic}: a cloud without field {absent}; it has {sorted(known)}")
    order = ">" if message.is_bigendian else "<"
    try:
        dtype = np.dtype({
            "names": list(known),
            "formats": [order + FIELD_DTYPES[f.datatype] for f in known.values()],
            "offsets": [f.offset for f in known.values()],
            "itemsize": message.point_step,
        })  # fmt: skip
    except (KeyError, ValueError) as error:
        layout = [(f.name, f.offset, f.datatype) for f in message.fields]
        raise RecordingError(
            f"{topic}: no cloud of {message.point_step} bytes a point can have the fields {layout}"
        ) from error
    data = np.asarray(message.data)
    if message.height > 1 and message.row_step != message.width * message.point_step:
        rows = data[: message.height * message.row_step].reshape(message.height, message.row_step)
        data = np.ascontiguousarray(rows[:, : message.width * message.point_step]).reshape(-1)
    wanted = message.width * message.height * message.point_step
    if len(data) < wanted:
        raise RecordingError(f"{topic}: {len(data)} bytes, a cloud of its size needs {wanted}")
    return data[:wanted].view(dtype)
