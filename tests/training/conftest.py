"""A tiny drive in memory: three cameras, a LiDAR, a moving car and known labels."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from occbev.geometry import make_transform, points_in_box, rotation_from_rpy, rotation_from_yaw
from occbev.grid import GRIDS
from occbev.results import Boxes3D, CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory
from occbev_training.sources.recording import Annotations, OccupancyTruth

START_NS = 1_700_000_000_000_000_000
CAMERA_LAG_NS = {"CAM_FRONT_LEFT": -30_000_000, "CAM_FRONT": -10_000_000, "CAM_BACK": 12_000_000}
CAMERA_YAW = {"CAM_FRONT_LEFT": 1.0, "CAM_FRONT": 0.0, "CAM_BACK": np.pi}


@dataclass
class TinyRecording:
    """Implements the Recording protocol with arrays made from a seed."""

    name: str = "tiny-0"
    keys: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        optical = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        intrinsic = [[60.0, 0, 32], [0, 60.0, 20], [0, 0, 1]]
        self.rig = CameraRig(
            tuple(
                Camera(name, 64, 40, intrinsic, make_transform(rotation_from_yaw(yaw) @ optical, (1.0, 0.1, 1.5)))
                for name, yaw in CAMERA_YAW.items()
            )
        )
        self.lidar2ego = make_transform(rotation_from_rpy(0.01, -0.02, -np.pi / 2), (0.9, 0.0, 1.8))
        self.key_stamp_ns = START_NS + np.arange(self.keys, dtype=np.int64) * 500_000_000
        self.sweep_stamp_ns = START_NS + np.arange(-2, 5 * self.keys, dtype=np.int64) * 100_000_000
        self.trajectory = self._drive()
        self._random = np.random.default_rng(self.seed)
        self._images = self._random.integers(0, 255, (self.keys, 3, 40, 64, 3), np.uint8)

    def _drive(self) -> Trajectory:
        """A left turn at 6 m/s on a slight slope, 50 Hz."""
        stamps = np.arange(START_NS - 400_000_000, START_NS + self.keys * 500_000_000, 20_000_000)
        seconds = (stamps - START_NS) / 1e9
        poses = [
            make_transform(rotation_from_rpy(0.0, 0.01, 0.2 * t), (500 + 6 * t, 900 + 0.6 * t * t, 0.02 * t))
            for t in seconds
        ]
        return Trajectory(stamps, np.stack(poses))

    def _car_global(self, key: int) -> NDArray[np.float64]:
        return np.array([515.0 + 4.0 * 0.5 * key, 905.0, 0.8])

    def sweep(self, index: int) -> Sweep:
        generator = np.random.default_rng(self.seed * 1000 + index)
        points = generator.uniform((-15, -15, -1.8), (15, 15, 1.0), (500, 3)).astype(np.float32)
        offset = np.linspace(-0.05, 0.05, 500).astype(np.float32)
        intensity = generator.uniform(0, 255, 500).astype(np.float32)
        return Sweep(points, int(self.sweep_stamp_ns[index]), self.lidar2ego, intensity, offset)

    def frame_set(self, key: int) -> FrameSet:
        frames = {}
        for i, (name, lag) in enumerate(CAMERA_LAG_NS.items()):
            stamp = int(self.key_stamp_ns[key]) + lag
            jpeg = bytes(cv2.imencode(".jpg", self._images[key, i])[1])
            frames[name] = CameraFrame(name, stamp, jpeg, self.trajectory.at(stamp))
        return FrameSet(int(self.key_stamp_ns[key]), frames)

    def annotations(self, key: int) -> Annotations:
        ego2global = self.trajectory.at(int(self.key_stamp_ns[key]))
        rotation, translation = ego2global[:3, :3], ego2global[:3, 3]
        car = rotation.T @ (self._car_global(key) - translation)
        walker = rotation.T @ (np.array([510.0, 896.0, 0.9]) - translation)
        yaw = -np.arctan2(rotation[1, 0], rotation[0, 0])
        box = np.array(
            [
                [*car, 4.5, 1.9, 1.6, yaw, *(rotation.T @ (4.0, 0, 0))[:2]],
                [*walker, 0.6, 0.7, 1.7, yaw + 0.5, 0.0, 0.0],
            ],
            np.float32,
        )
        inside = np.array([points_in_box(np.zeros((0, 3)), row).sum() for row in box], np.int64)
        boxes = Boxes3D(box, np.array([0, 8]), np.ones(2, np.float32))
        return Annotations(boxes, ("car-a", "walker-b"), inside + (7, 3))

    def occupancy_truth(self, key: int) -> OccupancyTruth:
        generator = np.random.default_rng(key)
        grid = GRIDS["occ3d"]
        semantics = np.full(grid.shape, 17, np.uint8)
        semantics[:, :, 2] = 11
        semantics[90:110, 120:130, 3:6] = generator.integers(0, 17, (20, 10, 3))
        mask = np.zeros(grid.shape, bool)
        mask[50:150] = True
        return OccupancyTruth(semantics, mask, ~mask, grid)


@pytest.fixture
def tiny_recording() -> TinyRecording:
    """A drive of four key frames."""
    return TinyRecording()


@pytest.fixture(scope="session")
def make_recording() -> type[TinyRecording]:
    """The class of the tiny drive, for tests that want several or longer ones."""
    return TinyRecording
