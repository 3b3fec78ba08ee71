"""Deformable 3x3 convolution, with or without modulation (Dai et al. 2017, Zhu et al. 2019).

Weight names are those of published checkpoints: `weight`, `conv_offset.weight`, `conv_offset.bias`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

_TAPS = 9


class DeformableConv2d(nn.Module):
    """A 3x3 convolution whose nine taps each move by a predicted offset."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        groups: int = 1,
        modulated: bool = True,
        bias: bool = False,
    ) -> None:
        """modulated: version 2, which also weights every tap by a sigmoid."""
        super().__init__()
        self.stride, self.groups, self.modulated = stride, groups, modulated
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        channels = _TAPS * (3 if modulated else 2)
        self.conv_offset = nn.Conv2d(inputs, channels, 3, stride, padding=1)
        nn.init.zeros_(self.conv_offset.weight)  # begin as a plain convolution
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Keep (B, C, Y, X), or divide Y and X by the stride; offsets are y, x of each tap."""
        predicted = self.conv_offset(x)
        mask = predicted[:, 2 * _TAPS :].sigmoid() if self.modulated else None
        return deform_conv2d(
            x, predicted[:, : 2 * _TAPS], self.weight, self.bias, self.stride, 1, mask=mask
        )
