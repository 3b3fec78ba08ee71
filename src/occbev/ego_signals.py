"""What a vehicle itself says of its motion: velocity, turning and acceleration, beside its poses."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

GRAVITY = 9.81
"""Metres per second squared: what an accelerometer says upwards at rest."""

KEPT_NS, REACH_NS = 2_000_000_000, 150_000_000
"""Twists are kept for so long; one that is older than the second says nothing of a stamp."""

SPAN_NS = 200_000_000
"""Time over which a change of velocity is taken for an acceleration."""

STRETCH_NS, GAP_NS = 500_000_000, 250_000_000
"""Stretches over which twists are added up and compared with poses, and the longest time between two of them."""

LEAST_M, APART, JUDGED_M, AGREES = 0.2, 0.5, 5.0, 0.15
"""A stretch counts if it is so long in metres and the two readings of its twists differ by this share of it; so many
metres of stretches are judged; a reading agrees if it differs from the poses by at most this share of the way."""


@dataclass(frozen=True, eq=False)
class EgoSignals:
    """Signals at one instant, in base_link and SI units, (3,) each.

    acceleration: gravity included, as accelerometers and nuScenes' CAN files have it.
    """

    acceleration: Vector
    rotation_rate: Vector
    velocity: Vector

    @classmethod
    def of(cls, values: Sequence[float]) -> EgoSignals:
        """Read `values` (9,) back."""
        acceleration, rotation_rate, velocity = np.array(values, np.float64).reshape(3, 3)
        return cls(acceleration, rotation_rate, velocity)

    @property
    def values(self) -> list[float]:
        """Acceleration, rotation rate and velocity in a row (9,)."""
        return np.concatenate([self.acceleration, self.rotation_rate, self.velocity]).tolist()

    def move(self, ego2other: NDArray[np.float64]) -> EgoSignals:
        """Return them in other axes; ego2other: (4, 4) or (3, 3), which may mirror, and scale lengths but gravity."""
        linear = np.asarray(ego2other)[:3, :3]
        volume = np.linalg.det(linear)
        turn = linear / abs(volume) ** (1 / 3)
        rate = np.sign(volume) * (turn @ self.rotation_rate)  # in a mirror things turn the other way
        return EgoSignals(turn @ self.acceleration, rate, linear @ self.velocity)


class TwistHistory:
    """The twists of the last seconds in base_link, or of a whole recording; they tell the signals at a stamp."""

    def __init__(self, kept_ns: int | None = KEPT_NS) -> None:
        """kept_ns: for how long a twist is kept; None keeps all."""
        self._kept_ns = kept_ns
        self._stamps: list[int] = []
        self._twists: list[tuple[Vector, Vector]] = []
        self._moved_ns: int | None = None

    def add(self, stamp_ns: int, velocity: Vector, rotation_rate: Vector) -> None:
        """Take one twist; after a step back in time what was before is forgotten."""
        if self._stamps and stamp_ns <= self._stamps[-1]:
            self.clear()
        self._stamps.append(stamp_ns)
        self._twists.append((velocity, rotation_rate))
        if any(velocity) or any(rotation_rate):
            self._moved_ns = stamp_ns
        if self._kept_ns is not None and self._stamps[0] < stamp_ns - self._kept_ns:
            stale = bisect_left(self._stamps, stamp_ns - self._kept_ns)
            del self._stamps[:stale], self._twists[:stale]

    def clear(self) -> None:
        """Forget all."""
        self._stamps.clear()
        self._twists.clear()
        self._moved_ns = None

    def at(self, stamp_ns: int, ego2global: NDArray[np.float64]) -> EgoSignals | None:
        """Return the signals at a stamp, by the last twist that is not later.

        ego2global: (4, 4), which tells where gravity pulls. The change of velocity adds to it, where twists tell it.
        Returns: None where no twist is near, or all are zero: whoever publishes poses alone leaves twists empty.
        """
        last = bisect_right(self._stamps, stamp_ns) - 1
        moves = self._moved_ns is not None and self._moved_ns >= self._stamps[0]
        if last < 0 or not moves or stamp_ns - self._stamps[last] > REACH_NS:
            return None
        velocity, rotation_rate = self._twists[last]
        acceleration = GRAVITY * np.asarray(ego2global)[2, :3]
        before = bisect_right(self._stamps, self._stamps[last] - SPAN_NS) - 1
        if before >= 0:
            seconds = (self._stamps[last] - self._stamps[before]) / 1e9
            acceleration = acceleration + (velocity - self._twists[before][0]) / seconds
            acceleration += np.cross(rotation_rate, velocity)  # base_link turns meanwhile
        return EgoSignals(acceleration, rotation_rate, velocity)


class TwistAxes:
    """Tells in which axes an odometry has its velocity: those of its child frame, as nav_msgs/Odometry asks, or its parent's.

    Twists are added up over stretches in both ways and compared with how far the poses moved. Only stretches where the
    child frame is turned against the parent frame can tell.
    metres: length of the stretches that tell. errors: (2,) metres by which the twists, read in the child frame and in
    the parent frame, differ from the poses.
    """

    def __init__(self) -> None:
        self.metres, self.errors = 0.0, np.zeros(2)
        self._last: tuple[int, NDArray[np.float64], Vector] | None = None
        self._from_ns, self._from, self._ways = 0, np.zeros(3), np.zeros((2, 3))

    def add(self, stamp_ns: int, child2parent: NDArray[np.float64], velocity: Vector) -> None:
        """Take one odometry, newer than the last. child2parent: (4, 4). velocity: (3,) as it stands in its twist."""
        last, self._last = self._last, (stamp_ns, child2parent, velocity)
        if last is None or not 0 < stamp_ns - last[0] <= GAP_NS:
            self._begin(stamp_ns, child2parent)
            return
        turned = last[1][:3, :3] @ last[2] + child2parent[:3, :3] @ velocity
        self._ways += np.stack([turned, last[2] + velocity]) / 2 * ((stamp_ns - last[0]) / 1e9)
        if stamp_ns - self._from_ns >= STRETCH_NS:
            self._end(child2parent[:3, 3] - self._from)
            self._begin(stamp_ns, child2parent)

    @property
    def verdict(self) -> str:
        """ "child", "parent" or "neither"; "" while too little tells."""
        if self.metres < JUDGED_M:
            return ""
        best = int(np.argmin(self.errors))
        return ("child", "parent")[best] if self.errors[best] <= AGREES * self.metres else "neither"

    def describe(self, parent: str, child: str) -> str:
        """Say what was measured. parent, child: names of the two frames."""
        in_child, in_parent = 100 * self.errors / max(self.metres, 1e-9)
        return (
            f"over {self.metres:.1f} m in turned directions its velocity differs from its poses by {in_child:.0f} % of "
            f"the way if read in {child!r}, its child_frame_id, and by {in_parent:.0f} % if read in {parent!r}"
        )

    def _begin(self, stamp_ns: int, child2parent: NDArray[np.float64]) -> None:
        self._from_ns, self._from, self._ways = stamp_ns, child2parent[:3, 3], np.zeros((2, 3))

    def _end(self, moved: Vector) -> None:
        metres = float(np.linalg.norm(moved))
        if metres >= LEAST_M and np.linalg.norm(self._ways[0] - self._ways[1]) >= APART * metres:
            self.metres += metres
            self.errors += np.linalg.norm(self._ways - moved, axis=1)


WRONG_AXES = (
    "nav_msgs/Odometry has it in child_frame_id, and a BEVFormer reads it so: turn it where it is published, "
    "or take poses from tf (ego_motion.source: tf; no odometry in a file for --topics)"
)
"""Remedy for a twist in the axes of the parent frame."""
