"""Occ-BEV's 3D decoder (Min et al. 2023): BEV channels unfolded into heights, two 3D convolutions, a classifier.

With two classes it reconstructs in pre-training, with all of them it is BEVFormer-Occ's head.
"""

from __future__ import annotations

from torch import Tensor, nn

from occbev_training.models.layers import start_transformer

WIDTH = 32
HIDDEN = 64


class VoxelDecoder(nn.Module):
    """BEV features to voxel logits, one voxel column per cell."""

    def __init__(self, channels: int, heights: int, classes: int) -> None:
        """channels: of the BEV, heights times the features of a voxel."""
        super().__init__()
        if channels % heights:
            raise ValueError(f"{channels} BEV channels do not unfold into {heights} heights")
        self._heights = heights
        self.blocks = nn.Sequential(_Block(channels // heights, WIDTH), _Block(WIDTH, WIDTH))
        self.predict = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, classes))
        start_transformer(self)

    def forward(self, bev: Tensor) -> Tensor:
        """Turn (B, C, Y, X) into logits (B, K, Z, Y, X); the height is the fast part of the channel."""
        voxels = self.blocks(bev.unflatten(1, (-1, self._heights)))
        logits: Tensor = self.predict(voxels.movedim(1, -1))
        return logits.movedim(-1, 1)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm3d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, voxels: Tensor) -> Tensor:
        result: Tensor = self.relu(self.bn(self.conv(voxels)))
        return result
