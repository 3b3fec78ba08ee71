"""World v1 stays as it is: streets, pictures and LiDAR of a seed are those that scores were measured on."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("embreex", reason="the simulator casts rays with embreex")

from occbev.classes import DETECTION_CLASSES
from occbev.cli import demo
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.simulator.lidar import LidarConfig

STORED = Path(__file__).parent / "world_v1.png"
CAMERAS = ("CAM_FRONT", "CAM_BACK_LEFT")
RETURNS, RANGES = 1616, (0.735, 7.662, 34.699)
"""Returns of one sweep of seed 200, and the 10th, 50th and 90th percentile of their ranges in metres."""

V1 = DriveConfig(keys=2, image=(160, 90), lidar=LidarConfig(columns=60), world="v1")


def picture(seeds: tuple[int, ...]) -> NDArray[np.uint8]:
    """Two cameras (180, 320 * seeds / 2, 3) of a key frame of each drive."""
    columns = []
    for seed in seeds:
        frames = SimulatedDrive(seed, V1).frame_set(1).frames
        encoded = [frame.image for name in CAMERAS if (frame := frames[name]) is not None]
        columns.append(np.vstack([cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in encoded]))
    return np.hstack(columns).astype(np.uint8)


def test_world_v1_draws_the_stored_picture() -> None:
    stored = cv2.imread(str(STORED))
    drawn = picture((20_054, 200))
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
