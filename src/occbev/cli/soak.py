"""Run the perception node for long on a looped bag, faster than real time, and check that nothing grows.

    occbev soak out/demo/drive-*/bag --minutes 30 --rate 2

It compares the last minute with the first one after the start: resident memory (less than 2 % more), threads and open
files (none more), the 99th percentile of latency (at most 1.2 times). Published stamps must increase in every pass of
the bag. Transport may lose at most 0.5 % of the anchor camera's images; every other one has its outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from occbev import graph
from occbev.cli.replay import changes, drain, perception_process
from occbev.messages.bags import BagReader
from occbev.reports.soak import Watch, account
from occbev.reports.summaries import LOST, frames_of
from occbev.share import here_or_shipped
from occbev.streams.frame_log import read_frame_log
from occbev.streams.parameters import PerceptionParameters, read_parameters

if TYPE_CHECKING:
    from occbev.ros.player_node import PlayerLog

MOST_LOST = 0.005
"""Largest share of frames that transport may lose on its way to the node."""

SHOWN = ("rss_mb", "threads", "files", "results", "latency_p50_ms", "latency_p99_ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("bag", type=Path, help="bag folder, or one .mcap or .db3 file")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the run")
    parser.add_argument("--rate", type=float, default=2.0, help="playback speed; 1 is the bag's own")
    parser.add_argument("--params-file", type=here_or_shipped, help="ROS parameter file of the node")
    parser.add_argument("--model", default="", help="model package: a folder or a shipped name")
    parser.add_argument("--backend", default="", help="inference runtime")
    parser.add_argument("--set", action="append", default=[], metavar="NAME:=VALUE", help="a parameter of the node")
    parser.add_argument("--wait", type=float, default=90.0, help="seconds to wait until the node is ready")
    parser.add_argument("--node-log", type=Path, help="file for the node's messages; default: standard error")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")


def run(args: argparse.Namespace) -> int:
    """Run and print the figures; 1 if something grew, came out of order or is unaccounted for."""
    if args.minutes <= 0 or args.rate <= 0:
        raise ValueError(f"--minutes {args.minutes} and --rate {args.rate} must be positive")
    args.namespace = ""
    path = args.params_file or Path(graph.params_file({}))
    record = _soak(args, path, read_parameters(path, changes(args)))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    _print(record)
    return 1 if record["broken"] else 0


def _soak(args: argparse.Namespace, path: Path, parameters: PerceptionParameters) -> dict[str, Any]:
    from occbev.allocator import keep_large_blocks
    from occbev.ros import player_node
    from occbev.ros.transport import use_large_image_profile

    with BagReader(args.bag) as bag, contextlib.ExitStack() as stack:
        planned = player_node.plan(bag, parameters)
        use_large_image_profile()
        keep_large_blocks()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="occbev_soak_")))
        frame_log = folder / "node.jsonl"
        node = stack.enter_context(perception_process(args, path, frame_log))
        context = player_node.start_context()
        stack.callback(context.try_shutdown)
        player = player_node.PlayerNode(bag, planned, parameters, rate=args.rate, context=context)
        stack.callback(player.destroy_node)
        stack.enter_context(player_node.Spinner(player))
        player.wait_for_perception(args.wait, lambda: node.poll() is None)
        begin_ns = time.monotonic_ns()
        with Watch(node.pid) as watch, _stop_after(args.minutes * 60, player.stop):
            player.play(lambda _: None, lambda: node.poll() is None, sys.maxsize)
        end_ns = time.monotonic_ns()
        drain(player, frame_log)
        lines = read_frame_log(frame_log)
        record = account(watch.samples, lines, (begin_ns, end_ns))
        return _with_stamps(record, args, player.log, lines, parameters.anchor_camera)


@contextlib.contextmanager
def _stop_after(seconds: float, stop: Any) -> Any:
    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _with_stamps(
    record: dict[str, Any],
    args: argparse.Namespace,
    book: PlayerLog,
    lines: list[dict[str, Any]],
    anchor: str,
) -> dict[str, Any]:
    """Add what became of every frame, and whether stamps increased within each pass of the bag."""
    frames = frames_of(book.anchors, book.sent, lines, anchor)
    outcomes = Counter(frame["outcome"] for frame in frames)
    passes = max(Counter(book.anchors).values())
    steps_back = {topic: _steps_back([s for s, _ in m]) for topic, m in book.received.items()}
    unordered = sum(max(0, count - (passes - 1)) for count in steps_back.values())
    broken = list(record["broken"])
    if outcomes[LOST] > MOST_LOST * len(frames):
        broken.append(f"{outcomes[LOST]} of {len(frames)} frames never reached the node")
    if unordered:
        broken.append(f"{unordered} results were published out of order")
    about = {"bag": str(args.bag), "rate": args.rate, "minutes": args.minutes, "passes": passes}
    return {
        **about,
        "frames": len(frames),
        "outcomes": dict(outcomes),
        "out_of_order": unordered,
        **record,
        "broken": broken,
    }


def _steps_back(stamps: list[int]) -> int:
    return sum(b <= a for a, b in itertools.pairwise(stamps))


def _print(record: dict[str, Any]) -> None:
    console = Console(stderr=True, highlight=False)
    outcomes = ", ".join(f"{name} {count}" for name, count in record["outcomes"].items())
    console.print(
        f"{record['minutes']:g} min at {record['rate']:g}x, {record['passes']} passes, {record['frames']} frames: {outcomes}"
    )
    seconds = record["first"]["seconds"]
    table = Table("", f"first {seconds:g} s", f"last {seconds:g} s")
    for key in SHOWN:
        table.add_row(key, str(record["first"][key]), str(record["last"][key]))
    console.print(table)
    for text in record["broken"]:
        console.print(f"[red]{text}[/red]")
