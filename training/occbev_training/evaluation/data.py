"""Frames to score a network on: sample caches, nuScenes roots, and simulated bags with their truth.

All give the same thing: the images of one key frame, the rig that took them, and what is true of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from occbev.inference.pipeline import motion_to_key
from occbev.inference.postprocess import voxels_in_view
from occbev.lens import Lens
from occbev.results import CameraFrame, FrameSet
from occbev.rig import Camera, CameraRig
from occbev_training.data.cache import CachedSample, SampleCache, open_cache
from occbev_training.evaluation.frames import TRUTH, annotations_of, dense_truth
from occbev_training.evaluation.scores import OccupancyView
from occbev_training.metrics.occupancy import ray_origins
from occbev_training.sources.discovery import chosen_names
from occbev_training.sources.nuscenes import NuscenesRecording, NuscenesRoot, RootOptions, find_tables, open_nuscenes
from occbev_training.sources.recording import Annotations, OccupancyTruth, Recording
from occbev_training.sources.truth import read_truth

Array = NDArray[np.float64]

CACHE_INTERVAL_NS = 500_000_000
"""Time between samples of a cache that does not know when they were taken."""


class EvaluationDataError(ValueError):
    """Data that cannot be scored on, saying what is there and what would be right."""


@dataclass(frozen=True)
class EvaluationFrame:
    """One key frame. Truth is in base_link at its stamp.

    token: the nuScenes sample, "" where there is none. motion: camera -> (4, 4), ego at its exposure -> ego
    at the key time; None where the rig is carried to the key time already. ego2global: (4, 4), or None.
    """

    name: str
    drive: str
    token: str
    frame_set: FrameSet
    rig: CameraRig
    motion: Mapping[str, Array] | None
    ego2global: Array | None
    annotations: Annotations | None
    truth: OccupancyView | None


class EvaluationData(Protocol):
    """Key frames of some drives, by time within each. drives: the drive of every frame."""

    source: str
    drives: tuple[str, ...]

    def __len__(self) -> int: ...

    def frame(self, index: int) -> EvaluationFrame:
        """Read one frame."""
        ...


def open_evaluation_data(
    path: Path, drives: Sequence[str] | None = None, root_options: RootOptions | None = None
) -> EvaluationData:
    """Open a sample cache, a nuScenes-like root, or a folder of `occbev-train simulate --format bag`.

    drives: only these; all by default. root_options: how a nuScenes-like root is read.

    Raises:
        EvaluationDataError: the folder is none of these.
        ValueError: it lacks one of the drives.
    """
    if any(path.glob("*/drive.json")):
        return CacheFrames(open_cache(path, drives))
    if find_tables(path):
        return RootFrames(open_nuscenes(path, options=root_options), drives)
    if (path / "truth").is_dir() and (path / "bags").is_dir():
        return BagFrames(path, drives)
    raise EvaluationDataError(
        f"{path}: neither a sample cache (*/drive.json), nor a nuScenes root (*/sample_data.json),"
        " nor simulated bags (bags/ and truth/)"
    )


class CacheFrames:
    """Samples of a cache, at network size."""

    source = "sample cache"

    def __init__(self, cache: SampleCache) -> None:
        self.cache = cache
        self.drives = tuple(cache.drive(index) for index in range(len(cache)))

    def __len__(self) -> int:
        return len(self.cache)

    def frame(self, index: int) -> EvaluationFrame:
        """Read one frame; its rig is carried to the key time already."""
        sample, drive, names = self.cache[index], self.drives[index], self.cache.cameras_of(index)
        pose, stamp_ns, signals = None, CACHE_INTERVAL_NS * (index + 1), None
        if self.cache.moments:
            moment = self.cache.moment(index)
            pose, stamp_ns, signals = moment.ego2global, moment.stamp_ns, moment.signals
        frames = {
            name: CameraFrame(name, stamp_ns, image, pose) if valid else None
            for name, image, valid in zip(names, sample.images, sample.camera_valid, strict=True)
        }
        missing = {name: "not in the cache" for name, frame in frames.items() if frame is None}
        truth = dense_truth({name: getattr(sample, name) for name in TRUTH}, self.cache.info.grid)
        return EvaluationFrame(
            self.cache.name(index),
            drive,
            "",
            FrameSet(stamp_ns, frames, missing, signals),
            read_cached_rig(sample, names),
            None,
            pose,
            annotations_of({name: getattr(sample, name) for name in TRUTH}),
            truth,
        )


class RecordingFrames:
    """Key frames of recordings whose truth is told by the key's number."""

    source = "recordings"

    def __init__(self, keys: Sequence[tuple[Recording, int]]) -> None:
        self.keys = tuple(keys)
        self.drives = tuple(recording.name for recording, _ in keys)
        self._lidar: tuple[str, Array] | None = None
        self._views: tuple[str, NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def frame(self, index: int) -> EvaluationFrame:
        """Read one frame."""
        recording, key = self.keys[index]
        frame_set, pose = recording.frame_set(key), key_pose(recording, key)
        return EvaluationFrame(
            f"{recording.name}/{key:04d}",
            recording.name,
            token_of(recording, key),
            frame_set,
            recording.rig,
            motion_to_key(frame_set, pose),
            pose,
            recording.annotations(key),
            self.truth(index),
        )

    def truth(self, index: int) -> OccupancyView | None:
        """Read the dense truth of one frame, without its images."""
        recording, key = self.keys[index]
        truth = recording.occupancy_truth(key)
        if truth is None:
            return None
        origins = None
        if len(set(truth.grid.pitch)) == 1:  # RayIoU is defined on cubes
            origins = ray_origins(self._lidar2global(recording), key, key_pose(recording, key))
        views = self._in_images(recording.rig, truth)
        return OccupancyView(truth.semantics, truth.mask_camera, truth.grid, truth.mask_lidar, views, origins)

    def _lidar2global(self, recording: Recording) -> Array:
        """Poses (K, 4, 4) of the LiDAR at all key frames of a drive, kept for the last drive."""
        if self._lidar is None or self._lidar[0] != recording.name:
            poses = [key_pose(recording, key) for key in range(len(recording.key_stamp_ns))]
            self._lidar = recording.name, np.stack(poses) @ recording.lidar2ego
        return self._lidar[1]

    def _in_images(self, rig: CameraRig, truth: OccupancyTruth) -> NDArray[np.uint8]:
        """How many images of a rig at rest each voxel lies in, kept for the last rig."""
        name = rig.hash + truth.grid.hash
        if self._views is None or self._views[0] != name:
            self._views = name, voxels_in_view(rig, truth.grid).sum(0, dtype=np.uint8)
        return self._views[1]


class RootFrames(RecordingFrames):
    """Key frames of a nuScenes root. tokens: the sample of each frame."""

    source = "nuScenes root"

    def __init__(self, root: NuscenesRoot, scenes: Sequence[str] | None = None, with_images: bool = True) -> None:
        """scenes: only these. with_images: leave out key frames of which no image is there."""
        self.root = root
        keys = [
            (recording, key)
            for recording in root.recordings(chosen_names(root.scenes, scenes, root.path))
            for key in range(len(recording.key_stamp_ns))
            if not with_images or recording.available(key)
        ]
        if not keys:
            raise EvaluationDataError(f"{root.path}: no key frame has an image file")
        super().__init__(keys)
        self.tokens = tuple(token_of(recording, key) for recording, key in keys)


class BagFrames(RecordingFrames):
    """Key frames of simulated bags that stand within the tolerance of one of the truth's."""

    source = "bags"

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        found = chosen_names([path.name for path in sorted((folder / "truth").iterdir())], names, folder)
        drives = [TruthfulBag(folder, name) for name in found]
        super().__init__([(drive, key) for drive in drives for key in range(len(drive.key_stamp_ns))])


class TruthfulBag:
    """A bag as a `Recording` whose key frames are the truth's."""

    def __init__(self, folder: Path, name: str) -> None:
        from occbev_training.sources.bags import BagRecording

        bag, truth = BagRecording(folder / "bags" / name), read_truth(folder / "truth" / name)
        nearest = {truth.nearest_key(int(stamp)): key for key, stamp in enumerate(bag.key_stamp_ns)}
        self._bag, self._truth = bag, truth
        self._keys = [(key, nearest[key]) for key in range(len(truth.key_stamp_ns)) if key in nearest]
        self.name, self.rig, self.lidar2ego = name, bag.rig, truth.lidar2ego
        self.trajectory, self.sweep_stamp_ns = truth.trajectory, bag.sweep_stamp_ns
        self.sweep = bag.sweep
        self.key_stamp_ns = truth.key_stamp_ns[[key for key, _ in self._keys]]

    def frame_set(self, key: int) -> FrameSet:
        """Read the images nearest to one key frame, with the poses that the truth knows."""
        found = self._bag.frame_set(self._keys[key][1])
        frames = {
            name: frame and CameraFrame(name, frame.stamp_ns, frame.image, self.trajectory.at(frame.stamp_ns))
            for name, frame in found.frames.items()
        }
        return FrameSet(int(self.key_stamp_ns[key]), frames, found.missing, found.signals)

    def annotations(self, key: int) -> Annotations | None:
        """Return the boxes of one key frame."""
        return self._truth.annotations(self._keys[key][0])

    def occupancy_truth(self, key: int) -> OccupancyTruth | None:
        """Return the dense labels of one key frame."""
        return self._truth.occupancy_truth(self._keys[key][0])


def key_pose(recording: Recording, key: int) -> Array:
    """Return ego2global (4, 4) at a key stamp: nuScenes has one of its own for it."""
    if isinstance(recording, NuscenesRecording):
        return recording.key_pose(key)
    return recording.trajectory.at(int(recording.key_stamp_ns[key]))


def token_of(recording: Recording, key: int) -> str:
    """Return the nuScenes sample of a key frame, "" of other recordings."""
    return recording.sample_tokens[key] if isinstance(recording, NuscenesRecording) else ""


def read_cached_rig(sample: CachedSample, names: Sequence[str]) -> CameraRig:
    """Return the cameras of one cached sample."""
    height, width = sample.images.shape[1:3]
    return CameraRig(
        tuple(
            Camera(name, width, height, lens.intrinsic, cam2ego, lens.model, lens.coefficients)
            for name, lens, cam2ego in zip(names, map(Lens.from_matrix, sample.intrinsic), sample.cam2ego, strict=True)
        )
    )
