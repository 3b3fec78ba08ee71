"""Stereo over time (BEVDet-Occ 4D, after Li et al. 2022, BEVStereo): what a pixel was in the frame before.

Every depth hypothesis of a pixel is a place in the image before; how well the features agree there is evidence of depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from occbev.config import LiftConfig
from occbev.inference.families.bevdet import MATCHING_STRIDE
from occbev.inference.tables import bin_depths, feature_pixels

NEAREST = 1e-3
"""Depth in metres from which a point counts as before a camera."""

OUTSIDE = -2.0
"""Grid coordinate of what is behind a camera: far outside the image."""


@dataclass(frozen=True)
class Matching:
    """Where the cameras of a batch saw things in the frame before.

    known: (B,), 0 where there was none. img2past: (B, N, 3, 4), see `occbev.inference.tables.image_to_past`.
    """

    known: Tensor
    img2past: Tensor

    def to(self, device: torch.device) -> Matching:
        """Move every tensor."""
        return Matching(self.known.to(device), self.img2past.to(device))


class MatchingGrid(nn.Module):
    """Turns matrices into the places where every depth hypothesis of every cell falls in the image before."""

    pixels: Tensor
    depths: Tensor
    last: Tensor

    def __init__(self, image_size: tuple[int, int], lift: LiftConfig) -> None:
        """image_size: (width, height) of the network's input."""
        super().__init__()
        pixels = feature_pixels(image_size, replace(lift, stride=MATCHING_STRIDE))  # (h * w, 3)
        width, height = image_size
        self.shape = (lift.depth.bins, height // MATCHING_STRIDE, width // MATCHING_STRIDE)
        self.register_buffer("pixels", torch.from_numpy(pixels).float().T, persistent=False)  # (3, h * w)
        depths = torch.from_numpy(bin_depths(lift)).float()
        self.register_buffer("depths", depths[:, None, None], persistent=False)  # (D, 1, 1)
        self.register_buffer("last", torch.tensor([width - 1.0, height - 1.0])[:, None], persistent=False)

    def forward(self, img2past: Tensor) -> Tensor:
        """Turn (M, 3, 4) into (M, D, h, w, 2), -1..1 from the first to the last pixel's centre."""
        rays = img2past[:, :, :3] @ self.pixels  # (M, 3, h * w) per metre of depth
        places = rays[:, None] * self.depths + img2past[:, None, :, 3:]  # (M, D, 3, h * w)
        depth = places[:, :, 2:]
        grid = places[:, :, :2] / depth.clamp(min=NEAREST) / self.last * 2 - 1
        grid = torch.where(depth < NEAREST, torch.full_like(grid, OUTSIDE), grid)
        return grid.transpose(2, 3).unflatten(2, self.shape[1:])


def join_matchings(known: Sequence[bool], img2past: Sequence[Tensor]) -> Matching:
    """Join what is known of B samples; img2past: (N, 3, 4) of each."""
    return Matching(torch.tensor([float(one) for one in known]), torch.stack(list(img2past)))
