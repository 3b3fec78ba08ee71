"""Damaged images, rigs, result files, packages and bags by the thousand: each must be read, or refused in one line.

occbev-train fuzz                         # 10,000 images, rigs and results, 1,000 packages and bags: some minutes
occbev-train fuzz bags --count 200 --seed 3
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from occbev_training.benchmarks.fuzz import COUNTS, Outcome, fuzz


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(COUNTS)} (default: all)")
    parser.add_argument("--count", type=int, help="inputs of each kind (default: 10,000, of packages and bags 1,000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other inputs (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Try all inputs; the status is 1 where one ended in a traceback or a hang."""
    unknown = sorted(set(args.kinds) - set(COUNTS))
    if unknown or (args.count or 1) < 1:
        raise ValueError(f"{unknown or args.count}: want kinds of {list(COUNTS)} and a --count of at least 1")
    console, holds = Console(), True
    for kind in args.kinds or COUNTS:
        with tempfile.TemporaryDirectory() as folder, console.status(kind):
            outcome = fuzz(kind, args.count or COUNTS[kind], Path(folder), args.seed)
        _print(console, kind, outcome)
        holds &= outcome.holds
    return 0 if holds else 1


def _print(console: Console, kind: str, outcome: Outcome) -> None:
    refused = ", ".join(f"{count} {name}" for name, count in outcome.refused.most_common())
    console.print(
        f"{kind}: {outcome.tried} tried, {outcome.read} read, refused: {refused or 'none'}; {len(outcome.tracebacks)} "
        f"tracebacks, {len(outcome.hangs)} hangs; slowest {outcome.slowest_s:.2f} s, memory grew by "
        f"{outcome.grown_mb:.0f} MB",
        highlight=False,
    )
    for text, number in outcome.tracebacks.items():
        console.print(f"  input {number}: {escape(text)}", highlight=False)
    for number in outcome.hangs:
        console.print(f"  input {number}: hangs", highlight=False)
