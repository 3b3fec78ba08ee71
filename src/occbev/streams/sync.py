"""Synchronisation: N stamped camera streams become frame sets of one instant, or counted drops.

It knows no ROS and opens no image: stamps are integer nanoseconds, payloads are opaque, and the
caller says what time it is. One camera is the anchor; each of its images is one key time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from occbev.config import bounded
from occbev.frame_job import FrameJob
from occbev.streams.camera_stream import IN_ORDER_AFTER, LEADS, LEARNED_MATCHES, CameraStream, StampedPayload

WARM_UP_GAPS, ANCHOR_GAPS = 2, 3
"""Gaps between stamps that must be seen before the period counts as known: of any cameras, of the anchor."""

SILENT_AFTER = 3
"""Sets in a row without a camera after which sets no longer wait for it."""

RELEARN_AFTER = 5
"""Consecutive sets without a camera that still delivers, after which its offset is learned again."""

LOCKED_SHARE, ACQUIRE_SHARE = 0.45, 0.5
"""Largest error of a match as a share of the anchor's period, with a known offset and before it is known."""

REMEMBERED_SETS = 16
"""Sets that have left whose arrival is kept, to learn from an image that comes too late for one."""

LONE_WITNESSES = 3
"""Consecutive stamps after which a jump in time is accepted from a camera that delivers alone."""

SHORTEST_PERIOD_NS = 1_000_000_000 // 60
"""Before the period is known, no camera is expected to deliver faster than this."""

FRESH_PERIODS = 1.5
"""Periods over which a camera's newest stamp tells what time it is."""

FUTURE_NS = 50_000_000
"""Stamps further ahead of the node's clock than this are in the future; half a period of them is refused."""


@dataclass(frozen=True)
class SyncConfig:
    """How images of different cameras are joined."""

    tolerance_s: float = bounded(0.05, 0.001, 1.0, live=True)
    """Largest time between an image and the expected stamp of its camera; never more than half a period."""
    timeout_s: float = bounded(0.2, 0.01, 10.0, live=True)
    """How long a frame set waits for the other cameras after the anchor image has arrived."""
    min_cameras: int = bounded(1, 1, 64, live=True)
    """Smallest number of cameras of a frame set; with fewer, nothing is published."""
    acquire_s: float = bounded(0.05, 0.001, 1.0, live=True)
    """Largest time between an image and the anchor image until offset and period of its camera are known."""
    reset_s: float = bounded(1.0, 0.1, 3600.0)
    """If a camera's stamps step back by more than this, it is a clock jump or a looped bag."""
    queue: int = bounded(30, 1, 1000, live=True)
    """Largest number of images of one camera that wait for an anchor image."""

    def __post_init__(self) -> None:
        for name in ("tolerance_s", "timeout_s", "acquire_s", "reset_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"sync.{name} is {getattr(self, name)}, must be positive")
        if self.min_cameras < 1 or self.queue < 1:
            raise ValueError(f"sync.min_cameras {self.min_cameras} and sync.queue {self.queue} must be at least 1")


@dataclass
class SyncStatistics:
    """Counts of every image and key time: `keys == complete + partial + sum(dropped_keys.values()) + pending`."""

    received: Counter[str] = field(default_factory=Counter)
    """Camera -> images pushed."""
    used: Counter[str] = field(default_factory=Counter)
    """Camera -> images that left in a set."""
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """Camera -> reason -> images that were not used."""
    keys: int = 0
    """Key times: anchor images, and images of a fallback anchor."""
    complete: int = 0
    """Sets put out with every camera."""
    partial: int = 0
    """Sets put out with cameras missing."""
    dropped_keys: Counter[str] = field(default_factory=Counter)
    """Reason -> key times without a set."""
    resets: Counter[str] = field(default_factory=Counter)
    """Reason -> resets."""


@dataclass
class _Key:
    """A key time that waits for its images. owner: the camera that made it, whose image never moves."""

    stamp_ns: int
    arrival_ns: int
    owner: str
    images: dict[str, StampedPayload]


class FrameSynchronizer:
    """Joins images to sets by an anchor camera and each camera's learned offset to it.

    An image belongs to the key time whose anchor stamp + offset it is nearest to. Offsets are medians of recent
    matches, so the tolerance can stay far below half a period even where cameras fire one after the other.
    A set leaves when it is complete or when nothing more can come for it: images of one camera come in order, and
    about as late as they lately did; at most `timeout_s` after its anchor came.
    The first ones, before the period is known, leave when they cannot be of two sweeps.
    A stamp that jumps by more than `reset_s` is used only when another camera or the node's clock confirms the jump, or,
    if only one camera delivers, its own next stamps. A camera whose clock runs ahead is refused.
    """

    def __init__(self, cameras: Sequence[str], anchor: str | None = None, config: SyncConfig | None = None) -> None:
        self.cameras = tuple(cameras)
        self.anchor = self.cameras[0] if anchor is None else anchor
        self.config = config or SyncConfig()
        if self.anchor not in self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"anchor {self.anchor!r} must be one of the cameras, each named once: {self.cameras}")
        self.period_ns: int | None = None
        self.retune(self.config)
        self.statistics = SyncStatistics(dropped={name: Counter() for name in self.cameras})
        self.epoch = 0
        self._streams: dict[str, CameraStream] = {name: CameraStream(name) for name in self.cameras}
        self._pending: list[_Key] = []
        self._anchor_gaps: deque[int] = deque(maxlen=LEARNED_MATCHES)
        self._first_gaps: list[int] = []
        self._last_ns: int | None = None
        self._last_owner = self.anchor
        self._started_ns: int | None = None
        self._earlier_pass: tuple[int, int] | None = None
        self._left: deque[tuple[int, int]] = deque(maxlen=REMEMBERED_SETS)
        self._provisional = False
        self._number = 0
        self._key_drops: deque[tuple[int, str]] = deque(maxlen=1000)

    def retune(self, config: SyncConfig) -> None:
        """Change the settings; raises ValueError if they ask for more cameras than there are."""
        if config.min_cameras > len(self.cameras):
            raise ValueError(f"sync.min_cameras {config.min_cameras} exceeds the {len(self.cameras)} cameras")
        self.config = config
        self._timeout_ns = int(config.timeout_s * 1e9)
        self._tolerance_ns = int(config.tolerance_s * 1e9)
        self._acquire_ns = int(config.acquire_s * 1e9)
        self._reset_ns = int(config.reset_s * 1e9)
        self._set_period(self.period_ns)

    def take_key_drops(self) -> list[tuple[int, str]]:
        """Return (stamp_ns, reason) of the key times that were dropped since the last call."""
        drops = list(self._key_drops)
        self._key_drops.clear()
        return drops

    @property
    def pending(self) -> int:
        """Key times that still wait."""
        return len(self._pending)

    @property
    def next_deadline_ns(self) -> int | None:
        """When `poll` will next have something to do, on the caller's clock."""
        return self._pending[0].arrival_ns + self._timeout_ns if self._pending else None

    def offset_ns(self, camera: str) -> int | None:
        """Learned offset of a camera to the anchor, None while it is unknown."""
        stream = self._streams[camera]
        return stream.offset_ns if stream.locked or camera == self.anchor else None

    def is_silent(self, camera: str) -> bool:
        """Whether sets no longer wait for this camera."""
        return not self._streams[camera].awaited

    def clock_problem(self, camera: str) -> str:
        """What is wrong with a camera's clock, "" if nothing is."""
        return self._streams[camera].clock_problem

    def describe_absence(self, camera: str) -> str:
        """Say why a camera has been missing from the last sets, "" if it was in one of them or its first is to come."""
        stream = self._streams[camera]
        return self._why_missing(stream) if stream.clock_problem or stream.misses >= SILENT_AFTER else ""

    def push(
        self, camera: str, stamp_ns: int, payload: Any, now_ns: int, clock_ns: int | None = None
    ) -> list[FrameJob]:
        """Take one image and return the sets that it completes, oldest first.

        now_ns: a clock that only goes forward. clock_ns: the clock that cameras should stamp by, None if unknown.
        Raises KeyError for an unknown camera.
        """
        stream = self._streams.get(camera)
        if stream is None:
            raise KeyError(f"camera {camera!r} is not one of {self.cameras}")
        self.statistics.received[camera] += 1
        if self._started_ns is None:
            self._started_ns = now_ns
        if self._earlier_pass is not None and self._is_straggler(stamp_ns, *self._earlier_pass):
            self._drop_anchored(camera, stamp_ns, "previous_pass")
            return []
        self._number += 1
        image = StampedPayload(stamp_ns, self._number, payload, now_ns)
        timeline_ns = self._timeline_ns(stream, now_ns)
        if self._is_out_of_time(stream, stamp_ns, timeline_ns):
            return self._suspect(stream, image, timeline_ns, clock_ns)
        self._drop_suspects(stream)
        if self._runs_ahead(stream, stamp_ns, timeline_ns, clock_ns):
            self._drop_anchored(camera, stamp_ns, "clock_ahead")
            return []
        finished = []
        if self._last_ns is not None and timeline_ns is not None and stamp_ns < self._last_ns - self._reset_ns:
            finished = self.reset("stamps_went_back", now_ns)  # a set of a wrong stamp far ahead has left
        return finished + self._admit(stream, image, now_ns)

    def _admit(self, stream: CameraStream, image: StampedPayload, now_ns: int) -> list[FrameJob]:
        """Take an image whose stamp is believed."""
        if image.stamp_ns in stream.recent:
            self._drop_anchored(stream.name, image.stamp_ns, "duplicate")
            return []
        self._observe(stream, image.stamp_ns, now_ns)
        self._accept(stream, image, now_ns)
        return self._release(now_ns)

    def _timeline_ns(self, stream: CameraStream, now_ns: int) -> int | None:
        """The median of the newest stamps of the other cameras that deliver now; None where there is none."""
        since_ns = now_ns - (FRESH_PERIODS * self.period_ns if self.period_ns else self._patience_ns)
        newest = [
            s.newest_ns
            for s in self._streams.values()
            if s.newest_ns is not None and s.arrival_ns is not None and s.arrival_ns >= since_ns and s is not stream
        ]
        return sorted(newest)[len(newest) // 2] if newest else None

    def _is_out_of_time(self, stream: CameraStream, stamp_ns: int, timeline_ns: int | None) -> bool:
        """Whether a stamp is so far from its camera's last one, or ahead of the other cameras, that time has jumped."""
        if timeline_ns is not None and stamp_ns > timeline_ns + self._reset_ns + 2 * (self.period_ns or 0):
            return True
        if stream.newest_ns is None or stamp_ns >= stream.newest_ns - self._reset_ns:
            return False
        if timeline_ns is not None and abs(stamp_ns - timeline_ns) <= self._reset_ns:
            stream.newest_ns = None  # that one was wrong, this one agrees with the others
            return False
        return True

    def _suspect(
        self, stream: CameraStream, image: StampedPayload, timeline_ns: int | None, clock_ns: int | None
    ) -> list[FrameJob]:
        """Hold an image whose stamp has jumped; start a new pass once the jump is confirmed."""
        stream.suspects.append(image)
        if self._has_witness(stream, image, timeline_ns, clock_ns):
            return self._jump(image)
        if len(stream.suspects) >= LONE_WITNESSES:
            self._drop_suspect(stream, stream.suspects.pop(0))
        known_ns = timeline_ns if timeline_ns is not None else stream.newest_ns
        if known_ns is not None:
            stream.clock_problem = _describe_clock(image.stamp_ns - known_ns, "other stamps")
        return []

    def _has_witness(
        self, stream: CameraStream, image: StampedPayload, timeline_ns: int | None, clock_ns: int | None
    ) -> bool:
        known_ns = timeline_ns if timeline_ns is not None else stream.newest_ns
        if clock_ns is not None and abs(image.stamp_ns - clock_ns) <= self._reset_ns:
            return True
        if clock_ns is not None and known_ns is not None and abs(known_ns - clock_ns) <= self._reset_ns:
            return False  # the clock speaks for the stamps before
        others = [s.suspects[-1] for s in self._streams.values() if s is not stream and s.suspects]
        return any(self._agree(image, other) for other in others) or (
            timeline_ns is None and len(stream.suspects) >= LONE_WITNESSES
        )

    def _agree(self, image: StampedPayload, other: StampedPayload) -> bool:
        """Whether two images out of time may be of one new timeline."""
        is_recent = image.arrival_ns - other.arrival_ns <= self._patience_ns
        return is_recent and abs(image.stamp_ns - other.stamp_ns) <= max(2 * (self.period_ns or 0), self._acquire_ns)

    def _jump(self, image: StampedPayload) -> list[FrameJob]:
        """Accept a jump in time: continue at this image with all held images."""
        held = self._take_suspects()
        newest_ns = max((s.newest_ns for s in self._streams.values() if s.newest_ns is not None), default=0)
        finished = []
        if image.stamp_ns < newest_ns:
            finished = self.reset("stamps_went_back", image.arrival_ns)
            self._earlier_pass = (min(other.stamp_ns for _, other in held), newest_ns)
        for stream, other in held:
            finished += self._admit(stream, other, image.arrival_ns)
        return finished

    def _take_suspects(self) -> list[tuple[CameraStream, StampedPayload]]:
        """Take all images that are held, in order of arrival."""
        held = [(stream, image) for stream in self._streams.values() for image in stream.suspects]
        for stream in self._streams.values():
            stream.suspects.clear()
        return sorted(held, key=lambda entry: entry[1].number)

    def _drop_suspects(self, stream: CameraStream) -> None:
        for image in stream.suspects:
            self._drop_suspect(stream, image)
        stream.suspects.clear()

    def _drop_suspect(self, stream: CameraStream, image: StampedPayload) -> None:
        is_old = stream.newest_ns is not None and image.stamp_ns < stream.newest_ns
        self._drop_anchored(stream.name, image.stamp_ns, "old_stamp" if is_old else "clock_ahead")

    def _runs_ahead(self, stream: CameraStream, stamp_ns: int, timeline_ns: int | None, clock_ns: int | None) -> bool:
        """Whether a camera's clock is ahead, so that its images would wait for key times to come and be joined late.

        It is where stamps lie in the future of the clock by which other cameras stamp. Without such a clock it is where
        stamps are ahead of those that the others have sent by more than any set would wait.
        """
        if timeline_ns is None or self.period_ns is None:
            stream.clock_problem = ""
            return False
        stream.leads.append(stamp_ns - timeline_ns)
        if (
            clock_ns is not None
            and abs(timeline_ns - clock_ns) <= self._reset_ns
            and timeline_ns <= clock_ns + FUTURE_NS
        ):
            lead_ns, against = stamp_ns - clock_ns, "the node's clock"
            is_ahead, is_refused = lead_ns > FUTURE_NS, lead_ns > max(FUTURE_NS, self.period_ns // 2)
        else:
            lead_ns, against = min(stream.leads), "the other cameras"
            is_ahead = is_refused = len(stream.leads) == LEADS and lead_ns > self._timeout_ns + self.period_ns
        stream.clock_problem = _describe_clock(lead_ns, against) if is_ahead else ""
        if is_refused:
            self._drop_many(stream, len(stream.pool), "clock_ahead")
            stream.pool.clear()
        return is_refused

    def poll(self, now_ns: int) -> list[FrameJob]:
        """Return the sets whose time is up."""
        return self._release(now_ns)

    def flush(self, now_ns: int) -> list[FrameJob]:
        """Put out what waits, as at the end of a recording."""
        finished = []
        while self._pending:
            finished += self._finish(self._pending.pop(0), now_ns)
        for stream in self._streams.values():
            self._drop_suspects(stream)
            self._drop_many(stream, len(stream.pool), "unmatched")
            stream.pool.clear()
        return finished

    def reset(self, reason: str, now_ns: int) -> list[FrameJob]:
        """Forget every stamp but no offset, as after a clock jump; return what could still be joined."""
        held = self._take_suspects()
        finished = self.flush(now_ns)
        self.statistics.resets[reason] += 1
        self.epoch += 1
        self._last_ns = None
        self._earlier_pass = None
        self._left.clear()
        for stream in self._streams.values():
            stream.newest_ns = None
            stream.recent.clear()
            stream.leads.clear()
        for stream, image in held:
            finished += self._admit(stream, image, now_ns)
        return finished

    def _is_straggler(self, stamp_ns: int, start_ns: int, end_ns: int) -> bool:
        """Whether an image belongs to the pass before the last reset: nearer to its end than to the new start."""
        if stamp_ns > end_ns + 2 * (self.period_ns or 0) or abs(stamp_ns - start_ns) < (end_ns - start_ns) // 2:
            # Past the old end it was one wrong stamp and no new pass; well into the new pass nothing old comes.
            if not start_ns <= stamp_ns <= start_ns + self._reset_ns // 2:
                self._earlier_pass = None
            return False
        return True

    def _observe(self, stream: CameraStream, stamp_ns: int, now_ns: int) -> None:
        """Learn the period from the gap to the camera's newest stamp."""
        gap = 0 if stream.newest_ns is None else stamp_ns - stream.newest_ns
        stream.recent.append(stamp_ns)
        stream.arrival_ns = now_ns
        stream.in_order = 0 if gap < 0 else stream.in_order + 1
        if gap < 0:
            return
        stream.newest_ns = stamp_ns
        if gap == 0:
            return
        gaps = self._anchor_gaps
        if stream.name == self.anchor:
            gaps.append(gap)
            if len(gaps) >= ANCHOR_GAPS:
                # The lower quartile stays right while most of the gaps are widened by lost images.
                self._set_period(sorted(gaps)[len(gaps) // 4])
        if len(gaps) < ANCHOR_GAPS and len(self._first_gaps) < LEARNED_MATCHES:
            self._first_gaps.append(gap)
            if len(self._first_gaps) >= WARM_UP_GAPS:
                self._begin_with_period(min(self._first_gaps))

    def _begin_with_period(self, period_ns: int) -> None:
        """Match everything again where the first guess of the period shrinks the windows."""
        if self.period_ns is not None and self.period_ns <= period_ns:
            return
        self._set_period(period_ns)
        for key in self._pending:
            for name in [n for n in key.images if n != key.owner]:
                insort(self._streams[name].pool, key.images.pop(name))
        for key in self._pending:
            self._collect(key)

    def _set_period(self, period_ns: int | None) -> None:
        """Take a period, and what follows from it and the settings."""
        self.period_ns = period_ns
        if period_ns is None:
            self._locked_ns, self._unlocked_ns = self._tolerance_ns, self._acquire_ns
            self._patience_ns = 10 * self._timeout_ns
        else:
            self._locked_ns = min(self._tolerance_ns, int(LOCKED_SHARE * period_ns))
            self._unlocked_ns = int(ACQUIRE_SHARE * period_ns)
            self._patience_ns = max(2 * self._timeout_ns, 3 * period_ns)

    def _window_ns(self, stream: CameraStream) -> int:
        """Furthest that an image of this camera may be from where it is expected."""
        return self._locked_ns if stream.matches or stream.name == self.anchor else self._unlocked_ns

    def _accept(self, stream: CameraStream, image: StampedPayload, now_ns: int) -> None:
        if stream.name == self.anchor:
            key = self._place(stream, image, fallback_only=True)
            if key is None:
                self._open_key(stream, image, image.stamp_ns, now_ns)
            else:
                self._take_over(key, image)
        elif self._place(stream, image) is None:
            if stream.name == self._fallback_anchor(now_ns):
                self._open_key(stream, image, image.stamp_ns - stream.offset_ns, now_ns)
            else:
                self._keep(stream, image)

    def _fallback_anchor(self, now_ns: int) -> str | None:
        """The camera whose images make key times while the anchor is silent: the first that delivers."""
        patience = self._patience_ns
        if now_ns - self._last_arrival(self.anchor) <= patience:
            return None
        return next(
            (n for n in self.cameras if n != self.anchor and now_ns - self._last_arrival(n) <= patience),
            None,
        )

    def _last_arrival(self, camera: str) -> int:
        arrival = self._streams[camera].arrival_ns
        return arrival if arrival is not None else (self._started_ns or 0)

    def _take_over(self, key: _Key, image: StampedPayload) -> None:
        """Give a key of a fallback anchor the exact stamp of the anchor's own image, where order allows it."""
        place = self._pending.index(key)
        before = self._pending[place - 1].stamp_ns if place else self._last_ns
        after = self._pending[place + 1].stamp_ns if place + 1 < len(self._pending) else None
        if (before is None or before < image.stamp_ns) and (after is None or image.stamp_ns < after):
            key.stamp_ns, key.owner = image.stamp_ns, self.anchor
        self._end_provision()

    def _end_provision(self) -> None:
        """Learn offsets again once the anchor delivers, if they were learned against a fallback anchor of unknown offset."""
        if self._provisional:
            self._provisional = False
            for stream in self._streams.values():
                stream.unlearn()

    def _open_key(self, stream: CameraStream, image: StampedPayload, stamp_ns: int, now_ns: int) -> None:
        """Make a key time of an image and give it what already waits."""
        if self._is_late_key(stamp_ns, stream.name):
            self._drop(stream.name, "late")
            self._drop_key(stamp_ns, "late")
            return
        if stream.name == self.anchor:
            self._end_provision()
        elif not stream.locked:
            self._provisional = True
        self.statistics.keys += 1
        key = _Key(stamp_ns, now_ns, stream.name, {stream.name: image})
        self._collect(key)
        place = len(self._pending)
        while place and self._pending[place - 1].stamp_ns > stamp_ns:
            place -= 1
        self._pending.insert(place, key)

    def _is_late_key(self, stamp_ns: int, owner: str) -> bool:
        if any(key.stamp_ns == stamp_ns for key in self._pending):
            return True
        if self._last_ns is None:
            return False
        # A set of the same instant may have left under a fallback anchor, whose key time is only an estimate.
        margin = 0 if owner == self._last_owner else (self.period_ns or 0) // 2
        return stamp_ns <= self._last_ns + margin

    def _collect(self, key: _Key) -> None:
        for name, stream in self._streams.items():
            if name not in key.images and stream.pool:
                image = stream.take_nearest(key.stamp_ns + stream.offset_ns, self._window_ns(stream))
                if image is not None:
                    key.images[name] = image

    def _place(self, stream: CameraStream, image: StampedPayload, fallback_only: bool = False) -> _Key | None:
        """Put an image into the waiting key that it is nearest to and return that; None if there is none for it."""
        keys = [k for k in self._pending if k.owner != self.anchor] if fallback_only else self._pending
        if not keys:
            return None
        expected = image.stamp_ns - stream.offset_ns
        key = keys[0]
        distance = abs(key.stamp_ns - expected)
        for other in keys[1:]:
            if abs(other.stamp_ns - expected) < distance:
                key, distance = other, abs(other.stamp_ns - expected)
        if distance > self._window_ns(stream):
            return None
        earlier = key.images.get(stream.name)
        if earlier is None:
            key.images[stream.name] = image
        elif key.owner != stream.name and distance < abs(earlier.stamp_ns - stream.offset_ns - key.stamp_ns):
            key.images[stream.name] = image
            self._keep(stream, earlier)
        else:
            return None
        return key

    def _keep(self, stream: CameraStream, image: StampedPayload) -> None:
        """Let an image wait for a key time to come, or drop it where none can come any more."""
        window = self._window_ns(stream)
        expected = image.stamp_ns - stream.offset_ns
        if self._last_ns is not None and self.period_ns is not None:
            if abs(expected - self._last_ns) <= (window if stream.locked else self.period_ns):
                stream.awaited = True  # it came for the last set, only too late: it is alive
            self._learn_delay(stream, image, window)
            if expected + window <= self._last_ns or (stream.locked and expected - window <= self._last_ns):
                self._drop(stream.name, "late")
                return
        insort(stream.pool, image)
        horizon = self._horizon_ns()
        stale = 0
        if horizon is not None:
            stale = bisect_left(stream.pool, (horizon + stream.offset_ns - window,))
        if stale:
            del stream.pool[:stale]
            self._drop_many(stream, stale, "unmatched")
        if len(stream.pool) > self.config.queue:
            stream.pool.pop(0)
            self._drop(stream.name, "queue_full")

    def _learn_delay(self, stream: CameraStream, image: StampedPayload, window_ns: int) -> None:
        """Learn the delay of a camera from an image that came too late for its set."""
        expected = image.stamp_ns - stream.offset_ns
        for stamp_ns, arrival_ns in self._left:
            if abs(stamp_ns - expected) <= window_ns:
                stream.delays.append(image.arrival_ns - arrival_ns)
                return

    def _horizon_ns(self) -> int | None:
        return self._pending[0].stamp_ns if self._pending else self._last_ns

    def _release(self, now_ns: int) -> list[FrameJob]:
        """Finish key times in order: each when nothing more is waited for, or when its time is up."""
        finished: list[FrameJob] = []
        while self._pending:
            key = self._pending[0]
            if not self._is_ready(key, now_ns) and now_ns - key.arrival_ns < self._timeout_ns:
                break
            finished += self._finish(self._pending.pop(0), now_ns)
        return finished

    def _is_ready(self, key: _Key, now_ns: int) -> bool:
        if len(key.images) == len(self.cameras):
            return self.period_ns is not None or _are_of_one_sweep(key, now_ns)
        if self.period_ns is None:  # a neighbouring sweep cannot be told apart yet
            return False
        if len(key.images) < self.config.min_cameras:
            return False
        for name, stream in self._streams.items():
            if stream.awaited and name not in key.images and self._may_come(stream, key, now_ns):
                return False
        return True

    def _may_come(self, stream: CameraStream, key: _Key, now_ns: int) -> bool:
        """Whether a camera's image for a key can still come: not after a later one, nor much later than lately."""
        last_ns = key.stamp_ns + stream.offset_ns + self._window_ns(stream)
        if stream.newest_ns is not None and stream.newest_ns > last_ns and stream.in_order >= IN_ORDER_AFTER:
            return False
        return now_ns - key.arrival_ns <= stream.patience_ns(self._timeout_ns)

    def _finish(self, key: _Key, now_ns: int) -> list[FrameJob]:
        """Turn a key into a set, or into a counted drop where too few cameras came."""
        self._last_ns, self._last_owner = key.stamp_ns, key.owner
        self._left.append((key.stamp_ns, key.arrival_ns))
        missing = {n: self._miss(s, now_ns) for n, s in self._streams.items() if n not in key.images}
        if len(key.images) < self.config.min_cameras:
            self.statistics.dropped_keys["too_few_cameras"] += 1
            self._key_drops.append((key.stamp_ns, "too_few_cameras"))
            for name in key.images:
                self.statistics.dropped[name]["too_few_cameras"] += 1
            return []
        for name, image in key.images.items():
            self.statistics.used[name] += 1
            stream = self._streams[name]
            stream.misses, stream.awaited = 0, True
            stream.delays.append(image.arrival_ns - key.arrival_ns)
            if name not in (self.anchor, key.owner):  # the owner's stamp made the key time
                stream.learn(image.stamp_ns - key.stamp_ns)
        if missing:
            self.statistics.partial += 1
        else:
            self.statistics.complete += 1
        present = {name: key.images[name] for name in self.cameras if name in key.images}
        images = {name: image.payload for name, image in present.items()}
        stamps_ns = {name: image.stamp_ns for name, image in present.items()}
        return [FrameJob(key.stamp_ns, images, stamps_ns, missing, self.epoch, key.arrival_ns, now_ns)]

    def _why_missing(self, stream: CameraStream) -> str:
        if stream.clock_problem:
            return stream.clock_problem
        if stream.arrival_ns is None:
            return "no image received yet"
        if stream.misses > SILENT_AFTER:
            return f"no matching image for {stream.misses} sets{self._describe_lag(stream)}"
        return f"no image within {self._window_ns(stream) / 1e6:.0f} ms of its expected time"

    def _describe_lag(self, stream: CameraStream) -> str:
        """Say how far a camera's newest stamp is from the last key time."""
        if stream.newest_ns is None or self._last_ns is None:
            return ""
        lag_s = (self._last_ns - stream.newest_ns) / 1e9
        return f"; its newest stamp is {abs(lag_s):.2f} s {'older' if lag_s > 0 else 'newer'} than the last key time"

    def _miss(self, stream: CameraStream, now_ns: int) -> str:
        """Note that a set was completed without this camera, and return why."""
        reason = self._why_missing(stream)
        stream.misses += 1
        silent_ns = now_ns - self._last_arrival(stream.name)
        if stream.misses >= SILENT_AFTER and silent_ns > (SILENT_AFTER + 1) * (self.period_ns or 0):
            stream.awaited = False
        still_delivers = stream.arrival_ns is not None and now_ns - stream.arrival_ns < 2 * (self.period_ns or 0)
        if stream.misses % RELEARN_AFTER == 0 and still_delivers and stream.name != self.anchor:
            stream.unlearn()
        return reason

    def _drop_anchored(self, camera: str, stamp_ns: int, reason: str) -> None:
        """Drop an image before it was looked at; an anchor's is a key time as well."""
        self._drop(camera, reason)
        if camera == self.anchor:
            self._drop_key(stamp_ns, reason)

    def _drop(self, camera: str, reason: str) -> None:
        self.statistics.dropped[camera][reason] += 1

    def _drop_key(self, stamp_ns: int, reason: str) -> None:
        self.statistics.keys += 1
        self.statistics.dropped_keys[reason] += 1
        self._key_drops.append((stamp_ns, reason))

    def _drop_many(self, stream: CameraStream, count: int, reason: str) -> None:
        if count:
            self.statistics.dropped[stream.name][reason] += count


def _are_of_one_sweep(key: _Key, now_ns: int) -> bool:
    """Whether no camera has an image nearer to a key time than those of its complete set; the period is not known.

    So it is where all cameras were heard for twice as long as the furthest image is away: a camera whose neighbouring
    image is nearer than that delivers so fast that it would have been heard twice.
    """
    images = key.images.values()
    stamps_ns, arrivals_ns = [image.stamp_ns for image in images], [image.arrival_ns for image in images]
    furthest_ns = max(abs(stamp_ns - key.stamp_ns) for stamp_ns in stamps_ns)
    span_ns, begin_ns = max(stamps_ns) - min(stamps_ns), min(arrivals_ns)
    # A recording may be played slowly or fast: time since the first image is taken at the pace of the stamps.
    arrived_ns = max(span_ns, max(arrivals_ns) - begin_ns)
    heard_ns = max(span_ns, span_ns * (now_ns - begin_ns) // arrived_ns) if arrived_ns else 0
    return 2 * furthest_ns <= max(heard_ns, SHORTEST_PERIOD_NS)


def _describe_clock(difference_ns: int, against: str) -> str:
    """Say by how much a camera's clock is off."""
    way = "ahead of" if difference_ns > 0 else "behind"
    return f"its stamps are {abs(difference_ns) / 1e9:.2f} s {way} {against}: set its clock (PTP, NTP)"
