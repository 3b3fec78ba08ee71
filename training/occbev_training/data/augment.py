"""Augmentation as one frozen draw per sample, applied to pixels, calibration, boxes and voxels together.

A draw is made from a seed before anything is touched, so the same draw can be repeated and tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.config import ConfigError
from occbev.ego_signals import EgoSignals
from occbev.geometry import rotation_from_yaw
from occbev.grid import VoxelGrid
from occbev.inference.tables import Augmentation
from occbev_training.data import reference_inputs as reference
from occbev_training.data.shards import camera_bit

Float = NDArray[np.float64]

_LUMA = np.array([0.299, 0.587, 0.114])
_GREY_AXIS = np.ones(3) / np.sqrt(3.0)

NOISE_VALUES = 2**23
"""Values of the noise that all images share: more than the largest image that a network takes has."""

_FILL = (124, 116, 104)
"""RGB where a warped image has nothing to show: about zero after normalisation."""


@dataclass(frozen=True)
class AugmentConfig:
    """How strongly samples are varied; with zero everywhere they stay as recorded."""

    bev_flip: float = 0.5
    """Chance of negating x, and independently of negating y, of the whole scene."""
    flip_with_bev: bool = True
    """Mirror every image exactly when the scene is mirrored, so that headings seen in the image stay true."""
    image_flip: float = 0.0
    """Chance of mirroring one camera's image on top of that."""
    scale: tuple[float, float] = (0.95, 1.12)
    """Range of the image scale about the lower edge."""
    shift: float = 0.5
    """Share of the free room after scaling that the crop may move by, 0 keeps it centred."""
    rotate: float = 2.0
    """Largest image rotation in degrees."""
    brightness: float = 0.25
    """Largest relative change of brightness, and of each channel by half of it."""
    contrast: float = 0.3
    """Largest relative change of contrast."""
    saturation: float = 0.4
    """Largest relative change of saturation."""
    hue: float = 12.0
    """Largest hue rotation in degrees."""
    gamma: float = 0.3
    """Largest absolute natural logarithm of the gamma exponent."""
    grey: float = 0.05
    """Chance of an image without colour."""
    noise: float = 6.0
    """Largest standard deviation of pixel noise, in 0..255; drawn for half of the images."""
    blur: float = 0.2
    """Chance of a slightly blurred image."""
    camera_drop: float = 0.1
    """Chance that one camera of the sample is missing."""
    bev_rotate: float = 0.0
    """Largest turn of the whole scene about the vehicle in degrees; voxel labels take the nearest voxel."""
    bev_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the scale of the whole scene."""
    image_recipe: str = "occbev"
    """occbev (scale, shift, rotate and image_flip above), or bevdet: scale, crop, flip and rotation as published."""
    source: tuple[int, int] = (1600, 900)
    """Width and height of the recorded images, which the published draws are made for."""
    photometric: bool = False
    """Distort colours as BEVFormer's recipe does, camera by camera, besides the changes above."""
    grid_mask: float = 0.0
    """Chance of hiding a grid of squares in all images of a sample; the BEVFormer recipe has 0.7."""

    def __post_init__(self) -> None:
        if self.image_recipe not in ("occbev", "bevdet"):
            raise ConfigError(f"augment.image_recipe {self.image_recipe!r}: must be occbev or bevdet")
        for name in ("scale", "bev_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"augment.{name} {getattr(self, name)}: want 0 < low <= high")
        for name in ("bev_flip", "image_flip", "grey", "blur", "camera_drop", "grid_mask"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} {getattr(self, name)}: is a chance, must be in 0..1")
        for name in ("shift", "rotate", "bev_rotate", "brightness", "contrast", "saturation", "hue", "gamma", "noise"):
            if getattr(self, name) < 0:
                raise ConfigError(f"augment.{name} {getattr(self, name)}: must be at least 0")


NO_AUGMENTATION = AugmentConfig(0.0, True, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Samples as they were recorded, for validation."""


@dataclass(frozen=True)
class Photometric:
    """One draw of the colour distortion that detectors are trained with (Liu et al. 2016, section 2.2).

    brightness: added to 0..255. contrast, saturation: factors; contrast_first: before the others.
    hue_deg: added. order: of the channels at the end.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = True
    saturation: float = 1.0
    hue_deg: float = 0.0
    order: tuple[int, int, int] = (0, 1, 2)


@dataclass(frozen=True)
class ImageDraw:
    """What happens to one camera's image.

    matrix: (3, 3), source pixel -> augmented pixel, where pixel i covers [i, i + 1).
    colour: (3, 4) applied to RGB values 0..1. noise in 0..255; blur: sigma in pixels, 0 for none.
    """

    matrix: Float
    colour: Float
    gamma: float
    noise: float
    blur: float
    photometric: Photometric | None = None


@dataclass(frozen=True)
class GridMask:
    """A grid of hidden squares (Chen et al. 2020): period and offsets (rows, columns) in pixels."""

    period: int
    offset: tuple[int, int]


@dataclass(frozen=True)
class Draw:
    """One sample's augmentation: an image draw per camera, what happens to the scene, which cameras are alive.

    The scene is turned by bev_angle (radians, counter-clockwise), scaled, then mirrored by its signs.
    """

    images: tuple[ImageDraw, ...]
    bev_sign: tuple[int, int]
    alive: NDArray[np.bool_]
    seed: int
    bev_angle: float = 0.0
    bev_scale: float = 1.0
    grid_mask: GridMask | None = None

    @property
    def ego2ego(self) -> Float:
        """The change of the scene as a (4, 4) matrix; its determinant is negative when it is mirrored."""
        out = np.eye(4)
        mirror = np.diag([float(self.bev_sign[0]), float(self.bev_sign[1]), 1.0])
        out[:3, :3] = self.bev_scale * mirror @ rotation_from_yaw(self.bev_angle)
        return out


def draw_augmentation(seed: int, cameras: int, size: tuple[int, int], config: AugmentConfig) -> Draw:
    """Draw one sample's augmentation; the same seed gives the same draw.

    size: (width, height) of the images.
    """
    rng = np.random.default_rng(seed)
    sign = (
        -1 if rng.random() < config.bev_flip else 1,
        -1 if rng.random() < config.bev_flip else 1,
    )
    mirrored = config.flip_with_bev and sign[0] * sign[1] < 0
    images = tuple(_draw_image(rng, size, mirrored, config) for _ in range(cameras))
    alive = np.ones(cameras, bool)
    if cameras > 1 and rng.random() < config.camera_drop:
        alive[rng.integers(cameras)] = False
    angle = np.deg2rad(rng.uniform(-config.bev_rotate, config.bev_rotate))
    scale = rng.uniform(*config.bev_scale)
    mask = draw_grid_mask(rng, size[1]) if rng.random() < config.grid_mask else None
    return Draw(images, sign, alive, seed, float(angle), float(scale), mask)


def draw_grid_mask(rng: np.random.Generator, height: int) -> GridMask:
    """Draw a grid for images of this height."""
    period = int(rng.integers(2, height))
    return GridMask(period, (int(rng.integers(period)), int(rng.integers(period))))


def grid_mask_image(mask: GridMask, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels (h, w) stay; the stripes of half a period do, the squares between do not.

    size: (width, height).
    """
    width, height = size
    stripe = min(max(int(mask.period * 0.5 + 0.5), 1), mask.period - 1)
    kept = []
    for extent, offset in zip((height, width), mask.offset, strict=True):
        canvas = int(1.5 * extent)
        place = np.arange(canvas) - offset
        striped = (place >= 0) & (place % mask.period < stripe)
        striped &= place < (canvas // mask.period) * mask.period  # whole periods only, as published
        begin = (canvas - extent) // 2
        kept.append(striped[begin : begin + extent])
    return kept[0][:, None] | kept[1][None]


def draw_photometric(rng: np.random.Generator) -> Photometric:
    """Draw the published colour distortion of one image; each part has a chance of one half."""
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    contrast_first = bool(rng.random() < 0.5)
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-18, 18) if rng.random() < 0.5 else 0.0
    order = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    return Photometric(brightness, contrast, contrast_first, saturation, hue, tuple(order.tolist()))


def distort(image: NDArray[np.uint8], draw: Photometric) -> NDArray[np.uint8]:
    """Apply a colour distortion to (H, W, 3) RGB; values are cut to 0..255 once, at the end."""
    out = image.astype(np.float32) + np.float32(draw.brightness)
    if draw.contrast_first:
        out *= np.float32(draw.contrast)
    if draw.saturation != 1.0 or draw.hue_deg != 0.0:
        hsv = cv2.cvtColor(out, cv2.COLOR_RGB2HSV)
        hsv[..., 1] *= draw.saturation
        hsv[..., 0] = (hsv[..., 0] + draw.hue_deg) % 360
        out = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not draw.contrast_first:
        out = out * np.float32(draw.contrast)
    return np.clip(out[..., list(draw.order)], 0, 255).astype(np.uint8)


def augment_image(image: NDArray[np.uint8], draw: ImageDraw, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Warp and recolour one (H, W, 3) RGB image; parts that the source does not cover get the mean colour."""
    out: NDArray[Any] = image
    if not np.array_equal(draw.matrix, np.eye(3)):
        # OpenCV counts pixel centres as integers, `matrix` counts pixel borders.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        warp = np.linalg.inv(half) @ draw.matrix @ half
        size = (image.shape[1], image.shape[0])
        four = cv2.cvtColor(out, cv2.COLOR_RGB2RGBA)  # the same pixels in half the time
        four = cv2.warpAffine(four, warp[:2], size, flags=cv2.INTER_LINEAR, borderValue=(*_FILL, 0))
        out = cv2.cvtColor(four, cv2.COLOR_RGBA2RGB)
    if draw.blur > 0:
        out = cv2.GaussianBlur(out, (0, 0), draw.blur)
    if draw.gamma != 1.0:
        out = cv2.LUT(out, (255.0 * (np.arange(256) / 255.0) ** draw.gamma).astype(np.uint8))
    if not np.array_equal(draw.colour, np.eye(3, 4)):
        out = cv2.transform(out, draw.colour * [1.0, 1.0, 1.0, 255.0])
    if draw.photometric is not None:
        content = len(out) - _padding_rows(out)
        out = np.concatenate([distort(out[:content], draw.photometric), out[content:]])
    if draw.noise > 0:
        begin = int(rng.integers(NOISE_VALUES - out.size))
        noise = _noise()[begin : begin + out.size].reshape(out.shape)
        out = cv2.addWeighted(out, 1.0, noise, draw.noise, 0.0, dtype=cv2.CV_8U)  # cut to 0..255
    return np.ascontiguousarray(out)


def _padding_rows(image: NDArray[np.uint8]) -> int:
    """Return how many rows at the lower end of an image are of one colour: padding stays as networks will see it."""
    colour, rows = image[-1, -1], 0
    while rows < len(image) and (image[-1 - rows] == colour).all():
        rows += 1
    return rows if rows < len(image) else 0


@cache
def _noise() -> NDArray[np.float32]:
    """Normal noise that images read from a place that is drawn for each, which costs a tenth of drawing it."""
    return np.random.default_rng(0).standard_normal(NOISE_VALUES, np.float32)


def augment_images(images: NDArray[np.uint8], draw: Draw) -> NDArray[np.uint8]:
    """Apply a draw to (N, H, W, 3) images; a camera that is not alive becomes zeros."""
    rng = np.random.default_rng(draw.seed + 1)
    out = np.zeros_like(images)
    for index, image_draw in enumerate(draw.images):
        if draw.alive[index]:
            out[index] = augment_image(images[index], image_draw, rng)
    return out


def augment_intrinsic(intrinsic: Float, draw: Draw) -> Float:
    """Fold the image warp into (N, 3, 3) intrinsics."""
    return np.stack([image.matrix for image in draw.images]) @ intrinsic


def augment_cam2ego(cam2ego: Float, draw: Draw) -> Float:
    """Fold the change of the scene into (N, 4, 4) camera poses.

    A mirrored or scaled pose is not a rigid motion; every view transform accepts it.
    """
    return draw.ego2ego @ cam2ego


def augmentation_of(draw: Draw) -> Augmentation:
    """Return what a draw changes, for depth nets that tell it apart from the camera."""
    return Augmentation(np.stack([image.matrix for image in draw.images]), draw.ego2ego)


def augment_ego2global(ego2global: Float, draw: Draw) -> Float:
    """Carry a vehicle pose (4, 4) along: the world changes with the scene, so that motion stays rigid."""
    return draw.ego2ego @ ego2global @ np.linalg.inv(draw.ego2ego)


def augment_signals(signals: EgoSignals | None, draw: Draw) -> EgoSignals | None:
    """Carry what a vehicle says of its motion along."""
    return signals and signals.move(draw.ego2ego)


def augment_boxes(boxes: NDArray[np.floating], draw: Draw) -> NDArray[np.floating]:
    """Move (M, 9) boxes x, y, z, l, w, h, yaw, vx, vy with the scene; the yaw stays in (-pi, pi]."""
    sign_x, sign_y = draw.bev_sign
    linear = draw.ego2ego[:3, :3]
    out = boxes.copy()
    out[:, :3] = boxes[:, :3] @ linear.T
    out[:, 3:6] *= draw.bev_scale
    yaw = boxes[:, 6] + draw.bev_angle
    out[:, 6] = np.arctan2(sign_y * np.sin(yaw), sign_x * np.cos(yaw))
    out[:, 7:9] = boxes[:, 7:9] @ linear[:2, :2].T
    return out


_Value = TypeVar("_Value", bound=np.generic)


def augment_voxels(
    volume: NDArray[_Value], draw: Draw, grid: VoxelGrid | None = None, fill: int = 0
) -> NDArray[_Value]:
    """Move an (X, Y, Z) volume with the scene.

    Flips of a grid that is centred on the vehicle are exact views. A turn or scale needs `grid`: every voxel
    takes the value of the voxel in which its centre lay before, `fill` where that is outside.
    """
    if draw.bev_angle == 0 and draw.bev_scale == 1:
        return volume[:: draw.bev_sign[0], :: draw.bev_sign[1]]
    if grid is None:
        raise ValueError("a turned or scaled volume needs its grid")
    plane, height = voxel_sources(draw, grid)
    moved = volume.reshape(-1, volume.shape[2])[plane][..., height]
    return np.where((plane >= 0)[..., None] & (height >= 0), moved, np.asarray(fill, volume.dtype))


def voxel_sources(draw: Draw, grid: VoxelGrid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where voxels come from: flat index over (X, Y), (X, Y); index along z, (Z,); -1 for outside."""
    x, y, z = grid.shape
    if draw.bev_angle == 0 and draw.bev_scale == 1:
        plane = np.arange(x * y).reshape(x, y)[:: draw.bev_sign[0], :: draw.bev_sign[1]]
        return plane, np.arange(z)
    lo, pitch = np.array(grid.lo), np.array(grid.pitch)
    axes = [lo[i] + (np.arange(grid.shape[i]) + 0.5) * pitch[i] for i in range(3)]
    linear = np.linalg.inv(draw.ego2ego[:2, :2])
    centres = np.stack(np.meshgrid(axes[0], axes[1], indexing="ij"), -1) @ linear.T  # (X, Y, 2)
    cell = np.floor((centres - lo[:2]) / pitch[:2]).astype(np.int64)
    level = np.floor((axes[2] / draw.bev_scale - lo[2]) / pitch[2]).astype(np.int64)
    inside = np.all((cell >= 0) & (cell < (x, y)), axis=-1)
    return np.where(inside, cell[..., 0] * y + cell[..., 1], -1), np.where((level >= 0) & (level < z), level, -1)


def augment_pixels(camera: NDArray[np.integer], pixels: NDArray[np.floating], draw: Draw) -> Float:
    """Move (P, 2) pixels of cameras (P,) with the images."""
    matrices = np.stack([image.matrix for image in draw.images])[camera]
    return np.einsum("pij,pj->pi", matrices[:, :2, :2], pixels) + matrices[:, :2, 2]


def live_bits(alive: NDArray[np.bool_]) -> int:
    """Return the visibility bits of living cameras; a bit that cameras share lives while one of them does."""
    return reduce(or_, (1 << camera_bit(i) for i, ok in enumerate(alive) if ok), 0)


def _draw_image(rng: np.random.Generator, size: tuple[int, int], mirrored: bool, config: AugmentConfig) -> ImageDraw:
    flip = mirrored != (rng.random() < config.image_flip)
    if config.image_recipe == "bevdet":
        matrix = _reference_matrix(rng, size, config.source)
    else:
        matrix = _image_matrix(rng, size, flip, config)
    noise = rng.uniform(0, config.noise) if config.noise and rng.random() < 0.5 else 0.0
    blur = rng.uniform(0.3, 1.0) if rng.random() < config.blur else 0.0
    gamma = float(np.exp(rng.uniform(-config.gamma, config.gamma))) if config.gamma else 1.0
    colour = _colour_matrix(rng, config)
    photometric = draw_photometric(rng) if config.photometric else None
    return ImageDraw(matrix, colour, gamma, noise, blur, photometric)


def _reference_matrix(rng: np.random.Generator, size: tuple[int, int], source: tuple[int, int]) -> Float:
    """Return the published augmentation of the recorded image, seen from the image at network size.

    Samples are stored as the fixed transform of testing left them, so that is undone first.
    """
    drawn = reference.image_matrix(reference.draw_image(source, size, rng))
    stored = reference.image_matrix(reference.draw_image(source, size))
    return drawn @ np.linalg.inv(stored)


def _image_matrix(rng: np.random.Generator, size: tuple[int, int], flip: bool, config: AugmentConfig) -> Float:
    """Scale about the middle of the lower edge, shift, rotate about the centre, mirror."""
    width, height = size
    scale = rng.uniform(*config.scale)
    room = config.shift * abs(scale - 1.0) / 2
    shift_x, shift_y = rng.uniform(-room, room) * width, rng.uniform(-room, room) * height
    angle = np.deg2rad(rng.uniform(-config.rotate, config.rotate))
    zoom = _about((width / 2, height), np.diag([scale, scale]))
    turn = _about(
        (width / 2, height / 2),
        np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]),
    )
    move = np.array([[1, 0, shift_x], [0, 1, shift_y], [0, 0, 1.0]])
    mirror = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) if flip else np.eye(3)
    return mirror @ turn @ move @ zoom


def _about(centre: tuple[float, float], linear: Float) -> Float:
    """Return the (3, 3) affine map that applies a (2, 2) matrix about a fixed point."""
    out = np.eye(3)
    out[:2, :2] = linear
    out[:2, 2] = np.asarray(centre) - linear @ np.asarray(centre)
    return out


def _colour_matrix(rng: np.random.Generator, config: AugmentConfig) -> Float:
    """Join hue, saturation, contrast and brightness into one (3, 4) matrix on RGB in 0..1."""
    brightness = 1 + rng.uniform(-1, 1) * config.brightness
    channels = 1 + rng.uniform(-0.5, 0.5, 3) * config.brightness
    contrast = 1 + rng.uniform(-1, 1) * config.contrast
    saturation = 0.0 if rng.random() < config.grey else 1 + rng.uniform(-1, 1) * config.saturation
    hue = np.deg2rad(rng.uniform(-1, 1) * config.hue)
    grey = np.tile(_LUMA, (3, 1))
    colour = (grey + saturation * (np.eye(3) - grey)) @ _hue_rotation(hue)
    gain = np.diag(channels * brightness) * contrast
    offset = 0.5 * (1 - contrast) * np.ones((3, 1))
    return np.hstack([gain @ colour, offset])


def _hue_rotation(angle: float) -> Float:
    """Rotate RGB about the grey axis (Rodrigues)."""
    x, y, z = _GREY_AXIS
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
