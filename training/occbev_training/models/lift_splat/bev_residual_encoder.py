"""BEV encoders of the published Lift-Splat networks: residual stages and a neck, in 2D or in 3D.

Interpolation aligns corners, as the published weights expect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev_training.models.encoders.image_necks import DeconvolutionNeck
from occbev_training.models.encoders.resnet import basic_stage


class PlaneBlock(nn.Module):
    """Two 3x3 convolutions beside a skip, which may be a biased convolution without norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, skip_kernel: int = 0) -> None:
        """skip_kernel: 0 = the skip is the identity."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if skip_kernel:
            self.downsample = nn.Conv2d(inputs, outputs, skip_kernel, stride, skip_kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Keep (B, C, Y, X), or divide Y and X by the stride."""
        inner = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(inner + self.downsample(x))


class VolumeBlock(nn.Module):
    """The same in 3D; the skip has a norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, skip_kernel: int = 0) -> None:
        super().__init__()
        self.conv1 = _conv3d_norm(inputs, outputs, stride)
        self.conv2 = _conv3d_norm(outputs, outputs)
        self.downsample: nn.Module = nn.Identity()
        if skip_kernel:
            self.downsample = _conv3d_norm(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Keep (B, C, Z, Y, X), or divide Z, Y and X by the stride."""
        return functional.relu(self.conv2(functional.relu(self.conv1(x))) + self.downsample(x))


class ResidualStages(nn.Module):
    """Stages of blocks; the first block of each has a convolution as its skip."""

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
        block: type[PlaneBlock] | type[VolumeBlock] = PlaneBlock,
    ) -> None:
        super().__init__()
        stages = []
        for width, count, stride in zip(widths, blocks, strides, strict=True):
            rest = [block(width, width) for _ in range(count - 1)]
            stages.append(nn.Sequential(block(inputs, width, stride, skip_kernel=3), *rest))
            inputs = width
        self.layers = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output of every stage."""
        outputs = []
        for stage in self.layers:
            x = stage(x)
            outputs.append(x)
        return outputs


class PlaneNeck(nn.Module):
    """First and last stage joined at the first one's size, then brought to the size of the BEV."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(True),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(True),
        )
        self.up = nn.Sequential(
            nn.Conv2d(hidden, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(True),
            nn.Conv2d(outputs, outputs, 1),
        )

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Turn stage outputs into (B, outputs, *size)."""
        joined = torch.cat([maps[0], _resize(maps[-1], maps[0].shape[2:])], 1)
        return self.up(_resize(self.conv(joined), size))


class PlaneEncoder(nn.Module):
    """BEVDet's BEV encoder: three stages at half, quarter and eighth size, and back."""

    def __init__(self, inputs: int, width: int, hidden: int, outputs: int) -> None:
        """width: of the first stage; it doubles with every stage."""
        super().__init__()
        self.backbone = ResidualStages(inputs, (width, 2 * width, 4 * width), (2, 2, 2), (2, 2, 2))
        self.neck = PlaneNeck(5 * width, hidden, outputs)

    def forward(self, bev: Tensor) -> Tensor:
        """Turn (B, C, Y, X) into (B, outputs, Y, X)."""
        return self.neck(self.backbone(bev), bev.shape[2:])


class VolumeEncoder(nn.Module):
    """BEVDet-Occ's encoder: three 3D stages, the coarse ones resized to the first and joined."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        widths = (channels, 2 * channels, 4 * channels)
        self.backbone = ResidualStages(inputs, widths, (1, 2, 4), (1, 2, 2), VolumeBlock)
        self.neck = nn.Sequential(
            nn.Conv3d(7 * channels, channels, 1, bias=False),
            nn.BatchNorm3d(channels),
            nn.ReLU(True),
        )

    def forward(self, volume: Tensor) -> Tensor:
        """Turn (B, C, Z, Y, X) into (B, channels, Z, Y, X)."""
        maps = self.backbone(volume)
        return self.neck(torch.cat([_resize(m, maps[0].shape[2:]) for m in maps], 1))


class TrunkEncoder(nn.Module):
    """Megvii's BEV encoder: a ResNet-18 without pooling, its input and three stages joined by a neck."""

    def __init__(self, inputs: int, width: int, level: int) -> None:
        """width: of the first stage. level: channels that each of the four levels ends with."""
        super().__init__()
        self.trunk = _Trunk(inputs, width)
        self.neck = DeconvolutionNeck((inputs, width, 2 * width, 4 * width), level, (1, 2, 4, 8))

    def forward(self, bev: Tensor) -> Tensor:
        """Turn (B, C, Y, X), Y and X multiples of 8, into (B, 4 * level, Y, X)."""
        return self.neck([bev, *self.trunk(bev)])


class _Trunk(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = basic_stage(width, width, 2, 1)
        self.layer2 = basic_stage(width, 2 * width, 2, 2)
        self.layer3 = basic_stage(2 * width, 4 * width, 2, 2)

    def forward(self, bev: Tensor) -> list[Tensor]:
        first = self.layer1(functional.relu(self.bn1(self.conv1(bev))))
        second = self.layer2(first)
        return [first, second, self.layer3(second)]


def _conv3d_norm(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm3d(outputs))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return functional.interpolate(x, tuple(size), mode=mode, align_corners=True)
