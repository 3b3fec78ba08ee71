"""What only a GPU can tell, in one run: attention, encoder, training, and how far bf16 is off.

Without a GPU the same runs on the CPU, which only shows that it runs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from occbev.benchmarks import Options, Report
from occbev.config import ModelConfig
from occbev.inference.example_inputs import example_inputs, relative_difference
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev_training.benchmarks import attention, encoder, trainer
from occbev_training.benchmarks.measure import bench_device
from occbev_training.models.build import build_model
from occbev_training.models.families import make_graph

BATCH = 32
"""Samples of one step on a GPU, as `occbev-tiny` was trained with."""


def run(options: Options) -> Report:
    """Run every part on the device and join what they report."""
    device = bench_device()
    values: dict[str, Any] = {"device": describe(device), "torch": str(torch.__version__)}
    ratios: dict[str, float] = {}
    for bench in (attention, encoder):
        report = bench.run(options)
        values[report.bench] = dict(report.values)
        ratios |= {f"{report.bench}.{name}": ratio for name, ratio in report.ratios.items()}
    values["bf16_difference"] = bf16_differences(LiftSplatModel(), device)
    values["training"] = train(options, device)
    return Report("gpu", values, ratios)


def describe(device: str) -> str:
    """Return what the device is, in words."""
    return torch.cuda.get_device_name() if device == "cuda" else "no GPU: the CPU"


def bf16_differences(model: ModelConfig, device: str) -> dict[str, float]:
    """Return how far each output of a network with random weights moves under bf16, relative to its largest value."""
    torch.manual_seed(0)
    graph = make_graph(build_model(model, "finetune"), "native").eval().to(device)
    inputs = example_inputs(model, graph.form, 6, seed=1)
    tensors = [torch.from_numpy(inputs[name]).to(device) for name in graph.inputs]
    with torch.inference_mode():
        exact = graph(*tensors)
        with torch.autocast(device, torch.bfloat16):
            rough = graph(*tensors)
    pairs = zip(graph.outputs, exact, rough, strict=True)
    return {name: relative_difference(a.float().cpu().numpy(), b.float().cpu().numpy()) for name, a, b in pairs}


def train(options: Options, device: str) -> dict[str, Any]:
    """Train both stages for a few steps; on a GPU with large batches and a worker process for all cores but two."""
    cores = os.cpu_count() or 1
    batch, workers = (BATCH, max(1, cores - 2)) if device == "cuda" else (2, 1)
    values: dict[str, Any] = {"batch": batch, "workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        cache = trainer.random_cache(Path(folder) / "cache", LiftSplatModel())
        values["loader_cpu_s_per_sample"] = trainer.measure_loader(cache, LiftSplatModel(), options.rounds)
        for stage in ("pretrain", "finetune"):
            share = trainer.measure(stage, cache, Path(folder) / stage, options, batch, workers)
            values |= {f"{stage}_{name}": value for name, value in share.items()}
    return values
