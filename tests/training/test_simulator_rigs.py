"""Simulated drives through the user's own rig: any number of cameras of any lens and size, and any LiDAR."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from occbev.config import ConfigError, LiftConfig
from occbev.geometry import make_transform, rotation_from_rpy, transform_points
from occbev.grid import GRIDS
from occbev.inference.tables import depth_scale
from occbev.lens import Lens
from occbev.rig import Camera, CameraRig
from occbev_training.cli import main
from occbev_training.data.cache import CachedSample, open_cache
from occbev_training.evaluation.label_scores import believed_depth, depth_errors
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.simulator.lidar import LidarConfig, mount_lidar, read_lidar
from occbev_training.simulator.rigs import draw_fisheye_rig, draw_lidar, draw_rig, draw_vehicle

OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def surround_rig() -> CameraRig:
    """Three fisheyes of 190 degrees on the body and one wide pinhole of another size behind the windscreen."""

    def pose(yaw_deg: float, pitch_deg: float, *place: float) -> np.ndarray:
        return make_transform(rotation_from_rpy(0, np.deg2rad(pitch_deg), np.deg2rad(yaw_deg)) @ OPTICAL, place)

    fisheye = np.array([[38.0, 0, 70], [0, 38, 45], [0, 0, 1]])
    pinhole = np.array([[80.0, 0, 80], [0, 80, 30], [0, 0, 1]])
    lens = ("equidistant", (0.02, -0.005, 0.001, 0.0))
    return CameraRig(
        (
            Camera("windscreen", 160, 64, pinhole, pose(0, 0, 1.5, 0.0, 1.4)),
            Camera("left mirror", 140, 90, fisheye, pose(90, 15, 1.9, 0.95, 1.0), *lens),
            Camera("tail", 140, 90, fisheye, pose(180, 15, -1.0, 0.0, 0.9), *lens),
            Camera("right mirror", 140, 90, fisheye, pose(-90, 15, 1.9, -0.95, 1.0), *lens),
        )
    )


@pytest.fixture(scope="module")
def drive() -> SimulatedDrive:
    lidar = LidarConfig(columns=360, rings=64, position=(0.2, 0.0, 2.1), rotation_deg=(0.0, 0.0, 30.0))
    config = DriveConfig(keys=1, lidar=lidar, rig=surround_rig(), grid=GRIDS["tiny"])
    return SimulatedDrive(20_050, config)


def test_cameras_keep_their_names_sizes_and_places(drive: SimulatedDrive) -> None:
    assert drive.rig.hash == surround_rig().hash
    frames = drive.frame_set(0).frames
    for camera in drive.rig.cameras:
        picture = cv2.imdecode(np.frombuffer(frames[camera.name].image, np.uint8), 1)
        assert picture.shape[:2] == (camera.height, camera.width)
    assert len({frame.stamp_ns for frame in frames.values()}) == 4


def test_a_fisheye_is_dark_where_it_shows_nothing_and_sees_beside_itself(drive: SimulatedDrive) -> None:
    camera = drive.rig["tail"]
    picture = cv2.imdecode(np.frombuffer(drive.frame_set(0).frames["tail"].image, np.uint8), 0)
    assert picture[:4, :4].mean() < 20 < picture[20:70, 40:100].mean()
    beside = camera.cam2ego @ np.array([5.0, 0.0, -0.3, 1.0])  # behind the image plane
    _, _, inside = camera.project(beside[None, :3])
    assert inside[0]


def test_what_the_lidar_hits_is_seen_by_the_camera_that_looks_there(drive: SimulatedDrive) -> None:
    """A return that a camera's truth does not see stands behind something nearer; few do from a roof."""
    sweep = drive.sweep(int(np.argmin(np.abs(drive.sweep_stamp_ns - drive.key_stamp_ns[0]))))
    points = transform_points(sweep.lidar2ego, sweep.points)
    truth = drive.occupancy_truth(0)
    cells, in_grid = truth.grid.indices(points)
    away = np.linalg.norm(points[:, :2], axis=1) > 4  # not the vehicle itself
    for name in ("left mirror", "tail"):
        _, _, inside = drive.rig[name].project(points)
        chosen = inside & in_grid & away
        assert chosen.sum() > 200
        assert truth.mask_camera[tuple(cells[chosen].T)].mean() > 0.8


def test_a_lidar_turns_and_stands_where_its_rig_file_says(tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    surround_rig().save(path)
    assert read_lidar(path) == LidarConfig()
    record = yaml.safe_load(path.read_text())
    record["lidar"] = {"rings": 128, "position": [1.0, 0.5, 2.0], "rotation_deg": [0.0, 0.0, 90.0]}
    path.write_text(yaml.safe_dump(record))
    lidar = read_lidar(path)
    assert (lidar.rings, lidar.position) == (128, (1.0, 0.5, 2.0))
    forward = mount_lidar(lidar)[:3, :3] @ [0, 1, 0]
    np.testing.assert_allclose(forward, [0, 1, 0], atol=1e-9)
    assert len(CameraRig.load(path)) == 4, "other readers pass over the LiDAR"
    record["lidar"] = {"ring": 64}
    path.write_text(yaml.safe_dump(record))
    with pytest.raises(ConfigError, match=r"rig\.yaml.*ring"):
        read_lidar(path)


def test_the_command_takes_a_rig_file(tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    CameraRig(surround_rig().cameras[2:3]).save(path)
    path.write_text(path.read_text() + "lidar: {rings: 16, columns: 90}\n")
    out = tmp_path / "out"
    arguments = ["simulate", "--out", str(out), "--keys", "1", "--format", "bag", "--rig", str(path), "--workers", "1"]
    assert main([*arguments, "--first-seed", "20051", "--world", "v1"]) == 0
    settings = json.loads((out / "simulation.json").read_text())["config"]
    assert settings["lidar"]["rings"] == 16
    assert [camera["name"] for camera in settings["rig"]] == ["tail"]
    assert CameraRig.load(out / "truth/sim-020051/rig.yaml").names == ("tail",)


def test_worlds_and_lidars_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="v1"):
        DriveConfig(world="v9")
    with pytest.raises(ConfigError, match="rings"):
        LidarConfig(rings=0)
    with pytest.raises(ConfigError, match="elevation_deg"):
        LidarConfig(elevation_deg=(10.0, -10.0))


def test_random_rigs_differ_and_keep_their_bounds() -> None:
    rigs = [draw_rig(np.random.default_rng(seed)) for seed in range(40)]
    assert {len(rig) for rig in rigs} == set(range(3, 9))
    cameras = [camera for rig in rigs for camera in rig.cameras]
    ratio = np.array([camera.intrinsic[0, 0] / camera.width / (1260 / 1600) for camera in cameras])
    height = np.array([camera.cam2ego[2, 3] for camera in cameras])
    assert (ratio.min(), ratio.max()) == (pytest.approx(0.5, abs=0.05), pytest.approx(1.6, abs=0.1))
    assert 0.5 <= height.min() < 0.7 < 2.3 < height.max() <= 2.5
    assert len({(camera.width, camera.height) for camera in cameras}) == 5
    rings = {draw_lidar(np.random.default_rng(seed), 10.0).rings for seed in range(40)}
    assert rings == {16, 32, 64, 128}
    assert draw_rig(np.random.default_rng(3)).hash == rigs[3].hash
    with pytest.raises(ValueError, match="exclude each other"):
        DriveConfig(rig=rigs[0], random_rigs=True)


def test_random_fisheyes_look_far_aside_and_are_as_many_as_asked_for() -> None:
    cameras = [camera for seed in range(30) for camera in draw_fisheye_rig(np.random.default_rng(seed)).cameras]
    edges = [camera.lens.unproject([[0, camera.height / 2], [camera.width, camera.height / 2]]) for camera in cameras]
    across = [np.degrees(np.arccos(rays[:, 2])).sum() for rays in edges if np.isfinite(rays).all()]
    assert len(across) > 0.8 * len(cameras), "of some the picture is wider than the circle that the lens shows"
    assert min(across) == pytest.approx(120, abs=10)
    assert max(across) == pytest.approx(190, abs=10)
    rigs = [draw_vehicle(seed, 10.0, fisheyes=0.3)[0] for seed in range(60)]
    assert 8 <= sum(rig.cameras[0].lens.is_fisheye for rig in rigs) <= 30
    assert not any(draw_vehicle(seed, 10.0)[0].cameras[0].lens.is_fisheye for seed in range(20))
    with pytest.raises(ValueError, match="fisheyes"):
        DriveConfig(fisheyes=0.5)


def test_every_prepared_drive_has_a_rig_of_its_own_at_network_size(tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the command imports the label kernels: training environment")
    model = tmp_path / "model.yaml"
    model.write_text(f"base: {Path(__file__).parents[2] / 'config/models/occbev-tiny.yaml'}\nimage: {{lens: keep}}\n")
    seen = CameraRig(surround_rig().cameras[2:3])
    seen.save(tmp_path / "rig.yaml")
    (tmp_path / "rig.yaml").write_text((tmp_path / "rig.yaml").read_text() + "lidar: {rings: 16, columns: 90}\n")
    common = ["prepare", "--no-labels", "--keys", "1", "--model", str(model), "--first-seed", "20052"]
    ways = {
        "random": ["--simulate", "2", "--random-rigs"],
        "mine": ["--simulate", "1", "--rig", f"{tmp_path}/rig.yaml"],
    }
    caches = {}
    for name, way in ways.items():
        assert main([*common, *way, "--out", str(tmp_path / name)]) == 0
        caches[name] = open_cache(tmp_path / name)
    one, other = caches["random"]
    assert one.images.shape[1:] == other.images.shape[1:] == (128, 352, 3)
    assert one.intrinsic.shape != other.intrinsic.shape or not np.allclose(one.intrinsic, other.intrinsic)
    assert caches["random"].cameras_of(0) == tuple(f"camera_{i}" for i in range(len(one.images)))
    (mine,) = caches["mine"]
    assert caches["mine"].cameras_of(0) == ("tail",)
    lens = Lens.from_matrix(mine.intrinsic[0])
    assert (lens.model, lens.coefficients) == ("equidistant", (0.02, -0.005, 0.001, 0.0))
    assert lens.intrinsic[0, 0] == pytest.approx(38 * 352 / 140)


@pytest.mark.parametrize("fisheye", [False, True])
def test_depth_is_scored_in_metres_through_any_lens(fisheye: bool) -> None:
    rig = CameraRig(tuple(camera for camera in surround_rig().cameras if camera.lens.is_fisheye == fisheye)[:1])
    camera, count = rig.cameras[0], GRIDS["tiny"].size
    post = transform_points(camera.cam2ego, np.array([[1.0, -3.0, 9.0]]))
    pixel, away = camera.lens.see(transform_points(camera.ego2cam, post))
    volume, nothing = np.zeros(GRIDS["tiny"].shape, np.uint8), np.zeros(0, np.int64)
    images = np.zeros((1, camera.height, camera.width, 3), np.uint8)
    lidar = (np.zeros(1, np.uint8), pixel.astype(np.float32), away.astype(np.float32))
    boxes, unseen = (np.zeros((0, 9), np.float32), nothing, nothing), np.zeros(count, bool).reshape(volume.shape)
    cameras = (rig.lens_matrices, np.stack([camera.cam2ego]))
    sample = CachedSample(images, np.ones(1, bool), *cameras, *lidar, *[volume] * 4, *boxes, volume, unseen)
    lift = LiftConfig(canonical_focal=40.0)
    scale = depth_scale(rig.lens_matrices, lift)[0]
    shape = (lift.depth.bins, camera.height // 16, camera.width // 16)
    logits = np.full((1, *shape), -9.0, np.float32)
    logits[0, int(away[0] / scale - lift.depth.lo)] = 9.0
    _, obstacle = depth_errors(sample, believed_depth(logits, lift, rig.lens_matrices), 16)
    assert len(obstacle) == 1, "the post's return is an obstacle"
    assert obstacle[0] < 0.5 * scale / away[0] + 1e-6, "half a bin"
