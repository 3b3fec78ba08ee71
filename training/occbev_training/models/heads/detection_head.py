"""Centre-based detection head (Yin et al. 2021): where objects are, and what box each has."""

from __future__ import annotations

from torch import Tensor, nn

from occbev.config import DetectionHeadConfig
from occbev_training.models.heads.record import Head
from occbev_training.models.layers import conv_bn_relu

CENTRES = Head("detection_head", ("heatmap", "box"), "centres", "boxes")
"""Logits of centres (B, K, Y, X) and a box of every cell (B, 10, Y, X)."""

BOX_CHANNELS = 10
"""x, y offset in cells from the cell's lower corner, z, log l, w, h, sin yaw, cos yaw, vx, vy."""


class DetectionHead(nn.Module):
    """Heat map logits per class and one box per BEV cell."""

    def __init__(self, inputs: int, config: DetectionHeadConfig, classes: int) -> None:
        super().__init__()
        width = config.channels
        self.shared = conv_bn_relu(inputs, width, 3)
        hidden, logits = conv_bn_relu(width, width, 3), nn.Conv2d(width, classes, 1)
        self.heatmap = nn.Sequential(hidden, logits)
        self.box = nn.Sequential(conv_bn_relu(width, width, 3), nn.Conv2d(width, BOX_CHANNELS, 1))
        # Nearly every cell is empty: begin at a probability of 0.1, else they drown the first steps.
        assert logits.bias is not None
        nn.init.constant_(logits.bias, -2.19)

    def forward(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        """Turn (B, C, Y, X) into heat map logits (B, K, Y, X) and boxes (B, 10, Y, X)."""
        shared = self.shared(bev)
        return self.heatmap(shared), self.box(shared)
