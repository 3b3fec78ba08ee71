"""The cameras of world v2: mirrors that show the street, clouds and blown sky, the vehicle's own bonnet, exposure and
sharpening that each camera does for itself.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.rig import Camera
from occbev_training.simulator.camera import Exposure, Mirror, Painter, pixel_rays
from occbev_training.simulator.materials import Materials, noise
from occbev_training.simulator.mesh import MeshBuilder
from occbev_training.simulator.raycast import F32, RayScene, StreetScene
from occbev_training.simulator.world import Light

MIRROR_GLOSS = 0.35
"""From this gloss on a surface shows what stands before it, below only sky and street."""

MIRROR_REACH = 150.0
"""A mirror shows nothing farther away than this but sky."""

METERED = 0.11
"""Light, after gain, that a camera wants the middle of its picture to have."""

PIVOT, CONTRAST = 0.42, 1.14
"""The tone curve turns about this display value with this slope."""

LEAST_CAMERA_HEIGHT = 1.05
"""Lower cameras sit in the bodywork and see no bonnet."""


class DetailedPainter(Painter):
    """Renders pictures of a street of world v2."""

    def __init__(self, scene: StreetScene, materials: Materials, light: Light) -> None:
        """Build the bonnet."""
        super().__init__(scene, materials, light)
        self._bonnet = RayScene(_bonnet())
        self._mean_colour = materials.colour + 0.25 * (materials.second - materials.colour)
        self._paint = materials.colour[len(materials.colour) // 3]

    def sky(self, directions: F32) -> F32:
        """Sky with heaped clouds, lit at their rims; near the sun it outshines the sensor."""
        light = self.light
        up = np.clip(directions[:, 2], 0.0, 1.0)
        pale = np.exp(-up * 4.0)[:, None]
        colour = light.sky_colour * (1 - pale) + light.haze_colour * 1.5 * pale
        flat = directions[:, :2] / (up + 0.1)[:, None]
        # Offset by the sun, which is the drive's own: no two drives share their clouds.
        flat = flat + 40 * light.sun[:2]
        thick = 0.65 * noise(flat * 9.0, 0.1) + 0.35 * noise(flat * 9.0 + 11.0, 0.5)
        cover = np.clip((thick - 0.72 + 0.5 * light.cloud) * 4.0, 0, 1) * np.clip(up * 9, 0.25, 1)
        shade = 1.9 - 1.5 * np.clip((thick - 0.5) * 2.2, 0, 1)
        day = np.float32(1 - light.night)
        white = (light.sky_colour.mean() * 1.2 + 0.25 * light.sun_colour.mean()) * shade
        colour += (cover * day)[:, None] * (white[:, None] * np.array([1.0, 1.0, 1.02]) - colour)
        towards = np.clip(directions @ light.sun, 0, 1)
        halo = 0.35 * towards**8 + 1.6 * towards**60 + 20.0 * (towards > 0.9994)
        return np.asarray(colour + (halo * (1 - 0.7 * light.cloud))[:, None] * light.sun_colour, np.float32)

    def reflection(self, mirror: Mirror) -> F32:
        """What smooth panes show: the street opposite in its mean colours, or the sky."""
        colour = super().reflection(mirror)
        clear = np.flatnonzero(mirror.gloss >= MIRROR_GLOSS)
        normal = mirror.normal[clear]
        away = mirror.rays[clear] + 2 * mirror.facing[clear, None] * normal
        away /= np.linalg.norm(away, axis=1, keepdims=True)
        hits = self.scene.first(mirror.points[clear] + 0.03 * normal, away, MIRROR_REACH)
        seen, open_sky = hits.triangle >= 0, hits.triangle < 0
        material = self.scene.mesh.material[hits.triangle[seen]]
        sun = np.maximum(hits.normal[seen] @ self.light.sun, 0)[:, None] * self.light.sun_colour
        lighting = 0.6 * sun + (0.5 + 0.3 * hits.normal[seen, 2:]) * self.light.sky_colour
        colour[clear[seen]] = self._mean_colour[material] * lighting
        colour[clear[open_sky]] = self.sky(away[open_sky]) * np.float32(0.9)
        return colour

    def radiance(self, camera: Camera, ego2world: NDArray[np.float64]) -> F32:
        """Add the bonnet to what is seen of the street."""
        colour = super().radiance(camera, ego2world)
        rays = np.nan_to_num(pixel_rays(camera).reshape(-1, 3))
        found = self._hit_bonnet(camera, rays)
        if found is None:
            return colour
        own, normal = found
        way = rays[own] @ camera.cam2ego[:3, :3].T.astype(np.float32)
        facing = np.clip(-np.einsum("rc,rc->r", way, normal), 0.02, 1)
        turn = ego2world[:3, :3].T.astype(np.float32)
        mirrored = (way + 2 * facing[:, None] * normal) @ turn
        sun = np.maximum(normal @ turn @ self.light.sun, 0)[:, None] * self.light.sun_colour
        body = self._paint * (sun + self.light.sky_colour)
        share = (0.12 + 0.7 * (1 - facing) ** 4)[:, None]
        colour[own] = body + share * (self.sky(mirrored) - body)
        return colour

    def hidden(self, camera: Camera, rays: F32) -> NDArray[np.bool_]:
        """Which rays (R, 3) of a camera's frame end at the bonnet."""
        found = self._hit_bonnet(camera, rays)
        if found is None:
            return np.zeros(len(rays), bool)
        return found[0]

    def develop(self, radiance: F32, exposure: Exposure, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Meter the middle of the picture, clip what is too bright, sharpen, add noise and a tone curve."""
        height, width = radiance.shape[:2]
        middle = radiance[height // 4 : 7 * height // 8, width // 8 : 7 * width // 8].mean(-1)
        level = float(np.exp(np.log(middle + 0.02).mean()))
        usual = exposure.gain  # of the drive's light: a camera corrects most of what is left, not all
        wanted = METERED * (1 - 0.55 * self.light.night)
        gain = usual * (wanted / max(level * usual, 1e-3)) ** 0.75
        light = cv2.GaussianBlur(np.minimum(radiance, 12.0), (0, 0), exposure.blur)
        light = light * (np.float32(gain) * exposure.balance)
        signal = light * 1.05 / (0.6 + 0.93 * light)  # a shoulder that still reaches white
        signal += 0.08 * (signal - cv2.GaussianBlur(signal, (0, 0), 1.0))
        grain = rng.standard_normal(signal.shape, np.float32) * np.float32(0.7 * exposure.noise)
        signal = np.clip(signal + grain * (0.4 + np.sqrt(np.clip(signal, 0, 1))), 0, 1)
        shown = signal ** np.float32(1 / exposure.gamma)
        shown = np.clip(PIVOT + CONTRAST * (shown - PIVOT), 0, 1)
        return np.asarray(shown * 255 + 0.5, np.uint8)

    def _hit_bonnet(self, camera: Camera, rays: F32) -> tuple[NDArray[np.bool_], F32] | None:
        """Which rays meet the bonnet from outside, and its normals there in base_link; None if none does."""
        if camera.cam2ego[2, 3] < LEAST_CAMERA_HEIGHT:
            return None
        way = np.ascontiguousarray(rays @ camera.cam2ego[:3, :3].T.astype(np.float32))
        start = np.broadcast_to(camera.cam2ego[:3, 3].astype(np.float32), way.shape)
        hits = self._bonnet.first(np.ascontiguousarray(start), way, np.full(len(way), 6.0, np.float32))
        assert hits is not None, "a vehicle has a bonnet"
        normal = hits["Ng"] / np.maximum(np.linalg.norm(hits["Ng"], axis=1, keepdims=True), 1e-9)
        normal *= np.sign(normal[:, 2:])
        own = (hits["primID"] >= 0) & (np.einsum("rc,rc->r", way, normal) < 0)
        return (own, normal[own]) if own.any() else None


def _bonnet() -> F32:
    """Triangles (T, 3, 3) of a bonnet in base_link: crowned, lower at its nose and its sides."""
    x, y = np.meshgrid(np.linspace(1.9, 3.72, 9), np.linspace(-0.88, 0.88, 9), indexing="ij")
    ahead = np.clip((x - 1.9) / 1.82, 0, 1)
    z = 1.0 - 0.1 * ahead**2 - 0.16 * ahead**8 - 0.07 * np.abs(y / 0.88) ** 3 + 0.015 * (np.abs(np.abs(y) - 0.5) < 0.12)
    points = np.stack([x, y, z], -1)
    corners = np.stack([points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]], 2)
    builder = MeshBuilder()
    builder.quads(corners.reshape(-1, 4, 3), 0)
    return builder.build().triangles
