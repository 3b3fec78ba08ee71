"""DETR3D (Wang et al. 2021): object queries read the cameras where their reference points project to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev.inference.reference_points import NEAREST
from occbev_training.models.deformable_attention import start_projections
from occbev_training.models.query_head import inverse_sigmoid


@dataclass(frozen=True)
class CameraScene:
    """Feature maps of the cameras and how points get there.

    maps: levels of (B * N, C, H_l, W_l). frame2img: (B, N, 4, 4), to x and y in 0..1 of the image times
    depth, and depth. camera_valid: (B, N).
    """

    maps: Sequence[Tensor]
    frame2img: Tensor
    camera_valid: Tensor


class CameraSampling(nn.Module):
    """Reads every level of every camera at the reference point of each query."""

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
            nn.Linear(3, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True),
            nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        start_projections(self.output_proj)

    def forward(
        self, query: Tensor, position: Tensor, reference: Tensor, scene: CameraScene
    ) -> Tensor:
        """Return (B, Q, C) of query and position (B, Q, C) and reference (B, Q, 3) in 0..1."""
        place, visible = self._project(reference, scene)  # (B, N, Q, 2), (B, N, Q)
        weights = self.attention_weights(query + position).sigmoid()
        weights = weights.unflatten(-1, (self.cameras, self.levels))[:, :, : place.shape[1]]
        weights = weights.permute(0, 2, 1, 3) * visible[..., None]  # (B, N, Q, levels)
        grid = (2 * place - 1).flatten(0, 1)[:, :, None]  # (B * N, Q, 1, 2)
        read = [functional.grid_sample(m, grid, align_corners=False) for m in scene.maps]
        sampled = torch.cat(read, -1).unflatten(0, place.shape[:2])  # (B, N, C, Q, levels)
        total = (sampled * weights[:, :, None]).sum((1, 4)).transpose(1, 2)
        encoded = self.position_encoder(inverse_sigmoid(reference))
        return self.dropout(self.output_proj(total)) + query + encoded

    def _project(self, reference: Tensor, scene: CameraScene) -> tuple[Tensor, Tensor]:
        points = reference * self.span + self.lo
        rotation, translation = scene.frame2img[..., :3, :3], scene.frame2img[..., :3, 3]
        rays = points[:, None] @ rotation.transpose(2, 3) + translation[:, :, None]
        depth = rays[..., 2:]
        place = rays[..., :2] / depth.clamp(min=NEAREST)
        inside = ((place > 0) & (place < 1)).all(-1) & (depth[..., 0] > NEAREST)
        # Outside the image nothing counts; a bounded place keeps every runtime's arithmetic finite.
        return place.clamp(-1, 2), inside * scene.camera_valid[..., None]
