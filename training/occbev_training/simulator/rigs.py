"""Random rigs: cameras of any focal length, height, direction, number and size, so that a network learns geometry
from calibration and not from one vehicle by heart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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

FISHEYE_COUNT = (3, 6)
"""Fewest and most cameras of a vehicle with fisheyes."""

FISHEYE_DEG = (120.0, 190.0)
"""Degrees that a fisheye sees from the left to the right edge of its picture."""

FISHEYE_PITCH_DEG = (-4.0, 20.0)
"""Degrees by which a fisheye looks down."""

FISHEYE_SIZES = ((640, 480), (640, 400), (960, 640), (640, 360))
"""Sizes of pictures of fisheyes."""

_USUAL_FOCAL = 1260 / 1600

_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def draw_vehicle(seed: int, rate: float, fisheyes: float = 0.0) -> tuple[CameraRig, LidarConfig]:
    """Draw the cameras and the LiDAR of a drive's seed. fisheyes: how often the cameras are fisheyes."""
    rng = np.random.default_rng((seed, 4))
    round_view = fisheyes > 0 and rng.uniform() < fisheyes
    rig = draw_fisheye_rig(rng) if round_view else draw_rig(rng)
    return rig, draw_lidar(rng, rate)


def draw_rig(rng: np.random.Generator) -> CameraRig:
    """Draw one vehicle; its cameras look all around, evenly but for some 15 degrees."""
    count = int(rng.integers(COUNT[0], COUNT[1] + 1))
    height, yaws = rng.uniform(*HEIGHT), _draw_yaws(rng, count)
    return CameraRig(tuple(_draw_camera(f"camera_{i}", yaw, height, rng) for i, yaw in enumerate(yaws)))


def draw_fisheye_rig(rng: np.random.Generator) -> CameraRig:
    """Draw one vehicle whose cameras are fisheyes, near the ground and looking down as those for parking do."""
    count = int(rng.integers(FISHEYE_COUNT[0], FISHEYE_COUNT[1] + 1))
    height, yaws = rng.uniform(HEIGHT[0], 2.0), _draw_yaws(rng, count)
    return CameraRig(tuple(_draw_fisheye(f"camera_{i}", yaw, height, rng) for i, yaw in enumerate(yaws)))


def draw_lidar(rng: np.random.Generator, rate: float) -> LidarConfig:
    """Draw one LiDAR of 16 to 128 rings on the roof."""
    rings = int(rng.choice([16, 32, 64, 128]))
    position = (float(rng.uniform(-0.5, 1.5)), 0.0, float(rng.uniform(1.7, 2.5)))
    return LidarConfig(rate=rate, rings=rings, position=position)


def _draw_yaws(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    first = rng.uniform(-np.pi, np.pi)
    yaws = np.mod(first + np.arange(count) * 2 * np.pi / count + np.pi, 2 * np.pi) - np.pi
    return np.asarray(yaws + np.deg2rad(rng.uniform(-15, 15, count)))


def _draw_camera(name: str, yaw: float, height: float, rng: np.random.Generator) -> Camera:
    size = SIZES[rng.integers(len(SIZES))]
    focal = size[0] * _USUAL_FOCAL * np.exp(rng.uniform(*np.log(FOCAL)))
    return Camera(name, *size, *_draw_place(size, focal, yaw, height, PITCH_DEG, rng))


def _draw_fisheye(name: str, yaw: float, height: float, rng: np.random.Generator) -> Camera:
    size = FISHEYE_SIZES[rng.integers(len(FISHEYE_SIZES))]
    half, bend = np.deg2rad(rng.uniform(*FISHEYE_DEG)) / 2, rng.uniform(-0.03, 0.04)
    focal = size[0] / 2 / (half * (1 + bend * half**2))
    place = _draw_place(size, focal, yaw, height, FISHEYE_PITCH_DEG, rng)
    return Camera(name, *size, *place, "equidistant", (bend, 0.0, 0.0, 0.0))


def _draw_place(
    size: tuple[int, int],
    focal: float,
    yaw: float,
    height: float,
    pitch_deg: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw the intrinsic (3, 3) of a focal length and cam2ego (4, 4) of a camera that looks along a yaw."""
    centre = np.array(size) / 2 + rng.uniform(-0.01, 0.01, 2) * size[0]
    roll, pitch = np.deg2rad(rng.uniform(-1, 1)), np.deg2rad(rng.uniform(*pitch_deg))
    place = np.array([1.4 + 1.8 * np.cos(yaw), 0.8 * np.sin(yaw), np.clip(height + rng.uniform(-0.2, 0.2), *HEIGHT)])
    rotation = rotation_from_rpy(roll, pitch, yaw) @ _OPTICAL
    return np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]]), make_transform(rotation, place)
