"""The network of the experiment: a small Lift-Splat of the product's parts that trains in minutes.

Only the image encoder is different: it has stride 8 and takes images of 96x48; the product's has stride 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from occbev.config import (
    BevEncoderConfig,
    ConfigError,
    DepthConfig,
    DetectionHeadConfig,
    ImageConfig,
    LiftConfig,
    OccupancyHeadConfig,
)
from occbev.grid import VoxelGrid
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev_training.models.families.lift_splat import HEADS
from occbev_training.models.heads.record import Head, build_heads
from occbev_training.models.layers import ResidualBlock, conv_bn_relu
from occbev_training.models.lift_splat.bev_encoder import BevEncoder
from occbev_training.models.lift_splat.lift_splat import LiftSplat
from occbev_training.models.network import OccBevNetwork

CLASSES = ("car", "truck", "pedestrian", "traffic_cone")
"""Detection classes; `truck` stands for all large vehicles."""

GRID = VoxelGrid((-24.0, -24.0, -1.0), (1.5, 1.5, 0.75), (32, 32, 8))
"""Voxels of phase 1; their ground plane is the BEV of both phases."""

WIDTHS = (16, 24, 32)
"""Channels of the image encoder at stride 2, 4 and 8."""


@dataclass(frozen=True)
class SmallImage(ImageConfig):
    """Image settings whose sides must be multiples of 8 only."""

    width: int = 96
    height: int = 48

    def __post_init__(self) -> None:
        if self.width % 8 or self.height % 8 or min(self.width, self.height) <= 0:
            raise ConfigError(f"image size {self.width}x{self.height}: both must be positive multiples of 8")


MODEL = LiftSplatModel(
    name="slim-lift-splat",
    image=SmallImage(),
    bev=GRID.bev,
    grid=GRID,
    lift=LiftConfig(
        stride=8, channels=16, depth=DepthConfig(1.5, 34.0, 1.625, "log"), z_range=(-1.0, 5.0), height_bins=2
    ),
    bev_encoder=BevEncoderConfig((32, 48), (1, 1), 32),
    occupancy=OccupancyHeadConfig(24, 8, 16),
    detection=DetectionHeadConfig(24),
    detection_classes=CLASSES,
)
"""Configuration of the network."""


class SlimEncoder(nn.Module):
    """Residual blocks down to stride 8."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.blocks = nn.Sequential(
            conv_bn_relu(3, first, 3, 2),
            ResidualBlock(first, second, 2),
            ResidualBlock(second, third, 2),
            ResidualBlock(third, third),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B * N, 3, H, W) normalised images into (B * N, C, H / 8, W / 8)."""
        features: Tensor = self.blocks(images)
        return features


class BandedBevEncoder(nn.Module):
    """The product's BEV encoder over height bands laid side by side as channels."""

    def __init__(self, model: LiftSplatModel) -> None:
        super().__init__()
        self.encoder = BevEncoder(model.lift.channels * model.lift.height_bins, model.bev_encoder, model.bev)

    def forward(self, bev: Tensor) -> Tensor:
        """Turn (B, C, Z, Y, X) into (B, out_channels, Y, X)."""
        encoded: Tensor = self.encoder(bev.flatten(1, 2))
        return encoded


class ConstantDepth(LiftSplat):
    """A view transform that spreads every pixel evenly over all depths: what a network can do without depth."""

    def predict_depth(self, features: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
        """Return depth logits of zero (M, D, h, w) and context (M, C, h, w)."""
        logits, context = super().predict_depth(features, ray)
        return torch.zeros_like(logits), context


def build_slim(stage: str, seed: int, constant_depth: bool = False) -> OccBevNetwork:
    """Build a network with random weights that follow from the seed.

    stage: "pretrain" has the occupancy decoder, "finetune" the detection head.
    """
    torch.manual_seed(seed)
    view = ConstantDepth if constant_depth else LiftSplat
    encoder = SlimEncoder()
    view_transform = view(WIDTHS[-1], MODEL.lift, MODEL.bev.shape)
    trunk = BandedBevEncoder(MODEL)
    heads = build_heads(tuple(head for head in HEADS if _wanted(head, stage)), MODEL, stage)
    return OccBevNetwork(encoder, view_transform, trunk, heads)


def reset_norms(network: nn.Module) -> None:
    """Forget the statistics of batch normalisation, so that no arm keeps those of phase 1."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()


def _wanted(head: Head, stage: str) -> bool:
    return head.stage == stage and head.loss in ("geometry", "centres")
