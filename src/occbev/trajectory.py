"""The ego vehicle's path: stamped poses, interpolated where both neighbours are near enough."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.geometry import invert_transform, rotation_from_wxyz, wxyz_from_rotation


class PoseError(LookupError):
    """No pose is known at the stamp that was asked for."""


@dataclass(frozen=True)
class Trajectory:
    """Stamped ego2global poses: stamp_ns (P,) int64 strictly increasing, ego2global (P, 4, 4) float64.

    Between samples the translation is linear and the rotation a slerp; a gap over `max_gap`
    or a stamp more than `max_extrapolation` outside the samples has no pose.
    """

    stamp_ns: NDArray[np.int64]
    ego2global: NDArray[np.float64]
    max_gap: float = 0.15
    max_extrapolation: float = 0.02

    def __post_init__(self) -> None:
        if len(self.stamp_ns) == 0 or self.ego2global.shape != (len(self.stamp_ns), 4, 4):
            raise ValueError(f"{len(self.stamp_ns)} stamps with poses of shape {self.ego2global.shape}; want (P, 4, 4)")
        if np.any(np.diff(self.stamp_ns) <= 0):
            where = int(np.argmax(np.diff(self.stamp_ns) <= 0))
            raise ValueError(f"pose stamps must increase; number {where + 1} is {self.stamp_ns[where + 1]}")

    @cached_property
    def interpolation_error(self) -> tuple[float, float]:
        """Estimate what interpolation between neighbours leaves, in metres and radians; infinite for few poses.

        Every second pose is left out and interpolated. The error grows with the square of the gap, so a quarter of
        the 95th percentile of what is found there holds for the gaps that there are.
        """
        inner = np.arange(1, len(self.stamp_ns) - 1)
        if len(inner) < 3:
            return float("inf"), float("inf")
        before, after = self.ego2global[inner - 1], self.ego2global[inner + 1]
        span = (self.stamp_ns[inner + 1] - self.stamp_ns[inner - 1]) / 1e9
        made = _interpolate(before, after, (self.stamp_ns[inner] - self.stamp_ns[inner - 1]) / 1e9 / span)
        usual = span <= 3 * np.median(span)  # across a gap nothing is interpolated
        step = invert_transform(made[usual]) @ self.ego2global[inner][usual]
        moved = np.linalg.norm(step[:, :3, 3], axis=1)
        turned = np.arccos(np.clip((np.trace(step[:, :3, :3], axis1=1, axis2=2) - 1) / 2, -1, 1))
        return float(np.percentile(moved, 95)) / 4, float(np.percentile(turned, 95)) / 4

    def at(self, stamp_ns: int) -> NDArray[np.float64]:
        """Return ego2global (4, 4) at one stamp; raises PoseError, saying what is missing."""
        return self.at_many(np.array([stamp_ns], np.int64))[0]

    def at_many(self, stamp_ns: ArrayLike) -> NDArray[np.float64]:
        """Return ego2global (S, 4, 4) at (S,) stamps; raises PoseError if any has no pose."""
        wanted = np.asarray(stamp_ns, np.int64)
        first, last = int(self.stamp_ns[0]), int(self.stamp_ns[-1])
        slack = int(self.max_extrapolation * 1e9)
        outside = (wanted < first - slack) | (wanted > last + slack)
        if outside.any():
            raise PoseError(f"no pose at {int(wanted[outside][0])} ns: poses cover [{first}, {last}] ns")
        wanted = np.clip(wanted, first, last)
        after = np.clip(np.searchsorted(self.stamp_ns, wanted), 1, max(1, len(self.stamp_ns) - 1))
        if len(self.stamp_ns) == 1:
            return np.repeat(self.ego2global, len(wanted), axis=0)
        before = after - 1
        gap = (self.stamp_ns[after] - self.stamp_ns[before]) / 1e9
        exact = (wanted == self.stamp_ns[before]) | (wanted == self.stamp_ns[after])
        too_wide = (gap > self.max_gap) & ~exact
        if too_wide.any():
            index = int(np.argmax(too_wide))
            raise PoseError(
                f"no pose at {int(wanted[index])} ns: neighbours are {gap[index]:.3f} s apart, limit {self.max_gap} s"
            )
        share = (wanted - self.stamp_ns[before]) / 1e9 / gap
        return _interpolate(self.ego2global[before], self.ego2global[after], share)

    def relative(self, from_ns: int, to_ns: int) -> NDArray[np.float64]:
        """Return ego(from)2ego(to) (4, 4): moves points of the ego frame at one stamp to another's."""
        return invert_transform(self.at(to_ns)) @ self.at(from_ns)


def blend_poses(start: NDArray[np.float64], end: NDArray[np.float64], shares: ArrayLike) -> NDArray[np.float64]:
    """Return the poses (S, 4, 4) at shares (S,) of the way from start to end, beyond the end where one is over 1."""
    return _interpolate(start[None], end[None], np.asarray(shares, np.float64))


def _interpolate(
    start: NDArray[np.float64], end: NDArray[np.float64], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Blend (S, 4, 4) poses, or one of each, pairwise; share (S,): linear translation, shortest-arc slerp."""
    pose = np.tile(np.eye(4), (len(share), 1, 1))
    pose[:, :3, 3] = start[:, :3, 3] + share[:, None] * (end[:, :3, 3] - start[:, :3, 3])
    q0, q1 = wxyz_from_rotation(start[:, :3, :3]), wxyz_from_rotation(end[:, :3, :3])
    dot = np.sum(q0 * q1, axis=1)
    q1[dot < 0] *= -1
    angle = np.arccos(np.clip(np.abs(dot), 0.0, 1.0))
    small = angle < 1e-6
    sine = np.where(small, 1.0, np.sin(angle))
    w0 = np.where(small, 1 - share, np.sin((1 - share) * angle) / sine)
    w1 = np.where(small, share, np.sin(share * angle) / sine)
    q = w0[:, None] * q0 + w1[:, None] * q1
    pose[:, :3, :3] = rotation_from_wxyz(q / np.linalg.norm(q, axis=1, keepdims=True))
    return pose
