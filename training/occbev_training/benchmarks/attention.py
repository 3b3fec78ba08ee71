"""Spatial cross-attention, ours against queries padded per camera with one grid sample per level.

Both get the same weights, features and reference points; their results are compared before any timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from occbev.benchmarks import Options, Report, run_interleaved
from occbev.config import ImageConfig
from occbev.grid import BevGrid
from occbev.inference.example_inputs import ring_rig
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.reference_points import frame_to_images, pillar_points, project
from occbev_training.benchmarks.measure import bench_device, peak_bytes, speedup, waiting
from occbev_training.models.queries.bevformer import CameraPairs, SpatialCrossAttention, pair_cameras
from occbev_training.models.queries.deformable_attention import Levels, sample_by_grid

CAMERA_COUNT, CHANNELS, HEADS, HEIGHTS, POINTS = 6, 256, 8, 4, 8
LEVELS = Levels(((116, 200), (58, 100), (29, 50), (15, 25)))
EXTENT = 51.2
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """One problem: a square BEV and what the cameras see of it."""

    attention: SpatialCrossAttention
    query: Tensor
    features: Tensor
    hits: CameraPairs

    def ours(self) -> Tensor:
        """The network's own form."""
        result: Tensor = self.attention(self.query, self.features, LEVELS, self.hits)
        return result

    def padded(self) -> Tensor:
        """The baseline."""
        return padded_attention(self.attention, self.query, self.features, self.hits)


def padded_attention(attention: SpatialCrossAttention, query: Tensor, features: Tensor, hits: CameraPairs) -> Tensor:
    """Do what BEVFormer's code does: every camera's queries padded to the longest, all in one batch."""
    rows = hits.query.split(hits.per_image)
    points = hits.points.split(hits.per_image)
    chosen = torch.nn.utils.rnn.pad_sequence([query[0, r] for r in rows], True)  # (N, R, C)
    anchors = torch.nn.utils.rnn.pad_sequence(list(points), True)  # (N, R, D, 2)
    inner = attention.deformable_attention
    places, weights = inner.places(chosen.flatten(0, 1), anchors.flatten(0, 1), LEVELS)
    places, weights = (v.unflatten(0, chosen.shape[:2]) for v in (places, weights))
    read = sample_by_grid(inner.value(features), LEVELS, places, weights)  # (N, R, C)
    total = torch.zeros_like(query[0])
    for camera, row in enumerate(rows):
        total = total.index_add(0, row, read[camera, : len(row)])
    mean = total / hits.count.clamp(min=1)[:, None]
    result: Tensor = attention.output_proj(mean)[None] + query
    return result


def make_case(cells: int, device: str = "cpu") -> Case:
    """Return a problem with cells x cells queries; offsets and weights differ everywhere, as after training."""
    torch.manual_seed(0)
    attention = SpatialCrossAttention(CHANNELS, HEADS, len(LEVELS.shapes), POINTS, 0.0)
    inner = attention.deformable_attention
    for layer in (inner.sampling_offsets, inner.attention_weights):
        torch.nn.init.normal_(layer.weight, std=0.05)
    bev = BevGrid((-EXTENT, -EXTENT), (2 * EXTENT / cells,) * 2, (cells, cells))
    model = LiftSplatModel(image=ImageConfig(width=1600, height=928))
    rig = ring_rig(model, CAMERA_COUNT).cameras
    matrices = frame_to_images(np.stack([c.intrinsic for c in rig]), np.stack([c.cam2ego for c in rig]))
    seen = project(pillar_points(bev, (-5.0, 3.0), HEIGHTS), matrices, (1600, 928))
    points, visible = (torch.from_numpy(array)[None].to(device) for array in seen)
    hits = pair_cameras(points, visible, torch.ones(1, CAMERA_COUNT, device=device))
    query = torch.randn(1, cells * cells, CHANNELS, device=device)
    features = torch.randn(CAMERA_COUNT, sum(LEVELS.lengths), CHANNELS, device=device)
    return Case(attention.to(device), query, features, hits)


def run(options: Options) -> Report:
    """Measure forward at 200x200 queries, and forward with backward at 100x100."""
    torch.set_num_threads(options.threads or 1)
    device = bench_device()
    return measure(options.rounds, make_case(200, device), make_case(100, device), device)


def measure(rounds: int, forward: Case, backward: Case, device: str = "cpu") -> Report:
    """Compare both forms, then time them and take their peak memory."""
    with torch.no_grad():
        difference = float((forward.ours() - forward.padded()).abs().max())
    if not difference < TOLERANCE:
        raise ValueError(f"the forms differ by {difference:.1e}: nothing to compare")
    values: dict[str, object] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "queries": forward.query.shape[1],
        "pairs": len(forward.hits.query),
        "difference": difference,
    }
    ratios = {}
    forms = {"ours": _without_gradient(forward.ours), "padded": _without_gradient(forward.padded)}
    both = {"ours": partial(_train, backward, backward.ours), "padded": partial(_train, backward, backward.padded)}
    for key, methods in (("forward", forms), ("forward_backward", both)):
        timings = run_interleaved(waiting(methods, device), rounds)
        values |= {f"{key}_{name}_ms": timing.wall_ms for name, timing in timings.items()}
        ratios[f"{key}_vs_padded"] = speedup(timings["padded"], timings["ours"], device)
    peaks = {name: _peak(method, device) for name, method in forms.items()}
    values |= {f"peak_{name}_mb": peak / 1e6 for name, peak in peaks.items()}
    ratios["peak_memory_vs_padded"] = peaks["padded"] / peaks["ours"]
    return Report("attention", values, ratios)


def _peak(method: Callable[[], object], device: str) -> int:
    """Return the most memory that one call holds at a time over what was held before."""
    if device == "cpu":
        return peak_bytes(method)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    method()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _without_gradient(method: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(method)


def _train(case: Case, method: Callable[[], Tensor]) -> None:
    """One step: forward, and backward to features, queries and weights."""
    for tensor in (case.query, case.features):
        tensor.requires_grad_().grad = None
    case.attention.zero_grad()
    method().square().mean().backward()
