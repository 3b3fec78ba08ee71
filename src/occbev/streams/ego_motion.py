"""Where the vehicle was at each exposure: odometry, or TF, over the last seconds."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from occbev.messages.tf import Buffer, TransformException
from occbev.streams.parameters import EgoMotionParameters
from occbev.trajectory import PoseError, Trajectory

KEPT_NS = 10_000_000_000
MARGIN_NS = 300_000_000
"""Poses this far around the wanted stamps are enough to interpolate between."""

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
        self._changed = threading.Condition(threading.RLock())

    def add(self, stamp_ns: int, ego2global: NDArray[np.float64]) -> None:
        """Take one odometry pose; one that is not newer than the last is ignored, a long step back starts again."""
        with self._changed:
            if self._stamps and stamp_ns < self._stamps[-1] - self._reset_ns:
                self.clear()
            if self._stamps and stamp_ns <= self._stamps[-1]:
                return
            self._stamps.append(stamp_ns)
            self._poses.append(ego2global)
            if self._stamps[0] < stamp_ns - KEPT_NS:
                stale = bisect_left(self._stamps, stamp_ns - KEPT_NS)
                del self._stamps[:stale], self._poses[:stale]
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget all poses, as after a clock jump."""
        with self._changed:
            self._stamps.clear()
            self._poses.clear()
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
            PoseError: there is a source, but it has no pose at one of the stamps.
        """
        source = self.source
        if source == "none":
            return None
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
            raise PoseError(f"no odometry was received around {min(stamps_ns)} ns")
        return Trajectory(np.array(stamps, np.int64), np.stack(poses))


def _is_near(newest_ns: int, stamp_ns: int) -> bool:
    """Whether poses up to `newest_ns` have not reached a stamp but may soon."""
    return newest_ns < stamp_ns <= newest_ns + REACH_NS
