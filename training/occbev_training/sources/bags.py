"""Read ROS 2 bags as recordings: sqlite3 or MCAP, found by their usual topic names or by a given mapping.

Headers' stamps count, not log times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import Array, invert_transform, make_transform, rotation_from_xyzw
from occbev.graph import DEFAULT_CAMERAS
from occbev.messages.image_headers import image_fault
from occbev.results import CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory
from occbev_training.sources.bag_index import BagOptions, Index, IndexedBag, topic_times
from occbev_training.sources.bag_writer import TF_STATIC_TOPIC, TF_TOPIC
from occbev_training.sources.clocks import TopicTimes
from occbev_training.sources.point_times import PointTimes, find_point_times
from occbev_training.sources.recording import RecordingError
from occbev_training.sources.topics import is_compensated

KEY_TOLERANCE = 0.06
"""Seconds that a frame may lie from the anchor camera's, and a sweep from the frames, to be of one key."""

STATIC_TOLERANCE = 0.01, np.deg2rad(0.1)
"""Metres and radians by which publishers of one static transform may differ."""

FIELD_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
"""numpy type of each sensor_msgs/PointField datatype."""


class BrokenImageError(RecordingError):
    """One image whose bytes are not all there; the others may be whole."""


class BagRecording(IndexedBag):
    """A bag as a `Recording`. It holds no labels: `annotations` and `occupancy_truth` return None.

    A key frame is one exposure of the anchor camera with the nearest exposure of every other; its
    stamp is the middle of the nearest sweep, or the last exposure where no sweep is near.
    location: what all parts of a bag share, in whose coordinates their poses are.
    """

    def __init__(self, path: Path | str, options: BagOptions | None = None) -> None:
        """Index a bag; raises RecordingError saying which topic, frame or count is wrong."""
        super().__init__(path, options)
        self.name = self.location = self._bag.path.stem
        self._base_frame = self.options.base_frame
        contents = self._part()
        self._index, kept = contents.index, contents.kept
        self._static = self._static_transforms(kept)
        self.rig = self.options.rig or self._rig(kept)
        self.lidar2ego = self._lidar2ego()
        self.trajectory = self._read_trajectory(kept)
        poses = kept[self.topics.odometry] if self.topics.odometry else ()
        stamps = [self._bag.stamp(str(self.topics.odometry), data) for _, data in poses]
        self._odometry_times = topic_times(stamps, [at for at, _ in poses])
        sweeps = self._index[self.topics.lidar] if self.topics.lidar else Index()
        order = np.argsort(sweeps.stamp_ns, kind="stable")
        self.sweep_stamp_ns = np.array(sweeps.stamp_ns, np.int64)[order]
        self._sweep_order = order
        self._keys = self._find_keys()
        self.key_stamp_ns = np.array([stamp for stamp, _ in self._keys], np.int64)

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
        cloud = _read_cloud(message, topic)
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
            fault = image_fault(image, size) if isinstance(image, bytes) else _size_fault(image, size)
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
        found = {topic: topic_times(own.stamp_ns, own.log_ns) for topic, own in self._index.items()}
        return found | ({} if self.topics.odometry is None else {self.topics.odometry: self._odometry_times})

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
            return find_point_times(
                cloud, _points(cloud), raw_ns, period, self.options.point_times, is_compensated(self.topics.profile)
            )
        except RecordingError as error:
            raise RecordingError(f"{self._bag.path}: {topic}: {error}") from error

    def probe_offsets(self) -> NDArray[np.float32]:
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
                cloud = _read_cloud(self._message(topic, index.log_ns[number], raw_ns), topic)
            except RecordingError as error:
                problem = error
                continue
            if len(cloud):
                return raw_ns, cloud
        raise RecordingError(f"{self._bag.path}: {problem}")

    def _static_transforms(self, kept: Mapping[str, Sequence[tuple[int, bytes]]]) -> dict[str, list[tuple[str, Array]]]:
        """Child frame -> (parent frame, child2parent) of every message that tells it."""
        topic = TF_STATIC_TOPIC if TF_STATIC_TOPIC in self._bag.topics else TF_TOPIC
        found: dict[str, dict[tuple[str, bytes], Array]] = {}
        if topic not in self._bag.topics:
            return {}
        for _, data in kept.get(topic, ()):
            for t in self._bag.parse(topic, data).transforms:
                matrix = _transform(t.transform.translation, t.transform.rotation)
                known = found.setdefault(_frame(t.child_frame_id), {})
                known.setdefault((_frame(t.header.frame_id), matrix.tobytes()), matrix)
        return {child: [(parent, matrix) for (parent, _), matrix in known.items()] for child, known in found.items()}

    def _sensor2base(self, frame: str, topic: str) -> Array:
        """Follow the fixed transforms from a sensor's frame to the vehicle's."""
        sensor2base, at = np.eye(4), _frame(frame)
        while at != self._base_frame:
            if at not in self._static:
                raise RecordingError(
                    f"{self._bag.path}: {topic}: no transform from {frame!r} to {self._base_frame!r} "
                    f"on {TF_STATIC_TOPIC}, which knows {sorted(self._static)}"
                )
            at, step = self._agree_on_parent(at, topic)
            sensor2base = step @ sensor2base
        return sensor2base

    def _agree_on_parent(self, child: str, topic: str) -> tuple[str, Array]:
        """Return the parent and transform of a frame; raises RecordingError where publishers differ."""
        (parent, first), *others = self._static[child]
        for other_parent, other in others:
            apart, turned = _difference(first, other)
            if other_parent != parent or apart > STATIC_TOLERANCE[0] or turned > STATIC_TOLERANCE[1]:
                raise RecordingError(
                    f"{self._bag.path}: {topic}: transforms of {child!r} conflict: to {parent!r} and to "
                    f"{other_parent!r}, {apart * 100:.1f} cm and {np.rad2deg(turned):.2f} degrees apart"
                )
        return parent, first

    def _rig(self, kept: Mapping[str, Sequence[tuple[int, bytes]]]) -> CameraRig:
        order = {name: i for i, name in enumerate(DEFAULT_CAMERAS)}
        names = sorted(self.topics.images, key=lambda name: (order.get(name, len(order)), name))
        return CameraRig(tuple(self._camera(name, kept[self.topics.infos[name]]) for name in names))

    def _camera(self, name: str, messages: Sequence[tuple[int, bytes]]) -> Camera:
        topic = self.topics.infos[name]
        if not messages:
            raise RecordingError(f"{self._bag.path}: {topic}: no CameraInfo")
        info = self._bag.parse(topic, messages[0][1])
        if not np.any(info.k):
            raise RecordingError(f"{self._bag.path}: {topic}: K is all zero, the camera is uncalibrated")
        cam2ego = self._sensor2base(info.header.frame_id, topic)
        size = (int(info.width), int(info.height))
        if "rect" in self.topics.images[name] or not np.any(info.d):
            intrinsic = info.p.reshape(3, 4)[:, :3] if np.any(info.p) else info.k.reshape(3, 3)
            return Camera(name, *size, np.array(intrinsic), cam2ego)
        return Camera(
            name, *size, np.array(info.k).reshape(3, 3), cam2ego, info.distortion_model, tuple(info.d.tolist())
        )

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
                    poses[_stamp_ns(t.header)] = _transform(t.transform.translation, t.transform.rotation)
        poses.pop(0, None)
        if not poses:
            raise RecordingError(
                f"{self._bag.path}: no poses: neither an odometry topic nor a transform "
                f"to {self._base_frame!r} on {TF_TOPIC}"
            )
        stamps = np.array(sorted(poses), np.int64)
        return Trajectory(stamps, np.stack([poses[int(stamp)] for stamp in stamps]))

    def _base_pose(self, message: Any) -> Array:
        """Return base2global of an Odometry or PoseStamped, which may tell of another frame of the vehicle."""
        if _frame(message.header.frame_id) == self._base_frame:
            raise RecordingError(
                f"{self._bag.path}: {self.topics.odometry}: poses in {self._base_frame!r} itself do "
                "not tell where the vehicle is; name another topic in a file for --topics"
            )
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
        stamps = {name: np.array(self._index[topic].stamp_ns, np.int64) for name, topic in self.topics.images.items()}
        reach = {name: _half_period(of) for name, of in stamps.items()}
        middle = self._sweep_middle_ns()
        keys: dict[int, dict[str, int]] = {}
        for stamp in sorted(stamps[anchor].tolist()):
            chosen = {
                name: near for name, of in stamps.items() if (near := _nearest(of, stamp, reach[name])) is not None
            }
            latest = max(int(stamps[name][i]) for name, i in chosen.items())
            sweep = _nearest(self.sweep_stamp_ns + middle, latest, KEY_TOLERANCE)
            key = latest if sweep is None else int(self.sweep_stamp_ns[sweep]) + middle
            last = next(reversed(keys), None)
            if last is None or key - last >= max(self.options.key_interval * 1e9, 1):
                keys[key] = chosen
        if not keys:
            raise RecordingError(f"{self._bag.path}: {self.topics.images[anchor]}: no image, so there is no key frame")
        return list(keys.items())

    def _sweep_middle_ns(self) -> int:
        """Return how long after its stamp the middle of a sweep is, 0 where the stamp is near the middle."""
        if self.point_times is None or self.point_times.kind == "compensated":
            return 0
        offset = self.probe_offsets()
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


def _half_period(stamp_ns: NDArray[np.int64]) -> float:
    """Return how far from a key time an image may be: half its camera's period, at most `KEY_TOLERANCE`."""
    if len(stamp_ns) < 2:
        return KEY_TOLERANCE
    return min(KEY_TOLERANCE, float(np.median(np.diff(np.sort(stamp_ns)))) / 2e9)


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


def _stamp_ns(header: Any) -> int:
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def _transform(translation: Any, rotation: Any) -> Array:
    quaternion = (rotation.x, rotation.y, rotation.z, rotation.w)
    return make_transform(rotation_from_xyzw(quaternion), (translation.x, translation.y, translation.z))


def _image(message: Any, topic: str) -> NDArray[np.uint8] | bytes:
    """Return the bytes of a compressed image, or the (H, W, 3) RGB array of a raw one."""
    if not hasattr(message, "encoding"):
        return bytes(message.data)
    channels = {"rgb8": 3, "bgr8": 3, "mono8": 1}.get(message.encoding)
    if channels is None:
        raise RecordingError(f"{topic}: encoding {message.encoding!r}; rgb8, bgr8 and mono8 are read")
    if len(message.data) < message.height * message.step or message.step < message.width * channels:
        raise BrokenImageError(
            f"{topic}: {len(message.data)} bytes for {message.width}x{message.height} "
            f"{message.encoding} with step {message.step}"
        )
    rows = np.asarray(message.data)[: message.height * message.step].reshape(message.height, message.step)
    image = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    if message.encoding == "mono8":
        return np.repeat(image, 3, axis=2)
    return np.ascontiguousarray(image[..., ::-1] if message.encoding == "bgr8" else image)


def _points(cloud: NDArray[np.void]) -> NDArray[np.float32]:
    return np.stack([cloud[axis] for axis in "xyz"], 1).astype(np.float32)


def _read_cloud(message: Any, topic: str) -> NDArray[Any]:
    """View a PointCloud2 as a structured array, honouring offsets, padding and endianness."""
    known = {f.name: f for f in message.fields}
    absent = [axis for axis in "xyz" if axis not in known]
    if absent:
        raise RecordingError(f"{topic}: a cloud without field {absent}; it has {sorted(known)}")
    order = ">" if message.is_bigendian else "<"
    try:
        dtype = np.dtype(
            {
                "names": list(known),
                "formats": [order + FIELD_DTYPES[f.datatype] for f in known.values()],
                "offsets": [f.offset for f in known.values()],
                "itemsize": message.point_step,
            }
        )
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
