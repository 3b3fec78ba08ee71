"""The simulated drive against itself: what cameras, LiDAR and truth say of one place must agree."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("embreex")

from occbev.classes import DETECTION_CLASSES, FREE, OCCUPANCY_CLASSES, OCCUPANCY_OF_DETECTION
from occbev.geometry import (
    invert_transform,
    make_transform,
    points_in_box,
    rotation_from_rpy,
    transform_points,
)
from occbev_training.cli import simulate
from occbev_training.simulator.actors import Parts, build_shape
from occbev_training.simulator.camera import MOUNTS, build_rig, pixel_rays
from occbev_training.simulator.drive import SEED_RANGES, DriveConfig, SimulatedDrive, split_of
from occbev_training.simulator.lidar import LidarConfig
from occbev_training.simulator.materials import MaterialTable
from occbev_training.simulator.mesh import MeshBuilder, surface_samples
from occbev_training.simulator.street import Bend
from occbev_training.simulator.world import _ground_tilt, _track_along
from occbev_training.sources.deskew import compensated

SMALL = DriveConfig(keys=3, image=(176, 64), lidar=LidarConfig(columns=540))
CAR = OCCUPANCY_CLASSES.index("car")


@pytest.fixture(scope="module")
def drive() -> SimulatedDrive:
    return SimulatedDrive(11, SMALL)


def _labels(drive: SimulatedDrive, camera: str, key: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Class (h, w) of each pixel, 255 for sky, and its distance."""
    cam, time = drive.rig[camera], drive._camera_time(key, camera)
    drive._painter.place_actors(cam, drive._ego2world(time), time)
    cam2world = drive._ego2world(time) @ cam.cam2ego
    rays = pixel_rays(cam)
    world = rays.reshape(-1, 3) @ cam2world[:3, :3].T.astype(np.float32)
    hits = drive._scene.first(np.broadcast_to(cam2world[:3, 3].astype(np.float32), world.shape), world)
    label = np.where(hits.triangle >= 0, drive._scene.mesh.label[np.maximum(hits.triangle, 0)], 255)
    return label.reshape(rays.shape[:2]), hits.distance.reshape(rays.shape[:2])


def test_a_point_ahead_lands_in_the_middle_of_cam_front(drive: SimulatedDrive) -> None:
    pixels, depth, inside = drive.rig["CAM_FRONT"].project(np.array([[20.0, 0.0, 1.5]]))
    assert inside[0]
    assert depth[0] == pytest.approx(18.3, abs=0.2)
    assert abs(pixels[0, 0] - 88) < 8
    for name, camera in zip(drive.rig.names, drive.rig.cameras, strict=True):
        yaw = np.deg2rad(MOUNTS[name].yaw_deg)
        assert camera.project(np.array([[20 * np.cos(yaw), 20 * np.sin(yaw), 1.0]]))[2][0], name


def test_training_frames_are_the_lower_part_of_scaled_full_frames() -> None:
    full = build_rig(np.random.default_rng(5), (640, 360))
    small = build_rig(np.random.default_rng(5), (352, 128))
    for a, b in zip(full.cameras, small.cameras, strict=True):
        scaled = a.resize(0.55, 0.55, crop=(0, 70), size=(352, 128))
        np.testing.assert_allclose(scaled.intrinsic, b.intrinsic, atol=1e-9)
        np.testing.assert_array_equal(scaled.cam2ego, b.cam2ego)


def test_a_picture_taller_than_the_sensor_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 360"):
        build_rig(np.random.default_rng(0), (640, 400))


def test_frames_carry_their_own_stamps_and_poses(drive: SimulatedDrive) -> None:
    frames = drive.frame_set(1)
    assert frames.cameras == drive.rig.names == tuple(MOUNTS)
    assert 30 < frames.spread_ms < 42
    for frame in frames.frames.values():
        assert frame is not None
        np.testing.assert_allclose(frame.ego2global, drive.trajectory.at(frame.stamp_ns), atol=1e-5)
        picture = cv2.imdecode(np.frombuffer(frame.image, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (64, 176, 3)
        assert picture.std() > 8


def test_sweeps_cover_a_second_around_every_key(drive: SimulatedDrive) -> None:
    assert drive.key_stamp_ns[0] - drive.sweep_stamp_ns[0] >= 1_000_000_000
    assert drive.sweep_stamp_ns[-1] - drive.key_stamp_ns[-1] >= 1_000_000_000
    assert np.isin(drive.key_stamp_ns, drive.sweep_stamp_ns).all()
    assert np.all(np.diff(drive.sweep_stamp_ns) == 100_000_000)
    assert np.all(drive.key_stamp_ns % 1000 == 0)


def test_points_deskewed_with_the_trajectory_fall_into_the_boxes(drive: SimulatedDrive) -> None:
    """Sweep, time offsets, mount, trajectory and boxes in one chain, through the public interface only."""
    key = 1
    index = int(np.searchsorted(drive.sweep_stamp_ns, drive.key_stamp_ns[key]))
    sweep = drive.sweep(index)
    assert sweep.time_offset is not None
    assert np.ptp(sweep.time_offset) == pytest.approx(0.1, rel=0.05)
    points = transform_points(drive.lidar2ego, compensated(sweep, drive.trajectory).points)
    truth = drive.annotations(key)
    counted = np.array([points_in_box(points, box).sum() for box in truth.boxes.box])
    assert counted.sum() > 200
    np.testing.assert_allclose(counted, truth.lidar_points, atol=4)


def test_some_returns_are_the_vehicle_itself(drive: SimulatedDrive) -> None:
    points = transform_points(drive.lidar2ego, drive.sweep(3).points)
    own = np.all((points > [-1.3, -1.05, 0.1]) & (points < [4.0, 1.05, 2.2]), axis=1)
    assert 0.1 < own.mean() < 0.4


def test_rays_through_boxes_meet_them_at_their_depth(drive: SimulatedDrive) -> None:
    """Every annotated car that fills pixels is hit within its box, at a pixel where the box projects to."""
    boxes, met = drive.annotations(1).boxes, 0
    for camera in drive.rig.cameras:
        label, distance = _labels(drive, camera.name, 1)
        rays = pixel_rays(camera)[label == CAR]
        points = transform_points(camera.cam2ego, rays * distance[label == CAR][:, None])
        inside = np.zeros(len(points), bool)
        for box in boxes.box[np.isin(boxes.label, [DETECTION_CLASSES.index("car")])]:
            grown = box[:7] + np.array([0, 0, 0, 0.7, 0.3, 0.2, 0])  # traffic moves during 20 ms
            inside |= points_in_box(points, grown)
        near = np.linalg.norm(points[:, :2], axis=1) < 55
        met += int(inside.sum())
        assert inside[near].mean() > 0.98 if near.any() else True
    assert met > 50


def test_occupancy_agrees_with_the_returns_of_the_key_sweep(drive: SimulatedDrive) -> None:
    truth = drive.occupancy_truth(1)
    index = int(np.searchsorted(drive.sweep_stamp_ns, drive.key_stamp_ns[1]))
    points = transform_points(drive.lidar2ego, compensated(drive.sweep(index), drive.trajectory).points)
    points = points[np.linalg.norm(points[:, :2], axis=1) > 5]
    cells, inside = truth.grid.indices(points)
    cells = tuple(cells[inside].T)
    assert (truth.semantics[cells] != FREE).mean() > 0.93
    assert truth.mask_lidar[cells].mean() > 0.97
    assert (truth.semantics[truth.mask_lidar] == FREE).mean() > 0.7


def test_boxes_are_filled_with_their_class(drive: SimulatedDrive) -> None:
    truth, boxes = drive.occupancy_truth(1), drive.annotations(1).boxes
    centres = truth.grid.centres()[truth.semantics == CAR]
    cars = boxes.box[boxes.label == DETECTION_CLASSES.index("car")]
    grown = [box[:7] + np.array([0, 0, 0, 0.4, 0.4, 0.4, 0]) for box in cars]
    assert np.any([points_in_box(centres, box) for box in grown], axis=0).mean() > 0.99
    near = [box for box in cars if np.abs(box[:2]).max() < 36]
    assert near
    cells, inside = truth.grid.indices(np.array([box[:3] - [0, 0, 0.2] for box in near]))
    held = truth.semantics[tuple(cells[inside].T)]
    assert np.isin(held, OCCUPANCY_OF_DETECTION).mean() > 0.9


def test_cameras_see_what_their_rays_end_in_and_nothing_above_the_roof(
    drive: SimulatedDrive,
) -> None:
    truth = drive.occupancy_truth(1)
    assert 0.05 < truth.mask_camera.mean() < 0.7
    assert not truth.mask_camera[98:102, 99:101, 10:].any()
    camera = drive.rig["CAM_FRONT"]
    _, distance = _labels(drive, "CAM_FRONT", 1)
    reached = distance < 35
    points = transform_points(camera.cam2ego, pixel_rays(camera)[reached] * distance[reached][:, None])
    cells, inside = truth.grid.indices(points)
    assert truth.mask_camera[tuple(cells[inside].T)].mean() > 0.97


def test_velocity_is_the_displacement_between_keys(drive: SimulatedDrive) -> None:
    before, after = drive.annotations(0), drive.annotations(1)
    poses = drive.trajectory.at_many(drive.key_stamp_ns[:2])
    seconds = (drive.key_stamp_ns[1] - drive.key_stamp_ns[0]) / 1e9
    moved = 0
    for name in set(before.instance) & set(after.instance):
        a, b = (
            before.boxes.box[before.instance.index(name)],
            after.boxes.box[after.instance.index(name)],
        )
        shift = transform_points(poses[1], b[:3]) - transform_points(poses[0], a[:3])
        mean = (poses[0][:3, :2] @ a[7:9] + poses[1][:3, :2] @ b[7:9]) / 2
        np.testing.assert_allclose(shift[:2] / seconds, mean[:2], atol=0.6)
        moved += bool(np.linalg.norm(a[7:9]) > 0.5)
    assert moved >= 2


def test_nothing_stands_in_the_way_of_the_ego(drive: SimulatedDrive) -> None:
    body = np.array([[x, y, 0.8] for x in np.linspace(-0.9, 3.6, 10) for y in (-0.9, 0.0, 0.9)])
    for key in range(3):
        for box in drive.annotations(key).boxes.box:
            assert not points_in_box(body, box).any()


def test_the_street_is_populated(drive: SimulatedDrive) -> None:
    boxes = drive.annotations(1).boxes
    within = np.linalg.norm(boxes.box[:, :2], axis=1) < 50
    assert 8 <= within.sum() <= 80
    semantics = drive.occupancy_truth(1).semantics
    for name in ("driveable_surface", "sidewalk", "manmade"):
        assert (semantics == OCCUPANCY_CLASSES.index(name)).sum() > 300, name
    road = semantics[100:110, 98:100] == OCCUPANCY_CLASSES.index("driveable_surface")
    assert road[..., 2].mean() > 0.9  # z = 0 lies in layer 2, from -0.2 to 0.2 m


def test_a_seed_is_a_drive() -> None:
    tiny = DriveConfig(keys=1, image=(96, 48), lidar=LidarConfig(columns=90))
    first, again, other = (SimulatedDrive(seed, tiny) for seed in (4, 4, 5))
    sets = [d.frame_set(0).frames["CAM_BACK"].image for d in (first, again, other)]
    assert sets[0] == sets[1] != sets[2]
    np.testing.assert_array_equal(first.sweep(2).points, again.sweep(2).points)
    np.testing.assert_array_equal(first.occupancy_truth(0).semantics, again.occupancy_truth(0).semantics)
    assert first.rig.hash == again.rig.hash != other.rig.hash


def test_splits_share_no_seed() -> None:
    for a, b in combinations(SEED_RANGES.values(), 2):
        assert a.stop <= b.start or b.stop <= a.start
    assert [split_of(s) for s in (0, 9_999, 10_000, 19_999, 20_000)] == [
        "train",
        "train",
        "validation",
        "validation",
        "test",
    ]
    with pytest.raises(ValueError, match="no split"):
        split_of(-1)


@pytest.mark.parametrize(("changes", "text"), [({"keys": 0}, "key frames"), ({"key_rate": 3.0}, "must divide")])
def test_impossible_drives_are_refused(changes: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DriveConfig(**changes)


def test_colour_does_not_give_the_class_away() -> None:
    """Nearest neighbours in mean colour, over rendered pixels of other drives, stay near chance."""
    tiny = DriveConfig(keys=2, key_rate=0.5, image=(176, 64), lidar=LidarConfig(columns=90))
    colours, groups, drives = [], [], []
    members = {
        CAR: 0,
        OCCUPANCY_CLASSES.index("pedestrian"): 1,
        OCCUPANCY_CLASSES.index("manmade"): 2,
    }
    for seed in range(30, 37):
        drive = SimulatedDrive(seed, tiny)
        for key in range(2):
            frames = drive.frame_set(key).frames
            for name in drive.rig.names:
                picture = cv2.imdecode(np.frombuffer(frames[name].image, np.uint8), cv2.IMREAD_COLOR)
                label, _ = _labels(drive, name, key)
                for chosen, group in members.items():
                    count, parts = cv2.connectedComponents((label == chosen).astype(np.uint8))
                    for part in range(1, count):
                        if (parts == part).sum() >= 12:
                            colours.append(picture[parts == part].mean(0))
                            groups.append(group)
                            drives.append(seed)
    accuracy = _neighbour_accuracy(np.array(colours), np.array(groups), np.array(drives))
    assert accuracy < 1 / 3 + 0.17, f"balanced accuracy {accuracy:.2f}, chance 0.33"


def _neighbour_accuracy(colours: NDArray[np.float64], groups: NDArray[np.int64], drives: NDArray[np.int64]) -> float:
    """Balanced accuracy of 15 nearest neighbours from other drives, each class voting with equal weight."""
    right: list[list[bool]] = [[], [], []]
    for colour, group, drive in zip(colours, groups, drives, strict=True):
        others = drives != drive
        order = np.argsort(np.linalg.norm(colours[others] - colour, axis=1))[:15]
        votes = np.bincount(groups[others][order], minlength=3) / np.maximum(
            np.bincount(groups[others], minlength=3), 1
        )
        right[group].append(int(votes.argmax()) == group)
    assert min(map(len, right)) >= 15
    return float(np.mean([np.mean(r) for r in right]))


@pytest.mark.parametrize("name", DETECTION_CLASSES)
def test_shapes_fill_their_boxes(name: str) -> None:
    table = MaterialTable(np.random.default_rng(1))
    shape = build_shape(name, table, Parts.create(table))
    low, high = shape.mesh.triangles.min((0, 1)), shape.mesh.triangles.max((0, 1))
    np.testing.assert_allclose(high - low, shape.size, atol=1e-5)
    assert abs(low[2]) < 1e-5
    assert np.abs(low[:2] + high[:2]).max() < 1e-5
    assert DETECTION_CLASSES[shape.label] == name
    assert set(shape.mesh.label) == {OCCUPANCY_OF_DETECTION[shape.label]}


def test_surface_samples_leave_no_gap() -> None:
    builder = MeshBuilder(3)
    builder.quads([[[0, 0, 0], [7, 0, 0], [7, 5, 0], [0, 5, 0]]], 0)
    points, label = surface_samples(builder.build(), 0.2)
    assert set(label) == {3}
    cells = {tuple(c) for c in np.floor(points[:, :2] / 0.4).astype(int)}
    assert all((i, j) in cells for i in range(17) for j in range(12))
    assert len(points) < 2 * 35 / 0.04


def test_solids_have_points_inside_themselves_only() -> None:
    builder = MeshBuilder(1)
    builder.box((1, 2, 3), (2, 1, 0.8), 0, yaw=0.5)
    solid = builder.build().solid
    assert len(solid) >= 20
    assert points_in_box(solid, np.array([1, 2, 3, 2, 1, 0.8, 0.5])).all()


def test_the_simulator_needs_neither_torch_nor_numba() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['numba'] = None; import occbev_training.simulator.drive"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_finished_drives_are_not_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = DriveConfig(keys=1, image=(96, 48), lidar=LidarConfig(columns=60))
    simulate.write_seed(3, tiny, tmp_path, "nuscenes")

    class Forbidden(SimulatedDrive):
        def __init__(self, *_: object) -> None:
            raise AssertionError("rendered again")

    monkeypatch.setattr(simulate, "SimulatedDrive", Forbidden)
    simulate.write_seed(3, tiny, tmp_path, "nuscenes")
    with pytest.raises(AssertionError, match="rendered again"):
        simulate.write_seed(4, tiny, tmp_path, "nuscenes")


def test_settings_cannot_be_mixed_in_one_folder(tmp_path: Path) -> None:
    simulate._record(tmp_path, DriveConfig(), [1, 2])
    simulate._record(tmp_path, DriveConfig(), [3])
    with pytest.raises(ValueError, match="other settings"):
        simulate._record(tmp_path, DriveConfig(keys=5), [4])


def test_deskewed_ground_is_flat_under_the_vehicle(drive: SimulatedDrive) -> None:
    points = transform_points(drive.lidar2ego, compensated(drive.sweep(12), drive.trajectory).points)
    around = np.linalg.norm(points[:, :2] - [1, 0], axis=1)
    near = points[(around > 5) & (around < 9) & (np.abs(points[:, 1]) < 1.5)]
    assert abs(np.median(near[:, 2])) < 0.08
    identity = drive.trajectory.at(int(drive.sweep_stamp_ns[12]))
    np.testing.assert_allclose(invert_transform(identity) @ identity, np.eye(4), atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_roads_are_hilly_but_not_steep(seed: int) -> None:
    bend = Bend.draw(np.random.default_rng(seed), -80.0, 200.0)
    road = bend.at(bend.s, 0.0)
    slope = np.diff(road[:, 2]) / np.linalg.norm(np.diff(road[:, :2], axis=0), axis=1)
    assert 0.0005 < np.abs(slope).max() < 0.041
    np.testing.assert_allclose(bend.at(0.0, [0.0, -9.0, 9.0])[:, 2], 0, atol=1e-9)
    beside = bend.at(0.0, np.array([-60.0, 60.0]))[:, 2]
    np.testing.assert_allclose(beside, bend.banks * 50**2 / 58)


def test_the_ground_is_no_secret_that_the_mean_of_all_drives_knows() -> None:
    """Ahead of the vehicle the ground leaves the layer that it stands in, up or down, in many drives."""
    ahead = [Bend.draw(np.random.default_rng(seed), -80.0, 200.0) for seed in range(60)]
    height = [bend.at(30.0, 0.0)[2] - 30 * (bend.at(1.0, 0.0)[2] - bend.at(-1.0, 0.0)[2]) / 2 for bend in ahead]
    assert np.mean(np.abs(height) > 0.2) > 0.4
    assert min(height) < -0.4 < 0.4 < max(height)


def test_the_wheels_stand_on_the_ground_on_hills_and_in_turns() -> None:
    rng = np.random.default_rng(3)
    bend = Bend.draw(rng, -80.0, 200.0)
    line = np.array([[0.0, 0.0], [60.0, 0.0], [70.0, 10.0], [70.0, 60.0]])
    travelled = np.linspace(5, 110, 80)
    tilt = _ground_tilt(line, travelled, bend)
    pose = _track_along(line, travelled, bend, travelled).pose
    assert np.abs(tilt[:, 0]).max() > 0.005  # on the cross slope after the turn
    s, d = np.meshgrid(np.arange(-10, 120, 0.5), np.arange(-15, 70, 0.5))
    ground = bend.at(s.ravel(), d.ravel())
    wheels = np.array([[x, y, 0.0] for x in (-1.4, 1.4) for y in (-0.8, 0.8)])
    for (roll, pitch), (x, y, z, yaw) in zip(tilt, pose, strict=True):
        ego2world = make_transform(rotation_from_rpy(roll, pitch, yaw), [x, y, z])
        for wheel in transform_points(ego2world, wheels):
            nearest = np.linalg.norm(ground[:, :2] - wheel[:2], axis=1).argmin()
            assert abs(ground[nearest, 2] - wheel[2]) < 0.05
