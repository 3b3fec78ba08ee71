"""The cameras: a nuScenes-like rig and a ray-cast picture with sun, shadow, sky, haze, night and sensor noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.geometry import make_transform, rotation_from_rpy
from occbev.rig import Camera, CameraRig
from occbev_training.simulator.materials import FACADE, PANES, Materials, albedo, noise
from occbev_training.simulator.raycast import F32, Hits, StreetScene
from occbev_training.simulator.world import Light

FULL_SIZE = (1600, 900)
"""Size that the focal lengths below belong to."""


@dataclass(frozen=True)
class Mount:
    """Where a camera sits: position in base_link, yaw in degrees (0 = forward), focal length, firing time."""

    position: tuple[float, float, float]
    yaw_deg: float
    focal: float
    offset: float


MOUNTS: dict[str, Mount] = {
    "CAM_FRONT_LEFT": Mount((1.53, 0.49, 1.51), 55.0, 1265.0, -0.012),
    "CAM_FRONT": Mount((1.70, 0.00, 1.51), 0.0, 1262.0, -0.004),
    "CAM_FRONT_RIGHT": Mount((1.55, -0.49, 1.50), -55.0, 1260.0, 0.004),
    "CAM_BACK_LEFT": Mount((1.03, 0.48, 1.58), 109.0, 1256.0, -0.020),
    "CAM_BACK": Mount((0.03, 0.00, 1.58), 180.0, 808.0, 0.020),
    "CAM_BACK_RIGHT": Mount((1.02, -0.48, 1.56), -110.0, 1258.0, 0.012),
}
"""Cameras in the model's order; offsets are seconds from the key time, all within 42 ms of each other."""

_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def build_rig(rng: np.random.Generator, size: tuple[int, int]) -> CameraRig:
    """Draw one vehicle type: mounts off by up to 3 cm and 1 degree, principal points and focal lengths by 1 %.

    size: width, height of the pictures. Full frames are 16:9; a lower height keeps the lower rows, so
    that 352 x 128 is what scaling a full frame to 352 x 198 and cropping 70 rows gives.

    Raises:
        ValueError: the picture would be taller than 16:9.
    """
    scale = size[0] / FULL_SIZE[0]
    top = round(FULL_SIZE[1] * scale) - size[1]
    if top < 0:
        raise ValueError(f"image {size[0]}x{size[1]} is taller than 16:9: height must be at most {size[1] + top}")
    return CameraRig(
        tuple(_camera(name, mount, rng).resize(scale, scale, (0, top), size) for name, mount in MOUNTS.items())
    )


def _camera(name: str, mount: Mount, rng: np.random.Generator) -> Camera:
    roll, pitch, yaw = np.deg2rad(rng.uniform(-1, 1, 3))
    rotation = rotation_from_rpy(roll, pitch, np.deg2rad(mount.yaw_deg) + yaw) @ _OPTICAL
    position = np.array(mount.position) + rng.uniform(-0.03, 0.03, 3)
    focal = mount.focal * rng.uniform(0.99, 1.01)
    cx, cy = np.array(FULL_SIZE) / 2 + rng.uniform(-16, 16, 2) + (0, 32)
    intrinsic = [[focal, 0, cx], [0, focal, cy], [0, 0, 1]]
    return Camera(name, *FULL_SIZE, np.array(intrinsic), make_transform(rotation, position))


@dataclass(frozen=True)
class Exposure:
    """How one camera turns light into pixels: gain, white balance (3,), noise, blur in pixels, gamma."""

    gain: float
    balance: F32
    noise: float
    blur: float
    gamma: float

    @classmethod
    def draw(cls, rng: np.random.Generator, light: Light) -> Exposure:
        """Draw the settings of one camera for one drive."""
        gain = {"night": 4.2, "dusk": 1.6}.get(light.name, 1.0) * rng.uniform(0.75, 1.3)
        grain = rng.uniform(0.002, 0.012) * (2.2 if light.name == "night" else 1.0)
        return cls(
            gain,
            rng.uniform(0.94, 1.06, 3).astype(np.float32),
            grain,
            rng.uniform(0.25, 0.6),
            rng.uniform(2.0, 2.4),
        )


def firing_times(names: Sequence[str]) -> dict[str, float]:
    """Return when each camera fires, in seconds from the key time: as mounted, or spread over 40 ms in order."""
    if set(names) <= set(MOUNTS):
        return {name: MOUNTS[name].offset for name in names}
    return dict(zip(names, np.linspace(-0.02, 0.02, len(names)).tolist(), strict=True))


def pixel_rays(camera: Camera, step: int = 1) -> F32:
    """Unit directions (h, w, 3) in the optical frame through pixel centres, every `step`-th of them.

    They are NaN where the lens shows nothing.
    """
    u, v = np.meshgrid(np.arange(0, camera.width, step) + step / 2, np.arange(0, camera.height, step) + step / 2)
    if not camera.lens.is_pinhole:
        rays = camera.lens.unproject(np.stack([u, v], -1).reshape(-1, 2))
        return rays.reshape(*u.shape, 3).astype(np.float32)
    k = camera.intrinsic
    directions = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], -1)
    return (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Mirror:
    """Glossy points (R, 3) in the world, the rays that see them, normals, cosines between these (R,), gloss (R,)."""

    points: F32
    rays: F32
    normal: F32
    facing: F32
    gloss: F32


class Painter:
    """Renders pictures of one street."""

    def __init__(self, scene: StreetScene, materials: Materials, light: Light) -> None:
        """Keep what all pictures of a drive share."""
        self.scene, self.materials, self.light = scene, materials, light

    def place_actors(self, camera: Camera, ego2world: NDArray[np.float64], time: float) -> None:
        """Put the moving actors that can be seen, or throw a shadow into view, where they are at `time`."""
        pose = self.scene.pose(time)
        cam2world = ego2world @ camera.cam2ego
        offset = pose[:, :2] - cam2world[:2, 3]
        distance = np.maximum(np.linalg.norm(offset, axis=1), 1e-3)
        half = 0.3 + (
            np.arctan(camera.width / 2 / camera.intrinsic[0, 0]) if camera.lens.is_pinhole else camera.lens.max_angle
        )
        ahead = offset @ cam2world[:2, 2] / distance > np.cos(half)
        self.scene.place(pose, (distance < 15) | (ahead & (distance < 120)))

    def picture(
        self,
        camera: Camera,
        ego2world: NDArray[np.float64],
        exposure: Exposure,
        rng: np.random.Generator,
        supersample: float = 1.0,
    ) -> NDArray[np.uint8]:
        """Render (H, W, 3) uint8 RGB of what `place_actors` has placed."""
        size = (round(camera.width * supersample), round(camera.height * supersample))
        fine = camera.resize(size[0] / camera.width, size[1] / camera.height, (0, 0), size)
        radiance = self.radiance(fine, ego2world).reshape(size[1], size[0], 3)
        if size != (camera.width, camera.height):
            whole = (camera.width, camera.height)
            radiance = np.asarray(
                cv2.resize(np.minimum(radiance, 6.0), whole, interpolation=cv2.INTER_AREA), np.float32
            )
        return self.develop(radiance, exposure, rng)

    def radiance(self, camera: Camera, ego2world: NDArray[np.float64]) -> F32:
        """Linear RGB (H * W, 3) seen by every pixel."""
        cam2world = ego2world @ camera.cam2ego
        rays = pixel_rays(camera).reshape(-1, 3)
        dark = np.isnan(rays).any(1)
        rays[dark] = (0, 0, 1)
        directions = rays @ cam2world[:3, :3].T.astype(np.float32)
        origin = cam2world[:3, 3].astype(np.float32)
        hits = self.scene.first(np.broadcast_to(origin, directions.shape), directions)
        colour = np.empty_like(directions)
        missed, seen = np.flatnonzero(hits.triangle < 0), np.flatnonzero(hits.triangle >= 0)
        colour[missed] = self.sky(directions[missed])
        distance, rays = hits.distance[seen], directions[seen]
        openness = self._openness(hits, origin, directions, (camera.height, camera.width))[seen]
        surface = self._shade(seen, hits, origin, rays, openness, float(camera.intrinsic[0, 0]), ego2world)
        share = np.exp(-self.light.haze * distance)[:, None]
        colour[seen] = surface * share + self.light.haze_colour * (1 - share)
        colour[dark] = 0
        return colour

    def _shade(
        self,
        seen: NDArray[np.int64],
        hits: Hits,
        origin: F32,
        rays: F32,
        openness: F32,
        focal: float,
        ego2world: NDArray[np.float64],
    ) -> F32:
        """Light (S, 3) that the seen surface points send back along their rays."""
        mesh, light = self.scene.mesh, self.light
        triangle, distance, normal = hits.triangle[seen], hits.distance[seen], hits.normal[seen]
        corner = mesh.uv[triangle]
        u, v = hits.weights[seen, :1], hits.weights[seen, 1:]
        uv = corner[:, 0] + u * (corner[:, 1] - corner[:, 0]) + v * (corner[:, 2] - corner[:, 0])
        points = origin + rays * distance[:, None]
        facing = np.maximum(-np.einsum("rc,rc->r", rays, normal), 0.05)
        footprint = distance / focal / facing
        material = mesh.material[triangle]
        up = points[:, 2] - float(ego2world[2, 3])
        base, glass = albedo(self.materials, material, uv, footprint, up)
        gloss = np.maximum(self.materials.gloss[material], 0.45 * glass)
        sun = self._sunlight(points, normal)
        ambient = (0.62 + 0.38 * normal[:, 2]) * openness
        lighting = sun[:, None] * light.sun_colour + ambient[:, None] * light.sky_colour
        if light.night > 0:
            lighting += _headlights(points, normal, ego2world) * np.float32(light.night * 0.5)
        colour = base * lighting
        shiny = np.flatnonzero(gloss > 0)
        fresnel = (gloss[shiny] * (0.35 + 0.65 * (1 - facing[shiny]) ** 3))[:, None]
        mirror = Mirror(points[shiny], rays[shiny], normal[shiny], facing[shiny], gloss[shiny])
        colour[shiny] += fresnel * (self.reflection(mirror) - colour[shiny])
        return colour + self._glow(material, glass, uv)

    def sky(self, directions: F32) -> F32:
        """Colour of the sky (R, 3) in directions (R, 3)."""
        return _sky(self.light, directions)

    def reflection(self, mirror: Mirror) -> F32:
        """Light (R, 3) that glossy points mirror."""
        return _reflect(self.light, mirror.rays[:, 2] + 2 * mirror.facing * mirror.normal[:, 2])

    def hidden(self, camera: Camera, rays: F32) -> NDArray[np.bool_]:
        """Which rays (R, 3) of a camera's frame end at the vehicle itself: none."""
        return np.zeros(len(rays), bool)

    def develop(self, radiance: F32, exposure: Exposure, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Turn light (H, W, 3) into a picture."""
        return _develop(radiance, exposure, rng)

    def _sunlight(self, points: F32, normal: F32) -> F32:
        """Cosine of the sun on each point, 0 in shadow."""
        cosine = np.maximum(normal @ self.light.sun, 0.0)
        if self.light.sun_colour.max() < 0.2:
            return cosine
        lit = np.flatnonzero(cosine > 0.01)
        start = points[lit] + 0.02 * normal[lit]
        towards = np.broadcast_to(self.light.sun, start.shape).astype(np.float32)
        cosine[lit[self.scene.find_blocked(start, towards, 80.0)]] = 0.0
        return cosine

    def _openness(self, hits: Hits, origin: F32, directions: F32, shape: tuple[int, int]) -> F32:
        """Share (H * W,) of the sky that nearby things leave open.

        One ray for every other pixel and row, in 16 directions that repeat in blocks of 4 x 4 of
        these, then the mean over such a block: smooth, because each block holds all directions.
        """
        rows, columns = np.arange(0, shape[0], 2), np.arange(0, shape[1], 2)
        pick = (rows[:, None] * shape[1] + columns).ravel()
        number = ((rows[:, None] // 2 % 4) * 4 + columns // 2 % 4).ravel()
        near = np.flatnonzero(hits.distance[pick] < 40.0)
        chosen = pick[near]
        normal = hits.normal[chosen]
        start = origin + directions[chosen] * hits.distance[chosen, None] + 0.02 * normal
        towards = _SCATTER[number[near]] + normal
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        share = np.ones(len(pick), np.float32)
        share[near[self.scene.find_blocked(start, towards, 2.0)]] = 0.2
        coarse = cv2.blur(share.reshape(len(rows), len(columns)), (4, 4))
        return np.asarray(cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_LINEAR), np.float32).ravel()

    def _glow(self, material: NDArray[np.int32], glass: F32, uv: F32) -> F32:
        """Lamps and some lit windows, after dusk."""
        glow = self.materials.glow[material] * np.float32(self.light.night * 0.5)
        kind = self.materials.kind[material]
        windows = (kind == FACADE) | (kind == PANES)
        room = np.where(kind[:, None] == PANES, uv, uv / 3.0)
        lit = glass * (noise(np.floor(room) * 7.3, 0.9) > 0.62)
        return glow * np.where(windows, lit * 0.35, 1.0)[:, None].astype(np.float32)


def _sky(light: Light, directions: F32) -> F32:
    """Colour of the sky (R, 3): paler at the horizon, clouds, a bright patch around the sun."""
    up = np.clip(directions[:, 2], 0.0, 1.0)
    pale = np.exp(-up * 5.0)[:, None]
    colour = light.sky_colour * (1 - pale) + light.haze_colour * 1.25 * pale
    flat = directions[:, :2] / (up + 0.12)[:, None]
    clouds = np.clip(noise(flat * 14.0 + 31.0, 0.12) * 1.6 - (1.0 - light.cloud), 0, 1) * np.clip(up * 6, 0, 1)
    colour += (clouds * 0.35 * (1 - light.night))[:, None] * (light.sky_colour.mean() * 1.5 - colour)
    towards = np.clip(directions @ light.sun, 0, 1)
    halo = 0.25 * towards**24 + 2.0 * (towards > 0.9994)
    return colour + (halo * (1 - 0.8 * light.cloud))[:, None] * light.sun_colour


def _reflect(light: Light, rise: F32) -> F32:
    """What glass and paint mirror in directions of slope `rise` (R,): sky above, a dark street below."""
    up = np.clip(0.5 + 2.5 * rise[:, None], 0, 1)
    return light.sky_colour * (0.25 + 0.95 * up)


def _headlights(points: F32, normal: F32, ego2world: NDArray[np.float64]) -> F32:
    """Light (R, 3) of the ego's own head lamps, and a dim glow of the town everywhere."""
    lamp = ego2world @ np.array([3.8, 0.0, 0.7, 1.0])
    offset = points - lamp[:3].astype(np.float32)
    distance = np.maximum(np.linalg.norm(offset, axis=1), 1.0)
    direction = offset / distance[:, None]
    ahead = direction @ ego2world[:3, 0].astype(np.float32)
    beam = np.clip((ahead - 0.86) / 0.1, 0, 1) * np.clip(0.15 - np.einsum("rc,rc->r", direction, normal), 0, 1)
    return (0.07 + 60.0 * beam / (distance + 4.0) ** 1.6)[:, None] * np.array([1.0, 0.93, 0.8], np.float32)


def _develop(radiance: F32, exposure: Exposure, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Lens blur, noise, tone curve and gamma of one picture (H, W, 3)."""
    blurred = cv2.GaussianBlur(radiance, (0, 0), exposure.blur)
    signal = 1.0 - np.exp(-1.25 * np.float32(exposure.gain) * exposure.balance * blurred)
    grain = rng.standard_normal(signal.shape, np.float32) * np.float32(exposure.noise)
    signal = np.clip(signal + grain * (0.4 + np.sqrt(np.clip(signal, 0, 1))), 0, 1)
    return (signal ** np.float32(1 / exposure.gamma) * 255 + 0.5).astype(np.uint8)


_TURN = np.arange(16) * 2.399963
_UP = 1 - 2 * (np.arange(16) * 7 % 16 + 0.5) / 16
_SCATTER = 0.95 * np.stack([np.sqrt(1 - _UP**2) * np.cos(_TURN), np.sqrt(1 - _UP**2) * np.sin(_TURN), _UP], -1).astype(
    np.float32
)
"""Sixteen directions spread evenly over the sphere; added to a normal they favour it like a cosine."""
