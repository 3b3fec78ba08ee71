"""From matched boxes to tested differences: scores of resampled drives, two-level intervals, sign flips, Holm.

Every result row holds the match of each box, so that all of this can be computed again from the rows alone.
"""

from __future__ import annotations

import base64
import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from occbev_training.metrics.detection import (
    FIRST_RECALL,
    MIN_PRECISION,
    RECALLS,
    THRESHOLDS,
    DetectionOutcome,
)

SCORED = (1.0, 2.0, 4.0)
"""Centre distances in metres whose APs are averaged."""

WHOLE, CUT = (0, 0.0), (FIRST_RECALL, MIN_PRECISION)
"""First recall and least precision that count: all of them, or those of nuScenes, which cut weak detectors to 0."""

_AT = tuple(THRESHOLDS.index(threshold) for threshold in SCORED)


@dataclass(frozen=True, eq=False)
class MatchRecord:
    """The matches of every predicted box, best first, and the number of objects.

    drive: class -> (P,) uint16 drive of each box. hit: class -> (P,) uint8, bit t set where it matched at SCORED[t].
    positives: class -> (D,) number of objects of each drive.
    """

    drive: Mapping[str, NDArray[np.uint16]]
    hit: Mapping[str, NDArray[np.uint8]]
    positives: Mapping[str, NDArray[np.int64]]

    @classmethod
    def of(cls, outcome: DetectionOutcome, drives: Sequence[int]) -> MatchRecord:
        """Take the matches of an outcome; drives: the drive of each sample."""
        of_sample = np.asarray(drives, np.int64)
        drive, hit, positives = {}, {}, {}
        for name, found in outcome.classes.items():
            matches = found.matches
            bits = sum((matches.truth[at] >= 0).astype(np.uint8) << number for number, at in enumerate(_AT))
            drive[name] = of_sample[matches.sample].astype(np.uint16)
            hit[name] = np.asarray(bits, np.uint8)
            counts = np.pad(matches.positives, (0, len(of_sample) - len(matches.positives)))
            positives[name] = np.bincount(of_sample, counts, int(of_sample.max()) + 1).astype(np.int64)
        return cls(drive, hit, positives)

    @property
    def drives(self) -> int:
        """How many drives were scored."""
        return len(next(iter(self.positives.values())))

    def class_ap(self) -> dict[str, float]:
        """Class -> AP, the mean over the thresholds."""
        once = np.ones((1, self.drives), np.int64)
        return {name: float(self._class_ap(name, once, WHOLE)[0]) for name in self.drive}

    def mean_ap(
        self, times: NDArray[np.int64] | None = None, counted: tuple[int, float] = WHOLE
    ) -> NDArray[np.float64]:
        """Return the mAP (B,) of B resamples of the drives. times: (B, D) how often each drive counts; default (1, D) ones.

        counted: `WHOLE` for the area under the whole curve, or `CUT`.
        """
        times = np.ones((1, self.drives), np.int64) if times is None else times
        return np.mean([self._class_ap(name, times, counted) for name in self.drive], axis=0)

    def _class_ap(self, name: str, times: NDArray[np.int64], counted: tuple[int, float]) -> NDArray[np.float64]:
        positives = times @ self.positives[name]
        every = [
            _resampled_ap(self.drive[name], (self.hit[name] >> number) & 1, times, positives, RECALLS, *counted)
            for number in range(len(SCORED))
        ]
        return np.mean(every, axis=0)

    def as_record(self) -> dict[str, Any]:
        """The matches as plain values: drives and bits packed, deflated, base64."""
        packed = {name: _pack(self.drive[name].astype(np.uint16) * 8 + self.hit[name]) for name in self.drive}
        return {"boxes": packed, "positives": {name: counts.tolist() for name, counts in self.positives.items()}}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> MatchRecord:
        """Read `as_record` back."""
        both = {name: _unpack(text) for name, text in record["boxes"].items()}
        return cls(
            {name: values // 8 for name, values in both.items()},
            {name: (values % 8).astype(np.uint8) for name, values in both.items()},
            {name: np.array(counts, np.int64) for name, counts in record["positives"].items()},
        )


def _pack(values: NDArray[np.uint16]) -> str:
    return base64.b64encode(zlib.compress(values.astype("<u2").tobytes(), 9)).decode()


def _unpack(text: str) -> NDArray[np.uint16]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").astype(np.uint16)


@njit(cache=True, nogil=True)
def _resampled_ap(drive, hit, times, positives, recalls, first, least):  # type: ignore[no-untyped-def]
    """Return the AP (B,) of boxes, best first, whose drives are taken `times` (B, D).

    The precision is interpolated between boxes at the recalls as `metrics.detection` does; a drive that is taken
    twice has its boxes twice in a row. first, least: index of the first recall and the precision that is taken off.
    """
    result = np.zeros(len(times))
    for b in range(len(times)):
        if positives[b] == 0:
            continue
        found, seen, q, total = 0, 0, 0, 0.0
        before_recall, before_precision = 0.0, 0.0
        for p in range(len(drive)):
            for _ in range(times[b, drive[p]]):
                seen += 1
                found += hit[p]
                recall, precision = found / positives[b], found / seen
                while q < len(recalls) and recalls[q] < recall:
                    value = precision
                    if seen > 1:
                        slope = (precision - before_precision) / (recall - before_recall)
                        value = slope * (recalls[q] - before_recall) + before_precision
                    if q >= first:
                        total += max(value - least, 0.0)
                    q += 1
                before_recall, before_precision = recall, precision
        if q < len(recalls) and found > 0 and recalls[q] == before_recall and q >= first:
            total += max(before_precision - least, 0.0)
        result[b] = total / (len(recalls) - first) / (1.0 - least)
    return result


@dataclass(frozen=True)
class Difference:
    """A paired difference of mAP. each: of every seed. p: exact, None with fewer than six seeds."""

    first: str
    second: str
    each: tuple[float, ...]
    interval: tuple[float, float]
    p: float | None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.each))


LEAST_SEEDS = 6
"""Seeds below which sign flips cannot reach p = 0.05."""


def compare(
    first: str, second: str, runs: Mapping[str, Sequence[MatchRecord]], draws: int, seed: int = 0
) -> Difference:
    """Compare two arms, paired by seed.

    runs: arm -> the matches of every seed, in the same order. The interval is a two-level percentile bootstrap: seeds
    are drawn with replacement, then test drives, which all seeds share.
    """
    pairs = list(zip(runs[first], runs[second], strict=True))
    each = [float(a.mean_ap()[0] - b.mean_ap()[0]) for a, b in pairs]
    drawn = np.stack([resampled_ap(a, draws, seed) - resampled_ap(b, draws, seed) for a, b in pairs])
    return Difference(first, second, tuple(each), _interval(drawn, seed), sign_flip(each))


def interval_of(records: Sequence[MatchRecord], draws: int, seed: int = 0) -> tuple[float, float]:
    """Return the two-level interval of one arm's mean mAP."""
    return _interval(np.stack([resampled_ap(record, draws, seed) for record in records]), seed)


@lru_cache(maxsize=512)
def resampled_ap(record: MatchRecord, draws: int, seed: int) -> NDArray[np.float64]:
    """Return the mAP (draws,) of resamples of the drives, the same ones for all records with as many drives.

    It is kept, since an arm is compared with many others.
    """
    times = np.random.default_rng((seed, 3)).multinomial(
        record.drives, np.full(record.drives, 1 / record.drives), draws
    )
    return record.mean_ap(times.astype(np.int64))


def _interval(drawn: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds that are drawn with replacement; drawn: (seeds, draws)."""
    chosen = np.random.default_rng((seed, 4)).integers(len(drawn), size=drawn.shape)
    low, high = np.percentile(np.take_along_axis(drawn, chosen, 0).mean(0), (2.5, 97.5))
    return float(low), float(high)


def sign_flip(differences: Sequence[float]) -> float | None:
    """Return the exact two-sided p of paired differences: all signs flipped; None with fewer than six pairs."""
    if len(differences) < LEAST_SEEDS:
        return None
    values = np.asarray(differences)
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    flipped = np.abs(signs @ values)
    return float(np.mean(flipped >= abs(values.sum()) - 1e-12))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return the p values adjusted for a family of tests (Holm 1979)."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return adjusted
