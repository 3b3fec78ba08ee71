"""Lift tables against their definition: geometry, both forms of the sum, capacity, caching."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from occbev.config import LiftConfig, from_record
from occbev.geometry import make_transform, rotation_from_yaw, transform_points
from occbev.grid import BevGrid
from occbev.inference.families import family_of, read_model
from occbev.inference.table_cache import TableCache
from occbev.inference.tables import (
    GATHER_STAGES,
    LiftPoints,
    TableCapacityError,
    bag_tables,
    frustum_points,
    gather_tables,
    lift_points,
    ray_table,
)
from occbev.rig import Camera, CameraRig

OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
INTRINSIC = np.array([[60.0, 0, 48], [0, 60, 20], [0, 0, 1]])
BEV = BevGrid((-20, -20), (1, 1), (40, 40))
LIFT = from_record(LiftConfig, {"depth": {"lo": 1, "hi": 25, "step": 1}, "max_points": 4096})


def rig(cameras: int = 3) -> CameraRig:
    poses = [
        make_transform(rotation_from_yaw(2 * np.pi * i / cameras) @ OPTICAL, [1, 0.2 * i, 1.5]) for i in range(cameras)
    ]
    return CameraRig(tuple(Camera(f"c{i}", 96, 64, INTRINSIC, p) for i, p in enumerate(poses)))


def points_of(cameras: CameraRig) -> LiftPoints:
    intrinsic = np.stack([c.intrinsic for c in cameras.cameras])
    return lift_points(intrinsic, np.stack([c.cam2ego for c in cameras.cameras]), (96, 64), LIFT, BEV)


def direct_sum(points: LiftPoints, depth: np.ndarray, feature: np.ndarray) -> np.ndarray:
    cells = np.zeros((BEV.size, feature.shape[1]))
    np.add.at(cells, points.cell, depth[points.depth, None] * feature[points.pixel])
    return cells


def random_features(cameras: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    places = cameras * 4 * 6
    return rng.random(places * LIFT.depth.bins), rng.normal(size=(places, 5))


def test_every_kept_point_is_where_its_pixel_and_depth_say() -> None:
    cameras = rig()
    points = points_of(cameras)
    rng = np.random.default_rng(1)
    for i in rng.choice(len(points), 50, replace=False):
        camera, place = divmod(int(points.pixel[i]), 24)
        depth_bin = (int(points.depth[i]) - camera * LIFT.depth.bins * 24) // 24
        assert (int(points.depth[i]) - camera * LIFT.depth.bins * 24) % 24 == place
        u, v = (place % 6 + 0.5) * 16, (place // 6 + 0.5) * 16
        depth = 1 + depth_bin + 0.5
        in_camera = [(u - 48) / 60 * depth, (v - 20) / 60 * depth, depth]
        ego = transform_points(cameras.cameras[camera].cam2ego, in_camera)
        column, row = np.floor(ego[:2] + 20).astype(int)
        assert points.cell[i] == row * 40 + column


@pytest.mark.parametrize("pitch", [1.0, 0.005])
def test_points_are_sorted_by_cell_then_by_place(pitch: float) -> None:
    """Also where cell and place together take more than 32 bits."""
    bev = BevGrid((-20, -20), (pitch, pitch), (round(40 / pitch), round(40 / pitch)))
    matrices = rig().intrinsics, rig().cam2egos
    points, places = lift_points(*matrices, (96, 64), LIFT, bev), frustum_points(*matrices, (96, 64), LIFT)
    column, row = np.floor((places.reshape(-1, 3)[points.depth, :2] + 20) / pitch).astype(int).T
    np.testing.assert_array_equal(points.cell, row * bev.shape[0] + column)
    np.testing.assert_array_equal(np.lexsort((points.depth, points.cell)), np.arange(len(points)))
    inside = np.all(np.abs(places[..., :2]) < 20, axis=-1) & (places[..., 2] >= LIFT.z_range[0])
    assert len(points) == np.sum(inside & (places[..., 2] < LIFT.z_range[1]))


def test_both_forms_give_the_direct_sum() -> None:
    points = points_of(rig())
    depth, feature = random_features(3)
    expected = direct_sum(points, depth, feature)
    bag = bag_tables(points, BEV, LIFT.max_points)
    weighted = depth[bag["table_depth"]] * bag["table_weight"]
    rows = weighted[:, None] * feature[bag["table_pixel"]]
    bounds = np.r_[bag["table_offset"], LIFT.max_points]
    bags = np.stack([rows[a:b].sum(0) for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    np.testing.assert_allclose(bags, expected, atol=1e-9)
    gather = gather_tables(points, BEV, LIFT.max_points)
    weighted = depth[gather["table_depth"]] * gather["table_weight"]
    sums = (weighted[..., None] * feature[gather["table_pixel"]]).sum(1)
    for stage in range(2, GATHER_STAGES + 1):
        sums = sums[gather[f"table_stage{stage}"]].sum(1)
    np.testing.assert_allclose(sums[gather["table_cell"]], expected, atol=1e-9)


def test_bag_offsets_stay_below_the_index_count() -> None:
    bag = bag_tables(points_of(rig()), BEV, LIFT.max_points)
    assert bag["table_offset"].max() < LIFT.max_points


def test_a_rig_that_sees_nothing_gives_an_empty_map() -> None:
    far = rig().move_cameras([make_transform(np.eye(3), [500, 0, 0])] * 3)
    points = points_of(far)
    assert len(points) == 0
    assert bag_tables(points, BEV, 64)["table_weight"].sum() == 0
    assert gather_tables(points, BEV, 64)["table_weight"].sum() == 0


def test_a_point_in_every_cell_fits_unless_fewer_cells_were_asked_for() -> None:
    cell = np.arange(BEV.size, dtype=np.int32)
    points = LiftPoints(np.zeros_like(cell), np.zeros_like(cell), cell)
    assert gather_tables(points, BEV, BEV.size + 1)["table_weight"].sum() == BEV.size
    with pytest.raises(TableCapacityError, match=rf"needs {BEV.size} .*lift\.max_cells"):
        gather_tables(points, BEV, BEV.size + 1, max_cells=BEV.size - 1)


def test_too_many_points_name_both_numbers() -> None:
    points = points_of(rig())
    with pytest.raises(TableCapacityError, match=f"needs {len(points) + 1} .* holds 100"):
        bag_tables(points, BEV, 100)


def test_points_above_the_height_range_are_dropped() -> None:
    lifted = rig().move_cameras([make_transform(np.eye(3), [0, 0, 100])] * 3)
    assert len(points_of(lifted)) == 0


def test_the_cache_follows_the_calibration() -> None:
    model = read_model(
        {
            "image": {"width": 96, "height": 64},
            "bev": {"lo": [-20, -20], "pitch": [1, 1], "shape": [40, 40]},
        },
    )
    cache = TableCache(model, "bag")
    first = cache.tables(rig())
    assert cache.tables(rig()) is first
    moved = cache.tables(rig().move_cameras([make_transform(rotation_from_yaw(0.1), [0, 0, 0])] * 3))
    assert any(not np.array_equal(first[k], moved[k]) for k in first)
    wrong = CameraRig((Camera("c", 100, 64, INTRINSIC, np.eye(4)),))
    with pytest.raises(ValueError, match="camera c is 100x64, the network takes 96x64"):
        cache.tables(wrong)


def test_volumes_have_cells_along_z_in_both_forms() -> None:
    lift = dataclasses.replace(LIFT, height_bins=4)
    intrinsic = np.stack([INTRINSIC] * 3)
    poses = np.stack([c.cam2ego for c in rig().cameras])
    flat = lift_points(intrinsic, poses, (96, 64), LIFT, BEV)
    points = lift_points(intrinsic, poses, (96, 64), lift, BEV)
    assert len(points) == len(flat)  # the same points, spread over four levels
    level = np.zeros(len(points), int)
    level[np.argsort(points.depth)] = points.cell[np.argsort(points.depth)] // BEV.size
    assert set(level) == {0, 1, 2, 3}
    at_same_place = dict(zip(flat.depth.tolist(), flat.cell.tolist(), strict=True))
    assert all(
        at_same_place[d] == c % BEV.size for d, c in zip(points.depth.tolist(), points.cell.tolist(), strict=True)
    )
    bag = bag_tables(points, BEV, lift.max_points, 4)
    gather = gather_tables(points, BEV, lift.max_points, 4)
    assert len(bag["table_offset"]) == len(gather["table_cell"]) == 4 * BEV.size
    counts = np.diff(np.append(bag["table_offset"], len(points)))
    np.testing.assert_array_equal(counts, np.bincount(points.cell, minlength=4 * BEV.size))


def tilted_rig() -> tuple[np.ndarray, np.ndarray]:
    """Cameras that look up and down, none along an axis."""
    turns = [rotation_from_yaw(yaw) @ OPTICAL @ rotation_from_yaw(0.1) for yaw in (0.3, 2.0, -1.1)]
    poses = [make_transform(turn, [1, 0.2, 1.2 + i / 5]) for i, turn in enumerate(turns)]
    poses[1][:3, :3] @= np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
    return np.stack([INTRINSIC] * 3), np.stack(poses)


def test_rays_say_where_the_frustum_goes() -> None:
    intrinsic, cam2ego = tilted_rig()
    slope, climb, height, angle = np.moveaxis(ray_table(intrinsic, cam2ego, (96, 64), LIFT), 1, 0)
    points = frustum_points(intrinsic, cam2ego, (96, 64), LIFT)  # (N, D, h, w, 3)
    metres = LIFT.depth.lo + LIFT.depth.step / 2
    rise = 2 * height + climb * metres
    np.testing.assert_allclose(rise, points[:, 0, ..., 2], atol=1e-5)
    np.testing.assert_allclose(2 * height, np.broadcast_to(cam2ego[:, 2, 3, None, None], height.shape), rtol=1e-6)
    np.testing.assert_allclose(slope[0, 0], (np.arange(6) * 16 + 8 - 48) / 60, rtol=1e-5)
    np.testing.assert_allclose(angle, 10 / 60, rtol=1e-6)


def test_a_mirrored_sample_reads_as_a_camera_of_the_mirrored_scene() -> None:
    """Augmentation mirrors image and scene; the same rays have a rig whose cameras are right-handed."""
    intrinsic, cam2ego = tilted_rig()
    flip = np.array([[-1.0, 0, 96], [0, 1, 0], [0, 0, 1]])
    mirrored = flip @ intrinsic, np.diag([1.0, -1, 1, 1]) @ cam2ego
    across = np.diag([-1.0, 1, 1])
    righted = mirrored[0] @ across, mirrored[1] @ np.diag([-1.0, 1, 1, 1])
    assert (np.linalg.det(righted[1][:, :3, :3]) > 0).all()
    np.testing.assert_allclose(*(frustum_points(*r, (96, 64), LIFT) for r in (mirrored, righted)))
    np.testing.assert_allclose(*(ray_table(*r, (96, 64), LIFT) for r in (mirrored, righted)))


def test_published_camera_parameters_are_of_the_source_image() -> None:
    model = read_model(
        {
            "family": "bevdet",
            "image": {"width": 96, "height": 64},
            "bevdet": {"depth_net": "camera", "source_width": 192, "source_height": 144},
        },
    )
    poses = np.stack([c.cam2ego for c in rig().cameras])
    table = family_of(model).calibration(model, np.stack([INTRINSIC] * 3), poses)
    assert table.shape == (3, 27, 1, 1)
    fx, fy, cx, cy, scale, _, left, _, _, top = table[0, :10, 0, 0]
    assert (fx, fy, scale, left) == (120, 120, 0.5, 0)
    assert top == 64 - 72  # eight rows of the scaled image are cut off above
    assert (cx, cy) == (96, 56)
    np.testing.assert_allclose(table[:, 15:, 0, 0].reshape(3, 3, 4), poses[:, :3], rtol=1e-6)
    gated = dataclasses.replace(model, bevdet=dataclasses.replace(model.bevdet, depth_net="gated"))
    table = family_of(gated).calibration(gated, np.stack([INTRINSIC] * 3), poses)[:, :, 0, 0]
    assert table.shape == (3, 33)
    np.testing.assert_allclose(table[0, :9].reshape(3, 3), [[120, 0, 96], [0, 120, 56], [0, 0, 1]])
    np.testing.assert_allclose(table[0, 9:18].reshape(3, 3), np.diag([0.5, 0.5, 1]))
    np.testing.assert_allclose(table[0, 18:21], [0, -8, 0])
    np.testing.assert_allclose(table[1, 21:30].reshape(3, 3), poses[1, :3, :3], atol=1e-6)
    np.testing.assert_allclose(table[1, 30:], poses[1, :3, 3], rtol=1e-6)
