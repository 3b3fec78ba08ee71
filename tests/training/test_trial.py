"""The trial of bag-check: cameras in words, motion that cannot be, and one pair with the reasons of what is missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from occbev.rig import Camera, viewing_direction
from occbev_training.cli.bag_check import _camera_table, _verdict_table
from occbev_training.occupancy.extrinsics import CameraVerdict, Evidence, RigVerdict
from occbev_training.occupancy.trial import (
    CameraRow,
    _body_verdict,
    _calibration_verdicts,
    _motion_verdict,
    brightest_side,
    field_of_view,
    try_drive,
)
from occbev_training.sources.bag_check import Verdict
from occbev_training.sources.deskew import EgoBox

FORWARD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
"""Rotation of an optical frame that looks ahead."""


def camera(rotation: np.ndarray) -> Camera:
    cam2ego = np.eye(4)
    cam2ego[:3, :3] = rotation
    return Camera("A", 640, 360, np.array([[320.0, 0, 320], [0, 320, 180], [0, 0, 1]]), cam2ego)


def about(axis: int, degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    turn = np.eye(3)
    turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
    return turn


@pytest.mark.parametrize(
    ("rotation", "words"),
    [
        (FORWARD, "front, level"),
        (about(2, 90) @ FORWARD, "left, level"),
        (about(2, -135) @ FORWARD, "back right, level"),
        (about(1, 20) @ FORWARD, "front, 20 degrees down"),
        (np.eye(3), "up: is `frame_id` the optical frame?"),
        (about(1, 90) @ FORWARD, "down: is `frame_id` the optical frame?"),
        (about(0, 90) @ FORWARD, "front, level, rolled by 90 degrees: is `frame_id` the optical frame?"),
    ],
)
def test_views_in_words(rotation: np.ndarray, words: str) -> None:
    assert viewing_direction(camera(rotation)) == words


def test_field_of_view_and_the_side_of_the_sky() -> None:
    assert field_of_view(camera(FORWARD)) == pytest.approx((90.0, 58.7), abs=0.1)
    rising = np.tile(np.linspace(200, 20, 90, dtype=np.float32)[:, None], (1, 160))
    assert brightest_side([rising]) == "top"
    assert brightest_side([rising[::-1]]) == "bottom"
    assert brightest_side([np.random.default_rng(0).normal(100, 9, (90, 160)).astype(np.float32)]) == "not clear"


def test_a_drive_that_jumps_is_no_odometry(tiny_recording) -> None:
    assert _motion_verdict(tiny_recording).ok
    path = tiny_recording.trajectory
    poses = path.ego2global.copy()
    poses[20:, 0, 3] += 100.0
    tiny_recording.trajectory = dataclasses.replace(path, ego2global=poses)
    verdict = _motion_verdict(tiny_recording)
    assert verdict.must
    assert "1 steps are faster than 70 m/s" in verdict.text


def test_the_trial_says_why_there_is_no_pair_or_what_is_in_it(tiny_recording) -> None:
    trial = try_drive(tiny_recording)
    assert [row.view for row in trial.cameras] == [viewing_direction(c) for c in tiny_recording.rig.cameras]
    pair = trial.verdicts[-1]
    assert pair.requirement == "one pair"
    assert "key frame" in pair.text


def test_the_trial_says_what_counts_as_the_vehicle() -> None:
    verdict = _body_verdict({"points_ego_body": 30, "rays": 90}, EgoBox((-0.5, -0.3, 0.1), (0.6, 0.3, 1.2)))
    assert verdict.ok
    assert "x -0.5 to 0.6, y -0.3 to 0.3, z 0.1 to 1.2 m counts as the vehicle itself, with 25.0%" in verdict.text


def test_a_fault_is_a_must_and_doubt_is_advice() -> None:
    wrong = CameraVerdict("A", "rolled by 90 degrees", -0.9, Evidence())
    doubt = CameraVerdict("B", "", 0.05, Evidence())
    first, second = _calibration_verdicts(RigVerdict((wrong, doubt), "", 2))
    assert (first.ok, first.must) == (False, True)
    assert (second.ok, second.must) == (False, False)
    lidar, *cameras = _calibration_verdicts(RigVerdict((wrong, doubt), "turned", 2))
    assert lidar.must
    assert all(verdict.ok for verdict in cameras)
    assert not _calibration_verdicts(RigVerdict((), "", 0))[0].must


def test_brackets_survive_the_tables(capsys) -> None:
    from rich.console import Console

    row = CameraRow("A[x]", "/a[0]", "1x1", "pinhole", "front [bold]", (90.0, 60.0), "top", "agrees")
    console = Console(width=200)
    console.print(_camera_table([row]))
    console.print(_verdict_table("bag[1]", [Verdict("topic [a]", False, "at [0.5, 1]")]))
    text = capsys.readouterr().out
    for part in ("A[x]", "/a[0]", "front [bold]", "bag[1]", "topic [a]", "at [0.5, 1]"):
        assert part in text
