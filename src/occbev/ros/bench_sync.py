"""The synchroniser beside the classic approximate-time search: what they lose, what they mix up, what they cost.

The baseline is written here after the algorithm of message_filters' ApproximateTimeSynchronizer: every message
starts a search over all combinations of queued candidates whose stamps lie within one slop.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from occbev.benchmarks import Options, Report
from occbev.frame_job import FrameJob
from occbev.streams.sync import FrameSynchronizer, SyncConfig

CAMERA_NAMES = tuple(f"camera_{index}" for index in range(6))
ANCHOR = CAMERA_NAMES[1]

SPREAD_MS = (-7.0, 0.0, 7.0, 14.0, 21.0, 35.0)
"""When each camera fires against the anchor: as in nuScenes, over half of a rotation."""

RATE_HZ, SWEEPS, SEEDS = 12.0, 300, 5

UNLUCKY_QUEUE = 5
"""Queued candidates of each camera in the unlucky case; the search's cost grows with its fifth power."""


@dataclass(frozen=True)
class Arrival:
    """One image: when it arrives, when it was exposed (both ns), and which rotation it belongs to."""

    arrival_ns: int
    camera: str
    stamp_ns: int
    sweep: int


class ApproximateTime:
    """The classic matcher: of all combinations within the slop, the first in the order of the deltas leaves at once.

    with_ros_time: compare rclpy's Time and Duration, as message_filters does, in place of integers.
    """

    def __init__(self, cameras: Sequence[str], slop_s: float, queue: int = 10, with_ros_time: bool = False) -> None:
        self._queues: dict[str, dict[int, int]] = {name: {} for name in cameras}
        self._size = queue
        self._time: Callable[[int], Any] = _ros_time if with_ros_time else int
        self._slop: Any = _ros_duration(slop_s) if with_ros_time else int(slop_s * 1e9)
        self._zero: Any = _ros_duration(0) if with_ros_time else 0

    def push(self, camera: str, stamp_ns: int, sweep: int) -> dict[int, int] | None:
        """Take one image; return stamp -> rotation of the set that it completes."""
        own = self._queues[camera]
        own[stamp_ns] = sweep
        while len(own) > self._size:
            del own[min(own)]
        stamp, candidates = self._time(stamp_ns), []
        for name, queue in self._queues.items():
            if name == camera:
                continue
            deltas = [(self._time(other) - stamp, other) for other in queue]
            near = sorted((d if d > self._zero else stamp - self._time(o), o) for d, o in deltas)
            near = [(delta, other) for delta, other in near if delta <= self._slop]
            if not near:
                return None
            candidates.append([self._time(other) for _, other in near])
        for combination in itertools.product(*candidates):
            stamps = (stamp, *combination)
            if max(stamps) - min(stamps) <= self._slop:
                return self._take(camera, stamp_ns, combination)
        return None

    def _take(self, camera: str, stamp_ns: int, combination: tuple[Any, ...]) -> dict[int, int]:
        others = [name for name in self._queues if name != camera]
        taken = {stamp_ns: self._queues[camera].pop(stamp_ns)}
        for name, stamp in zip(others, combination, strict=True):
            nanoseconds = int(getattr(stamp, "nanoseconds", stamp))
            taken[nanoseconds] = self._queues[name].pop(nanoseconds)
        return taken


def _ros_time(nanoseconds: int) -> Any:
    from rclpy.time import Time

    return Time(nanoseconds=nanoseconds)


def _ros_duration(seconds: float) -> Any:
    from rclpy.duration import Duration

    return Duration(seconds=seconds)


def run(options: Options) -> Report:
    """Run the matchers over the same simulated streams; CPU time, so that a busy machine does not matter."""
    lossy = [arrivals(seed, drop=0.05) for seed in range(SEEDS)]
    jittered = [arrivals(seed, jitter_ms=40.0) for seed in range(SEEDS)]
    costs = _costs(
        {"aligned": arrivals(0, spread=False), "spread": arrivals(0), "lossy": lossy[0]}, max(1, options.rounds // 4)
    )
    sets = [s for stream in lossy for s in match_stream(stream, tolerance_s=0.1)[0]]
    share = statistics.mean(_complete(match_stream(stream, tolerance_s=0.05)[0]) / SWEEPS for stream in jittered)
    worst = _unlucky()
    values = {
        "mixed_sets": sum(_is_mixed(set(s.images.values())) for s in sets),
        "mixed_sets_approximate_time": sum(_search(stream, 0.1, False) for stream in lossy),
        "complete_share_jitter40": round(share, 4),
        "non_increasing": sum(_non_increasing(match_stream(stream, 0.1)[0]) for stream in lossy + jittered),
        "us_per_message": round(statistics.median(costs["ours"].values()), 2),
        "worst_ms": round(worst["ours"], 3),
        "us_by_stream": {name: {k: round(v, 2) for k, v in by.items()} for name, by in costs.items()},
        "unlucky_ms": {name: round(ms, 2) for name, ms in worst.items()},
        "streams": f"{len(CAMERA_NAMES)} cameras at {RATE_HZ:g} Hz, {SWEEPS} rotations, {SEEDS} seeds; 5 % lost at a "
        "tolerance of 100 ms, or 40 ms of arrival jitter",
    }
    ratios = {
        f"us_vs_{name}": round(statistics.median(by[stream] / costs["ours"][stream] for stream in by), 2)
        for name, by in costs.items()
        if name != "ours"
    }
    return Report("sync", values, ratios)


def baselines() -> dict[str, bool]:
    """Return name -> with ROS time: the search as ROS users run it where rclpy is, and on bare integers."""
    ros = {"approximate_time": True} if find_spec("rclpy") else {}
    return {**ros, "approximate_time_on_integers": False}


def arrivals(seed: int, drop: float = 0.0, jitter_ms: float = 0.0, spread: bool = True) -> list[Arrival]:
    """Simulate a drive's images in the order in which they arrive."""
    rng, images = random.Random(seed), []
    for sweep in range(SWEEPS):
        for camera, phase in zip(CAMERA_NAMES, SPREAD_MS, strict=True):
            stamp_ns = int(1e12 + sweep * 1e9 / RATE_HZ + (phase * 1e6 if spread else 0))
            late_ns = int((5.0 + rng.uniform(0.0, jitter_ms)) * 1e6)
            if rng.random() >= drop:
                images.append(Arrival(stamp_ns + late_ns, camera, stamp_ns, sweep))
    return sorted(images, key=lambda image: image.arrival_ns)


def match_stream(stream: Sequence[Arrival], tolerance_s: float) -> tuple[list[FrameJob], FrameSynchronizer]:
    """Run our synchroniser over a stream."""
    sync: FrameSynchronizer = FrameSynchronizer(CAMERA_NAMES, ANCHOR, SyncConfig(tolerance_s=tolerance_s))
    sets = []
    for image in stream:
        sets += sync.push(image.camera, image.stamp_ns, image.sweep, image.arrival_ns)
    return sets + sync.flush(stream[-1].arrival_ns), sync


def _search(stream: Sequence[Arrival], slop_s: float, with_ros_time: bool) -> int:
    """Run the classic search over a stream; return its mixed sets."""
    search = ApproximateTime(CAMERA_NAMES, slop_s, with_ros_time=with_ros_time)
    sets = [search.push(image.camera, image.stamp_ns, image.sweep) for image in stream]
    return sum(_is_mixed(set(s.values())) for s in sets if s)


def _costs(streams: Mapping[str, Sequence[Arrival]], rounds: int) -> dict[str, dict[str, float]]:
    """Return method -> stream -> CPU microseconds per message, interleaved; the slop fits the spread."""
    samples: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, stream in streams.items():
            methods: dict[str, Callable[[], object]] = {"ours": partial(match_stream, stream, 0.05)}
            methods |= {key: partial(_search, stream, 0.05, ros) for key, ros in baselines().items()}
            for key, method in methods.items():
                samples.setdefault(key, {}).setdefault(name, []).append(_cpu_us(method) / len(stream))
    return {key: {name: statistics.median(us) for name, us in by.items()} for key, by in samples.items()}


def _cpu_us(method: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    method()
    return (time.thread_time_ns() - start) / 1e3


def _unlucky() -> dict[str, float]:
    """Return method -> CPU milliseconds of the dearest message when many candidates are near but none fit.

    Half of the cameras queued images early, half late: all within reach of the last one, none of each other.
    """
    sync: FrameSynchronizer = FrameSynchronizer(CAMERA_NAMES, ANCHOR, SyncConfig(tolerance_s=0.1, timeout_s=10.0))
    messages = []
    for step in range(UNLUCKY_QUEUE):
        for index, camera in enumerate(c for c in CAMERA_NAMES if c != ANCHOR):
            offset_ms = (-95 if index % 2 else 75) + step
            messages.append((camera, int(1e12 + offset_ms * 1e6)))
    messages.append((ANCHOR, int(1e12)))
    worst = {"ours": max(_cpu_us(partial(sync.push, camera, stamp, 0, stamp)) for camera, stamp in messages) / 1e3}
    for name, with_ros_time in baselines().items():
        search = ApproximateTime(CAMERA_NAMES, 0.1, with_ros_time=with_ros_time)
        worst[name] = max(_cpu_us(partial(search.push, camera, stamp, 0)) for camera, stamp in messages) / 1e3
    return worst


def _is_mixed(sweeps: set[int]) -> bool:
    return len(sweeps) > 1


def _complete(sets: Sequence[FrameJob]) -> int:
    return sum(not s.missing for s in sets)


def _non_increasing(sets: Sequence[FrameJob]) -> int:
    return sum(b.stamp_ns <= a.stamp_ns for a, b in itertools.pairwise(sets) if a.epoch == b.epoch)
