"""Depth nets of the published Lift-Splat networks: image features to depth logits and context.

They differ in what they know of the camera: nothing (BEVDet), a gate (BEVDet's first BEVDepth), or its
parameters through squeeze-and-excitation (BEVDepth, Li et al. 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev_training.models.encoders.deformable_conv import DeformableConv2d
from occbev_training.models.lift_splat.bev_residual_encoder import PlaneBlock

CAMERA_PARAMETERS = 27
"""Values that `occbev.inference.tables.camera_parameters` gives of each camera."""

GATE_PARAMETERS = 33
"""Intrinsics, image rotation and translation, pose: 9 + 9 + 3 + 9 + 3 values of the gated depth net."""

MATCHING_GROUP = 16
"""Channels that the cost volume compares at a time, which bounds its memory."""

UNSEEN_CHANNEL = -4
"""Channel that is zero where a depth hypothesis falls outside the other image, as published."""

UNSEEN_COST = 5.0
"""Added where a depth hypothesis falls outside the other image."""


class PlainDepth(nn.Module):
    """One 1x1 convolution."""

    def __init__(self, inputs: int, bins: int, channels: int) -> None:
        super().__init__()
        self.bins = bins
        self.predict = nn.Conv2d(inputs, bins + channels, 1)

    def forward(self, features: Tensor, camera: Tensor, cost: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return depth logits (M, D, h, w) and context (M, C, h, w); the camera is not looked at."""
        both = self.predict(features)
        return both[:, : self.bins], both[:, self.bins :]


class CameraAwareDepth(nn.Module):
    """Depth and context from features that camera parameters excite, each in its own way."""

    def __init__(
        self,
        inputs: int,
        bins: int,
        channels: int,
        pyramid: int = 96,
        deformable: bool = False,
        stereo: bool = False,
    ) -> None:
        """pyramid: width of the spatial pyramid's branches. stereo: a cost volume joins depth."""
        super().__init__()
        self.bn = nn.BatchNorm1d(CAMERA_PARAMETERS)
        self.reduce_conv = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=1), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        )
        self.context_mlp, self.depth_mlp = _CameraMlp(inputs), _CameraMlp(inputs)
        self.context_se, self.depth_se = _Excitation(inputs), _Excitation(inputs)
        self.context_conv = nn.Conv2d(inputs, channels, 1)
        self.cost_net = _cost_net(bins) if stereo else None
        extra = bins if stereo else 0
        blocks = [PlaneBlock(inputs + extra, inputs, skip_kernel=1 if stereo else 0)]
        blocks += [PlaneBlock(inputs, inputs) for _ in range(2)]
        ending = [DeformableConv2d(inputs, inputs, groups=4, modulated=False)] if deformable else []
        pyramid_net = SpatialPyramid(inputs, pyramid)
        self.depth_conv = nn.Sequential(*blocks, pyramid_net, *ending, nn.Conv2d(inputs, bins, 1))

    def forward(self, features: Tensor, camera: Tensor, cost: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return depth logits (M, D, h, w) and context (M, C, h, w).

        camera: (M, 27) or (M, 27, 1, 1). cost: (M, D, 4 * h, 4 * w), None where there is no past frame.
        """
        camera = self.bn(camera.flatten(1))
        x = self.reduce_conv(features)
        context = self.context_conv(self.context_se(x, self.context_mlp(camera)))
        depth = self.depth_se(x, self.depth_mlp(camera))
        if self.cost_net is not None:
            if cost is None:
                cost = x.new_zeros(len(x), self.cost_net[0].in_channels, *(4 * n for n in x.shape[2:]))
            depth = torch.cat([depth, self.cost_net(cost.detach())], 1)
        return self.depth_conv(depth), context


class GatedDepth(nn.Module):
    """Depth from features that the camera's parameters gate; context from one 1x1 convolution."""

    def __init__(self, inputs: int, bins: int, channels: int, hidden: int = 256) -> None:
        super().__init__()
        self.context = nn.Conv2d(inputs, channels, 1)
        self.reduce = nn.Conv2d(inputs, hidden, 1)
        self.gate = nn.Sequential(nn.BatchNorm1d(GATE_PARAMETERS), nn.Linear(GATE_PARAMETERS, hidden), nn.Sigmoid())
        first = PlaneBlock(hidden, hidden, skip_kernel=3)
        self.blocks = nn.Sequential(first, PlaneBlock(hidden, hidden), PlaneBlock(hidden, hidden))
        self.deform = nn.Sequential(DeformableConv2d(hidden, hidden, bias=True), nn.BatchNorm2d(hidden))
        self.predict = nn.Conv2d(hidden, bins, 1)

    def forward(self, features: Tensor, camera: Tensor, cost: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return depth logits (M, D, h, w) and context (M, C, h, w); camera: (M, 33) or (M, 33, 1, 1)."""
        gate = self.gate(camera.flatten(1))[:, :, None, None]
        depth = self.deform(self.blocks(self.reduce(features) * gate))
        return self.predict(depth), self.context(features)


class SpatialPyramid(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2018): four dilations and the mean of the image."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.aspp1 = _Atrous(channels, width, 1, 1)
        self.aspp2, self.aspp3, self.aspp4 = (_Atrous(channels, width, 3, d) for d in (6, 12, 18))
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.conv1 = nn.Conv2d(5 * width, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Keep (M, C, h, w)."""
        branches = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x)]
        mean = self.global_avg_pool(x).expand(-1, -1, *x.shape[2:])
        joined = self.bn1(self.conv1(torch.cat([*branches, mean], 1)))
        return self.dropout(functional.relu(joined))


class DepthAggregation(nn.Module):
    """Refine the lifted volume over the (column, depth) plane of each image row (BEVDepth, section 3.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce_conv = _conv_norm_relu(channels)
        self.conv = nn.Sequential(*_conv_norm_relu(channels), *_conv_norm_relu(channels))
        self.out_conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, volume: Tensor) -> Tensor:
        """Keep (M, C, D, h, w)."""
        images, _, _, rows, _ = volume.shape
        x = volume.permute(0, 3, 1, 4, 2).flatten(0, 1)  # (M * h, C, w, D)
        x = self.reduce_conv(x)
        x = self.out_conv(x + self.conv(x))
        return x.unflatten(0, (images, rows)).permute(0, 2, 4, 1, 3)


def matching_cost(key: Tensor, past: Tensor, grid: Tensor) -> Tensor:
    """Compare stride-4 features with those of a past frame, for every depth hypothesis.

    key, past: (M, C, h, w), C a multiple of 4. grid: (M, D, h, w, 2), where the hypothesis falls in the
    past image, -1..1 from the first to the last pixel's centre.
    Returns: (M, D, h, w), a softmax over depth; no gradient.
    """
    with torch.no_grad():
        bins, rows = grid.shape[1:3]
        flat, cost, warped = grid.flatten(1, 2), grid.new_zeros(()), key
        for start in range(0, key.shape[1], MATCHING_GROUP):
            group = slice(start, start + MATCHING_GROUP)
            warped = functional.grid_sample(past[:, group], flat, align_corners=True)
            warped = warped.unflatten(2, (bins, rows))  # (M, 16, D, h, w)
            cost = cost + (key[:, group, None] - warped).abs().sum(1)
        cost = cost + UNSEEN_COST * (warped[:, UNSEEN_CHANNEL] == 0)
        return (-cost).softmax(1)


class _CameraMlp(nn.Module):
    """Camera parameters to one value per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(CAMERA_PARAMETERS, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, camera: Tensor) -> Tensor:
        """Turn (M, 27) into (M, C, 1, 1)."""
        return self.fc2(functional.relu(self.fc1(camera)))[:, :, None, None]


class _Excitation(nn.Module):
    """Squeeze and excitation whose squeezed vector is given (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels, 1)
        self.conv_expand = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, squeezed: Tensor) -> Tensor:
        """Scale the channels of x (M, C, h, w)."""
        return x * self.conv_expand(functional.relu(self.conv_reduce(squeezed))).sigmoid()


class _Atrous(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = 0 if kernel == 1 else dilation
        self.atrous_conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.atrous_conv(x)))


def _cost_net(bins: int) -> nn.Sequential:
    """Bring the cost volume from stride 4 to stride 16."""
    layers = [(nn.Conv2d(bins, bins, 3, 2, 1), nn.BatchNorm2d(bins)) for _ in range(2)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def _conv_norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )
