"""What `occbev-train bench` does; its arguments and its help are in arguments/bench.py."""

from __future__ import annotations

import argparse

from occbev.benchmarks import Options
from occbev.cli.bench import run_benches
from occbev_training.cli.arguments.bench import BENCHES


def run(args: argparse.Namespace) -> int:
    """Run benchmarks and print what they found."""
    if args.rounds < 1 or args.threads < 1:
        raise ValueError(f"--rounds {args.rounds} --threads {args.threads}: both at least 1")
    options = Options(args.rounds, threads=args.threads)
    return run_benches(args, BENCHES, "occbev_training.benchmarks.{}".format, options, "occbev-train bench")
