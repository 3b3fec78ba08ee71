"""Both worlds stay as they are; in world v2 pictures, LiDAR and truth hold the same relief, leaves and bonnet."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("embreex", reason="the simulator casts rays with embreex")

from occbev.classes import DETECTION_CLASSES, FREE, OCCUPANCY_CLASSES
from occbev.cli import demo
from occbev.geometry import make_transform, transform_points
from occbev_training.benchmarks import realism
from occbev_training.simulator.camera import pixel_rays
from occbev_training.simulator.drive import WORLDS, DriveConfig, SimulatedDrive
from occbev_training.simulator.facades import build_house
from occbev_training.simulator.lidar import LidarConfig
from occbev_training.simulator.materials import MaterialTable
from occbev_training.simulator.plants import build_tree
from occbev_training.simulator.raycast import RayScene
from occbev_training.sources.deskew import compensated

STORED = {
    world: (Path(__file__).parent / f"world_{world}.png", seeds)
    for world, seeds in (("v1", (20_054, 200)), ("v2", (10_203,)))
}
CAMERAS = ("CAM_FRONT", "CAM_BACK_LEFT")
RETURNS, RANGES = 1616, (0.735, 7.662, 34.699)
"""Returns of one sweep of seed 200, and the 10th, 50th and 90th percentile of their ranges in metres."""

V1 = DriveConfig(keys=2, image=(160, 90), lidar=LidarConfig(columns=60), world="v1")


def picture(world: str, seeds: tuple[int, ...]) -> NDArray[np.uint8]:
    """Two cameras (180, 320 * seeds / 2, 3) of a key frame of each drive."""
    columns = []
    for seed in seeds:
        frames = SimulatedDrive(seed, replace(V1, world=world)).frame_set(1).frames
        encoded = [frame.image for name in CAMERAS if (frame := frames[name]) is not None]
        columns.append(np.vstack([cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in encoded]))
    return np.hstack(columns).astype(np.uint8)


@pytest.mark.parametrize("world", WORLDS)
def test_each_world_draws_the_stored_picture(world: str) -> None:
    path, seeds = STORED[world]
    stored, drawn = cv2.imread(str(path)), picture(world, seeds)
    assert stored is not None
    apart = np.abs(drawn.astype(int) - stored).max(-1)
    assert (apart > 3).mean() < 0.005, "other processors may round a pixel otherwise, not a street"


def test_world_v1_measures_the_same_ranges() -> None:
    sweep = SimulatedDrive(200, V1).sweep(12)
    assert len(sweep.points) == pytest.approx(RETURNS, abs=3)
    ranges = np.linalg.norm(sweep.points[:, :3], axis=1)
    np.testing.assert_allclose(np.percentile(ranges, (10, 50, 90)), RANGES, atol=0.02)


def test_the_demo_passes_eight_classes_by_day() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    world = SimulatedDrive(demo.SEED, demo._drive_config(parser.parse_args([])))._world
    assert world.light.night == 0
    times = np.arange(1.2, 21.2, 0.5)
    ego, near = world.ego.at(times), set()
    for actor in (*world.static_actors, *world.moving_actors):
        away = np.linalg.norm((actor.track.at(times) - ego)[:, :2], axis=1)
        if away.min() < 20:
            near.add(DETECTION_CLASSES[actor.shape.label])
    assert near >= {"car", "truck", "bus", "pedestrian", "bicycle", "motorcycle", "traffic_cone", "barrier"}


V2 = replace(V1, world="v2", image=(176, 64), lidar=LidarConfig(columns=360))


@pytest.fixture(scope="module")
def street() -> SimulatedDrive:
    """A drive by day in world v2."""
    return SimulatedDrive(10_203, V2)


def test_beams_end_at_leaves_and_facades_where_the_truth_has_them(street: SimulatedDrive) -> None:
    truth = street.occupancy_truth(1)
    index = int(np.searchsorted(street.sweep_stamp_ns, street.key_stamp_ns[1]))
    points = transform_points(street.lidar2ego, compensated(street.sweep(index), street.trajectory).points)
    cells, inside = truth.grid.indices(points[np.linalg.norm(points[:, :2], axis=1) > 5])
    found = truth.semantics[tuple(cells[inside].T)]
    assert (found != FREE).mean() > 0.9
    for name in ("vegetation", "manmade", "driveable_surface", "sidewalk"):
        assert (found == OCCUPANCY_CLASSES.index(name)).sum() > 10, name


def test_cars_of_car_parks_have_boxes_and_stand_clear_of_each_other(street: SimulatedDrive) -> None:
    boxes = street.annotations(1).boxes.box
    assert len(boxes) > 5
    apart = np.linalg.norm(boxes[:, None, :2] - boxes[None, :, :2], axis=-1) + 9 * np.eye(len(boxes))
    assert apart.min() > 0.3


def test_light_and_beams_pass_between_leaves_and_not_through_them() -> None:
    table = MaterialTable(np.random.default_rng(2))
    tree = build_tree(table, 8.0)
    assert set(tree.label) == {OCCUPANCY_CLASSES.index("vegetation")}
    low, high = tree.triangles.min((0, 1)), tree.triangles.max((0, 1))
    assert 6 < high[2] < 11
    side = np.linspace(low[1], high[1], 40)
    y, z = (v.ravel().astype(np.float32) for v in np.meshgrid(side, np.linspace(0.5 * high[2], high[2], 40)))
    origins = np.stack([np.full_like(y, -20), y, z], -1)
    blocked = RayScene(tree.triangles).find_blocked(
        origins, np.tile(np.array([1, 0, 0], np.float32), (len(y), 1)), np.full(len(y), 40, np.float32)
    )
    assert 0.25 < blocked.mean() < 0.9


def test_windows_stand_back_behind_the_wall() -> None:
    table = MaterialTable(np.random.default_rng(3))
    house = build_house(table, 14.0, 10.0, 4)
    x, z = (v.ravel() for v in np.meshgrid(np.linspace(-6.5, 6.5, 90), np.linspace(3.5, 12.0, 90)))
    origins = np.stack([x, np.full_like(x, 30), z], -1).astype(np.float32)
    hits = RayScene(house.triangles).first(
        origins, np.tile(np.array([0, -1, 0], np.float32), (len(x), 1)), np.full(len(x), 60, np.float32)
    )
    assert hits is not None
    front = 30 - hits["tfar"]
    assert front.max() < 5 + 2.0, "nothing stands out farther than a balcony"
    assert (front < 5 - 0.05).mean() > 0.1, "panes"
    assert (np.abs(front - 5) < 0.03).mean() > 0.1, "wall"


def test_pixels_of_the_own_bonnet_see_no_voxel(street: SimulatedDrive) -> None:
    mount = street.rig["CAM_FRONT"]
    low = replace(mount, cam2ego=make_transform(mount.cam2ego[:3, :3], [1.2, 0.0, 1.3]))
    rays = pixel_rays(low).reshape(-1, 3)
    hidden = street._painter.hidden(low, rays).reshape(64, 176)
    assert hidden[-1, 60:116].all()
    assert not hidden[:32].any()
    behind = replace(mount, cam2ego=make_transform(mount.cam2ego[:3, :3], [1.2, 0.0, 0.6]))
    assert not street._painter.hidden(behind, rays).any(), "a camera inside the bodywork looks out of it"


def test_a_seed_draws_a_more_detailed_street_in_world_v2() -> None:
    triangles = {world: len(SimulatedDrive(200, replace(V1, world=world))._scene.mesh) for world in WORLDS}
    assert triangles["v2"] > 2 * triangles["v1"]
    with pytest.raises(ValueError, match="known are v1, v2"):
        replace(V1, world="v3")


def test_statistics_are_those_of_known_images() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((64, 96, 3), 100, np.uint8)
    flat[:, :, 0] = 200
    found = realism.measure([flat])
    assert (found.flat, found.spread_top, found.bright) == (100, 0, 0)
    assert found.saturation == pytest.approx(127.5, abs=0.6)
    noisy = np.clip(rng.normal(128, 12, (64, 96, 1)), 0, 255).astype(np.uint8).repeat(3, 2)
    noisy[:8, :48] = 255
    found = realism.measure([noisy])
    assert found.spread_ground == pytest.approx(12, abs=0.5)
    assert found.bright == pytest.approx(100 / 16, abs=0.2)
    assert found.flat == pytest.approx(100 / 16)
    assert realism.spectrum_slope(rng.normal(0, 1, (64, 96)).astype(np.float32)) == pytest.approx(0, abs=0.15)
    with pytest.raises(ValueError, match="no image"):
        realism.measure([])


def test_goals_are_half_the_distance_of_world_v1() -> None:
    assert realism.goals_met(realism.STATED_V1) == []
    half = replace(realism.STATED_REAL, flat=21.0, slope=-2.6)
    assert set(realism.goals_met(half)) == {f for f in vars(half) if f not in ("saturation", "slope")}
