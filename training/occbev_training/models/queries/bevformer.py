"""BEVFormer view transform (Li et al. 2022): BEV queries look back in time, then into the cameras.

Where queries project to in the images, and how the vehicle moved, comes from outside the network
(`occbev.inference.reference_points`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from occbev.grid import BevGrid
from occbev.inference.families.bevformer import BevFormerConfig
from occbev_training.models.layers import FeedForward, start_transformer
from occbev_training.models.queries.deformable_attention import (
    Levels,
    OffsetAndWeight,
    flatten_levels,
    sample,
    sample_by_grid,
    sample_map,
    start_projections,
)

CAN_BUS_VALUES = 18
"""Ego motion as published checkpoints read it, see `occbev.inference.reference_points.can_bus`."""

PAIR_ROWS = 4096
"""Pairs of camera and query whose sampling places are held at a time."""


@dataclass(frozen=True)
class CameraPairs:
    """Every pair of a camera image and a BEV query that it sees, sorted by image.

    per_image: pairs of each of the B * N images. query: (P,) int64 row of B * Q queries.
    points: (P, D, 2) where the query's pillar projects to, x and y in 0..1 of the image.
    count: (B * Q,) cameras that see each query.
    """

    per_image: tuple[int, ...]
    query: Tensor
    points: Tensor
    count: Tensor


@dataclass(frozen=True)
class CameraSlots:
    """The same pairs for one sample in tables of fixed size, for exported graphs.

    query: (N, R) int32, which query each row of a camera is; padding repeats any.
    points: (N, R, D, 2). camera_valid: (N,).
    slot: (Q, S) int32, rows of N * R that belong to a query; N * R where there is none.
    """

    query: Tensor
    points: Tensor
    camera_valid: Tensor
    slot: Tensor


@dataclass(frozen=True)
class Motion:
    """The BEV of the frame before, and how to read it.

    previous: (B, C, Y, X). known: (B,) float, 0 where there is no frame before.
    align: (B, Q) int, the cell of `previous` that turns into each cell; Q for none.
    shift: (B, 2), what to add to x and y in 0..1 of the grid.
    """

    previous: Tensor
    known: Tensor
    align: Tensor
    shift: Tensor


_Record = TypeVar("_Record", bound="CameraPairs | CameraSlots | Motion")


@dataclass(frozen=True)
class BevFormerViews:
    """What calibration and ego motion say to a BEVFormer.

    hits: which cameras see which query. can_bus: (B, 18). cameras: (B, N), the embedding that each camera takes.
    motion: None where no sample has a frame before.
    """

    hits: CameraPairs | CameraSlots
    can_bus: Tensor
    cameras: Tensor
    motion: Motion | None = None

    def to(self, device: torch.device | str) -> BevFormerViews:
        """Move every tensor."""
        motion = None if self.motion is None else _move(self.motion, device)
        return BevFormerViews(_move(self.hits, device), self.can_bus.to(device), self.cameras.to(device), motion)


def _move(record: _Record, device: torch.device | str) -> _Record:
    """Return a dataclass whose tensors are on a device."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}
    make: Callable[..., _Record] = type(record)
    return make(**moved)


def pair_cameras(points: Tensor, visible: Tensor, camera_valid: Tensor, reference_quirks: bool = False) -> CameraPairs:
    """List the pairs of a batch.

    points: (B, N, Q, D, 2). visible: (B, N, Q, D) bool. camera_valid: (B, N).
    reference_quirks: let the first sample decide for all which queries a camera attends to.
    """
    hit = visible.any(-1) & (camera_valid > 0)[..., None]  # (B, N, Q)
    chosen = hit[:1].expand_as(hit) if reference_quirks else hit
    sample_, camera, query = chosen.nonzero(as_tuple=True)
    per_image = chosen.sum(-1).flatten().tolist()
    rows = sample_ * hit.shape[2] + query
    return CameraPairs(tuple(per_image), rows, points[sample_, camera, query], hit.sum(1).flatten().to(points))


class SpatialCrossAttention(nn.Module):
    """Each query reads the features around its pillar in the cameras that see it."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, dropout: float) -> None:
        """points: places per query, head and level, all heights of the pillar together."""
        super().__init__()
        self.deformable_attention = _CameraAttention(channels, heads, levels, points)
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        start_projections(self.output_proj)

    def forward(self, query: Tensor, features: Tensor, levels: Levels, hits: CameraPairs | CameraSlots) -> Tensor:
        """Return (B, Q, C) of queries (B, Q, C) and features (B * N, S, C)."""
        form = self._by_slots if isinstance(hits, CameraSlots) else self._by_pairs
        mean = form(query.flatten(0, 1), features, levels, hits)  # type: ignore[arg-type]
        return self.dropout(self.output_proj(mean.view_as(query))) + query

    def _by_pairs(self, query: Tensor, features: Tensor, levels: Levels, hits: CameraPairs) -> Tensor:
        total = torch.zeros_like(query)
        pairs = zip(
            features,
            hits.query.split(hits.per_image),
            hits.points.split(hits.per_image),
            strict=True,
        )
        for image, rows, points in pairs:
            if len(rows):
                value = self.deformable_attention.value(image)
                for part, place in zip(rows.split(PAIR_ROWS), points.split(PAIR_ROWS), strict=True):
                    places, weights = self.deformable_attention.places(query[part], place, levels)
                    read = sample_map(value, places, weights, levels)
                    total.index_add_(0, part, read.to(total))
        return total / hits.count.clamp(min=1)[:, None]

    def _by_slots(self, query: Tensor, features: Tensor, levels: Levels, hits: CameraSlots) -> Tensor:
        cameras, rows = hits.query.shape
        chosen = query.index_select(0, hits.query.flatten())
        points = hits.points.flatten(0, 1)
        places, weights = self.deformable_attention.places(chosen, points, levels)
        places, weights = (v.unflatten(0, (cameras, rows)) for v in (places, weights))
        value = self.deformable_attention.value(features)
        read = sample_by_grid(value, levels, places, weights).flatten(0, 1)
        valid = hits.camera_valid[:, None].expand(cameras, rows).flatten()
        read = torch.cat([read * valid[:, None], read.new_zeros(1, read.shape[1])])
        valid = torch.cat([valid, valid.new_zeros(1)])
        slot = hits.slot.flatten()
        total = read.index_select(0, slot).unflatten(0, hits.slot.shape).sum(1)
        count = valid.index_select(0, slot).unflatten(0, hits.slot.shape).sum(1)
        return total / count.clamp(min=1)[:, None]


class _CameraAttention(OffsetAndWeight):
    """Where queries read in an image, around the heights of their pillars."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__(channels, heads, levels, points)
        self.value_proj = nn.Linear(channels, channels)
        start_projections(self.value_proj)

    def value(self, features: Tensor) -> Tensor:
        """Turn features (..., C) into heads (..., heads, C / heads)."""
        return self.value_proj(features).unflatten(-1, (self.shape[0], -1))

    def places(self, query: Tensor, points: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """Return where queries (P, C) read around points (P, D, 2), and how much each place counts.

        Returns: (P, heads, L, places, 2) and the same without the 2. Place p is at height p % D.
        """
        offsets, weights = (v.squeeze(2) for v in self(query))
        anchors = points.repeat(1, offsets.shape[3] // points.shape[1], 1)[:, None, None]
        return anchors + self.in_maps(offsets, levels), weights


class TemporalSelfAttention(OffsetAndWeight):
    """Each query reads the BEV of the frame before and the one of this frame."""

    SLOTS = 2

    def __init__(self, channels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__(channels * self.SLOTS, heads, 1, points, self.SLOTS)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        start_projections(self.value_proj, self.output_proj)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        position: Tensor,
        previous: Tensor,
        current: Tensor,
        references: Tensor,
        levels: Levels,
        reference_quirks: bool = False,
    ) -> Tensor:
        """Return (B, Q, C).

        query: (B, Q, C). position: (Q, C). previous, current: (B, Q, C), what both slots read.
        references: (B, Q, 2 slots, 2) in 0..1 of the grid.
        reference_quirks: decide where to read by values that are mixed between the samples of a batch.
        """
        slots = torch.stack([previous, current], 1).flatten(0, 1)  # (B * 2, Q, C), sample-major
        beside = slots[: len(query)] if reference_quirks else previous
        offsets, weights = super().forward(torch.cat([beside, query + position], -1))
        places = references[:, :, None, :, None, None] + self.in_maps(offsets, levels)
        places, weights = (v.movedim(3, 1).flatten(0, 1) for v in (places, weights))
        value = self.value_proj(slots).unflatten(-1, (self.shape[0], -1))
        read = sample(value, levels, places, weights)  # (B * 2, Q, C)
        mean = read.unflatten(0, (-1, self.SLOTS)).mean(1)
        return self.dropout(self.output_proj(mean)) + query


@dataclass(frozen=True)
class _Past:
    """What temporal self-attention reads when there is a frame before.

    previous, current: (B, Q, C). known: (B, 1, 1) bool.
    """

    previous: Tensor
    current: Tensor
    known: Tensor


class EncoderLayer(nn.Module):
    """Look back, look into the cameras, think; each step normalised after its skip."""

    def __init__(self, config: BevFormerConfig, levels: int) -> None:
        super().__init__()
        width, heads, dropout = config.channels, config.heads, config.dropout
        self.temporal = TemporalSelfAttention(width, heads, config.temporal_points, dropout)
        self.spatial = SpatialCrossAttention(width, heads, levels, config.camera_points, dropout)
        self.ffn = FeedForward(width, config.hidden, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self._quirks = config.reference_quirks

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        past: _Past | None,
        references: Tensor,
        plane: Levels,
        features: Tensor,
        levels: Levels,
        hits: CameraPairs | CameraSlots,
    ) -> Tensor:
        """Return (B, Q, C)."""
        previous = current = query
        if past is not None:  # without a frame before, both slots read this layer's own query
            previous = torch.where(past.known, past.previous, query)
            current = torch.where(past.known, past.current, query)
        query = self.norms[0](self.temporal(query, position, previous, current, references, plane, self._quirks))
        query = self.norms[1](self.spatial(query, features, levels, hits))
        result: Tensor = self.norms[2](self.ffn(query))
        return result


class BevFormer(nn.Module):
    """Queries of a BEV grid, refined by layers that read cameras and the past."""

    centres: Tensor

    def __init__(self, config: BevFormerConfig, bev: BevGrid, levels: int) -> None:
        """levels: feature maps per image."""
        super().__init__()
        width, (columns, rows) = config.channels, bev.shape
        self._plane = Levels(((rows, columns),))
        # With published weights in ego axes the shift went to both slots of the temporal attention.
        self._shift_both = config.reference_quirks and bev.frame == "base_link"
        self.bev_embedding = nn.Embedding(bev.size, width)
        self.row_embed = nn.Embedding(rows, width // 2)
        self.column_embed = nn.Embedding(columns, width // 2)
        self.camera_embeds = nn.Parameter(torch.randn(config.cameras, width))
        self.level_embeds = nn.Parameter(torch.randn(config.level_rows, width))
        self.can_bus = _can_bus_mlp(width)
        self.layers = nn.ModuleList(EncoderLayer(config, levels) for _ in range(config.layers))
        centres = torch.from_numpy(cell_centres(bev)).float()
        self.register_buffer("centres", centres, persistent=False)
        start_transformer(self.layers, self.can_bus)

    def forward(
        self,
        maps: Sequence[Tensor],
        hits: CameraPairs | CameraSlots,
        can_bus: Tensor,
        cameras: Tensor,
        motion: Motion | None = None,
    ) -> Tensor:
        """Return the BEV (B, C, Y, X), which is also `Motion.previous` of the next frame.

        maps: levels of (B * N, C, H_l, W_l). can_bus: (B, 18). cameras: (B, N), the embedding of each.
        """
        features, levels = self._embed(maps, cameras)
        query = self.bev_embedding.weight + self.can_bus(can_bus)[:, None]  # (B, Q, C)
        past, references = self._look_back(query, motion)
        position = self._position()
        for layer in self.layers:
            query = layer(query, position, past, references, self._plane, features, levels, hits)
        return query.transpose(1, 2).unflatten(2, self._plane.shapes[0])

    def _embed(self, maps: Sequence[Tensor], cameras: Tensor) -> tuple[Tensor, Levels]:
        if cameras.shape[1] > len(self.camera_embeds):
            raise ValueError(
                f"{cameras.shape[1]} cameras, but the network has embeddings for {len(self.camera_embeds)}"
            )
        camera = self.camera_embeds.index_select(0, cameras.flatten())[..., None, None]
        named = [m + camera + e[:, None, None] for m, e in zip(maps, self.level_embeds, strict=False)]
        return flatten_levels(named)

    def _position(self) -> Tensor:
        rows, columns = self._plane.shapes[0]
        x = self.column_embed.weight.expand(rows, -1, -1)
        y = self.row_embed.weight[:, None].expand(-1, columns, -1)
        return torch.cat([x, y], -1).flatten(0, 1)

    def _look_back(self, query: Tensor, motion: Motion | None) -> tuple[_Past | None, Tensor]:
        references = self.centres.expand(len(query), -1, -1)[:, :, None].expand(-1, -1, 2, -1)
        if motion is None:
            return None, references
        known = motion.known.view(-1, 1, 1) > 0
        shift = torch.where(known, motion.shift[:, None], torch.zeros_like(motion.shift[:, None]))
        still = shift if self._shift_both else torch.zeros_like(shift)
        references = references + torch.stack([shift, still], 2)  # previous slot, current slot
        return _Past(aligned(motion), query, known), references


def aligned(motion: Motion) -> Tensor:
    """Return the BEV of the frame before as queries (B, Q, C), turned by the vehicle's turn."""
    cells = motion.previous.flatten(2).transpose(1, 2)
    cells = torch.cat([cells, cells.new_zeros(len(cells), 1, cells.shape[2])], 1)
    return torch.stack([c.index_select(0, a) for c, a in zip(cells, motion.align, strict=True)])


def cell_centres(bev: BevGrid) -> NDArray[np.float64]:
    """Return the centre of every cell (Y * X, 2) as x, y in 0..1 of the grid."""
    columns, rows = bev.shape
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    return np.stack([x, y], -1).reshape(-1, 2)


def _can_bus_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            {
                "0": nn.Linear(CAN_BUS_VALUES, width // 2),
                "1": nn.ReLU(inplace=True),
                "2": nn.Linear(width // 2, width),
                "3": nn.ReLU(inplace=True),
                "norm": nn.LayerNorm(width),
            }
        )
    )
