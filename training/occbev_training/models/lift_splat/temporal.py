"""Past BEV features beside those of the key frame (BEVDet4D, Huang & Huang 2022).

In training past frames are lifted straight into the key ego frame; a graph warps those that it remembers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class TemporalFusion(nn.Module):
    """Refines each frame's BEV on its own and joins them along channels."""

    def __init__(self, align: nn.Module | None, frames: int, newest_first: bool) -> None:
        """align: a `ResidualStages` that keeps the shape, or None."""
        super().__init__()
        self.align, self.frames, self.newest_first = align, frames, newest_first

    def refine(self, bev: Tensor) -> Tensor:
        """Return what is kept of one frame, same shape; this is the state of streaming inference."""
        return bev if self.align is None else self.align(bev)[-1]

    def forward(self, key: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Join refined maps (B, C, ..., Y, X), past ones newest first, to (B, frames * C, ..., Y, X).

        Where the past is shorter than needed the key frame stands in for it.
        """
        past = [*past, *[key.detach()] * (self.frames - 1 - len(past))][: self.frames - 1]
        ordered = [key, *past] if self.newest_first else [*reversed(past), key]
        return torch.cat(ordered, 1)


def warp_bev(past: Tensor, grid: Tensor) -> Tensor:
    """Bring a past BEV (B, C, Y, X), or a volume (B, C, Z, Y, X), into the key frame; zero where it has nothing.

    grid: (B, Y, X, 2), `occbev.inference.reference_points.warp_table` of each.
    """
    planes = functional.grid_sample(past.flatten(1, -3), grid, align_corners=True)
    return planes.unflatten(1, past.shape[1:-2])
