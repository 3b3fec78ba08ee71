"""Occupancy decoder: BEV features to voxel logits by unfolding channels into heights.

With two classes it is the Occ-BEV decoder of pre-training, with all of them the semantic head.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from occbev.config import OccupancyHeadConfig
from occbev.grid import BevGrid, VoxelGrid
from occbev_training.models.layers import ResidualBlock, conv_bn_relu

SUBPIXEL = 2
"""The plane is decoded at this many voxels per cell along x and y."""


class OccupancyDecoder(nn.Module):
    """Resample the BEV to the voxel grid's plane, unfold heights, refine in 3D, classify voxels."""

    def __init__(
        self,
        inputs: int,
        config: OccupancyHeadConfig,
        bev: BevGrid,
        grid: VoxelGrid,
        classes: int,
    ) -> None:
        super().__init__()
        if grid.shape[0] % SUBPIXEL or grid.shape[1] % SUBPIXEL:
            raise ValueError(
                f"occupancy grid {grid.shape}: x and y must be multiples of {SUBPIXEL}"
            )
        self.classes, self._grid_shape = classes, grid.shape
        self.register_buffer("rows", torch.from_numpy(resampling(bev, grid, 1)), persistent=False)
        self.register_buffer(
            "columns", torch.from_numpy(resampling(bev, grid, 0)), persistent=False
        )
        self.trunk = _Trunk(inputs, config, grid.shape[2])
        self.classifier = nn.Conv3d(config.height_channels, classes * SUBPIXEL**2, 1)

    def forward(self, bev: Tensor) -> Tensor:
        """Turn BEV features (B, C, Y, X) into voxel logits (B, K, Z, Y, X) of the occupancy grid."""
        plane = self.rows @ self.trunk.reduce(bev) @ self.columns.T
        return self._to_voxels(self.classifier(self.trunk(plane)))

    def _to_voxels(self, logits: Tensor) -> Tensor:
        x, y, z = self._grid_shape
        half = (SUBPIXEL, SUBPIXEL, self.classes, z, y // SUBPIXEL, x // SUBPIXEL)
        logits = logits.view(-1, *half)  # (B, 2y, 2x, K, Z, Y / 2, X / 2)
        return logits.permute(0, 3, 4, 5, 1, 6, 2).reshape(-1, self.classes, z, y, x)


class _Trunk(nn.Module):
    """The part that does not depend on the classes, and so is handed on by pre-training."""

    def __init__(self, inputs: int, config: OccupancyHeadConfig, heights: int) -> None:
        super().__init__()
        width = config.height_channels
        self.reduce = conv_bn_relu(inputs, config.channels, 1)
        self.plane = ResidualBlock(config.channels, config.channels)
        self.unfold = nn.Conv2d(config.channels, width * heights, 1)
        self.heights = heights
        self.norm = nn.Sequential(nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.refine = nn.Sequential(
            nn.Conv3d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, plane: Tensor) -> Tensor:
        """Turn the plane (B, C, Y, X) into voxel features (B, F, Z, Y, X)."""
        voxels = self.unfold(self.plane(plane))
        voxels = self.norm(voxels.unflatten(1, (-1, self.heights)))  # (B, F, Z, Y, X)
        return voxels + self.refine(voxels)


def resampling(bev: BevGrid, grid: VoxelGrid, axis: int) -> NDArray[np.float32]:
    """Return the matrix (cells of the coarse voxel plane, BEV cells) that interpolates one axis.

    axis: 0 = x, 1 = y. Linear between the two nearest BEV centres; beyond the border ones, constant.
    """
    pitch = grid.pitch[axis] * SUBPIXEL
    centres = grid.lo[axis] + (np.arange(grid.shape[axis] // SUBPIXEL) + 0.5) * pitch
    count = bev.shape[axis]
    place = np.clip((centres - bev.lo[axis]) / bev.pitch[axis] - 0.5, 0, count - 1)
    distance = np.abs(place[:, None] - np.arange(count))
    return np.clip(1 - distance, 0, None).astype(np.float32)
