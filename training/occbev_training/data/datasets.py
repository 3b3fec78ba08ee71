"""Batches for the trainer: cached samples, augmented, with their geometry and targets, in a repeatable order.

The order and every augmentation follow from (seed, position) alone, so a position is all that resuming needs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from occbev.allocator import keep_large_blocks
from occbev.config import ModelConfig
from occbev.ego_signals import EgoSignals
from occbev.geometry import (
    box_corners,
    transform_points,
)
from occbev.inference.tables import Augmentation, depth_scale
from occbev.lens import Lens
from occbev_training.data.augment import (
    AugmentConfig,
    Draw,
    augment_boxes,
    augment_cam2ego,
    augment_ego2global,
    augment_images,
    augment_intrinsic,
    augment_signals,
    augmentation_of,
    draw_augmentation,
    grid_mask_image,
)
from occbev_training.data.cache import CachedSample, CacheError, Moment
from occbev_training.data.label_frame import boxes_in_frame, in_base_link
from occbev_training.data.reference_inputs import depth_to_bin
from occbev_training.data.samples import Samples
from occbev_training.data.targets import nearest_depth, voxel_targets
from occbev_training.data.windows import history_length, past_indices
from occbev_training.metrics.occupancy import describe_grid
from occbev_training.models.families import make_geometry, training_family
from occbev_training.models.geometry import Geometry
from occbev_training.models.history import History, MotionTables, PastFrames, View
from occbev_training.models.lift_splat.stereo import Matching

SEMANTIC_VOXELS = 60_000
"""Voxels per sample whose semantics are supervised, drawn from those that the cameras see."""

NO_DEPTH = -1
"""Depth label of a feature cell without a LiDAR return in range."""


@dataclass(frozen=True)
class TrainingSample:
    """One augmented sample; geometry as in `CachedSample`.

    depth_bin: (N, h, w) int64, NO_DEPTH where unknown. evidence: sweeps that hit or passed each voxel.
    visible: (X, Y, Z) bool, seen by a living camera. boxes, labels: those that are to be found.
    semantics_mask: (X, Y, Z) bool, voxels whose semantics are supervised.
    shown: (h, w) bool, pixels that a grid mask leaves, or None without one.
    ego2global: (4, 4), changed with the scene; None where no past is asked for. signals: of the vehicle's own motion,
        see `View`. past: newest first, None before the drive begins.
    """

    name: str
    images: NDArray[np.uint8]
    camera_valid: NDArray[np.bool_]
    intrinsic: NDArray[np.float64]
    cam2ego: NDArray[np.float64]
    depth_bin: NDArray[np.int64]
    state: NDArray[np.uint8]
    visible: NDArray[np.bool_]
    evidence: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    semantics: NDArray[np.uint8]
    semantics_mask: NDArray[np.bool_]
    shown: NDArray[np.bool_] | None = None
    ego2global: NDArray[np.float64] | None = None
    stamp_ns: int = 0
    augmentation: Augmentation | None = None
    signals: EgoSignals | None = None
    past: tuple[View | None, ...] = ()

    @property
    def view(self) -> View:
        """What the cameras saw of it."""
        seen = (self.images, self.camera_valid, self.intrinsic, self.cam2ego)
        return View(*seen, self.ego2global, self.stamp_ns, self.augmentation, self.signals)


@dataclass(frozen=True)
class TrainingBatch:
    """B samples as tensors; volumes are (B, Z, Y, X), images (B, N, 3, h, w) uint8.

    geometry: what the network's view transform takes. boxes, labels: one (M, 9) and (M,) tensor per sample.
    shown: (B, h, w) bool, or None where all pixels are. past, motion: what a network with a memory is shown
    first; Lift-Splat newest first, a BEVFormer oldest first, with how it came from frame to frame.
    """

    names: tuple[str, ...]
    images: Tensor
    camera_valid: Tensor
    geometry: Geometry
    depth_bin: Tensor
    state: Tensor
    visible: Tensor
    evidence: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    semantics: Tensor
    semantics_mask: Tensor
    shown: Tensor | None = None
    past: tuple[PastFrames, ...] = ()
    motion: MotionTables | Matching | None = None

    def to(self, device: torch.device) -> TrainingBatch:
        """Move every tensor, and lay volumes out as networks do, which a device does faster than a loader."""
        moved = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return TrainingBatch(**moved | {name: moved[name].contiguous() for name in VOLUMES})


VOLUMES = ("state", "visible", "evidence", "semantics", "semantics_mask")
"""Fields of a batch that are (B, Z, Y, X)."""


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_move(v, device) for v in value)
    return value.to(device) if hasattr(value, "to") else value


class SampleDataset(Dataset[TrainingSample]):
    """Positions -> augmented samples. A position is a place in the endless order of `sample_of`."""

    def __init__(
        self,
        cache: Samples,
        model: ModelConfig,
        augment: AugmentConfig,
        seed: int,
        order: Sequence[int] | None = None,
        history: int = -1,
        unseen_voxels: int = 0,
        past_after: int = 0,
    ) -> None:
        """order: samples of one epoch before they are shuffled; by default every sample once.

        history, unseen_voxels, past_after: as in `TrainingConfig`.

        Raises CacheError if the cache was made for another input size or voxel grid.
        """
        info = cache.info
        if (info.image.width, info.image.height) != (model.image.width, model.image.height):
            raise CacheError(
                f"{cache.root}: images are {info.image.width}x{info.image.height}, "
                f"{model.name} takes {model.image.width}x{model.image.height}"
            )
        wanted = in_base_link(model).grid  # labels always are
        if info.grid != wanted:
            raise CacheError(
                f"{cache.root}: labels are on {describe_grid(info.grid)}, {model.name} predicts {describe_grid(wanted)}; "
                "make them on its grid: 'occbev-train prepare --model', 'occbev-train pairs --grid'"
            )
        if any(abs(lo + hi) > 1e-6 for lo, hi in zip(info.grid.lo[:2], info.grid.hi[:2], strict=True)):
            raise CacheError(f"grid {info.grid.as_record()} is not centred on the ego: it cannot be flipped")
        self.cache, self.model, self.augment, self.seed = cache, model, augment, seed
        self.order = None if order is None else np.asarray(order)
        self.history = history_length(model, history)
        self.unseen_voxels, self.past_after = unseen_voxels, past_after

    def __len__(self) -> int:
        """Return the samples of an epoch."""
        return len(self.cache) if self.order is None else len(self.order)

    def __getitem__(self, position: int) -> TrainingSample:
        index = sample_of(position, len(self), self.seed)
        if self.order is not None:
            index = int(self.order[index])
        size = (self.model.image.width, self.model.image.height)
        seed = int(np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)[0] >> 1)
        cached = self.cache[index]
        draw = draw_augmentation(seed, len(cached.images), size, self.augment)
        sample = augmented(self.cache.name(index), cached, draw, self.model, self.unseen_voxels)
        sample = with_past(sample, self.cache, index, draw, self.model, self.history)
        return hide_past(sample) if position < self.past_after * len(self) else sample


class PositionBatches(Sampler[list[int]]):
    """Lists of positions for forward pass `first`, `first` + 1, ...; process `rank` of `world` takes its share."""

    def __init__(self, batch: int, first: int = 0, rank: int = 0, world: int = 1) -> None:
        self._batch, self._first, self._rank, self._world = batch, first, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        step = self._first
        while True:
            begin = (step * self._world + self._rank) * self._batch
            yield list(range(begin, begin + self._batch))
            step += 1


def sample_of(position: int, samples: int, seed: int) -> int:
    """Return which sample stands at a position: every epoch is a permutation of its own."""
    epoch, place = divmod(position, samples)
    return int(np.random.default_rng([seed, epoch]).permutation(samples)[place])


def batches(
    dataset: SampleDataset, batch: int, workers: int, first: int = 0, rank: int = 0, world: int = 1
) -> DataLoader[TrainingSample]:
    """Return an endless loader that begins with forward pass `first`."""
    # Workers start afresh: a fork of a process in which runtimes hold threads and locks can crash.
    return DataLoader(
        dataset,
        batch_sampler=PositionBatches(batch, first, rank, world),
        num_workers=workers,
        collate_fn=Collate(dataset.model),
        prefetch_factor=3 if workers else None,
        worker_init_fn=_begin_worker,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # else it takes a number from dropout's: a resumed run would differ
    )


@dataclass(frozen=True)
class Collate:
    """Joins samples into a batch, with one table over all of them."""

    model: ModelConfig

    def __call__(self, samples: Sequence[TrainingSample]) -> TrainingBatch:
        """Stack; volumes go from [x, y, z] to (Z, Y, X). A rig with fewer cameras than others gets black ones."""
        samples = _same_cameras(samples)
        valid = np.stack([s.camera_valid for s in samples])
        changes = [s.augmentation for s in samples]
        rigs = [s.intrinsic for s in samples], [s.cam2ego for s in samples]
        geometry = make_geometry(self.model, *rigs, valid, changes)
        history, windows = History((), None, geometry), [s.past for s in samples]
        if windows[0]:
            keys = [s.view for s in samples]
            history = training_family(self.model).history(self.model, windows, keys, geometry)
        return TrainingBatch(
            names=tuple(s.name for s in samples),
            images=torch.from_numpy(np.stack([s.images for s in samples])).permute(0, 1, 4, 2, 3),
            camera_valid=torch.from_numpy(valid).float(),
            geometry=history.geometry,
            depth_bin=torch.from_numpy(np.stack([s.depth_bin for s in samples])),
            state=_volumes([s.state for s in samples]),
            visible=_volumes([s.visible for s in samples]),
            evidence=_volumes([s.evidence for s in samples]),
            boxes=tuple(torch.from_numpy(s.boxes) for s in samples),
            labels=tuple(torch.from_numpy(s.labels) for s in samples),
            semantics=_volumes([s.semantics for s in samples]),
            semantics_mask=_volumes([s.semantics_mask for s in samples]),
            shown=_choose_order(samples),
            past=history.past,
            motion=history.motion,
        )


def augmented(
    name: str, sample: CachedSample, draw: Draw, model: ModelConfig, unseen_voxels: int = 0
) -> TrainingSample:
    """Apply one draw to everything a sample holds; unseen_voxels: as in `TrainingConfig`."""
    alive = draw.alive & sample.camera_valid
    intrinsic = augment_intrinsic(sample.intrinsic, draw)
    cam2ego = augment_cam2ego(sample.cam2ego, draw)
    boxes = augment_boxes(sample.boxes, draw).astype(np.float32)
    wanted = (sample.lidar_points > 0) & in_any_image(boxes, intrinsic, cam2ego, alive, model)
    voxels = voxel_targets(sample, draw, alive, model.grid, SEMANTIC_VOXELS, unseen_voxels)
    size = (model.image.width, model.image.height)
    return TrainingSample(
        name,
        augment_images(sample.images, draw),
        alive,
        intrinsic,
        cam2ego,
        depth_labels(sample, draw, alive, model),
        voxels.state,
        voxels.visible,
        voxels.evidence,
        boxes_in_frame(boxes[wanted], model.bev.frame),
        sample.labels[wanted],
        voxels.semantics,
        voxels.semantics_mask,
        None if draw.grid_mask is None else grid_mask_image(draw.grid_mask, size),
        augmentation=augmentation_of(draw),
    )


def with_past(
    sample: TrainingSample, samples: Samples, index: int, draw: Draw, model: ModelConfig, length: int, vary: bool = True
) -> TrainingSample:
    """Add the past frames of a sample, which share its draw; vary: as in `past_indices`, by the draw's seed."""
    if length == 0:
        return sample
    rng = np.random.default_rng(draw.seed + 2) if vary and training_family(model).skips_frames else None
    chosen = past_indices(samples, index, length, rng)
    past = tuple(None if i is None else _past_view(samples[i], draw, samples.moment(i)) for i in chosen)
    moment = samples.moment(index)
    return replace(
        sample,
        ego2global=augment_ego2global(moment.ego2global, draw),
        stamp_ns=moment.stamp_ns,
        signals=augment_signals(moment.signals, draw),
        past=past,
    )


def hide_past(sample: TrainingSample) -> TrainingSample:
    """Let no camera see the past frames of a sample."""
    unseen = np.zeros_like(sample.camera_valid)
    return replace(sample, past=tuple(replace(view or sample.view, camera_valid=unseen) for view in sample.past))


def _past_view(sample: CachedSample, draw: Draw, moment: Moment) -> View:
    return View(
        augment_images(sample.images, draw),
        draw.alive & sample.camera_valid,
        augment_intrinsic(sample.intrinsic, draw),
        augment_cam2ego(sample.cam2ego, draw),
        augment_ego2global(moment.ego2global, draw),
        moment.stamp_ns,
        augmentation_of(draw),
        augment_signals(moment.signals, draw),
    )


def depth_labels(sample: CachedSample, draw: Draw, alive: NDArray[np.bool_], model: ModelConfig) -> NDArray[np.int64]:
    """Return the depth bin of the nearest return in each stride x stride patch, (N, h, w), or NO_DEPTH.

    Of a network that predicts no depth there are none: (N, 0, 0).
    """
    lift = training_family(model).lift(model)
    if lift is None:
        return np.zeros((len(alive), 0, 0), np.int64)
    stride = lift.stride
    shape = (len(alive), model.image.height // stride, model.image.width // stride)
    scale = depth_scale(augment_intrinsic(sample.intrinsic, draw), lift)
    matrices = np.stack([image.matrix for image in draw.images])
    returns = (sample.lidar_camera, sample.lidar_pixel, sample.lidar_depth)
    nearest = nearest_depth(*returns, matrices, scale, alive, shape, stride)
    return depth_to_bin(nearest, lift.depth)


def in_any_image(
    boxes: NDArray[np.float32],
    intrinsic: NDArray[np.float64],
    cam2ego: NDArray[np.float64],
    alive: NDArray[np.bool_],
    model: ModelConfig,
) -> NDArray[np.bool_]:
    """Return which of (M, 9) boxes have their centre or a corner in the image of a living camera."""
    points = np.concatenate([box_corners(boxes[:, :7]), boxes[:, None, :3]], 1)  # (M, 9, 3)
    seen = np.zeros(len(boxes), bool)
    ego2cam = np.linalg.inv(cam2ego)  # a mirrored pose is no rotation, so it is inverted in full
    for index in np.flatnonzero(alive):
        pixel, depth = Lens.from_matrix(intrinsic[index]).see(transform_points(ego2cam[index], points.reshape(-1, 3)))
        inside = np.all((pixel >= 0) & (pixel < (model.image.width, model.image.height)), axis=-1)
        seen |= np.any((inside & (depth > 0.1)).reshape(len(boxes), 9), axis=1)
    return seen


def _same_cameras(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    most = max(len(s.images) for s in samples)
    return [s if len(s.images) == most else _pad(s, most) for s in samples]


def _pad(sample: TrainingSample, cameras: int) -> TrainingSample:
    """Add cameras that see nothing; what they would be calibrated to does not matter."""
    names = ("images", "camera_valid", "intrinsic", "cam2ego")
    past = tuple(
        view and replace(view, **_grown(view, names, cameras), augmentation=_padded(view.augmentation, cameras))
        for view in sample.past
    )
    depth = np.pad(
        sample.depth_bin,
        ((0, cameras - len(sample.images)), (0, 0), (0, 0)),
        constant_values=NO_DEPTH,
    )
    change = _padded(sample.augmentation, cameras)
    return replace(sample, **_grown(sample, names, cameras), depth_bin=depth, past=past, augmentation=change)


def _padded(change: Augmentation | None, cameras: int) -> Augmentation | None:
    if change is None:
        return None
    image = np.concatenate([change.image, np.tile(np.eye(3), (cameras - len(change.image), 1, 1))])
    return replace(change, image=image)


def _grown(record: Any, names: Sequence[str], cameras: int) -> dict[str, Any]:
    """Repeat the first camera's calibration, with a black image that is not valid."""
    out = {}
    for name in names:
        value = getattr(record, name)
        missing = np.repeat(value[:1], cameras - len(value), 0)
        if name in ("images", "camera_valid"):
            missing = np.zeros_like(missing)
        out[name] = np.concatenate([value, missing])
    return out


def _choose_order(samples: Sequence[TrainingSample]) -> Tensor | None:
    if all(s.shown is None for s in samples):
        return None
    whole = np.ones(samples[0].images.shape[1:3], bool)
    return torch.from_numpy(np.stack([whole if s.shown is None else s.shown for s in samples]))


def _volumes(arrays: Sequence[NDArray[np.generic]]) -> Tensor:
    """Stack [x, y, z] arrays as (B, Z, Y, X); they lie in memory as they were, see `TrainingBatch.to`."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 2, 1)


def _begin_worker(_: int) -> None:
    """Compute in one thread, and leave Ctrl-C to the trainer, which then asks for no more batches."""
    import cv2

    keep_large_blocks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
