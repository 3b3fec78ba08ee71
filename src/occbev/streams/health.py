"""Diagnostics of the running node: a status for the node, each camera, ego motion and latency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from occbev.streams.frame_log import PROCESSED, FrameLog
from occbev.streams.intake import Intake, Watch

OK, WARN, ERROR = 0, 1, 2

SILENT_S, SILENT_PERIODS = 1.0, 3
"""A camera without an image for this long, and for so many of its own periods, is silent."""

REMEMBERED_NS = 10_000_000_000
"""How long a problem that comes and goes is shown."""


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
    problems = intake.read_calibration().problems
    cameras = [_camera(intake, name, watch, problems.get(name, ""), now_ns) for name, watch in intake.watch.items()]
    model = Status("occbev: model", OK, about.get("model", ""), about)
    return [
        _whole(intake, frame_log, cameras),
        *cameras,
        _transforms(intake, now_ns),
        _ego(intake, now_ns),
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
    text = f"{good} of {len(cameras)} cameras are good"
    if frame_log.problem:
        level, text = max(level, WARN), f"{text}; {frame_log.problem}"
    return Status("occbev: perception", level, text, values)


def _camera(intake: Intake, name: str, watch: Watch, uncalibrated: str, now_ns: int) -> Status:
    sync = intake.sync
    age_s = (now_ns - watch.arrivals[-1]) / 1e9 if watch.arrivals else None
    silent_s = max(SILENT_S, SILENT_PERIODS / watch.rate_hz if watch.rate_hz else 0.0)
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
    topics = " or ".join(watch.publishers or intake.parameters.image_topics(name))
    if age_s is None:
        why = f": {watch.wrong_type}" if watch.wrong_type else ""
        return Status(f"occbev: {name}", ERROR, f"no image on {topics}{why}", values)
    if age_s > silent_s:
        return Status(f"occbev: {name}", ERROR, f"silent for {age_s:.1f} s on {topics}", values)
    problem = uncalibrated or watch.problem or sync.describe_absence(name) or _input_problem(intake, name, now_ns)
    return Status(f"occbev: {name}", WARN if problem else OK, problem or "good", values)


def _input_problem(intake: Intake, name: str, now_ns: int) -> str:
    """Say what is wrong with a camera's messages, although its images may be used."""
    watch = intake.watch[name]
    if watch.input_problem and now_ns - watch.input_problem_ns < REMEMBERED_NS:
        return watch.input_problem
    if intake.sync.clock_problem(name):
        return intake.sync.clock_problem(name)
    crowded = {topic: count for topic, count in watch.publishers.items() if count > 1}
    if crowded:
        return "; ".join(
            f"{count} publishers send {topic}: one of them is too many" for topic, count in crowded.items()
        )
    calibration = intake.calibration
    about = calibration.describe_flips, calibration.describe_lag, calibration.describe_frames, calibration.describe_view
    return next(filter(None, (describe(name) for describe in about)), "")


def _transforms(intake: Intake, now_ns: int) -> Status:
    """The age of /tf, and the newest problem with a transform while it is recent."""
    watch = intake.transforms
    recent = bool(watch.problem) and now_ns - watch.problem_ns < REMEMBERED_NS
    age = "never" if watch.arrival_ns is None else f"{(now_ns - watch.arrival_ns) / 1e9:.3f}"
    values = {
        "tf_age_s": age,
        "static_messages": watch.static_messages,
        "frames": len(intake.buffer.frames()),
        "problems": watch.problems,
    }
    texts = list(watch.conflicts.values())
    if recent and watch.problem not in texts:
        texts.append(watch.problem)
    return Status("occbev: transforms", WARN if texts else OK, "; ".join(texts) or "good", values)


def _ego(intake: Intake, now_ns: int) -> Status:
    source, wanted, values = intake.ego.source, intake.parameters.ego_motion, {"source": intake.ego.source}
    if intake.odometry_jump and now_ns - intake.odometry_jump_ns < REMEMBERED_NS:
        return Status("occbev: ego motion", WARN, f"odometry: {intake.odometry_jump}", values)
    if intake.motion_problem:
        return Status("occbev: ego motion", WARN, f"not compensated: {intake.motion_problem}", values)
    if source == "none" and wanted.source != "none":
        tf = f"TF {wanted.fixed_frame} -> {intake.parameters.base_frame}"
        return Status("occbev: ego motion", WARN, f"neither odometry on {wanted.odometry_topic} nor {tf} comes", values)
    if intake.twist_problem:
        values["twist"] = intake.twist_problem
    note = f", {intake.motion_note}" if intake.motion_note else ""
    text = "switched off" if source == "none" else f"poses come from {source}{note}"
    return Status("occbev: ego motion", OK, text, values)


def _latency(latencies: Mapping[str, Iterable[float]]) -> Status:
    values: dict[str, str] = {}
    for stage, samples in latencies.items():
        recent = sorted(samples)
        for share in (50, 95) if recent else ():
            values[f"{stage}.p{share}_ms"] = f"{recent[(len(recent) - 1) * share // 100]:.1f}"
    return Status("occbev: latency", OK, "of the last results", values)
