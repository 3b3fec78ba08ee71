"""Image necks of the published Lift-Splat networks: ResNet stages to one map at stride 16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev_training.models.encoders.resnet import ResNet


class PyramidNeck(nn.Module):
    """Two levels, each through a 1x1 convolution, the coarse one added to the fine one."""

    def __init__(self, inputs: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in inputs)
        self.smooth = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps of stride 16 and 32 into (M, C, H / 16, W / 16)."""
        fine, coarse = (lateral(x) for lateral, x in zip(self.lateral, maps, strict=True))
        return self.smooth(fine + functional.interpolate(coarse, fine.shape[-2:], mode="nearest"))


class DeconvolutionNeck(nn.Module):
    """Every level resampled by its own strided (transposed) convolution, then concatenated."""

    def __init__(self, inputs: Sequence[int], outputs: int, scales: Sequence[float]) -> None:
        """outputs: channels of each level. scales: 2 doubles the size of a level, 0.5 halves it."""
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                _resample(width, outputs, scale),
                nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
                nn.ReLU(inplace=True),
            )
            for width, scale in zip(inputs, scales, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps of several sizes into one, (M, levels * outputs, H, W)."""
        return torch.cat([level(x) for level, x in zip(self.levels, maps, strict=True)], 1)


class ResNetImageEncoder(nn.Module):
    """A ResNet and a neck."""

    def __init__(self, backbone: ResNet, neck: nn.Module, matching_stage: int | None = None) -> None:
        """matching_stage: a stage whose map is kept aside, for stereo matching."""
        super().__init__()
        self.backbone, self.neck, self.matching_stage = backbone, neck, matching_stage

    def forward(self, images: Tensor) -> Tensor:
        """Turn (M, 3, H, W) normalised images into (M, C, H / 16, W / 16)."""
        return self.with_matching(images)[0]

    def load_imagenet(self, path: Path) -> tuple[str, ...]:
        """Load the backbone's weights, see `ResNet.load_imagenet`."""
        return self.backbone.load_imagenet(path)

    def with_matching(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the features and the map of the matching stage (M, 256, H / 4, W / 4), if there is one."""
        maps = self.backbone(images)
        if self.matching_stage is None:
            return self.neck(maps), None
        place = self.backbone.outputs.index(self.matching_stage)
        return self.neck([m for i, m in enumerate(maps) if i != place]), maps[place]

    def matching(self, images: Tensor) -> Tensor:
        """Return the map of the matching stage alone."""
        maps = self.backbone(images)
        return maps[self.backbone.outputs.index(self.matching_stage)]


def _resample(inputs: int, outputs: int, scale: float) -> nn.Module:
    if scale >= 1:
        return nn.ConvTranspose2d(inputs, outputs, int(scale), int(scale), bias=False)
    stride = round(1 / scale)
    return nn.Conv2d(inputs, outputs, stride, stride, bias=False)
