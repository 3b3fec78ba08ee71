"""Calibrations against images: right ones agree, and each kind of wrong one is named on real frames."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from occbev.geometry import transform_points
from occbev.rig import Camera, CameraRig
from occbev_training.occupancy.extrinsics import (
    CameraVerdict,
    Evidence,
    Moment,
    Placement,
    RigVerdict,
    View,
    _swapped_with,
    choose_placement,
    gather,
    lidar_turns,
    placements,
    small_grey,
    weigh,
    weigh_placements,
)
from occbev_training.sources.nuscenes import open_nuscenes
from occbev_training.sources.recording import RecordingError

SHARED = Path(os.environ.get("OCCBEV_SHARED", "../shared"))


@pytest.fixture(scope="module")
def boston() -> tuple[CameraRig, list[Moment], np.ndarray]:
    """Two key frames of scene-0103, half a second apart."""
    root = SHARED / "data" / "nuscenes-0103"
    if not root.is_dir():
        pytest.skip(f"no {root}: real frames are needed")
    recording = next(iter(open_nuscenes(root).recordings(None, available_only=True)))
    return recording.rig, gather(recording), recording.lidar2ego


def turned(camera: Camera, axis: tuple[float, float, float], degrees: float) -> Camera:
    turn = np.eye(4)
    turn[:3, :3] = cv2.Rodrigues(np.array(axis) * np.deg2rad(degrees))[0]
    return replace(camera, cam2ego=camera.cam2ego @ turn)


def judge(camera: Camera, rig: CameraRig, moments: list[Moment]) -> CameraVerdict:
    return choose_placement(camera.name, weigh_placements(moments, camera, rig))


def test_a_right_camera_agrees(boston) -> None:
    rig, moments, _ = boston
    assert len(moments) == 2
    verdict = judge(rig["CAM_FRONT"], rig, moments)
    assert verdict.answer == "agrees", verdict.text


@pytest.mark.parametrize(
    ("axis", "degrees", "fault"),
    [
        ((0.0, 0.0, 1.0), 90, "rolled by 90 degrees"),
        ((0.0, 1.0, 0.0), 180, "turned by 180 degrees"),
        ((1.0, 0.0, 0.0), -5, "pitched by 5 degrees"),
    ],
)
def test_a_turned_camera_is_named(boston, axis, degrees, fault) -> None:
    rig, moments, _ = boston
    verdict = judge(turned(rig["CAM_FRONT"], axis, degrees), rig, moments)
    assert (verdict.answer, verdict.fault) == ("wrong", fault)


def test_the_body_frame_is_named(boston) -> None:
    rig, moments, _ = boston
    body = np.eye(4)
    body[:3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    camera = rig["CAM_FRONT_LEFT"]
    verdict = judge(replace(camera, cam2ego=camera.cam2ego @ body), rig, moments)
    assert verdict.fault.startswith("in the body frame")


def test_the_other_of_two_swapped_cameras_is_named_too() -> None:
    """Its own images need not be sure: two cameras are not at one place."""
    here, there = Placement("", np.eye(4)), Placement("in the place of A", np.eye(4), "A")
    a = [(Placement("in the place of B", np.eye(4), "B"), Evidence(edges=1.0, edge_count=500))]
    b = [(here, Evidence()), (there, Evidence(edges=0.05, edge_count=500))]
    verdicts = {
        "A": CameraVerdict("A", "in the place of B", -0.9, Evidence()),
        "B": CameraVerdict("B", "", 0, Evidence()),
    }
    assert _swapped_with(verdicts, "A", {"A": a, "B": b})["B"].fault == "in the place of A"
    worse = [(here, Evidence(edges=0.1, edge_count=500)), b[1]]
    assert _swapped_with(verdicts, "A", {"A": a, "B": worse}) == {}


def test_a_turned_lidar_fits_worse_than_its_correction(boston) -> None:
    rig, moments, lidar2ego = boston
    correction = lidar_turns(lidar2ego)["turned by +90 degrees about the vertical"]
    wrong = np.linalg.inv(correction)
    for moment in moments:
        view = moment.views["CAM_FRONT"]
        edges = tuple(transform_points(wrong, part) for part in view.edges)
        moved = replace(view, points=transform_points(wrong, view.points), edges=edges)
        turned_moment = [replace(moment, views={**moment.views, "CAM_FRONT": moved})]
        place = Placement("", rig["CAM_FRONT"].cam2ego)
        corrected = weigh(turned_moment, "CAM_FRONT", replace(place, lidar_turn=correction))
        assert corrected.score > weigh(turned_moment, "CAM_FRONT", place).score + 0.12


def test_noise_is_not_sure() -> None:
    """Images without structure contradict nothing."""
    rng = np.random.default_rng(0)
    cameras = []
    for name, yaw in (("A", 0.0), ("B", 1.5)):
        cam2ego = np.eye(4)
        cam2ego[:3, :3] = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        cameras.append(
            turned(
                Camera(name, 320, 180, np.array([[200.0, 0, 160], [0, 200, 90], [0, 0, 1]]), cam2ego), (0, 1, 0), yaw
            )
        )
    rig = CameraRig(tuple(cameras))
    views = {}
    for camera in cameras:
        grey, small = small_grey(rng.integers(0, 255, (180, 320, 3), np.uint8), camera)
        points = rng.uniform(-30, 30, (3000, 3))
        views[camera.name] = View(small, 0, grey, points, (points[:300], points[:300] + rng.normal(0, 0.1, (300, 3))))
    moment = Moment(views, views, {camera.name: np.eye(4) for camera in cameras})
    for camera in cameras:
        assert judge(camera, rig, [moment]).fault == ""


def test_placements_undo_what_they_name() -> None:
    camera = Camera("A", 64, 36, np.array([[50.0, 0, 32], [0, 50, 18], [0, 0, 1]]), np.eye(4))
    rig = CameraRig((camera,))
    wrong = turned(camera, (0.0, 0.0, 1.0), 90)
    back = [p for p in placements(wrong, rig) if np.allclose(p.cam2ego, camera.cam2ego)]
    assert [p.fault for p in back] == ["rolled by 90 degrees"]


def test_a_rig_without_a_key_frame_has_no_agreement() -> None:
    assert np.isnan(RigVerdict((), "", 0).agreement)
    wrong = CameraVerdict("A", "rolled by 90 degrees", -0.5, Evidence())
    verdict = RigVerdict((wrong, CameraVerdict("B", "", 0.5, Evidence())), "", 2)
    assert verdict.agreement == 0.5
    assert verdict.faults == [f"A: {wrong.text}"]
    assert "wrong: by its images, the calibration is rolled by 90 degrees" in wrong.text


def test_an_image_that_cannot_be_decoded_is_named() -> None:
    camera = Camera("A", 64, 36, np.array([[50.0, 0, 32], [0, 50, 18], [0, 0, 1]]), np.eye(4))
    with pytest.raises(RecordingError, match="camera A"):
        small_grey(b"no image", camera)
