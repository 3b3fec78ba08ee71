"""Write any recording as nuScenes tables, images, LiDAR files and Occ3D labels.

Each drive is one finished fragment that worker processes write on their own; `merge_nuscenes`
joins the fragments into the tables that nuScenes readers expect.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.files import file_name
from occbev.geometry import (
    Array,
    invert_transform,
    make_transform,
    rotation_from_yaw,
    transform_points,
    wxyz_from_rotation,
)
from occbev.grid import GRIDS
from occbev.results import CameraFrame, Sweep
from occbev.rig import Camera
from occbev_training.sources.deskew import compensated
from occbev_training.sources.nuscenes import READ_TABLES
from occbev_training.sources.recording import Annotations, Recording, RecordingError

TABLES = (*READ_TABLES, "visibility", "log", "map")
"""Every table of the nuScenes schema."""

LIDAR_CHANNEL = "LIDAR_TOP"

CATEGORY_OF_CLASS: dict[str, str] = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
}
"""The nuScenes category that each detection class is written as."""

ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)

VISIBILITY_LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")

MAX_KEY_TO_SWEEP = 0.06
"""Seconds that a key frame may lie from the sweep that becomes its LiDAR key."""

Row = dict[str, Any]
Tables = dict[str, list[Row]]


def write_nuscenes(recordings: Iterable[Recording], root: Path, version: str = "v1.0-sim") -> None:
    """Write recordings as one nuScenes data root; drives that are already finished are kept."""
    for recording in recordings:
        if not is_written(root, recording.name, version):
            write_drive(recording, root, version)
    merge_nuscenes(root, version)


def is_written(root: Path, name: str, version: str = "v1.0-sim") -> bool:
    """Tell whether a drive's fragment is complete."""
    return _fragment_path(root, name, version).is_file()


def find_written_drives(root: Path, version: str = "v1.0-sim") -> list[str]:
    """Names of all finished fragments, sorted."""
    return sorted(path.stem for path in _fragment_path(root, "x", version).parent.glob("*.json"))


def write_drive(recording: Recording, root: Path, version: str = "v1.0-sim") -> Path:
    """Write one drive's files and, last and atomically, its table fragment.

    Safe to call from many processes for different drives of one root.
    Returns: the fragment's path.
    """
    tables = _DriveWriter(recording, root).write()
    path = _fragment_path(root, recording.name, version)
    _replace_json(path, tables)
    return path


def merge_nuscenes(root: Path, version: str = "v1.0-sim") -> int:
    """Join all finished fragments into `root/version/*.json`; returns the number of drives.

    Raises:
        RecordingError: no fragment is there.
    """
    names = find_written_drives(root, version)
    if not names:
        raise RecordingError(f"{_fragment_path(root, 'x', version).parent}: no finished drive to merge")
    merged: dict[str, dict[str, Row]] = {table: {} for table in TABLES}
    for name in names:
        fragment = json.loads(_fragment_path(root, name, version).read_text())
        for table in TABLES:
            for row in fragment[table]:
                _merge_row(merged[table], row)
    for table, rows in merged.items():
        _replace_json(root / version / f"{table}.json", list(rows.values()))
    return len(names)


def token(*parts: object) -> str:
    """Return 32 hex digits as the token of a row: a hash of the parts that identify it."""
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def usual_attribute(name: str, speed: float) -> str:
    """Return the nuScenes attribute that a class and a speed in m/s suggest; "" where it has none."""
    moving = speed > 0.2
    if name in ("car", "truck", "bus", "trailer", "construction_vehicle"):
        still = "vehicle.stopped" if name == "bus" else "vehicle.parked"
        return "vehicle.moving" if moving else still
    if name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    if name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    return ""


def _merge_row(rows: dict[str, Row], row: Row) -> None:
    known = rows.get(row["token"])
    if known is not None and "log_tokens" in row:  # the one map belongs to the logs of all drives
        row = row | {"log_tokens": sorted(set(known["log_tokens"]) | set(row["log_tokens"]))}
    rows[row["token"]] = row


def _fragment_path(root: Path, name: str, version: str) -> Path:
    return root / "drives" / version / f"{name}.json"


def _replace_json(path: Path, value: object) -> None:
    _replace_bytes(path, json.dumps(value, separators=(",", ":")).encode())


def _replace_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


class _DriveWriter:
    """Collects the rows of one drive while it writes its files."""

    def __init__(self, recording: Recording, root: Path) -> None:
        self._recording, self._root, self._name = recording, root, recording.name
        if not self._name or "/" in self._name:
            raise RecordingError(f"drive name {self._name!r}: want one without '/', since files are named after it")
        self._tables: Tables = {table: [] for table in TABLES}
        self._samples = [token(self._name, "sample", i) for i in range(len(recording.key_stamp_ns))]
        if not self._samples:
            raise RecordingError(f"{self._name}: a recording without key frames has no scene")

    def write(self) -> Tables:
        """Write all files; returns the finished tables."""
        self._share_rows()
        self._calibration_rows()
        self._scene_rows()
        for key in range(len(self._samples)):
            self._write_images(key)
            self._write_occupancy(key)
        self._write_sweeps()
        self._annotation_rows()
        _link(self._tables["sample"])
        for channel in (*self._recording.rig.names, LIDAR_CHANNEL):
            calibration = self._calibration_token(channel)
            _link([row for row in self._tables["sample_data"] if row["calibrated_sensor_token"] == calibration])
        return self._tables

    def _add(self, table: str, row_token: str, **fields: Any) -> str:
        self._tables[table].append({"token": row_token, **fields})
        return row_token

    def _calibration_token(self, channel: str) -> str:
        return token(self._name, "calibrated_sensor", channel)

    def _share_rows(self) -> None:
        for name in CATEGORY_OF_CLASS.values():
            self._add("category", token("category", name), name=name, description="")
        for name in ATTRIBUTES:
            self._add("attribute", token("attribute", name), name=name, description="")
        for number, level in enumerate(VISIBILITY_LEVELS, 1):
            self._add("visibility", str(number), level=level, description="")
        log = self._add(
            "log",
            token(self._name, "log"),
            logfile=self._name,
            vehicle="occbev",
            date_captured="",
            location=str(getattr(self._recording, "location", self._name)),
        )
        blank = token("map", "blank")
        path = f"maps/{blank}.png"
        if not (self._root / path).is_file():  # official readers insist on a mask for every map
            encoded = cv2.imencode(".png", np.full((8, 8), 255, np.uint8))[1]
            _replace_bytes(self._root / path, encoded.tobytes())
        self._add("map", blank, category="semantic_prior", filename=path, log_tokens=[log])

    def _calibration_rows(self) -> None:
        for camera in self._recording.rig.cameras:
            if any(camera.distortion):
                raise RecordingError(
                    f"{self._name}: camera {camera.name} has {camera.distortion_model} "
                    "distortion, nuScenes holds rectified images only; write a bag instead (--format bag)"
                )
            self._calibration_row(camera.name, "camera", camera.cam2ego, camera.intrinsic.tolist())
        self._calibration_row(LIDAR_CHANNEL, "lidar", self._recording.lidar2ego, [])

    def _calibration_row(self, channel: str, modality: str, sensor2ego: Array, intrinsic: list[Any]) -> None:
        sensor = self._add("sensor", token("sensor", channel), channel=channel, modality=modality)
        self._add(
            "calibrated_sensor",
            self._calibration_token(channel),
            sensor_token=sensor,
            **_pose(sensor2ego),
            camera_intrinsic=intrinsic,
        )

    def _scene_rows(self) -> None:
        scene = self._add(
            "scene",
            token(self._name, "scene"),
            log_token=token(self._name, "log"),
            nbr_samples=len(self._samples),
            first_sample_token=self._samples[0],
            last_sample_token=self._samples[-1],
            name=self._name,
            description="",
        )
        for sample, stamp in zip(self._samples, self._recording.key_stamp_ns, strict=True):
            self._add("sample", sample, timestamp=int(stamp) // 1000, prev="", next="", scene_token=scene)

    def _data_row(
        self,
        sample: str,
        channel: str,
        stamp_ns: int,
        ego2global: Array,
        path: str,
        *,
        key: bool,
        fileformat: str,
        size: tuple[int, int] = (0, 0),
    ) -> None:
        timestamp = int(stamp_ns) // 1000
        row = token(self._name, channel, timestamp)
        self._add("ego_pose", row, timestamp=timestamp, **_pose(ego2global))
        self._add(
            "sample_data",
            row,
            sample_token=sample,
            ego_pose_token=row,
            calibrated_sensor_token=self._calibration_token(channel),
            timestamp=timestamp,
            fileformat=fileformat,
            is_key_frame=key,
            height=size[1],
            width=size[0],
            filename=path,
            prev="",
            next="",
        )

    def _file_name(self, folder: str, channel: str, stamp_ns: int, suffix: str) -> str:
        channel, drive = file_name(channel, "camera name"), file_name(self._name, "drive name")
        return f"{folder}/{channel}/{drive}__{channel}__{int(stamp_ns) // 1000}{suffix}"

    def _write_images(self, key: int) -> None:
        frames = self._recording.frame_set(key).frames
        for camera in self._recording.rig.cameras:
            frame = frames[camera.name]
            if frame is None:
                continue
            data, suffix = _encode(frame, camera)
            path = self._file_name("samples", camera.name, frame.stamp_ns, suffix)
            self._write_file(path, data)
            pose = frame.ego2global
            pose = self._recording.trajectory.at(frame.stamp_ns) if pose is None else pose
            self._data_row(
                self._samples[key],
                camera.name,
                frame.stamp_ns,
                pose,
                path,
                key=True,
                fileformat=suffix[1:],
                size=(camera.width, camera.height),
            )

    def _write_occupancy(self, key: int) -> None:
        truth = self._recording.occupancy_truth(key)
        if truth is None:
            return
        if truth.grid != GRIDS["occ3d"]:
            raise RecordingError(f"{self._name}: occupancy truth on grid {truth.grid}, Occ3D needs {GRIDS['occ3d']}")
        path = self._root / "gts" / self._name / self._samples[key] / "labels.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            semantics=truth.semantics.astype(np.uint8),
            mask_lidar=truth.mask_lidar.astype(np.uint8),
            mask_camera=truth.mask_camera.astype(np.uint8),
        )

    def _write_sweeps(self) -> None:
        keys, sweeps = self._recording.key_stamp_ns, self._recording.sweep_stamp_ns
        key_sweep = self._key_sweeps()
        for index, stamp in enumerate(sweeps):
            sweep = compensated(self._recording.sweep(index), self._recording.trajectory)
            key = key_sweep.get(index)
            if key is not None and int(keys[key]) != sweep.stamp_ns:
                sweep = self._move(sweep, int(keys[key]))
            near = int(np.argmin(np.abs(keys - stamp))) if key is None else key
            self._write_sweep(sweep, self._samples[near], is_key=key is not None)

    def _key_sweeps(self) -> dict[int, int]:
        """Sweep index -> key index, for the sweep nearest to each key frame."""
        keys, sweeps = self._recording.key_stamp_ns, self._recording.sweep_stamp_ns
        chosen: dict[int, int] = {}
        for key, stamp in enumerate(keys):
            away = np.abs(sweeps - stamp) / 1e9
            nearest = int(np.argmin(away)) if len(away) else -1
            if nearest < 0 or away[nearest] > MAX_KEY_TO_SWEEP or nearest in chosen:
                raise RecordingError(
                    f"{self._name}: key frame {key} at {stamp} ns has no LiDAR sweep of its "
                    f"own within {MAX_KEY_TO_SWEEP} s, which nuScenes needs"
                )
            chosen[nearest] = key
        return chosen

    def _move(self, sweep: Sweep, stamp_ns: int) -> Sweep:
        """Carry a compensated sweep to another stamp (the static world's view of it)."""
        motion = self._recording.trajectory.relative(sweep.stamp_ns, stamp_ns)
        chain = invert_transform(sweep.lidar2ego) @ motion @ sweep.lidar2ego
        points = transform_points(chain, sweep.points).astype(np.float32)
        return Sweep(points, stamp_ns, sweep.lidar2ego, sweep.intensity, None, sweep.pose_source)

    def _write_sweep(self, sweep: Sweep, sample: str, *, is_key: bool) -> None:
        folder = "samples" if is_key else "sweeps"
        path = self._file_name(folder, LIDAR_CHANNEL, sweep.stamp_ns, ".pcd.bin")
        values = np.zeros((len(sweep.points), 5), "<f4")  # ring stays 0: a Sweep does not know it
        values[:, :3] = sweep.points
        if sweep.intensity is not None:
            values[:, 3] = sweep.intensity
        self._write_file(path, values.tobytes())
        pose = self._recording.trajectory.at(sweep.stamp_ns)
        self._data_row(sample, LIDAR_CHANNEL, sweep.stamp_ns, pose, path, key=is_key, fileformat="pcd")

    def _annotation_rows(self) -> None:
        rows: dict[str, list[Row]] = {}
        category: dict[str, str] = {}
        for key, stamp in enumerate(self._recording.key_stamp_ns):
            annotations = self._recording.annotations(key)
            if annotations is None:
                continue
            ego2global = self._recording.trajectory.at(int(stamp))
            for index, instance in enumerate(annotations.instance):
                row = self._annotation(annotations, index, self._samples[key], ego2global)
                rows.setdefault(instance, []).append(row)
                name = DETECTION_CLASSES[int(annotations.boxes.label[index])]
                category[instance] = token("category", CATEGORY_OF_CLASS[name])
        for instance, track in rows.items():
            _link(track)
            self._tables["sample_annotation"].extend(track)
            self._add(
                "instance",
                track[0]["instance_token"],
                category_token=category[instance],
                nbr_annotations=len(track),
                first_annotation_token=track[0]["token"],
                last_annotation_token=track[-1]["token"],
            )

    def _annotation(self, annotations: Annotations, index: int, sample: str, ego2global: Array) -> Row:
        x, y, z, length, width, height, yaw, vx, vy = annotations.boxes.box[index].astype(float)
        box2ego = make_transform(rotation_from_yaw(yaw), (x, y, z))
        instance = token(self._name, "instance", annotations.instance[index])
        name = DETECTION_CLASSES[int(annotations.boxes.label[index])]
        attribute = usual_attribute(name, float(np.nan_to_num(np.hypot(vx, vy))))
        return {
            "token": token(sample, instance),
            "sample_token": sample,
            "instance_token": instance,
            "visibility_token": "",
            "attribute_tokens": [token("attribute", attribute)] if attribute else [],
            "size": [width, length, height],
            **_pose(ego2global @ box2ego),
            "prev": "",
            "next": "",
            "num_lidar_pts": int(annotations.lidar_points[index]),
            "num_radar_pts": 0,
        }

    def _write_file(self, path: str, data: bytes) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _pose(a2b: Array) -> Row:
    return {
        "translation": a2b[:3, 3].tolist(),
        "rotation": wxyz_from_rotation(a2b[:3, :3]).tolist(),
    }


def _link(rows: Sequence[Row]) -> None:
    """Chain rows that are in time order by their prev and next tokens."""
    ordered = sorted(rows, key=lambda row: row["timestamp"]) if rows and "timestamp" in rows[0] else rows
    for before, after in zip(ordered[:-1], ordered[1:], strict=True):
        before["next"], after["prev"] = after["token"], before["token"]


def _encode(frame: CameraFrame, camera: Camera) -> tuple[bytes, str]:
    """Return the bytes of an image file and its suffix, original bytes where there are some."""
    if isinstance(frame.image, bytes):
        if frame.image[:3] == b"\xff\xd8\xff":
            return frame.image, ".jpg"
        if frame.image[:8] == b"\x89PNG\r\n\x1a\n":
            return frame.image, ".png"
        raise RecordingError(
            f"camera {camera.name} at {frame.stamp_ns} ns: neither JPEG nor PNG, begins with {frame.image[:8]!r}"
        )
    return encode_jpeg(frame.image), ".jpg"


def encode_jpeg(image: NDArray[np.uint8], quality: int = 95) -> bytes:
    """Encode an (H, W, 3) RGB image as JPEG."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])
