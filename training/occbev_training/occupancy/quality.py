"""Quality of labels: measures Q1 to Q9 without a truth, and the comparison with a truth where there is one.

Each measure is a number with a limit; the limits gate what enters a training set.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from occbev.classes import FREE, FREE_STATE, OCCUPIED_STATE
from occbev.geometry import invert_transform, transform_points
from occbev.grid import VoxelGrid
from occbev.results import FrameSet, Sweep
from occbev_training.occupancy.labels import (
    Decision,
    Examined,
    LabelBuilder,
    OccupancyLabel,
    Window,
)
from occbev_training.occupancy.rays import beams_through
from occbev_training.sources.deskew import EgoBox
from occbev_training.sources.recording import OccupancyTruth, Recording

RANGE_RINGS = (10.0, 20.0, 30.0, 40.0)
"""Outer radii of the rings in which the observed share is reported (Q3)."""

_RING_NAMES = tuple(f"q3_observed_{int(radius)}m" for radius in RANGE_RINGS)
_CUBE = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Limit:
    """A bound on one measure, and what it means when it is broken."""

    name: str
    text: str
    at_least: float = -np.inf
    at_most: float = np.inf

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound; a value that could not be measured (NaN) does."""
        return bool(np.isnan(value) or self.at_least <= value <= self.at_most)


LIMITS: tuple[Limit, ...] = (
    Limit("q1_ends_in_occupied", "returns of a held-out sweep in or next to occupied", at_least=0.90),
    Limit("q1_through_occupied", "beams of a held-out sweep through occupied", at_most=0.18),
    Limit("q2_self_carve", "hit cells that one sweep alone would remove", at_most=0.04),
    Limit(
        "q3_observed_drop",
        "largest loss of observed share in a ring against the drive",
        at_most=0.30,
    ),
    Limit("q4_temporal_iou", "occupied cells that agree with the next key frame", at_least=0.85),
    Limit("q5_ground_thickness", "spread of ground returns in a column over sweeps, m", at_most=0.15),
    Limit(
        "q6_camera_alignment",
        "share of the drive's cameras that their images do not contradict",
        at_least=1.0,
    ),
    Limit("q7_ego_leak", "occupied cells inside the vehicle", at_most=0),
    Limit("q8_border_ratio", "occupied cells on a border plane against the plane within", at_most=2.0),
    Limit("q9_deterministic", "same label from shuffled points", at_least=1.0),
)
"""What good labels keep. Simulated streets whose labels are 99.8 % right and a real drive whose labels are as good
set the bounds of Q1 and Q2: trees and fences let 4 to 8 % of the beams through, real ones with a dense LiDAR up to
15 %. Q5 gates at a fault; good poses give below 0.06 m. Q6 is judged over a drive, see `extrinsics`."""


def label_hash(label: OccupancyLabel) -> str:
    """Sixteen hex digits over every voxel of a label."""
    digest = hashlib.sha256()
    for volume in (label.state, label.camera_visible, label.hit_sweeps, label.pass_sweeps):
        digest.update(np.ascontiguousarray(volume).tobytes())
    return digest.hexdigest()[:16]


def held_out_sweep(builder: LabelBuilder, window: Window) -> tuple[float, float]:
    """Q1: make the label without one sweep, then compare it with that sweep.

    Returns: the share of its returns in or next to an occupied cell, and the share of its beams
    that go through the returns of an occupied cell. NaN where no other sweep is in the window.
    """
    spare = [i for i, now in enumerate(window.reference) if not now]
    if not spare:
        return np.nan, np.nan
    out = spare[len(spare) // 2]
    decision = builder.judge(window.only([i for i in range(len(window.sweeps)) if i != out]))
    bundle, hits = window.bundles[out], decision.evidence.hits
    occupied = (decision.state == OCCUPIED_STATE).reshape(builder.grid.shape)
    near = binary_dilation(occupied, _CUBE).reshape(-1)
    weight = bundle.weight[bundle.hit]
    ends = float(weight[near[bundle.end_cell[bundle.hit]]].sum() / max(1, weight.sum()))
    solid = (decision.state[hits.cell] == OCCUPIED_STATE) & ~decision.ground
    through = beams_through(bundle, hits, solid, builder.grid, builder.config.conflict_distance)
    return ends, through / max(1, int(bundle.weight.sum()))


def self_carve(builder: LabelBuilder, window: Window) -> float:
    """Q2: share of the reference sweep's own hit cells that the dynamic rule would remove from it alone."""
    now = [i for i, reference in enumerate(window.reference) if reference][:1]
    if not now:
        return np.nan
    dynamic = builder.judge(window.only(now)).dynamic
    return float(dynamic.sum() / max(1, len(dynamic)))


def observed_by_ring(label: OccupancyLabel) -> NDArray[np.float64]:
    """Q3: observed share of the cells of each range ring, inner to outer."""
    centres = label.grid.bev
    x = centres.lo[0] + (np.arange(centres.shape[0]) + 0.5) * centres.pitch[0]
    y = centres.lo[1] + (np.arange(centres.shape[1]) + 0.5) * centres.pitch[1]
    ring = np.digitize(np.hypot(x[:, None], y[None]), RANGE_RINGS)
    seen = (label.state > 0).mean(axis=2)
    return np.array([seen[ring == i].mean() if (ring == i).any() else np.nan for i in range(len(RANGE_RINGS))])


def temporal_iou(now: OccupancyLabel, later: OccupancyLabel, now2later: NDArray[np.float64]) -> float:
    """Q4: overlap within one cell of two labels' occupied cells, where both have observed."""
    inter = total = 0.0
    for a, b, a2b in ((now, later, now2later), (later, now, invert_transform(now2later))):
        cells = np.argwhere(a.state == OCCUPIED_STATE)
        place, inside = a.grid.indices(transform_points(a2b, a.grid.centres(cells)))
        at = tuple(place[inside].T)
        observed = b.state[at] > 0
        near = binary_dilation(b.state == OCCUPIED_STATE, _CUBE)[at]
        inter += float((near & observed).sum()) / 2
        total += float(observed.sum())
    return inter / (total - inter) if total > inter else np.nan


def ground_thickness(window: Window, decision: Decision, grid: VoxelGrid) -> float:
    """Q5: median over BEV columns of the spread between sweeps of the ground's mean height, in metres."""
    row, nz = decision.evidence.hits.row, grid.shape[2]
    columns, heights, sweeps = [], [], []
    for number, bundle in enumerate(window.bundles):
        place = np.where(bundle.hit, row[np.maximum(bundle.end_cell, 0)], -1)
        use = place >= 0
        use[use] = decision.ground[place[use]]
        columns.append(bundle.end_cell[use] // nz)
        heights.append(bundle.end_mm[use, 2] / bundle.weight[use] / 1000.0)
        sweeps.append(np.full(int(use.sum()), number))
    if not columns:
        return np.nan
    column, height = np.concatenate(columns), np.concatenate(heights)
    # One height per column and sweep first: a column cut by the grid's layers counts once.
    pair, inverse = np.unique(np.stack([column, np.concatenate(sweeps)], 1), axis=0, return_inverse=True)
    inverse = inverse.ravel()
    mean = np.bincount(inverse, height) / np.maximum(1, np.bincount(inverse))
    _, group, count = np.unique(pair[:, 0], return_inverse=True, return_counts=True)
    average = np.bincount(group, mean) / count
    spread = np.sqrt(np.bincount(group, (mean - average[group]) ** 2) / count)[count >= 3]
    return float(np.median(spread)) if len(spread) else np.nan


def ego_leak(label: OccupancyLabel, ego_box: EgoBox) -> int:
    """Q7: occupied cells whose centre lies inside the vehicle."""
    centres = label.grid.centres(np.argwhere(label.state == OCCUPIED_STATE))
    return int(np.count_nonzero(ego_box.contains(centres)))


def border_ratio(label: OccupancyLabel) -> float:
    """Q8: the largest ratio of occupied cells on a border plane to those on the plane within.

    Planes with fewer than 50 occupied cells say nothing and are left out.
    """
    ratios = [0.0]
    for axis in range(3):
        counts = (label.state == OCCUPIED_STATE).sum(axis=tuple({0, 1, 2} - {axis}))
        for face, within in ((counts[0], counts[1]), (counts[-1], counts[-2])):
            if face >= 50:
                ratios.append(float(face / max(1, within)))
    return max(ratios)


class _Shuffled:
    """A recording whose points come in another order."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def __getattr__(self, name: str) -> object:
        return getattr(self._recording, name)

    def sweep(self, index: int) -> Sweep:
        """Read one sweep and permute its points."""
        sweep = self._recording.sweep(index)
        order = np.random.default_rng(index).permutation(len(sweep.points))
        return dataclasses.replace(
            sweep,
            points=sweep.points[order],
            intensity=None if sweep.intensity is None else sweep.intensity[order],
            time_offset=None if sweep.time_offset is None else sweep.time_offset[order],
            sensor=None if sweep.sensor is None else sweep.sensor[order],
        )


def is_deterministic(builder: LabelBuilder, key: int, frames: FrameSet, label: OccupancyLabel) -> bool:
    """Q9: whether shuffled points give the same label to the last bit."""
    other = LabelBuilder(_Shuffled(builder.recording), builder.config, builder.grid)  # type: ignore[arg-type]
    return label_hash(other.build(key, frames)) == label_hash(label)


def measure_key(
    builder: LabelBuilder,
    examined: Examined,
    frames: FrameSet,
    previous: Examined | None = None,
    thorough: bool = False,
    camera_agreement: float = np.nan,
) -> dict[str, float]:
    """Measure one labelled key frame.

    previous: the key frame before it, for Q4. thorough: also Q9, which costs another label.
    camera_agreement: Q6, which `extrinsics.judge_rig` finds over several key frames of the drive.
    """
    key, label, window = examined.key, examined.label, examined.window
    ends, through = held_out_sweep(builder, window)
    decision = examined.decision
    values = {
        "q1_ends_in_occupied": ends,
        "q1_through_occupied": through,
        "q2_self_carve": self_carve(builder, window),
        "q5_ground_thickness": np.nan if decision is None else ground_thickness(window, decision, builder.grid),
        "q7_ego_leak": float(ego_leak(label, builder.config.ego_box)),
        "q8_border_ratio": border_ratio(label),
    }
    values |= dict(zip(_RING_NAMES, observed_by_ring(label).tolist(), strict=True))
    recording = builder.recording
    if previous is not None and previous.key == key - 1:
        stamps = recording.key_stamp_ns
        motion = recording.trajectory.relative(int(stamps[key - 1]), int(stamps[key]))
        values["q4_temporal_iou"] = temporal_iou(previous.label, label, motion)
    if thorough:
        values["q6_camera_alignment"] = camera_agreement
        values["q9_deterministic"] = float(is_deterministic(builder, key, frames, label))
    return values


def observed_drop(keys: Sequence[Mapping[str, float]]) -> list[float]:
    """Q3: per key frame, the largest relative loss of observed share in a ring against the drive's median."""
    table = np.array([[values.get(name, np.nan) for name in _RING_NAMES] for values in keys])
    table = table.reshape(-1, len(_RING_NAMES))
    if not len(table):
        return []
    usable = ~np.isnan(table).all(axis=0)
    median = np.nanmedian(table[:, usable], axis=0)
    drop = 1 - table[:, usable] / np.maximum(median, 1e-9)
    return [float(v) for v in np.nanmax(drop, axis=1, initial=0.0)]


def broken_limits(values: Mapping[str, float], limits: Iterable[Limit] = LIMITS) -> list[str]:
    """Return the names of the limits that a set of values breaks."""
    return [limit.name for limit in limits if limit.name in values and not limit.holds(values[limit.name])]


@dataclass(frozen=True)
class TruthScores:
    """Agreement with dense truth, as counts that can be summed over key frames.

    A cell counts as right within one voxel. precision: of occupied cells. recall: of true cells
    that at least two sweeps hit. free_wrong: free cells that truly hold something.
    observed: observed cells, passed: cells that any beam touched.
    """

    occupied: int
    occupied_right: int
    surface: int
    surface_found: int
    free: int
    free_wrong: int
    observed: int
    passed: int

    def __add__(self, other: TruthScores) -> TruthScores:
        return TruthScores(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def ratios(self) -> dict[str, float]:
        """precision, recall, free_wrong and observed as shares."""
        return {
            "precision": self.occupied_right / max(1, self.occupied),
            "recall": self.surface_found / max(1, self.surface),
            "free_wrong": self.free_wrong / max(1, self.free),
            "observed": self.observed / max(1, self.passed),
        }


def compare_with_truth(label: OccupancyLabel, truth: OccupancyTruth) -> TruthScores:
    """Compare one label with dense truth of the same grid; raises ValueError if the grids differ."""
    if label.grid != truth.grid:
        raise ValueError(f"label grid {label.grid.hash} and truth grid {truth.grid.hash} differ")
    solid, state = truth.semantics != FREE, label.state
    occupied, free = state == OCCUPIED_STATE, state == FREE_STATE
    surface = solid & (label.hit_sweeps >= 2)
    touched = (label.hit_sweeps > 0) | (label.pass_sweeps > 0)
    counted = (
        occupied,
        occupied & binary_dilation(solid, _CUBE),
        surface,
        surface & binary_dilation(occupied, _CUBE),
        free,
        free & solid,
        state > 0,
        touched,
    )
    return TruthScores(*(int(np.count_nonzero(mask)) for mask in counted))
