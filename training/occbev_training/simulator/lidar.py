"""The LiDAR: 32 rings that turn while the vehicle and the traffic move, so that every point has its own time and origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occbev.config import ConfigError, from_record
from occbev.files import read_yaml
from occbev.geometry import make_transform, rotation_from_rpy
from occbev_training.simulator.actors import ego_body
from occbev_training.simulator.materials import Materials
from occbev_training.simulator.raycast import F32, RayScene, StreetScene
from occbev_training.simulator.world import World


@dataclass(frozen=True)
class LidarConfig:
    """A rotating LiDAR of the nuScenes kind."""

    rate: float = 10.0
    """Rotations per second."""
    columns: int = 1080
    """Firings per rotation."""
    rings: int = 32
    """Beams per firing."""
    elevation_deg: tuple[float, float] = (-30.67, 10.67)
    """Lowest and highest beam."""
    position: tuple[float, float, float] = (0.94, 0.0, 1.84)
    """Place in base_link; the sensor's own x points right and its y forward."""
    rotation_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Roll, pitch and yaw by which it is turned from there, in base_link."""
    reach: float = 70.0
    """Longest range that returns."""
    noise: float = 0.02
    """Standard deviation of the range."""
    drop: float = 0.05
    """Share of returns that are lost."""

    def __post_init__(self) -> None:
        if self.rings < 1 or self.columns < 1 or self.rate <= 0 or self.reach <= 0:
            raise ConfigError(
                f"a LiDAR needs rings, columns, rate and reach above zero, got {self.rings}, {self.columns}, "
                f"{self.rate} and {self.reach}"
            )
        if not -90 <= self.elevation_deg[0] <= self.elevation_deg[1] <= 90:
            raise ConfigError(f"elevation_deg {list(self.elevation_deg)}: want lowest and highest beam, -90 to 90")


@dataclass(frozen=True)
class Scan:
    """One rotation.

    points: (M, 3) float32 in the LiDAR frame at each point's own time. offset: (M,) float32 seconds from
    the middle of the rotation. intensity: (M,) float32 0..255. world: (M, 3) the same points in the
    world. origin: (M, 3) where the sensor was. ego: (M,) bool, returns from the vehicle itself.
    """

    points: F32
    offset: F32
    intensity: F32
    world: F32
    origin: F32
    ego: NDArray[np.bool_]


@dataclass(frozen=True)
class EgoMotion:
    """The pose of base_link at any time: times (P,), values (P, 6) x, y, z, roll, pitch, yaw."""

    times: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, world: World) -> EgoMotion:
        """Join the ego track of a world with its tilt."""
        pose = world.ego.pose
        return cls(world.ego.times, np.concatenate([pose[:, :3], world.ego_tilt, pose[:, 3:]], 1))

    def at(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """ego2world (S, 4, 4) at (S,) times."""
        value = np.stack([np.interp(times, self.times, self.values[:, k]) for k in range(6)], -1)
        return np.stack([make_transform(rotation_from_rpy(*v[3:]), v[:3]) for v in value])


class Lidar:
    """The sensor on its vehicle in one street."""

    def __init__(
        self,
        config: LidarConfig,
        scene: StreetScene,
        materials: Materials,
        motion: EgoMotion,
        lidar2ego: NDArray[np.float64],
    ) -> None:
        """Aim the beams and find once where the vehicle's own body stops them."""
        self.config, self.scene, self.motion, self.lidar2ego = config, scene, motion, lidar2ego
        self._shine = materials.colour.mean(1) * 180 + 20 + 60 * materials.gloss
        self._beams, self._offset = _beams(config)
        in_ego = self._beams.reshape(-1, 3) @ lidar2ego[:3, :3].T.astype(np.float32)
        origin = np.broadcast_to(lidar2ego[:3, 3].astype(np.float32), in_ego.shape)
        body = RayScene(ego_body().triangles).first(
            np.ascontiguousarray(origin), in_ego, np.full(len(in_ego), 9, np.float32)
        )
        assert body is not None, "the vehicle has a body"
        self._body = np.where(body["primID"] >= 0, body["tfar"], np.inf).astype(np.float32)

    def scan(self, time: float, rng: np.random.Generator) -> Scan:
        """Measure the rotation whose middle is at `time` seconds of the drive."""
        lidar2world = self._poses(time)
        self._place_actors(time, lidar2world[len(lidar2world) // 2])
        rays = np.matmul(self._beams, lidar2world[:, :3, :3].transpose(0, 2, 1).astype(np.float32)).reshape(-1, 3)
        origins = np.repeat(lidar2world[:, :3, 3].astype(np.float32), self.config.rings, axis=0)
        hits = self.scene.first(origins, rays, self.config.reach)
        distance = np.minimum(hits.distance, self._body)
        heard = np.flatnonzero(np.isfinite(distance) & (rng.random(len(distance)) >= self.config.drop))
        distance = distance[heard] + rng.normal(0, self.config.noise, len(heard)).astype(np.float32)
        ways = rays[heard] * distance[:, None]
        facing = np.abs(np.einsum("rc,rc->r", rays[heard], hits.normal[heard]))
        shine = self._shine[self.scene.mesh.material[np.maximum(hits.triangle[heard], 0)]]
        return Scan(
            self._beams.reshape(-1, 3)[heard] * distance[:, None],
            np.repeat(self._offset, self.config.rings)[heard].astype(np.float32),
            np.clip(shine * (0.4 + 0.6 * facing), 0, 255).astype(np.float32),
            origins[heard] + ways,
            origins[heard],
            (self._body < hits.distance)[heard],
        )

    def _poses(self, time: float) -> NDArray[np.float64]:
        """lidar2world (columns, 4, 4), blended between knots a few milliseconds apart."""
        knots = np.linspace(self._offset[0], self._offset[-1], 25)
        poses = self.motion.at(time + knots) @ self.lidar2ego
        place = np.clip((self._offset - knots[0]) / (knots[1] - knots[0]), 0, len(knots) - 1 - 1e-9)
        before = place.astype(np.int64)
        return poses[before] + (place - before)[:, None, None] * (poses[before + 1] - poses[before])

    def _place_actors(self, time: float, lidar2world: NDArray[np.float64]) -> None:
        """Put every actor where it is at the moment when the beam sweeps over its middle."""
        pose = self.scene.pose(time)
        if not len(pose):
            return
        offset = pose[:, :2] - lidar2world[:2, 3]
        ahead = np.arctan2(lidar2world[1, 1], lidar2world[0, 1])
        left = np.pi - np.mod(np.pi - (np.arctan2(offset[:, 1], offset[:, 0]) - ahead), 2 * np.pi)
        pose = self.scene.pose(time - left / (2 * np.pi * self.config.rate))
        self.scene.place(pose, np.linalg.norm(offset, axis=1) < self.config.reach + 8)


def read_lidar(rig_file: Path) -> LidarConfig:
    """Read the key `lidar` of a rig file; without it the LiDAR is the usual one.

    Raises:
        ConfigError: naming the file and the key.
    """
    record = read_yaml(rig_file)
    try:
        return from_record(LidarConfig, record.get("lidar") or {}, "lidar")
    except ConfigError as error:
        raise ConfigError(f"{rig_file}: {error}") from error


def mount_lidar(config: LidarConfig) -> NDArray[np.float64]:
    """lidar2ego (4, 4): the sensor's x to the right, y forward, z up, then turned by its rotation."""
    turned = rotation_from_rpy(*np.deg2rad(config.rotation_deg))
    return make_transform(turned @ rotation_from_rpy(0.0, 0.0, -np.pi / 2), config.position)


def _beams(config: LidarConfig) -> tuple[F32, NDArray[np.float64]]:
    """Unit directions (columns, rings, 3) in the LiDAR frame and the time (columns,) of each from mid-rotation.

    It turns clockwise seen from above and looks forward (+y) in the middle of the rotation.
    """
    share = (np.arange(config.columns) + 0.5) / config.columns
    azimuth = np.pi / 2 + np.pi - 2 * np.pi * share
    elevation = np.deg2rad(np.linspace(*config.elevation_deg, config.rings))
    a, e = np.meshgrid(azimuth, elevation, indexing="ij")
    beams = np.stack([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)], -1)
    return beams.astype(np.float32), (share - 0.5) / config.rate
