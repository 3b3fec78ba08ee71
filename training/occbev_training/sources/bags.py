"""Read ROS 2 bags as recordings: sqlite3 or MCAP, found by their usual topic names or by a given mapping.

Headers' stamps count, not log times.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.ego_signals import TwistAxes, TwistHistory
from occbev.geometry import Array, invert_transform, make_transform, transform_points
from occbev.graph import DEFAULT_CAMERAS
from occbev.messages.bags import BagMessage
from occbev.messages.image_headers import encoded_size, image_fault
from occbev.messages.readers import (
    EncodingError,
    MessageError,
    base_pose,
    base_twist,
    camera_from_info,
    cloud_from_message,
    is_rectified,
    points_of_cloud,
    pose_from_message,
    read_image,
)
from occbev.messages.tf import Buffer, TransformException, clean_frame
from occbev.messages.topics import LidarSensor, front_camera, is_compensated
from occbev.results import CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig, RigError
from occbev.trajectory import Trajectory
from occbev_training.sources.bag_index import BagOptions, Index, IndexedBag, topic_times
from occbev_training.sources.clocks import TopicTimes
from occbev_training.sources.deskew import join_clouds
from occbev_training.sources.point_times import PointTimes, find_point_times
from occbev_training.sources.recording import RecordingError

KEY_TOLERANCE = 0.06
"""Seconds that the frames of one key lie from its sweep where cameras and LiDAR fire together."""

CAMERA_REACH, JITTER = 0.11, 1.1
"""Most seconds that a frame may lie from the anchor camera's, and how much longer than half a period that may be."""

SLOW_POSES, FAR_BETWEEN = 0.15, 0.5
"""Seconds between poses up to which they are interpolated in any case, and where that leaves hardly an error."""

SMALL_ERROR = 0.05, np.deg2rad(0.3)
"""Metres and radians of error that interpolation may leave."""

WHOLE_S = 1e9
"""Seconds of transforms that are kept: all of them."""

LOG = logging.getLogger(__name__)


_Probe = tuple[int, NDArray[np.void], NDArray[np.float32]]
"""A cloud: its stamp as written, its points with all their fields (M,), their places (M, 3)."""


class BagRecording(IndexedBag):
    """A bag as a `Recording`. It holds no labels: `annotations` and `occupancy_truth` return None.

    A key frame is one exposure of the anchor camera with the nearest exposure of every other; its
    stamp is the middle of the nearest sweep, or the last exposure where no sweep is near.
    location: what all parts of a bag share, in whose coordinates their poses are.
    left_out: camera -> why it cannot be used; the rig has the others.
    twist_axes: how the velocities of the odometry fit its poses. pose_frames: parent and child frame of the odometry.
    calibrated_sizes: camera -> width and height that its calibration is for; images may be larger or smaller.
    without_poses: why the bag has no poses, "" where it has some.
    """

    def __init__(self, path: Path | str, options: BagOptions | None = None, needs_poses: bool = True) -> None:
        """Index a bag.

        needs_poses: whether one without poses is refused; otherwise its vehicle counts as standing, see `without_poses`.
        Raises RecordingError saying which topic, frame or count is wrong.
        """
        super().__init__(path, options)
        for note in self.notes:
            LOG.warning("%s: %s", self._bag.path, note)
        self.name = self.location = self._bag.path.stem
        self._base_frame = self.options.base_frame
        contents = self._part()
        self._index, kept = contents.index, contents.kept
        self._kept = kept
        self._buffer, self._moving_read = Buffer(WHOLE_S), False
        self._conflicts: dict[str, str] = {}
        self._bad: Counter[str] = Counter()
        self._add_transforms(self.topics.tf_static)
        self.left_out: dict[str, str] = {}
        self._moving_cameras: dict[str, str] = {}
        given = self.options.rig.cameras if self.options.rig else ()
        self.calibrated_sizes = {camera.name: (camera.width, camera.height) for camera in given}
        self.rig = self.options.rig or self._rig(kept)
        self._frame2lidar, self.lidar2ego = _SAME, np.eye(4)
        self._origins: Array | None = None
        self._place_lidar()
        self._others = {topic: self._other_lidar(topic) for topic in self.topics.other_lidars}
        self._twists, self.twist_axes = TwistHistory(kept_ns=None), TwistAxes()
        self.pose_frames = "", ""
        self.without_poses = ""
        try:
            self.trajectory = self._read_trajectory(kept)
        except RecordingError as error:
            if needs_poses:
                raise
            self.without_poses, self.trajectory = str(error), Trajectory(np.zeros(1, np.int64), np.eye(4)[None])
        self.skipped = self.skipped | dict(self._bad)
        poses = kept[self.topics.odometry] if self.topics.odometry else ()
        stamps = [self._bag.stamp_ns(message) for message in poses]
        self._odometry_times = topic_times(stamps, [message.log_ns for message in poses])
        sweeps = self._index[self.topics.lidar] if self.topics.lidar else Index()
        self.sweep_stamp_ns = np.sort(np.array(sweeps.stamp_ns, np.int64))
        self._beside = {topic: self._clouds_beside(topic) for topic in self._others}
        self._keys = self._find_keys()
        self.key_stamp_ns = np.array([stamp for stamp, _ in self._keys], np.int64)

    @property
    def deskew(self) -> str:
        """How the motion within a sweep is known: point_times, azimuth or compensated."""
        return self.point_times.kind if self.point_times else "compensated"

    def sweep(self, index: int) -> Sweep:
        """Read one LiDAR rotation, points without a finite place included, with times from its stamp.

        Where there are several LiDARs it is that of the first, with the nearest cloud of each other one.
        """
        topic = self.topics.lidar
        assert topic is not None, "a bag without LiDAR has no sweep to read"
        first = self.cloud(topic, index)
        if not self._others:
            return first
        others = [other for topic in self._others if (other := self._cloud_beside(topic, index)) is not None]
        return join_clouds(first, others)

    def cloud_stamps(self, topic: str) -> NDArray[np.int64]:
        """Return the stamps (C,) of one LiDAR's clouds, increasing."""
        return np.sort(np.array(self._index[topic].stamp_ns, np.int64))

    def cloud(self, topic: str, index: int) -> Sweep:
        """Read one cloud of one LiDAR by its place in `cloud_stamps`."""
        own = self._index[topic]
        number = int(np.argsort(own.stamp_ns, kind="stable")[index])
        raw_ns = own.raw_ns[number]
        cloud, points = self._cloud(self._message(topic, own.log_ns[number], raw_ns), topic)
        first = topic == self.topics.lidar
        lidar2ego, times = (self.lidar2ego, self.point_times) if first else self._others[topic]
        offsets = None if times is None else times.offsets(cloud, points, raw_ns)
        names = cloud.dtype.names or ()
        intensity = cloud["intensity"].astype(np.float32) if "intensity" in names else None
        origins = self._origins if first else None
        sensor = None if origins is None else self._sensors_of(cloud, topic)
        return Sweep(points, own.stamp_ns[number], lidar2ego, intensity, offsets, origins=origins, sensor=sensor)

    def _cloud_beside(self, topic: str, index: int) -> Sweep | None:
        """Read the cloud of another LiDAR that belongs to a sweep; None where there is none, or none that can be read."""
        number = self._beside[topic].get(index)
        try:
            return None if number is None else self.cloud(topic, number)
        except RecordingError as error:
            LOG.warning("%s: sweep %d is read without a cloud of %s: %s", self._bag.path, index, topic, error)
            return None

    def _clouds_beside(self, topic: str) -> dict[int, int]:
        """Return sweep -> the cloud of another LiDAR that belongs to it; each cloud belongs to one sweep at most."""
        sweeps, clouds = self.sweep_stamp_ns, self.cloud_stamps(topic)
        reach = max(KEY_TOLERANCE, 0.5 * JITTER * _period(sweeps))
        found: dict[int, int] = {}
        for number, stamp in enumerate(clouds.tolist()):
            sweep = _nearest(sweeps, stamp, reach)
            if sweep is None:
                continue
            known = found.setdefault(sweep, number)
            if abs(stamp - sweeps[sweep]) < abs(clouds[known] - sweeps[sweep]):
                found[sweep] = number
        return found

    def _other_lidar(self, topic: str) -> tuple[Array, PointTimes | None]:
        """Return where another LiDAR stands and how its points know their time; raises RecordingError."""
        probe = self._probe_of(topic)
        if probe is None:
            return np.eye(4), None
        try:
            frame = self._frame_of_clouds(topic)
            if frame == self._base_frame:
                raise RecordingError(
                    f"{topic}: its clouds are in {frame!r} itself, so that it is not known where their beams begin; "
                    "of several LiDARs each cloud must be in the frame of its own sensor"
                )
            return self._lidar2base(frame, topic), self._find_point_times(topic, probe)
        except RecordingError as error:
            text = str(error)
            raise RecordingError(
                text if text.startswith(str(self._bag.path)) else f"{self._bag.path}: {text}"
            ) from error

    def frame_set(self, key: int) -> FrameSet:
        """Read the images of one key frame, encoded ones as their bytes; a broken image is a missing camera."""
        stamp, chosen = self._keys[key]
        frames: dict[str, CameraFrame | None] = {}
        missing: dict[str, str] = {}
        for camera in self.rig.cameras:
            name, topic = camera.name, self.topics.images[camera.name]
            frames[name] = None
            if name not in chosen:
                missing[name] = f"no message on {topic} within half its period or {CAMERA_REACH} s"
                continue
            exposure = self._index[topic].stamp_ns[chosen[name]]
            try:
                image = self._image(topic, chosen[name])
            except RecordingError as error:
                missing[name] = f"broken image: {error}"
                continue
            size = (camera.width, camera.height)
            fault = image_fault(image, size) if isinstance(image, bytes) else _size_fault(image, size)
            if fault is not None:
                missing[name] = f"broken image: {fault}"
                continue
            frames[name] = CameraFrame(name, exposure, image, self._pose_of_camera(camera, exposure))
        pose = self._pose_or_none(stamp)
        return FrameSet(stamp, frames, missing, None if pose is None else self._twists.at(stamp, pose))

    def exposures(self, camera: str) -> NDArray[np.int64]:
        """Return the stamps (E,) of every image of a camera, in bag order."""
        return np.array(self._index[self.topics.images[camera]].stamp_ns, np.int64)

    def exposure(self, camera: str, number: int) -> NDArray[np.uint8] | bytes:
        """Read one image of a camera by its place in `exposures`."""
        return self._image(self.topics.images[camera], number)

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
        """How the times of points are stored, found from a sweep in the middle of the drive; None without LiDAR.

        Raises RecordingError where that cannot be found, or where no sweep can be read.
        """
        topic = self.topics.lidar
        return None if topic is None or self._probe is None else self._find_point_times(topic, self._probe)

    def _find_point_times(self, topic: str, probe: _Probe) -> PointTimes:
        (raw_ns, cloud, points), period = probe, _period(self.cloud_stamps(topic)) or 0.1
        try:
            return find_point_times(
                cloud, points, raw_ns, period, self.options.point_times, is_compensated(self.topics.profile)
            )
        except RecordingError as error:
            raise RecordingError(f"{self._bag.path}: {topic}: {error}") from error

    def probe_offsets(self) -> NDArray[np.float32]:
        """Return the seconds (M,) from the stamp of the points of a cloud in the middle; empty without times."""
        offsets = None
        if self.point_times is not None and self._probe is not None:
            raw_ns, cloud, points = self._probe
            offsets = self.point_times.offsets(cloud, points, raw_ns)
        return np.zeros(0, np.float32) if offsets is None else offsets

    @cached_property
    def _probe(self) -> _Probe | None:
        """A cloud from the middle of the recording; None without LiDAR."""
        return None if self.topics.lidar is None else self._probe_of(self.topics.lidar)

    def _probe_of(self, topic: str) -> _Probe | None:
        """Return a cloud from the middle of the recording; None of a topic without any.

        Raises RecordingError where none of a few clouds can be read.
        """
        if not self._index[topic].stamp_ns:
            return None
        index, problem = self._index[topic], RecordingError(f"{topic}: every cloud is empty")
        middle = len(index.stamp_ns) // 2
        for number in dict.fromkeys([middle, 0, len(index.stamp_ns) - 1, middle // 2]):
            raw_ns = index.raw_ns[number]
            try:
                cloud, points = self._cloud(self._message(topic, index.log_ns[number], raw_ns), topic)
            except RecordingError as error:
                problem = error
                continue
            if len(cloud):
                return raw_ns, cloud, points
        raise RecordingError(f"{self._bag.path}: {problem}")

    def _cloud(self, message: Any, topic: str) -> tuple[NDArray[np.void], NDArray[np.float32]]:
        """Return a structured cloud (M,) and its places (M, 3)."""
        try:
            cloud = cloud_from_message(message)
            points = points_of_cloud(cloud)
        except MessageError as error:
            raise RecordingError(f"{topic}: {error}") from error
        if self._frame2lidar is not _SAME and topic == self.topics.lidar:
            points = transform_points(self._frame2lidar, points).astype(np.float32)
        return cloud, points

    def _image(self, topic: str, number: int) -> NDArray[np.uint8] | bytes:
        """Return the bytes of a compressed image, or the (H, W, 3) RGB array of a raw one."""
        index = self._index[topic]
        try:
            return read_image(self._message(topic, index.log_ns[number], index.raw_ns[number]))
        except MessageError as error:
            raise RecordingError(str(error)) from error

    def _add_transforms(self, topic: str) -> None:
        """Put the transforms of a topic into the buffer; bad ones are counted."""
        for message in self._kept.get(topic, ()):
            problems = self._buffer.add_message(self._bag.decode(message), topic == self.topics.tf_static)
            self._bad.update(f"{topic}: bad transform" for _ in problems)

    def _read_moving(self) -> None:
        """Put the moving transforms into the buffer, once: there are many, and most bags need none of them."""
        if not self._moving_read:
            self._moving_read = True
            self._add_transforms(self.topics.tf)

    def _sensor2base(self, frame: str, topic: str) -> Array:
        """Return the transform of a sensor's frame to the vehicle's, as the node finds it.

        Raises RecordingError where there is none, or where publishers of one of its transforms differ.
        """
        try:
            if not self._buffer.is_static(self._base_frame, frame):
                self._read_moving()
            sensor2base = self._buffer.lookup_matrix(self._base_frame, frame, 0)
        except TransformException as error:
            raise RecordingError(
                f"{topic}: no transform from {frame!r} to {self._base_frame!r} on "
                f"{self.topics.tf_static} or {self.topics.tf}: {error}"
            ) from error
        self._conflicts |= self._buffer.take_conflicts()
        for name in self._buffer.chain(self._base_frame, frame):
            if name in self._conflicts:
                raise RecordingError(f"{topic}: transforms conflict: {self._conflicts[name]}")
        return sensor2base

    def _lidar2base(self, frame: str, topic: str) -> Array:
        """Return where a LiDAR stands, raising as `_sensor2base`; one that moves on the vehicle is warned of."""
        lidar2base = self._sensor2base(frame, topic)
        if self._buffer.moves(self._base_frame, frame):
            text = "%s: %s: the frame %r moves on the vehicle; all of its clouds are read where it stood last"
            LOG.warning(text, self._bag.path, topic, frame)
        return lidar2base

    def _rig(self, kept: Mapping[str, Sequence[BagMessage]]) -> CameraRig:
        """Return the cameras that can be used; those that cannot are named in `left_out`."""
        order = {name: i for i, name in enumerate(DEFAULT_CAMERAS)}
        cameras = []
        for name in sorted(self.topics.images, key=lambda name: (order.get(name, len(order)), name)):
            topic = self.topics.infos[name]
            try:
                cameras.append(self._camera(name, kept[topic]))
            except (RecordingError, MessageError, RigError) as error:
                unread = isinstance(error, EncodingError)
                self.left_out[name] = _at_topic(self.topics.images[name] if unread else topic, error)
                self._bad[f"{self.topics.images[name]}: camera left out: {error}"] = self._count(name)
                LOG.warning("%s: camera %s is left out: %s", self._bag.path, name, self.left_out[name])
        if not cameras:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()) or "no topic is named"
            raise RecordingError(f"{self._bag.path}: no camera can be used; {reasons}")
        return CameraRig(tuple(cameras))

    def _count(self, camera: str) -> int:
        return len(self._index[self.topics.images[camera]].stamp_ns)

    def _camera(self, name: str, messages: Sequence[BagMessage]) -> Camera:
        topic, images = self.topics.infos[name], self.topics.images[name]
        if not messages:
            raise RecordingError(f"{topic}: no CameraInfo")
        info, image_frame, size = self._bag.decode(messages[0]), *self._look_at_images(images)
        frame = clean_frame(self.topics.frames.get(name) or str(info.header.frame_id) or image_frame)
        if frame in ("", self._base_frame):
            raise RecordingError(
                f"{topic}: its messages name the frame {frame!r}, not an optical frame; "
                f"name it as cameras.{name}.frame in a file for --topics"
            )
        camera = camera_from_info(name, info, self._sensor2base(frame, topic), is_rectified(images))
        if self._buffer.moves(self._base_frame, frame):
            self._moving_cameras[name] = frame
            LOG.info("%s: camera %s moves on the vehicle: it is placed at each exposure", self._bag.path, name)
        self.calibrated_sizes[name] = camera.width, camera.height
        return camera if size is None else camera.fit_to(*size)

    def _look_at_images(self, topic: str) -> tuple[str, tuple[int, int] | None]:
        """Return the frame that a few images name, and the size (width, height) of the first that can be read.

        Raises EncodingError where none of them is of a kind that is read.
        """
        count, frame, problem = len(self._index[topic].stamp_ns), "", None
        for number in sorted({0, count // 2, count - 1} if count else ()):
            index = self._index[topic]
            try:
                message = self._message(topic, index.log_ns[number], index.raw_ns[number])
                frame = str(message.header.frame_id)
                image = read_image(message)
            except EncodingError as error:
                problem = error
                continue
            except (MessageError, RecordingError):
                return frame, None  # it is missing in its key, with the reason
            return frame, encoded_size(image) if isinstance(image, bytes) else (image.shape[1], image.shape[0])
        if problem is not None:
            raise problem
        return frame, None

    def _place_lidar(self) -> None:
        """Find where the LiDAR stands; raises RecordingError where its clouds do not tell."""
        topic = self.topics.lidar
        if topic is None or not self._index[topic].stamp_ns:
            return  # without a sweep nothing can be moved by it
        frame = self._frame_of_clouds(topic)
        given = self.options.lidar_origin or self.topics.lidar_origin
        try:
            if self.topics.sensors:
                places = np.array([self._sensor_place(sensor, topic) for sensor in self.topics.sensors])
                self._origins, given = places - places[0], tuple(places[0].tolist())
            if frame == self._base_frame and given is None:
                raise RecordingError(
                    f"{topic}: its clouds are in {frame!r} itself, so that it is not known where their beams begin; "
                    "say --lidar-origin X Y Z, or lidar_sensors in a file for --topics where several sensors are merged"
                )
            frame2base = np.eye(4) if frame == self._base_frame else self._lidar2base(frame, topic)
        except RecordingError as error:
            raise RecordingError(f"{self._bag.path}: {error}") from error
        self.lidar2ego = frame2base if given is None else make_transform(np.eye(3), given)
        if given is not None:
            self._frame2lidar = invert_transform(self.lidar2ego) @ frame2base

    def _frame_of_clouds(self, topic: str) -> str:
        index = self._index[topic]
        return clean_frame(str(self._message(topic, index.log_ns[0], index.raw_ns[0]).header.frame_id))

    def _sensor_place(self, sensor: LidarSensor, topic: str) -> Array:
        """Return where a sensor of a merged cloud stands in the vehicle's frame."""
        if isinstance(sensor.origin, str):
            return self._lidar2base(sensor.origin, topic)[:3, 3]
        return np.array(sensor.origin)

    def _sensors_of(self, cloud: NDArray[np.void], topic: str) -> NDArray[np.int64]:
        """Return which sensor measured each point (M,); raises RecordingError where a point belongs to none."""
        name = self.topics.lidar_field
        if name not in (cloud.dtype.names or ()):
            raise RecordingError(f"{topic}: no field {name!r} that tells the sensors apart; it has {cloud.dtype.names}")
        values, sensor = cloud[name].astype(np.float64), np.full(len(cloud), -1)
        for number, own in enumerate(self.topics.sensors):
            sensor[(values >= own.first) & (values <= own.last)] = number
        if (sensor < 0).any():
            stray = values[sensor < 0]
            raise RecordingError(
                f"{topic}: {len(stray)} points have {name} {stray.min():g} to {stray.max():g}, which belongs to no sensor"
            )
        return sensor

    def _read_trajectory(self, kept: Mapping[str, Sequence[BagMessage]]) -> Trajectory:
        topic = self.topics.odometry
        poses = self._poses_of_tf() if topic is None else self._poses_of_odometry(topic, kept.get(topic, ()))
        poses.pop(0, None)
        stamps = np.array(sorted(poses), np.int64)
        return bridge_slow_poses(Trajectory(stamps, np.stack([poses[int(stamp)] for stamp in stamps])))

    def _poses_of_odometry(self, topic: str, messages: Sequence[BagMessage]) -> dict[int, Array]:
        """Return stamp -> base2global; bad poses, as before an estimator has begun, are counted."""
        poses: dict[int, Array] = {}
        twists: dict[int, tuple[Array, Array]] = {}
        problem, children = "", {"", self._base_frame}
        for message in messages:
            try:
                pose = pose_from_message(self._bag.decode(message))
                if pose.child not in children:
                    self._sensor2base(pose.child, topic)
                    children.add(pose.child)
                poses[pose.stamp_ns] = base_pose(pose, self._base_frame, self._buffer)
                twist = base_twist(pose, self._base_frame, self._buffer)
                if pose.twist is not None and twist is not None:
                    twists[pose.stamp_ns] = twist
                    self.twist_axes.add(pose.stamp_ns, pose.child2parent, pose.twist[:3])
                    self.pose_frames = pose.parent, pose.child
            except (MessageError, RecordingError) as error:
                problem = problem or _at_topic(topic, error)
                self._bad[f"{topic}: bad pose"] += 1
        if not poses:
            raise RecordingError(
                f"{self._bag.path}: no poses: {problem or f'{topic} has no message with a stamp'}; "
                f"name another topic, or none, in a file for --topics"
            )
        for stamp in sorted(twists):
            self._twists.add(stamp, *twists[stamp])
        return poses

    def _poses_of_tf(self) -> dict[int, Array]:
        """Return stamp -> base2global as the moving transforms over the base tell it."""
        self._read_moving()
        world = self._buffer.world_frame(self._base_frame)
        if world is None:
            raise RecordingError(
                f"{self._bag.path}: no poses: neither an odometry topic nor a transform "
                f"to {self._base_frame!r} on {self.topics.tf}; record one of them, or name another frame with --base-frame"
            )
        stamps = self._buffer.stamps(world, self._base_frame)
        return {stamp: self._buffer.lookup_matrix(world, self._base_frame, stamp) for stamp in stamps if stamp > 0}

    def _find_keys(self) -> list[tuple[int, dict[str, int]]]:
        """Return (key stamp, camera -> message number) of each key frame, in time order."""
        anchor = self.rig[self.options.anchor or front_camera(self.rig.names)].name
        stamps = {name: self.exposures(name) for name in self.rig.names}
        reach = {name: _half_period(of) for name, of in stamps.items()}
        found: dict[int, _Key] = {}
        lag_ns: dict[str, int] = {}
        for stamp in sorted(stamps[anchor].tolist()):
            chosen = {
                name: near for name, of in stamps.items() if (near := _nearest(of, stamp, reach[name])) is not None
            }
            key = self._key_time([int(stamps[name][i]) for name, i in chosen.items()], lag_ns)
            if key not in found or len(chosen) > len(found[key].chosen):
                found[key] = _Key(stamp, key, chosen)
        if not found:
            raise RecordingError(f"{self._bag.path}: {self.topics.images[anchor]}: no image, so there is no key frame")
        keys = [found[key] for key in sorted(found)]
        interval_ns = round(self.options.key_interval * 1e9)
        spaced = _spaced(keys, interval_ns, round(0.25e9 * _period(stamps[anchor])))
        return [(key.stamp_ns, key.chosen) for key in spaced]

    def _key_time(self, exposures: list[int], lag_ns: dict[str, int]) -> int:
        """Return the middle of the sweep that belongs to exposures, or the last exposure where no sweep is near.

        That is the one nearest to the last exposure, or where that one is far from another, to the middle of them.
        lag_ns: how far the sweep was after these two at the key before, so that of two that are equally near the same
        is taken again; it is brought up to date.
        """
        sweeps, reach = self._sweep_middles
        sweep: int | None = None
        for name, wanted in (("last", max(exposures)), ("middle", (min(exposures) + max(exposures)) // 2)):
            sweep = _nearest(sweeps, wanted + lag_ns.get(name, 0), reach)
            if sweep is None or abs(int(sweeps[sweep]) - wanted) > reach * 1e9:
                sweep = _nearest(sweeps, wanted, reach)
            if sweep is None:
                continue
            lag_ns[name] = int(sweeps[sweep]) - wanted
            if max(abs(int(sweeps[sweep]) - stamp) for stamp in exposures) <= KEY_TOLERANCE * 1e9:
                break
        return max(exposures) if sweep is None else int(sweeps[sweep])

    @cached_property
    def _sweep_middles(self) -> tuple[NDArray[np.int64], float]:
        """The times (S,) of the middles of all sweeps, and how many seconds one may lie from the exposures of its key."""
        sweeps = self.sweep_stamp_ns + self._sweep_middle_ns
        return sweeps, max(KEY_TOLERANCE, 0.5 * JITTER * _period(sweeps))

    @cached_property
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

    def _pose_of_camera(self, camera: Camera, stamp_ns: int) -> Array | None:
        """Return ego2global (4, 4) at an exposure; for a camera that moves on the vehicle as if it had stood where the rig says.

        So the rig's cam2ego leads to where the camera was.
        """
        ego2global, frame = self._pose_or_none(stamp_ns), self._moving_cameras.get(camera.name)
        if ego2global is None or frame is None:
            return ego2global
        cam2ego = self._buffer.lookup_nearest(self._base_frame, frame, stamp_ns)
        return ego2global @ cam2ego @ invert_transform(camera.cam2ego)

    def _message(self, topic: str, log_ns: int, stamp_ns: int) -> Any:
        for message in self._bag.messages([topic], log_ns, log_ns + 1):
            if self._bag.stamp_ns(message) == stamp_ns:
                return self._bag.decode(message)
        raise RecordingError(f"{self._bag.path}: {topic}: the message of {stamp_ns} ns is gone")


@dataclass(frozen=True)
class _Key:
    """A key frame: its time, the anchor's exposure, and camera -> message number."""

    anchor_ns: int
    stamp_ns: int
    chosen: dict[str, int]


def _spaced(keys: Sequence[_Key], interval_ns: int, slack_ns: int) -> Iterator[_Key]:
    """Yield key frames whose anchor's exposures are an interval apart, but for some slack.

    One within the next half interval that has more cameras is taken instead, as at the start of a recording.
    """
    stamps, place = [key.anchor_ns for key in keys], 0
    while place < len(keys):
        near = keys[place : bisect_right(stamps, stamps[place] + interval_ns // 2)]
        best = max(near, key=lambda key: len(key.chosen))
        yield best
        place = bisect_left(stamps, best.anchor_ns + max(interval_ns - slack_ns, 1))


def _period(stamp_ns: NDArray[np.int64]) -> float:
    """Return the seconds between messages, 0 for fewer than two."""
    return float(np.median(np.diff(np.sort(stamp_ns)))) / 1e9 if len(stamp_ns) > 1 else 0.0


def _half_period(stamp_ns: NDArray[np.int64]) -> float:
    """Return how far from the anchor's exposure an image may be: half its camera's period, at most `CAMERA_REACH`."""
    period = _period(stamp_ns)
    return min(CAMERA_REACH, 0.5 * JITTER * period) if period > 0 else KEY_TOLERANCE


def bridge_slow_poses(trajectory: Trajectory) -> Trajectory:
    """Allow longer gaps between poses that come rarely, where interpolating them leaves hardly an error."""
    gap = 2.2 * _period(trajectory.stamp_ns)  # one that is lost now and then
    if gap <= SLOW_POSES or gap > FAR_BETWEEN:
        return trajectory
    metres, radians = trajectory.interpolation_error
    smooth = metres <= SMALL_ERROR[0] and radians <= SMALL_ERROR[1]
    return replace(trajectory, max_gap=gap) if smooth else trajectory


_SAME = np.eye(4)
"""Where points stay as they are."""


def _at_topic(topic: str, error: Exception) -> str:
    """Return an error that names its topic."""
    return str(error) if topic in str(error) else f"{topic}: {error}"


def _size_fault(image: NDArray[np.uint8], size: tuple[int, int]) -> str | None:
    found = image.shape[1], image.shape[0]
    wanted = f"the calibration is for {size[0]}x{size[1]}"
    return None if found == size else f"{found[0]}x{found[1]} pixels, {wanted}"


def _nearest(stamps: NDArray[np.int64], wanted: int, tolerance: float) -> int | None:
    """Return the place of the stamp nearest to one, among stamps (M,) in order; None where none is near enough."""
    after = int(np.searchsorted(stamps, wanted))
    near = [place for place in (after - 1, after) if 0 <= place < len(stamps)]
    best = min(near, key=lambda place: abs(int(stamps[place]) - wanted), default=None)
    return best if best is not None and abs(int(stamps[best]) - wanted) <= tolerance * 1e9 else None
