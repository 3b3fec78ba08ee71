"""The account of a replay: what was sent, what the node made of it, how long it took; plain data, no ROS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

PROCESSED = "processed"
LOST = "lost_before_the_node"
"""Outcome of an anchor image that the node has no record of."""

Frames = list[dict[str, Any]]


def frames_of(
    anchors: Sequence[int], sent: Mapping[str, Mapping[int, int]], node: Iterable[Mapping[str, Any]]
) -> Frames:
    """Give every anchor image its outcome.

    anchors: stamps in the order they were sent. sent: camera -> stamp -> steady ns of sending.
    node: the node's ledger lines.
    Returns: one record per anchor: stamp_ns, outcome and, if processed, stages_ms with `total` from the sending
        of the set's last image to the publishing of the result, on one steady clock.
    """
    lines: dict[int, Mapping[str, Any]] = {}
    for line in node:
        known = lines.get(line["stamp_ns"])
        if (
            known is None or known["outcome"] != PROCESSED
        ):  # a duplicate's drop does not hide its twin
            lines[line["stamp_ns"]] = line
    frames: Frames = []
    for stamp in anchors:
        entry = lines.get(stamp)
        frame: dict[str, Any] = {
            "stamp_ns": stamp,
            "outcome": LOST if entry is None else entry["outcome"],
        }
        if entry is not None and entry["outcome"] == PROCESSED:
            last_ns = max(sent[camera].get(image, 0) for camera, image in entry["images"].items())
            total = (entry["published_ns"] - last_ns) / 1e6
            frame |= {
                "cameras": entry["cameras"], "missing": entry["missing"], "boxes": entry["boxes"],
                "stages_ms": {**entry["stages_ms"], "total": total}, "published_ns": entry["published_ns"],
            }  # fmt: skip
        frames.append(frame)
    return frames


def summarise(frames: Frames, published: Mapping[str, int], stand_ins: int = 0) -> dict[str, Any]:
    """Summarise a replay; `frames_in` always equals `frames_processed` plus the sum of `drops`.

    stand_ins: results whose key time came from another camera than the anchor.
    """
    outcomes = Counter(frame["outcome"] for frame in frames)
    done = [frame for frame in frames if frame["outcome"] == PROCESSED]
    return {
        "frames_in": len(frames),
        "frames_processed": len(done),
        "partial": sum(bool(frame["missing"]) for frame in done),
        "stand_ins": stand_ins,
        "drops": {
            reason: count for reason, count in sorted(outcomes.items()) if reason != PROCESSED
        },
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
