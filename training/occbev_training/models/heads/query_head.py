"""Detection by object queries (Wang et al. 2021, Li et al. 2022): a decoder whose layers each predict boxes.

What queries attend to differs between BEVFormer and DETR3D and is given to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Protocol

import torch
from torch import Tensor, nn

from occbev.inference.families.queries import QueryHeadConfig
from occbev_training.models.heads.record import Head
from occbev_training.models.layers import FeedForward, start_transformer

QUERIES = Head("detection_head", ("class_logits", "box_codes"), "queries", "boxes", reads="scene", layered=True)
"""Class logits (L, B, Q, K) and box codes (L, B, Q, 10) of every decoder layer."""

CODE_VALUES = 10
"""x, y, log w, log l, z, log h, sin r, cos r, vx, vy with r = -yaw - pi / 2."""

VELOCITY_WEIGHT = 0.2
START_SCORE_LOGIT = -4.595
"""Begin at a score of 0.01: nearly every query finds nothing."""

_EDGE = 1e-5


class CrossAttention(Protocol):
    """Lets queries read the scene near their reference points; adds what it read to the queries."""

    def __call__(self, query: Tensor, position: Tensor, reference: Tensor, scene: object) -> Tensor:
        """Return (B, Q, C) of query and position (B, Q, C) and reference (B, Q, 3) in 0..1."""
        ...


class QueryHead(nn.Module):
    """Object queries, decoder layers, and per layer a classifier and a regressor."""

    lo: Tensor
    span: Tensor

    def __init__(
        self,
        config: QueryHeadConfig,
        channels: int,
        classes: int,
        extent: tuple[Sequence[float], Sequence[float]],
        make_attention: Callable[[], nn.Module],
    ) -> None:
        """extent: lower and upper corner (x, y, z) of the volume that reference points span."""
        super().__init__()
        lo, hi = torch.tensor(extent, dtype=torch.float32)
        self.register_buffer("lo", lo, persistent=False)
        self.register_buffer("span", hi - lo, persistent=False)
        self.query_embedding = nn.Embedding(config.queries, 2 * channels)
        self.reference_points = nn.Linear(channels, 3)
        self.layers = nn.ModuleList(DecoderLayer(channels, config, make_attention()) for _ in range(config.layers))
        self.classifiers = nn.ModuleList(_classifier(channels, classes) for _ in self.layers)
        self.regressors = nn.ModuleList(_regressor(channels) for _ in self.layers)
        weights = torch.tensor([1.0] * 8 + [VELOCITY_WEIGHT] * 2)
        self.code_weights = nn.Parameter(weights, requires_grad=False)
        start_transformer(self.layers, self.reference_points)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, scene: Sized) -> tuple[Tensor, Tensor]:
        """Return class logits (L, B, Q, K) and box codes (L, B, Q, 10) of every decoder layer.

        scene: what the cross-attention reads; its length is that of the batch. Centres are in metres of the frame of the extent.
        """
        position, query = self.query_embedding.weight.expand(len(scene), -1, -1).chunk(2, 2)
        reference = self.reference_points(position).sigmoid()
        logits, codes = [], []
        for layer, classify, regress in zip(self.layers, self.classifiers, self.regressors, strict=True):
            query = layer(query, position, reference, scene)
            change = regress(query)
            moved = torch.cat([change[..., :2], change[..., 4:5]], -1)
            centre = (moved + inverse_sigmoid(reference)).sigmoid()
            logits.append(classify(query))
            codes.append(self._code(change, centre))
            reference = centre.detach()
        return torch.stack(logits), torch.stack(codes)

    def _code(self, change: Tensor, centre: Tensor) -> Tensor:
        metres = centre * self.span + self.lo
        return torch.cat([metres[..., :2], change[..., 2:4], metres[..., 2:], change[..., 5:]], -1)


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the scene; each step normalised after its skip."""

    def __init__(self, channels: int, config: QueryHeadConfig, cross: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, config.heads, config.dropout, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.cross = cross
        self.ffn = FeedForward(channels, config.hidden, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(self, query: Tensor, position: Tensor, reference: Tensor, scene: object) -> Tensor:
        """Keep (B, Q, C)."""
        key = query + position
        seen = self.attention(key, key, query, need_weights=False)[0]
        query = self.norms[0](query + self.dropout(seen))
        query = self.norms[1](self.cross(query, position, reference, scene))
        result: Tensor = self.norms[2](self.ffn(query))
        return result


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Return the logit of values in 0..1, bounded at the ends."""
    return torch.log(x.clamp(_EDGE, 1.0) / (1.0 - x).clamp(_EDGE, 1.0))


def encode_boxes(boxes: Tensor) -> Tensor:
    """Turn boxes (M, 9) x, y, z, l, w, h, yaw, vx, vy into codes (M, 10)."""
    x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
    # r = -yaw - pi / 2: sin r = -cos yaw and cos r = -sin yaw.
    parts = [x, y, width.log(), length.log(), z, height.log(), -yaw.cos(), -yaw.sin(), vx, vy]
    return torch.stack(parts, -1)


def _classifier(channels: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True)]
    last = nn.Linear(channels, classes)
    nn.init.constant_(last.bias, START_SCORE_LOGIT)
    return nn.Sequential(*layers, last)


def _regressor(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(channels, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(channels, CODE_VALUES))
