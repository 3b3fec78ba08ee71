"""Blocks that view transforms, BEV encoders and heads share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64, which exports are judged by."""
    return x if x.dtype == torch.float64 else x.float()


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a 2D convolution that keeps the size (at stride 1), batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_bn_relu(inputs, outputs, 3, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Keep (B, C, Y, X), or divide Y and X by the stride."""
        return self.relu(self.second(self.first(x)) + self.skip(x))


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between, beside a skip."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(channels, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, channels),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keep (..., C)."""
        added: Tensor = super().forward(x)
        return x + added


def start_transformer(*parts: nn.Module) -> None:
    """Give every matrix Xavier-uniform weights, as published; parts with a `reset` of their own then begin by that."""
    for part in parts:
        for weight in part.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)
        for module in part.modules():
            reset = getattr(module, "reset", None)
            if callable(reset):
                reset()
