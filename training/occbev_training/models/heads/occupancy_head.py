"""Occupancy decoder: BEV features to voxel logits by unfolding channels into heights.

Without kinds of occupied voxels it is the Occ-BEV decoder of pre-training, with them the semantic head.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev.config import OccupancyHeadConfig
from occbev.grid import BevGrid, VoxelGrid
from occbev_training.models.heads.record import Head
from occbev_training.models.layers import ResidualBlock, conv_bn_relu

GEOMETRY = Head("occupancy_decoder", ("reconstruction_logits",), "geometry", "voxels", stage="pretrain")
"""Free and occupied: (B, 2, Z, Y, X). The Occ-BEV decoder of pre-training."""

CELL_FACTORS = ("occupied_of_cells", "kinds_of_cells")
"""What `OccupancyDecoder.cell_factors` returns."""

SEMANTICS = Head("occupancy_head", ("occupancy_logits",), "semantics", "voxels", factors=CELL_FACTORS)
"""Classes of voxels, free the last: (B, K, Z, Y, X)."""

SUBPIXEL = 2
"""The plane is decoded at this many voxels per cell along x and y."""

CELLS_AT_ONCE = 10_000
"""Cells whose classes are weighed at a time: 17 classes of them fit a cache."""


class OccupancyDecoder(nn.Module):
    """Resample the BEV to the voxel grid's plane, unfold heights, refine in 3D, classify.

    Every voxel has its own probability of being occupied; what stands there is said of the 2 x 2 voxels of a cell at
    once, so that P(class) = P(occupied) P(class | occupied). Pre-training hands on the first factor. Of a real Occ3D
    frame 97.5 % of the occupied voxels have their cell's commonest class, which bounds the mIoU at 0.92 there.
    """

    def __init__(
        self,
        inputs: int,
        config: OccupancyHeadConfig,
        bev: BevGrid,
        grid: VoxelGrid,
        kinds: int = 0,
    ) -> None:
        """kinds: how many classes occupied voxels have; 0 tells free from occupied."""
        super().__init__()
        if grid.shape[0] % SUBPIXEL or grid.shape[1] % SUBPIXEL:
            raise ValueError(f"occupancy grid {grid.shape}: x and y must be multiples of {SUBPIXEL}")
        self.columns, self.rows = (Resampling(bev, grid, axis) for axis in (0, 1))
        self.trunk = CellTrunk(inputs, config, grid)
        self.occupied = nn.Conv2d(config.cell_channels, SUBPIXEL**2, 1)
        self.kinds = nn.Conv2d(config.cell_channels, kinds, 1) if kinds else None

    def forward(self, bev: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Turn BEV features (B, C, Y, X) into voxel logits (B, K, Z, Y, X) of the occupancy grid, see `logits`.

        While it trains the semantic head returns `cell_factors`: few voxels have a label, and the logits of 18 classes of
        all of them, with their gradients, cost as much as the rest of the head.
        """
        cells = self.cells(bev)
        return self.cell_factors(cells) if self.training and self.kinds is not None else self.logits(cells)

    def cells(self, bev: Tensor) -> Tensor:
        """Turn BEV features (B, C, Y, X) into what `logits` and `factors` take, see `CellTrunk`."""
        return self.trunk(self.columns(self.rows(self.trunk.reduce(bev))))

    def logits(self, cells: Tensor) -> Tensor:
        """Classify every voxel: (B, K, Z, Y, X), the kinds and then free; without kinds free and then occupied."""
        occupied = interleave(self._on_cells(self.occupied, cells))
        free = torch.zeros_like(occupied)
        if self.kinds is None:
            return torch.cat([free, occupied], 1)
        share = _repeat(torch.log_softmax(self._on_cells(self.kinds, cells), 1))
        return torch.cat([occupied + share, free], 1)

    def cell_factors(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log odds of occupied of the voxels of every cell, and the logits of its kinds.

        (B, 2 * 2, Z, Y / 2, X / 2), sub-cells along x fastest; (B, K - 1, Z, Y / 2, X / 2).
        """
        assert self.kinds is not None
        return self._on_cells(self.occupied, cells), self._on_cells(self.kinds, cells)

    def factors(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return P(occupied) of every voxel, and of every cell the likeliest kind and P(kind | occupied).

        (B, 2, 2, Z, Y / 2, X / 2): sub-cell along y, sub-cell along x; and twice (B, Z, Y / 2, X / 2), kinds as uint8.
        All that a decision needs of the logits of 18 classes, in a fourteenth of their size.
        """
        assert self.kinds is not None
        layers = (self.occupied, self.kinds)  # as one: few channels cost a runtime as much as many
        weight, bias = (torch.cat([getattr(layer, n) for layer in layers]) for n in ("weight", "bias"))
        answers = functional.conv2d(cells.flatten(3), weight, bias).flatten(2)
        occupied, labels, shares = [], [], []
        for part in answers.split(CELLS_AT_ONCE, 2):
            occupied.append(torch.sigmoid(part[:, : SUBPIXEL**2]))
            share, label = torch.softmax(part[:, SUBPIXEL**2 :], 1).topk(1, 1)
            labels.append(label.float().to(torch.uint8))  # TensorRT makes bytes of floats alone
            shares.append(share)
        shape = (len(cells), *cells.shape[2:])
        return (
            torch.cat(occupied, 2).reshape(len(cells), SUBPIXEL, SUBPIXEL, *cells.shape[2:]),
            torch.cat(labels, 2).reshape(shape),
            torch.cat(shares, 2).reshape(shape),
        )

    def _on_cells(self, layer: nn.Conv2d, cells: Tensor) -> Tensor:
        answers: Tensor = layer(cells.flatten(3)).unflatten(3, cells.shape[3:])
        return answers


class CellTrunk(nn.Module):
    """The part that does not depend on the classes, and so is handed on by pre-training."""

    def __init__(self, inputs: int, config: OccupancyHeadConfig, grid: VoxelGrid) -> None:
        super().__init__()
        width, self._heights = config.height_channels, grid.shape[2]
        self.reduce = conv_bn_relu(inputs, config.channels, 1)
        self.plane = ResidualBlock(config.channels, config.channels)
        self.unfold = conv_bn_relu(config.channels, width * self._heights, 1)
        # The plane has seen its surroundings along x and y, so that 3D refinement is along z: a 2D
        # convolution over (Z, Y * X), which runtimes know better than a 3D one.
        self.refine = nn.Sequential(
            nn.Conv2d(width, width, (3, 1), padding=(1, 0), bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        first = nn.Conv2d(width, config.cell_channels, 1)
        self.hidden = nn.Sequential(first, nn.ReLU(inplace=True))
        start_alive(first)

    def forward(self, plane: Tensor) -> Tensor:
        """Turn the plane (B, C, Y / 2, X / 2) into features of cells (B, F, Z, Y / 2, X / 2)."""
        voxels = self.unfold(self.plane(plane)).flatten(2)
        voxels = voxels.unflatten(1, (-1, self._heights))  # (B, F, Z, Y / 2 * X / 2)
        cells: Tensor = self.hidden(voxels + self.refine(voxels))
        return cells.unflatten(3, plane.shape[2:])


def start_alive(layer: nn.Conv2d) -> None:
    """Give a layer a start at which no feature is dead.

    Weights of zero mean: the inputs are rectified, so that a mean alone could switch a feature off.
    """
    with torch.no_grad():
        layer.weight -= layer.weight.mean(1, keepdim=True)
        assert layer.bias is not None
        layer.bias.fill_(0.1)


def occupied_at(occupied: Tensor, voxels: Tensor) -> Tensor:
    """Return the log odds (M,) at flat voxels (M,) over (Z, Y, X), of one sample's cells (2 * 2, Z, Y / 2, X / 2)."""
    part, cell = _places(occupied, voxels)
    return occupied.flatten()[part * occupied[0].numel() + cell].float()


def logits_at(occupied: Tensor, kinds: Tensor, voxels: Tensor) -> Tensor:
    """Return what `OccupancyDecoder.logits` says at flat voxels (M,): (K, M), free the last.

    occupied: (2 * 2, Z, Y / 2, X / 2), kinds: (K - 1, Z, Y / 2, X / 2), the factors of one sample.
    """
    _, cell = _places(kinds, voxels)
    share = torch.log_softmax(kinds.flatten(1).index_select(1, cell).float(), 0)
    logits = occupied_at(occupied, voxels) + share
    return torch.cat([logits, torch.zeros_like(logits[:1])])


def _places(cells: Tensor, voxels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of its cell's 2 x 2 parts each flat voxel is, and which flat cell it lies in."""
    rows, columns = cells.shape[2] * SUBPIXEL, cells.shape[3] * SUBPIXEL
    x, y, z = voxels % columns, voxels // columns % rows, voxels // (columns * rows)
    cell = (z * cells.shape[2] + y // SUBPIXEL) * cells.shape[3] + x // SUBPIXEL
    return y % SUBPIXEL * SUBPIXEL + x % SUBPIXEL, cell


def _repeat(cells: Tensor) -> Tensor:
    """Turn (B, K, Z, Y, X) into (B, K, Z, 2 * Y, 2 * X), a cell's values for each of its voxels."""
    size = (*cells.shape[:3], cells.shape[3] * SUBPIXEL, cells.shape[4] * SUBPIXEL)
    return cells[:, :, :, :, None, :, None].expand(-1, -1, -1, -1, SUBPIXEL, -1, SUBPIXEL).reshape(size)


def interleave(cells: Tensor) -> Tensor:
    """Turn (B, 2 * 2, Z, Y, X), one value of each sub-cell, those along x fastest, into (B, 1, Z, 2 * Y, 2 * X)."""
    z, y, x = cells.shape[2:]
    parts = cells.view(-1, SUBPIXEL, SUBPIXEL, z, y, x).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(-1, 1, z, y * SUBPIXEL, x * SUBPIXEL)


class Resampling(nn.Module):
    """Interpolates one axis of a BEV map at the cells of the coarse voxel plane; it learns nothing.

    Linear between the two nearest BEV centres; beyond the border ones, constant.
    """

    lower: Tensor
    upper: Tensor
    share: Tensor

    def __init__(self, bev: BevGrid, grid: VoxelGrid, axis: int) -> None:
        """axis: 0 = x, 1 = y."""
        super().__init__()
        pitch = grid.pitch[axis] * SUBPIXEL
        centres = grid.lo[axis] + (np.arange(grid.shape[axis] // SUBPIXEL) + 0.5) * pitch
        last = bev.shape[axis] - 1
        place = np.clip((centres - bev.lo[axis]) / bev.pitch[axis] - 0.5, 0, last)
        lower = np.minimum(place.astype(np.int64), max(last - 1, 0))
        share = torch.from_numpy((place - lower).astype(np.float32))
        self._axis = 3 - axis  # of (B, C, Y, X)
        self.register_buffer("lower", torch.from_numpy(lower), persistent=False)
        self.register_buffer("upper", torch.from_numpy(np.minimum(lower + 1, last)), persistent=False)
        self.register_buffer("share", share if axis == 0 else share[:, None], persistent=False)

    def forward(self, bev: Tensor) -> Tensor:
        """Turn (B, C, Y, X) into a map with as many cells along the axis as the plane has."""
        below = bev.index_select(self._axis, self.lower)
        resampled: Tensor = below + self.share * (bev.index_select(self._axis, self.upper) - below)
        return resampled
