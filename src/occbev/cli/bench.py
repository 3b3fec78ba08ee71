"""Measure the stack on this machine, beside named baselines in the same process.

occbev bench pipeline --rounds 20 --json
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from occbev.benchmarks import Options, Report

BENCHES: Mapping[str, str] = {
    "pipeline": "images to boxes and voxels without ROS, by stage and runtime",
    "sync": "the synchroniser beside the classic approximate-time search",
    "transport": "images between two processes, with the shipped settings and with the defaults",
    "clouds": "30,000 labelled voxels to a PointCloud2, beside the usual way",
}
"""Name -> one line of help. Each is `occbev.benchmarks.<name>` with `run(options) -> Report`."""

ROS_BENCHES: Mapping[str, str] = {
    "sync": "bench_sync",
    "transport": "bench_transport",
    "clouds": "bench_clouds",
}
"""Those that know ROS and so live in `occbev.ros`, by module."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    listing = "; ".join(f"{name}: {text}" for name, text in BENCHES.items())
    parser.add_argument("bench", choices=tuple(BENCHES), help=listing)
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds of each method (default: 20)")
    parser.add_argument("--model", default="occbev-tiny", help="model package, by name or folder")
    parser.add_argument("--threads", type=int, help="CPU threads of the runtimes (default: their own choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Run one benchmark and print what it found."""
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: at least 1")
    module = importlib.import_module(module_of(args.bench))
    console = Console(stderr=args.json)
    with console.status(f"{args.bench}, {args.rounds} rounds"):
        report: Report = module.run(Options(args.rounds, args.model, args.threads))
    if args.json:
        print(json.dumps(report.as_record(), indent=2))
    else:
        print_record(report.as_record(), console)
    return 0


def module_of(bench: str) -> str:
    """Return the full name of a benchmark's module."""
    return f"occbev.ros.{ROS_BENCHES[bench]}" if bench in ROS_BENCHES else f"occbev.benchmarks.{bench}"


def print_record(record: dict[str, Any], console: Console) -> None:
    """Print a report as tables of keys and values."""
    for title in ("machine", "values", "ratios"):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        table.add_column(no_wrap=True)
        for key, value in _flatten(record[title]):
            table.add_row(escape(key), escape(str(value)))
        console.print(table)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys as dotted ones, in order."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        rows += _flatten(value, f"{dotted}.") if isinstance(value, Mapping) else [(dotted, value)]
    return rows
