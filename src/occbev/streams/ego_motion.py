"""Where the vehicle was at each exposure: odometry, or TF, over the last seconds."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from occbev.ego_signals import EgoSignals, TwistHistory
from occbev.messages.tf import Buffer, TransformException
from occbev.streams.parameters import EgoMotionParameters
from occbev.trajectory import PoseError, Trajectory, blend_poses

Twist = tuple[NDArray[np.float64], NDArray[np.float64]]

KEPT_NS = 10_000_000_000
MARGIN_NS = 300_000_000
"""Poses this far around the wanted stamps are enough to interpolate between."""

EXTRAPOLATE_NS = 100_000_000
"""Poses are extrapolated this far beyond the newest, at the speed of as long before."""

MAX_SPEED, JUMP_M = 70.0, 1.0
"""Metres per second, and metres beside that; an odometry pose that moves further has jumped."""

REACH_NS = 1_000_000_000
"""Poses that end this long before a stamp have stopped: what comes next will not reach it in time."""


class EgoPoses:
    """Buffers ego poses and answers with those at given stamps; safe to use from several threads."""

    def __init__(self, parameters: EgoMotionParameters, buffer: Buffer, base_frame: str, reset_s: float = 1.0) -> None:
        """reset_s: step back of odometry's stamps that counts as a clock jump or a looped bag."""
        self._parameters, self._buffer, self._base = parameters, buffer, base_frame
        self._reset_ns = int(reset_s * 1e9)
        self._stamps: list[int] = []
        self._poses: list[NDArray[np.float64]] = []
        self._twists = TwistHistory()
        self._changed = threading.Condition(threading.RLock())
        self.extrapolated_s = 0.0
        """How far the last poses that were asked for lie beyond the newest that came."""

    def add(self, stamp_ns: int, ego2global: NDArray[np.float64], twist: Twist | None = None) -> str:
        """Take one odometry pose; one that is not newer than the last is ignored, a long step back starts again.

        twist: velocity and rotation rate (3,) in base_link, None where they are not known.

        Returns: what is wrong where the pose jumped from the one before; what was before is forgotten then.
        """
        with self._changed:
            if self._stamps and stamp_ns < self._stamps[-1] - self._reset_ns:
                self.clear()
            if self._stamps and stamp_ns <= self._stamps[-1]:
                return ""
            problem = self._find_jump(stamp_ns, ego2global)
            if problem:
                self.clear()
            self._stamps.append(stamp_ns)
            self._poses.append(ego2global)
            if twist is not None:
                self._twists.add(stamp_ns, *twist)
            if self._stamps[0] < stamp_ns - KEPT_NS:
                stale = bisect_left(self._stamps, stamp_ns - KEPT_NS)
                del self._stamps[:stale], self._poses[:stale]
            self._changed.notify_all()
        return problem

    def _find_jump(self, stamp_ns: int, ego2global: NDArray[np.float64]) -> str:
        if not self._stamps:
            return ""
        seconds = (stamp_ns - self._stamps[-1]) / 1e9
        moved = math.dist(ego2global[:3, 3], self._poses[-1][:3, 3])
        if moved <= MAX_SPEED * seconds + JUMP_M:
            return ""
        return f"the pose jumps by {moved:.1f} m in {seconds:.3f} s: motion begins anew there"

    def clear(self) -> None:
        """Forget all poses, as after a clock jump."""
        with self._changed:
            self._stamps.clear()
            self._poses.clear()
            self._twists.clear()
            self._changed.notify_all()

    @property
    def source(self) -> str:
        """Where poses come from now: odometry, tf or none."""
        wanted = self._parameters.source
        if wanted != "auto":
            return wanted
        if self._stamps:
            return "odometry"
        known = self._buffer.can_transform(self._parameters.fixed_frame, self._base)
        return "tf" if known else "none"

    def wait_until(self, stamp_ns: int, timeout_s: float) -> None:
        """Wait until odometry or TF has reached a stamp, at most `timeout_s`; only where poses are on their way to it."""
        source = self.source
        if source == "odometry":
            with self._changed:
                if self._stamps and _is_near(self._stamps[-1], stamp_ns):
                    self._changed.wait_for(lambda: not self._stamps or self._stamps[-1] >= stamp_ns, timeout_s)
        elif source == "tf":
            fixed, timeout_ns = self._parameters.fixed_frame, int(timeout_s * 1e9)
            newest_ns = self._buffer.latest_ns(fixed, self._base)
            if newest_ns is not None and _is_near(newest_ns, stamp_ns):
                self._buffer.can_transform(fixed, self._base, stamp_ns, timeout_ns)

    def poses(self, stamps_ns: list[int]) -> list[NDArray[np.float64]] | None:
        """Return ego2global (4, 4) at each stamp, or None where ego motion is switched off or absent.

        Raises:
            PoseError: there is a source, but it has no pose at one of the stamps, nor one shortly before.
        """
        source = self.source
        self.extrapolated_s = 0.0
        if source == "none":
            return None
        newest_ns = self._newest_ns(source)
        reach_ns = 0 if newest_ns is None else max(stamps_ns) - newest_ns
        if newest_ns is not None and 0 < reach_ns <= EXTRAPOLATE_NS:
            return self._extrapolate(source, stamps_ns, newest_ns)
        if reach_ns > EXTRAPOLATE_NS:
            raise PoseError(f"the newest pose from {source} is {reach_ns / 1e9:.2f} s older than the images")
        return self._known_poses(source, stamps_ns)

    def signals(self, stamp_ns: int, ego2global: NDArray[np.float64]) -> EgoSignals | None:
        """Return what the twists of odometry say of the motion at a stamp; None where poses come from elsewhere."""
        if self.source != "odometry":
            return None
        with self._changed:
            return self._twists.at(stamp_ns, ego2global)

    def _newest_ns(self, source: str) -> int | None:
        if source == "tf":
            return self._buffer.latest_ns(self._parameters.fixed_frame, self._base) or None
        with self._changed:
            return self._stamps[-1] if self._stamps else None

    def _extrapolate(self, source: str, stamps_ns: list[int], newest_ns: int) -> list[NDArray[np.float64]]:
        """Return the poses at stamps some of which lie after the newest pose, at the speed of the last tenth of a second."""
        before_ns = newest_ns - EXTRAPOLATE_NS
        try:
            known = self._known_poses(source, [before_ns, newest_ns, *(min(stamp, newest_ns) for stamp in stamps_ns)])
        except PoseError:
            return self._known_poses(source, stamps_ns)  # too young to tell a speed
        self.extrapolated_s = (max(stamps_ns) - newest_ns) / 1e9
        shares = [(stamp - before_ns) / EXTRAPOLATE_NS for stamp in stamps_ns]
        before, newest, *within = known
        beyond = blend_poses(before, newest, shares)
        return [beyond[i] if share > 1 else pose for i, (share, pose) in enumerate(zip(shares, within, strict=True))]

    def _known_poses(self, source: str, stamps_ns: list[int]) -> list[NDArray[np.float64]]:
        if source == "odometry":
            return list(self._trajectory(stamps_ns).at_many(stamps_ns))
        try:
            fixed = self._parameters.fixed_frame
            return [self._buffer.lookup_matrix(fixed, self._base, stamp) for stamp in stamps_ns]
        except TransformException as error:
            raise PoseError(str(error)) from error

    def _trajectory(self, stamps_ns: list[int]) -> Trajectory:
        with self._changed:
            first = max(0, bisect_left(self._stamps, min(stamps_ns) - MARGIN_NS) - 1)
            last = bisect_right(self._stamps, max(stamps_ns) + MARGIN_NS) + 1
            stamps, poses = self._stamps[first:last], self._poses[first:last]
        if not stamps:
            raise PoseError(f"no odometry was received on {self._parameters.odometry_topic}")
        return Trajectory(np.array(stamps, np.int64), np.stack(poses))


def _is_near(newest_ns: int, stamp_ns: int) -> bool:
    """Whether poses up to `newest_ns` have not reached a stamp but may soon."""
    return newest_ns < stamp_ns <= newest_ns + REACH_NS
