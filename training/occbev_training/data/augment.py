"""Augmentation as one frozen draw per sample, applied to pixels, calibration, boxes and voxels together.

A draw is made from a seed before anything is touched, so the same draw can be repeated and tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

_LUMA = np.array([0.299, 0.587, 0.114])
_GREY_AXIS = np.ones(3) / np.sqrt(3.0)

_FILL = (124, 116, 104)
"""RGB where a warped image has nothing to show: about zero after normalisation."""


@dataclass(frozen=True)
class AugmentConfig:
    """How strongly samples are varied; zero everywhere means samples as they were recorded."""

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


NO_AUGMENTATION = AugmentConfig(
    0.0, True, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
)
"""Samples as they were recorded, for validation."""


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


@dataclass(frozen=True)
class Draw:
    """One sample's augmentation: an image draw per camera, BEV signs, and which cameras are alive."""

    images: tuple[ImageDraw, ...]
    bev_sign: tuple[int, int]
    alive: NDArray[np.bool_]
    seed: int

    @property
    def ego2ego(self) -> Float:
        """The BEV flip as a (4, 4) matrix; its determinant is -1 when the scene is mirrored."""
        return np.diag([float(self.bev_sign[0]), float(self.bev_sign[1]), 1.0, 1.0])


def draw_augmentation(
    seed: int, cameras: int, size: tuple[int, int], config: AugmentConfig
) -> Draw:
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
    return Draw(images, sign, alive, seed)


def augment_image(
    image: NDArray[np.uint8], draw: ImageDraw, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Warp and recolour one (H, W, 3) RGB image; parts that the source does not cover get the mean colour."""
    out = image
    if not np.array_equal(draw.matrix, np.eye(3)):
        # OpenCV counts pixel centres as integers, `matrix` counts pixel borders.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        warp = np.linalg.inv(half) @ draw.matrix @ half
        out = cv2.warpAffine(
            out,
            warp[:2],
            (image.shape[1], image.shape[0]),
            flags=cv2.INTER_LINEAR,
            borderValue=_FILL,
        )
    if draw.blur > 0:
        out = cv2.GaussianBlur(out, (0, 0), draw.blur)
    if draw.gamma != 1.0:
        out = cv2.LUT(out, (255.0 * (np.arange(256) / 255.0) ** draw.gamma).astype(np.uint8))
    if not np.array_equal(draw.colour, np.eye(3, 4)):
        out = cv2.transform(out, draw.colour * [1.0, 1.0, 1.0, 255.0])
    if draw.noise > 0:
        noisy = out + draw.noise * rng.standard_normal(out.shape, np.float32)
        out = np.clip(noisy, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(out)


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
    """Fold the BEV flip into (N, 4, 4) camera poses; a mirrored pose is no rotation any more, which the lift allows."""
    return draw.ego2ego @ cam2ego


def augment_boxes(boxes: NDArray[np.floating], draw: Draw) -> NDArray[np.floating]:
    """Flip (M, 9) boxes x, y, z, l, w, h, yaw, vx, vy with the scene; the yaw stays in (-pi, pi]."""
    sign_x, sign_y = draw.bev_sign
    out = boxes.copy()
    out[:, 0] *= sign_x
    out[:, 1] *= sign_y
    out[:, 6] = np.arctan2(sign_y * np.sin(boxes[:, 6]), sign_x * np.cos(boxes[:, 6]))
    out[:, 7] *= sign_x
    out[:, 8] *= sign_y
    return out


def augment_voxels(volume: NDArray[np.generic], draw: Draw) -> NDArray[np.generic]:
    """Flip an (X, Y, Z) volume of a grid that is centred on the ego; a view."""
    return volume[:: draw.bev_sign[0], :: draw.bev_sign[1]]


def augment_pixels(camera: NDArray[np.integer], pixels: NDArray[np.floating], draw: Draw) -> Float:
    """Move (P, 2) pixels of cameras (P,) with the images."""
    matrices = np.stack([image.matrix for image in draw.images])[camera]
    return np.einsum("pij,pj->pi", matrices[:, :2, :2], pixels) + matrices[:, :2, 2]


def live_bits(alive: NDArray[np.bool_]) -> int:
    """Return the bit mask of living cameras in the order of visibility bits (camera i is bit i)."""
    return int(sum(1 << i for i, ok in enumerate(alive) if ok))


def _draw_image(
    rng: np.random.Generator, size: tuple[int, int], mirrored: bool, config: AugmentConfig
) -> ImageDraw:
    flip = mirrored != (rng.random() < config.image_flip)
    matrix = _image_matrix(rng, size, flip, config)
    noise = rng.uniform(0, config.noise) if config.noise and rng.random() < 0.5 else 0.0
    blur = rng.uniform(0.3, 1.0) if rng.random() < config.blur else 0.0
    gamma = float(np.exp(rng.uniform(-config.gamma, config.gamma))) if config.gamma else 1.0
    return ImageDraw(matrix, _colour_matrix(rng, config), gamma, noise, blur)


def _image_matrix(
    rng: np.random.Generator, size: tuple[int, int], flip: bool, config: AugmentConfig
) -> Float:
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
