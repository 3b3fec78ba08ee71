"""The sample cache: every key frame of some recordings, decoded and labelled once, ready to be trained on.

It stands between the recordings and the trainer. Needs no torch; building it needs the label kernels (numba).
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE
from occbev.config import ImageConfig, from_record, to_record
from occbev.geometry import invert_transform, project_points, transform_points
from occbev.grid import GRIDS, VoxelGrid
from occbev.preprocess import Preprocessor, network_camera
from occbev.results import FrameSet
from occbev.rig import CameraRig
from occbev_training.sources.deskew import deskewed_rays
from occbev_training.sources.recording import Recording

if TYPE_CHECKING:
    from occbev_training.occupancy.labels import LabelConfig

FORMAT = 1
MIN_LIDAR_DEPTH = 0.5
"""LiDAR returns nearer to a camera than this, in metres, are not stored as depth labels."""


class CacheError(ValueError):
    """A sample cache that cannot be used, saying which file and what would be right."""


@dataclass(frozen=True)
class CachedSample:
    """One key frame at network size, everything in base_link at the key time.

    images: (N, h, w, 3) uint8 RGB; camera_valid: (N,) bool.
    intrinsic: (N, 3, 3), cam2ego: (N, 4, 4), each camera moved from its own capture time.
    lidar_camera: (P,) uint8, lidar_pixel: (P, 2) float32, lidar_depth: (P,) float32: returns in each image.
    state, camera_visible, hit_sweeps, pass_sweeps: (X, Y, Z) uint8, the LiDAR-made label.
    boxes: (M, 9) float32, labels: (M,) int64, lidar_points: (M,) int64.
    semantics: (X, Y, Z) uint8, mask_camera: (X, Y, Z) bool; all free and False without dense truth.
    """

    images: NDArray[np.uint8]
    camera_valid: NDArray[np.bool_]
    intrinsic: NDArray[np.float64]
    cam2ego: NDArray[np.float64]
    lidar_camera: NDArray[np.uint8]
    lidar_pixel: NDArray[np.float32]
    lidar_depth: NDArray[np.float32]
    state: NDArray[np.uint8]
    camera_visible: NDArray[np.uint8]
    hit_sweeps: NDArray[np.uint8]
    pass_sweeps: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    lidar_points: NDArray[np.int64]
    semantics: NDArray[np.uint8]
    mask_camera: NDArray[np.bool_]


@dataclass(frozen=True)
class CacheInfo:
    """What a cache was made with; two caches that differ in it do not mix."""

    image: ImageConfig
    cameras: tuple[str, ...]
    grid: VoxelGrid = GRIDS["occ3d"]
    format: int = FORMAT


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


@dataclass(frozen=True)
class Moment:
    """When and where a sample was taken. ego2global: (4, 4) at the key time."""

    drive: str
    stamp_ns: int
    ego2global: NDArray[np.float64]


@dataclass(frozen=True)
class SampleCache:
    """An opened cache: `samples` are (drive, file) pairs in a fixed order, by time within a drive.

    moments: one per sample, or none of caches from before they were kept.
    """

    root: Path
    info: CacheInfo
    samples: tuple[tuple[str, str], ...]
    moments: tuple[Moment, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> CachedSample:
        return read_sample(self.path(index))

    def __iter__(self) -> Iterator[CachedSample]:
        return (self[i] for i in range(len(self)))

    def path(self, index: int) -> Path:
        """File of one sample."""
        return self.root.joinpath(*self.samples[index])

    def name(self, index: int) -> str:
        """Drive and key of one sample, for messages."""
        return "/".join(self.samples[index]).removesuffix(".npz")

    def drive(self, index: int) -> str:
        """Drive of one sample."""
        return self.samples[index][0]

    def moment(self, index: int) -> Moment:
        """When and where one sample was taken; raises CacheError where the cache does not know."""
        if not self.moments:
            raise CacheError(
                f"{self.root}: holds no poses, which past frames need; prepare it again"
            )
        return self.moments[index]

    @property
    def drives(self) -> tuple[str, ...]:
        """Names of the drives, sorted."""
        return tuple(sorted({drive for drive, _ in self.samples}))

    @property
    def hash(self) -> str:
        """Sixteen hex digits over the content of every sample, for the record of a training run."""
        digest = hashlib.sha256()
        for drive in self.drives:
            digest.update((self.root / drive / "drive.json").read_bytes())
        return digest.hexdigest()[:16]

    def read(self, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read some arrays of one sample, without the rest."""
        with np.load(self.path(index), allow_pickle=False) as archive:
            return {name: archive[name] for name in names}


def open_cache(
    root: Path, drives: Sequence[str] | None = None, labelled: bool = False
) -> SampleCache:
    """Open the finished drives of a cache, or some of them; `labelled`: only those with three-state labels.

    Raises:
        CacheError: the folder is no cache, holds no finished drive, or mixes two ways of making samples or labels.
    """
    records = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(root.glob("*/drive.json"))
    }
    if drives is not None:
        missing = sorted(set(drives) - set(records))
        if missing:
            raise CacheError(
                f"{root}: drives {missing} are not in this cache; it has {len(records)}"
            )
        records = {name: records[name] for name in sorted(drives)}
    if labelled:
        records = {name: record for name, record in records.items() if record["labels"]}
    if not records:
        raise CacheError(
            f"{root}: no finished drive{' with labels' if labelled else ''}; make one with 'occbev-train prepare'"
        )
    infos = {name: record["info"] for name, record in records.items()}
    first = next(iter(infos))
    for name, info in infos.items():
        if info != infos[first]:
            raise CacheError(
                f"{root}: drive {name} was made with {info}, drive {first} with {infos[first]}"
            )
    if labelled:
        _require_one_kind_of_labels(root, records)
    if infos[first]["format"] != FORMAT:
        raise CacheError(
            f"{root}: cache format {infos[first]['format']}, this code reads {FORMAT}; prepare it again"
        )
    samples = tuple(
        (name, file) for name, record in records.items() for file in sorted(record["files"])
    )
    moments = [m for name, record in records.items() for m in _moments(name, record)]
    known = tuple(moments) if len(moments) == len(samples) else ()
    return SampleCache(root, from_record(CacheInfo, infos[first]), samples, known)


def _require_one_kind_of_labels(root: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    first, *others = records
    for name in others:
        if records[name]["labels"] != records[first]["labels"]:
            raise CacheError(
                f"{root}: labels of drive {name} were made with {records[name]['labels']}, "
                f"those of {first} with {records[first]['labels']}"
            )


def _moments(drive: str, record: Mapping[str, Any]) -> list[Moment]:
    stamps, poses = record.get("stamp_ns", []), record.get("ego2global", [])
    return [Moment(drive, s, np.array(pose)) for s, pose in zip(stamps, poses, strict=True)]


def read_sample(path: Path) -> CachedSample:
    """Read one sample; raises CacheError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return CachedSample(**{f.name: archive[f.name] for f in fields(CachedSample)})
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CacheError(f"{path}: {error}") from error


def write_sample(path: Path, sample: CachedSample) -> str:
    """Write one sample as .npz, atomically; returns the SHA-256 of the file.

    Label volumes are deflated lightly; images are stored as they are, since they would hardly shrink.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may write the same one
    with zipfile.ZipFile(temporary, "w") as archive:
        for f in fields(CachedSample):
            stored = f.name in ("images", "lidar_pixel", "lidar_depth")
            entry = zipfile.ZipInfo(
                f"{f.name}.npy", (1980, 1, 1, 0, 0, 0)
            )  # same bytes on every run
            entry.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            entry._compresslevel = 1  # type: ignore[attr-defined]
            with archive.open(entry, "w") as member:
                np.lib.format.write_array(
                    member, np.ascontiguousarray(getattr(sample, f.name)), allow_pickle=False
                )
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    os.replace(temporary, path)
    return digest


def make_sample(recording: Recording, key: int, config: PrepareConfig, preprocessor: Preprocessor,
                label: Callable[[int, FrameSet], LabelVolumes]) -> CachedSample:  # fmt: skip
    """Decode and label one key frame; label: (key, its frames) -> the three-state label."""
    key_ns = int(recording.key_stamp_ns[key])
    frames = recording.frame_set(key)
    images, valid, rig = _network_images(recording, frames, key_ns, preprocessor)
    intrinsic = np.stack([camera.intrinsic for camera in rig.cameras])
    cam2ego = np.stack([camera.cam2ego for camera in rig.cameras])
    volumes = label(key, frames)
    return CachedSample(
        images, valid, intrinsic, cam2ego, *_lidar_pixels(recording, key_ns, rig),
        volumes.state, volumes.camera_visible, volumes.hit_sweeps, volumes.pass_sweeps,
        *_boxes(recording, key), *_truth(recording, key, config.grid),
    )  # fmt: skip


def prepare_recording(recording: Recording, folder: Path, config: PrepareConfig) -> int:
    """Write the samples of one recording, then its drive.json; returns the number of samples."""
    marker = folder / "drive.json"
    folder.mkdir(parents=True, exist_ok=True)
    preprocessor, files = Preprocessor(config.image), {}
    label = _labeller(recording, config)
    for key in range(len(recording.key_stamp_ns)):
        name = f"{key:04d}.npz"
        files[name] = write_sample(
            folder / name, make_sample(recording, key, config, preprocessor, label)
        )
    info = CacheInfo(config.image, recording.rig.names, config.grid)
    temporary = marker.with_suffix(".tmp")
    stamps = [int(stamp) for stamp in recording.key_stamp_ns]
    poses = [recording.trajectory.at(stamp).tolist() for stamp in stamps]
    record = {"info": to_record(info), "labels": _label_record(config), "files": files,
              "stamp_ns": stamps, "ego2global": poses}  # fmt: skip
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, marker)
    return len(files)


def prepare(jobs: Mapping[str, Callable[[], Recording]], root: Path, config: PrepareConfig, workers: int = 1,
            finished: Callable[[str, int], None] = lambda name, count: None) -> int:  # fmt: skip
    """Build a cache from recordings, side by side in `workers` processes; resumes where it stopped.

    jobs: drive name -> a picklable function that opens the recording.
    finished: called with each drive's name and its number of samples.
    """
    total = 0
    if workers <= 1:
        results: Iterator[tuple[str, int]] = (
            _prepare_job(n, o, root, config) for n, o in jobs.items()
        )
        for name, count in results:
            total += count
            finished(name, count)
        return total
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        futures = [
            pool.submit(_prepare_job, name, opener, root, config) for name, opener in jobs.items()
        ]
        for future in as_completed(futures):
            name, count = future.result()
            total += count
            finished(name, count)
    return total


def _prepare_job(
    name: str, opener: Callable[[], Recording], root: Path, config: PrepareConfig
) -> tuple[str, int]:
    done = _finished(root / name / "drive.json", config)
    if done is not None:
        return name, done
    try:
        return name, prepare_recording(opener(), root / name, config)
    except (ValueError, LookupError, OSError) as error:
        raise CacheError(f"drive {name}: {error}") from error


def _finished(marker: Path, config: PrepareConfig) -> int | None:
    """Return how many samples a finished drive has, None of one that is not.

    Raises:
        CacheError: it was made in another way.
    """
    if not marker.exists():
        return None
    record = json.loads(marker.read_text())
    info = from_record(CacheInfo, record["info"])
    made = {"image": info.image, "grid": info.grid, "format": info.format, "labels": record["labels"]}  # fmt: skip
    asked = {"image": config.image, "grid": config.grid, "format": FORMAT, "labels": _label_record(config)}  # fmt: skip
    for what, value in asked.items():
        if made[what] != value:
            raise CacheError(f"{marker.parent}: made with {what} {made[what]}, asked for is {value}; "
                             "name another cache, or remove the drive")  # fmt: skip
    return len(record["files"])


def _one_thread() -> None:
    """Processes are the unit of parallel work: keep OpenCV and numba from adding threads of their own."""
    import cv2

    cv2.setNumThreads(1)
    os.environ["NUMBA_NUM_THREADS"] = "1"


def _network_images(recording: Recording, frames: FrameSet, key_ns: int, preprocessor: Preprocessor
                    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_], CameraRig]:  # fmt: skip
    """Decode and fit each camera's image; the rig's poses are carried to the key time."""
    global2ego = invert_transform(recording.trajectory.at(key_ns))
    shape = (len(recording.rig), preprocessor.config.height, preprocessor.config.width, 3)
    images, valid = np.zeros(shape, np.uint8), np.zeros(len(recording.rig), bool)
    cameras, motions = [], []
    for index, camera in enumerate(recording.rig.cameras):
        frame = frames.frames.get(camera.name)
        if frame is None:
            fitted = network_camera(camera, preprocessor.config)
            motions.append(np.eye(4))
        else:
            array = preprocessor.decode(frame, camera).image
            assert isinstance(array, np.ndarray)
            images[index], fitted = preprocessor.network_image(array, camera)
            pose = (
                recording.trajectory.at(frame.stamp_ns)
                if frame.ego2global is None
                else frame.ego2global
            )
            motions.append(global2ego @ pose)
            valid[index] = True
        cameras.append(fitted)
    return images, valid, CameraRig(tuple(cameras)).moved(motions)


def _lidar_pixels(recording: Recording, key_ns: int, rig: CameraRig
                  ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
    """Project the sweep nearest to the key time into every image: camera, pixel, depth of each return."""
    nearest = int(np.argmin(np.abs(recording.sweep_stamp_ns - key_ns)))
    rays = deskewed_rays(recording.sweep(nearest), recording.trajectory, key_ns)
    points = rays.end[rays.hit]
    cameras, pixels, depths = [], [], []
    for index, camera in enumerate(rig.cameras):
        pixel, depth = project_points(transform_points(camera.ego2cam, points), camera.intrinsic)
        inside = (depth > MIN_LIDAR_DEPTH) & np.all(
            (pixel >= 0) & (pixel < (camera.width, camera.height)), axis=-1
        )
        cameras.append(np.full(np.count_nonzero(inside), index, np.uint8))
        pixels.append(pixel[inside].astype(np.float32))
        depths.append(depth[inside].astype(np.float32))
    return np.concatenate(cameras), np.concatenate(pixels), np.concatenate(depths)


def _boxes(
    recording: Recording, key: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    annotations = recording.annotations(key)
    if annotations is None:
        return np.zeros((0, 9), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64)
    return annotations.boxes.box, annotations.boxes.label, annotations.lidar_points


def _truth(
    recording: Recording, key: int, grid: VoxelGrid
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    truth = recording.occupancy_truth(key)
    if truth is None:
        return np.full(grid.shape, FREE, np.uint8), np.zeros(grid.shape, bool)
    if truth.grid == grid:
        return truth.semantics, truth.mask_camera
    return resampled_truth(truth.semantics, truth.mask_camera, truth.grid, grid)


def resampled_truth(
    semantics: NDArray[np.uint8], mask: NDArray[np.bool_], source: VoxelGrid, target: VoxelGrid
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Bring dense labels onto another grid: class and mask, both in the target's shape.

    A voxel is looked up at as many points as source voxels fit into it. It takes the first occupied class that
    a camera sees there, else free; it is masked in where a camera sees any of the points.
    """
    finer = np.maximum(1, np.ceil(np.array(target.pitch) / np.array(source.pitch) - 1e-6)).astype(
        int
    )
    out, seen = np.full(target.shape, FREE, np.uint8), np.zeros(target.shape, bool)
    for step in np.ndindex(*finer):
        inside, flat = np.ones((1, 1, 1), bool), np.zeros((1, 1, 1), np.int64)
        for axis, part in enumerate(step):
            place = target.lo[axis] + target.pitch[axis] * (
                np.arange(target.shape[axis]) + (part + 0.5) / finer[axis]
            )
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


@dataclass(frozen=True)
class LabelVolumes:
    """The parts of a three-state label that are stored; see `CachedSample`."""

    state: NDArray[np.uint8]
    camera_visible: NDArray[np.uint8]
    hit_sweeps: NDArray[np.uint8]
    pass_sweeps: NDArray[np.uint8]


def _label_config(config: PrepareConfig) -> LabelConfig | None:
    if config.label_window is None:
        return None
    from occbev_training.occupancy.labels import LabelConfig

    return LabelConfig(window=config.label_window, near_hits=config.near_hits)


def _label_record(config: PrepareConfig) -> dict[str, Any] | None:
    """Return how three-state labels are made, as JSON gives it back; None without any."""
    label = _label_config(config)
    record = None if label is None else {"hash": label.hash, **asdict(label)}
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


def _labeller(recording: Recording, config: PrepareConfig
              ) -> Callable[[int, FrameSet], LabelVolumes]:  # fmt: skip
    """Return a function that labels a key frame; without labels all is unobserved."""
    label_config = _label_config(config)
    if label_config is None:
        nothing = np.zeros(config.grid.shape, np.uint8)
        return lambda key, frames: LabelVolumes(nothing, nothing, nothing, nothing)
    from occbev_training.occupancy.labels import LabelBuilder

    builder = LabelBuilder(recording, label_config, config.grid)

    def label(key: int, frames: FrameSet) -> LabelVolumes:
        made = builder.build(key, frames)
        return LabelVolumes(made.state, made.camera_visible, made.hit_sweeps, made.pass_sweeps)

    return label
