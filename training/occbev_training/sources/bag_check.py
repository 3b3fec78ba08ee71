"""What a bag must have to become training pairs: one verdict per requirement, with the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occbev.trajectory import PoseError
from occbev_training.sources.bags import (
    Bag,
    BagRecording,
    BagTopics,
    detect_topics,
    header_stamp,
)
from occbev_training.sources.deskew import EgoBox
from occbev_training.sources.recording import Recording, RecordingError

CAMERA_RATE, ODOMETRY_RATE = 5.0, 20.0
"""Lowest accepted message rates in Hz."""
CLOCK_OFFSET, CLOCK_DRIFT = 1.0, 50e-6
"""Largest accepted median of log time minus stamp in seconds, and slope of it in s/s."""

_SHOULD = {"sensor_msgs/msg/Imu": "IMU", "sensor_msgs/msg/NavSatFix": "GNSS"}


@dataclass(frozen=True)
class Verdict:
    """One requirement. must: whether a bag that fails it is refused."""

    requirement: str
    ok: bool
    text: str
    must: bool = True


@dataclass(frozen=True)
class TopicTimes:
    """Stamps of a topic's messages in bag order: header's and log's (M,) int64 in ns."""

    stamp_ns: NDArray[np.int64]
    log_ns: NDArray[np.int64]

    @property
    def rate(self) -> float:
        """Messages per second by their stamps."""
        span = (self.stamp_ns.max() - self.stamp_ns.min()) / 1e9 if len(self.stamp_ns) > 1 else 0.0
        return float((len(self.stamp_ns) - 1) / span) if span > 0 else 0.0

    @property
    def lag(self) -> NDArray[np.float64]:
        """Log time minus stamp, in seconds."""
        return (self.log_ns - self.stamp_ns) / 1e9

    @property
    def drift(self) -> float:
        """How fast the lag grows, by a robust line through its ends' medians."""
        third = len(self.stamp_ns) // 3
        if third < 3:
            return 0.0
        order = np.argsort(self.stamp_ns, kind="stable")
        lag, time = self.lag[order], self.stamp_ns[order] / 1e9
        step = np.median(time[-third:]) - np.median(time[:third])
        return float((np.median(lag[-third:]) - np.median(lag[:third])) / step) if step > 0 else 0.0


def check_bag(path: Path, topics: BagTopics | None = None) -> list[Verdict]:
    """Judge a bag; problems become verdicts, only a bag that cannot be opened raises RecordingError."""
    with Bag(path) as bag:
        verdicts: list[Verdict] = []
        try:
            topics = topics or detect_topics(bag.topics)
        except RecordingError as error:
            return [Verdict("topics", False, str(error))]
        named = [*topics.images.values(), *topics.infos.values(), topics.lidar, topics.odometry]
        times = _times(bag, [name for name in named if name is not None])
        verdicts += _presence(bag, topics, times)
        for topic in [*topics.images.values(), topics.lidar, topics.odometry]:
            if topic is not None and len(times[topic].stamp_ns):
                verdicts += _clock(topic, times[topic])
        verdicts += [
            Verdict(name, kind in bag.topics.values(), "present" if kind in bag.topics.values() else "absent", must=False)
            for kind, name in _SHOULD.items()
        ]  # fmt: skip
        verdicts.append(_counts(bag, times))
    return verdicts + _as_recording(path, topics)


def _times(bag: Bag, topics: Sequence[str]) -> dict[str, TopicTimes]:
    """Read header stamps and log times of stamped topics."""
    found: dict[str, list[tuple[int, int]]] = {topic: [] for topic in topics}
    for topic, log_ns, data in bag.messages(list(topics)):
        found[topic].append((header_stamp(data), log_ns))
    return {
        topic: TopicTimes(*np.array(pairs, np.int64).reshape(-1, 2).T)
        for topic, pairs in found.items()
    }


def _presence(bag: Bag, topics: BagTopics, times: Mapping[str, TopicTimes]) -> list[Verdict]:
    """Cameras, their calibration topics, LiDAR and odometry: there, and often enough."""
    verdicts = []
    for name, topic in topics.images.items():
        rate = times[topic].rate
        verdicts.append(Verdict(f"camera {name}", rate >= CAMERA_RATE,
                                f"{topic}: {rate:.1f} Hz, at least {CAMERA_RATE:g} wanted"))  # fmt: skip
        count = len(times[topics.infos[name]].stamp_ns)
        verdicts.append(
            Verdict(f"camera_info {name}", count > 0, f"{topics.infos[name]}: {count} messages")
        )
    if topics.lidar is None:
        verdicts.append(
            Verdict("lidar", False, "no sensor_msgs/PointCloud2 topic; vendor packets are not read")
        )
    else:
        rate = times[topics.lidar].rate
        verdicts.append(Verdict("lidar", rate > 0, f"{topics.lidar}: {rate:.1f} Hz"))
    if topics.odometry is None:
        has_tf = "/tf" in bag.topics
        verdicts.append(
            Verdict(
                "odometry", has_tf, "poses from /tf" if has_tf else "no Odometry topic and no /tf"
            )
        )
    else:
        rate = times[topics.odometry].rate
        verdicts.append(Verdict("odometry", rate >= ODOMETRY_RATE,
                                f"{topics.odometry}: {rate:.1f} Hz, at least {ODOMETRY_RATE:g} wanted, 50 advised"))  # fmt: skip
    return verdicts


def _clock(topic: str, times: TopicTimes) -> list[Verdict]:
    """Stamps that are set, that do not jump back or repeat, and a clock that runs with the recorder's."""
    zero = int(np.count_nonzero(times.stamp_ns == 0))
    back = int(np.count_nonzero(np.diff(times.stamp_ns) < 0))
    twice = len(times.stamp_ns) - len(np.unique(times.stamp_ns))
    lag, drift = times.lag, times.drift
    median, jitter = float(np.median(lag)), float(np.percentile(np.abs(lag - np.median(lag)), 99))
    return [
        Verdict(f"stamps of {topic}", zero == back == twice == 0,
                f"{zero} zero, {back} backward jumps, {twice} repeated, of {len(times.stamp_ns)}"),
        Verdict(f"clock of {topic}", abs(median) <= CLOCK_OFFSET and abs(drift) <= CLOCK_DRIFT,
                f"log - stamp: median {median * 1e3:.1f} ms, 99 % within {jitter * 1e3:.1f} ms, drift {drift * 1e6:.0f} ppm"),
    ]  # fmt: skip


def _counts(bag: Bag, times: Mapping[str, TopicTimes]) -> Verdict:
    """What was read against what the bag promises."""
    try:
        bag.check_counts({topic: len(t.stamp_ns) for topic, t in times.items()})
    except RecordingError as error:
        return Verdict("message counts", False, str(error))
    known = bag.expected is not None
    return Verdict(
        "message counts",
        True,
        "as metadata.yaml promises" if known else "no metadata.yaml to compare with",
    )


def _as_recording(path: Path, topics: BagTopics) -> list[Verdict]:
    """Transforms, calibration, poses and the first sweep, as the reader itself sees them."""
    try:
        recording = BagRecording(path, topics)
    except (RecordingError, ValueError) as error:
        return [Verdict("readable as a recording", False, str(error))]
    try:
        cameras = ", ".join(recording.rig.names)
        verdicts = [
            Verdict(
                "readable as a recording",
                True,
                f"{len(recording.key_stamp_ns)} key frames of {cameras}",
            )
        ]
        verdicts.append(_poses(recording))
        if len(recording.sweep_stamp_ns):
            verdicts.append(_point_times(recording))
    finally:
        recording.close()
    return verdicts


def _poses(recording: Recording) -> Verdict:
    """Whether every sweep and key frame has a pose."""
    missing = 0
    stamps = np.concatenate([recording.sweep_stamp_ns, recording.key_stamp_ns])
    for stamp in stamps:
        try:
            recording.trajectory.at(int(stamp))
        except PoseError:
            missing += 1
    path = recording.trajectory.ego2global[:, :3, 3]
    metres = float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
    return Verdict("poses", missing <= 0.1 * len(stamps),
                   f"{missing} of {len(stamps)} sweeps and key frames without one; {metres:.0f} m driven")  # fmt: skip


def _point_times(recording: Recording) -> Verdict:
    """The per-point time convention that was found in the middle sweep, and whether its span is plausible."""
    sweep = recording.sweep(len(recording.sweep_stamp_ns) // 2)
    if sweep.time_offset is None:
        return Verdict("per-point time", False,
                       "no time field: fine only if the driver compensates motion itself", must=False)  # fmt: skip
    low, high = float(np.min(sweep.time_offset)), float(np.max(sweep.time_offset))
    plausible = 0.02 <= high - low <= 0.25
    return Verdict("per-point time", plausible,
                   f"{low * 1e3:.1f} to {high * 1e3:.1f} ms from the stamp; a rotation lasts 20 to 250 ms")  # fmt: skip


def propose_ego_box(recording: Recording, sweeps: int = 40, share: float = 0.9) -> EgoBox | None:
    """Box the cells around the vehicle that are hit in nearly every sweep while it moves; None without any.

    Raises RecordingError where the vehicle hardly moves: then everything is hit in every sweep.
    """
    chosen = np.linspace(0, len(recording.sweep_stamp_ns) - 1, sweeps).astype(int)
    stamps = recording.sweep_stamp_ns[chosen]
    place = recording.trajectory.at_many(stamps)[:, :3, 3]
    if np.linalg.norm(place - place[0], axis=1).max() < 20.0:
        raise RecordingError(
            f"{recording.name}: it moves less than 20 m, so its own body does not stand out"
        )
    pitch, reach, counts = 0.1, 6.0, {}
    for index in np.unique(chosen):
        sweep = recording.sweep(int(index))
        points = (
            np.asarray(sweep.points, np.float64) @ sweep.lidar2ego[:3, :3].T
            + sweep.lidar2ego[:3, 3]
        )
        near = points[np.abs(points).max(axis=1) < reach]
        for cell in np.unique(np.floor(near / pitch).astype(int), axis=0).tolist():
            counts[tuple(cell)] = counts.get(tuple(cell), 0) + 1
    often = np.array(
        [cell for cell, count in counts.items() if count > share * len(np.unique(chosen))]
    )
    # The road under the vehicle is hit in every sweep, too.
    body = often[often[:, 2] * pitch >= 0.1] if len(often) else often
    if not len(body):
        return None
    low, high = body.min(axis=0) * pitch, (body.max(axis=0) + 1) * pitch
    return EgoBox(tuple(np.round(low, 2).tolist()), tuple(np.round(high, 2).tolist()))
