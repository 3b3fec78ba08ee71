"""A recording of blocks on flat ground whose LiDAR is traced exactly: truth for the label tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from occbev.geometry import invert_transform, make_transform, rotation_from_rpy, transform_points
from occbev.grid import VoxelGrid
from occbev.results import CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory

GRID = VoxelGrid((-16.0, -16.0, -1.0), (0.8, 0.8, 0.4), (40, 40, 12))
UNOBSERVED, FREE, OCCUPIED = 0, 1, 2
LIDAR2EGO = make_transform(rotation_from_rpy(0, 0, -np.pi / 2), [0.9, 0.0, 1.8])
KEY_NS = 1_000_000_000
FORWARD_CAMERA = make_transform([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], [1.5, 0.0, 1.5])
"""Optical frame looking along +x of base_link."""


@dataclass(frozen=True)
class Block:
    """An axis-aligned box in the world: centre at the key time, size, velocity."""

    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    velocity: tuple[float, float] = (0.0, 0.0)


def trace(origin: np.ndarray, direction: np.ndarray, blocks: list[Block], t: float, ground: bool) -> np.ndarray:
    """Return the distance (R,) to the first surface along unit directions (R, 3), inf for none."""
    best = np.full(len(direction), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        if ground:
            down = -origin[2] / direction[:, 2]
            best = np.where(down > 0, down, best)
        for block in blocks:
            centre = np.array(block.centre) + (*(t * np.array(block.velocity)), 0.0)
            near = (centre - np.array(block.size) / 2 - origin) / direction
            far = (centre + np.array(block.size) / 2 - origin) / direction
            enter, leave = np.minimum(near, far).max(axis=1), np.maximum(near, far).min(axis=1)
            best = np.where((enter < leave) & (enter > 0), np.minimum(best, enter), best)
    return best


@dataclass
class TracedDrive:
    """A recording of blocks on a flat ground, its LiDAR traced without motion within a sweep."""

    blocks: list[Block] = field(default_factory=list)
    speed: float = 3.0
    ground: bool = True
    rings: int = 40
    columns: int = 360
    sweeps: int = 21
    extra: dict[int, np.ndarray] = field(default_factory=dict)
    """Sweep -> additional points in ego at that sweep."""
    slope: float = 0.0
    max_range: float = 70.0
    reads: int = 0
    name: str = "traced"

    def __post_init__(self) -> None:
        middle = self.sweeps // 2
        self.sweep_stamp_ns = KEY_NS + (np.arange(self.sweeps) - middle) * 100_000_000
        self.key_stamp_ns = np.array([KEY_NS])
        self.lidar2ego = LIDAR2EGO
        stamps = KEY_NS + np.arange(-2_000_000_000, 2_000_000_001, 20_000_000)
        self.trajectory = Trajectory(stamps, np.stack([self.pose((s - KEY_NS) / 1e9) for s in stamps]))
        camera = Camera("FRONT", 160, 90, [[126, 0, 80], [0, 126, 45], [0, 0, 1]], FORWARD_CAMERA)
        back = dataclasses.replace(camera, name="BACK", cam2ego=np.diag([-1.0, -1.0, 1.0, 1.0]) @ FORWARD_CAMERA)
        self.rig = CameraRig((camera, back))

    def pose(self, t: float) -> np.ndarray:
        """Drive along a plane that climbs by `slope`; the world is the plane's own frame."""
        tilt = make_transform(rotation_from_rpy(0, -np.arctan(self.slope), 0), [500.0, 300.0, 20.0])
        return tilt @ make_transform(np.eye(3), [self.speed * t, 0.0, 0.0])

    def sweep(self, index: int) -> Sweep:
        self.reads += 1
        t = (int(self.sweep_stamp_ns[index]) - KEY_NS) / 1e9
        elevation = np.deg2rad(np.linspace(-30, 12, self.rings))
        azimuth = np.arange(self.columns) * 2 * np.pi / self.columns
        e, a = np.meshgrid(elevation, azimuth, indexing="ij")
        beams = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], -1).reshape(-1, 3)
        ego2world = make_transform(np.eye(3), [self.speed * t, 0.0, 0.0])
        lidar2world = ego2world @ self.lidar2ego
        direction = beams @ lidar2world[:3, :3].T
        distance = trace(lidar2world[:3, 3], direction, self.blocks, t, self.ground)
        seen = distance < self.max_range
        points = beams[seen] * distance[seen, None]
        if index in self.extra:
            points = np.vstack([points, transform_points(invert_transform(LIDAR2EGO), self.extra[index])])
        return Sweep(points.astype(np.float32), int(self.sweep_stamp_ns[index]), self.lidar2ego)

    def frame_set(self, key: int) -> FrameSet:
        frames = {name: CameraFrame(name, KEY_NS, b"") for name in self.rig.names}
        return FrameSet(KEY_NS, frames)

    def annotations(self, key: int) -> None:
        return None

    def occupancy_truth(self, key: int) -> None:
        return None
