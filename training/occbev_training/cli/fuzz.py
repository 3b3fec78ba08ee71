"""What `occbev-train fuzz` does; its arguments and its help are in arguments/fuzz.py."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from occbev.cli.progress import status
from occbev_training.benchmarks.fuzz import COUNTS, Outcome, fuzz


def run(args: argparse.Namespace) -> int:
    """Try all inputs; the status is 1 where one ended in a traceback or a hang."""
    unknown = sorted(set(args.kinds) - set(COUNTS))
    if unknown or (args.count or 1) < 1:
        raise ValueError(f"{unknown or args.count}: want kinds of {list(COUNTS)} and a --count of at least 1")
    console, holds = Console(), True
    for kind in args.kinds or COUNTS:
        with tempfile.TemporaryDirectory() as folder, status(console, kind):
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
