"""Feature pyramid (Lin et al. 2017): every level of a backbone at one width, coarse ones added to fine ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, top-down sums, 3x3 output convolutions, strided ones for further levels."""

    def __init__(self, inputs: Sequence[int], outputs: int, levels: int) -> None:
        """inputs: widths of the backbone's maps, finest first. levels: maps to return."""
        super().__init__()
        if levels < len(inputs):
            raise ValueError(f"{levels} levels of {len(inputs)} maps: a pyramid keeps every map")
        self.lateral = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in inputs)
        self.output = nn.ModuleList(
            nn.Conv2d(outputs, outputs, 3, 1 if level < len(inputs) else 2, padding=1) for level in range(levels)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Turn the backbone's maps (M, C_l, H_l, W_l) into `levels` maps of one width, finest first."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            fine = merged[level - 1]
            coarse = functional.interpolate(merged[level], fine.shape[-2:], mode="nearest")
            merged[level - 1] = fine + coarse
        levels = [output(x) for output, x in zip(self.output, merged, strict=False)]
        for output in self.output[len(maps) :]:
            levels.append(output(levels[-1]))
        return levels
