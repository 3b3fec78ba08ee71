"""Calibration of a network's occupancy probabilities by distance, fitted on frames that training never saw.

`occbev-train calibrate` writes it into a package as `space.npz`; the ground grid and the state of voxels follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.files import read_arrays
from occbev.grid import BevGrid
from occbev.inference.model_package import ModelPackage

FILE_NAME = "space.npz"

RING_EDGES = (0.0, 10.0, 20.0, 30.0)
"""Metres from base_link at which each ring begins; the last one has no end."""

SCORES = np.linspace(0, 1, 65)
"""Predicted probabilities at which the curves are stored."""

MAX_OCCUPIED = 0.1
"""Largest probability of occupied at which a voxel is free."""


class SpaceCalibrationError(ValueError):
    """A calibration that cannot be used, saying which file and what would be right."""


@dataclass(frozen=True, eq=False)
class SpaceCalibration:
    """Curves over `SCORES`, one for each ring (R, 65), rising.

    occupied: measured frequency of occupied voxels at each predicted probability.
    obstacle: measured frequency of obstacles in columns of that score, see `ground_grid.Columns`.
    missed: share of the visible obstacles that would be published free if all columns below that probability were.
    fitted_on: what it was fitted on, in words; empty for no calibration.
    """

    occupied: NDArray[np.float64]
    obstacle: NDArray[np.float64]
    missed: NDArray[np.float64]
    edges: tuple[float, ...] = RING_EDGES
    fitted_on: str = ""

    def __post_init__(self) -> None:
        wanted = (len(self.edges), len(SCORES))
        for name in ("occupied", "obstacle", "missed"):
            curves = np.asarray(getattr(self, name), np.float64)
            object.__setattr__(self, name, curves)
            if curves.shape != wanted or not np.all(np.isfinite(curves)) or curves.min() < 0 or curves.max() > 1:
                raise SpaceCalibrationError(f"{name}: want probabilities {wanted}, got {curves.shape}")
            if np.any(np.diff(curves, axis=1) < 0):
                raise SpaceCalibrationError(f"{name}: a curve falls; want curves that rise with the score")

    @classmethod
    def none(cls) -> SpaceCalibration:
        """Use the network's probabilities without calibration."""
        curves = np.repeat(SCORES[None], len(RING_EDGES), axis=0)
        return cls(curves, curves, curves)

    @classmethod
    def load(cls, path: Path) -> SpaceCalibration:
        """Read `save` back; raises SpaceCalibrationError naming the file."""
        try:
            arrays = read_arrays(path, ("occupied", "obstacle", "missed", "edges", "fitted_on"))
            edges, fitted_on = tuple(arrays["edges"].tolist()), str(arrays["fitted_on"])
            return cls(arrays["occupied"], arrays["obstacle"], arrays["missed"], edges, fitted_on)
        except (TypeError, ValueError) as error:
            raise SpaceCalibrationError(f"{path}: not a calibration of 'occbev-train calibrate': {error}") from error

    def save(self, path: Path) -> None:
        """Write as .npz."""
        curves = {name: getattr(self, name).astype(np.float32) for name in ("occupied", "obstacle", "missed")}
        np.savez_compressed(path, **curves, edges=np.array(self.edges), fitted_on=np.array(self.fitted_on))

    def rings(self, bev: BevGrid) -> NDArray[np.intp]:
        """Return the ring of each cell, (Y, X)."""
        x, y = (lo + pitch * (np.arange(n) + 0.5) for lo, pitch, n in zip(bev.lo, bev.pitch, bev.shape, strict=True))
        return np.digitize(np.hypot(x, y[:, None]), self.edges[1:])

    def voxel_limits(self, bev: BevGrid) -> NDArray[np.float32]:
        """Return the score of each cell (Y, X) up to which its voxels are occupied no more often than `MAX_OCCUPIED`."""
        return self._crossing(self.occupied, MAX_OCCUPIED)[self.rings(bev)]

    def column_score(self, probability: float) -> NDArray[np.float32]:
        """Return, for each ring (R,), the score at which columns hold an obstacle so often."""
        return self._crossing(self.obstacle, probability)

    def free_score(self, max_missed: float) -> NDArray[np.float32]:
        """Return, for each ring (R,), the score below which columns are free and that share of obstacles is missed."""
        return self._crossing(self.missed, max_missed)

    def obstacle_probability(self, score: ArrayLike, rings: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return how often columns of these scores hold an obstacle; all (Y, X)."""
        return self._obstacle_table.take(_table_place(score, rings))

    def absence(self, score: ArrayLike, rings: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the logarithm of how often columns of these scores hold no obstacle; all (Y, X)."""
        return self._absence_table.take(_table_place(score, rings))

    @cached_property
    def _obstacle_table(self) -> NDArray[np.float32]:
        return self.obstacle.astype(np.float32).ravel()

    @cached_property
    def _absence_table(self) -> NDArray[np.float32]:
        return np.log1p(-np.minimum(self._obstacle_table, np.float32(0.999)))

    @staticmethod
    def _crossing(curves: NDArray[np.float64], value: float) -> NDArray[np.float32]:
        """Return the largest score at which each rising curve is no higher than `value`."""
        # Equal values: interpolation wants a curve that rises everywhere.
        rising = curves + np.arange(len(SCORES)) * 1e-9
        return np.array([np.interp(value, curve, SCORES) for curve in rising], np.float32)


def _table_place(score: ArrayLike, rings: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return where scores (Y, X) stand in a flat table of all rings."""
    step = (np.asarray(score, np.float32) * np.float32(len(SCORES) - 1) + np.float32(0.5)).astype(np.intp)
    return rings * len(SCORES) + step


def read_calibration(package: ModelPackage) -> SpaceCalibration:
    """Return the calibration of a package, or the identity if it has none."""
    return SpaceCalibration.load(package.path(FILE_NAME)) if package.has(FILE_NAME) else SpaceCalibration.none()
