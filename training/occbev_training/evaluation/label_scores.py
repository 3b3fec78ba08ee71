"""Score occupancy and depth against LiDAR-made labels, for drives without manual labels.

Scored are voxels that the label observed and a camera sees; all others do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.config import LiftConfig, ModelConfig
from occbev.geometry import transform_points
from occbev.grid import VoxelGrid
from occbev.inference.tables import bin_depths, depth_scale
from occbev.lens import Lens
from occbev_training.data.cache import CachedSample
from occbev_training.data.pair_samples import PairSamples
from occbev_training.evaluation.frames import Prediction, boxes_of, detection_scores
from occbev_training.metrics.occupancy import (
    RAY_THRESHOLDS,
    RING_EDGES,
    binary_counts,
    binary_iou,
    cast_rays,
    grouped_counts,
    range_rings,
    ring_names,
)
from occbev_training.sources.box_labels import TimedBoxes

HEIGHT_EDGES = (0.2, 1.0, 2.5)
"""Metres above base_link between which heights are scored apart: ground, kerbs and low things, bodies, all above."""

OBSTACLE_HEIGHT = 0.4
"""A return this many metres above base_link is on an obstacle."""

RAY_ORIGIN = (0.0, 0.0, 1.8)
"""Where rays begin, metres in base_link, where the LiDAR's place is not known."""

_HIT, _UNKNOWN, _FREE = 0, 1, 2


@dataclass
class LabelScores:
    """Counts over frames, divided once. prior: (X, Y, Z) bool, the mean grid of a training set, or None."""

    grid: VoxelGrid
    prior: NDArray[np.bool_] | None = None
    frames: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    prior_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    rings: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(RING_EDGES), 3), np.int64))
    heights: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(HEIGHT_EDGES) + 1, 3), np.int64))
    rays: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 + len(RAY_THRESHOLDS), np.int64))
    depth: list[NDArray[np.float64]] = field(default_factory=list)
    obstacle_depth: list[NDArray[np.float64]] = field(default_factory=list)

    def add(
        self,
        sample: CachedSample,
        occupied: NDArray[np.bool_],
        depth: NDArray[np.float64] | None = None,
        stride: int = 1,
        origin: tuple[float, float, float] = RAY_ORIGIN,
    ) -> float:
        """Count one frame; returns its IoU.

        occupied: (X, Y, Z). depth: (N, h, w) metres that the network believes each feature cell to be away.
        """
        scored = (sample.camera_visible != 0) & (sample.state != UNOBSERVED_STATE)
        label = sample.state == OCCUPIED_STATE
        counts = binary_counts(label, occupied, scored)
        self.frames += 1
        self.counts += counts
        self.rings += grouped_counts(label, occupied, range_rings(self.grid), len(RING_EDGES), scored)
        self.heights += grouped_counts(label, occupied, height_bands(self.grid), len(HEIGHT_EDGES) + 1, scored)
        if len(set(self.grid.pitch)) == 1:  # rays are cast through cubes
            self.rays += count_rays(sample.state, occupied, self.grid, origin)
        if self.prior is not None:
            self.prior_counts += binary_counts(label, self.prior, scored)
        if depth is not None:
            every, obstacle = depth_errors(sample, depth, stride)
            self.depth.append(every)
            self.obstacle_depth.append(obstacle)
        return binary_iou(counts)

    def as_record(self) -> dict[str, Any]:
        """Return the scores; what cannot be measured is left out."""
        record: dict[str, Any] = {
            "frames": self.frames,
            "iou": binary_iou(self.counts),
            "iou_by_range": _by_group(ring_names(), self.rings),
            "iou_by_height": _by_group(height_names(), self.heights),
        }
        ray_iou = binary_ray_iou(self.rays)
        if ray_iou:
            record["RayIoU"] = float(np.mean(list(ray_iou.values())))
            record["RayIoU_by_threshold"] = {f"{t:g}": value for t, value in ray_iou.items()}
        if self.prior is not None:
            record["mean_grid_iou"] = binary_iou(self.prior_counts)
        for name, parts in (("depth_error", self.depth), ("obstacle_depth_error", self.obstacle_depth)):
            values = np.concatenate(parts) if parts else np.zeros(0)
            if len(values):
                record[name] = float(np.median(values))
        return record


def height_bands(grid: VoxelGrid) -> NDArray[np.uint8]:
    """Return (X, Y, Z) which band of HEIGHT_EDGES each voxel's centre is in."""
    centre = grid.lo[2] + (np.arange(grid.shape[2]) + 0.5) * grid.pitch[2]
    return np.broadcast_to(np.searchsorted(HEIGHT_EDGES, centre).astype(np.uint8), grid.shape)


def height_names() -> tuple[str, ...]:
    """Return what the bands are called, such as "0.2-1 m"."""
    between = [f"{lo:g}-{hi:g} m" for lo, hi in zip(HEIGHT_EDGES, HEIGHT_EDGES[1:], strict=False)]
    return (f"below {HEIGHT_EDGES[0]:g} m", *between, f"over {HEIGHT_EDGES[-1]:g} m")


def count_rays(
    state: NDArray[np.uint8], occupied: NDArray[np.bool_], grid: VoxelGrid, origin: tuple[float, float, float]
) -> NDArray[np.int64]:
    """Count rays of RayIoU that the label follows through free space to a surface: (true, predicted, right by threshold).

    A ray whose first voxel was not observed does not count.
    """
    truth = np.where(state == OCCUPIED_STATE, _HIT, np.where(state == FREE_STATE, _FREE, _UNKNOWN)).astype(np.uint8)
    guess = np.where(occupied, _HIT, _FREE).astype(np.uint8)
    (met, found), (true_depth, depth) = cast_rays(np.stack([truth, guess]), [origin], grid, _FREE)
    counted = met == _HIT
    hit = found[counted] == _HIT
    away = np.abs(true_depth[counted] - depth[counted])
    right = [np.count_nonzero(hit & (away < limit)) for limit in RAY_THRESHOLDS]
    return np.array([np.count_nonzero(counted), np.count_nonzero(hit), *right], np.int64)


def binary_ray_iou(counts: NDArray[np.int64]) -> dict[float, float]:
    """Return RayIoU by threshold of summed `count_rays`; empty without a ray."""
    true, guessed, right = int(counts[0]), int(counts[1]), counts[2:]
    if not true:
        return {}
    return {t: float(r / (true + guessed - r)) for t, r in zip(RAY_THRESHOLDS, right, strict=True)}


def depth_errors(
    sample: CachedSample, depth: NDArray[np.float64], stride: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return |predicted - true| / true where the nearest return of a feature cell is known: of all cells, of obstacles.

    depth: (N, h, w). Returns beyond what is predicted anywhere (the last depth bin) are left out.
    """
    nearest, height = nearest_returns(sample, depth.shape, stride)
    known = np.isfinite(nearest) & (nearest > 1.0) & (nearest < max(45.0, float(depth.max())))
    error = np.abs(depth - nearest) / np.where(known, nearest, 1.0)
    return error[known], error[known & (height > OBSTACLE_HEIGHT)]


def nearest_returns(
    sample: CachedSample, shape: tuple[int, ...], stride: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return depth and height in base_link of the nearest return in each feature cell (N, h, w); inf without one."""
    nearest, height = np.full(shape, np.inf), np.zeros(shape)
    for index in range(shape[0]):
        chosen = sample.lidar_camera == index
        pixel, depth = sample.lidar_pixel[chosen], sample.lidar_depth[chosen].astype(np.float64)
        rays = Lens.from_matrix(sample.intrinsic[index]).rays(pixel)
        z = transform_points(sample.cam2ego[index], rays * depth[:, None])[:, 2]
        order = np.argsort(-depth)  # the nearest is written last
        column, row = (pixel[order] // stride).astype(int).T
        inside = (row < shape[1]) & (column < shape[2])
        nearest[index, row[inside], column[inside]] = depth[order][inside]
        height[index, row[inside], column[inside]] = z[order][inside]
    return nearest, height


def believed_depth(
    logits: NDArray[np.float32], lift: LiftConfig, intrinsic: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the median (N, h, w) of depth distributions (N, D, h, w), metres; intrinsic: as of `lift_points`."""
    share = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    below = (np.cumsum(share, 1) < 0.5).sum(1).clip(0, logits.shape[1] - 1)
    return np.asarray(bin_depths(lift))[below] * depth_scale(intrinsic, lift)[:, None, None]


def _by_group(names: tuple[str, ...], counts: NDArray[np.int64]) -> Mapping[str, float]:
    return {name: binary_iou(row) for name, row in zip(names, counts, strict=True) if row.sum()}


def box_scores(
    predict: Callable[[int], Prediction], samples: PairSamples, model: ModelConfig, truth: TimedBoxes
) -> dict[str, float]:
    """Return the APs of cars against labelled boxes, over the pairs that have some; empty without boxes on either side."""
    found, meant = [], []
    for index, stamp in enumerate(samples.stamp_ns):
        boxes, annotations = boxes_of(predict(index), model), truth.at(int(stamp))
        if boxes is not None and annotations is not None:
            found.append(boxes)
            meant.append(annotations)
    if not found:
        return {}
    full, near = detection_scores(found, meant)
    return {"car_AP_2m_30m": near.ap["car"][2.0], "car_AP_2m_50m": full.ap["car"][2.0], "mAP_30m": near.mean_ap}
