"""Lift-Splat view transform: camera features with depth, summed into BEV cells by tables.

Which frustum point feeds which cell is computed outside the network (`occbev.inference.tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from occbev.config import LiftConfig
from occbev.inference.families import family_of
from occbev.inference.families.lift_splat import SplatFamily, SplatModel
from occbev.inference.tables import (
    GATHER_STAGES,
    RAY_CHANNELS,
    Augmentation,
    LiftPoints,
    to_bev_frame,
)
from occbev_training.models.layers import at_least_float32, conv_bn_relu
from occbev_training.models.lift_splat.placing import find_begins, place_frusta, sort_stably


@dataclass(frozen=True)
class PointsByPixel:
    """The same points sorted by pixel: the gradient of a pixel's context is a bag over its cells.

    order: (P,) int32, which of `BatchedPoints`' entries, without the dummy.
    cell: (P,) int32, where each adds to. offset: (B * N * h * w,) int32, where each pixel's begin.
    """

    order: Tensor
    cell: Tensor
    offset: Tensor

    def to(self, device: torch.device | str) -> PointsByPixel:
        """Move every tensor."""
        return PointsByPixel(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class BatchedPoints:
    """Frustum points of a batch, sorted by cell, for one embedding bag over the whole batch.

    pixel: (P,) int32 rows of the context (B * N * h * w, C).
    depth: (P,) int32 entries of the depth probabilities (B * N * D * h * w).
    weight: (P,) float32, 0 for padding; the last entry is padding, so that no bag begins at P.
    offset: (B * Z * Y * X,) int32, where each cell's entries begin; Z is 1 without a volume.
    ray: (B, N, K, h, w) float32, `SplatFamily.calibration` of every sample.
    by_pixel: makes training faster and changes nothing else; exported graphs do without.
    """

    pixel: Tensor
    depth: Tensor
    weight: Tensor
    offset: Tensor
    ray: Tensor
    by_pixel: PointsByPixel | None = None

    def to(self, device: torch.device | str) -> BatchedPoints:
        """Move every tensor."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in moved.items() if part is not None})


def batch_geometry(
    intrinsic: ArrayLike,
    cam2ego: ArrayLike,
    config: SplatModel,
    augmentations: Sequence[Augmentation | None] | None = None,
) -> BatchedPoints:
    """Place the frusta of a batch in the BEV.

    intrinsic: (B, N, 3, 3) of network-size images. cam2ego: (B, N, 4, 4). Augmentation folded in.
    """
    size = (config.image.width, config.image.height)
    cam2frame = to_bev_frame(cam2ego, config.bev)
    samples = list(zip(np.asarray(intrinsic), cam2frame, strict=True))
    points = [place_frusta(k, pose, size, config.lift, config.bev) for k, pose in samples]
    family = family_of(config)
    assert isinstance(family, SplatFamily)
    changes = augmentations or [None] * len(samples)
    rays = np.stack([family.calibration(config, *rig, change) for rig, change in zip(samples, changes, strict=True)])
    return batch_points(points, rays, config)


def batch_points(points: Sequence[LiftPoints], rays: np.ndarray, config: SplatModel) -> BatchedPoints:
    """Join the points of B samples; rays: (B, N, K, h, w) of `SplatFamily.calibration`."""
    stride, cells = config.lift.stride, config.bev.size * config.lift.height_bins
    pixels = rays.shape[1] * (config.image.height // stride) * (config.image.width // stride)
    pixel = np.concatenate([p.pixel + i * pixels for i, p in enumerate(points)])
    depth = [p.depth + i * pixels * config.lift.depth.bins for i, p in enumerate(points)]
    cell = np.concatenate([p.cell + i * cells for i, p in enumerate(points)])
    offset = find_begins(cell, len(points) * cells)
    weight = np.ones(len(cell) + 1, np.float32)
    weight[-1] = 0
    dummy = np.zeros(1, np.int32)
    return BatchedPoints(
        torch.from_numpy(np.concatenate([pixel, dummy])),
        torch.from_numpy(np.concatenate([*depth, dummy])),
        torch.from_numpy(weight),
        torch.from_numpy(offset),
        torch.from_numpy(rays),
        _by_pixel(pixel, cell, len(points) * pixels),
    )


def _by_pixel(pixel: np.ndarray, cell: np.ndarray, pixels: int) -> PointsByPixel:
    _, order = sort_stably(pixel, pixels)
    parts = (order, cell[order], find_begins(pixel, pixels))
    return PointsByPixel(*(torch.from_numpy(part.astype(np.int32)) for part in parts))


def splat(context: Tensor, depth: Tensor, points: BatchedPoints) -> Tensor:
    """Sum depth-weighted features into cells without ever forming the lifted volume.

    context: (R, C) feature rows. depth: (S,) probabilities.
    Returns: (B * Y * X, C).
    """
    weights = depth.index_select(0, points.depth) * points.weight
    if points.by_pixel is None or not (torch.is_grad_enabled() and context.requires_grad):
        return _bags(context, points.pixel, points.offset, weights)
    cells = _bags(context.detach(), points.pixel, points.offset, weights)
    joined: Tensor = _ContextGradient.apply(cells, context, weights.detach(), points.by_pixel)
    return joined


def _bags(rows: Tensor, index: Tensor, offset: Tensor, weights: Tensor) -> Tensor:
    return functional.embedding_bag(index, rows, offset, mode="sum", per_sample_weights=weights)


class _ContextGradient(torch.autograd.Function):
    """Passes cells on; backward also hands each pixel the weighted gradients of its cells.

    torch's own backward of an embedding bag sorts the points anew every time.
    """

    @staticmethod
    def forward(ctx: Any, cells: Tensor, context: Tensor, weights: Tensor, by_pixel: PointsByPixel) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.by_pixel = by_pixel
        return cells.view_as(cells)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        table: PointsByPixel = ctx.by_pixel
        weights = weights.index_select(0, table.order)
        return gradient, _bags(gradient.contiguous(), table.cell, table.offset, weights), None, None


def splat_by_gather(context: Tensor, depth: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Do what `splat` does by gathers alone, for runtimes without an embedding bag.

    tables: those of `gather_tables` in its order. Returns: (Y * X, C).
    """
    pixel, depth_index, weight, *later = tables
    weights = _rows(depth, depth_index) * weight  # (rows1, 8)
    return _add_stages(_rows(context, pixel) * weights[..., None], later)


def splat_volume_by_gather(volume: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Splat the rows of a lifted volume (S, C) as they are; tables and result as of `splat_by_gather`."""
    _, depth_index, weight, *later = tables
    return _add_stages(_rows(volume, depth_index) * weight[..., None], later)


def _add_stages(rows: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Add up weighted rows (rows1, 8, C) stage by stage and take each cell's sum."""
    *stages, cell = tables
    sums = rows.sum(1)  # (rows1, C)
    assert len(stages) == GATHER_STAGES - 1
    for stage in stages:
        sums = _rows(sums, stage).sum(1)
    return sums.index_select(0, cell)


def _rows(array: Tensor, index: Tensor) -> Tensor:
    """Return array[index]; written so that it exports as a plain Gather."""
    return array.index_select(0, index.flatten()).unflatten(0, index.shape)


class Splatter(nn.Module):
    """What every Lift-Splat view transform shares; a subclass brings `predict_depth`."""

    def __init__(self, lift: LiftConfig, bev_shape: tuple[int, int]) -> None:
        """bev_shape: cells along x and y."""
        super().__init__()
        self.bins, self.channels = lift.depth.bins, lift.channels
        self._bev_shape, self._heights = bev_shape, lift.height_bins

    @property
    def makes_volume(self) -> bool:
        """Whether cells lie above each other."""
        return self._heights > 1

    def predict_depth(self, features: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
        """Return depth logits (M, D, h, w) and context (M, C, h, w) of M = B * N images.

        ray: (M, K, h, w), or (M, K, 1, 1): what calibration says of each camera.
        """
        raise NotImplementedError

    def rows(self, depth_logits: Tensor, context: Tensor, camera_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of the splat in float32: context rows (R, C) and depth (S,).

        camera_valid: (M,); a camera that is missing adds nothing anywhere.
        """
        depth = at_least_float32(depth_logits).softmax(1) * camera_valid.view(-1, 1, 1, 1)
        return at_least_float32(context).permute(0, 2, 3, 1).reshape(-1, self.channels), depth.flatten()

    def to_bev(self, cells: Tensor) -> Tensor:
        """Turn (B * Z * Y * X, C) into (B, C, Y, X), or (B, C, Z, Y, X) of a volume."""
        x, y = self._bev_shape
        if self._heights > 1:
            return cells.view(-1, self._heights, y, x, self.channels).permute(0, 4, 1, 2, 3)
        return cells.view(-1, y, x, self.channels).permute(0, 3, 1, 2)

    def forward(self, features: Tensor, camera_valid: Tensor, points: BatchedPoints) -> tuple[Tensor, Tensor]:
        """Lift and splat.

        features: (B * N, C, h, w). camera_valid: (B, N).
        Returns: BEV (B, C, Y, X) and depth logits (B * N, D, h, w).
        """
        logits, context = self.predict_depth(features, points.ray.flatten(0, 1))
        return self.pool(logits, context, camera_valid, points), logits

    def gather(self, logits: Tensor, context: Tensor, camera_valid: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Return the BEV as `pool` does, by the tables of `gather_tables`."""
        return self.to_bev(splat_by_gather(*self.rows(logits, context, camera_valid.flatten()), tables))

    def pool(self, logits: Tensor, context: Tensor, camera_valid: Tensor, points: BatchedPoints) -> Tensor:
        """Return the BEV of depth logits and context."""
        with torch.autocast(context.device.type, enabled=False):
            rows, depth = self.rows(logits, context, camera_valid.flatten())
            return self.to_bev(splat(rows, depth, points))


class LiftSplat(Splatter):
    """Depth distribution and context of every feature cell, splatted into the BEV."""

    def __init__(self, inputs: int, lift: LiftConfig, bev_shape: tuple[int, int]) -> None:
        """bev_shape: cells along x and y."""
        super().__init__(lift, bev_shape)
        self.aware = conv_bn_relu(inputs + RAY_CHANNELS, inputs, 1)
        self.predict = nn.Conv2d(inputs, self.bins + self.channels, 1)

    def predict_depth(self, features: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
        """Return depth logits (M, D, h, w) and context (M, C, h, w) of M = B * N images.

        ray: (M, 4, h, w): the scale of a thing in pixels says its depth only with the focal length.
        """
        both = self.predict(self.aware(torch.cat([features, ray.to(features.dtype)], 1)))
        return both[:, : self.bins], both[:, self.bins :]
