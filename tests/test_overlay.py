"""The overlay command: published point counts on real data, motion compensation, and what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from tests.small_bags import Drive

from occbev.cli import main
from occbev.cli.overlay import lidar_in_camera, nearest_sweep
from occbev.geometry import make_transform, rotation_from_yaw
from occbev.results import CameraFrame, Sweep
from occbev.rig import Camera

FORWARD = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
CAMERA = Camera(
    "front",
    640,
    360,
    [[500, 0, 320], [0, 500, 180], [0, 0, 1]],
    make_transform(FORWARD, [1.5, 0, 1.5]),
)

PUBLISHED: Mapping[str, tuple[str, int, dict[str, tuple[int, float]]]] = {
    "nuscenes-one": (
        "scene-0061",
        0,
        {
            "CAM_FRONT": (3067, 10.358),
            "CAM_FRONT_RIGHT": (3079, 13.789),
            "CAM_FRONT_LEFT": (3704, 12.061),
            "CAM_BACK": (4826, 10.179),
            "CAM_BACK_LEFT": (4097, 8.794),
            "CAM_BACK_RIGHT": (3379, 15.967),
        },
    ),
    "nuscenes-0103": (
        "scene-0103",
        1,
        {
            "CAM_FRONT": (2759, 17.268),
            "CAM_FRONT_RIGHT": (2326, 7.910),
            "CAM_FRONT_LEFT": (2912, 14.468),
            "CAM_BACK": (3767, 8.500),
            "CAM_BACK_LEFT": (2104, 7.573),
            "CAM_BACK_RIGHT": (1954, 4.787),
        },
    ),
}
"""Data root -> scene, key frame and, by camera, the points and median depth that its README states."""


def overlay(source: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["overlay", str(source), "--out", str(out), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["frames"]


@pytest.mark.parametrize("root", PUBLISHED)
def test_published_point_counts_and_depths_from_tables_and_from_a_bag(
    root: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("occbev_training")
    from occbev_training.cli import main as main_training

    scene, key, cameras = PUBLISHED[root]
    assert main_training(["nuscenes-to-bag", str(shared / "data" / root), str(tmp_path)]) == 0
    for source in (shared / "data" / root, tmp_path / scene):
        (frame,) = overlay(source, tmp_path / "out", capsys)
        assert (frame["recording"], frame["key"]) == (scene, key)
        found = {name: (c["points"], round(c["median_depth"], 3)) for name, c in frame["cameras"].items()}
        assert found == cameras
        assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in frame["pictures"])


def test_points_are_moved_through_both_ego_poses() -> None:
    wall = np.array([[20.0, -1.5, 1.0], [20.0, 0.0, 1.0], [20.0, 1.5, 1.0]])  # standing in global
    ego_at_sweep = make_transform(np.eye(3), [0, 0, 0])
    ego_at_exposure = make_transform(rotation_from_yaw(0.02), [0.8, 0.1, 0])
    lidar2ego = make_transform(rotation_from_yaw(-np.pi / 2), [0.9, 0, 1.8])
    points = ((np.linalg.inv(lidar2ego) @ np.c_[wall, np.ones(3)].T).T)[:, :3].astype(np.float32)
    frame = CameraFrame("front", 5, b"", ego_at_exposure)
    moved, coverage = lidar_in_camera(Sweep(points, 0, lidar2ego), ego_at_sweep, frame, CAMERA)
    expected = (np.linalg.inv(ego_at_exposure) @ np.c_[wall, np.ones(3)].T).T[:, :3]
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    assert coverage.points == 3
    assert coverage.median_depth == pytest.approx(np.median(expected[:, 0]) - 1.5, abs=1e-5)


def test_points_of_the_vehicle_itself_and_outside_do_not_count() -> None:
    points = np.array([[2.3, 0, 1.5], [-5, 0, 1], [10, 20, 1], [10, 0, 1]], np.float32)
    frame = CameraFrame("front", 0, b"", np.eye(4))
    moved, coverage = lidar_in_camera(Sweep(points, 0, np.eye(4)), np.eye(4), frame, CAMERA)
    assert coverage.points == 1
    np.testing.assert_allclose(moved, points[3:], atol=1e-6)
    assert lidar_in_camera(Sweep(points[:1], 0, np.eye(4)), np.eye(4), frame, CAMERA)[1].median_depth is None


def test_a_calibration_that_the_images_contradict_ends_with_status_1(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("occbev_training")
    from occbev_training.occupancy import extrinsics

    wrong = extrinsics.CameraVerdict("CAM_FRONT", "rolled by 90 degrees", -0.9, extrinsics.Evidence())
    monkeypatch.setattr(extrinsics, "judge_rig", lambda recording: extrinsics.RigVerdict((wrong,), "", 1))
    assert main(["overlay", str(shared / "data" / "nuscenes-one"), "--out", str(tmp_path)]) == 1
    lines = " ".join(capsys.readouterr().out.split())
    assert "scene-0061: calibration contradicts the images: CAM_FRONT: wrong" in lines
    assert "rolled by 90 degrees" in lines


class Stamps:
    def __init__(self, *stamps: int) -> None:
        self.sweep_stamp_ns = np.array(stamps, np.int64)


def test_the_nearest_sweep_within_the_gap() -> None:
    recording: Any = Stamps(0, 100_000_000, 210_000_000)
    assert nearest_sweep(recording, 150_000_001, 0.1) == 1
    assert nearest_sweep(recording, 170_000_000, 0.1) == 2
    assert nearest_sweep(recording, 400_000_000, 0.1) is None
    empty: Any = Stamps()
    assert nearest_sweep(empty, 0, 1.0) is None


def test_bad_sources_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("occbev_training")
    assert main(["overlay", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert "no such bag or nuScenes data root" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    cv2.imwrite(str(tmp_path / "folder" / "a.png"), np.zeros((2, 2, 3), np.uint8))
    assert main(["overlay", str(tmp_path / "folder"), "--out", str(tmp_path / "out")]) == 2
    assert "folder" in capsys.readouterr().err


def test_a_bag_without_a_frame_to_draw_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("occbev_training")
    bag = Drive().write(tmp_path / "bag")
    assert main(["overlay", str(bag), "--out", str(tmp_path / "out")]) == 2
    assert "no key frame has both an image and a sweep within 0.1 s: there is no LiDAR sweep" in capsys.readouterr().err
