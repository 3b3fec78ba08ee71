"""Reference points and ego motion: projection, tables of fixed size, landmarks that stand still."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from occbev.ego_signals import EgoSignals
from occbev.geometry import frame2ego, make_transform, rotation_from_rpy, rotation_from_wxyz, rotation_from_yaw
from occbev.grid import BevGrid
from occbev.inference import reference_points as rp
from occbev.inference.capacity import TableCapacityError

BEV = BevGrid((-20.0, -10.0), (1.0, 0.5), (40, 40))
LIDAR_BEV = BevGrid((-20.0, -20.0), (1.0, 1.0), (40, 40), "lidar")
FORWARD = make_transform(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]), (1.0, 0.0, 1.5))
INTRINSIC = np.array([[50.0, 0, 40], [0, 50.0, 30], [0, 0, 1]])


def test_pillars_stand_on_cell_centres() -> None:
    points = rp.pillar_points(BEV, (-5.0, 3.0), 4)
    assert points.shape == (1600, 4, 3)
    np.testing.assert_allclose(points[41, 0], (-18.5, -9.25, -4.5))  # column 1, row 1
    np.testing.assert_allclose(points[0, :, 2], (-4.5, -13 / 6, 1 / 6, 2.5))


def test_a_point_ahead_lies_where_the_pinhole_says() -> None:
    matrices = rp.frame_to_images(INTRINSIC[None], FORWARD[None])
    places, visible = rp.project([[11.0, 2.0, 1.5], [-9.0, 0, 1.5], [1.5, 9.0, 1.5]], matrices, (80, 60))
    np.testing.assert_allclose(places[0, 0], ((40 - 50 * 0.2) / 80, 0.5))
    assert visible[0].tolist() == [True, False, False]  # ahead, behind, beside the image


def test_lidar_axes_are_those_of_the_published_vehicle() -> None:
    point = frame2ego("lidar") @ (0, 10, 0, 1)  # forward of the LiDAR
    np.testing.assert_allclose(point[:3], (10.94, 0, 1.84), atol=1e-9)
    with pytest.raises(ValueError, match="map"):
        frame2ego("map")


def test_tables_hold_every_pair_once() -> None:
    generator = np.random.default_rng(0)
    visible = generator.random((3, 30, 2)) < 0.3
    points = generator.random((3, 30, 2, 2)).astype(np.float32)
    tables = rp.reference_tables(points, visible, 25, 3)
    query, places = tables["table_query"].reshape(-1), tables["table_points"].reshape(-1, 2, 2)
    for q, rows in enumerate(tables["table_slot"]):
        used = rows[rows < 75]
        assert (query[used] == q).all()
        cameras = used // 25
        assert sorted(cameras) == np.flatnonzero(visible[:, q].any(-1)).tolist()
        np.testing.assert_array_equal(places[used], points[cameras, q])
    used = np.unique(tables["table_slot"])
    assert (np.delete(places, used[used < 75], 0) == -rp.FAR_AWAY).all()  # padding reads nothing


def test_a_rig_that_needs_more_is_refused() -> None:
    visible = np.ones((2, 30, 1), bool)
    points = np.zeros((2, 30, 1, 2), np.float32)
    with pytest.raises(TableCapacityError, match=r"needs 30 queries.* holds 29.*max_rows"):
        rp.reference_tables(points, visible, 29, 3)
    with pytest.raises(TableCapacityError, match=r"needs 2 cameras.* holds 1.*max_slots"):
        rp.reference_tables(points, visible, 30, 1)


def pose(x: float, y: float, yaw: float) -> np.ndarray:
    return make_transform(rotation_from_yaw(yaw), (x, y, 0.0))


@pytest.mark.parametrize("bev", [BEV, LIDAR_BEV])
@pytest.mark.parametrize("yaw", [0.0, 0.4, 2.9, -2.0])
def test_a_landmark_is_found_where_it_was(bev: BevGrid, yaw: float) -> None:
    before, now = pose(100, 50, yaw - 0.3), pose(102.5, 51.0, yaw)
    motion = rp.EgoMotion.between(before, now)
    assert motion.turn == pytest.approx(0.3)
    axes = frame2ego(bev.frame)[:3, :3]  # as if the LiDAR were at the origin
    landmark = np.array([107.0, 49.0, 0.0])
    seen_now, seen_before = (axes.T @ (p[:3, :3].T @ (landmark - p[:3, 3])) for p in (now, before))
    place = bev.map_coordinates(seen_now[:2]) / bev.shape + rp.bev_shift(motion, bev)
    turned = rotation_from_yaw(motion.turn)[:2, :2] @ bev.metres(place * bev.shape)
    np.testing.assert_allclose(turned, seen_before[:2], atol=1e-4)


def test_the_published_shift() -> None:
    bev = BevGrid((-51.2, -51.2), (0.512, 0.512), (200, 200), "lidar")
    motion = rp.EgoMotion(np.array([2.9, 1.7, 0.0]), math.radians(33), 0.0)
    np.testing.assert_allclose(rp.bev_shift(motion, bev), (0.001501, 0.032793), atol=1e-6)
    ego = BevGrid(bev.lo, bev.pitch, bev.shape)
    np.testing.assert_allclose(rp.bev_shift(motion, ego, True), (0.001501, 0.032793), atol=1e-6)
    np.testing.assert_allclose(rp.bev_shift(motion, ego), (0.032793, -0.001501), atol=1e-6)


def test_alignment_keeps_still_cells_and_drops_what_was_outside() -> None:
    assert (rp.align_table(0.0, BEV) == np.arange(BEV.size)).all()
    turned = rp.align_table(math.pi / 2, LIDAR_BEV)
    assert sorted(turned) == list(range(1600))  # a square grid about its centre
    assert (rp.align_table(0.5, LIDAR_BEV) == 1600).sum() > 100
    off_centre = rp.align_table(math.pi, LIDAR_BEV, (30.0, 20.0))
    assert off_centre.reshape(40, 40)[0, 39] == 39 * 40 + 20


def test_ego_motion_values_stand_in_the_published_order() -> None:
    before, now = pose(10, 20, math.radians(350)), pose(11, 22, math.radians(5))
    motion = rp.EgoMotion.between(before, now)
    values = rp.can_bus(now, motion, EgoSignals.of(range(1, 10)))
    half = math.radians(2.5)
    want = [1, 2, 0, math.cos(half), 0, 0, math.sin(half), *range(1, 10), math.radians(5), 15]
    np.testing.assert_allclose(values, want, atol=1e-5)
    first = rp.can_bus(now, None)
    assert first[:3].tolist() == [0, 0, 0]
    assert first[17] == 0


def test_a_first_frame_knows_no_past() -> None:
    tables = rp.motion_tables(None, BEV)
    assert tables["state_known"] == 0
    assert (tables["table_align"] == BEV.size).all()
    assert not tables["table_shift"].any()


def test_velocity_and_yaw_rate_follow_from_two_poses() -> None:
    """A vehicle that heads left drives 2 m ahead in half a second and turns by 0.1: 4 m/s forward, 0.2 rad/s."""
    before = make_transform(rotation_from_yaw(math.pi / 2 - 0.1), (5.0, 1.0, 0.0))
    now = make_transform(rotation_from_yaw(math.pi / 2), (5.0, 3.0, 0.0))
    values = rp.can_bus(now, rp.EgoMotion.between(before, now, seconds=0.5))
    np.testing.assert_allclose(values[13:16], [4.0, 0.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(values[10:13], [0.0, 0.0, 0.2], atol=1e-5)
    np.testing.assert_allclose(values[7:10], [0, 0, 9.81], atol=1e-5)  # gravity alone is known
    assert not rp.can_bus(now, rp.EgoMotion.between(before, now))[10:16].any()  # nor anything without times


def test_gravity_follows_from_the_pose() -> None:
    """On a hill that rises by 0.1 ahead an accelerometer at rest feels some of gravity forward."""
    slope = rotation_from_rpy(0, -0.1, 0)  # nose up
    values = rp.can_bus(make_transform(slope, (0, 0, 0)), None)
    np.testing.assert_allclose(values[7:10], [9.81 * math.sin(0.1), 0, 9.81 * math.cos(0.1)], atol=1e-5)


def test_derived_signals_are_those_of_a_real_can_file(shared: Path) -> None:
    """nuScenes scene-0103: what we derive from poses half a second apart, beside what the vehicle's bus said."""
    root = shared / "data" / "nuscenes-0103"
    rows = json.loads((root / "can_bus" / "scene-0103_pose.json").read_text())
    stamp = np.array([row["utime"] for row in rows]) / 1e6
    signals = {name: np.array([row[name] for row in rows]) for name in ("accel", "rotation_rate", "vel")}
    poses = [make_transform(rotation_from_wxyz(row["orientation"]), row["pos"]) for row in rows]
    errors = []
    for index in range(25, len(rows), 25):
        motion = rp.EgoMotion.between(poses[index - 25], poses[index], stamp[index] - stamp[index - 25])
        values = rp.can_bus(poses[index], motion)
        said = [signals[name][index - 25 : index].mean(0) for name in ("accel", "rotation_rate", "vel")]
        errors.append(values[7:16] - np.concatenate(said))
    worst = np.abs(errors).max(0)
    assert len(errors) >= 20
    assert worst[6] < 0.5  # forward speed of up to 9 m/s
    assert worst[5] < 0.02  # yaw rate
    assert worst[2] < 0.5  # of gravity's 9.8 m/s^2
    assert worst[0] < 3.5  # braking, which is not known
