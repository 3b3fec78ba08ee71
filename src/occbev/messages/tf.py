"""Coordinate frames over time: a transform buffer with the names and errors of tf2_ros, in plain Python.

Calibration and ego poses come from here on every tier; where tf2 is installed both agree to 1e-9.
"""

from __future__ import annotations

import math
import threading
import time as clock
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import invert_transform, make_transform, rotation_from_xyzw

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]

UNIT_TOLERANCE = 1e-2
"""Furthest that a quaternion's norm may be from 1."""

MAX_FRAMES = 10_000
"""Most frames that are kept; a publisher that invents names without end cannot fill the memory."""

SAME_PLACE = 0.01, math.radians(0.1)
"""Metres and radians by which publishers of one static transform may differ."""

WORLD_FRAMES = ("odom", "map", "world", "local")
"""Names of frames that do not move, in the order in which they are preferred where the tree does not tell."""

MAX_DEPTH = 100
"""Longest chain of frames; a longer one is a loop."""


class TransformException(Exception):
    """No transform can be given."""


class LookupException(TransformException):
    """A frame is not known."""


class ConnectivityException(TransformException):
    """Both frames are known but no chain joins them."""


class ExtrapolationException(TransformException):
    """The chain has no data at the requested time."""


class InvalidArgumentException(TransformException):
    """A transform that cannot be stored, or a lookup that cannot be meant."""


@dataclass(frozen=True)
class _Sample:
    """Pose of a child frame in its parent: child2parent as translation and quaternion x, y, z, w."""

    parent: str
    translation: Vector
    rotation: Quaternion

    def matrix(self) -> NDArray[np.float64]:
        return make_transform(rotation_from_xyzw(self.rotation), self.translation)

    def apart(self, other: _Sample) -> tuple[float, float]:
        """How far another place is away, in metres and radians."""
        dot = abs(sum(a * b for a, b in zip(self.rotation, other.rotation, strict=True)))
        norms = math.hypot(*self.rotation) * math.hypot(*other.rotation)
        return math.dist(self.translation, other.translation), 2 * math.acos(min(1.0, dot / norms))

    def described(self) -> str:
        """In words, to a millimetre."""
        place, turn = (", ".join(f"{v:.3f}" for v in values) for values in (self.translation, self.rotation))
        return f"({place}) turned by ({turn}) in {self.parent!r}"


@dataclass
class _Frame:
    """History of one child frame; a static frame has one sample and no stamps."""

    static: bool = False
    stamps: list[int] = field(default_factory=list)
    samples: list[_Sample] = field(default_factory=list)
    static_matrix: NDArray[np.float64] | None = None


def to_nanoseconds(time: Any) -> int:
    """Read a time given as int ns, rclpy Time or builtin_interfaces Time."""
    if hasattr(time, "nanoseconds"):
        return int(time.nanoseconds)
    if hasattr(time, "sec"):
        return int(time.sec) * 1_000_000_000 + int(time.nanosec)
    return int(time)


def clean_frame(name: str) -> str:
    """Strip the leading slash that ROS 1 frames had."""
    return name[1:] if name.startswith("/") else name


class Buffer:
    """Frames with `cache_s` seconds of history, safe to use from several threads."""

    def __init__(self, cache_s: float = 10.0) -> None:
        self._cache_ns = int(cache_s * 1e9)
        self._frames: dict[str, _Frame] = {}
        self._parents: set[str] = set()
        self._changed = threading.Condition(threading.RLock())
        self.static_version = 0
        """Counts changes of static transforms: what was composed of them is good for one value of it."""
        self._conflicts: dict[str, str] = {}

    def set_transform(self, transform: Any, authority: str = "") -> None:
        """Store a geometry_msgs/TransformStamped; raises InvalidArgumentException for a bad one."""
        self._store(transform, authority, static=False)

    def set_transform_static(self, transform: Any, authority: str = "") -> None:
        """Store a transform that holds at all times; it beats dynamic ones of the same child."""
        self._store(transform, authority, static=True)

    def add_message(self, message: Any, static: bool, authority: str = "") -> list[str]:
        """Store the good transforms of a tf2_msgs/TFMessage; return what is wrong with the others."""
        problems = []
        for transform in message.transforms:
            try:
                self._store(transform, authority, static)
            except InvalidArgumentException as error:
                problems.append(str(error))
        return problems

    def clear(self, keep_static: bool = True) -> None:
        """Forget the history, as after a backward clock jump."""
        with self._changed:
            self._frames = {n: f for n, f in self._frames.items() if keep_static and f.static}
            self._parents = {f.samples[0].parent for f in self._frames.values()}

    def clear_frame(self, child: str) -> None:
        """Forget the history of one moving frame, as after a step back of its stamps."""
        with self._changed:
            frame = self._frames.get(clean_frame(child))
            if frame is not None and not frame.static:
                del self._frames[clean_frame(child)]
                self._parents = {f.samples[-1].parent for f in self._frames.values()}

    def frames(self) -> tuple[str, ...]:
        """All frame names known."""
        with self._changed:
            return tuple(sorted(self._parents | set(self._frames)))

    def take_conflicts(self) -> dict[str, str]:
        """Return the frames that were said to be at two places since the last call; the newest statement holds."""
        with self._changed:
            conflicts, self._conflicts = self._conflicts, {}
            return conflicts

    def newest_ns(self, child: str) -> int | None:
        """Stamp of the newest dynamic transform of a child frame."""
        with self._changed:
            frame = self._frames.get(clean_frame(child))
            return frame.stamps[-1] if frame and frame.stamps else None

    def lookup_matrix(
        self, target_frame: str, source_frame: str, time: Any = 0, timeout: Any = 0
    ) -> NDArray[np.float64]:
        """Return source2target (4, 4).

        time: ns or a ROS time, 0 for the latest that the whole chain has. timeout: ns or a ROS
        duration; never wait in a callback of a single-threaded executor, nothing could arrive.
        Raises LookupException, ConnectivityException or ExtrapolationException.
        """
        return self._lookup_stamped(target_frame, source_frame, time, timeout)[0]

    def can_transform(self, target_frame: str, source_frame: str, time: Any = 0, timeout: Any = 0) -> bool:
        """Whether `lookup_matrix` would succeed."""
        try:
            self._lookup_stamped(target_frame, source_frame, time, timeout)
        except TransformException:
            return False
        return True

    def latest_ns(self, target_frame: str, source_frame: str) -> int | None:
        """Newest stamp that the whole chain has: 0 where it is static, None where there is none."""
        try:
            return self._lookup_stamped(target_frame, source_frame, 0, 0)[1]
        except TransformException:
            return None

    def lookup_nearest(self, target_frame: str, source_frame: str, stamp_ns: int) -> NDArray[np.float64]:
        """Return source2target (4, 4) at a stamp, or at the nearest one that the whole chain has; raises as `lookup_matrix`."""
        with self._changed:
            histories = self._histories(clean_frame(target_frame), clean_frame(source_frame))
            if histories:
                stamp_ns = min(max(stamp_ns, *(h[0] for h in histories)), *(h[-1] for h in histories))
            return self.lookup_matrix(target_frame, source_frame, stamp_ns)

    def moves(self, target_frame: str, source_frame: str) -> bool:
        """Whether a frame has moved in the other over the time that is kept."""
        with self._changed:
            names = self._names_between(clean_frame(target_frame), clean_frame(source_frame))
            return any(self._moves(name) for name in names if name in self._frames)

    def is_static(self, target_frame: str, source_frame: str) -> bool:
        """Whether only static transforms lead from one frame to the other: they hold for one `static_version`."""
        with self._changed:
            target, source = clean_frame(target_frame), clean_frame(source_frame)
            between = self._between_frames(target, source)
            joined = self._chain(target, None)[-1] == self._chain(source, None)[-1]
            return joined and bool(between) and all(frame.static for frame in between)

    def chain(self, target_frame: str, source_frame: str) -> list[str]:
        """Return the frames whose transforms to their parents lead from one frame to the other, as they hang now."""
        with self._changed:
            return self._names_between(clean_frame(target_frame), clean_frame(source_frame))

    def world_frame(self, base_frame: str) -> str | None:
        """Return the frame that a vehicle's base moves in, None if it moves in none.

        It is the one above the lowest transform over the base that really moves: `odom` of map -> odom -> base. Where
        nothing over the base moves, a frame below it with a usual name will do.
        """
        with self._changed:
            chain = self._chain(clean_frame(base_frame), None)
            moving = [(n, above) for n, above in zip(chain, chain[1:], strict=False) if not self._frames[n].static]
            if moving:
                return next((above for name, above in moving if self._moves(name)), moving[-1][1])
            below = [name for name in WORLD_FRAMES if self._stamps_between(name, base_frame)]
            return below[0] if below else None

    def stamps(self, target_frame: str, source_frame: str) -> list[int]:
        """Return the stamps of all moving transforms that lead from one frame to the other, where all of them reach."""
        with self._changed:
            return self._stamps_between(clean_frame(target_frame), clean_frame(source_frame))

    def _moves(self, name: str) -> bool:
        samples = self._frames[name].samples
        return any(sample != samples[0] for sample in samples)

    def _stamps_between(self, target: str, source: str) -> list[int]:
        if not {target, source} <= self._parents | set(self._frames):
            return []
        histories = self._histories(target, source)
        if not histories or self._chain(target, None)[-1] != self._chain(source, None)[-1]:
            return []
        first, last = max(h[0] for h in histories), min(h[-1] for h in histories)
        return sorted({stamp for h in histories for stamp in h if first <= stamp <= last})

    def _histories(self, target: str, source: str) -> list[list[int]]:
        """Return the stamps of each moving transform that leads from one frame to the other."""
        return [frame.stamps for frame in self._between_frames(target, source) if frame.stamps]

    def _store(self, transform: Any, authority: str, static: bool) -> None:
        parent, child, sample = _check(transform, authority)
        with self._changed:
            frame = self._frames.get(child) or _Frame(static)
            kept = static or not frame.static
            if kept:
                self._refuse_above_bound(parent, child)
            self._note_conflict(child, frame, sample, static)
            if not kept:
                return
            if static:
                self._store_static(frame, sample)
            else:
                self._store_dynamic(frame, to_nanoseconds(transform.header.stamp), sample)
            self._frames[child] = frame
            self._parents.add(parent)
            self._changed.notify_all()

    def _refuse_above_bound(self, parent: str, child: str) -> None:
        for name, known in ((child, self._frames), (parent, self._parents)):
            if name not in known and len(known) >= MAX_FRAMES:
                raise InvalidArgumentException(
                    f"transform {parent!r} -> {child!r}: {MAX_FRAMES} frames are known already"
                )

    def _note_conflict(self, child: str, frame: _Frame, sample: _Sample, static: bool) -> None:
        """Remember a frame that two publishers place differently; a moving frame may move, but not change parents."""
        before = frame.samples[-1] if frame.samples else None
        if before is None or (frame.static != static and before.parent == sample.parent):
            return
        if frame.static and static and before.parent == sample.parent:
            apart, turned = before.apart(sample)
            if apart <= SAME_PLACE[0] and turned <= SAME_PLACE[1]:
                return
            distance = f"{apart * 100:.1f} cm and {math.degrees(turned):.2f} degrees apart"
            how = f"static at {before.described()}, then at {sample.described()}, {distance}"
        elif before.parent != sample.parent:
            how = f"a child of {before.parent!r}, then of {sample.parent!r}"
        else:
            return
        kept = "the static one holds" if frame.static and not static else "the newest holds"
        self._conflicts[child] = f"frame {child!r} was {how}: do two publishers send it? {kept}"

    def _store_static(self, frame: _Frame, sample: _Sample) -> None:
        if frame.static and frame.samples == [sample]:
            return
        frame.static, frame.stamps, frame.samples = True, [], [sample]
        frame.static_matrix = sample.matrix()
        self.static_version += 1

    def _store_dynamic(self, frame: _Frame, stamp_ns: int, sample: _Sample) -> None:
        if frame.stamps and stamp_ns <= frame.stamps[-1]:
            place = bisect_left(frame.stamps, stamp_ns)
            too_old = stamp_ns < frame.stamps[-1] - self._cache_ns
            if too_old or frame.stamps[place] == stamp_ns:
                return
            frame.stamps.insert(place, stamp_ns)
            frame.samples.insert(place, sample)
            return
        frame.stamps.append(stamp_ns)
        frame.samples.append(sample)
        if frame.stamps[0] < stamp_ns - self._cache_ns:
            stale = bisect_left(frame.stamps, stamp_ns - self._cache_ns)
            del frame.stamps[:stale], frame.samples[:stale]

    def _lookup_stamped(
        self, target_frame: str, source_frame: str, time: Any, timeout: Any
    ) -> tuple[NDArray[np.float64], int]:
        target, source = clean_frame(target_frame), clean_frame(source_frame)
        deadline = clock.monotonic() + to_nanoseconds(timeout) / 1e9
        with self._changed:
            while True:
                try:
                    return self._lookup(target, source, to_nanoseconds(time))
                except TransformException:
                    left = deadline - clock.monotonic()
                    if left <= 0:
                        raise
                    self._changed.wait(left)

    def _lookup(self, target: str, source: str, stamp_ns: int) -> tuple[NDArray[np.float64], int]:
        for name in (target, source):
            if name not in self._frames and name not in self._parents:
                known = ", ".join(sorted(self._parents | set(self._frames))) or "none"
                raise LookupException(f"frame {name!r} does not exist; known frames: {known}")
        if target == source:
            return np.eye(4), stamp_ns
        if stamp_ns == 0:
            stamp_ns = self._latest_common(target, source)
        up, chain = self._chain(source, stamp_ns, stop=target), None
        if up[-1] != target:
            chain = self._chain(target, stamp_ns)
        if chain is None:
            return self._compose(up, stamp_ns), stamp_ns
        common = next((name for name in up if name in set(chain)), None)
        if common is None:
            raise ConnectivityException(
                f"{target!r} and {source!r} are in different trees: {target!r} hangs from "
                f"{chain[-1]!r}, {source!r} from {up[-1]!r}"
            )
        source2common = self._compose(up[: up.index(common) + 1], stamp_ns)
        target2common = self._compose(chain[: chain.index(common) + 1], stamp_ns)
        return invert_transform(target2common) @ source2common, stamp_ns

    def _latest_common(self, target: str, source: str) -> int:
        """Return the newest stamp that every dynamic frame of both chains has reached, 0 if none is dynamic."""
        newest = [f.stamps[-1] for f in self._between_frames(target, source) if f.stamps]
        return min(newest, default=0)

    def _between_frames(self, target: str, source: str) -> list[_Frame]:
        """Return the frames whose transforms lead from one to the other, as they hang now."""
        return [self._frames[n] for n in self._names_between(target, source) if n in self._frames]

    def _names_between(self, target: str, source: str) -> list[str]:
        up, down = self._chain(source, None), self._chain(target, None)
        shared = set(up) & set(down)
        return [n for chain in (up, down) for n in chain if n not in shared]

    def _chain(self, name: str, stamp_ns: int | None, stop: str | None = None) -> list[str]:
        """Return the frames from `name` upwards to the root or to `stop`, at one time (None: newest)."""
        chain = [name]
        while name != stop and name in self._frames and self._frames[name].samples:
            frame = self._frames[name]
            index = -1
            if stamp_ns is not None and len(frame.stamps) > 1:
                index = max(0, bisect_right(frame.stamps, stamp_ns) - 1)
            name = frame.samples[index].parent
            chain.append(name)
            if len(chain) > MAX_DEPTH:
                raise LookupException(f"the frames above {chain[0]!r} form a loop: {chain[:8]} ...")
        return chain

    def _compose(self, chain: list[str], stamp_ns: int) -> NDArray[np.float64]:
        """Return chain[0] -> chain[-1] at one time."""
        product = np.eye(4)
        for name in chain[:-1]:
            product = self._at(name, stamp_ns) @ product
        return product

    def _at(self, name: str, stamp_ns: int) -> NDArray[np.float64]:
        """Return `name` -> its parent at one time."""
        frame = self._frames[name]
        if frame.static_matrix is not None:
            return frame.static_matrix
        stamps = frame.stamps
        if stamp_ns < stamps[0] or stamp_ns > stamps[-1]:
            side = "past" if stamp_ns < stamps[0] else "future"
            raise ExtrapolationException(
                f"lookup would require extrapolation into the {side} for {name!r} in "
                f"{frame.samples[-1].parent!r}: requested {stamp_ns} ns, earliest {stamps[0]} ns, "
                f"latest {stamps[-1]} ns"
            )
        place = bisect_left(stamps, stamp_ns)
        if stamps[place] == stamp_ns:
            return frame.samples[place].matrix()
        before, after = frame.samples[place - 1], frame.samples[place]
        if before.parent != after.parent:  # re-parented in between: the older one still holds
            return before.matrix()
        share = (stamp_ns - stamps[place - 1]) / (stamps[place] - stamps[place - 1])
        return _between(before, after, share).matrix()


def _check(transform: Any, authority: str) -> tuple[str, str, _Sample]:
    """Read a TransformStamped, refusing what would spoil the tree."""
    parent = clean_frame(transform.header.frame_id)
    child = clean_frame(transform.child_frame_id)
    t, q = transform.transform.translation, transform.transform.rotation
    sample = _Sample(parent, (t.x, t.y, t.z), (q.x, q.y, q.z, q.w))
    where = f"transform {parent!r} -> {child!r}" + (f" from {authority}" if authority else "")
    if not parent or not child:
        raise InvalidArgumentException(f"{where}: a frame has no name")
    if parent == child:
        raise InvalidArgumentException(f"{where}: a frame cannot be its own parent")
    if not all(map(math.isfinite, sample.translation + sample.rotation)):
        raise InvalidArgumentException(f"{where}: holds NaN or infinity")
    norm = math.sqrt(sum(v * v for v in sample.rotation))
    if abs(norm - 1) > UNIT_TOLERANCE:
        raise InvalidArgumentException(f"{where}: quaternion {sample.rotation} has norm {norm:.4f}, must be 1")
    return parent, child, sample


def _between(before: _Sample, after: _Sample, share: float) -> _Sample:
    """Blend two poses: linear translation, shortest-arc slerp."""
    if before == after:  # exactly, so that a rig that stands still stays the same one
        return before
    t = tuple(a + share * (b - a) for a, b in zip(before.translation, after.translation, strict=True))
    dot = sum(a * b for a, b in zip(before.rotation, after.rotation, strict=True))
    sign = -1.0 if dot < 0 else 1.0
    angle = math.acos(min(1.0, abs(dot)))
    sine = math.sin(angle)
    if sine < 1e-9:
        w0, w1 = 1.0 - share, share
    else:
        w0, w1 = math.sin((1 - share) * angle) / sine, math.sin(share * angle) / sine
    q = [w0 * a + sign * w1 * b for a, b in zip(before.rotation, after.rotation, strict=True)]
    norm = math.sqrt(sum(v * v for v in q))
    x, y, z, w = (v / norm for v in q)
    return _Sample(before.parent, (t[0], t[1], t[2]), (x, y, z, w))
