"""Measure the stack on this machine, beside named baselines in the same process.

occbev bench pipeline --rounds 20 --json
occbev bench live --rate 20 --json
occbev bench all --markdown docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from occbev.benchmarks import LiveOptions, Options, Report
from occbev.benchmarks.markdown import flatten, write_section
from occbev.cli.progress import status

BENCHES: Mapping[str, str] = {
    "pipeline": "images to boxes and voxels without ROS, by stage and runtime",
    "sync": "the synchroniser beside the classic approximate-time search",
    "transport": "images between two processes, with the shipped settings and with the defaults",
    "clouds": "30,000 labelled voxels to a PointCloud2, beside the usual way",
    "live": "the node under simulated cameras in real time, over DDS: sets, latency, processor time, memory",
}
"""Name -> one line of help. Each is `occbev.benchmarks.<name>` with `run(options) -> Report`."""

OTHER_MODULES: Mapping[str, str] = {
    "sync": "occbev.ros.bench_sync",
    "transport": "occbev.ros.bench_transport",
    "clouds": "occbev.ros.bench_clouds",
    "live": "occbev.cli.bench_live",
}
"""Modules of those that know ROS or, inside a command, the simulator."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_bench_arguments(parser, BENCHES, rounds=20)
    parser.add_argument("--model", default="occbev-tiny", help="model package: a folder, or the name of a shipped one")
    parser.add_argument("--threads", type=int, help="CPU threads of the runtimes (default: the runtime decides)")
    live = parser.add_argument_group("live")
    live.add_argument(
        "--size", type=image_size, default=(1600, 900), metavar="WxH", help="of images (default 1600x900)"
    )
    live.add_argument("--cameras", type=int, default=6, help="number of cameras (default 6)")
    live.add_argument("--rate", type=float, default=10.0, help="image sets a second (default 10)")
    live.add_argument("--seconds", type=float, default=15.0, help="how long images come (default 15)")


def run(args: argparse.Namespace) -> int:
    """Run benchmarks and print what they found."""
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: at least 1")
    live = (args.size, args.cameras, args.rate, args.seconds)
    options = LiveOptions(args.rounds, args.model, args.threads, *live)
    return run_benches(args, BENCHES, module_of, options, "occbev bench")


def module_of(bench: str) -> str:
    """Return the full name of a benchmark's module."""
    return OTHER_MODULES.get(bench, f"occbev.benchmarks.{bench}")


def image_size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT; raises argparse.ArgumentTypeError saying what is wanted."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 16:
        raise argparse.ArgumentTypeError(f"{text!r}: want WIDTHxHEIGHT of at least 16 pixels each, such as 640x360")
    return width, height


def add_bench_arguments(parser: argparse.ArgumentParser, benches: Mapping[str, str], rounds: int) -> None:
    """Declare the options of every bench command."""
    listing = "; ".join(f"{name}: {text}" for name, text in benches.items())
    parser.add_argument("bench", choices=(*benches, "all"), help=f"{listing}; all: one after the other")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds per method (default: {rounds})")
    parser.add_argument("--json", action="store_true", help="print one JSON object per benchmark instead of tables")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write each result into its section of FILE: docs/benchmarks.md"
    )


def run_benches(
    args: argparse.Namespace, benches: Iterable[str], module_of: Callable[[str], str], options: Options, command: str
) -> int:
    """Run the benchmark that `args` names, or all, and print or write what each found."""
    console = Console(stderr=args.json)
    for name in benches if args.bench == "all" else (args.bench,):
        module = importlib.import_module(module_of(name))
        with status(console, f"{name}, {args.rounds} rounds"):
            report: Report = module.run(options)
        record = report.as_record()
        if args.json:
            print(json.dumps(record, indent=2))
        else:
            print_record(record, console)
        if args.markdown is not None:
            line = report.command or f"{command} {name} --rounds {args.rounds}"
            write_section(args.markdown, record, line, heading=report.heading)
    return 0


def print_record(record: dict[str, Any], console: Console) -> None:
    """Print a report as tables of keys and values."""
    for title in ("machine", "values", "ratios"):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        table.add_column(no_wrap=True)
        for key, value in flatten(record[title]):
            table.add_row(escape(key), escape(str(value)))
        console.print(table)
