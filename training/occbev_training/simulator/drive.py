"""A simulated drive as a `Recording`: the world is drawn once, every frame is rendered when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.geometry import (
    invert_transform,
    make_transform,
    project_points,
    rotation_from_yaw,
    transform_points,
    yaw_from_rotation,
)
from occbev.grid import GRIDS, VoxelGrid
from occbev.results import CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory
from occbev_training.simulator.camera import Exposure, Painter, build_rig, firing_times, pixel_rays
from occbev_training.simulator.detailed_camera import DetailedPainter
from occbev_training.simulator.lidar import EgoMotion, Lidar, LidarConfig, Scan, mount_lidar
from occbev_training.simulator.raycast import StreetScene
from occbev_training.simulator.rigs import draw_vehicle
from occbev_training.simulator.truth import Solids, annotate, find_seen_voxels, mark_centres, mark_ends
from occbev_training.simulator.world import build_world
from occbev_training.sources.recording import Annotations, OccupancyTruth

SEED_RANGES: Mapping[str, range] = {
    "train": range(10_000),
    "validation": range(10_000, 20_000),
    "test": range(20_000, 1_000_000),
}
"""Which seeds a split may use: a drive seen in training is never scored."""

WORLDS = ("v1", "v2")
"""Versions of the streets; a seed draws the same street of a version for ever. v2 has facades with relief, leafy trees,
worn roads, car parks and cameras that expose for themselves."""

_MARGIN = 1.1
"""Seconds of sweeps before the first and after the last key frame."""


def split_of(seed: int) -> str:
    """Return the split that a seed belongs to; raises ValueError for a seed in none."""
    for name, seeds in SEED_RANGES.items():
        if seed in seeds:
            return name
    raise ValueError(f"seed {seed} is in no split; splits are {dict(SEED_RANGES)}")


@dataclass(frozen=True)
class DriveConfig:
    """What is recorded of a drive."""

    keys: int = 20
    """Number of key frames."""
    key_rate: float = 2.0
    """Key frames per second; must divide the LiDAR's rate."""
    image: tuple[int, int] = (352, 128)
    """Width and height of the pictures; see `build_rig` for what heights below 16:9 mean."""
    supersample: float | None = None
    """Rays per pixel and axis; by default 1.25 for cameras of less than 400 pixels width, else 1."""
    jpeg_quality: int = 92
    """Quality of the encoded pictures."""
    lidar: LidarConfig = field(default_factory=LidarConfig)
    """The LiDAR."""
    rig: CameraRig | None = None
    """The cameras, exactly; None draws a vehicle with six of size `image`."""
    random_rigs: bool = False
    """Every drive has cameras and a LiDAR of its own, see `draw_vehicle`; in place of `rig`, `image` and `lidar`."""
    fisheyes: float = 0.0
    """Share of the random rigs whose cameras are fisheyes."""
    world: str = WORLDS[0]
    """Which streets are drawn: "v1" or "v2"."""
    grid: VoxelGrid = GRIDS["occ3d"]
    """Grid of the dense labels."""

    def as_record(self) -> dict[str, Any]:
        """Return the configuration as plain values."""
        record = asdict(replace(self, rig=None)) | {"grid": self.grid.as_record()}
        return record | {"rig": None if self.rig is None else [camera.as_record() for camera in self.rig.cameras]}

    def __post_init__(self) -> None:
        if self.random_rigs and self.rig is not None:
            raise ValueError("random_rigs and rig exclude each other: drives have rigs of their own, or this one")
        if not 0 <= self.fisheyes <= 1 or (self.fisheyes and not self.random_rigs):
            raise ValueError(f"fisheyes {self.fisheyes}: want a share from 0 to 1 of random_rigs")
        if self.world not in WORLDS:
            raise ValueError(f"world {self.world!r}: known are {', '.join(WORLDS)}")
        if self.keys < 1 or self.key_rate <= 0:
            raise ValueError(f"a drive needs key frames: keys {self.keys}, key_rate {self.key_rate}")
        if abs(self.lidar.rate / self.key_rate - round(self.lidar.rate / self.key_rate)) > 1e-9:
            raise ValueError(f"key_rate {self.key_rate} must divide the LiDAR's {self.lidar.rate} rotations per second")


class SimulatedDrive:
    """One drive of one seed; implements `Recording`."""

    def __init__(self, seed: int, config: DriveConfig = DriveConfig()) -> None:
        """Build the world; takes a second or two."""
        self.seed, self.config = seed, config
        self.name = self.name_of(seed)
        self.split = split_of(seed)
        lead, stride = (
            round(_MARGIN * config.lidar.rate),
            round(config.lidar.rate / config.key_rate),
        )
        sweeps = (config.keys - 1) * stride + 2 * lead + 1
        first = 0.1 + 0.5 / config.lidar.rate
        self._sweep_times = first + np.arange(sweeps) / config.lidar.rate
        self._key_sweeps = lead + np.arange(config.keys) * stride
        self._world = build_world(seed, float(self._sweep_times[-1] + first), config.world)
        self._motion = EgoMotion.of(self._world)
        self._start_ns = 1_600_000_000_000_000_000 + seed * 1_000_000_000_000
        rng = np.random.default_rng((seed, 1))
        if config.random_rigs:
            self.rig, lidar = draw_vehicle(seed, config.lidar.rate, config.fisheyes)
            config = replace(config, lidar=lidar)
        else:
            self.rig = config.rig or build_rig(rng, config.image)
        self._firing = firing_times(self.rig.names)
        self.lidar2ego = mount_lidar(config.lidar)
        self._world2global = make_transform(
            rotation_from_yaw(rng.uniform(-np.pi, np.pi)), [*rng.uniform(300, 2000, 2), 0.0]
        )
        self._yaw2global = yaw_from_rotation(self._world2global[:3, :3])
        self.trajectory = self._build_trajectory()
        self.sweep_stamp_ns = self._stamps(self._sweep_times)
        self.key_stamp_ns = self.sweep_stamp_ns[self._key_sweeps]
        self._scene = StreetScene(self._world)
        self._lidar = Lidar(config.lidar, self._scene, self._world.materials, self._motion, self.lidar2ego)
        painter = DetailedPainter if self._world.detailed else Painter
        self._painter = painter(self._scene, self._world.materials, self._world.light)
        self._exposure = {name: Exposure.draw(rng, self._world.light) for name in self.rig.names}
        self._solids: Solids | None = None
        self._scan = lru_cache(maxsize=4)(self._scan_once)

    @staticmethod
    def name_of(seed: int) -> str:
        """Name of the drive of a seed."""
        return f"sim-{seed:06d}"

    @property
    def weather(self) -> str:
        """Name of the drive's light and weather."""
        return self._world.light.name

    def sweep(self, index: int) -> Sweep:
        """Measure one LiDAR rotation: raw points in the LiDAR frame, each with its time from the middle."""
        scan = self._scan(index)
        return Sweep(
            scan.points,
            int(self.sweep_stamp_ns[index]),
            self.lidar2ego,
            scan.intensity,
            scan.offset,
        )

    def frame_set(self, key: int) -> FrameSet:
        """Render the six pictures of one key frame as JPEG."""
        frames: dict[str, CameraFrame | None] = {}
        for number, camera in enumerate(self.rig.cameras):
            time = self._camera_time(key, camera.name)
            ego2world = self._ego2world(time)
            self._painter.place_actors(camera, ego2world, time)
            rng = np.random.default_rng((self.seed, 2, key, number))
            picture = self._painter.picture(
                camera, ego2world, self._exposure[camera.name], rng, self._supersample(camera)
            )
            stamp_ns = int(self._stamps(np.array([time]))[0])
            frames[camera.name] = CameraFrame(
                camera.name, stamp_ns, self._encode(picture), self._world2global @ ego2world
            )
        return FrameSet(int(self.key_stamp_ns[key]), frames)

    def annotations(self, key: int) -> Annotations:
        """Boxes within 60 m at the key stamp, with exact velocities and counts of key-sweep returns."""
        time, ego2world = self._key_pose(key)
        scan = self._scan(int(self._key_sweeps[key]))
        points = transform_points(invert_transform(ego2world), scan.world[~scan.ego])
        actors = (*self._world.static_actors, *self._world.moving_actors)
        return annotate(actors, ego2world, time, points, self.name)

    def moving_boxes(self, stamp_ns: int) -> NDArray[np.float64]:
        """Boxes (A, 7) x, y, z, l, w, h, yaw of everything that moves, in the global frame at any stamp."""
        rows = []
        for actor in self._world.moving_actors:
            pose = actor.track.at((stamp_ns - self._start_ns) / 1e9)
            centre = pose[:3] + [0, 0, actor.shape.size[2] / 2]
            centre = transform_points(self._world2global, centre)
            rows.append([*centre, *actor.shape.size, pose[3] + self._yaw2global])
        return np.array(rows, np.float64).reshape(-1, 7)

    def occupancy_truth(self, key: int) -> OccupancyTruth:
        """Label every voxel at the key stamp.

        Surfaces and insides of bodies are filled; houses are shells; the ground lies in the layer of
        its true height. mask_lidar is what the key sweep's own rays cross or end in, mask_camera what
        the six cameras see at their own exposure times: voxels in which a pixel's ray ends, and voxels
        whose centre lies before that end.
        """
        time, ego2world = self._key_pose(key)
        if self._solids is None:
            self._solids = Solids(self._world)
        grid = self.config.grid
        semantics = self._solids.semantics(grid, ego2world, time)
        return OccupancyTruth(semantics, self._lidar_mask(key, ego2world), self._camera_mask(key, ego2world), grid)

    def _lidar_mask(self, key: int, ego2world: NDArray[np.float64]) -> NDArray[np.bool_]:
        scan, world2ego = self._scan(int(self._key_sweeps[key])), invert_transform(ego2world)
        ends = transform_points(world2ego, scan.world[~scan.ego]).astype(np.float32)
        origins = transform_points(world2ego, scan.origin[~scan.ego]).astype(np.float32)
        length = np.linalg.norm(ends - origins, axis=1)
        seen = np.zeros(self.config.grid.size, bool)
        find_seen_voxels(seen, self.config.grid, origins, (ends - origins) / length[:, None], length)
        return seen.reshape(self.config.grid.shape)

    def _camera_mask(self, key: int, ego2world: NDArray[np.float64]) -> NDArray[np.bool_]:
        grid, world2ego = self.config.grid, invert_transform(ego2world)
        seen = np.zeros(grid.size, bool)
        for number, camera in enumerate(self.rig.cameras):
            time = self._camera_time(key, camera.name)
            self._painter.place_actors(camera, self._ego2world(time), time)
            cam2world = self._ego2world(time) @ camera.cam2ego
            step = max(1, round(camera.intrinsic[0, 0] / 140))
            rays = pixel_rays(camera, step)
            dark = np.isnan(rays).any(-1)
            rays[dark] = (0, 0, 1)
            world = rays.reshape(-1, 3) @ cam2world[:3, :3].T.astype(np.float32)
            origins = np.broadcast_to(cam2world[:3, 3].astype(np.float32), world.shape)
            distance = self._scene.first(origins, world, 80.0).distance.reshape(rays.shape[:2]).copy()
            distance[dark | self._painter.hidden(camera, rays.reshape(-1, 3)).reshape(dark.shape)] = np.nan
            cam2ego = world2ego @ cam2world
            mark_ends(seen, grid, cam2ego, rays, distance)
            along = rays[..., 2] if camera.lens.is_pinhole else np.float32(1)
            mark_centres(seen, self._in_view[number], cam2ego, camera, step, along * distance)
        return seen.reshape(grid.shape)

    @cached_property
    def _in_view(self) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Per camera: flat voxels that it may see, and their centres in the ego frame, with room for ego motion."""
        centres = self.config.grid.centres().reshape(-1, 3)
        chosen = [np.flatnonzero(_may_see(camera, centres)) for camera in self.rig.cameras]
        return [(flat, centres[flat].astype(np.float32)) for flat in chosen]

    def _scan_once(self, index: int) -> Scan:
        return self._lidar.scan(float(self._sweep_times[index]), np.random.default_rng((self.seed, 3, index)))

    def _build_trajectory(self) -> Trajectory:
        times = self._motion.times
        return Trajectory(self._stamps(times), self._world2global @ self._motion.at(times))

    def _stamps(self, times: NDArray[np.float64]) -> NDArray[np.int64]:
        """Nanoseconds of drive times, whole microseconds so that no format rounds them."""
        return self._start_ns + np.rint(times * 1e6).astype(np.int64) * 1000

    def _camera_time(self, key: int, camera: str) -> float:
        return float(self._sweep_times[self._key_sweeps[key]]) + self._firing[camera]

    def _key_pose(self, key: int) -> tuple[float, NDArray[np.float64]]:
        time = float(self._sweep_times[self._key_sweeps[key]])
        return time, self._ego2world(time)

    def _ego2world(self, time: float) -> NDArray[np.float64]:
        return self._motion.at(np.array([time]))[0]

    def _supersample(self, camera: Camera) -> float:
        return self.config.supersample or (1.25 if camera.width < 400 else 1.0)

    def _encode(self, picture: NDArray[np.uint8]) -> bytes:
        done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, self.config.jpeg_quality])
        if not done:
            raise ValueError(f"OpenCV could not encode a picture of shape {picture.shape} as JPEG")
        return data.tobytes()


def _may_see(camera: Camera, centres: NDArray[np.float64], margin: float = 16.0) -> NDArray[np.bool_]:
    size, local = np.array([camera.width, camera.height]), transform_points(camera.ego2cam, centres)
    if not camera.lens.is_pinhole:
        pixels, lit = camera.lens.project(local)
        return lit & np.all((pixels > -margin) & (pixels < size + margin), axis=-1)
    pixels, depth = project_points(local, camera.intrinsic)
    return (depth > 0.05) & np.all((pixels > -margin) & (pixels < size + margin), axis=-1)
