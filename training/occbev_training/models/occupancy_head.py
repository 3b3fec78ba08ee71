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

RANKED_AT_ONCE = 10_000
"""Cells whose voxels are ranked at a time: 18 classes of them fit a 3 MB cache."""


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
        self.register_buffer("rows", torch.from_numpy(resampling(bev, grid, 1)), persistent=False)
        self.register_buffer(
            "columns", torch.from_numpy(resampling(bev, grid, 0)), persistent=False
        )
        self.trunk = VoxelTrunk(inputs, config, grid)
        # No bias: the trunk's rectified features can hold a constant, and adding one to millions of
        # logits costs as much as computing them.
        self.classifier = nn.Linear(config.voxel_channels, classes, bias=False)

    def forward(self, bev: Tensor) -> Tensor:
        """Turn BEV features (B, C, Y, X) into voxel logits (B, K, Z, Y, X) of the occupancy grid."""
        return self.logits(self.cells(bev))

    def cells(self, bev: Tensor) -> Tensor:
        """Turn BEV features (B, C, Y, X) into what `logits` and `ranking` take, see `VoxelTrunk.cells`."""
        return self.trunk.cells(self.rows @ self.trunk.reduce(bev) @ self.columns.T)

    def logits(self, cells: Tensor) -> Tensor:
        """Classify every voxel: (B, K, Z, Y, X)."""
        voxels = interleave(cells)
        # A matrix product keeps (B, K, Z, Y, X).
        return (self.classifier.weight @ voxels.flatten(2)).unflatten(2, voxels.shape[2:])

    def ranking(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two likeliest classes of every voxel and their probabilities, the likeliest first.

        Both (B, 2, 2, 2, Z, Y / 2, X / 2): sub-cell along y, sub-cell along x, rank. Classes are uint8.
        All that a decision needs of the logits of 18 classes, in a seventh of their size, and never all of them at once.
        """
        features = cells.unflatten(1, (SUBPIXEL**2, -1)).flatten(3)  # (B, 4, F, Z * Y / 2 * X / 2)
        labels, shares = [], []
        for part in features.split(RANKED_AT_ONCE, 3):
            share, label = torch.softmax(self.classifier.weight @ part, 2).topk(2, 2)
            labels.append(label.to(torch.uint8))
            shares.append(share)
        shape = (len(cells), SUBPIXEL, SUBPIXEL, 2, *cells.shape[2:])
        return torch.cat(labels, 3).reshape(shape), torch.cat(shares, 3).reshape(shape)


class VoxelTrunk(nn.Module):
    """The part that does not depend on the classes, and so is handed on by pre-training."""

    def __init__(self, inputs: int, config: OccupancyHeadConfig, grid: VoxelGrid) -> None:
        super().__init__()
        width, self._heights = config.height_channels, grid.shape[2]
        self.reduce = conv_bn_relu(inputs, config.channels, 1)
        self.plane = ResidualBlock(config.channels, config.channels)
        self.unfold = conv_bn_relu(config.channels, width * self._heights, 1)
        # The plane has seen its surroundings along x and y, so that 3D refinement is along z: a 2D
        # convolution over (Z, Y * X), which runtimes know better than a 3D one.
        self.refine = nn.Sequential(
            nn.Conv2d(width, width, (3, 1), padding=(1, 0), bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.subpixel = nn.Sequential(
            nn.Conv2d(width, config.voxel_channels * SUBPIXEL**2, 1), nn.ReLU(inplace=True)
        )
        start_alike(self.subpixel[0])

    def forward(self, plane: Tensor) -> Tensor:
        """Turn the plane (B, C, Y / 2, X / 2) into voxel features (B, F, Z, Y, X)."""
        return interleave(self.cells(plane))

    def cells(self, plane: Tensor) -> Tensor:
        """The same before sub-cells are put in their places: (B, 2 * 2 * F, Z, Y / 2, X / 2), sub-cells slowest."""
        voxels = self.unfold(self.plane(plane)).flatten(2)
        voxels = voxels.unflatten(1, (-1, self._heights))  # (B, F, Z, Y / 2 * X / 2)
        return self.subpixel(voxels + self.refine(voxels)).unflatten(3, plane.shape[2:])


def start_alike(unfold: nn.Conv2d) -> None:
    """Give all sub-cells of a cell one start, ICNR (Aitken et al. 2017), at which no feature is dead.

    Weights of zero mean: the inputs are rectified, so that a mean alone could switch a feature off.
    """
    with torch.no_grad():
        one = unfold.weight[: len(unfold.weight) // SUBPIXEL**2]
        one = one - one.mean(1, keepdim=True)
        unfold.weight.copy_(
            one.repeat(SUBPIXEL**2, 1, 1, 1)
        )  # sub-cells slowest, as in `interleave`
        unfold.bias.fill_(0.1)


def interleave(voxels: Tensor) -> Tensor:
    """Turn (B, 2 * 2 * F, Z, Y, X), sub-cells slowest, into (B, F, Z, 2 * Y, 2 * X)."""
    z, y, x = voxels.shape[2:]
    parts = voxels.view(-1, SUBPIXEL, SUBPIXEL, voxels.shape[1] // SUBPIXEL**2, z, y, x)
    parts = parts.permute(0, 3, 4, 5, 1, 6, 2)  # (B, F, Z, Y, 2, X, 2)
    return parts.reshape(-1, parts.shape[1], z, y * SUBPIXEL, x * SUBPIXEL)


def volume_of_ranks(ranked: Tensor) -> Tensor:
    """Turn what `OccupancyDecoder.ranking` returns, (B, 2, 2, R, Z, Y, X), into (B, R, Z * 2 * Y * 2 * X)."""
    return interleave(ranked.flatten(1, 3)).flatten(2)


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
