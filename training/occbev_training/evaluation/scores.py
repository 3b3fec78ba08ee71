"""Scores of a set of frames: kept frame by frame, so that they can be joined, taken apart and drawn anew.

A frame holds what was predicted and what is true of it; what a network does not predict, or nobody knows,
is None and is not scored. Needs neither torch nor numba.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import OCCUPANCY_CLASSES
from occbev.grid import VoxelGrid
from occbev.results import Boxes3D
from occbev_training.metrics.bootstrap import DRAWS, Intervals, bootstrap
from occbev_training.metrics.detection import (
    THRESHOLDS,
    TP_THRESHOLD,
    DetectionOutcome,
    DetectionScores,
    match_detection,
    match_near,
)
from occbev_training.metrics.occupancy import (
    RayScores,
    binary_iou,
    class_ious,
    confusion,
    grouped_counts,
    mean_iou,
    range_rings,
    ray_counts,
    ray_scores,
    require_grid,
    ring_names,
    score_occupied_iou,
)
from occbev_training.sources.recording import Annotations

BOX_RINGS = ((0.0, 10.0), (10.0, 20.0), (20.0, 30.0), (30.0, 40.0), (40.0, 50.0))
"""Metres from the vehicle between which boxes are scored by range."""

SURE = 0.3
"""Score from which on a box counts where single frames are judged."""

VISIBILITY = (
    "one camera",
    "several cameras",
    "LiDAR alone",
    "no sensor",
    "any camera",
    "no camera",
)
"""Who saw a voxel: the last two where it is not known how many cameras or what the LiDAR saw."""


@dataclass(frozen=True)
class OccupancyView:
    """Dense truth of one frame and who saw it.

    semantics: (X, Y, Z) uint8, the last class free. mask_camera: (X, Y, Z) bool. mask_lidar: the same, or None.
    views: (X, Y, Z) uint8, how many images a voxel lies in, or None. origins: (O, 3) of RayIoU in base_link,
    or None.
    """

    semantics: NDArray[np.uint8]
    mask_camera: NDArray[np.bool_]
    grid: VoxelGrid
    mask_lidar: NDArray[np.bool_] | None = None
    views: NDArray[np.uint8] | None = None
    origins: NDArray[np.float32] | None = None

    @property
    def seen_by(self) -> NDArray[np.uint8]:
        """Index into VISIBILITY of every voxel, (X, Y, Z)."""
        seen: Any = 4 if self.views is None else self.views > 1
        unseen: Any = 5 if self.mask_lidar is None else np.where(self.mask_lidar, 2, 3)
        return np.where(self.mask_camera, seen, unseen).astype(np.uint8)


@dataclass(frozen=True)
class OccupancyCounts:
    """Counts of one frame, to be added up.

    confusion: (K, K) over camera-visible voxels. rings: (R, 3) and seen_by: (V, 3) `binary_counts` by range
    of camera-visible voxels and by visibility of all. rays: (2 + T, K) `ray_counts`, or None. has_classes: False
    of networks that say what is occupied but not by what.
    """

    confusion: NDArray[np.int64]
    rings: NDArray[np.int64]
    seen_by: NDArray[np.int64]
    rays: NDArray[np.int64] | None = None
    has_classes: bool = True

    @property
    def iou(self) -> float:
        """IoU of occupied against free in this frame alone."""
        return score_occupied_iou(self.confusion, len(self.confusion) - 1)


@dataclass(frozen=True)
class FrameResult:
    """What was predicted for one frame, beside what is true. Boxes are in base_link at the key time."""

    name: str
    drive: str
    boxes: Boxes3D | None = None
    annotations: Annotations | None = None
    occupancy: OccupancyCounts | None = None


def count_occupancy(
    label: NDArray[np.uint8],
    grid: VoxelGrid,
    truth: OccupancyView,
    classes: int = len(OCCUPANCY_CLASSES),
    has_classes: bool = True,
) -> OccupancyCounts:
    """Compare a predicted label volume (X, Y, Z) with the truth of its frame.

    grid: of the prediction. has_classes: whether it tells classes; without them there are no rays to score.

    Raises:
        GridError: the truth is on another grid.
    """
    require_grid(truth.grid, grid)
    free = classes - 1
    occupied, said = truth.semantics != free, label != free
    rings = grouped_counts(occupied, said, range_rings(truth.grid), len(ring_names()), truth.mask_camera)
    seen_by = grouped_counts(occupied, said, truth.seen_by, len(VISIBILITY))
    rays = None
    if truth.origins is not None and has_classes:
        rays = ray_counts(truth.semantics, label, truth.origins, truth.grid, classes)
    counts = confusion(truth.semantics, label, truth.mask_camera, classes)
    return OccupancyCounts(counts, rings, seen_by, rays, has_classes)


@dataclass(frozen=True)
class Scores:
    """What a set of frames scored. boxes, near_boxes: matches over the classes' own ranges, and of near
    and well-measured truths; None where no boxes are predicted or known. occupancy: one entry a frame,
    None where a frame has no dense truth.
    """

    drives: tuple[str, ...]
    names: tuple[str, ...]
    boxes: DetectionOutcome | None = None
    near_boxes: DetectionOutcome | None = None
    occupancy: tuple[OccupancyCounts | None, ...] = ()
    occupancy_classes: tuple[str, ...] = OCCUPANCY_CLASSES

    @classmethod
    def of(cls, frames: Sequence[FrameResult], occupancy_classes: Sequence[str] = OCCUPANCY_CLASSES) -> Scores:
        """Score frames; boxes only if all have them, occupancy of those that have it."""
        found = [frame.boxes for frame in frames if frame.boxes is not None]
        meant = [frame.annotations for frame in frames if frame.annotations is not None]
        boxes = near = None
        if len(found) == len(meant) == len(frames) and frames:
            boxes = match_detection(found, meant)
            near = match_near(found, meant)
        return cls(
            tuple(frame.drive for frame in frames),
            tuple(frame.name for frame in frames),
            boxes,
            near,
            tuple(frame.occupancy for frame in frames),
            tuple(occupancy_classes),
        )

    @functools.cached_property
    def full(self) -> DetectionScores:
        """Scores of boxes over the classes' own ranges; only where boxes were scored."""
        assert self.boxes is not None
        return self.boxes.scores()

    @functools.cached_property
    def near(self) -> DetectionScores:
        """Scores of boxes within NEAR_RANGE and with NEAR_POINTS returns; only where boxes were scored."""
        assert self.near_boxes is not None
        return self.near_boxes.scores()

    @functools.cached_property
    def scored_voxels(self) -> tuple[tuple[int, OccupancyCounts], ...]:
        """Index and counts of the frames that have dense truth."""
        return tuple((i, c) for i, c in enumerate(self.occupancy) if c is not None)

    @property
    def has_classes(self) -> bool:
        """Whether the scored voxels tell classes: without, there is an IoU of occupied against free alone."""
        return all(counts.has_classes for _, counts in self.scored_voxels)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(K, K) confusion over the camera-visible voxels of all frames."""
        return np.sum([counts.confusion for _, counts in self.scored_voxels], axis=0)

    @property
    def rays(self) -> RayScores | None:
        """RayIoU, where it is known of every frame where the LiDAR was."""
        return self._rays_of(np.ones(len(self.names), np.int64))

    @property
    def measured(self) -> tuple[str, ...]:
        """What was scored, in words."""
        parts = {
            "boxes": self.boxes is not None,
            "occupancy": bool(self.scored_voxels),
            "rays": self.rays is not None,
        }
        return tuple(name for name, there in parts.items() if there)

    def summary(self) -> dict[str, float]:
        """The headline numbers of what was scored."""
        numbers: dict[str, float] = {}
        if self.boxes is not None:
            numbers |= _box_numbers(self.full, self.near)
        if self.scored_voxels:
            numbers |= self._occupancy_numbers(np.ones(len(self.names), np.int64))
        return numbers

    def intervals(self, draws: int = DRAWS, seed: int = 0) -> Intervals | None:
        """Return confidence intervals of the headline numbers by drawing drives anew."""
        return bootstrap(self._draw, self.drives, draws, seed=seed) if self.measured else None

    def as_record(self) -> dict[str, Any]:
        """Everything as plain values; what is undefined is None."""
        record: dict[str, Any] = {"summary": self.summary(), "measured": list(self.measured)}
        if self.boxes is not None:
            record["detection"] = self.full.as_record()
            record["detection_30m"] = self.near.as_record()
            record["detection_by_range"] = _by_range(self.boxes)
        if self.scored_voxels:
            record["occupancy"] = self._occupancy_record()
        return record

    def _draw(self, times: NDArray[np.int64]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        if self.boxes is not None and self.near_boxes is not None:
            drawn = (part.scores_resampled(times) for part in (self.boxes, self.near_boxes))
            numbers |= _box_numbers(*drawn)
        if self.scored_voxels:
            numbers |= self._occupancy_numbers(times)
        return numbers

    def _occupancy_numbers(self, times: NDArray[np.int64]) -> dict[str, float]:
        free = len(self.occupancy_classes) - 1
        index = [i for i, _ in self.scored_voxels]
        counts = np.tensordot(times[index], np.stack([c.confusion for _, c in self.scored_voxels]), 1)
        numbers = {"occupancy_iou": score_occupied_iou(counts, free)}
        if self.has_classes:
            numbers["occupancy_miou"] = mean_iou(counts, free)
        rays = self._rays_of(times)
        return numbers if rays is None else {**numbers, "RayIoU": rays.ray_iou}

    def _rays_of(self, times: NDArray[np.int64]) -> RayScores | None:
        known = [(i, c.rays) for i, c in self.scored_voxels if c.rays is not None]
        if not known or len(known) < len(self.scored_voxels):
            return None
        rays = np.stack([counts for _, counts in known])
        return ray_scores(np.tensordot(times[[i for i, _ in known]], rays, 1))

    def _occupancy_record(self) -> dict[str, Any]:
        free = len(self.occupancy_classes) - 1
        rings = np.sum([c.rings for _, c in self.scored_voxels], axis=0)
        seen_by = np.sum([c.seen_by for _, c in self.scored_voxels], axis=0)
        ious = class_ious(self.counts)
        record = {
            "iou": score_occupied_iou(self.counts, free),
            "mIoU": mean_iou(self.counts, free) if self.has_classes else None,
            "class_iou": _drop_unknown(dict(zip(self.occupancy_classes, ious, strict=True)))
            if self.has_classes
            else {},
            "iou_by_range": _ious(ring_names(), rings),
            "iou_by_visibility": _ious(VISIBILITY, seen_by),
        }
        if self.rays is not None:
            by = self.rays.by_threshold
            names = self.occupancy_classes[:-1]
            of_class = dict(zip(names, self.rays.class_iou.mean(0), strict=True))
            record["RayIoU"] = self.rays.ray_iou
            record["RayIoU_by_threshold"] = {f"{t:g}": v for t, v in by.items()}
            record["class_RayIoU"] = _drop_unknown(of_class)
        return record


def found_share(boxes: Boxes3D, annotations: Annotations) -> float:
    """Return the F1 of one frame: boxes of a score over SURE against truths with a return, within 2 m.

    NaN where there is nothing to find and nothing was found.
    """
    sure = boxes[boxes.score >= SURE]
    scores = match_detection([sure], [annotations])
    hits = wrong = missed = 0
    for outcome in scores.classes.values():
        truth = outcome.matches.truth[THRESHOLDS.index(TP_THRESHOLD)]
        right = int(np.count_nonzero(truth >= 0))
        hits, wrong = hits + right, wrong + int(np.count_nonzero(truth == -1))
        missed += int(outcome.matches.positives.sum()) - right
    count = 2 * hits + wrong + missed
    return 2 * hits / count if count else float("nan")


def _box_numbers(full: DetectionScores, near: DetectionScores) -> dict[str, float]:
    return {
        "car_AP_2m_30m": near.ap["car"][2.0],
        "car_AP_2m_50m": full.ap["car"][2.0],
        "mAP": full.mean_ap,
        "mAP_30m": near.mean_ap,
        "NDS": full.nds,
    }


def _by_range(outcome: DetectionOutcome) -> dict[str, Any]:
    """Ring -> scores of the boxes in it; rings beyond a class's range hold none of it."""
    rings = {}
    for lo, hi in BOX_RINGS:
        scores = outcome.scores_within(lo, hi)
        record = scores.as_record()
        del record["precision"]
        present = scores.mean_ap_of_present  # a ring need not hold every class
        record["mAP"] = None if np.isnan(present) else present
        rings[f"{lo:g}-{hi:g} m"] = record
    return rings


def _ious(names: Sequence[str], counts: NDArray[np.int64]) -> dict[str, Any]:
    """Name -> IoU and how many voxels are occupied in truth, of groups that hold something."""
    return {
        name: {"iou": binary_iou(row), "occupied_voxels": int(row[0] + row[1])}
        for name, row in zip(names, counts, strict=True)
        if row.sum()
    }


def _drop_unknown(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(v) if np.isfinite(v) else None for name, v in values.items()}
