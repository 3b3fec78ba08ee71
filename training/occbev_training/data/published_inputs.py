"""Inputs and labels as the published BEVDet family makes them: augmentation matrices, key ego frame, depth labels.

For parity with its checkpoints; our own networks use `augment`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.config import DepthConfig
from occbev.geometry import invert_transform, transform_points

Float = NDArray[np.float64]
Size = tuple[int, int]
"""(width, height) in pixels."""

SCALE_RANGE = (-0.06, 0.11)
ROTATION_RANGE = (-5.4, 5.4)
BEV_YAW_RANGE = (-22.5, 22.5)
BEV_SCALE_RANGE = (0.95, 1.05)


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


@dataclass(frozen=True)
class BevDraw:
    """One draw of BEV augmentation: rotate about z and scale, then mirror."""

    angle_deg: float = 0.0
    scale: float = 1.0
    flip_x: bool = False
    flip_y: bool = False


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


def draw_bev(rng: np.random.Generator, flips_only: bool = False) -> BevDraw:
    """Draw BEV augmentation; occupancy is trained with flips only."""
    flips = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    if flips_only:
        return BevDraw(0.0, 1.0, *flips)
    return BevDraw(rng.uniform(*BEV_YAW_RANGE), rng.uniform(*BEV_SCALE_RANGE), *flips)


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


def bev_matrix(draw: BevDraw) -> Float:
    """Return ego2ego (3, 3), the linear map from real to augmented ego."""
    angle = np.deg2rad(draw.angle_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    mirror = np.diag([-1.0 if draw.flip_x else 1.0, -1.0 if draw.flip_y else 1.0, 1.0])
    return mirror @ (draw.scale * turn)


def augment_boxes(boxes: ArrayLike, draw: BevDraw) -> Float:
    """Move boxes (M, 9) along with the BEV; the yaw is not wrapped and speeds are scaled too."""
    boxes, matrix = np.array(boxes, np.float64), bev_matrix(draw)
    boxes[:, :3] = boxes[:, :3] @ matrix.T
    boxes[:, 3:6] *= draw.scale
    boxes[:, 6] += np.deg2rad(draw.angle_deg)
    if draw.flip_x:
        boxes[:, 6] = np.pi - boxes[:, 6]
    if draw.flip_y:
        boxes[:, 6] = -boxes[:, 6]
    boxes[:, 7:9] = boxes[:, 7:9] @ matrix[:2, :2].T
    return boxes


def flip_voxels(volume: NDArray[np.generic], draw: BevDraw) -> NDArray[np.generic]:
    """Mirror a label volume (X, Y, Z) along with the BEV; a view."""
    volume = volume[::-1] if draw.flip_x else volume
    return volume[:, ::-1] if draw.flip_y else volume


def cam2key_ego(cam2ego: ArrayLike, ego2global: ArrayLike, key: int = 0) -> Float:
    """Return camera -> ego at the key camera's exposure, (N, 4, 4).

    cam2ego, ego2global: (N, 4, 4) at each camera's own exposure. key: the published weights take
    camera 0 of the key frame, which is CAM_FRONT_LEFT.
    """
    ego2global = np.asarray(ego2global, np.float64)
    return invert_transform(ego2global[key]) @ ego2global @ np.asarray(cam2ego, np.float64)


def depth_image(points_img: ArrayLike, size: Size, depth: DepthConfig) -> NDArray[np.float32]:
    """Return the nearest depth (h, w) that falls on each pixel, 0 where none does.

    points_img: (M, 3) of u, v in network pixels and depth; pixels are rounded half to even.
    """
    points = np.asarray(points_img, np.float32)
    pixel = np.rint(points[:, :2])
    inside = np.all((pixel >= 0) & (pixel < size), axis=1)
    inside &= (points[:, 2] >= depth.lo) & (points[:, 2] < depth.hi)
    column, row = pixel[inside].astype(np.int64).T
    near = points[inside, 2]
    image = np.full((size[1], size[0]), np.inf, np.float32)
    np.minimum.at(image, (row, column), near)
    return np.where(np.isfinite(image), image, np.float32(0))


def truncated_depth_image(points_img: ArrayLike, size: Size) -> NDArray[np.float32]:
    """Return Megvii's depth image (h, w): pixels truncated, the last point wins."""
    points = np.asarray(points_img, np.float32)
    column, row = points[:, :2].astype(np.int16).T
    inside = (column >= 0) & (column < size[0]) & (row >= 0) & (row < size[1])
    image = np.zeros((size[1], size[0]), np.float32)
    image[row[inside], column[inside]] = points[inside, 2]
    return image


def points_to_image(points_cam: ArrayLike, intrinsic: ArrayLike, src2img: ArrayLike) -> Float:
    """Project points in cam (M, 3) to u, v of the network input and depth; nothing is left out."""
    points = np.asarray(points_cam, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = (points / points[:, 2:]) @ (np.asarray(src2img) @ np.asarray(intrinsic)).T
    return np.concatenate([pixels[:, :2], points[:, 2:]], 1)


def lidar_to_cam(
    points: ArrayLike,
    lidar2ego: ArrayLike,
    ego2global: ArrayLike,
    cam2ego: ArrayLike,
    cam_ego2global: ArrayLike,
) -> Float:
    """Move LiDAR points (M, 3) into a camera's frame through the ego poses of both instants."""
    lidar2global = np.asarray(ego2global) @ np.asarray(lidar2ego)
    cam2global = np.asarray(cam_ego2global) @ np.asarray(cam2ego)
    return transform_points(invert_transform(cam2global) @ lidar2global, points)


def depth_bins(image: ArrayLike, stride: int, depth: DepthConfig) -> NDArray[np.int64]:
    """Return the bin (..., h / stride, w / stride) of the nearest depth in each cell, -1 without one.

    image: (..., h, w), 0 = no depth.
    """
    image = np.asarray(image, np.float32)
    *batch, height, width = image.shape
    cells = image.reshape(*batch, height // stride, stride, width // stride, stride)
    nearest = np.where(cells == 0, np.inf, cells).min((-3, -1))
    return depth_to_bin(nearest, depth)


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
