"""BEV encoder: a residual U-shaped network that lets cells see their surroundings."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from occbev.config import BevEncoderConfig
from occbev_training.models.layers import ResidualBlock, conv_bn_relu


class BevEncoder(nn.Module):
    """Residual stages at falling resolution, then added back up to full resolution."""

    def __init__(self, inputs: int, config: BevEncoderConfig) -> None:
        super().__init__()
        widths = config.channels
        self.norm = nn.BatchNorm2d(inputs)  # sums of few or many points: bring them to one scale
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
        for stage in self.down:
            x = stage(x)
            levels.append(x)
        for level in reversed(range(len(self.fuse))):
            skip = levels[level]
            coarse = functional.interpolate(self.lateral[level](x), size=skip.shape[-2:], mode="bilinear")
            x = self.fuse[level](skip + coarse)
        return x


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [ResidualBlock(outputs, outputs) for _ in range(blocks - 1)]
    return nn.Sequential(ResidualBlock(inputs, outputs, stride), *rest)
