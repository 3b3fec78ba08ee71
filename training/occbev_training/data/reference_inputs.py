"""Image augmentation and depth bins as the published BEVDet family has them: the recipe `bevdet` of `augment`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.config import DepthConfig

Float = NDArray[np.float64]
Size = tuple[int, int]
"""(width, height) in pixels."""

SCALE_RANGE = (-0.06, 0.11)
ROTATION_RANGE = (-5.4, 5.4)


@dataclass(frozen=True)
class ImageDraw:
    """One draw of image augmentation: scale, crop, flip, rotate, in this order.

    scale: of the source image. crop: (x0, y0) in the scaled image, may lie outside it.
    size: of the network input. angle_deg: counter-clockwise on screen, about the crop's centre.
    """

    scale: float
    crop: tuple[int, int]
    size: Size
    flip: bool = False
    angle_deg: float = 0.0


def draw_image(source: Size, size: Size, rng: np.random.Generator | None = None) -> ImageDraw:
    """Draw image augmentation; without a generator return the fixed transform of testing."""
    nominal = size[0] / source[0]
    scale = nominal + (rng.uniform(*SCALE_RANGE) if rng else 0.0)
    width, height = int(source[0] * scale), int(source[1] * scale)
    spare = max(0, width - size[0])
    x0 = int(rng.uniform(0, spare)) if rng else spare // 2
    crop = (x0, height - size[1])
    if rng is None:
        return ImageDraw(scale, crop, size)
    return ImageDraw(scale, crop, size, bool(rng.random() < 0.5), rng.uniform(*ROTATION_RANGE))


def image_matrix(draw: ImageDraw) -> Float:
    """Return src2img (3, 3): pixels of the source image to those of the network input."""
    width, height = draw.size
    matrix = np.diag([draw.scale, draw.scale, 1.0])
    matrix[:2, 2] = -np.asarray(draw.crop)
    if draw.flip:
        matrix = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) @ matrix
    angle, centre = np.deg2rad(draw.angle_deg), np.array([width, height]) / 2
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    turn[:2, 2] = centre - turn[:2, :2] @ centre
    return turn @ matrix


def depth_to_bin(metres: ArrayLike, depth: DepthConfig) -> NDArray[np.int64]:
    """Return the bin of each depth; bin i covers [lo + i * step, lo + (i + 1) * step), -1 is outside."""
    metres = np.asarray(metres, np.float64)
    finite = np.where(np.isfinite(metres), metres, 0.0)
    if depth.spacing == "log":
        scale = (depth.bins - 1) / np.log((depth.hi - 1) / depth.lo)
        place = np.log(np.maximum(finite, 1e-9) / depth.lo) * scale
    else:
        place = (finite - depth.lo) / depth.step
    index = np.floor(place).astype(np.int64)
    return np.where(np.isfinite(metres) & (index >= 0) & (index < depth.bins), index, -1)
