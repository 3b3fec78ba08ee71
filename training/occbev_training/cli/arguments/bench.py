"""Measure parts of training on this machine, beside plain baselines in the same process.

occbev-train bench attention --rounds 5 --json
occbev-train bench all --markdown docs/benchmarks.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from occbev.cli.bench import add_bench_arguments

BENCHES: Mapping[str, str] = {
    "labels": "occupancy labels: a full label, and its traversal against plain ray casting",
    "attention": "BEVFormer's spatial cross-attention against padded queries and grid samples",
    "pooling": "Lift-Splat pooling against the cumulative sum of Lift-Splat-Shoot",
    "evaluation": "detection scores against nuscenes-devkit's own loop, and RayIoU of one sample",
    "encoder": "image encoders: eager, folded, compiled, ONNX Runtime, OpenVINO, fp32 and int8",
    "space": "cells that a ground grid calls blocked, free or unknown, against the truth",
    "realism": "pictures of the simulated worlds against real ones: texture, exposure, spectrum; rendering cost",
    "trainer": "the training loop: what of a step is not forward, backward or optimiser",
}
"""Name -> one line of help. Each is `occbev_training.benchmarks.<name>` with `run(options) -> Report`."""


JOINED: Mapping[str, str] = {
    "gpu": "in one run what only a GPU can tell: attention, encoder, training, bf16",
}
"""Those that run others, and so are not part of all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_bench_arguments(parser, {**BENCHES, **JOINED}, rounds=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
