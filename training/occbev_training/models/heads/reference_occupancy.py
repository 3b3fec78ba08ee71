"""Semantic occupancy heads of FlashOcc (channels to height) and BEVDet-Occ (3D)."""

from __future__ import annotations

from torch import Tensor, nn


class PlaneOccupancy(nn.Module):
    """Every BEV cell's features say the classes of all voxels above it (Yu et al. 2023)."""

    def __init__(self, inputs: int, hidden: int, heights: int, classes: int) -> None:
        super().__init__()
        self.heights, self.classes = heights, classes
        self.reduce = nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1), nn.ReLU(inplace=True))
        self.predict = nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, heights * classes))

    def forward(self, bev: Tensor) -> Tensor:
        """Turn (B, C, Y, X) into voxel logits (B, K, Z, Y, X)."""
        x = self.predict(self.reduce(bev).permute(0, 2, 3, 1))
        x = x.unflatten(-1, (self.heights, self.classes))  # (B, Y, X, Z, K)
        return x.permute(0, 4, 3, 1, 2)


class VolumeOccupancy(nn.Module):
    """A 3D convolution and a perceptron per voxel."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv3d(inputs, inputs, 3, padding=1), nn.ReLU(inplace=True))
        self.predict = nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, classes))

    def forward(self, volume: Tensor) -> Tensor:
        """Turn (B, C, Z, Y, X) into voxel logits (B, K, Z, Y, X)."""
        return self.predict(self.reduce(volume).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
