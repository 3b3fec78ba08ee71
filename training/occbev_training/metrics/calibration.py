"""Choose on validation drives the probability of free above which a voxel is decoded as free.

`OccupancyHeadConfig.min_free` is that threshold. All values are scored from one pass over the drives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import OCCUPANCY_CLASSES
from occbev.results import Occupancy
from occbev_training.metrics.occupancy import confusion, mean_iou, score_occupied_iou

MIN_FREE = np.round(np.linspace(0, 1, 201), 3).astype(np.float32)
"""Thresholds that are tried."""

_ABOVE_ALL = 2.0


@dataclass(frozen=True)
class FreeChoice:
    """What one threshold scores: IoU of occupied against free, and mIoU over the classes."""

    min_free: float
    occupancy_iou: float
    occupancy_miou: float


@dataclass
class FreeThreshold:
    """Adds up, over samples, what every threshold on the probability of free would answer; free is the last class."""

    classes: int = len(OCCUPANCY_CLASSES)
    _sure: NDArray[np.int64] = field(init=False, repr=False)
    _doubtful: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._sure = np.zeros((self.classes,) * 2, np.int64)
        # [i, truth, other]: voxels that thresholds from the i-th on turn from free to their likeliest other class.
        self._doubtful = np.zeros((len(MIN_FREE) + 1, self.classes, self.classes), np.int64)

    def add(self, truth: NDArray[np.uint8], decode: Callable[[float], Occupancy], mask: NDArray[np.bool_]) -> None:
        """Count one sample. truth, mask: (X, Y, Z). decode: what the network says at a threshold; the last class is free."""
        free = self.classes - 1
        likeliest = decode(0.0)
        other = decode(_ABOVE_ALL).label
        called_free = likeliest.label == free
        self._sure += confusion(truth, likeliest.label, mask & ~called_free, self.classes)
        counted = mask & called_free & (truth < self.classes)
        first = np.searchsorted(MIN_FREE, likeliest.confidence[counted], side="right")
        cell = (first * self.classes + truth[counted]) * self.classes + other[counted]
        self._doubtful += np.bincount(cell, minlength=self._doubtful.size).reshape(self._doubtful.shape)

    def merge(self, other: FreeThreshold) -> None:
        """Add another's counts, such as another process's."""
        self._sure += other._sure
        self._doubtful += other._doubtful

    def counts(self, index: int) -> NDArray[np.int64]:
        """Return the (K, K) confusion that threshold `MIN_FREE[index]` makes."""
        counts = self._sure + self._doubtful[: index + 1].sum(0)
        counts[:, self.classes - 1] += self._doubtful[index + 1 :].sum((0, 2))
        return counts

    def choice(self, index: int) -> FreeChoice:
        """Return what threshold `MIN_FREE[index]` scores."""
        counts, free = self.counts(index), self.classes - 1
        scores = score_occupied_iou(counts, free), mean_iou(counts, free)
        return FreeChoice(round(float(MIN_FREE[index]), 3), *scores)

    def best(self) -> FreeChoice:
        """Return the threshold with the best occupied IoU; of equal ones the lowest.

        Raises:
            ValueError: nothing was counted, or nothing is occupied.
        """
        iou = np.array([self.choice(index).occupancy_iou for index in range(len(MIN_FREE))])
        if not np.isfinite(iou).any():
            raise ValueError("min_free needs samples with occupied voxels that a camera can see")
        return self.choice(int(np.nanargmax(iou)))

    def as_record(self) -> dict[str, Any]:
        """The best threshold, and occupied IoU and mIoU over all of them, as plain values."""
        choices = [self.choice(index) for index in range(len(MIN_FREE))]
        best = self.best()
        return {
            "min_free": best.min_free,
            "occupancy_iou": best.occupancy_iou,
            "occupancy_miou": best.occupancy_miou,
            "tried": [[c.min_free, c.occupancy_iou, c.occupancy_miou] for c in choices],
        }


def fit_min_free(record: Mapping[str, Any], where: str) -> float:
    """Return the threshold that a report of `occbev-train evaluate --calibrate` recommends.

    Raises:
        ValueError: naming `where`, if it holds none.
    """
    try:
        value = float(record["calibration"]["min_free"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where}: holds no calibration.min_free; write it with 'occbev-train evaluate --calibrate --json'"
        ) from None
    if not 0 <= value <= 1:
        raise ValueError(f"{where}: calibration.min_free is {value}, want a probability")
    return value
