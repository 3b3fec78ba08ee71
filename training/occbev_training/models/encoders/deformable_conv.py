"""Deformable 3x3 convolution, with or without modulation (Dai et al. 2017, Zhu et al. 2019).

Weight names are those of published checkpoints: `weight`, `conv_offset.weight`, `conv_offset.bias`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
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
        self.plain = False
        self.stride, self.groups, self.modulated = stride, groups, modulated
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        channels = _TAPS * (3 if modulated else 2)
        self.conv_offset = nn.Conv2d(inputs, channels, 3, stride, padding=1)
        nn.init.zeros_(self.conv_offset.weight)  # begin as a plain convolution
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Keep (B, C, Y, X), or divide Y and X by the stride; offsets are y, x of each tap."""
        predicted = self.conv_offset(x)
        mask = predicted[:, 2 * _TAPS :].sigmoid() if self.modulated else None
        offset = predicted[:, : 2 * _TAPS]
        if self.plain:
            return self._by_grid_sample(x, offset, mask)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, 1, mask=mask)

    def _by_grid_sample(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        """Do the same with operators that every runtime has: read nine maps, then convolve 1x1."""
        rows, columns = offset.shape[2:]
        down, across = offset.unflatten(1, (_TAPS, 2)).unbind(2)  # (B, 9, h, w)
        tap = torch.arange(_TAPS, device=x.device).view(_TAPS, 1, 1)
        y = torch.arange(rows, device=x.device).view(-1, 1) * self.stride + tap // 3 - 1 + down
        u = torch.arange(columns, device=x.device) * self.stride + tap % 3 - 1 + across
        size = x.shape[2:]
        grid = torch.stack([u * (2 / max(size[1] - 1, 1)) - 1, y * (2 / max(size[0] - 1, 1)) - 1], -1)
        read = functional.grid_sample(x, grid.flatten(1, 2), align_corners=True)
        read = read.unflatten(2, (_TAPS, rows))  # (B, C, 9, h, w)
        if mask is not None:
            read = read * mask[:, None]
        weight = self.weight.flatten(1)[:, :, None, None]
        return functional.conv2d(read.flatten(1, 2), weight, self.bias, groups=self.groups)


@contextmanager
def plain_operators(network: nn.Module) -> Iterator[None]:
    """Within, deformable convolutions use grid sampling: slower, but it exports everywhere."""
    layers = [m for m in network.modules() if isinstance(m, DeformableConv2d)]
    for layer in layers:
        layer.plain = True
    try:
        yield
    finally:
        for layer in layers:
            layer.plain = False
