"""Clock offsets by how a sensor sees the vehicle turn: known ones are found, doubtful ones are refused."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from occbev.geometry import invert_transform, make_transform, rotation_from_yaw, transform_points
from occbev.results import Sweep
from occbev.rig import Camera
from occbev.trajectory import Trajectory
from occbev_training.sources.clocks import (
    ClockCorrection,
    TopicTimes,
    Turns,
    by_log_times,
    camera_turns,
    joined,
    lidar_turns,
    measure_offset,
    stretches_in_turns,
)

START = 1_700_000_000_000_000_000


def drive(seconds: float = 30.0, rate: float = 0.4) -> Trajectory:
    """Turns left and right at 6 m/s, each for a few seconds, with straights between them."""
    time = np.arange(0, seconds, 0.02)
    yaw_rate = rate * np.sin(2 * np.pi * time / 7.3) * (np.sin(2 * np.pi * time / 19) > -0.5)
    yaw = np.cumsum(yaw_rate) * 0.02
    x, y = np.cumsum(6 * np.cos(yaw)) * 0.02, np.cumsum(6 * np.sin(yaw)) * 0.02
    poses = np.stack([make_transform(rotation_from_yaw(a), [u, v, 0]) for a, u, v in zip(yaw, x, y, strict=True)])
    return Trajectory(START + (time * 1e9).astype(np.int64), poses)


def seen_turns(trajectory: Trajectory, late: float, noise: float = 0.001) -> Turns:
    """What a sensor at 10 Hz sees whose stamps are `late` seconds behind."""
    true = START + (np.arange(0.5, 29.3, 0.1) * 1e9).astype(np.int64)
    yaw = np.unwrap([np.arctan2(p[1, 0], p[0, 0]) for p in trajectory.at_many(true)])
    turn = np.diff(yaw) + np.random.default_rng(0).normal(0, noise, len(true) - 1)
    stamps = true - round(late * 1e9)
    return Turns(stamps[:-1], stamps[1:], turn)


@pytest.mark.parametrize("late", [0.0, 0.023, -0.08, 0.14])
def test_a_known_offset_is_found(late: float) -> None:
    trajectory = drive()
    found = measure_offset(seen_turns(trajectory, late), trajectory)
    assert not found.fault
    assert found.seconds == pytest.approx(late, abs=0.002)
    assert found.spread < 0.005


def test_an_offset_that_changes_is_refused() -> None:
    trajectory = drive()
    turns = seen_turns(trajectory, 0.0)
    late = np.linspace(0, 60_000_000, len(turns.turn)).astype(np.int64)
    changing = Turns(turns.start_ns - late, turns.end_ns - late, turns.turn)
    assert "windows tell it to" in measure_offset(changing, trajectory).fault


def test_what_is_doubtful_is_refused() -> None:
    trajectory = drive()
    assert "more than 150 ms" in measure_offset(seen_turns(trajectory, 0.19), trajectory).fault
    assert measure_offset(seen_turns(trajectory, 0.0, noise=0.1), trajectory).fault
    assert "not measurable" in measure_offset(seen_turns(drive(rate=0.0), 0.0), drive(rate=0.0)).fault
    assert "not measurable" in measure_offset(joined([]), trajectory).fault


def test_far_clocks_come_near_by_their_log_times() -> None:
    stamps = START + np.arange(600) * 100_000_000
    odometry = TopicTimes(stamps, stamps + 4_000_000)
    hours = TopicTimes(stamps - 7200_000_000_000, stamps + 9_000_000)
    fast = TopicTimes(START + (np.arange(600) * 100_000_000 * (1 + 300e-6)).astype(np.int64), stamps)
    corrections = by_log_times({"o": odometry, "h": hours, "f": fast}, "o")
    assert corrections["h"].apply(int(hours.stamp_ns[5])) == pytest.approx(stamps[5] + 5_000_000, abs=2)
    corrected = [corrections["f"].apply(int(s)) for s in fast.stamp_ns]
    assert np.abs(np.array(corrected) - stamps + 4_000_000).max() < 1_000_000
    assert "o" not in corrections
    assert ClockCorrection(5).plus(1e-6).apply(10) == 1015


def walls() -> np.ndarray:
    """Corners of a street: points (M, 3) in the world."""
    rng = np.random.default_rng(1)
    parts = []
    for _ in range(60):
        at, angle, length = (
            rng.uniform((-20, -60), (160, 60)),
            rng.uniform(0, np.pi),
            rng.uniform(3, 12),
        )
        along = np.arange(0, length, 0.2)[:, None] * [np.cos(angle), np.sin(angle)]
        parts.append(np.column_stack([at + along, rng.uniform(0.5, 2.5, len(along))]))
    return np.concatenate(parts)


def test_lidar_sweeps_show_how_the_vehicle_turns() -> None:
    trajectory, world = drive(12.0), walls()
    stamps = START + np.arange(10, 90) * 100_000_000
    rng = np.random.default_rng(2)
    sweeps = []
    for stamp in stamps:
        points = transform_points(invert_transform(trajectory.at(int(stamp))), world)
        points = points[np.linalg.norm(points[:, :2], axis=1) < 45]
        noisy = points + rng.normal(0, 0.02, points.shape)
        sweeps.append(Sweep(noisy.astype(np.float32), int(stamp), np.eye(4)))
    turns = lidar_turns(sweeps)
    yaw = np.unwrap([np.arctan2(p[1, 0], p[0, 0]) for p in trajectory.at_many(stamps)])
    assert np.nanmedian(np.abs(turns.turn - np.diff(yaw))) < 1e-3
    late = dataclasses.replace(turns, start_ns=turns.start_ns - 40_000_000, end_ns=turns.end_ns - 40_000_000)
    found = measure_offset(late, trajectory)
    assert found.seconds == pytest.approx(0.04, abs=0.004), found.text


def test_a_sweep_stamped_at_its_start_is_not_late() -> None:
    trajectory, world = drive(12.0), walls()
    sweeps = []
    for stamp in START + np.arange(10, 90) * 100_000_000:
        offset = (np.arange(10) + 0.5) / 100
        poses = trajectory.at_many(stamp + (offset * 1e9).astype(np.int64))
        seen = [transform_points(invert_transform(pose), world) for pose in poses]
        # Each tenth of the rotation sees its own sector, counterclockwise.
        sector = [np.floor((np.arctan2(p[:, 1], p[:, 0]) / (2 * np.pi) % 1.0) * 10) for p in seen]
        parts = [
            p[(s == i) & (np.linalg.norm(p[:, :2], axis=1) < 45)]
            for i, (p, s) in enumerate(zip(seen, sector, strict=True))
        ]
        times = np.repeat(offset, [len(part) for part in parts]).astype(np.float32)
        points = np.concatenate(parts).astype(np.float32)
        sweeps.append(Sweep(points, int(stamp), np.eye(4), time_offset=times))
    found = measure_offset(lidar_turns(sweeps), trajectory)
    assert not found.fault
    assert found.seconds == pytest.approx(0.0, abs=0.01), found.text


def test_images_show_how_the_vehicle_turns() -> None:
    """A textured wall all around, a cylinder around the camera, seen at each yaw."""
    rng = np.random.default_rng(3)
    panorama = cv2.resize(rng.integers(0, 255, (40, 400), np.uint8), (2400, 240), interpolation=cv2.INTER_CUBIC)
    camera = Camera(
        "C",
        320,
        240,
        [[240, 0, 160], [0, 240, 120], [0, 0, 1]],
        make_transform([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], [1.5, 0, 1.5]),
    )
    column, row = np.meshgrid(np.arange(320), np.arange(240))
    angle = np.arctan2(160 - column, 240.0)
    height = 120 + (row - 120) / np.hypot((column - 160) / 240, 1.0)
    images, yaws = [], [0.0, 0.02, 0.05, 0.03, -0.01]
    for yaw in yaws:
        x = ((angle + yaw + np.pi) / (2 * np.pi) * -2400) % 2400
        images.append(
            cv2.remap(
                panorama, x.astype(np.float32), height.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
            )
        )
    stamps = [START + i * 100_000_000 for i in range(5)]
    turns = camera_turns(stamps, images, camera)
    np.testing.assert_allclose(turns.turn, np.diff(yaws), atol=0.003)
    blank = camera_turns(stamps[:2], [np.zeros((240, 320), np.uint8)] * 2, camera)
    assert np.isnan(blank.turn).all()


def test_only_turns_are_looked_at() -> None:
    trajectory = drive()
    stamps = START + np.arange(5, 290) * 100_000_000
    runs = stretches_in_turns(stamps, trajectory, most=60)
    assert 50 <= sum(len(run) - 1 for run in runs) <= 60
    assert all(np.all(np.diff(run) == 1) for run in runs)
    assert runs[0][0] < 50
    assert runs[-1][-1] > 200, "from all over the drive, not its first turns"
    assert stretches_in_turns(stamps[:1], trajectory) == []
    assert stretches_in_turns(stamps, drive(rate=0.0)) == []
