"""Index a bag once: which messages can be used, and into which parts it falls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from occbev.messages.bags import BagMessage, BagReader
from occbev.messages.readers import calibration_key, is_calibrated
from occbev.messages.topics import BagTopics, detect_topics, listed
from occbev.rig import CameraRig
from occbev_training.sources.bag_writer import BASE_FRAME
from occbev_training.sources.clocks import ClockCorrection, TopicTimes
from occbev_training.sources.recording import RecordingError

JUMP_NS = 2_000_000_000
"""Clock jumps that the bag logged within this time of each other are one."""

RESTLESS = 4
"""So many changes of a calibration, on average within `JUMP_NS` of each other, leave no stretch between them."""


@dataclass(frozen=True)
class BagOptions:
    """How a bag is read; everything has a default that suits most bags."""

    topics: BagTopics | None = None
    """Which topic is what; found by name and type if None."""
    profile: str = "auto"
    """Naming scheme to look for."""
    anchor: str | None = None
    """The camera whose exposures make key frames; CAM_FRONT or else the first."""
    key_interval: float = 0.0
    """Least seconds between key frames."""
    base_frame: str = BASE_FRAME
    """The vehicle's frame: x forward, y left, z up."""
    rig: CameraRig | None = None
    """Calibration of the cameras in place of the bag's own."""
    lidar_origin: tuple[float, float, float] | None = None
    """Where the LiDAR stands in the vehicle's frame, for clouds that come in that frame."""
    point_times: str = "auto"
    """How points know their time; see `point_times.MODES`."""
    clock: Mapping[str, ClockCorrection] = field(default_factory=dict)
    """Topic -> correction of its stamps."""
    part: int = 0
    """Which part of a bag that a clock jump or a new calibration divides."""

    def __post_init__(self) -> None:
        if self.key_interval < 0:
            raise RecordingError(f"key interval {self.key_interval:g} s: must be at least 0")


@dataclass
class Index:
    """Where the messages of a topic are, in bag order: stamps as written, stamps that count, log times; in ns."""

    raw_ns: list[int] = field(default_factory=list)
    stamp_ns: list[int] = field(default_factory=list)
    log_ns: list[int] = field(default_factory=list)

    def only(self, keep: Sequence[int]) -> Index:
        """Return some of the messages."""
        parts = (self.raw_ns, self.stamp_ns, self.log_ns)
        return Index(*([part[i] for i in keep] for part in parts))


@dataclass(frozen=True)
class Contents:
    """A bag read once: an index of the large topics, and the messages of the small ones.

    Of calibrations, only the first message of each new content is kept.
    """

    index: Mapping[str, Index]
    kept: Mapping[str, Sequence[BagMessage]]


@dataclass(frozen=True)
class _Scan(Contents):
    """The usable messages. cuts: log times at which a clock jumped back or a calibration changed.

    skipped: what was left out and why -> how often.
    """

    cuts: Sequence[int]
    skipped: Mapping[str, int]


_LAST_READ: list[tuple[object, Contents]] = []
"""The bag that was read last, with what tells it from others: it is opened for its clocks, its parts and its keys."""


def _contents(bag: BagReader, topics: BagTopics) -> Contents:
    """Read every message of a bag, unless it is the one that was read last."""
    files = [bag.path] if bag.path.is_file() else sorted(bag.path.iterdir())
    states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    what = (bag.path.absolute(), states, topics)
    for known, contents in _LAST_READ:
        if known == what:
            return contents
    _LAST_READ[:] = [(what, _read(bag, topics))]
    return _LAST_READ[0][1]


def _read(bag: BagReader, topics: BagTopics) -> Contents:
    large = [*topics.images.values(), *topics.lidars]
    infos = set(topics.infos.values())
    small = [*infos, topics.tf_static, topics.tf, *([topics.odometry] if topics.odometry else [])]
    index = {topic: Index() for topic in large}
    kept: dict[str, list[BagMessage]] = {topic: [] for topic in small}
    for message in bag.messages([*large, *small]):
        if message.topic in index:
            index[message.topic].raw_ns.append(bag.stamp_ns(message))
            index[message.topic].log_ns.append(message.log_ns)
        elif message.topic not in infos or not kept[message.topic] or _differ(kept[message.topic][-1], message):
            kept[message.topic].append(message)
    return Contents(index, kept)


def _differ(one: BagMessage, other: BagMessage) -> bool:
    """Whether two messages differ in more than their stamps."""
    return one.data[12:] != other.data[12:]


def raw_times(bag: BagReader, topics: BagTopics) -> dict[str, TopicTimes]:
    """Return stamps as written and log times of all messages of cameras, LiDAR and odometry; raises RecordingError."""
    contents = _contents(bag, topics)
    times = {topic: topic_times(own.raw_ns, own.log_ns) for topic, own in contents.index.items()}
    if topics.odometry:
        poses = contents.kept[topics.odometry]
        times[topics.odometry] = topic_times([bag.stamp_ns(m) for m in poses], [m.log_ns for m in poses])
    return times


def split_at_jumps(times: Mapping[str, TopicTimes]) -> list[dict[str, TopicTimes]]:
    """Return the times of each stretch between jumps of the clock."""
    cuts = []
    for own in times.values():
        _, jumps, _ = usable_stamps(own.stamp_ns.tolist(), own.log_ns.tolist())
        cuts += own.log_ns[jumps].tolist()

    def within(own: TopicTimes, first: int, last: int) -> TopicTimes:
        inside = (own.log_ns >= first) & (own.log_ns < last)
        return TopicTimes(own.stamp_ns[inside], own.log_ns[inside])

    return [{topic: within(own, *ends) for topic, own in times.items()} for ends in _stretches(sorted(cuts))]


def topic_times(stamp_ns: Sequence[int], log_ns: Sequence[int]) -> TopicTimes:
    return TopicTimes(np.array(stamp_ns, np.int64), np.array(log_ns, np.int64))


def find_topics(bag: BagReader, options: BagOptions) -> BagTopics:
    """Return the topics that were given, or those found; raises RecordingError naming the bag and what is wrong with it."""
    try:
        cameras = options.rig.names if options.rig else ()
        return options.topics or detect_topics(bag.topics, options.profile, cameras)
    except RecordingError as error:
        raise RecordingError(f"{bag.path}: {'; '.join([str(error), *bag.notes])}") from error


class IndexedBag:
    """An open bag whose messages are indexed, divided where a clock jumps back or a calibration changes.

    parts: into how many stretches it falls, of which `options.part` is one.
    skipped: messages that were left out, by topic and reason; of the whole bag, told by its first part.
    """

    def __init__(self, path: Path | str, options: BagOptions | None = None) -> None:
        """Read a bag; raises RecordingError saying which topic or count is wrong."""
        self.options = options or BagOptions()
        self._bag = BagReader(path)
        self.topics = self._find_topics()
        self._scan = self._usable(_contents(self._bag, self.topics))
        self._stretches = _stretches(self._scan.cuts)
        self.parts = len(self._stretches)
        self.skipped = dict(self._scan.skipped) if self.options.part == 0 else {}

    def close(self) -> None:
        """Close the bag."""
        self._bag.close()

    @property
    def pose_type(self) -> str:
        """Type of the messages that tell the vehicle's poses."""
        topic = self.topics.odometry
        return self._bag.topics[topic] if topic else ""

    def _find_topics(self) -> BagTopics:
        """Return the topics that were given, after a look whether they are there, or find them."""
        topics = find_topics(self._bag, self.options)
        absent = [topic for topic in topics.all if topic not in self._bag.topics]
        if absent:
            raise RecordingError(f"{self._bag.path}: no topic {absent}; topics are {listed(self._bag.topics)}")
        rig = self.options.rig
        if rig is not None and set(rig.names) != set(topics.images):
            raise RecordingError(
                f"{self._bag.path}: the rig has cameras {list(rig.names)}, the bag {sorted(topics.images)}"
            )
        bare = sorted(set(topics.images) - set(topics.infos))
        if rig is None and bare:
            raise RecordingError(
                f"{self._bag.path}: no camera_info of {bare} (profile {topics.profile}); "
                "give their calibration as a rig file, with --rig"
            )
        return topics

    @property
    def notes(self) -> list[str]:
        """What a user should know of the bag and of how its topics were found."""
        return [*self._bag.notes, *self.topics.notes]

    def _usable(self, contents: Contents) -> _Scan:
        """Correct stamps and sort out the messages that can be used."""
        index: dict[str, Index] = {}
        kept, skipped = dict(contents.kept), Counter[str]()
        cuts: list[int] = []
        for topic in () if self.options.rig else self.topics.infos.values():
            kept[topic], bare = self._calibrated(kept[topic])
            skipped[f"{topic}: not calibrated"] = bare
            cuts += self._changes(topic, kept[topic])
        for topic, raw in contents.index.items():
            correction = self.options.clock.get(topic)
            stamps = raw.raw_ns if correction is None else [correction.apply(n) for n in raw.raw_ns]
            keep, jumps, reasons = usable_stamps(raw.raw_ns, raw.log_ns)
            cuts += [raw.log_ns[i] for i in jumps]
            index[topic] = Index(raw.raw_ns, stamps, raw.log_ns).only(keep)
            skipped.update({f"{topic}: {reason}": n for reason, n in reasons.items()})
        if self.topics.odometry:
            topic = self.topics.odometry
            poses = kept[topic]
            stamps = [self._bag.stamp_ns(message) for message in poses]
            keep, jumps, reasons = usable_stamps(stamps, [message.log_ns for message in poses])
            cuts += [poses[i].log_ns for i in jumps]
            kept[topic] = [poses[i] for i in keep]
            skipped.update({f"{topic}: {reason}": n for reason, n in reasons.items()})
        return _Scan(index, kept, sorted(cuts), {k: n for k, n in sorted(skipped.items()) if n})

    def _calibrated(self, messages: Sequence[BagMessage]) -> tuple[Sequence[BagMessage], int]:
        """Leave out what a driver sends before it has its calibration, if it ever gets one; return also how many."""
        good = [message for message in messages if is_calibrated(self._bag.decode(message))]
        return (good, len(messages) - len(good)) if good else (messages, 0)

    def _changes(self, topic: str, messages: Sequence[BagMessage]) -> list[int]:
        """Return the log times at which the calibration on a topic becomes another.

        Raises RecordingError where it does so all the time: every stretch would be too short for a key frame.
        """
        keys = [calibration_key(self._bag.decode(message)) for message in messages]
        found = [m.log_ns for m, key, before in zip(messages[1:], keys[1:], keys, strict=False) if key != before]
        if any(
            late - early < (RESTLESS - 1) * JUMP_NS for early, late in zip(found, found[RESTLESS - 1 :], strict=False)
        ):
            raise RecordingError(
                f"{self._bag.path}: {topic}: the calibration changes {len(found)} times: do several publishers send it, or "
                "does the lens zoom? Give one calibration as a rig file, with --rig"
            )
        return found

    def _part(self) -> Contents:
        """Return what is in the chosen part; calibrations and fixed transforms hold from before."""
        if not 0 <= self.options.part < self.parts:
            raise RecordingError(f"{self._bag.path}: no part {self.options.part}, it has {self.parts}")
        first, last = self._stretches[self.options.part]
        index = {
            topic: entries.only([i for i, at in enumerate(entries.log_ns) if first <= at < last])
            for topic, entries in self._scan.index.items()
        }
        kept: dict[str, Sequence[BagMessage]] = {}
        for topic, messages in self._scan.kept.items():
            inside = [m for m in messages if first <= m.log_ns < last]
            if topic in self.topics.infos.values():
                inside = inside or [m for m in messages if m.log_ns < last][-1:]
            kept[topic] = messages if topic == self.topics.tf_static else inside
        return Contents(index, kept)


def _stretches(cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the log times [from, to) between cuts."""
    starts, ends = [-(2**62)], list[int]()
    for cut in cuts:
        if ends and cut - starts[-1] <= JUMP_NS:
            starts[-1] = cut  # the topics of one jump follow each other
        else:
            ends.append(cut)
            starts.append(cut)
    return list(zip(starts, [*ends, 2**62], strict=True))


def usable_stamps(
    stamp_ns: Sequence[int], log_ns: Sequence[int] | None = None
) -> tuple[list[int], list[int], dict[str, int]]:
    """Put the stamps of one topic, which come in bag order, in order of time.

    A message that comes late is put where it belongs. A clock that jumps back stays behind: what comes after a jump
    is a stretch of its own. log_ns: log times, which tell the two apart best.

    Returns: the messages to use, stretch after stretch in order of their stamps; the first messages after a jump; and
        how many were left out by reason: zero stamps, repeated ones.
    """
    stretches: list[list[int]] = [[]]
    jumps: list[int] = []
    last, reasons = 0, {"zero stamp": 0, "repeated stamp": 0}
    for i, stamp in enumerate(stamp_ns):
        if stamp <= 0:
            reasons["zero stamp"] += 1
            continue
        if stamp < last and _jumps_back(stamp_ns, log_ns, i, last):
            stretches.append([])
            jumps.append(i)
            last = 0
        stretches[-1].append(i)
        last = max(last, stamp)
    keep: list[int] = []
    for stretch in stretches:
        ordered = sorted(stretch, key=lambda i: (stamp_ns[i], i))
        unique = [i for n, i in enumerate(ordered) if n == 0 or stamp_ns[i] != stamp_ns[ordered[n - 1]]]
        reasons["repeated stamp"] += len(ordered) - len(unique)
        keep += unique
    return keep, jumps, reasons


AHEAD = 5
"""Messages that are looked at to tell a clock that jumped back from a message that comes late."""


def _jumps_back(stamp_ns: Sequence[int], log_ns: Sequence[int] | None, i: int, last: int) -> bool:
    """Whether the clock is behind from message i on, whose stamp is before the latest of those before it."""
    following = [k for k in range(i, min(i + 4 * AHEAD, len(stamp_ns))) if stamp_ns[k] > 0][: AHEAD + 1]
    if log_ns is None:
        return not any(stamp_ns[k] > last for k in following)
    step = last - stamp_ns[i]
    before = [k for k in range(max(0, i - 4 * AHEAD), i) if stamp_ns[k] > 0][-AHEAD:]
    lag_before = np.median([log_ns[k] - stamp_ns[k] for k in before])
    lag_after = np.median([log_ns[k] - stamp_ns[k] for k in following])
    return bool(lag_after - lag_before > step / 2)
