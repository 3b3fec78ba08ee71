"""BEV encoder: a residual U-shaped network that lets cells see their surroundings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev.config import BevEncoderConfig
from occbev.grid import BevGrid
from occbev_training.models.layers import ResidualBlock, conv_bn_relu


class BevEncoder(nn.Module):
    """Residual stages at falling resolution, then added back up to full resolution."""

    def __init__(self, inputs: int, config: BevEncoderConfig, bev: BevGrid) -> None:
        super().__init__()
        widths = config.channels
        self.norm = nn.BatchNorm2d(inputs)  # sums of few or many points: bring them to one scale
        self.place = PlaceEmbedding(inputs, bev) if config.knows_place else None
        befores = (inputs, *widths[:-1])
        self.down = nn.ModuleList(
            _stage(before, width, blocks, 1 if i == 0 else 2)
            for i, (before, width, blocks) in enumerate(zip(befores, widths, config.blocks, strict=True))
        )
        self.lateral = nn.ModuleList(
            nn.Conv2d(below, width, 1) for width, below in zip(widths, widths[1:], strict=False)
        )
        afters = (config.out_channels, *widths[1:-1])
        self.fuse = nn.ModuleList(
            conv_bn_relu(width, after, 3) for width, after in zip(widths[:-1], afters, strict=True)
        )

    def forward(self, bev: Tensor) -> Tensor:
        """Turn (B, C, Y, X) into (B, out_channels, Y, X)."""
        x, levels = self.norm(bev), []
        if self.place is not None:
            x = x + self.place()
        for stage in self.down:
            x = stage(x)
            levels.append(x)
        for level in reversed(range(len(self.fuse))):
            skip = levels[level]
            coarse = functional.interpolate(self.lateral[level](x), size=skip.shape[-2:], mode="bilinear")
            x = self.fuse[level](skip + coarse)
        return x


class PlaceEmbedding(nn.Module):
    """Says where each cell is: a learned mix of its direction from the vehicle and its distance.

    It begins at zero, so that weights which were trained without it keep their answers. Graphs hold it as a constant.
    """

    place: Tensor

    def __init__(self, channels: int, bev: BevGrid) -> None:
        super().__init__()
        x, y = (lo + (np.arange(n) + 0.5) * pitch for lo, n, pitch in zip(bev.lo, bev.shape, bev.pitch, strict=True))
        x, y = np.meshgrid(x, y)  # (Y, X)
        distance = np.maximum(np.hypot(x, y), 1e-6)
        maps = np.stack([x / distance, y / distance, distance / distance.max()]).astype(np.float32)
        self.register_buffer("place", torch.from_numpy(maps), persistent=False)
        self.weight = nn.Parameter(torch.zeros(channels, len(maps), 1, 1))

    def forward(self) -> Tensor:
        """Return (C, Y, X), which is added to the features of a BEV."""
        parts = [self.weight[:, i] * self.place[i] for i in range(len(self.place))]
        return torch.stack(parts).sum(0)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [ResidualBlock(outputs, outputs) for _ in range(blocks - 1)]
    return nn.Sequential(ResidualBlock(inputs, outputs, stride), *rest)
