"""Random rigs: cameras of any focal length, height, direction, number and size, so that a network learns geometry
from calibration and not from one vehicle by heart."""

from __future__ import annotations

import numpy as np

from occbev.geometry import make_transform, rotation_from_rpy
from occbev.rig import Camera, CameraRig
from occbev_training.simulator.lidar import LidarConfig

COUNT = (3, 8)
"""Fewest and most cameras."""

FOCAL = (0.5, 1.6)
"""Focal lengths, as shares of 1260 pixels in images of 1600: from 116 to 43 degrees across."""

HEIGHT = (0.5, 2.5)
"""Metres above the ground."""

PITCH_DEG = (-4.0, 12.0)
"""Degrees by which a camera looks down."""

SIZES = ((640, 360), (640, 480), (480, 360), (720, 300), (512, 320))
"""Sizes of pictures."""

_USUAL_FOCAL = 1260 / 1600

_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def draw_rig(rng: np.random.Generator) -> CameraRig:
    """Draw one vehicle; its cameras look all around, evenly but for some 15 degrees."""
    count = int(rng.integers(COUNT[0], COUNT[1] + 1))
    height, first = rng.uniform(*HEIGHT), rng.uniform(-np.pi, np.pi)
    yaws = np.mod(first + np.arange(count) * 2 * np.pi / count + np.pi, 2 * np.pi) - np.pi
    yaws += np.deg2rad(rng.uniform(-15, 15, count))
    return CameraRig(tuple(_draw_camera(f"camera_{i}", yaw, height, rng) for i, yaw in enumerate(yaws)))


def draw_lidar(rng: np.random.Generator, rate: float) -> LidarConfig:
    """Draw one LiDAR of 16 to 128 rings on the roof."""
    rings = int(rng.choice([16, 32, 64, 128]))
    position = (float(rng.uniform(-0.5, 1.5)), 0.0, float(rng.uniform(1.7, 2.5)))
    return LidarConfig(rate=rate, rings=rings, position=position)


def _draw_camera(name: str, yaw: float, height: float, rng: np.random.Generator) -> Camera:
    width, rows = SIZES[rng.integers(len(SIZES))]
    focal = width * _USUAL_FOCAL * np.exp(rng.uniform(*np.log(FOCAL)))
    centre = np.array([width, rows]) / 2 + rng.uniform(-0.01, 0.01, 2) * width
    roll, pitch = np.deg2rad(rng.uniform(-1, 1)), np.deg2rad(rng.uniform(*PITCH_DEG))
    place = np.array([1.4 + 1.8 * np.cos(yaw), 0.8 * np.sin(yaw), np.clip(height + rng.uniform(-0.2, 0.2), *HEIGHT)])
    rotation = rotation_from_rpy(roll, pitch, yaw) @ _OPTICAL
    intrinsic = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
    return Camera(name, width, rows, intrinsic, make_transform(rotation, place))
