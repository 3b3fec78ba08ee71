"""Confidence intervals of scores, by drawing drives with replacement.

Frames of one drive are alike, so the drive is what is drawn; frames are only where there is one drive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Intervals:
    """Confidence intervals of scores. unit: what was drawn, drive or frame; units: how many there are."""

    bounds: Mapping[str, tuple[float, float]]
    unit: str
    units: int
    draws: int
    confidence: float

    def as_record(self) -> dict[str, Any]:
        """The intervals as plain values."""
        return {
            "drawn": self.unit,
            "units": self.units,
            "draws": self.draws,
            "confidence": self.confidence,
            **{name: list(bound) for name, bound in self.bounds.items()},
        }


def draw_samples(drives: Sequence[str], draws: int = DRAWS, seed: int = 0) -> NDArray[np.int64]:
    """Return how often each sample is taken in each draw, (draws, S): whole drives with replacement."""
    _, unit = np.unique(list(_units(drives)), return_inverse=True)
    count = int(unit.max()) + 1
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
    return times[:, unit].astype(np.int64)


def bootstrap(
    score: Callable[[NDArray[np.int64]], Mapping[str, float]],
    drives: Sequence[str],
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Intervals | None:
    """Return percentile intervals of scores (Efron 1979).

    score: how often each sample is taken (S,) -> name -> score. drives: (S,) the drive of each sample.
    Returns: None where a single sample leaves nothing to draw.
    """
    units = _units(drives)
    if len(set(units)) < 2:
        return None
    drawn: dict[str, list[float]] = {}
    for times in draw_samples(drives, draws, seed):
        for name, value in score(times).items():
            drawn.setdefault(name, []).append(value)
    tail = 50 * (1 - confidence)
    bounds = {name: _percentiles(values, tail) for name, values in drawn.items()}
    kept = {name: bound for name, bound in bounds.items() if bound is not None}
    unit = "drive" if len(set(drives)) > 1 else "frame"
    return Intervals(kept, unit, len(set(units)), draws, confidence)


def _units(drives: Sequence[str]) -> Sequence[str | int]:
    return drives if len(set(drives)) > 1 else range(len(drives))


def _percentiles(values: Sequence[float], tail: float) -> tuple[float, float] | None:
    known = np.array([value for value in values if np.isfinite(value)])
    if len(known) == 0:
        return None
    lo, hi = np.percentile(known, (tail, 100 - tail))
    return float(lo), float(hi)
