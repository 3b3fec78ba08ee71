"""Lift-Splat pooling against the cumulative sum that Lift-Splat-Shoot introduced.

Six cameras of 704x256 at stride 16, 118 depth bins, 80 channels, 128x128 cells; tables are given to both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from occbev.benchmarks import Options, Report, run_interleaved
from occbev.config import DepthConfig, ImageConfig, LiftConfig
from occbev.grid import BevGrid
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.tables import LiftPoints, lift_points
from occbev_training.benchmarks.measure import bench_device, peak_bytes, speedup, waiting
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, batch_points, splat

CAMERA_COUNT = 6
BEV = BevGrid((-51.2, -51.2), (0.8, 0.8), (128, 128))
TOLERANCE = 1e-3
"""Largest difference between both results relative to the largest value: the cumulative sum's own error."""


@dataclass(frozen=True)
class Case:
    """One problem: operands, and the tables of both methods.

    depth: (N, D, h, w). context: (N, h, w, C). order: (P,) flat frustum indices sorted by cell.
    last: (P,) True at a cell's last point. cells: (cells hit,). points: tables of the embedding bag.
    """

    depth: Tensor
    context: Tensor
    order: Tensor
    last: Tensor
    cells: Tensor
    points: BatchedPoints

    @property
    def rows(self) -> Tensor:
        """Context rows (N * h * w, C)."""
        return self.context.flatten(0, 2)


def make_case(bins: int = 118, channels: int = 80, seed: int = 0, device: str = "cpu") -> Case:
    """Return random features of a level ring of six cameras, with the geometry of a nuScenes car."""
    lift = replace(LiftConfig(), depth=DepthConfig(1.0, 60.0, 59.0 / bins), channels=channels)
    model = LiftSplatModel(image=ImageConfig(704, 256), lift=lift, bev=BEV)
    points = _ring_points(model)
    generator = torch.Generator().manual_seed(seed)
    depth = torch.randn(CAMERA_COUNT, bins, 16, 44, generator=generator).softmax(1)
    context = torch.randn(CAMERA_COUNT, 16, 44, channels, generator=generator)
    last = np.diff(points.cell, append=-1) != 0
    tables = batch_points([points], np.zeros((1, CAMERA_COUNT, 1, 1, 1), np.float32), model)
    return Case(
        depth.to(device),
        context.to(device),
        torch.from_numpy(points.depth).long().to(device),
        torch.from_numpy(last).to(device),
        torch.from_numpy(points.cell[last]).long().to(device),
        tables.to(device),
    )


def _ring_points(model: LiftSplatModel) -> LiftPoints:
    intrinsic = np.array([[557.0, 0, 352], [0, 557, 76], [0, 0, 1]])
    poses = np.tile(np.eye(4), (CAMERA_COUNT, 1, 1))
    for pose, yaw in zip(poses, np.deg2rad([55, 0, -55, 110, 180, -110]), strict=True):
        sin, cos = np.sin(yaw), np.cos(yaw)
        pose[:3, :3] = np.array([[sin, 0, cos], [-cos, 0, sin], [0, -1, 0]])
        pose[:3, 3] = 0.9 + cos, sin, 1.5
    intrinsics = np.tile(intrinsic, (CAMERA_COUNT, 1, 1))
    size = (model.image.width, model.image.height)
    return lift_points(intrinsics, poses, size, model.lift, model.bev)


def pool_by_bag(case: Case) -> Tensor:
    """Pool as our networks do, (Y * X, C)."""
    return splat(case.rows, case.depth.flatten(), case.points)


def pool_by_cumsum(case: Case) -> Tensor:
    """Pool as Philion & Fidler (2020) do: lift everything, sort, sum up, subtract at cell borders."""
    volume = case.depth[..., None] * case.context[:, None]  # (N, D, h, w, C)
    kept = volume.flatten(0, 3)[case.order]  # (P, C), sorted by cell
    sums: Tensor = _BorderSums.apply(kept, case.last)
    bev = sums.new_zeros(BEV.size, sums.shape[1])
    bev[case.cells] = sums
    return bev


class _BorderSums(torch.autograd.Function):
    """Sums of runs by one cumulative sum; backward hands a run's gradient to each of its members."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: Tensor) -> Tensor:
        total = x.cumsum(0)[last]
        ctx.save_for_backward(last)
        return torch.cat([total[:1], total[1:] - total[:-1]])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (last,) = ctx.saved_tensors
        run = last.cumsum(0) - last.long()
        return gradient[run], None


def forward_backward(pool: Callable[[Case], Tensor], case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that pools and computes the gradients of depth and context."""
    depth, context = (v.clone().requires_grad_() for v in (case.depth, case.context))
    trainable = replace(case, depth=depth, context=context)
    gradient = torch.randn(BEV.size, case.context.shape[-1], device=case.depth.device)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pool(trainable), (depth, context), gradient)

    return call


def run(options: Options) -> Report:
    """Measure forward, forward with backward, and on the CPU the memory of one forward call."""
    torch.set_num_threads(options.threads or 1)
    device = bench_device()
    case = make_case(device=device)
    pools = {"cumsum": pool_by_cumsum, "bag": pool_by_bag}
    calls: dict[str, Callable[[], object]] = {n: partial(f, case) for n, f in pools.items()}
    trained = {n: forward_backward(f, case) for n, f in pools.items()}
    difference = _check_equal(case)
    with torch.no_grad():
        forward = run_interleaved(waiting(calls, device), options.rounds)
        peak = peak_bytes(calls["bag"]) if device == "cpu" else None
    both = run_interleaved(waiting(trained, device), options.rounds)
    ratios = {
        "forward_vs_cumsum": speedup(forward["cumsum"], forward["bag"], device),
        "forward_backward_vs_cumsum": speedup(both["cumsum"], both["bag"], device),
    }
    if peak is not None:  # all that a call allocates, its output included
        output = BEV.size * case.context.shape[-1]
        ratios["peak_extra_vs_io"] = peak / (4 * (case.context.numel() + output))
    values = {
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "points": len(case.order),
        "cells_hit": len(case.cells),
        "relative_difference": difference,
        **{f"forward_{n}": vars(t) for n, t in forward.items()},
        **{f"forward_backward_{n}": vars(t) for n, t in both.items()},
    }
    return Report("pooling", values, ratios)


def _check_equal(case: Case) -> float:
    want, got = pool_by_cumsum(case), pool_by_bag(case)
    difference = float((want - got).abs().max() / got.abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the two poolings differ by {difference:.1e} of the largest value")
    return difference
