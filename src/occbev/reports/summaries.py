"""Summary of a replay: what was sent, what the node made of it, how long it took; plain data, no ROS."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

PROCESSED = "processed"
LOST = "lost_before_the_node"
"""Outcome of an anchor image that the node has no record of."""

UNANSWERED = "without_result"
"""The same where the node's records cannot be read."""

PASS_GAP_NS = 2_000_000_000
"""Sendings of one stamp that are further apart belong to different passes of a looped bag."""

Frames = list[dict[str, Any]]


def frames_of(
    anchors: Sequence[int],
    sent: Mapping[str, Mapping[int, Sequence[int]]],
    node: Iterable[Mapping[str, Any]],
    anchor: str,
    unrecorded: str = LOST,
) -> Frames:
    """Give every anchor image its outcome.

    anchors: stamps in the order they were sent; a looped bag sends each once for every pass.
    sent: camera -> stamp -> steady ns of each sending. node: the node's frame log. anchor: its camera.
    unrecorded: outcome of images without a line.
    Returns: one record per anchor: stamp_ns, outcome and, if processed, stages_ms with `total` from the sending
        of the set's last image to the publishing of the result, on one steady clock.
    """
    outcomes = _outcomes(sent.get(anchor, {}), node)
    frames: Frames = []
    for stamp in anchors:
        entry = next(outcomes[stamp], None)
        frame: dict[str, Any] = {
            "stamp_ns": stamp,
            "outcome": unrecorded if entry is None else entry["outcome"],
        }
        if entry is not None and entry["outcome"] == PROCESSED:
            total = (entry["published_ns"] - _last_sent(entry, sent)) / 1e6
            frame |= {
                "cameras": entry["cameras"],
                "missing": entry["missing"],
                "boxes": entry["boxes"],
                "stages_ms": {**entry["stages_ms"], "total": total},
                "published_ns": entry["published_ns"],
            }
        frames.append(frame)
    return frames


def _outcomes(
    sent: Mapping[int, Sequence[int]], node: Iterable[Mapping[str, Any]]
) -> dict[int, Iterator[Mapping[str, Any] | None]]:
    """Return stamp -> what became of it, once for each sending, None where the node has no record of it."""
    lines: dict[int, list[Mapping[str, Any]]] = {}
    for line in node:
        lines.setdefault(line["stamp_ns"], []).append(line)
    return {
        stamp: iter([o for group in _passes(times) for o in _pair(group, lines.get(stamp, []))])
        for stamp, times in sent.items()
    }


def _passes(times: Sequence[int]) -> list[tuple[int, float, float]]:
    """Split the sendings of one stamp into passes of the bag: how many, from when, until when."""
    starts = [t for before, t in zip((None, *times), times, strict=False) if before is None or t - before > PASS_GAP_NS]
    ends: list[float] = [*starts[1:], math.inf]
    return [(sum(a <= t < b for t in times), a, b) for a, b in zip(starts, ends, strict=True)]


def _pair(group: tuple[int, float, float], lines: list[Mapping[str, Any]]) -> list[Mapping[str, Any] | None]:
    """Return the outcomes of one pass; a duplicate's drop does not hide its twin, which was processed."""
    count, begin, end = group
    own = [line for line in lines if begin <= line["at_ns"] < end]
    own.sort(key=lambda line: line["outcome"] != PROCESSED)
    return [*own[:count], *[None] * (count - len(own))]


def _last_sent(entry: Mapping[str, Any], sent: Mapping[str, Mapping[int, Sequence[int]]]) -> int:
    """When the last image of a processed set was sent, in the pass that it was published in."""
    times = [t for camera, stamp in entry["images"].items() for t in sent[camera].get(stamp, ())]
    return max((t for t in times if t <= entry["published_ns"]), default=0)


def summarise(frames: Frames, published: Mapping[str, int], fallback_sets: int = 0) -> dict[str, Any]:
    """Summarise a replay; `frames_in` always equals `frames_processed` plus the sum of `drops`.

    fallback_sets: results whose key time came from another camera than the anchor.
    """
    outcomes = Counter(frame["outcome"] for frame in frames)
    done = [frame for frame in frames if frame["outcome"] == PROCESSED]
    return {
        "frames_in": len(frames),
        "frames_processed": len(done),
        "partial": sum(bool(frame["missing"]) for frame in done),
        "fallback_sets": fallback_sets,
        "drops": {reason: count for reason, count in sorted(outcomes.items()) if reason != PROCESSED},
        "published": dict(published),
        "rate_hz": rate_of([frame["published_ns"] for frame in done]),
        "latency_ms": percentiles([frame["stages_ms"] for frame in done]),
    }


def percentiles(samples: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return stage -> {p50, p95} of many measurements."""
    stages = sorted({stage for sample in samples for stage in sample})
    result = {}
    for stage in stages:
        p50, p95 = np.percentile([sample[stage] for sample in samples if stage in sample], (50, 95))
        result[stage] = {"p50": round(float(p50), 2), "p95": round(float(p95), 2)}
    return result


def rate_of(times_ns: Sequence[int]) -> float:
    """Return events per second between the first and the last."""
    if len(times_ns) < 2:
        return 0.0
    span = (max(times_ns) - min(times_ns)) / 1e9
    return round((len(times_ns) - 1) / span, 3) if span > 0 else 0.0
