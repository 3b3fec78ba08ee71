"""Measure parts of networks on this machine, beside plain baselines in the same process.

occbev-train bench attention --rounds 5 --json
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping

from rich.console import Console

from occbev.benchmarks import Options, Report
from occbev.cli.bench import print_record

BENCHES: Mapping[str, str] = {
    "labels": "occupancy labels: a full label, and its traversal against plain ray casting",
    "attention": "BEVFormer's spatial cross-attention against padded queries and grid samples",
    "pooling": "Lift-Splat pooling against the cumulative sum of Lift-Splat-Shoot",
    "evaluation": "detection scores against nuscenes-devkit's own loop, and RayIoU of one sample",
    "encoder": "image encoders: eager, folded, compiled, ONNX Runtime, OpenVINO, fp32 and int8",
    "trainer": "the training loop: what of a step is not forward, backward or optimiser",
}
"""Name -> one line of help. Each is `occbev_training.benchmarks.<name>` with `run(options) -> Report`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    listing = "; ".join(f"{name}: {text}" for name, text in BENCHES.items())
    parser.add_argument("bench", choices=tuple(BENCHES), help=listing)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run one benchmark and print what it found."""
    if args.rounds < 1 or args.threads < 1:
        raise ValueError(f"--rounds {args.rounds} --threads {args.threads}: both at least 1")
    module = importlib.import_module(f"occbev_training.benchmarks.{args.bench}")
    console = Console(stderr=args.json)
    with console.status(f"{args.bench}, {args.rounds} rounds"):
        report: Report = module.run(Options(args.rounds, threads=args.threads))
    if args.json:
        print(json.dumps(report.as_record(), indent=2))
    else:
        print_record(report.as_record(), console)
    return 0
