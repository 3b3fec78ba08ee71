"""The ground grid: which cells are blocked, free or unknown.

It is made by columns of voxels. An obstacle stands between two heights above the local ground; free is ground that
a camera sees past the obstacles before it; everything else is unknown.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import OCCUPIED_STATE
from occbev.config import ConfigError, bounded
from occbev.grid import VoxelGrid, volume_from_xyz
from occbev.inference.space_calibration import SpaceCalibration
from occbev.results import BLOCKED_CELL, FREE_CELL, UNKNOWN_CELL, GroundGrid, Occupancy, VoxelEvidence
from occbev.rig import CameraRig

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

SPREAD = 0.6
"""Cells by which networks misplace an obstacle (standard deviation)."""

GROUND_REACH = 3.6
"""Metres of ground over which its height is averaged."""

AZIMUTH_STEP = math.radians(0.8)
"""Angle between two lines of sight of a camera."""

MARGIN = 3
"""Cells behind the front of an obstacle that count as not hidden by it: the accuracy with which networks place surfaces."""

HIDING_MARGIN = 0.3
"""A voxel hides the ground behind it if its probability of an obstacle is this much above that of a blocked cell."""

TALL_LAYERS = 4
"""Layers above the upper height of obstacles into which an object must reach to hide a whole column."""

LEAST_SIGHT = 0.45
"""A cell is unknown if the probability that no tall object hides it is below this."""

MAX_GROUND_HEIGHT = 2.0
"""Metres above the plane of base_link within which the ground is searched if the network predicts no classes."""


@dataclass(frozen=True)
class GroundGridConfig:
    """What counts as an obstacle, and the limits for blocked and free."""

    min_height: float = bounded(0.2, 0.0, 5.0, live=True)
    """Metres above the local ground from which things are obstacles."""
    max_height: float = bounded(2.5, 0.1, 10.0, live=True)
    """Metres above the local ground up to which things are obstacles."""
    max_missed_obstacles: float = bounded(0.08, 0.001, 0.999, live=True)
    """Largest share of visible obstacle cells that may be published as free, by the calibration of the package."""
    min_obstacle_probability: float = bounded(0.19, 0.001, 0.999, live=True)
    """Lowest probability of an obstacle in a cell that is published as blocked."""

    def __post_init__(self) -> None:
        if not self.min_height < self.max_height:
            raise ConfigError(f"min_height {self.min_height}: must be below max_height {self.max_height}")


@dataclass(frozen=True)
class Columns:
    """What the columns of a volume hold, all (Y, X).

    score: the largest probability of an obstacle among the voxels between the two heights, see `smooth`. tall: the same
    of the smaller of it and the largest probability above the upper height: objects this tall hide whole columns behind
    them. ground: layer of the local ground; its centre is at `ground_z`. top: upper end of the highest voxel that is
    occupied for the lines of sight, or else height of the ground.
    """

    score: Floats
    tall: Floats
    ground: NDArray[np.intp]
    ground_z: Floats
    top: Floats


class GroundGridMaker:
    """Makes ground grids; what depends only on calibration and configuration is computed once."""

    def __init__(self, grid: VoxelGrid, calibration: SpaceCalibration | None = None) -> None:
        self.grid = grid
        self.calibration = calibration or SpaceCalibration.none()
        self._rings = self.calibration.rings(grid.bev)
        self._limits: tuple[GroundGridConfig, Limits] | None = None

    def make(self, evidence: VoxelEvidence, sight: SightLines, config: GroundGridConfig) -> GroundGrid:
        """Decide on every cell from what the network predicts for its voxels and from what the cameras can see."""
        limits = self.limits(config)
        columns = find_columns(evidence, self.grid, config, limits.hiding)
        sees_ground, sees_column = in_sight(columns, sight, self.grid, self.calibration, self._rings)
        cells = np.full(columns.score.shape, UNKNOWN_CELL, np.int8)
        cells[(columns.score <= limits.free) & sees_ground] = FREE_CELL
        cells[(columns.score >= limits.blocked) & sees_column] = BLOCKED_CELL
        probability = self.calibration.obstacle_probability(columns.score, self._rings)
        return GroundGrid(cells, probability, columns.ground, self.grid)

    def limits(self, config: GroundGridConfig) -> Limits:
        """Return the scores at which cells are free, blocked, or hide others."""
        if self._limits is None or self._limits[0] != config:
            self._limits = config, Limits.of(self.calibration, config, self._rings)
        return self._limits[1]


@dataclass(frozen=True)
class Limits:
    """Scores (Y, X): cells are free up to `free` and blocked from `blocked`; voxels hide what is behind from `hiding`."""

    free: Floats
    blocked: Floats
    hiding: Floats

    @classmethod
    def of(cls, calibration: SpaceCalibration, config: GroundGridConfig, rings: NDArray[np.intp]) -> Limits:
        """Look the scores up in a calibration. rings: (Y, X)."""
        blocked = calibration.column_score(config.min_obstacle_probability)
        hiding = calibration.column_score(min(0.95, config.min_obstacle_probability + HIDING_MARGIN))
        free = np.minimum(calibration.free_score(config.max_missed_obstacles), np.nextafter(blocked, np.float32(0)))
        return cls(free[rings], blocked[rings], hiding[rings])


def find_columns(evidence: VoxelEvidence, grid: VoxelGrid, config: GroundGridConfig, hiding: Floats) -> Columns:
    """Find the local ground under every cell, and the likeliest obstacle above it.

    hiding: (Y, X), probability of an obstacle from which a voxel counts for the top.
    """
    under, (first, last) = ground_layer(evidence, grid), band_layers(grid, config)
    split, _, layers, *cells = evidence.occupied.shape
    score, tall = np.zeros((2, split, split, *cells), np.float32)
    highest = np.zeros(score.shape, np.uint8)
    sure = np.ascontiguousarray(hiding[::split, ::split])
    lowest, uppermost, short = int(under.min()), int(under.max()), under.astype(np.int16)
    for layer in range(lowest + 1, layers):
        probability = evidence.obstacle_in(layer)
        for best, low, high in ((score, first, last), (tall, last, last + TALL_LAYERS)):
            if low <= layer - uppermost and layer - lowest <= high:
                np.maximum(best, probability, out=best)
            elif low <= layer - lowest and layer - uppermost <= high:
                in_band = (short <= layer - low) & (short >= layer - high)
                np.maximum(best, probability * in_band.astype(np.float32), out=best)
        np.maximum(highest, (probability >= sure).view(np.uint8) * np.uint8(layer), out=highest)
    np.minimum(tall, score, out=tall)  # a bridge or a crown is no wall
    top = np.maximum(highest, under - 0.5, dtype=np.float32)  # the ground's centre; of voxels their upper end
    ground = under.repeat(split, 0).repeat(split, 1)
    lo, pitch = np.float32(grid.lo[2]), np.float32(grid.pitch[2])
    ground_z = lo + pitch * (ground.astype(np.float32) + np.float32(0.5))
    score, tall = (smooth(interleave(part)) for part in (score, tall))
    return Columns(score, tall, ground, ground_z, lo + pitch * (interleave(top) + 1))


def smooth(score: Floats) -> Floats:
    """Average scores (Y, X) over neighbouring cells, since a network may place a thing in the next one."""
    return np.asarray(cv2.GaussianBlur(score, (3, 3), SPREAD), np.float32)


def in_sight(
    columns: Columns,
    sight: SightLines,
    grid: VoxelGrid,
    calibration: SpaceCalibration,
    rings: NDArray[np.intp],
) -> tuple[Bools, Bools]:
    """Return of which cells (Y, X) some camera sees the ground, and of which it sees anything at all."""
    absence = calibration.absence(columns.tall, rings)
    return sight.see(columns.top, columns.ground, columns.ground_z + np.float32(grid.pitch[2] / 2), absence)


def band_layers(grid: VoxelGrid, config: GroundGridConfig) -> tuple[int, int]:
    """Return how many layers above the ground's the first and the last one lie in which things are obstacles."""
    first = max(1, math.ceil(config.min_height / grid.pitch[2] - 1e-6))
    return first, max(first, math.floor(config.max_height / grid.pitch[2] + 1e-6))


def ground_layer(evidence: VoxelEvidence, grid: VoxelGrid) -> NDArray[np.intp]:
    """Return the layer of the local ground under each group of columns (Y / S, X / S).

    Where nothing says ground it is the layer of base_link's own plane.
    """
    size = 2 * round(GROUND_REACH / (grid.pitch[0] * len(evidence.occupied)) / 2) + 1
    weight = evidence.ground
    if weight is None:
        weight = _likeliest_surface(evidence.obstacle.mean((0, 1)), grid, size)
    weight = np.square(weight)
    total = weight.sum(0)
    moment = np.tensordot(np.arange(len(weight), dtype=np.float32), weight, 1)
    plane = -grid.lo[2] / grid.pitch[2] - 0.5
    total, moment = (
        cv2.blur(part, (size, size)) for part in (total + np.float32(1e-3), moment + np.float32(1e-3 * plane))
    )
    layer = np.rint(moment / total).astype(np.intp)
    return np.asarray(layer.clip(0, len(weight) - 1), np.intp)


def _likeliest_surface(occupied: Floats, grid: VoxelGrid, size: int) -> Floats:
    """Return weights (Z, Y, X): one at the fullest layer near base_link's plane, for networks that know no classes."""
    near = min(len(occupied), max(1, math.ceil((MAX_GROUND_HEIGHT - grid.lo[2]) / grid.pitch[2])))
    smooth = np.stack([cv2.blur(np.ascontiguousarray(layer), (size, size)) for layer in occupied[:near]])
    weight = np.zeros_like(occupied)
    np.put_along_axis(weight, smooth.argmax(0)[None], np.float32(1), 0)
    return weight


def obstacle_voxels(occupancy: Occupancy, ground: GroundGrid, config: GroundGridConfig) -> NDArray[np.intp]:
    """Return the voxels (M, 3) [x, y, z] that stand in blocked cells between the two heights.

    They are those that are occupied, and of a cell without one the likeliest.
    """
    if occupancy.evidence is None:
        return np.zeros((0, 3), np.intp)
    evidence, (columns, rows, layers) = occupancy.evidence, occupancy.grid.shape
    split, (first, last) = len(evidence.occupied), band_layers(occupancy.grid, config)
    column = np.flatnonzero(ground.cells == BLOCKED_CELL)
    y, x = np.divmod(column, columns)
    layer = ground.ground[y, x][:, None] + np.arange(first, last + 1)  # (M, heights)
    inside, layer = layer < layers, np.minimum(layer, layers - 1)
    start = layer * (columns * rows)
    cell = y // split * (columns // split) + x // split
    voxel = (y % split * split + x % split) * (columns * rows // split**2) + cell
    probability = evidence.occupied.transpose(2, 0, 1, 3, 4).reshape(-1).take(start + voxel[:, None])
    if evidence.not_ground is not None:
        probability *= evidence.not_ground.reshape(-1).take(start // split**2 + cell[:, None])
    probability[~inside] = -1
    state = volume_from_xyz(occupancy.state).reshape(-1).take(start + column[:, None])
    chosen = (state == OCCUPIED_STATE) | (probability == probability.max(1, keepdims=True))
    place, height = np.nonzero(chosen & (probability > 0))
    return np.stack([x[place], y[place], layer[place, height]], -1)


def interleave(parts: NDArray[np.float32]) -> Floats:
    """Turn values of the S x S voxels of each cell (S, S, Y / S, X / S), the first axis y, into (Y, X)."""
    split, _, rows, columns = parts.shape
    return np.ascontiguousarray(parts.transpose(2, 0, 3, 1)).reshape(rows * split, columns * split)


class SightLines:
    """Lines of sight over the ground, from each camera to the cells that lie in its image.

    in_view: (N, X, Y, Z), see `voxels_in_view`; cameras that are False in `valid` (N,) see nothing.
    """

    def __init__(self, rig: CameraRig, grid: VoxelGrid, in_view: Bools, valid: Bools | None = None) -> None:
        self.grid, self._views = grid, np.ascontiguousarray(volume_from_xyz(in_view))  # (N, Z, Y, X)
        chosen = [i for i in range(len(rig)) if (valid is None or valid[i]) and self._views[i].any()]
        places = [rig.cameras[index].cam2ego[:3, 3] for index in chosen]
        steps = math.ceil(np.hypot(*np.abs([grid.lo[:2], grid.hi[:2]]).max(0)) * 1.1 / grid.pitch[0])
        fans = [_Fan.of(place, self._views[i].any(0), grid, steps) for i, place in zip(chosen, places, strict=True)]
        lines = [fan.rays.shape[1] for fan in fans]
        first = np.cumsum([0, *lines])
        self._rays = np.concatenate([fan.rays for fan in fans], 1) if fans else np.zeros((1, 0), np.intp)
        self._ray_height = _spread(places, lines)
        self.in_image = np.any(self._views[chosen], axis=(0, 1)) if chosen else np.zeros(grid.bev.shape[::-1], bool)
        """Cells (Y, X) of which some voxel lies in an image."""
        self._cells = _joined([fan.cells for fan in fans])
        # Where the lines are flat: each cell's own step, and the one before which things hide its ground.
        lines_of = [(fan.along, fan.ray + start) for fan, start in zip(fans, first[:-1], strict=True)]
        self._own = _joined([along * first[-1] + line for along, line in lines_of])
        self._before = _joined([np.maximum(along - MARGIN, 0) * first[-1] + line for along, line in lines_of])
        self._height = _spread(places, [len(fan.cells) for fan in fans])
        self._nearness = 1 / np.maximum(_joined([fan.distance for fan in fans]).astype(np.float32), np.float32(0.1))
        self._volume = np.repeat(np.array(chosen, np.intp), [len(fan.cells) for fan in fans]) * grid.size + self._cells

    def see(self, top: Floats, ground: NDArray[np.intp], ground_z: Floats, absence: Floats) -> tuple[Bools, Bools]:
        """Return of which cells some camera sees the ground, and of which it sees anything; all (Y, X).

        top: height of the tallest obstacle in a cell. ground: layer of the ground; its voxel must be in that camera's
        image. ground_z: height of the ground. absence: logarithm of the probability that no tall object stands in a
        cell; the probabilities of the cells along a line of sight multiply.
        """
        clear = self._clear(absence).ravel().take(self._own) >= np.float32(math.log(LEAST_SIGHT))
        horizon = self._horizon(top).ravel().take(self._before)
        in_image = self._views.ravel().take(self._volume + (ground * ground.size).ravel().take(self._cells))
        sees_ground = self._rises(ground_z, horizon) & in_image & clear
        return self._somewhere(sees_ground), self._somewhere(clear)

    def _clear(self, absence: Floats) -> Floats:
        """Return the logarithm of the probability that no tall object stands before each step of each line (R, A)."""
        clear = np.zeros(self._rays.shape, np.float32)
        np.append(absence.ravel(), np.float32(0)).take(self._rays[:-1], out=clear[1:], mode="clip")
        for before, after in itertools.pairwise(clear):  # np.cumsum takes twice as long
            np.add(before, after, out=after)
        return clear

    def _horizon(self, top: Floats) -> Floats:
        """Return the steepest slope up to each step of each line (R, A)."""
        steps = len(self._rays)
        nearness = 1 / (np.float32(self.grid.pitch[0]) * (np.arange(steps, dtype=np.float32) + np.float32(0.5)))
        slope = np.append(top.ravel(), np.float32(-np.inf)).take(self._rays)
        slope -= self._ray_height
        slope *= nearness[:, None]
        for before, after in itertools.pairwise(slope):  # np.maximum.accumulate takes twice as long
            np.maximum(before, after, out=after)
        return slope

    def _rises(self, height: Floats, horizon: Floats) -> Bools:
        slope = height.ravel().take(self._cells)
        slope -= self._height
        slope *= self._nearness
        return np.asarray(slope >= horizon)

    def _somewhere(self, seen: Bools) -> Bools:
        found = np.zeros(self.grid.bev.size, bool)
        found[self._cells[np.flatnonzero(seen)]] = True
        return found.reshape(self.grid.bev.shape[::-1])


@dataclass(frozen=True)
class _Fan:
    """Lines of sight of one camera.

    rays: (R, A) flat cells that each line crosses, one a step, the number of cells where it has left the grid.
    cells: (M,) flat cells that lie in the image. ray: (M,) their line; along: their step; distance: (M,) in metres.
    """

    rays: NDArray[np.intp]
    cells: NDArray[np.intp]
    ray: NDArray[np.intp]
    along: NDArray[np.intp]
    distance: NDArray[np.float64]

    @classmethod
    def of(cls, place: NDArray[np.float64], in_image: Bools, grid: VoxelGrid, steps: int) -> _Fan:
        """Draw a line through every 0.8 degrees in which the image holds a cell; in_image: (Y, X)."""
        bev, pitch = grid.bev, grid.pitch[0]
        cells = np.flatnonzero(in_image)
        row, column = np.divmod(cells, bev.shape[0])
        away = bev.metres(np.stack([column, row], -1) + 0.5) - place[:2]
        distance = np.hypot(*away.T)
        turns = round(2 * np.pi / AZIMUTH_STEP)
        bins = np.floor(np.arctan2(away[:, 1], away[:, 0]) / AZIMUTH_STEP).astype(np.intp) % turns
        used, ray = np.unique(bins, return_inverse=True)
        along = np.floor(distance / pitch).astype(np.intp).clip(0, steps - 1)
        angle, reach = (used + 0.5) * AZIMUTH_STEP, pitch * (np.arange(steps) + 0.5)
        points = place[:2] + reach[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], -1)  # (R, A, 2)
        at = np.floor(bev.map_coordinates(points)).astype(np.intp)
        inside = np.all((at >= 0) & (at < bev.shape), axis=-1)
        rays = np.where(inside, at[..., 1] * bev.shape[0] + at[..., 0], bev.size)
        return cls(rays, cells, ray, along, distance)


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, np.intp)


def _spread(places: list[NDArray[np.float64]], counts: list[int]) -> Floats:
    """Return the height of each camera, as often as it has lines or cells."""
    return np.repeat(np.array([place[2] for place in places], np.float32), counts)
