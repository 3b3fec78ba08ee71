"""Compare labels with the simulator's truth: agreement, trails, and the errors of the published recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from occbev.classes import FREE, OCCUPIED_STATE
from occbev.geometry import (
    invert_transform,
    points_in_box,
    transform_points,
    yaw_from_rotation,
)
from occbev.grid import VoxelGrid
from occbev.results import FrameSet
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig, OccupancyLabel
from occbev_training.occupancy.paper import FORWARD2LIDAR, paper_label
from occbev_training.occupancy.quality import TruthScores, compare_with_truth
from occbev_training.sources.deskew import EgoBox, compensated
from occbev_training.sources.recording import OccupancyTruth, Recording

_CUBE = np.ones((3, 3, 3), bool)
_TIME_STEPS = 12
"""Instants within one sweep at which movers are placed."""


class MovingTruth(Recording, Protocol):
    """A recording that knows where every mover is at any time."""

    def moving_boxes(self, stamp_ns: int) -> NDArray[np.float64]:
        """Boxes (A, 7) in the global frame."""
        ...


@dataclass(frozen=True)
class Counts:
    """Counts of one or more key frames.

    static: true static cells that two sweeps hit; static_lost: of these, not labelled occupied.
    trail: cells that a mover hit in the window, away from where it and anything else is at the key
    time; trail_kept: of these, labelled occupied. paper_*: occupied voxels of the published recipe
    by what is wrong with them: nothing, trail of a mover, ego body, clamped onto the border, other.
    paper_free, paper_free_unseen: its free voxels, and those that no beam ever reached.
    paper_missed: true cells that it calls free.
    """

    static: int
    static_lost: int
    trail: int
    trail_kept: int
    paper_right: int
    paper_trail: int
    paper_ego: int
    paper_border: int
    paper_other: int
    paper_free: int
    paper_free_unseen: int
    paper_missed: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True)
class Comparison:
    """Agreement of labels with truth, and the counts of movers and of the published recipe."""

    scores: TruthScores
    counts: Counts

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.scores + other.scores, self.counts + other.counts)

    def as_record(self) -> dict[str, Any]:
        """Shares of what the acceptance names, and the recipe's faults as shares of its occupied voxels."""
        c = self.counts
        paper = {name: getattr(c, f"paper_{name}") for name in ("right", "trail", "ego", "border", "other")}
        occupied = max(1, sum(paper.values()))
        return {
            **self.scores.ratios,
            "static_lost": c.static_lost / max(1, c.static),
            "trails_removed": 1 - c.trail_kept / max(1, c.trail),
            "trail_cells": c.trail,
            "paper": {
                **{name: count / occupied for name, count in paper.items()},
                "occupied": occupied,
                "free_never_seen": c.paper_free_unseen / max(1, c.paper_free),
                "true_cells_called_free": c.paper_missed,
            },
        }


def compare_key(builder: LabelBuilder, recording: MovingTruth, key: int) -> Comparison:
    """Label one key frame both ways and compare with truth; raises ValueError where there is none."""
    truth = recording.occupancy_truth(key)
    if truth is None:
        raise ValueError(f"{recording.name}: no dense truth of key frame {key}")
    blind = FrameSet(int(recording.key_stamp_ns[key]), dict.fromkeys(recording.rig.names))
    label = builder.build(key, blind)  # what cameras see is not compared: no picture is rendered
    touched = _hit_by_movers(recording, key, builder.config, builder.grid)
    now = _near_movers(recording, key, builder.grid)
    solid, occupied = truth.semantics != FREE, label.state == OCCUPIED_STATE
    static = solid & ~now & (label.hit_sweeps >= 2)
    trail = touched & ~now & ~solid
    ours = (static, static & ~occupied, trail, trail & occupied)
    paper = _judge_paper(recording, key, truth, label, touched & ~now)
    return Comparison(compare_with_truth(label, truth), Counts(*(int(m.sum()) for m in ours), *paper))


def _hit_by_movers(recording: MovingTruth, key: int, config: LabelConfig, grid: VoxelGrid) -> NDArray[np.bool_]:
    """Return the cells (X, Y, Z) that returns from movers fall in, over the label's window."""
    key_ns = int(recording.key_stamp_ns[key])
    global2ego = invert_transform(recording.trajectory.at(key_ns))
    cells = np.zeros(grid.shape, bool)
    for index in np.flatnonzero(np.abs(recording.sweep_stamp_ns - key_ns) <= config.window * 1e9):
        points = _mover_points(recording, int(index))
        place, inside = grid.indices(transform_points(global2ego, points))
        cells[tuple(place[inside].T)] = True
    return cells


def _mover_points(recording: MovingTruth, index: int) -> NDArray[np.float64]:
    """Return the returns (M, 3) of one sweep that lie on a mover, in the global frame."""
    sweep = recording.sweep(index)
    lidar2global = recording.trajectory.at(sweep.stamp_ns) @ sweep.lidar2ego
    points = transform_points(lidar2global, compensated(sweep, recording.trajectory).points)
    offset = np.zeros(len(points)) if sweep.time_offset is None else sweep.time_offset.astype(np.float64)
    edges = np.linspace(offset.min(), offset.max(), _TIME_STEPS + 1)
    step = np.clip(np.searchsorted(edges, offset, side="right") - 1, 0, _TIME_STEPS - 1)
    found = []
    for number in range(_TIME_STEPS):
        part = points[step == number]
        middle = (edges[number] + edges[number + 1]) / 2
        for box in recording.moving_boxes(sweep.stamp_ns + round(middle * 1e9)):
            near = part[np.abs(part[:, :2] - box[:2]).max(axis=1) < 12]
            bottom = box[2] - box[5] / 2 + 0.1  # what the wheels stand on is no part of them
            grown = box + [0, 0, 0, 0.1, 0.1, 0.1, 0]
            found.append(near[points_in_box(near, grown) & (near[:, 2] > bottom)])
    return np.concatenate([np.zeros((0, 3)), *found])


def _near_movers(recording: MovingTruth, key: int, grid: VoxelGrid) -> NDArray[np.bool_]:
    """Return the cells (X, Y, Z) inside a mover's box at the key time, grown by one voxel."""
    key_ns = int(recording.key_stamp_ns[key])
    global2ego = invert_transform(recording.trajectory.at(key_ns))
    turn = yaw_from_rotation(global2ego[:3, :3])
    centres = grid.centres().reshape(-1, 3)
    inside = np.zeros(grid.size, bool)
    for box in recording.moving_boxes(key_ns):
        at = transform_points(global2ego, box[:3])
        grown = [*at, *(box[3:6] + 2 * np.array(grid.pitch)), box[6] + turn]
        near = np.flatnonzero(np.abs(centres[:, :2] - at[:2]).max(axis=1) < 12)
        inside[near] |= points_in_box(centres[near], grown)
    return inside.reshape(grid.shape)


def _judge_paper(
    recording: MovingTruth,
    key: int,
    truth: OccupancyTruth,
    label: OccupancyLabel,
    trail: NDArray[np.bool_],
) -> tuple[int, ...]:
    """Sort the recipe's occupied voxels by what is wrong with them, and look at what it calls free."""
    paper = paper_label(recording, key)
    solid = truth.semantics != FREE
    place, inside = _place_in(paper, truth.grid, recording)
    occupied = (paper.state == OCCUPIED_STATE).reshape(-1)
    border = np.ones(paper.grid.shape, bool)
    border[1:-1, 1:-1, 1:-1] = False
    right = inside & binary_dilation(solid, _CUBE)[tuple(place.T)]
    smeared = inside & binary_dilation(trail, _CUBE)[tuple(place.T)]
    body = inside & EgoBox().contains(truth.grid.centres(place))
    kinds = []
    left = occupied & (inside | border.reshape(-1))
    for kind in (right, smeared, body, border.reshape(-1), np.ones(len(left), bool)):
        kinds.append(int((left & kind).sum()))
        left &= ~kind
    free = inside & ~occupied
    unseen = free & (label.state[tuple(place.T)] == 0)
    missed = free & solid[tuple(place.T)]
    return *kinds, int(free.sum()), int(unseen.sum()), int(missed.sum())


def _place_in(
    paper: OccupancyLabel, grid: VoxelGrid, recording: Recording
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the truth cell (V, 3) of each of the recipe's voxels, and which lie in the truth's grid."""
    centres = paper.grid.centres().reshape(-1, 3)
    return grid.indices(transform_points(recording.lidar2ego @ FORWARD2LIDAR, centres))
