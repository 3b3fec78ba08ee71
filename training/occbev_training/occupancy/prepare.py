"""Make a sample cache from recordings: decode and label every key frame once, side by side and resumable.

`occbev_training.data.cache` stores what is made here. Needs no torch; the label kernels need numba.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES, FREE
from occbev.config import ImageConfig, from_record, to_record
from occbev.ego_signals import EgoSignals
from occbev.files import file_name, replace_file
from occbev.geometry import invert_transform, transform_points
from occbev.grid import GRIDS, VoxelGrid
from occbev.inference.preprocess import Preprocessor, network_camera
from occbev.results import FrameSet
from occbev.rig import CameraRig
from occbev_training.data.cache import (
    FORMAT,
    MIN_LIDAR_DEPTH,
    SAMPLE_SUFFIX,
    CachedSample,
    CacheError,
    CacheInfo,
    write_sample,
)
from occbev_training.data.shards import LabelVolumes
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig
from occbev_training.sources.deskew import EgoBox, deskew_rays
from occbev_training.sources.recording import UNEXPECTED, Recording, describe_error, leave_out, require_beam_origin
from occbev_training.workers import KILLED, TaskRunner

logger = logging.getLogger(__name__)

LEAST_REACH_NS = 150_000_000
"""A sweep that is so near to a key time gives depth, however fast the LiDAR turns."""


@dataclass(frozen=True)
class PrepareConfig:
    """How samples are made."""

    image: ImageConfig = field(default_factory=ImageConfig)
    """Size of the network's input."""
    grid: VoxelGrid = GRIDS["occ3d"]
    """Grid of the labels."""
    label_window: float | None = 1.0
    """Sweeps at most this many seconds from the key time make its label; None makes none (fine-tuning needs none)."""
    near_hits: int = 2
    """Sweeps that must hit a near voxel for occupied; 1 for recordings with hardly a sweep for each key frame."""
    ego_box: EgoBox = field(default_factory=EgoBox)
    """The vehicle's body: returns inside are left out."""
    ego_masks: str = ""
    """Folder of <camera>.png whose white pixels show the vehicle itself, for the labels."""


@dataclass(frozen=True)
class DriveReport:
    """What became of a drive.

    boxes: class -> boxes. without_points: boxes without a LiDAR return. classless: category -> boxes that have
    no class here. left_out: what could not be read, a key frame or a camera -> how often, with the first reason.
    unexpected: key frames that were left out for a fault of the code. problem: why there is no drive; "" where there is one.
    """

    name: str
    samples: int = 0
    boxes: Mapping[str, int] = field(default_factory=dict)
    without_points: int = 0
    classless: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    unexpected: int = 0
    problem: str = ""


Job = tuple[str, Callable[[], Recording]]
"""Drive name, and a function that opens the recording; picklable where there are workers."""


def prepare_drives(
    jobs: Mapping[str, Callable[[], Recording]], root: Path, config: PrepareConfig, workers: int = 1
) -> Iterator[DriveReport]:
    """Build a cache from recordings, side by side in `workers` processes; resumes where it stopped.

    A drive that fails, whatever the reason, is reported; the others go on.
    """
    work = partial(prepare_job, root=root, config=config)
    if workers <= 1:
        return map(work, jobs.items())
    return TaskRunner(work, _report_death).run(list(jobs.items()), workers)


def prepare(jobs: Mapping[str, Callable[[], Recording]], root: Path, config: PrepareConfig, workers: int = 1) -> int:
    """Build a cache as `prepare_drives`; returns the number of samples. Raises CacheError where a drive fails."""
    total = 0
    for report in prepare_drives(jobs, root, config, workers):
        if report.problem:
            raise CacheError(f"drive {report.name}: {report.problem}")
        total += report.samples
    return total


def prepare_job(job: Job, root: Path, config: PrepareConfig) -> DriveReport:
    """Prepare one drive in this process, if it is not finished."""
    name, opener = job
    problems: dict[str, str] = {}
    with leave_out(problems, name):
        source = str(getattr(opener, "fingerprint", ""))
        folder = root / file_name(name, "drive name")
        done = _read_finished(folder / "drive.json", config, source)
        if done is not None and not done.unexpected:
            return done
        return _DriveWriter(opener(), folder, config, source).write(name)
    return DriveReport(name, problem=problems[name])


def _report_death(job: Job) -> DriveReport:
    return DriveReport(job[0], problem=KILLED)


def _read_finished(marker: Path, config: PrepareConfig, source: str) -> DriveReport | None:
    """Return the report of a finished drive, None of one that is not, or whose recording changed since.

    Raises:
        CacheError: it was made in another way.
    """
    if not marker.exists():
        return None
    record = json.loads(marker.read_text())
    info = from_record(CacheInfo, record["info"])
    body = record.get("ego_box", _box_record(EgoBox()))
    made = {"image": info.image, "grid": info.grid, "format": info.format, "ego_box": body, "labels": record["labels"]}
    asked = {
        "image": config.image,
        "grid": config.grid,
        "format": FORMAT,
        "ego_box": _box_record(config.ego_box),
        "labels": _label_record(config),
    }
    for what, value in asked.items():
        if made[what] != value:
            raise CacheError(
                f"{marker.parent}: made with {what} {made[what]}, asked for is {value}; "
                "name another cache, or remove the drive"
            )
    if record.get("source", source) != source:
        return None
    return DriveReport(**record.get("report", {"name": marker.parent.name, "samples": len(record["files"])}))


class _DriveWriter:
    """Writes the samples of one recording, then its drive.json; a key frame that cannot be read costs no other."""

    def __init__(self, recording: Recording, folder: Path, config: PrepareConfig, source: str) -> None:
        self.recording, self.folder, self.config, self.source = recording, folder, config, source
        self.preprocessor, self.label = Preprocessor(config.image), _labeller(recording, config)
        self.left_out, self.first = Counter[str](), dict[str, str]()
        self.boxes, self.without_points, self.unexpected = Counter[str](), 0, 0
        self.signals: dict[int, EgoSignals | None] = {}

    def write(self, name: str) -> DriveReport:
        """Write every sample and the record; raises CacheError where no key frame can be read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        marker, files, keys = self.folder / "drive.json", dict[str, str](), []
        marker.unlink(missing_ok=True)
        for key in range(len(self.recording.key_stamp_ns)):
            sample = self._make(key)
            if sample is not None:
                file = f"{key:04d}{SAMPLE_SUFFIX}"
                files[file] = write_sample(self.folder / file, sample)
                keys.append(key)
        left_out = {f"{what}, the first: {self.first[what]}": count for what, count in self.left_out.items()}
        if not files:
            raise CacheError("; ".join(f"{count} {what}" for what, count in left_out.items()) or "it has no key frame")
        classless = dict(getattr(self.recording, "classless", {}))
        report = DriveReport(
            name, len(files), dict(self.boxes), self.without_points, classless, left_out, self.unexpected
        )
        self._write_record(marker, files, keys, report)
        return report

    def _make(self, key: int) -> CachedSample | None:
        """Make one sample, or count why there is none."""
        try:
            frames = self.recording.frame_set(key)
            self.signals[key] = frames.signals
            sample, broken = make_sample(self.recording, key, self.config, self.preprocessor, self.label, frames)
        except Exception as error:  # whatever a reader or decoder raises of one key frame's data
            logger.debug("%s key %d", self.recording.name, key, exc_info=True)
            self._leave_out("key frames", key, describe_error(error))
            self.unexpected += isinstance(error, UNEXPECTED)
            return None
        for camera, reason in {**frames.missing, **broken}.items():
            self._leave_out(f"images of {camera}", key, reason)
        self.boxes.update(DETECTION_CLASSES[int(label)] for label in sample.labels)
        self.without_points += int(np.count_nonzero(sample.lidar_points == 0))
        return sample

    def _leave_out(self, what: str, key: int, reason: str) -> None:
        self.left_out[what] += 1
        self.first.setdefault(what, f"key {key}: {reason}")

    def _write_record(self, marker: Path, files: Mapping[str, str], keys: Sequence[int], report: DriveReport) -> None:
        stamps = [int(self.recording.key_stamp_ns[key]) for key in keys]
        record = {
            "info": to_record(CacheInfo(self.config.image, self.recording.rig.names, self.config.grid)),
            "ego_box": _box_record(self.config.ego_box),
            "labels": _label_record(self.config),
            "source": self.source,
            "files": files,
            "stamp_ns": stamps,
            "ego2global": [self.recording.trajectory.at(stamp).tolist() for stamp in stamps],
            "signals": [signals and signals.values for signals in map(self.signals.get, keys)],
            "report": asdict(report),
        }
        with replace_file(marker) as temporary:
            temporary.write_text(json.dumps(record, indent=1))


def make_sample(
    recording: Recording,
    key: int,
    config: PrepareConfig,
    preprocessor: Preprocessor,
    label: Callable[[int, FrameSet], LabelVolumes],
    frames: FrameSet,
) -> tuple[CachedSample, dict[str, str]]:
    """Decode and label one key frame; returns also the cameras whose image cannot be decoded, with the reason.

    label: (key, its frames) -> the three-state label. frames: of the key frame.
    """
    key_ns = int(recording.key_stamp_ns[key])
    images, valid, rig, broken = _network_images(recording, frames, key_ns, preprocessor)
    intrinsic = rig.lens_matrices
    cam2ego = np.stack([camera.cam2ego for camera in rig.cameras])
    volumes = label(key, frames)
    sample = CachedSample(
        images,
        valid,
        intrinsic,
        cam2ego,
        *_lidar_pixels(recording, key_ns, rig, config.ego_box),
        volumes.state,
        volumes.camera_visible,
        volumes.hit_sweeps,
        volumes.pass_sweeps,
        *_boxes(recording, key),
        *_truth(recording, key, config.grid),
    )
    return sample, broken


def _network_images(
    recording: Recording, frames: FrameSet, key_ns: int, preprocessor: Preprocessor
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], CameraRig, dict[str, str]]:
    """Decode and fit each camera's image; the rig's poses are carried to the key time.

    Returns also the cameras whose image cannot be decoded or has no pose, with the reason: they are missing.
    """
    global2ego = invert_transform(recording.trajectory.at(key_ns))
    shape = (len(recording.rig), preprocessor.config.height, preprocessor.config.width, 3)
    images, valid = np.zeros(shape, np.uint8), np.zeros(len(recording.rig), bool)
    cameras, motions, broken = [], [], dict[str, str]()
    for index, camera in enumerate(recording.rig.cameras):
        frame = frames.frames.get(camera.name)
        fitted, motion = network_camera(camera, preprocessor.config), np.eye(4)
        if frame is not None:
            with leave_out(broken, camera.name):
                array = preprocessor.decode(frame, camera).image
                assert isinstance(array, np.ndarray)
                pose = recording.trajectory.at(frame.stamp_ns) if frame.ego2global is None else frame.ego2global
                images[index], fitted = preprocessor.network_image(array, camera)
                motion, valid[index] = global2ego @ pose, True
        cameras.append(fitted)
        motions.append(motion)
    return images, valid, CameraRig(tuple(cameras)).move_cameras(motions), broken


def _lidar_pixels(
    recording: Recording, key_ns: int, rig: CameraRig, ego_box: EgoBox
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Project the sweep nearest to the key time into every image: camera, pixel, depth of each return."""
    nearest, points = _sweep_near(recording.sweep_stamp_ns, key_ns), np.zeros((0, 3))
    if nearest is not None:
        rays = deskew_rays(recording.sweep(nearest), recording.trajectory, key_ns, ego_box)
        points = rays.end[rays.hit]
    cameras, pixels, depths = [], [], []
    for index, camera in enumerate(rig.cameras):
        pixel, depth = camera.lens.see(transform_points(camera.ego2cam, points))
        inside = (depth > MIN_LIDAR_DEPTH) & np.all((pixel >= 0) & (pixel < (camera.width, camera.height)), axis=-1)
        cameras.append(np.full(np.count_nonzero(inside), index, np.uint8))
        pixels.append(pixel[inside].astype(np.float32))
        depths.append(depth[inside].astype(np.float32))
    return np.concatenate(cameras), np.concatenate(pixels), np.concatenate(depths)


def _sweep_near(stamps: NDArray[np.int64], key_ns: int) -> int | None:
    """Return the sweep nearest to a key time; None where it is more than a rotation away: what moves has moved on."""
    if not len(stamps):
        return None
    away = np.abs(stamps - key_ns)
    rotation = float(np.median(np.diff(stamps))) if len(stamps) > 1 else 0.0
    nearest = int(np.argmin(away))
    return nearest if away[nearest] <= max(LEAST_REACH_NS, 1.1 * rotation) else None


def _boxes(recording: Recording, key: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    annotations = recording.annotations(key)
    if annotations is None:
        return np.zeros((0, 9), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64)
    return annotations.boxes.box, annotations.boxes.label, annotations.lidar_points


def _truth(recording: Recording, key: int, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    truth = recording.occupancy_truth(key)
    if truth is None:
        return np.full(grid.shape, FREE, np.uint8), np.zeros(grid.shape, bool)
    if truth.grid == grid:
        return truth.semantics, truth.mask_camera
    return resample_truth(truth.semantics, truth.mask_camera, truth.grid, grid)


def resample_truth(
    semantics: NDArray[np.uint8], mask: NDArray[np.bool_], source: VoxelGrid, target: VoxelGrid
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Bring dense labels onto another grid: class and mask, both in the target's shape.

    A voxel is looked up at as many points as source voxels fit into it. It takes the first occupied class that
    a camera sees there, else free; it is masked in where a camera sees any of the points.
    """
    finer = np.maximum(1, np.ceil(np.array(target.pitch) / np.array(source.pitch) - 1e-6)).astype(int)
    out, seen = np.full(target.shape, FREE, np.uint8), np.zeros(target.shape, bool)
    for step in np.ndindex(*finer):
        inside, flat = np.ones((1, 1, 1), bool), np.zeros((1, 1, 1), np.int64)
        for axis, part in enumerate(step):
            place = target.lo[axis] + target.pitch[axis] * (np.arange(target.shape[axis]) + (part + 0.5) / finer[axis])
            cell = np.floor((place - source.lo[axis]) / source.pitch[axis]).astype(np.int64)
            shape = [1, 1, 1]
            shape[axis] = -1
            inside = inside & ((cell >= 0) & (cell < source.shape[axis])).reshape(shape)
            flat = flat * source.shape[axis] + cell.clip(0, source.shape[axis] - 1).reshape(shape)
        visible = mask.reshape(-1)[flat] & inside
        label = semantics.reshape(-1)[flat]
        out = np.where(visible & (out == FREE), label, out)
        seen |= visible
    return out, seen


def _label_config(config: PrepareConfig) -> LabelConfig | None:
    if config.label_window is None:
        return None
    return LabelConfig(
        window=config.label_window, near_hits=config.near_hits, ego_box=config.ego_box, ego_masks=config.ego_masks
    )


def _box_record(box: EgoBox) -> list[float]:
    """Return a box as JSON gives it back: lowest, then highest x, y, z."""
    return [*box.lo, *box.hi]


def _label_record(config: PrepareConfig) -> dict[str, Any] | None:
    """Return how three-state labels are made, as JSON gives it back; None without any."""
    label = _label_config(config)
    record = None if label is None else {"hash": label.hash, **asdict(label)}
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


def _labeller(recording: Recording, config: PrepareConfig) -> Callable[[int, FrameSet], LabelVolumes]:
    """Return a function that labels a key frame; without labels all is unobserved."""
    label_config = _label_config(config)
    if label_config is None:
        nothing = np.zeros(config.grid.shape, np.uint8)
        return lambda key, frames: LabelVolumes(nothing, nothing, nothing, nothing, config.grid.hash)
    require_beam_origin(recording)
    builder = LabelBuilder(recording, label_config, config.grid)

    return lambda key, frames: builder.build(key, frames).volumes
