"""DETR3D (Wang et al. 2021): object queries read the cameras where their reference points project to.

It has no BEV; for pre-training fixed points on the pillars of a grid read the cameras in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev.grid import BevGrid
from occbev.inference.reference_points import NEAREST, pillar_points
from occbev_training.models.heads.query_head import inverse_sigmoid
from occbev_training.models.queries.deformable_attention import start_projections

PILLAR_HEIGHTS = 4
"""Points on each pillar in pre-training."""


@dataclass(frozen=True)
class CameraViews:
    """What calibration says to a DETR3D: frame2img and cameras of `CameraScene`."""

    frame2img: Tensor
    cameras: Tensor

    def to(self, device: torch.device | str) -> CameraViews:
        """Move both."""
        return CameraViews(self.frame2img.to(device), self.cameras.to(device))


@dataclass(frozen=True)
class CameraScene:
    """Feature maps of the cameras and how points get there.

    maps: levels of (B * N, C, H_l, W_l). frame2img: (B, N, 4, 4), to x and y in 0..1 of the image times
    depth, and depth. camera_valid: (B, N). cameras: (B, N), whose weights each camera takes.
    """

    maps: Sequence[Tensor]
    frame2img: Tensor
    camera_valid: Tensor
    cameras: Tensor

    def __len__(self) -> int:
        return len(self.camera_valid)


class CameraSampling(nn.Module):
    """Reads every level of every camera at the reference point of each query."""

    lo: Tensor
    span: Tensor

    def __init__(
        self,
        channels: int,
        cameras: int,
        levels: int,
        extent: tuple[Sequence[float], Sequence[float]],
        dropout: float = 0.0,
    ) -> None:
        """extent: lower and upper corner (x, y, z) of the volume that references span."""
        super().__init__()
        lo, hi = torch.tensor(extent, dtype=torch.float32)
        self.register_buffer("lo", lo, persistent=False)
        self.register_buffer("span", hi - lo, persistent=False)
        self.levels, self.cameras = levels, cameras
        self.attention_weights = nn.Linear(channels, cameras * levels)
        self.output_proj = nn.Linear(channels, channels)
        self.position_encoder = nn.Sequential(
            nn.Linear(3, channels),
            nn.LayerNorm(channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, channels),
            nn.LayerNorm(channels),
            nn.ReLU(inplace=True),
        )
        self.dropout = nn.Dropout(dropout)
        self.reset()

    def reset(self) -> None:
        """Begin with equal trust in every camera and level."""
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        start_projections(self.output_proj)

    def forward(self, query: Tensor, position: Tensor, reference: Tensor, scene: CameraScene) -> Tensor:
        """Return (B, Q, C) of query and position (B, Q, C) and reference (B, Q, 3) in 0..1."""
        place, visible = project(reference * self.span + self.lo, scene)  # (B, N, Q, 2), (B, N, Q)
        weights = self.attention_weights(query + position).sigmoid()
        weights = weights.unflatten(-1, (self.cameras, self.levels)).transpose(1, 2)  # (B, cameras, Q, levels)
        own = [each.index_select(0, chosen) for each, chosen in zip(weights, scene.cameras, strict=True)]
        weights = torch.stack(own) * visible[..., None]  # (B, N, Q, levels)
        sampled = torch.stack([read(level, place) for level in scene.maps], -1)
        # (B, N, C, Q, levels)
        total = (sampled * weights[:, :, None]).sum((1, 4)).transpose(1, 2)
        encoded = self.position_encoder(inverse_sigmoid(reference))
        return self.dropout(self.output_proj(total)) + query + encoded


class PillarSampling(nn.Module):
    """Mean of what the cameras show at points on the pillars of a BEV grid: a BEV for the occupancy decoder."""

    points: Tensor

    def __init__(self, channels: int, bev: BevGrid, z_range: tuple[float, float]) -> None:
        """channels: of the maps and of the BEV, which holds a share of them for each height."""
        super().__init__()
        points = pillar_points(bev, z_range, PILLAR_HEIGHTS).transpose(1, 0, 2).reshape(1, -1, 3)
        self.register_buffer("points", torch.from_numpy(points).float(), persistent=False)
        self._plane = (PILLAR_HEIGHTS, *bev.shape[::-1])
        self.reduce = nn.Conv2d(channels, channels // PILLAR_HEIGHTS, 1)
        self.mix = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, scene: CameraScene) -> Tensor:
        """Return (B, C, Y, X)."""
        place, visible = project(self.points, scene)  # (B, N, D * Y * X, 2)
        shown = sum(read(self.reduce(level), place) for level in scene.maps)
        total = (shown * visible[:, :, None]).sum(1)  # (B, C / D, D * Y * X)
        mean = total / visible.sum(1).clamp(min=1)[:, None]
        bev: Tensor = self.mix(mean.unflatten(2, self._plane).flatten(1, 2))
        return bev


def project(points: Tensor, scene: CameraScene) -> tuple[Tensor, Tensor]:
    """Return where points (B or 1, Q, 3) in metres appear in 0..1 of each image, and whether a living camera sees them.

    Returns: (B, N, Q, 2) and (B, N, Q).
    """
    rotation, translation = scene.frame2img[..., :3, :3], scene.frame2img[..., :3, 3]
    rays = points[:, None] @ rotation.transpose(2, 3) + translation[:, :, None]
    depth = rays[..., 2:]
    place = rays[..., :2] / depth.clamp(min=NEAREST)
    inside = ((place > 0) & (place < 1)).all(-1) & (depth[..., 0] > NEAREST)
    # Outside the image nothing counts; a bounded place keeps every runtime's arithmetic finite.
    return place.clamp(-1, 2), inside * scene.camera_valid[..., None]


def read(level: Tensor, place: Tensor) -> Tensor:
    """Sample a map (B * N, C, H, W) at places (B, N, Q, 2) in 0..1; returns (B, N, C, Q)."""
    grid = (2 * place - 1).flatten(0, 1)[:, :, None]
    shown = functional.grid_sample(level, grid, align_corners=False)
    return shown[..., 0].unflatten(0, place.shape[:2])
