"""Past BEV features beside those of the key frame (BEVDet4D, Huang & Huang 2022).

Past frames are either lifted straight into the key ego frame, or lifted into their own and warped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev.grid import BevGrid
from occbev.inference.reference_points import warp_table


class TemporalFusion(nn.Module):
    """Refines each frame's BEV on its own and joins them along channels."""

    def __init__(self, align: nn.Module | None, frames: int, newest_first: bool) -> None:
        """align: a `ResidualStages` that keeps the shape, or None."""
        super().__init__()
        self.align, self.frames, self.newest_first = align, frames, newest_first
        self.use_history = True
        """False feeds zeros for the past, as the published recipe does in its first epochs."""

    def refine(self, bev: Tensor) -> Tensor:
        """Return what is kept of one frame, same shape; this is the state of streaming inference."""
        return bev if self.align is None else self.align(bev)[-1]

    def forward(self, key: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Join refined maps (B, C, ..., Y, X), past ones newest first, to (B, frames * C, ..., Y, X).

        Where the past is shorter than needed the key frame stands in for it.
        """
        past = [*past, *[key.detach()] * (self.frames - 1 - len(past))][: self.frames - 1]
        if not self.use_history:
            past = [torch.zeros_like(bev) for bev in past]
        ordered = [key, *past] if self.newest_first else [*reversed(past), key]
        return torch.cat(ordered, 1)


def warp_grid(key2past: Tensor, bev: BevGrid, reference_quirks: bool = False) -> Tensor:
    """Return `warp_table` of every sample, (B, Y, X, 2); key2past: (B, 4, 4)."""
    tables = [warp_table(one, bev, reference_quirks) for one in key2past.cpu().numpy()]
    return torch.from_numpy(np.stack(tables))


def warp_bev(past: Tensor, grid: Tensor) -> Tensor:
    """Bring a past BEV (B, C, Y, X) into the key frame; zero where it has nothing."""
    return functional.grid_sample(past, grid, align_corners=True)
