"""Make a sample cache from recordings: decode and label every key frame once, side by side and resumable.

`occbev_training.data.cache` stores what is made here. Needs no torch; the label kernels need numba.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE
from occbev.config import ImageConfig, from_record, to_record
from occbev.files import file_name
from occbev.geometry import invert_transform, project_points, transform_points
from occbev.grid import GRIDS, VoxelGrid
from occbev.inference.preprocess import Preprocessor, network_camera
from occbev.results import FrameSet
from occbev.rig import CameraRig
from occbev_training.data.cache import FORMAT, MIN_LIDAR_DEPTH, CachedSample, CacheError, CacheInfo, write_sample
from occbev_training.data.shards import LabelVolumes
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig
from occbev_training.sources.deskew import deskew_rays
from occbev_training.sources.recording import Recording


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


def make_sample(
    recording: Recording,
    key: int,
    config: PrepareConfig,
    preprocessor: Preprocessor,
    label: Callable[[int, FrameSet], LabelVolumes],
) -> CachedSample:
    """Decode and label one key frame; label: (key, its frames) -> the three-state label."""
    key_ns = int(recording.key_stamp_ns[key])
    frames = recording.frame_set(key)
    images, valid, rig = _network_images(recording, frames, key_ns, preprocessor)
    intrinsic = np.stack([camera.intrinsic for camera in rig.cameras])
    cam2ego = np.stack([camera.cam2ego for camera in rig.cameras])
    volumes = label(key, frames)
    return CachedSample(
        images,
        valid,
        intrinsic,
        cam2ego,
        *_lidar_pixels(recording, key_ns, rig),
        volumes.state,
        volumes.camera_visible,
        volumes.hit_sweeps,
        volumes.pass_sweeps,
        *_boxes(recording, key),
        *_truth(recording, key, config.grid),
    )


def prepare_recording(recording: Recording, folder: Path, config: PrepareConfig) -> int:
    """Write the samples of one recording, then its drive.json; returns the number of samples."""
    marker = folder / "drive.json"
    folder.mkdir(parents=True, exist_ok=True)
    preprocessor, files = Preprocessor(config.image), {}
    label = _labeller(recording, config)
    for key in range(len(recording.key_stamp_ns)):
        name = f"{key:04d}.npz"
        files[name] = write_sample(folder / name, make_sample(recording, key, config, preprocessor, label))
    info = CacheInfo(config.image, recording.rig.names, config.grid)
    temporary = marker.with_suffix(".tmp")
    stamps = [int(stamp) for stamp in recording.key_stamp_ns]
    poses = [recording.trajectory.at(stamp).tolist() for stamp in stamps]
    record = {
        "info": to_record(info),
        "labels": _label_record(config),
        "files": files,
        "stamp_ns": stamps,
        "ego2global": poses,
    }
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, marker)
    return len(files)


def prepare(
    jobs: Mapping[str, Callable[[], Recording]],
    root: Path,
    config: PrepareConfig,
    workers: int = 1,
    finished: Callable[[str, int], None] = lambda name, count: None,
) -> int:
    """Build a cache from recordings, side by side in `workers` processes; resumes where it stopped.

    jobs: drive name -> a picklable function that opens the recording.
    finished: called with each drive's name and its number of samples.
    """
    total = 0
    if workers <= 1:
        results: Iterator[tuple[str, int]] = (_prepare_job(n, o, root, config) for n, o in jobs.items())
        for name, count in results:
            total += count
            finished(name, count)
        return total
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        futures = [pool.submit(_prepare_job, name, opener, root, config) for name, opener in jobs.items()]
        for future in as_completed(futures):
            name, count = future.result()
            total += count
            finished(name, count)
    return total


def _prepare_job(name: str, opener: Callable[[], Recording], root: Path, config: PrepareConfig) -> tuple[str, int]:
    folder = root / file_name(name, "drive name")
    done = _count_finished(folder / "drive.json", config)
    if done is not None:
        return name, done
    try:
        return name, prepare_recording(opener(), folder, config)
    except (ValueError, LookupError, OSError) as error:
        raise CacheError(f"drive {name}: {error}") from error


def _count_finished(marker: Path, config: PrepareConfig) -> int | None:
    """Return how many samples a finished drive has, None of one that is not.

    Raises:
        CacheError: it was made in another way.
    """
    if not marker.exists():
        return None
    record = json.loads(marker.read_text())
    info = from_record(CacheInfo, record["info"])
    made = {"image": info.image, "grid": info.grid, "format": info.format, "labels": record["labels"]}
    asked = {"image": config.image, "grid": config.grid, "format": FORMAT, "labels": _label_record(config)}
    for what, value in asked.items():
        if made[what] != value:
            raise CacheError(
                f"{marker.parent}: made with {what} {made[what]}, asked for is {value}; "
                "name another cache, or remove the drive"
            )
    return len(record["files"])


def _one_thread() -> None:
    """Processes are the unit of parallel work: keep OpenCV and numba from adding threads of their own."""
    import cv2

    cv2.setNumThreads(1)
    os.environ["NUMBA_NUM_THREADS"] = "1"


def _network_images(
    recording: Recording, frames: FrameSet, key_ns: int, preprocessor: Preprocessor
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], CameraRig]:
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
            pose = recording.trajectory.at(frame.stamp_ns) if frame.ego2global is None else frame.ego2global
            motions.append(global2ego @ pose)
            valid[index] = True
        cameras.append(fitted)
    return images, valid, CameraRig(tuple(cameras)).move_cameras(motions)


def _lidar_pixels(
    recording: Recording, key_ns: int, rig: CameraRig
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Project the sweep nearest to the key time into every image: camera, pixel, depth of each return."""
    nearest = int(np.argmin(np.abs(recording.sweep_stamp_ns - key_ns)))
    rays = deskew_rays(recording.sweep(nearest), recording.trajectory, key_ns)
    points = rays.end[rays.hit]
    cameras, pixels, depths = [], [], []
    for index, camera in enumerate(rig.cameras):
        pixel, depth = project_points(transform_points(camera.ego2cam, points), camera.intrinsic)
        inside = (depth > MIN_LIDAR_DEPTH) & np.all((pixel >= 0) & (pixel < (camera.width, camera.height)), axis=-1)
        cameras.append(np.full(np.count_nonzero(inside), index, np.uint8))
        pixels.append(pixel[inside].astype(np.float32))
        depths.append(depth[inside].astype(np.float32))
    return np.concatenate(cameras), np.concatenate(pixels), np.concatenate(depths)


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
    return LabelConfig(window=config.label_window, near_hits=config.near_hits)


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
    builder = LabelBuilder(recording, label_config, config.grid)

    return lambda key, frames: builder.build(key, frames).volumes
