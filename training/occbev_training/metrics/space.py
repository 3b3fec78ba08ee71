"""Whether blocked, free and unknown cells of a ground grid are what is true: shares of obstacles and of free ground.

A cell is an obstacle where a camera sees something between the grid's two heights above the true ground, free
where a camera sees ground with nothing above it, and unseen where a camera sees no voxel of its column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, GROUND_CLASSES, OCCUPANCY_CLASSES, OCCUPIED_STATE
from occbev.grid import VoxelGrid, volume_from_xyz
from occbev.inference.ground_grid import GroundGridConfig, band_layers, ground_layer
from occbev.inference.space_calibration import RING_EDGES, SCORES
from occbev.results import BLOCKED_CELL, FREE_CELL, UNKNOWN_CELL, VoxelEvidence

Bools = NDArray[np.bool_]

RADIUS = 20.0
"""Metres from base_link within which grids are scored."""

_GROUND = [OCCUPANCY_CLASSES.index(name) for name in GROUND_CLASSES]


@dataclass(frozen=True)
class SpaceTruth:
    """What is true of one frame.

    obstacle, free, unseen: (Y, X), see above; unseen is None where nobody knows what cameras see.
    occupied, known: (Z, Y, X), which voxels are occupied, and of which that is known and a camera sees them.
    """

    obstacle: Bools
    free: Bools
    unseen: Bools | None
    occupied: Bools
    known: Bools


def truth_of_classes(
    semantics: NDArray[np.uint8], mask_camera: Bools, grid: VoxelGrid, config: GroundGridConfig
) -> SpaceTruth:
    """Take the truth from dense classes and from what cameras see, both (X, Y, Z)."""
    label, seen = volume_from_xyz(semantics), volume_from_xyz(mask_camera)
    ground = np.isin(label, _GROUND)
    layer = _nearest_ground(ground)
    obstacle, free = _columns((label != FREE) & ~ground, ground, seen, layer, grid, config)
    return SpaceTruth(obstacle, free, ~np.any(seen, axis=0), label != FREE, seen)


def truth_of_states(state: NDArray[np.uint8], visible: Bools, grid: VoxelGrid, config: GroundGridConfig) -> SpaceTruth:
    """Take the truth from a LiDAR's three-state label and from where it can be seen, both (X, Y, Z).

    Ground is the fullest layer around; where the LiDAR saw nothing, nothing is known.
    """
    occupied, seen = volume_from_xyz(state) == OCCUPIED_STATE, volume_from_xyz(visible)
    layer = ground_layer(VoxelEvidence(np.ascontiguousarray(occupied, np.float32)[None, None]), grid)
    ground = occupied & (np.abs(np.arange(len(occupied))[:, None, None] - layer) <= 0)
    obstacle, free = _columns(occupied & ~ground, ground, seen, layer, grid, config)
    return SpaceTruth(obstacle, free, None, occupied, seen & (volume_from_xyz(state) > 0))


def _columns(
    things: Bools, ground: Bools, seen: Bools, layer: NDArray[np.intp], grid: VoxelGrid, config: GroundGridConfig
) -> tuple[Bools, Bools]:
    first, last = band_layers(grid, config)
    above = np.arange(len(things))[:, None, None] - layer
    things = things & (above >= first) & (above <= last)
    return np.any(things & seen, axis=0), np.any(ground & seen, axis=0) & ~np.any(things, axis=0)


def _nearest_ground(ground: Bools) -> NDArray[np.intp]:
    """Return the layer of the uppermost ground of every column, or of the nearest one that has ground."""
    from scipy.ndimage import distance_transform_edt

    known = ground.any(0)
    if not known.any():
        raise ValueError("no voxel of the truth is ground, so that heights above it mean nothing")
    layer = len(ground) - 1 - np.argmax(ground[::-1], axis=0)
    row, column = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return np.asarray(layer[row, column], np.intp)


@dataclass(frozen=True)
class SpaceCounts:
    """Cells of some frames within `RADIUS`: how many are there, and how many of them were published how."""

    obstacles: int = 0
    obstacles_free: int = 0
    obstacles_blocked: int = 0
    free_ground: int = 0
    free_ground_free: int = 0
    free_ground_blocked: int = 0
    unseen: int = 0
    unseen_unknown: int = 0
    unseen_free: int = 0
    in_no_image: int = 0
    in_no_image_unknown: int = 0

    @classmethod
    def of(cls, cells: NDArray[np.int8], truth: SpaceTruth, in_image: Bools, near: Bools) -> SpaceCounts:
        """Count one frame; all (Y, X). in_image: cells that lie in some image. near: cells that count."""
        free, blocked, unknown = (cells == value for value in (FREE_CELL, BLOCKED_CELL, UNKNOWN_CELL))
        obstacle, ground, outside = truth.obstacle & near, truth.free & near, ~in_image & near
        unseen = np.zeros_like(near) if truth.unseen is None else truth.unseen & near
        masks = (
            *(obstacle, obstacle & free, obstacle & blocked),
            *(ground, ground & free, ground & blocked),
            *(unseen, unseen & unknown, unseen & free, outside, outside & unknown),
        )
        return cls(*(int(np.count_nonzero(mask)) for mask in masks))

    def __add__(self, other: SpaceCounts) -> SpaceCounts:
        return SpaceCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def as_record(self) -> dict[str, float | int | None]:
        """Shares as plain values, None of what is not there."""

        def share(part: int, of: int) -> float | None:
            return round(part / of, 4) if of else None

        return {
            "obstacles_published_free": share(self.obstacles_free, self.obstacles),
            "obstacles_published_blocked": share(self.obstacles_blocked, self.obstacles),
            "free_ground_published_blocked": share(self.free_ground_blocked, self.free_ground),
            "free_ground_published_free": share(self.free_ground_free, self.free_ground),
            "unseen_published_unknown": share(self.unseen_unknown, self.unseen),
            "unseen_published_free": share(self.unseen_free, self.unseen),
            "in_no_image_published_unknown": share(self.in_no_image_unknown, self.in_no_image),
            "obstacle_cells": self.obstacles,
            "free_ground_cells": self.free_ground,
            "unseen_cells": self.unseen,
        }


def cells_within(grid: VoxelGrid, radius: float = RADIUS) -> Bools:
    """Return the cells (Y, X) whose centre lies within a distance of base_link."""
    x, y = (
        lo + pitch * (np.arange(n) + 0.5) for lo, pitch, n in zip(grid.lo, grid.pitch, grid.shape[:2], strict=False)
    )
    return np.asarray(np.hypot(x, y[:, None]) < radius)


class CurveFit:
    """Adds up, by ring, how often things are true at each score of `SCORES`."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, len(RING_EDGES), len(SCORES)))  # false, true

    def add(self, score: NDArray[np.float32], true: Bools, ring: NDArray[np.intp]) -> None:
        """Count some scores, all (M,)."""
        step = np.ceil(score.astype(np.float64) * (len(SCORES) - 1)).astype(np.intp)
        place = (true * len(RING_EDGES) + ring) * len(SCORES) + step
        self.counts += np.bincount(place, minlength=self.counts.size).reshape(self.counts.shape)

    def __add__(self, other: CurveFit) -> CurveFit:
        total = CurveFit()
        total.counts = self.counts + other.counts
        return total

    def rising(self) -> NDArray[np.float64]:
        """Return how often things are true (R, 65), by isotonic regression; an empty ring takes all rings together."""
        rings = self.counts.swapaxes(0, 1)  # (R, 2, 65)
        curves = [_isotonic(*(part if part.any() else self.counts.sum(1))) for part in rings]
        return np.stack(curves)

    def calibration_error(self, curves: NDArray[np.float64] | None = None) -> float:
        """Return the expected calibration error of the scores, or of what `curves` (R, 65) make of them."""
        said = np.broadcast_to(SCORES, self.counts.shape[1:]) if curves is None else curves
        bins = np.minimum((said * 15).astype(np.intp), 14).ravel()
        total, true = self.counts.sum(0).ravel(), self.counts[1].ravel()
        parts = (np.bincount(bins, weights, 15) for weights in (total * said.ravel(), true))
        said_sum, true_sum = parts
        return float(np.abs(said_sum - true_sum).sum() / max(total.sum(), 1))

    def reliability(self, ring: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return how often things are true at each score of a ring (65,), NaN where nothing was counted, and counts."""
        false, true = self.counts[:, ring]
        total = false + true
        return np.divide(true, total, out=np.full(len(SCORES), np.nan), where=total > 0), total


def _isotonic(false: NDArray[np.float64], true: NDArray[np.float64]) -> NDArray[np.float64]:
    total = false + true
    if not total.any():
        return SCORES
    used = np.flatnonzero(total)
    ones, all_ = (np.append(0, np.cumsum(part[used])) for part in (true, total))
    first, last = np.triu_indices(len(used))
    mean = np.full((len(used), len(used)), np.inf)
    mean[first, last] = (ones[last + 1] - ones[first]) / (all_[last + 1] - all_[first])
    # The rising curve nearest to the shares: the highest over starts of the lowest mean over ends (min-max formula).
    lowest = np.minimum.accumulate(mean[:, ::-1], axis=1)[:, ::-1]
    fitted = np.array([lowest[: k + 1, k].max() for k in range(len(used))])
    return np.interp(SCORES, SCORES[used], fitted)


def missed_curves(
    scores: Sequence[NDArray[np.float32]], rings: Sequence[NDArray[np.intp]], could_be_free: Sequence[Bools]
) -> NDArray[np.float64]:
    """Return the share of visible obstacles (R, 65) that are free if columns up to each score are.

    scores, rings: of the obstacle cells of each frame. could_be_free: whether a camera is taken to see their ground.
    """
    score, ring, may = (np.concatenate(parts) for parts in (scores, rings, could_be_free))
    curves = np.zeros((len(RING_EDGES), len(SCORES)))
    for number in range(len(RING_EDGES)):
        here = ring == number if (ring == number).any() else np.ones(len(ring), bool)
        ordered = np.sort(score[here & may])
        curves[number] = np.searchsorted(ordered, SCORES, side="right") / max(1, int(np.count_nonzero(here)))
    return curves
