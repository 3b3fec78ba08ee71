"""What an operator sees of the running node: a status for the whole, each camera, ego motion and latency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from occbev.streams.frame_log import PROCESSED, FrameLog
from occbev.streams.intake import Intake, Watch

OK, WARN, ERROR = 0, 1, 2

SILENT_S = 1.0
"""A camera without an image for this long is silent."""


REMEMBERED_NS = 10_000_000_000
"""How long a complaint about a transform is shown."""


@dataclass(frozen=True)
class Status:
    """One line of diagnostics. level: 0 fine, 1 warning, 2 error, 3 stale."""

    name: str
    level: int
    text: str
    values: Mapping[str, Any]


def health(
    intake: Intake,
    frame_log: FrameLog,
    latencies: Mapping[str, Iterable[float]],
    about: Mapping[str, str],
    now_ns: int,
) -> list[Status]:
    """Return all statuses of the node. about: what runs, from the pipeline. now_ns: steady clock."""
    cameras = [_camera(intake, name, watch, now_ns) for name, watch in intake.watch.items()]
    model = Status("occbev: model", OK, about.get("model", ""), about)
    return [
        _whole(intake, frame_log, cameras),
        *cameras,
        _transforms(intake, now_ns),
        _ego(intake),
        model,
        _latency(latencies),
    ]


def _whole(intake: Intake, frame_log: FrameLog, cameras: list[Status]) -> Status:
    sync = intake.sync.statistics
    good = sum(camera.level == OK for camera in cameras)
    fewest = intake.parameters.sync.min_cameras
    level = OK if good == len(cameras) else WARN if good >= fewest else ERROR
    values = {
        "processed": frame_log.outcomes[PROCESSED],
        "complete_sets": sync.complete,
        "partial_sets": sync.partial,
        "key_times": sync.keys,
        "waiting": intake.sync.pending,
        "epoch": intake.sync.epoch,
        **{f"dropped.{reason}": count for reason, count in frame_log.drops.items()},
        **{f"resets.{reason}": count for reason, count in sync.resets.items()},
    }
    return Status("occbev: perception", level, f"{good} of {len(cameras)} cameras are good", values)


def _camera(intake: Intake, name: str, watch: Watch, now_ns: int) -> Status:
    sync, problems = intake.sync, intake.read_calibration().problems
    age_s = (now_ns - watch.arrivals[-1]) / 1e9 if watch.arrivals else None
    offset_ns = sync.offset_ns(name)
    values = {
        "rate_hz": f"{watch.rate_hz:.2f}",
        "age_s": "never" if age_s is None else f"{age_s:.3f}",
        "offset_ms": "unknown" if offset_ns is None else f"{offset_ns / 1e6:.1f}",
        "received": sync.statistics.received[name],
        "used": sync.statistics.used[name],
        **{f"dropped.{reason}": count for reason, count in sync.statistics.dropped[name].items()},
        **{f"refused.{reason}": count for reason, count in watch.refused.items()},
    }
    topics = " or ".join(intake.parameters.image_topics(name))
    if age_s is None:
        return Status(f"occbev: {name}", ERROR, f"no image on {topics}", values)
    if age_s > SILENT_S:
        return Status(f"occbev: {name}", ERROR, f"silent for {age_s:.1f} s on {topics}", values)
    problem = problems.get(name) or watch.problem
    return Status(f"occbev: {name}", WARN if problem else OK, problem or "good", values)


def _transforms(intake: Intake, now_ns: int) -> Status:
    """How old /tf is, and the newest complaint about a transform while it is new."""
    watch = intake.transforms
    recent = bool(watch.problem) and now_ns - watch.problem_ns < REMEMBERED_NS
    age = "never" if watch.arrival_ns is None else f"{(now_ns - watch.arrival_ns) / 1e9:.3f}"
    values = {
        "tf_age_s": age,
        "static_messages": watch.static_messages,
        "frames": len(intake.buffer.frames()),
        "problems": watch.problems,
    }
    text = watch.problem if recent else "good"
    return Status("occbev: transforms", WARN if recent else OK, text, values)


def _ego(intake: Intake) -> Status:
    source, problem = intake.ego.source, intake.motion_problem
    text = f"not compensated: {problem}" if problem else f"poses come from {source}"
    return Status("occbev: ego motion", WARN if problem else OK, text, {"source": source})


def _latency(latencies: Mapping[str, Iterable[float]]) -> Status:
    values: dict[str, str] = {}
    for stage, samples in latencies.items():
        recent = list(samples)
        if recent:
            p50, p95 = np.percentile(recent, (50, 95))
            values |= {f"{stage}.p50_ms": f"{p50:.1f}", f"{stage}.p95_ms": f"{p95:.1f}"}
    return Status("occbev: latency", OK, "of the last results", values)
