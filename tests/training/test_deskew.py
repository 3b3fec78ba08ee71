"""Sweeps and rays under ego motion, against poses composed point by point."""

from __future__ import annotations

import numpy as np
import pytest

from occbev.geometry import (
    invert_transform,
    make_transform,
    rotation_from_rpy,
    rotation_from_yaw,
    transform_points,
)
from occbev.results import Sweep
from occbev.trajectory import PoseError, Trajectory
from occbev_training.sources import deskew
from occbev_training.sources.deskew import EgoBox, RayLimits, compensated, deskew_rays

LIDAR2EGO = make_transform(rotation_from_rpy(0.01, -0.02, -np.pi / 2), [0.94, 0.0, 1.84])
START_NS = 1_700_000_000_000_000_000


def pose(t: float) -> np.ndarray:
    """A turning, climbing drive: 10 m/s, 0.5 rad/s."""
    yaw = 0.3 + 0.5 * t
    xy = 20.0 * np.array([np.sin(yaw), -np.cos(yaw)]) + (1200.0, -800.0)
    return make_transform(rotation_from_yaw(yaw) @ rotation_from_rpy(0.02 * t, 0, 0), [*xy, 0.1 * t])


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    stamps = START_NS + np.arange(0, 2_000_000_001, 10_000_000)
    return Trajectory(stamps, np.stack([pose((s - START_NS) / 1e9) for s in stamps]))


def raw_sweep(world: np.ndarray, stamp_ns: int, offsets: np.ndarray) -> Sweep:
    """Measure (M, 3) global points, each at its own time."""
    seconds = (stamp_ns - START_NS) / 1e9 + offsets.astype(np.float64)
    points = [transform_points(invert_transform(pose(t) @ LIDAR2EGO), p) for t, p in zip(seconds, world, strict=True)]
    return Sweep(np.array(points, np.float32).reshape(-1, 3), stamp_ns, LIDAR2EGO, time_offset=offsets)


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, Sweep]:
    rng = np.random.default_rng(3)
    stamp = START_NS + 1_000_000_000
    world = transform_points(pose(1.0), rng.uniform((-30, -30, 0), (30, 30, 5), (400, 3)))
    far = np.linalg.norm(world - pose(1.0)[:3, 3], axis=1) > 6
    offsets = np.sort(rng.uniform(-0.05, 0.05, far.sum())).astype(np.float32)
    return world[far], raw_sweep(world[far], stamp, offsets)


def test_compensated_points_are_where_the_sensor_was_at_the_stamp(scene, trajectory) -> None:
    world, sweep = scene
    still = compensated(sweep, trajectory)
    expected = transform_points(invert_transform(pose(1.0) @ LIDAR2EGO), world)
    assert still.time_offset is None
    assert np.abs(still.points - expected).max() < 2e-4
    assert np.abs(sweep.points - expected).max() > 0.3, "without compensation the scene is skewed"
    assert compensated(still, trajectory).points is still.points


def test_every_ray_has_the_end_and_the_origin_of_its_own_instant(scene, trajectory) -> None:
    world, sweep = scene
    reference = START_NS + 1_230_000_000
    rays = deskew_rays(sweep, trajectory, reference)
    global2ego = invert_transform(pose(1.23))
    assert len(rays) == len(world)
    assert rays.hit.all()
    assert np.abs(rays.end - transform_points(global2ego, world)).max() < 2e-4
    origins = [(global2ego @ pose(1.0 + float(t)) @ LIDAR2EGO)[:3, 3] for t in sweep.time_offset.astype(float)]
    assert np.abs(rays.origin - np.array(origins)).max() < 2e-4
    assert np.ptp(rays.origin[:, 0]) > 0.8, "the sensor drove about 1 m during the sweep"


def test_rays_at_the_sweep_then_moved_equal_rays_at_the_reference(scene, trajectory) -> None:
    _, sweep = scene
    reference = START_NS + 400_000_000
    direct = deskew_rays(sweep, trajectory, reference)
    moved = deskew_rays(sweep, trajectory, sweep.stamp_ns).move(trajectory.relative(sweep.stamp_ns, reference))
    assert np.abs(direct.end - moved.end).max() < 1e-9
    assert np.abs(direct.origin - moved.origin).max() < 1e-9


def test_drops_are_counted_in_the_given_order(trajectory) -> None:
    ego = [[2.0, 0.0, 0.5], [8.0, 0.0, 0.5], [0.94, 0.0, 1.3], [100.0, 0.0, 1.84]]
    points = transform_points(invert_transform(LIDAR2EGO), ego)
    points = np.vstack([points, [[np.nan, 1, 1], [9, 9, np.inf]]]).astype(np.float32)
    sweep = Sweep(points, START_NS, LIDAR2EGO)
    rays = deskew_rays(sweep, trajectory, START_NS)
    assert dict(rays.dropped) == {
        "not_finite": 2,
        "too_near": 1,
        "ego_body": 1,
        "beyond_any_lidar": 0,
        "beyond_max_range": 1,
    }
    assert rays.hit.tolist() == [True, False]
    assert np.allclose(rays.end, [[8.0, 0.0, 0.5], [60.94, 0.0, 1.84]], atol=1e-4)
    assert np.allclose(rays.origin, [0.94, 0.0, 1.84])


def test_isolated_returns_are_dropped_only_near_the_sensor(trajectory) -> None:
    wall = np.stack(np.meshgrid([10.0], np.arange(-1, 1, 0.2), np.arange(0, 1, 0.2)), -1).reshape(-1, 3)
    lonely = np.array([[6.0, 3.0, 0.0], [30.0, 3.0, 0.0]])
    sweep = Sweep(np.vstack([wall, lonely]).astype(np.float32), START_NS, np.eye(4))
    rays = deskew_rays(sweep, trajectory, START_NS, limits=RayLimits(isolated_filter=True))
    assert rays.dropped["isolated"] == 1
    assert len(rays) == len(wall) + 1
    assert not np.any(np.all(np.isclose(rays.end, lonely[0]), axis=1))


@pytest.mark.parametrize("offsets", [None, np.zeros(0, np.float32)])
def test_an_empty_sweep_gives_no_rays(trajectory, offsets) -> None:
    sweep = Sweep(np.zeros((0, 3), np.float32), START_NS, LIDAR2EGO, time_offset=offsets)
    assert len(deskew_rays(sweep, trajectory, START_NS)) == 0
    assert len(compensated(sweep, trajectory).points) == 0


def test_points_with_a_broken_time_are_dropped(scene, trajectory) -> None:
    _world, sweep = scene
    offsets = sweep.time_offset.copy()
    offsets[:5] = np.nan
    broken = Sweep(sweep.points, sweep.stamp_ns, sweep.lidar2ego, time_offset=offsets)
    assert deskew_rays(broken, trajectory, sweep.stamp_ns).dropped["not_finite"] == 5
    assert np.isnan(compensated(broken, trajectory).points[:5]).all()


def test_a_sweep_that_the_poses_do_not_cover_is_refused(scene, trajectory) -> None:
    _, sweep = scene
    late = Sweep(sweep.points, START_NS + 2_040_000_000, LIDAR2EGO, time_offset=sweep.time_offset)
    with pytest.raises(PoseError, match="no pose at"):
        deskew_rays(late, trajectory, START_NS)


def test_an_impossible_ego_box_or_range_is_refused() -> None:
    with pytest.raises(ValueError, match="ego box"):
        EgoBox((0, 0, 0), (1, 0, 1))
    with pytest.raises(ValueError, match="min_range"):
        RayLimits(min_range=5.0, max_range=4.0)


def test_the_compiled_loop_sorts_as_the_plain_one(trajectory, monkeypatch) -> None:
    pytest.importorskip("numba")
    rng = np.random.default_rng(4)
    points = rng.uniform(-70, 70, (400, 3)) * rng.choice([0.01, 1.0], (400, 1))
    points[:3], points[3] = np.nan, 1000.0
    sweep = Sweep(points.astype(np.float32), START_NS, LIDAR2EGO)
    compiled = deskew_rays(sweep, trajectory, START_NS)
    monkeypatch.setattr(deskew, "_sorter", lambda: deskew._sort_returns)
    plain = deskew_rays(sweep, trajectory, START_NS)
    assert min(plain.dropped.values()) > 0
    assert compiled.dropped == plain.dropped
    for name in ("end", "origin", "hit"):
        assert np.array_equal(getattr(compiled, name), getattr(plain, name)), name


def test_points_beyond_any_lidar_carve_nothing_and_are_counted() -> None:
    points = np.array([[10, 0, 0], [100, 0, 0], [499, 0, 0], [501, 0, 0], [6e4, 0, 0]], np.float32)
    trajectory = Trajectory(np.array([1], np.int64), np.eye(4)[None])
    rays = deskew_rays(Sweep(points, 1, np.eye(4)), trajectory, 1)
    assert rays.hit.tolist() == [True, False, False]
    assert (rays.dropped["beyond_any_lidar"], rays.dropped["beyond_max_range"]) == (2, 2)
