"""Motion compensation of LiDAR sweeps: each point moves by the ego pose of its own instant.

It stands between recordings and labels: raw sweeps become rays, each with its own origin.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import invert_transform, make_transform, transform_points
from occbev.results import Sweep
from occbev.trajectory import Trajectory

KNOTS = 64
"""Pose samples across one sweep; between them a transform is blended linearly (error below 1 um)."""


@dataclass(frozen=True)
class EgoBox:
    """The vehicle's own body in base_link: returns inside it are dropped.

    lo, hi: lowest and highest x, y, z in metres, inclusive. The default contains every return that the cars of nuScenes
    have from their own body.
    """

    lo: tuple[float, float, float] = (-1.3, -1.05, 0.1)
    hi: tuple[float, float, float] = (4.0, 1.05, 2.2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lo", tuple(float(v) for v in self.lo))
        object.__setattr__(self, "hi", tuple(float(v) for v in self.hi))
        if not len(self.lo) == len(self.hi) == 3 or any(a >= b for a, b in zip(self.lo, self.hi, strict=True)):
            raise ValueError(f"ego box needs lo < hi on three axes; got lo {self.lo}, hi {self.hi}")

    def contains(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which of (M, 3) points of base_link lie inside."""
        inside = np.ones(points.shape[:-1], np.bool_)
        for axis, (lo, hi) in enumerate(zip(self.lo, self.hi, strict=True)):
            inside &= (points[..., axis] >= lo) & (points[..., axis] <= hi)
        return inside


LIDAR_REACH = 500.0
"""Metres. Farther points are placeholders of drivers, or noise: they are dropped and mark no free space."""


@dataclass(frozen=True)
class RayLimits:
    """Which returns become rays, in metres."""

    min_range: float = 1.0
    """Nearer returns are dropped: they are below the range that sensors are specified for."""
    max_range: float = 60.0
    """A farther return is no hit; its beam marks free space up to here."""
    isolated_filter: bool = False
    """Drop near returns that stand alone, such as rain and dust."""
    isolated_radius: float = 0.5
    """Neighbourhood of the isolated-return filter."""
    isolated_neighbours: int = 2
    """Fewer other returns in the neighbourhood than this make a return isolated."""
    isolated_range: float = 15.0
    """Only returns nearer than this are tested for isolation."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_range < self.max_range:
            raise ValueError(f"ray limits need 0 <= min_range < max_range; got {self.min_range}, {self.max_range}")


@dataclass(frozen=True)
class Rays:
    """LiDAR beams in one ego frame.

    end, origin: (M, 3) float64, metres; if all beams start at one place, `origin` is a broadcast view of one row.
    hit: (M,) bool, False where the beam was cut at the maximum range.
    dropped: reason -> number of points that became no ray.
    """

    end: NDArray[np.float64]
    origin: NDArray[np.float64]
    hit: NDArray[np.bool_]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.end)

    def move(self, a2b: NDArray[np.float64]) -> Rays:
        """Carry the rays from frame a into frame b."""
        return replace(self, end=_transform_each(a2b, self.end), origin=_transform_each(a2b, self.origin))


def middle_ns(sweep: Sweep) -> int:
    """Return the time in ns half-way between the first and the last point of a sweep; of several sensors, of the first."""
    offset = sweep.time_offset
    if offset is not None and sweep.sensor is not None and (sweep.sensor == 0).any():
        offset = offset[sweep.sensor == 0]
    if offset is None or not np.isfinite(offset).any():
        return sweep.stamp_ns
    return sweep.stamp_ns + round((float(np.nanmin(offset)) + float(np.nanmax(offset))) / 2 * 1e9)


def compensated(sweep: Sweep, trajectory: Trajectory) -> Sweep:
    """Move every point to the LiDAR frame at `sweep.stamp_ns`; the result has no time offsets.

    Points keep their number and order; non-finite ones stay non-finite. Raises PoseError where the trajectory does
    not cover the sweep.
    """
    if sweep.time_offset is None or len(sweep.points) == 0:
        return replace(sweep, time_offset=None)
    motion = _ego_motion(sweep.time_offset, sweep.stamp_ns, sweep.stamp_ns, trajectory)
    ego2lidar = invert_transform(sweep.lidar2ego)
    points = _transform_each(motion, transform_points(sweep.lidar2ego, sweep.points))
    return replace(sweep, points=transform_points(ego2lidar, points).astype(np.float32), time_offset=None)


def deskew_rays(
    sweep: Sweep,
    trajectory: Trajectory,
    reference_ns: int,
    ego_box: EgoBox | None = None,
    limits: RayLimits | None = None,
) -> Rays:
    """Turn a sweep into rays in base_link at `reference_ns`; each starts where the sensor was at its own time.

    Drops, in this order and counted by reason: non-finite points or times, points nearer than
    the minimum range, points on the ego body (in base_link at capture time), isolated returns.
    Raises PoseError where the trajectory does not cover the sweep or the reference; a sweep without
    times needs no pose at its own stamp.
    """
    if sweep.origins is not None:
        parts = [deskew_rays(part, trajectory, reference_ns, ego_box, limits) for part in by_sensor(sweep)]
        return _join(parts)
    ego_box, limits = ego_box or EgoBox(), limits or RayLimits()
    end, hit, kept, dropped = _usable_returns(sweep, ego_box, limits)
    origin = np.ascontiguousarray(sweep.lidar2ego[:3, 3][None])  # one for all until they move apart
    if sweep.time_offset is not None:
        offset = np.asarray(sweep.time_offset, np.float64)[kept]
        motion = _ego_motion(offset, sweep.stamp_ns, reference_ns, trajectory)
        origin = _transform_each(motion, np.broadcast_to(origin, end.shape))
        end = _transform_each(motion, end)
    elif sweep.stamp_ns != reference_ns:
        motion = trajectory.relative(sweep.stamp_ns, reference_ns)
        end, origin = _transform_each(motion, end), _transform_each(motion, origin)
    return Rays(end, np.broadcast_to(origin, end.shape), hit, dropped)


def by_sensor(sweep: Sweep) -> list[Sweep]:
    """Return the points of each sensor of a merged cloud as a sweep of their own, whose frame has its origin at that sensor."""
    if sweep.origins is None or sweep.sensor is None:
        return [sweep]
    return [_one_sensor(sweep, number, origin) for number, origin in enumerate(sweep.origins)]


def join_clouds(first: Sweep, others: Sequence[Sweep]) -> Sweep:
    """Return the clouds of several LiDARs as one sweep in the frame and at the stamp of the first.

    Each point keeps its own time, and each LiDAR the place where its beams begin.
    """
    clouds = [first, *others]
    to_first = [invert_transform(first.lidar2ego) @ cloud.lidar2ego for cloud in clouds]
    points = [transform_points(move, cloud.points) for move, cloud in zip(to_first, clouds, strict=True)]
    numbers = [np.full(len(cloud.points), number) for number, cloud in enumerate(clouds)]
    intensity = None
    if all(cloud.intensity is not None for cloud in clouds):
        intensity = np.concatenate([cloud.intensity for cloud in clouds if cloud.intensity is not None])
    return replace(
        first,
        points=np.concatenate([first.points, *points[1:]]).astype(np.float32),
        intensity=intensity,
        time_offset=np.concatenate([_times_from(first.stamp_ns, cloud) for cloud in clouds]).astype(np.float32),
        origins=np.stack([move[:3, 3] for move in to_first]),
        sensor=np.concatenate(numbers),
    )


def _times_from(stamp_ns: int, cloud: Sweep) -> NDArray[np.float64]:
    """Return the seconds (M,) from a stamp of a cloud's points; compensated ones have the time of their own stamp."""
    offsets = np.zeros(len(cloud.points)) if cloud.time_offset is None else cloud.time_offset.astype(np.float64)
    return offsets + (cloud.stamp_ns - stamp_ns) / 1e9


def _one_sensor(sweep: Sweep, number: int, origin: NDArray[np.float64]) -> Sweep:
    own = sweep.sensor == number

    def of(values: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        return None if values is None else values[own]

    return replace(
        sweep,
        points=(sweep.points[own] - origin).astype(np.float32),
        lidar2ego=sweep.lidar2ego @ make_transform(np.eye(3), origin),
        intensity=of(sweep.intensity),
        time_offset=of(sweep.time_offset),
        origins=None,
        sensor=None,
    )


def _join(parts: Sequence[Rays]) -> Rays:
    """Put the rays of several sensors together."""
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)
    end, origin, hit = (np.concatenate([getattr(part, name) for part in parts]) for name in ("end", "origin", "hit"))
    return Rays(end, origin, hit, dropped=dict(dropped))


def _move(a2b: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move points (3, M), in columns of x, y and z, by one (4, 4) or by M transforms (3, 4, M).

    The same bits whatever their order: a matrix product rounds a row by its place in the block, so
    a label could depend on the order.
    """
    x, y, z = points
    return np.stack([a2b[i, 0] * x + a2b[i, 1] * y + a2b[i, 2] * z + a2b[i, 3] for i in range(3)])


def _transform_each(a2b: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """As `_move`, of points (M, 3)."""
    return np.ascontiguousarray(_move(a2b, points.T).T)


def _ego_motion(
    time_offset: NDArray[np.floating], stamp_ns: int, reference_ns: int, trajectory: Trajectory
) -> NDArray[np.float64]:
    """Return ego(capture) -> ego(reference) (3, 4, M) of every point of one sweep, NaN without a time."""
    offset = np.asarray(time_offset, np.float64)
    finite = np.isfinite(offset)
    if not finite.any():
        return np.full((3, 4, len(offset)), np.nan)
    first, last = offset[finite].min(), offset[finite].max()
    knots = np.linspace(first, last, KNOTS)
    stamps = stamp_ns + np.round(knots * 1e9).astype(np.int64)
    ego2reference = invert_transform(trajectory.at(reference_ns)) @ trajectory.at_many(stamps)
    place = (np.where(finite, offset, first) - first) / max(last - first, 1e-12) * (KNOTS - 1)
    knot = np.minimum(place.astype(np.int64), KNOTS - 2)
    share = np.where(finite, place - knot, np.nan)
    entries = np.ascontiguousarray(ego2reference[:, :3].reshape(KNOTS, 12).T)  # (12, K)
    steps = np.diff(entries, axis=1)
    return (entries[:, knot] + share * steps[:, knot]).reshape(3, 4, -1)


def _usable_returns(
    sweep: Sweep, ego_box: EgoBox, limits: RayLimits
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64], dict[str, int]]:
    """Return the kept ends (M, 3) in ego at capture, which are hits, their places, and the drop counts."""
    points = np.ascontiguousarray(sweep.points.reshape(-1, 3))
    times = np.zeros(len(points)) if sweep.time_offset is None else sweep.time_offset
    if len(times) != len(points):
        raise ValueError(f"sweep at {sweep.stamp_ns} ns: {len(points)} points but {len(times)} time offsets")
    end, hit = np.empty(points.shape), np.empty(len(points), np.bool_)
    kept = np.empty(len(points), np.int64)
    with np.errstate(invalid="ignore"):
        count, *lost, cut = _sorter()(
            points,
            np.asarray(times, np.float64),
            np.ascontiguousarray(sweep.lidar2ego),
            *np.array([ego_box.lo, ego_box.hi]),
            limits.min_range,
            limits.max_range,
            LIDAR_REACH,
            end,
            hit,
            kept,
        )
    dropped = dict(zip(("not_finite", "too_near", "ego_body", "beyond_any_lidar"), lost, strict=True))
    end, hit, kept = end[:count].copy(), hit[:count].copy(), kept[:count].copy()
    if limits.isolated_filter:
        alone = _isolate(points[kept].astype(np.float64), limits)
        end, hit, kept = end[~alone], hit[~alone], kept[~alone]
        dropped["isolated"], cut = int(np.count_nonzero(alone)), int(np.count_nonzero(~hit))
    return end, hit, kept, dropped | {"beyond_max_range": cut}


@functools.lru_cache(maxsize=1)
def _sorter() -> Callable[..., tuple[int, int, int, int, int, int]]:
    """Return `_sort_returns`, compiled where numba is installed."""
    try:
        import numba
    except ImportError:
        return _sort_returns
    return numba.njit(cache=True, nogil=True)(_sort_returns)  # type: ignore[no-any-return]


def _sort_returns(points, times, lidar2ego, lo, hi, min_range, max_range, reach, end, hit, kept):  # type: ignore[no-untyped-def]
    """Write the ends of usable points in ego, cut at the maximum range; in one loop, for arrays cost more.

    Returns how many there are, how many points are not finite, too near, on the ego body and farther away than any
    LiDAR measures, and how many ends were cut.
    """
    m = lidar2ego
    count = not_finite = too_near = body = beyond = cut = 0
    for i in range(len(points)):
        x, y, z = np.float64(points[i, 0]), np.float64(points[i, 1]), np.float64(points[i, 2])
        distance = np.sqrt(x * x + y * y + z * z)
        if not (np.isfinite(distance) and np.isfinite(times[i])):
            not_finite += 1
            continue
        if distance < min_range:
            too_near += 1
            continue
        if distance > reach:
            beyond += 1
            continue
        inside = True
        for a in range(3):
            end[count, a] = m[a, 0] * x + m[a, 1] * y + m[a, 2] * z + m[a, 3]
            inside = inside and lo[a] <= end[count, a] <= hi[a]
        if inside:
            body += 1
            continue
        if distance > max_range:
            cut += 1
            scale = max_range / distance
            x, y, z = x * scale, y * scale, z * scale
            for a in range(3):
                end[count, a] = m[a, 0] * x + m[a, 1] * y + m[a, 2] * z + m[a, 3]
        hit[count], kept[count] = distance <= max_range, i
        count += 1
    return count, not_finite, too_near, body, beyond, cut


def _isolate(points: NDArray[np.float64], limits: RayLimits) -> NDArray[np.bool_]:
    """Return which of (M, 3) points are near the sensor and have too few neighbours."""
    from scipy.spatial import cKDTree

    near = np.linalg.norm(points, axis=1) < limits.isolated_range
    alone = np.zeros(len(points), np.bool_)
    if near.any():
        around = cKDTree(points).query_ball_point(points[near], limits.isolated_radius, return_length=True)
        alone[near] = around - 1 < limits.isolated_neighbours
    return alone
