"""Read nuScenes tables as recordings, without the devkit.

Any root in the nuScenes schema is read: the dataset's own, a part of it, one of Autoware's T4 format, or one
that `nuscenes_writer` made. Files that the tables name but the disk lacks are counted and reported.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.files import ArraysError, read_arrays
from occbev.geometry import (
    Array,
    invert_transform,
    make_transform,
    rotation_from_wxyz,
    yaw_from_rotation,
)
from occbev.graph import DEFAULT_CAMERAS
from occbev.grid import GRIDS
from occbev.results import Boxes3D, CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory
from occbev_training.sources.can_bus import read_can_bus
from occbev_training.sources.categories import ClassMap, class_of, is_dropped_on_purpose
from occbev_training.sources.lidar_files import COLUMNS, read_lidar_file
from occbev_training.sources.recording import Annotations, OccupancyTruth, RecordingError

log = logging.getLogger(__name__)

LIDAR_CHANNEL = "LIDAR_TOP"

LIDAR_CHANNELS = (LIDAR_CHANNEL, "LIDAR_CONCAT")
"""Channels of the LiDAR in order of preference: nuScenes' and T4's, whose clouds are in base_link."""

T4_TABLES = "annotation"
"""Folder of the tables in Autoware's T4 format."""

MAX_NEIGHBOUR_GAP = 1.5
"""Largest time in seconds to one neighbouring annotation that gives a velocity."""

READ_TABLES = (
    "scene",
    "sample",
    "sample_data",
    "ego_pose",
    "calibrated_sensor",
    "sensor",
    "sample_annotation",
    "instance",
    "category",
    "attribute",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class RootOptions:
    """How a root is read.

    version: folder of the tables, where there are several. classes: classes of further categories.
    lidar_columns: number of float32 values of a point. lidar_origin: where beams begin in base_link, in metres, for
    merged clouds that are calibrated to base_link itself.
    """

    version: str | None = None
    classes: ClassMap = ()
    lidar_columns: int = COLUMNS
    lidar_origin: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class TablesPlace:
    """Where the tables of one version lie, and the folder that their file names are relative to."""

    version: str
    tables: Path
    files: Path


def find_tables(root: Path) -> list[TablesPlace]:
    """List the versions of tables of a root: ROOT/v1.0-*, or T4's ROOT/annotation or ROOT/VERSION/annotation."""
    versions = sorted(path.parent for path in root.glob("*/sample_data.json"))
    if versions:
        return [TablesPlace(tables.name, tables, root) for tables in versions]
    numbered = sorted(path.parent for path in root.glob(f"*/{T4_TABLES}/sample_data.json"))
    numbered = [tables for tables in numbered if tables.parent.name.isdecimal()]
    return [TablesPlace(tables.parent.name, tables, tables.parent) for tables in numbered]


def open_nuscenes(root: Path | str, version: str | None = None, options: RootOptions | None = None) -> NuscenesRoot:
    """Read the tables of a nuScenes-like data root; a version is needed only where several are there.

    Raises:
        RecordingError: no such folder, version or table, saying which are there.
    """
    root, options = Path(root), options or RootOptions()
    version = version or options.version
    found = {place.version: place for place in find_tables(root)}
    if version is None:
        if len(found) != 1:
            remedy = "give --version" if found else f"want ROOT/v1.0-*/sample_data.json or ROOT/{T4_TABLES}/"
            raise RecordingError(f"{root}: want one folder of nuScenes tables, found {sorted(found)}; {remedy}")
        version = next(iter(found))
    if version not in found:
        raise RecordingError(f"{root}: no nuScenes tables of version {version!r}, found {sorted(found) or 'none'}")
    place = found[version]
    tables = {table: _read_table(place.tables / f"{table}.json") for table in READ_TABLES}
    logs = place.tables / "log.json"
    tables["log"] = _read_table(logs) if logs.is_file() else {}
    return NuscenesRoot(place.files, version, tables, place.tables, options)


@dataclass(frozen=True)
class NuscenesRoot:
    """The tables of one data root: table name -> token -> row."""

    path: Path
    version: str
    tables: Mapping[str, Mapping[str, Row]]
    folder: Path
    options: RootOptions = field(default_factory=RootOptions)

    @property
    def scenes(self) -> tuple[str, ...]:
        """Scene names in the table's order."""
        return tuple(row["name"] for row in self.tables["scene"].values())

    def row(self, table: str, row_token: str) -> Row:
        """Return one row; raises RecordingError naming the table that lacks it."""
        try:
            return self.tables[table][row_token]
        except KeyError:
            raise RecordingError(
                f"{self.folder / table}.json: no row {row_token!r}, but another table names it"
            ) from None

    def recordings(
        self, scenes: Sequence[str] | None = None, *, available_only: bool = False
    ) -> list[NuscenesRecording]:
        """Return one recording for each scene, or for those named.

        available_only: leave out key frames of which no image file is there.
        """
        wanted = self.scenes if scenes is None else scenes
        return [self.recording(name, available_only=available_only) for name in wanted]

    def recording(self, scene: str, *, available_only: bool = False) -> NuscenesRecording:
        """Return the recording of one scene; raises RecordingError naming the scenes that are there."""
        for row in self.tables["scene"].values():
            if row["name"] == scene:
                return NuscenesRecording(self, row, available_only=available_only)
        raise RecordingError(f"{self.path}: no scene {scene!r}; scenes are {list(self.scenes)}")

    def has_file(self, filename: str) -> bool:
        """Tell whether a file that a table names is on disk (one folder listing answers for all)."""
        folder, _, name = filename.rpartition("/")
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(self.path / folder))
            except OSError:
                self._listings[folder] = frozenset()
        return name in self._listings[folder]

    def has_data(self, data: Row) -> bool:
        """Tell whether the file of a sample_data row is on disk; T4 marks rows whose data are not valid."""
        return bool(data.get("is_valid", True)) and self.has_file(data["filename"])

    def pose(self, data: Row) -> Array:
        """Return ego2global (4, 4) of a sample_data row, at that sensor's own exposure."""
        return _transform(self.row("ego_pose", data["ego_pose_token"]))

    def channel(self, data: Row) -> str:
        """Return the sensor channel of a sample_data row."""
        return str(self._channel_of[data["calibrated_sensor_token"]])

    def data_of(self, sample: str) -> list[Row]:
        """Return the sample_data rows that are tied to a sample."""
        return self._data_of_sample.get(sample, [])

    def annotations_of(self, sample: str) -> list[Row]:
        """Return the annotation rows of a sample in the table's order."""
        return self._annotations_of_sample.get(sample, [])

    def key_data(self, sample: str, channel: str) -> Row | None:
        """Return the key sample_data row of one sensor of a sample, if it has one."""
        for row in self.data_of(sample):
            if row["is_key_frame"] and self.channel(row) == channel:
                return row
        return None

    @cached_property
    def lidar_channel(self) -> str:
        """The channel of the LiDAR: a known name, or the only sensor of that modality."""
        sensors = {str(row["channel"]): row.get("modality") for row in self.tables["sensor"].values()}
        named = [channel for channel in LIDAR_CHANNELS if channel in sensors]
        others = [channel for channel, modality in sensors.items() if modality == "lidar"]
        if not named and len(others) != 1:
            raise RecordingError(
                f"{self.folder / 'sensor.json'}: want a LiDAR channel {' or '.join(LIDAR_CHANNELS)}, it has "
                f"{others or sorted(sensors)}"
            )
        return (named or others)[0]

    def category(self, annotation: Row) -> str:
        """Return the raw category of an annotation."""
        instance = self.row("instance", annotation["instance_token"])
        return str(self.row("category", instance["category_token"])["name"])

    def class_of(self, annotation: Row) -> str | None:
        """Return the detection class of an annotation, None where its category has none."""
        return class_of(self.category(annotation), self.options.classes)

    def count_classless(self, samples: Iterable[str]) -> Counter[str]:
        """Count the annotations of samples whose category has no class, those left out on purpose aside."""
        names = [self.category(row) for sample in samples for row in self.annotations_of(sample)]
        own = self.options.classes
        return Counter(n for n in names if class_of(n, own) is None and not is_dropped_on_purpose(n, own))

    def location(self, scene: Row) -> str:
        """Return the location of a scene's log, which other scenes share, or the scene's name where there is none."""
        log = self.tables.get("log", {}).get(scene.get("log_token", ""), {})
        return str(log.get("location") or scene["name"])

    def attribute(self, annotation: Row) -> str:
        """Return the attribute of an annotation, "" where it has none."""
        tokens = annotation["attribute_tokens"]
        return str(self.row("attribute", tokens[0])["name"]) if tokens else ""

    def velocity(self, annotation: Row) -> Array:
        """Return the velocity (3,) in the global frame, from the neighbours on the track; NaN if unknown."""
        first = annotation["prev"] and self.row("sample_annotation", annotation["prev"])
        last = annotation["next"] and self.row("sample_annotation", annotation["next"])
        limit = MAX_NEIGHBOUR_GAP * (2 if first and last else 1)
        first, last = first or annotation, last or annotation
        if first is last:
            return np.full(3, np.nan)
        stamps = [self.row("sample", row["sample_token"])["timestamp"] for row in (first, last)]
        seconds = (stamps[1] - stamps[0]) * 1e-6
        if seconds > limit:
            return np.full(3, np.nan)
        moved: Array = np.subtract(last["translation"], first["translation"])
        return moved / seconds

    @cached_property
    def _listings(self) -> dict[str, frozenset[str]]:
        return {}

    @cached_property
    def _channel_of(self) -> dict[str, str]:
        return {
            row_token: self.row("sensor", row["sensor_token"])["channel"]
            for row_token, row in self.tables["calibrated_sensor"].items()
        }

    @cached_property
    def _data_of_sample(self) -> dict[str, list[Row]]:
        return _group(self.tables["sample_data"].values(), "sample_token")

    @cached_property
    def _annotations_of_sample(self) -> dict[str, list[Row]]:
        return _group(self.tables["sample_annotation"].values(), "sample_token")

    @cached_property
    def samples_of_scene(self) -> dict[str, list[Row]]:
        """Scene token -> its samples in time order."""
        groups = _group(self.tables["sample"].values(), "scene_token")
        return {scene: sorted(rows, key=_timestamp) for scene, rows in groups.items()}


class NuscenesRecording:
    """One scene as a `Recording`.

    can_bus: the vehicle's own messages, None where the root holds none of this scene.
    location: the map in whose coordinates its poses are, or its name where no log tells it.
    beams_from_base: whether clouds are in base_link, so that it is not known where their beams begin.
    sample_tokens: (K,) token of each key frame. absent: channel -> files that the tables name
    and the disk lacks. Sweeps are those whose files are there.
    """

    def __init__(self, root: NuscenesRoot, scene: Row, *, available_only: bool = False) -> None:
        self.name: str = scene["name"]
        self._root = root
        self.location = root.location(scene)
        samples = root.samples_of_scene.get(scene["token"], [])
        data = [row for sample in samples for row in root.data_of(sample["token"])]
        self.absent = _count_absent(root, data)
        used = [row for row in data if row["is_key_frame"] or root.channel(row) == root.lidar_channel]
        self._files = [row["filename"] for row in used if root.has_data(row)]
        if self.absent:
            log.warning("%s: %s: files not there, by channel: %s", root.path, self.name, self.absent)
        if available_only:
            samples = [sample for sample in samples if self._has_image(sample["token"])]
        if not samples:
            raise RecordingError(
                f"{root.path}: scene {self.name} has no key frame{' with an image' if available_only else ''}"
            )
        self.sample_tokens = tuple(str(sample["token"]) for sample in samples)
        self.lidar2ego, self.rig = self._calibration(data)
        self.beams_from_base = bool(np.allclose(self.lidar2ego, np.eye(4), atol=1e-6))
        self.trajectory = _trajectory(root, data)
        self.can_bus = read_can_bus(root.path, self.name)
        self._sweeps = sorted(
            (row for row in data if root.channel(row) == root.lidar_channel and root.has_data(row)),
            key=_timestamp,
        )
        self.sweep_stamp_ns = _stamps_ns(self._sweeps)
        self._lidar_keys = [root.key_data(token, root.lidar_channel) for token in self.sample_tokens]
        self.key_stamp_ns = _stamps_ns(
            [lidar or sample for lidar, sample in zip(self._lidar_keys, samples, strict=True)]
        )

    def sweep(self, index: int) -> Sweep:
        """Read one LiDAR file; nuScenes sweeps carry no per-point time, they are compensated."""
        row = self._sweeps[index]
        points, intensity = read_lidar_file(self._root.path / row["filename"], self._root.options.lidar_columns)
        origin = self._root.options.lidar_origin
        if origin is not None:
            points = points - np.array(origin, np.float32)
        return Sweep(points, int(row["timestamp"]) * 1000, self.lidar2ego, intensity, None, "ego_pose")

    def frame_set(self, key: int) -> FrameSet:
        """Read the encoded images of one key frame; a file that is not there is a missing camera."""
        frames: dict[str, CameraFrame | None] = {}
        missing: dict[str, str] = {}
        for name in self.rig.names:
            row = self._root.key_data(self.sample_tokens[key], name)
            frames[name] = None
            if row is None:
                missing[name] = f"sample {self.sample_tokens[key]} has no {name} record"
            elif not self._root.has_data(row):
                missing[name] = f"no file {row['filename']}"
            else:
                image = (self._root.path / row["filename"]).read_bytes()
                frames[name] = CameraFrame(name, int(row["timestamp"]) * 1000, image, self._root.pose(row))
        stamp_ns = int(self.key_stamp_ns[key])
        signals = None if self.can_bus is None else self.can_bus.at(stamp_ns)
        return FrameSet(stamp_ns, frames, missing, signals)

    def annotations(self, key: int) -> Annotations:
        """Return the boxes of the ten detection classes in the ego frame of the LiDAR key."""
        global2ego = invert_transform(self.key_pose(key))
        rows = self._root.annotations_of(self.sample_tokens[key])
        names = [self._root.class_of(row) for row in rows]
        kept = [(row, name) for row, name in zip(rows, names, strict=True) if name is not None]
        box = [_ego_box(row, self._root.velocity(row), global2ego) for row, _ in kept]
        boxes = Boxes3D(
            np.array(box, np.float32).reshape(-1, 9),
            np.array([DETECTION_CLASSES.index(name) for _, name in kept], np.int64),
            np.ones(len(kept), np.float32),
        )
        points = np.array([row["num_lidar_pts"] for row, _ in kept], np.int64)
        return Annotations(boxes, tuple(row["instance_token"] for row, _ in kept), points)

    def occupancy_truth(self, key: int) -> OccupancyTruth | None:
        """Read the Occ3D labels below `gts/`, or None where this key frame has none."""
        path = self._root.path / "gts" / self.name / self.sample_tokens[key] / "labels.npz"
        if not path.is_file():
            return None
        return read_occ3d(path)

    @property
    def classless(self) -> Counter[str]:
        """Category -> annotations of the key frames that have no class here."""
        return self._root.count_classless(self.sample_tokens)

    @property
    def files(self) -> list[Path]:
        """Every sweep and image of a key frame of the scene that is on disk."""
        return [self._root.path / name for name in self._files]

    def key_pose(self, key: int) -> Array:
        """Return ego2global (4, 4) at the key stamp."""
        row = self._lidar_keys[key]
        return self.trajectory.at(int(self.key_stamp_ns[key])) if row is None else self._root.pose(row)

    def available(self, key: int) -> tuple[str, ...]:
        """Return the cameras of a key frame whose image files are there, without reading them."""
        rows = ((name, self._root.key_data(self.sample_tokens[key], name)) for name in self.rig.names)
        return tuple(n for n, row in rows if row is not None and self._root.has_data(row))

    def _has_image(self, sample: str) -> bool:
        rows = [row for row in self._root.data_of(sample) if row["is_key_frame"]]
        return any(row["width"] > 0 and self._root.has_data(row) for row in rows)

    def _calibration(self, data: Iterable[Row]) -> tuple[Array, CameraRig]:
        """Return lidar2ego and the rig of the scene, whose calibration must not change on the way."""
        first: dict[str, Row] = {}
        for row in data:
            channel = self._root.channel(row)
            known = first.setdefault(channel, row)
            if not self._same_calibration(known, row):
                raise RecordingError(
                    f"{self._root.path}: scene {self.name} has two calibrations of {channel}, "
                    "one rig per scene is supported"
                )
        lidar = self._root.lidar_channel
        if lidar not in first:
            raise RecordingError(f"{self._root.path}: scene {self.name} has no {lidar}, only {sorted(first)}")
        sensor = {channel: self._sensor(row) for channel, row in first.items()}
        order = {name: index for index, name in enumerate(DEFAULT_CAMERAS)}
        names = sorted((c for c in first if sensor[c]["camera_intrinsic"]), key=lambda c: (order.get(c, len(order)), c))
        cameras = tuple(_camera(name, first[name], sensor[name]) for name in names)
        return self._lidar2ego(_transform(sensor[lidar])), CameraRig(cameras)

    def _lidar2ego(self, calibrated: Array) -> Array:
        """Return where beams begin: the calibration, or the origin that was given for clouds in base_link."""
        origin = self._root.options.lidar_origin
        if origin is None:
            return calibrated
        if not np.allclose(calibrated, np.eye(4), atol=1e-6):
            raise RecordingError(
                f"{self._root.path}: {self._root.lidar_channel} is calibrated at {calibrated[:3, 3].round(3).tolist()}; "
                "--lidar-origin is for clouds in base_link"
            )
        return make_transform(np.eye(3), origin)

    def _sensor(self, data: Row) -> Row:
        return self._root.row("calibrated_sensor", data["calibrated_sensor_token"])

    def _same_calibration(self, one: Row, other: Row) -> bool:
        """Whether two rows of one channel have the same calibration, under whatever tokens."""
        if one["calibrated_sensor_token"] == other["calibrated_sensor_token"]:
            return True
        names = ("translation", "rotation", "camera_intrinsic", "camera_distortion")
        first, second = self._sensor(one), self._sensor(other)
        return all(
            np.array_equal(np.shape(first.get(name) or []), np.shape(second.get(name) or []))
            and np.allclose(first.get(name) or [], second.get(name) or [], rtol=0, atol=1e-6)
            for name in names
        )


def _camera(name: str, data: Row, sensor: Row) -> Camera:
    """Return a camera; T4 tables hold distortion (k1, k2, p1, p2, k3), nuScenes' images are rectified."""
    size = int(data["width"]), int(data["height"])
    distortion = tuple(float(v) for v in sensor.get("camera_distortion") or ())
    model = "plumb_bob" if any(distortion) else "none"
    intrinsic = np.array(sensor["camera_intrinsic"], np.float64)
    return Camera(name, *size, intrinsic, _transform(sensor), model, distortion if any(distortion) else ())


def read_occ3d(path: Path) -> OccupancyTruth:
    """Read one Occ3D `labels.npz`; raises RecordingError naming a missing array or a wrong shape."""
    grid = GRIDS["occ3d"]
    try:
        arrays = read_arrays(path, ("semantics", "mask_lidar", "mask_camera"))
    except ArraysError as error:
        raise RecordingError(str(error)) from error
    for name, values in arrays.items():
        if values.shape != grid.shape:
            raise RecordingError(f"{path}: {name} has shape {values.shape}, Occ3D has {grid.shape}")
    return OccupancyTruth(
        arrays["semantics"].astype(np.uint8),
        arrays["mask_lidar"].astype(bool),
        arrays["mask_camera"].astype(bool),
        grid,
    )


def _read_table(path: Path) -> dict[str, Row]:
    try:
        rows = json.loads(path.read_bytes())
        table = {row["token"]: row for row in rows}
    except FileNotFoundError as error:
        raise RecordingError(f"{path}: no such table") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordingError(f"{path}: not a table of rows with tokens: {error}") from error
    if len(table) != len(rows):
        twice = next(token for token, count in Counter(row["token"] for row in rows).items() if count > 1)
        raise RecordingError(
            f"{path}: {len(rows) - len(table)} rows repeat a token, first {twice!r}; tokens are unique"
        )
    return table


def _group(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _timestamp(row: Row) -> int:
    return int(row["timestamp"])


def _stamps_ns(rows: Sequence[Row]) -> NDArray[np.int64]:
    return np.array([_timestamp(row) for row in rows], np.int64) * 1000


def _transform(row: Row) -> Array:
    return make_transform(rotation_from_wxyz(row["rotation"]), row["translation"])


def _count_absent(root: NuscenesRoot, data: Iterable[Row]) -> dict[str, int]:
    return dict(Counter(root.channel(row) for row in data if not root.has_data(row)))


def _trajectory(root: NuscenesRoot, data: Sequence[Row]) -> Trajectory:
    """Join every ego pose of a scene; where sensors share a stamp the LiDAR's pose wins."""
    ordered = sorted(data, key=lambda row: root.channel(row) == root.lidar_channel)
    poses = {_timestamp(row) * 1000: row["ego_pose_token"] for row in ordered}
    stamps = np.array(sorted(poses), np.int64)
    rows = [root.row("ego_pose", poses[int(stamp)]) for stamp in stamps]
    ego2global = np.tile(np.eye(4), (len(rows), 1, 1))
    ego2global[:, :3, :3] = rotation_from_wxyz([row["rotation"] for row in rows])
    ego2global[:, :3, 3] = [row["translation"] for row in rows]
    return Trajectory(stamps, ego2global)


def _ego_box(annotation: Row, velocity: Array, global2ego: Array) -> list[float]:
    box2ego = global2ego @ _transform(annotation)
    width, length, height = annotation["size"]
    known = np.isfinite(velocity[:2]).all()
    planar = np.array([*velocity[:2], 0.0]) if known else np.full(3, np.nan)  # z is annotation noise
    vx, vy = (global2ego[:3, :3] @ planar)[:2]
    return [*box2ego[:3, 3], length, width, height, yaw_from_rotation(box2ego[:3, :3]), vx, vy]
