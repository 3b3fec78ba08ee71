"""Recordings from mmdet3d info files, once `info_pickle` has turned them into JSON.

Both layouts are read: `data_list` of mmdet3d 1.1 and later, and `infos` of earlier releases and of
BEVFormer and BEVDet. Folders in their paths are ignored: files are looked for in samples/ and sweeps/, as in nuScenes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import Array, make_transform, rotation_from_wxyz
from occbev.graph import DEFAULT_CAMERAS
from occbev.messages.image_headers import encoded_size
from occbev.results import CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory
from occbev_training.sources.info_pickle import read_infos
from occbev_training.sources.lidar_files import COLUMNS, read_lidar_file
from occbev_training.sources.nuscenes import LIDAR_CHANNEL
from occbev_training.sources.recording import RecordingError

MAX_KEY_GAP = 1.5
"""Seconds between key frames beyond which another drive begins: info files name no scenes."""


@dataclass(frozen=True)
class _Data:
    """One file of one sensor. path: as the info file has it.

    sensor2ego, ego2global: (4, 4). intrinsic: (3, 3) in pixels, None of the LiDAR.
    """

    channel: str
    path: str
    stamp_ns: int
    sensor2ego: Array
    ego2global: Array | None
    intrinsic: Array | None = None


@dataclass(frozen=True)
class _Key:
    """One key frame: its LiDAR, its cameras, and the sweeps before it."""

    lidar: _Data
    cameras: Mapping[str, _Data]
    sweeps: tuple[_Data, ...]


def convert_infos(pickle_path: Path, json_path: Path) -> None:
    """Read an info .pkl safely and keep it as JSON, which appears only when it is complete.

    Raises:
        RecordingError: as `read_infos`, or where it is no info file.
    """
    record = read_infos(pickle_path)
    _samples(record, pickle_path)
    json_path.parent.mkdir(parents=True, exist_ok=True)
    partial = json_path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(record))
    partial.replace(json_path)


@lru_cache(maxsize=1)
def read_drives(json_path: Path) -> dict[str, list[_Key]]:
    """Return the key frames of each drive of a converted info file, in time order.

    Raises:
        RecordingError: naming the file and the sample whose key is missing or of the wrong kind.
    """
    record = json.loads(json_path.read_bytes())
    make = _key_of_data_list if "data_list" in record else _key_of_infos
    keys = []
    for number, sample in enumerate(_samples(record, json_path)):
        try:
            keys.append(make(sample))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise RecordingError(f"{json_path}: sample {number}: {type(error).__name__}: {error}") from error
    keys.sort(key=lambda key: key.lidar.stamp_ns)
    drives: dict[str, list[_Key]] = {}
    for before, key in zip([None, *keys[:-1]], keys, strict=True):
        gap = np.inf if before is None else (key.lidar.stamp_ns - before.lidar.stamp_ns) / 1e9
        if gap > MAX_KEY_GAP:
            drives[f"infos-{key.lidar.stamp_ns // 1000}"] = drive = []
        drive.append(key)
    return drives


def _samples(record: Mapping[str, Any], path: Path) -> Sequence[Mapping[str, Any]]:
    samples = record.get("data_list", record.get("infos"))
    if not isinstance(samples, list) or not samples:
        raise RecordingError(
            f"{path}: neither 'data_list' nor 'infos' with samples in it; it has {sorted(record)[:20]}"
        )
    return samples


class InfoRecording:
    """One drive of an info file as a `Recording`; its boxes are not read."""

    def __init__(self, name: str, keys: Sequence[_Key], root: Path, lidar_columns: int = COLUMNS) -> None:
        """root: nuScenes data root, with `samples/` and `sweeps/`. lidar_columns: float32 values of a point.

        Raises:
            RecordingError: no key frame has an image there, or the calibration changes.
        """
        self.name, self._root, self._columns = name, root, lidar_columns
        self._keys = [key for key in keys if any(self._find(c) for c in key.cameras.values())]
        if not self._keys:
            raise RecordingError(
                f"{root}: no image of drive {name} in samples/{next(iter(keys[0].cameras), 'CAM_FRONT')}/ and other cameras; "
                "--data-root names the folder that has samples/"
            )
        self.lidar2ego = self._keys[0].lidar.sensor2ego
        self.rig = self._rig()
        lidar = {d.stamp_ns: d for key in self._keys for d in (*key.sweeps, key.lidar)}
        self._sweeps = [lidar[stamp] for stamp in sorted(lidar) if self._find(lidar[stamp])]
        self.sweep_stamp_ns = np.array([d.stamp_ns for d in self._sweeps], np.int64)
        self.key_stamp_ns = np.array([key.lidar.stamp_ns for key in self._keys], np.int64)
        self.trajectory = self._trajectory(lidar)

    def sweep(self, index: int) -> Sweep:
        """Read one LiDAR file; its points are compensated to its stamp."""
        data = self._sweeps[index]
        path = self._root / str(self._find(data))
        points, intensity = read_lidar_file(path, self._columns)
        return Sweep(points, data.stamp_ns, data.sensor2ego, intensity, None, "ego_pose")

    @property
    def files(self) -> list[Path]:
        """Every image and sweep of the drive that is on disk."""
        cameras = [data for key in self._keys for data in key.cameras.values()]
        places = [self._find(data) for data in (*cameras, *self._sweeps)]
        return [self._root / place for place in places if place is not None]

    def frame_set(self, key: int) -> FrameSet:
        """Read the encoded images of one key frame; a file that is not there is a missing camera."""
        frames: dict[str, CameraFrame | None] = {}
        missing: dict[str, str] = {}
        for name in self.rig.names:
            data = self._keys[key].cameras.get(name)
            place = None if data is None else self._find(data)
            frames[name] = None
            if data is None or place is None:
                missing[name] = "not in the info file" if data is None else f"no file {data.path}"
                continue
            image = (self._root / place).read_bytes()
            frames[name] = CameraFrame(name, data.stamp_ns, image, data.ego2global)
        return FrameSet(int(self.key_stamp_ns[key]), frames, missing)

    def annotations(self, key: int) -> None:
        """Boxes of info files are not read."""

    def occupancy_truth(self, key: int) -> None:
        """Info files hold no dense labels."""

    def _find(self, data: _Data) -> str | None:
        """Return where a file lies below the root, from its name and channel alone, or None."""
        name = PurePosixPath(data.path.replace("\\", "/")).name
        for folder in ("samples", "sweeps"):
            place = f"{folder}/{data.channel}/{name}"
            if name and (self._root / place).is_file():
                return place
        return None

    def _rig(self) -> CameraRig:
        order = {name: i for i, name in enumerate(DEFAULT_CAMERAS)}
        first: dict[str, _Data] = {}
        for key in self._keys:
            for name, data in key.cameras.items():
                known = first.setdefault(name, data)
                if not np.allclose(known.sensor2ego, data.sensor2ego, atol=1e-6):
                    raise RecordingError(f"{self.name}: two calibrations of {name}, one rig per drive is supported")
        return CameraRig(
            tuple(self._camera(first[name]) for name in sorted(first, key=lambda n: (order.get(n, len(order)), n)))
        )

    def _camera(self, data: _Data) -> Camera:
        """Return a camera; its image size, which info files lack, is read from the first image that is there."""
        for key in self._keys:
            place = self._find(key.cameras[data.channel]) if data.channel in key.cameras else None
            size = None if place is None else encoded_size((self._root / place).read_bytes())
            if size is not None:
                assert data.intrinsic is not None
                return Camera(data.channel, *size, data.intrinsic, data.sensor2ego)
        raise RecordingError(f"{self.name}: no readable image of {data.channel}")

    def _trajectory(self, lidar: Mapping[int, _Data]) -> Trajectory:
        """Join the ego poses of cameras and LiDAR; where they share a stamp the LiDAR's wins."""
        cameras = [d for key in self._keys for d in key.cameras.values()]
        poses = {d.stamp_ns: d.ego2global for d in (*cameras, *lidar.values()) if d.ego2global is not None}
        stamps = np.array(sorted(poses), np.int64)
        return Trajectory(stamps, np.stack([poses[int(stamp)] for stamp in stamps]))


def _key_of_infos(sample: Mapping[str, Any]) -> _Key:
    """Read the layout before mmdet3d 1.1."""
    lidar2ego = _pose(sample["lidar2ego_translation"], sample["lidar2ego_rotation"])
    ego2global = _pose(sample["ego2global_translation"], sample["ego2global_rotation"])
    lidar = _Data(LIDAR_CHANNEL, str(sample["lidar_path"]), _stamp_ns(sample["timestamp"]), lidar2ego, ego2global)
    cameras = {
        _channel(name): _old_data(_channel(name), cam, np.array(cam["cam_intrinsic"], np.float64))
        for name, cam in sample["cams"].items()
    }
    sweeps = tuple(_old_data(LIDAR_CHANNEL, sweep) for sweep in sample.get("sweeps", ()))
    return _Key(lidar, cameras, sweeps)


def _old_data(channel: str, row: Mapping[str, Any], intrinsic: Array | None = None) -> _Data:
    return _Data(
        channel,
        str(row["data_path"]),
        _stamp_ns(row["timestamp"]),
        _pose(row["sensor2ego_translation"], row["sensor2ego_rotation"]),
        _pose(row["ego2global_translation"], row["ego2global_rotation"]),
        intrinsic,
    )


def _key_of_data_list(sample: Mapping[str, Any]) -> _Key:
    """Read the layout of mmdet3d 1.1 and later."""
    points = sample["lidar_points"]
    lidar = _Data(
        LIDAR_CHANNEL,
        str(points["lidar_path"]),
        _stamp_ns(sample["timestamp"]),
        _matrix(points["lidar2ego"]),
        _matrix(sample["ego2global"]),
    )
    cameras = {
        _channel(name): _Data(
            _channel(name),
            str(cam["img_path"]),
            _stamp_ns(cam["timestamp"]),
            _matrix(cam["cam2ego"]),
            None,
            np.array(cam["cam2img"], np.float64)[:3, :3],
        )
        for name, cam in sample["images"].items()
    }
    sweeps = tuple(
        _Data(
            LIDAR_CHANNEL,
            str(s["lidar_points"]["lidar_path"]),
            _stamp_ns(s["timestamp"]),
            _matrix(s["lidar_points"].get("lidar2ego", points["lidar2ego"])),
            _matrix(s["ego2global"]),
        )
        for s in sample.get("lidar_sweeps", ())
    )
    return _Key(lidar, cameras, sweeps)


def _channel(name: object) -> str:
    """Return a camera's name, which is a folder's name, too."""
    if re.fullmatch(r"[A-Za-z0-9_]+", str(name)) is None:
        raise ValueError(f"a camera named {name!r}; letters, digits and _ are allowed")
    return str(name)


def _stamp_ns(value: float) -> int:
    """Info files hold microseconds, or seconds with microseconds behind the point."""
    return round(value * 1e6) * 1000 if value < 1e12 else int(value) * 1000


def _matrix(values: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    matrix = np.array(values, np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(f"a transform must be finite and 4x4, got shape {matrix.shape}: {str(values)[:80]}")
    return matrix


def _pose(translation: Sequence[float], rotation: Sequence[float]) -> NDArray[np.float64]:
    return make_transform(rotation_from_wxyz(rotation), translation)
