"""Multi-scale deformable attention (Zhu et al. 2021): each query reads few places of feature maps.

Two equal forms of the same sum exist: grid sampling for exported graphs and GPUs, and embedding bags over the
bilinear corners for CPUs, which never hold more than one chunk of samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev_training.models.layers import at_least_float32

CHUNK_ENTRIES = 1 << 19
"""Bilinear corners that the bag form makes at a time: few enough to stay near the processor."""

_FAR_AWAY = 1e9


@dataclass(frozen=True)
class Levels:
    """Sizes of the feature maps that lie behind each other in one sequence.

    shapes: (height, width) of each level.
    """

    shapes: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cells of each level."""
        return tuple(height * width for height, width in self.shapes)

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of each level in the sequence."""
        return tuple(sum(self.lengths[:i]) for i in range(len(self.shapes)))

    def sizes(self, like: Tensor) -> Tensor:
        """Return (L, 2): width and height of each level."""
        return like.new_tensor([(width, height) for height, width in self.shapes])


def flatten_levels(maps: Sequence[Tensor]) -> tuple[Tensor, Levels]:
    """Turn maps (M, C, H_l, W_l) into one sequence (M, S, C)."""
    levels = Levels(tuple((int(m.shape[-2]), int(m.shape[-1])) for m in maps))
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1), levels


def sample_by_grid(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Read every level at given places by grid sampling, and add up.

    value: (M, S, heads, C). locations: (M, Q, heads, L, P, 2), x and y in 0..1 of a map, which spans its
    outer borders; beyond them all is 0. weights: (M, Q, heads, L, P).
    Returns: (M, Q, heads * C).
    """
    maps, queries, heads = locations.shape[:3]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, M * heads, Q, P, 2)
    sampled = []
    for level, grid, (height, width) in zip(
        value.split(levels.lengths, 1), grids.unbind(0), levels.shapes, strict=True
    ):
        plane = level.permute(0, 2, 3, 1).reshape(maps * heads, -1, height, width)
        sampled.append(functional.grid_sample(plane, grid, align_corners=False))
    weights = weights.permute(0, 2, 1, 3, 4).reshape(maps * heads, 1, queries, -1)
    summed = (torch.cat(sampled, -1) * weights).sum(-1)  # (M * heads, C, Q)
    return summed.reshape(maps, -1, queries).transpose(1, 2)


def sample_by_bags(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Do what `sample_by_grid` does by embedding bags over bilinear corners, in chunks of queries."""
    return torch.stack(
        [_sample_map_by_bags(*operands, levels) for operands in zip(value, locations, weights, strict=True)]
    )


def sample_map(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """Read one map: value (S, heads, C), locations (Q, heads, L, P, 2), weights (Q, heads, L, P).

    Returns: (Q, heads * C).
    """
    if value.device.type == "cpu":
        return _sample_map_by_bags(value, locations, weights, levels)
    maps, places, shares = (at_least_float32(v[None]) for v in (value, locations, weights))
    return sample_by_grid(maps, levels, places, shares)[0]


def _sample_map_by_bags(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    places, shares = locations.to(value.dtype), weights.to(value.dtype)
    result: Tensor = _BagSampling.apply(value, places, shares, levels)
    return result


def sample(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Read by the form that suits: bags on a CPU, grids on a GPU, which bags keep idle, and in exported graphs."""
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    by_grid = exporting or value.device.type != "cpu"
    form = sample_by_grid if by_grid else sample_by_bags
    return form(value, levels, locations, weights)


class _BagSampling(torch.autograd.Function):
    """Keeps the operands alone for the backward pass, and makes the corners anew there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        levels: Levels,
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.levels = levels  # type: ignore[attr-defined]
        table = value.flatten(0, 1)
        result = value.new_empty(len(locations), *value.shape[1:])
        for rows in _chunks(locations, CHUNK_ENTRIES):
            corner, entry = _entries(locations[rows], weights[rows], levels)
            read = _bags(corner, table, entry)
            result[rows] = read.unflatten(0, (-1, value.shape[1]))
        return result.flatten(1)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        value, locations, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        table, heads = value.flatten(0, 1), value.shape[1]
        grad_table: Tensor | None = None
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        # Each chunk's gradient is as large as the table, so that chunks are larger than in the forward pass.
        for rows in _chunks(locations, 4 * CHUNK_ENTRIES):
            leaves = [v[rows].detach().requires_grad_() for v in (locations, weights)]
            with torch.enable_grad():
                corner, entry = _entries(leaves[0], leaves[1], ctx.levels)  # type: ignore[attr-defined]
            of_read = gradient[rows].unflatten(1, (heads, -1)).flatten(0, 1)
            of_entry = _entry_gradient(of_read, corner, table)
            grad_locations[rows], grad_weights[rows] = torch.autograd.grad(entry, leaves, of_entry)
            part = _spread(of_read, corner, entry.detach(), len(table))
            grad_table = part if grad_table is None else grad_table.add_(part)
        of_value = torch.zeros_like(value) if grad_table is None else grad_table.view_as(value)
        return of_value, grad_locations, grad_weights, None


def _bags(corner: Tensor, table: Tensor, entry: Tensor) -> Tensor:
    """Sum table rows (S, C) of each bag: corner and entry (B, R), row and weight of each; returns (B, C)."""
    return functional.embedding_bag(corner, table, mode="sum", per_sample_weights=entry)


def _entry_gradient(gradient: Tensor, corner: Tensor, table: Tensor) -> Tensor:
    """Return the gradient (B, R) of the weights of `_bags`, given that of its result (B, C).

    It is a product of matrices (B, C) and (C, S) of which only the places of the corners are wanted: twice as fast as
    torch's own gradient of a bag's weights.
    """
    bags, size = corner.shape
    if len(table) < size:  # a sparse product holds no more entries than a full one
        table = functional.pad(table, (0, 0, 0, size - len(table)))
    begin = torch.arange(0, bags * size + 1, size, dtype=corner.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its note that sparse rows are young
        wanted = torch.sparse_csr_tensor(
            begin,
            corner.flatten(),
            gradient.new_zeros(bags * size),
            (bags, len(table)),
            check_invariants=False,
        )
        product = torch.sparse.sampled_addmm(wanted, gradient, table.t(), beta=0.0)
    return product.values().view_as(corner)


def _spread(gradient: Tensor, corner: Tensor, entry: Tensor, rows: int) -> Tensor:
    """Return the table's gradient (rows, C) of `_bags`, given that of its result (B, C).

    It is a sum of bags as well, one for each row of the table: several times as fast as torch's own gradient.
    """
    order = corner.flatten().argsort(stable=True)  # faster than any other order
    begin = torch.zeros(rows + 1, dtype=torch.int32, device=corner.device)
    begin[1:] = torch.bincount(corner.flatten(), minlength=rows).cumsum(0)
    bag = (order // corner.shape[1]).to(torch.int32)
    return functional.embedding_bag(
        bag,
        gradient,
        begin,
        mode="sum",
        per_sample_weights=entry.flatten().index_select(0, order),
        include_last_offset=True,
    )


def _entries(locations: Tensor, weights: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the rows of the table (S * heads, C) around each place and their weights, int32 and float (Q * heads, 4LP).

    Every step runs along all places of a head: over the few points of a level each would take ten times as long.
    """
    heads, points = locations.shape[1], locations.shape[3]
    x, y = locations.flatten(2, 3).unbind(-1)  # (Q, heads, L * P)
    width, height = levels.sizes(locations).repeat_interleave(points, 0).unbind(-1)
    column, across = _neighbours(x, width)
    row, down = _neighbours(y, height)
    first = heads * torch.tensor(levels.starts, dtype=torch.int32, device=x.device)
    head = torch.arange(heads, dtype=torch.int32, device=x.device)
    start = first.repeat_interleave(points) + head[:, None]  # (heads, L * P)
    right = heads * (width > 1).int()
    below = heads * width.int() * (height > 1)
    first_corner = row * (heads * width.int()) + column * heads + start
    others = torch.stack([torch.zeros_like(right), right, below, below + right])
    corner = first_corner[:, :, None] + others  # (Q, heads, 4, L * P)
    down = down * weights.flatten(2)[:, :, None]
    entry = down[:, :, :, None] * across[:, :, None]  # (Q, heads, 2, 2, L * P)
    return corner.flatten(2).flatten(0, 1), entry.flatten(2).flatten(0, 1)


def _neighbours(place: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower of the two cells around each place along one axis, and the shares of both.

    A cell's share is max(0, 1 - distance): with both cells inside the map, none of what lies outside is counted.
    place: (Q, heads, R) in 0..1. size: (R,) cells. Returns: int32 (Q, heads, R) and float (Q, heads, 2, R).
    """
    pixel = place * size - 0.5
    lower = torch.minimum(pixel.detach().floor(), size - 2).clamp(min=0)
    beyond = pixel - lower
    # Near 1 - |beyond|, far 1 - |1 - beyond|; at whole cells their slopes are those of the places after them, as
    # bilinear reading has them: a far share of 0 keeps its slope. A map of one cell has no far one.
    left, alone = 1 - beyond, torch.where(size > 1, 1.0, -_FAR_AWAY)
    near = functional.relu(torch.sub(left, functional.relu(-beyond), alpha=2))
    far = functional.threshold(torch.sub(left + alone, functional.relu(left), alpha=2), -1e-30, 0)
    share = torch.stack([near, far], 2)
    return lower.to(torch.int32), share


def _chunks(locations: Tensor, entries: int) -> list[slice]:
    """Cut the rows of locations (Q, heads, L, P, 2) so that each part has about so many corners."""
    step = max(1, entries // (4 * math.prod(locations.shape[1:-1])))
    return [slice(first, first + step) for first in range(0, len(locations), step)]


class OffsetAndWeight(nn.Module):
    """Where each query reads, relative to its reference, and how much it trusts each place."""

    def __init__(self, inputs: int, heads: int, levels: int, points: int, slots: int = 1) -> None:
        """slots: sources that are read with separate softmaxes."""
        super().__init__()
        self.shape = (heads, slots, levels, points)
        self.sampling_offsets = nn.Linear(inputs, math.prod(self.shape) * 2)
        self.attention_weights = nn.Linear(inputs, math.prod(self.shape))
        self.reset()

    def reset(self) -> None:
        """Begin with one direction per head, farther out for every further point, and equal trust."""
        heads, slots, levels, points = self.shape
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, points + 1)[:, None]
        bias = (direction[:, None, None, None] * reach).expand(heads, slots, levels, points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Turn (..., inputs) into offsets in cells (..., heads, slots, L, P, 2) and weights without the 2.

        The softmax is over levels and points of each slot together.
        """
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.shape, 2))
        logits = self.attention_weights(query).unflatten(-1, (*self.shape[:2], -1))
        return offsets, logits.softmax(-1).unflatten(-1, self.shape[2:])

    def in_maps(self, offsets: Tensor, levels: Levels) -> Tensor:
        """Turn offsets in cells (..., L, P, 2) into shares of a map."""
        sizes = levels.sizes(offsets)[:, None].expand(-1, self.shape[3], -1)
        return offsets / sizes.contiguous()  # so that one step runs along all places


class DeformableAttention(OffsetAndWeight):
    """Deformable attention of queries to one sequence of maps, with a residual connection."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, dropout: float = 0.0) -> None:
        super().__init__(channels, heads, levels, points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        start_projections(self.value_proj, self.output_proj)

    def forward(  # type: ignore[override]
        self, query: Tensor, position: Tensor, value: Tensor, reference: Tensor, levels: Levels
    ) -> Tensor:
        """Return (B, Q, C) of query and position (B, Q, C), value (B, S, C), reference (B, Q, 2) in 0..1."""
        offsets, weights = (v.squeeze(3) for v in super().forward(query + position))
        places = reference[:, :, None, None, None] + self.in_maps(offsets, levels)
        heads = self.value_proj(value).unflatten(-1, (self.shape[0], -1))
        return self.dropout(self.output_proj(sample(heads, levels, places, weights))) + query


def start_projections(*layers: nn.Linear) -> None:
    """Give projections Xavier-uniform weights and no bias."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
