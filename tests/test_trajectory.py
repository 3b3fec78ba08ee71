"""Poses between samples, and the gaps in which there are none."""

from __future__ import annotations

import numpy as np
import pytest

from occbev.geometry import make_transform, rotation_from_rpy, rotation_from_yaw, yaw_from_rotation
from occbev.trajectory import PoseError, Trajectory


def drive(seconds: float = 1.0, rate: float = 50.0) -> Trajectory:
    stamps = (np.arange(int(seconds * rate) + 1) / rate * 1e9).astype(np.int64)
    poses = [make_transform(rotation_from_yaw(t / 1e9), [3 * t / 1e9, 1.0, 0.0]) for t in stamps]
    return Trajectory(stamps, np.stack(poses))


def test_samples_are_returned_as_they_are() -> None:
    trajectory = drive()
    np.testing.assert_allclose(trajectory.at_many(trajectory.stamp_ns), trajectory.ego2global, atol=1e-12)


def test_between_samples_motion_is_linear_and_the_turn_even() -> None:
    pose = drive().at(507_000_000)
    np.testing.assert_allclose(pose[:3, 3], [3 * 0.507, 1, 0], atol=1e-9)
    assert yaw_from_rotation(pose[:3, :3]) == pytest.approx(0.507, abs=1e-9)


def test_slerp_takes_the_short_way_round() -> None:
    turns = [rotation_from_rpy(0, 0, np.pi - 0.01), rotation_from_rpy(0, 0, -np.pi + 0.01)]
    trajectory = Trajectory(np.array([0, 100_000_000]), np.stack([make_transform(r, [0, 0, 0]) for r in turns]))
    assert abs(yaw_from_rotation(trajectory.at(50_000_000)[:3, :3])) == pytest.approx(np.pi)


def test_relative_motion_carries_points_between_ego_frames() -> None:
    trajectory = drive()
    then2now = trajectory.relative(0, 1_000_000_000)
    np.testing.assert_allclose(trajectory.at(1_000_000_000) @ then2now, trajectory.at(0), atol=1e-12)


def test_a_gap_and_a_far_stamp_have_no_pose() -> None:
    stamps = np.array([0, 1_000_000_000])
    trajectory = Trajectory(stamps, np.tile(np.eye(4), (2, 1, 1)))
    with pytest.raises(PoseError, match="1.000 s apart"):
        trajectory.at(500_000_000)
    np.testing.assert_array_equal(trajectory.at(1_000_000_000), np.eye(4))
    with pytest.raises(PoseError, match="poses cover"):
        trajectory.at(1_100_000_000)
    np.testing.assert_array_equal(trajectory.at(1_010_000_000), np.eye(4))


def test_stamps_that_step_back_are_refused() -> None:
    with pytest.raises(ValueError, match="must increase"):
        Trajectory(np.array([5, 5]), np.tile(np.eye(4), (2, 1, 1)))


def test_the_error_of_interpolation_is_estimated() -> None:
    """On a circle of radius r, a gap of h seconds at speed v leaves (v h)^2 / (8 r) in its middle."""
    for h in (0.1, 0.2):
        time = np.arange(0, 6, h)
        yaw = time * 10 / 20
        poses = np.stack([make_transform(rotation_from_yaw(a), (20 * np.sin(a), 20 * (1 - np.cos(a)), 0)) for a in yaw])
        metres, radians = Trajectory((time * 1e9).astype(np.int64) + 1, poses).interpolation_error
        assert metres == pytest.approx((10 * h) ** 2 / (8 * 20), rel=0.05)
        assert radians < 1e-6
    assert Trajectory(np.array([1, 2]), np.tile(np.eye(4), (2, 1, 1))).interpolation_error == (np.inf, np.inf)
