"""Voxels of networks that give factors: P(occupied) of each voxel, and for each cell of S x S voxels the likeliest class.

The state of every voxel is decided at once. Labels and confidences are worked out where somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.grid import VoxelGrid, volume_from_xyz, xyz_from_volume
from occbev.inference.postprocess import OutputError
from occbev.results import Occupancy, VoxelEvidence

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LAYERS_AT_ONCE = 4
"""Layers whose states are decided at a time, so that they stay in the cache."""


@dataclass(frozen=True)
class Factors:
    """What a graph says of voxels.

    occupied: (S, S, Z, Y / S, X / S), P(occupied) of each of the S x S voxels of a cell; the first axis is y.
    class_id, class_probability: (Z, Y / S, X / S), the likeliest of P(class | occupied) of each cell.
    free: the class that is free. min_free: least probability of free for a voxel to be free.
    """

    occupied: Floats
    class_id: Bytes
    class_probability: Floats
    free: int
    min_free: float

    def copy(self) -> Factors:
        """Return them in memory of their own, layer by layer, since a runtime uses its buffers again."""
        occupied = self.occupied.transpose(2, 0, 1, 3, 4).copy().transpose(1, 2, 0, 3, 4)
        return Factors(occupied, self.class_id.copy(), self.class_probability.copy(), self.free, self.min_free)

    @cached_property
    def most_occupied(self) -> np.float32:
        """Largest P(occupied) of which 1 - P(occupied), as it is rounded, is no less than `min_free`."""
        most = np.float32(1) - np.float32(self.min_free)
        while 1 - most < np.float32(self.min_free):
            most = np.nextafter(most, np.float32(-1))
        while 1 - np.nextafter(most, np.float32(2)) >= np.float32(self.min_free):
            most = np.nextafter(most, np.float32(2))
        return most

    def find_free(self, occupied: Floats, class_probability: Floats) -> NDArray[np.bool_]:
        """Return which voxels are free, of any that have these factors."""
        is_free = occupied <= self.most_occupied
        if self.min_free < 0.5:  # from there on nothing is likelier than free
            is_free &= 1 - occupied > occupied * class_probability
        return is_free

    def decide(self, occupied: Floats, class_id: Bytes, class_probability: Floats) -> tuple[Bytes, Floats]:
        """Return the classes of voxels with these factors, and how likely they are."""
        is_free, score = self.find_free(occupied, class_probability), occupied * class_probability
        if not is_free.any():
            return np.broadcast_to(class_id, score.shape), score
        return np.where(is_free, np.uint8(self.free), class_id), np.where(is_free, 1 - occupied, score)


def decode_factors(
    factors: Factors,
    grid: VoxelGrid,
    cameras: tuple[str, ...] = (),
    observed: NDArray[np.bool_] | None = None,
    ground: Sequence[int] = (),
    max_occupied: Floats | None = None,
) -> FactoredOccupancy:
    """Decide on voxels as `decode_occupancy` does, whose other arguments these are.

    Raises:
        OutputError: the volume does not fit the grid, or is not finite.
    """
    split, (x, y, z) = len(factors.occupied), grid.shape
    cells = (z, y // split, x // split)
    shapes = [part.shape for part in (factors.occupied, factors.class_id, factors.class_probability)]
    if shapes != [(split, split, *cells), cells, cells]:
        raise OutputError(
            f"occupied {shapes[0]}, class_id {shapes[1]} and class_probability {shapes[2]} do not fit a grid of"
            f" {grid.shape} [x, y, z]"
        )
    total: Floats = np.add.reduce(factors.occupied, (0, 1))  # of each cell; finite where all of its voxels are
    if not (np.isfinite(total).all() and np.isfinite(factors.class_probability).all()):
        raise OutputError("probabilities of occupancy hold values that are not finite")
    kept = factors.copy()
    state = _states(factors, None if max_occupied is None else _split_cells(max_occupied[None], split))
    if observed is not None:
        state *= volume_from_xyz(observed).view(np.uint8)
    return FactoredOccupancy(kept, xyz_from_volume(state), grid, cameras, _evidence_of(kept, total, ground))


class FactoredOccupancy(Occupancy):
    """Occupancy that works out labels and confidences when they are asked for."""

    factors: Factors

    def __init__(
        self, factors: Factors, state: Bytes, grid: VoxelGrid, cameras: tuple[str, ...], evidence: VoxelEvidence
    ) -> None:
        """factors: in memory of their own. state: (X, Y, Z)."""
        known = {"state": state, "grid": grid, "cameras": cameras, "has_classes": True, "evidence": evidence}
        self.__dict__.update(known, factors=factors)

    @cached_property
    def label(self) -> Bytes:  # type: ignore[override]
        """As of `Occupancy`."""
        return xyz_from_volume(_join_cells(self._decided[0]))

    @cached_property
    def confidence(self) -> Floats:  # type: ignore[override]
        """As of `Occupancy`."""
        return xyz_from_volume(_join_cells(self._decided[1])) * (self.state != UNOBSERVED_STATE)

    @property
    def _decided(self) -> tuple[Bytes, Floats]:
        factors = self.factors
        return factors.decide(factors.occupied, factors.class_id, factors.class_probability)

    def look_up(self, layer: NDArray[np.intp], column: NDArray[np.intp]) -> tuple[Bytes, Floats]:
        """As of `Occupancy`; no other voxel is worked out."""
        factors = self.factors
        layers = factors.occupied.transpose(2, 0, 1, 3, 4)
        voxel_of, cell_of = _places_in_layer(self.grid.shape[:2], len(factors.occupied))
        voxel = voxel_of.take(column) + layer * len(voxel_of)
        cell = cell_of.take(column) + layer * factors.class_id[0].size
        classes = factors.class_id.reshape(-1).take(cell), factors.class_probability.reshape(-1).take(cell)
        return factors.decide(layers.reshape(-1).take(voxel), *classes)


def _states(factors: Factors, limit: Floats | None) -> Bytes:
    """Return the state of each voxel (Z, Y, X); those that are free with an `occupied` over the limit are unknown."""
    split, _, layers, rows, columns = factors.occupied.shape
    states = np.empty((layers, rows * split, columns * split), np.uint8)
    for first in range(0, layers, LAYERS_AT_ONCE):
        part = slice(first, first + LAYERS_AT_ONCE)
        occupied = factors.occupied[:, :, part]
        is_free = factors.find_free(occupied, factors.class_probability[part]).view(np.uint8)
        state = OCCUPIED_STATE - is_free  # free is one below
        if limit is not None:
            state -= is_free & (occupied > limit).view(np.uint8)
        states[part] = _join_cells(state)
    return states


def _evidence_of(factors: Factors, total: Floats, ground: Sequence[int]) -> VoxelEvidence:
    """Take the most likely state of each cell; total: (Z, Y / S, X / S), P(occupied) added up over its voxels."""
    if not len(ground):
        return VoxelEvidence(factors.occupied)
    is_ground = np.zeros(256, np.float32)
    is_ground[list(ground)] = 1
    weight = _look_up(is_ground / np.float32(len(factors.occupied) ** 2), factors.class_id)
    return VoxelEvidence(factors.occupied, total * weight, _look_up(1 - is_ground, factors.class_id))


def _look_up(table: Floats, class_id: Bytes) -> Floats:
    """Return table (256,) at the class of each cell (Z, Y / S, X / S). NumPy takes several times as long."""
    return np.asarray(cv2.LUT(class_id.reshape(len(class_id), -1), table), np.float32).reshape(class_id.shape)


@lru_cache(maxsize=4)
def _places_in_layer(size: tuple[int, int], split: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return where the voxel and the cell of each flat (Y, X) stand in a layer (S, S, Y / S, X / S) and (Y / S, X / S)."""
    y, x = np.divmod(np.arange(size[0] * size[1]), size[0])
    cell = y // split * (size[0] // split) + x // split
    return (y % split * split + x % split) * (len(y) // split**2) + cell, cell


def _split_cells(volume: NDArray[Any], split: int) -> NDArray[Any]:
    """Turn (Z, Y, X) into planes of the S x S voxels of each cell (S, S, Z, Y / S, X / S), the first axis y."""
    layers, rows, columns = volume.shape
    cells = volume.reshape(layers, rows // split, split, columns // split, split)
    return np.ascontiguousarray(cells.transpose(2, 4, 0, 1, 3))


def _join_cells(parts: NDArray[Any]) -> NDArray[Any]:
    """Undo `_split_cells`."""
    split, _, layers, rows, columns = parts.shape
    volume = np.empty((layers * rows, split, columns * split), parts.dtype)
    for row, planes in enumerate(parts.reshape(split, split, layers * rows, columns)):
        volume[:, row] = cv2.merge(list(planes)).reshape(layers * rows, -1)
    return volume.reshape(layers, rows * split, columns * split)
