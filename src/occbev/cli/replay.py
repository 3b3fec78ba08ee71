"""Play a recorded bag (sqlite3 or MCAP) through the perception node over real DDS, or without ROS by --offline.

    occbev replay my_bag --model out/mine/package             # topics are found if they are not those of the shipped file
    occbev replay my_bag --params-file vehicle/perception.yaml --record out/results
    occbev replay my_bag --no-node                            # only play: the node runs elsewhere
    occbev replay my_bag --offline --boxes out/boxes.jsonl    # no ROS, as fast as the machine allows

The node runs as a process of its own. Every image of the anchor camera is accounted for: processed, or dropped with
its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from occbev import graph
from occbev.allocator import keep_large_blocks
from occbev.cli.progress import Progress
from occbev.cli.rig import find_parameter_file
from occbev.cli.run import PARENT_VARIABLE, end_group
from occbev.messages.bags import BagReader
from occbev.reports.summaries import LOST, UNANSWERED, frames_of, summarise
from occbev.share import here_or_shipped
from occbev.streams.frame_log import FrameLogReader, read_frame_log
from occbev.streams.kept_inputs import keep_inputs
from occbev.streams.parameters import PerceptionParameters, read_parameters
from occbev.streams.run_report import write_run_report

if TYPE_CHECKING:
    from occbev.ros.player_node import PlayerNode

IDLE_S = 10.0
"""Silence after the last message that ends the wait for results."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("bag", type=Path, help="bag folder, or one .mcap or .db3 file")
    parser.add_argument("--rate", type=float, default=1.0, help="playback speed; 1 is the bag's own")
    parser.add_argument("--loop", type=int, default=1, metavar="N", help="play the bag N times (default: once)")
    parser.add_argument("--record", type=Path, help="new bag folder for what the node reads and publishes")
    parser.add_argument(
        "--inputs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="record what the node reads, too: images as JPEG, calibration, transforms, odometry (default: yes)",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE.html", help="with --record: a page with cameras and 3D scene"
    )
    parser.add_argument("--params-file", "--params", type=here_or_shipped, help="ROS parameter file of the node")
    parser.add_argument("--model", default="", help="model package: a folder or a shipped name")
    parser.add_argument("--backend", default="", help="inference runtime")
    parser.add_argument("--set", action="append", default=[], metavar="NAME:=VALUE", help="a parameter of the node")
    parser.add_argument("--node", action=argparse.BooleanOptionalAction, default=True, help="start the node as well")
    parser.add_argument("--namespace", default="", help="namespace of the node")
    parser.add_argument("--wait", type=float, default=90.0, help="seconds to wait until the node is ready")
    parser.add_argument("--node-log", type=Path, help="file for the node's messages; default: standard error")
    parser.add_argument(
        "--offline", action="store_true", help="run without ROS, as fast as possible, without dropping a frame"
    )
    parser.add_argument("--boxes", type=Path, help="with --offline: file for one JSON line of boxes per result")
    parser.add_argument("--json", type=Path, help="JSON file for the summary and the outcome of every frame")


def run(args: argparse.Namespace) -> int:
    """Replay and print the summary; 1 if nothing was processed or a frame is unaccounted for."""
    if args.rate <= 0:
        raise ValueError(f"--rate {args.rate} must be positive")
    if args.loop < 1 or (args.loop > 1 and (args.offline or args.record)):
        raise ValueError(
            f"--loop {args.loop}: must be at least 1, and 1 with --offline or --record, whose stamps must be unique"
        )
    _refuse_what_does_nothing(args)
    keep_large_blocks()
    with tempfile.TemporaryDirectory(prefix="occbev_topics_") as folder:
        return _replay(args, parameter_file(args, Path(folder)))


def parameter_file(args: argparse.Namespace, folder: Path) -> Path:
    """Return the given parameter file, else the one for the bag; a node that runs elsewhere has a file of its own."""
    if args.params_file or not args.node:
        return args.params_file or Path(graph.params_file({}))
    return find_parameter_file(args.bag, changes(args), folder)


def _replay(args: argparse.Namespace, path: Path) -> int:
    if args.offline:
        from occbev.streams.offline import replay_offline

        parameters = read_parameters(path, changes(args))
        encode = None
        if args.record:
            from occbev.ros.outputs import encoder

            encode = encoder(parameters)
        result = replay_offline(args.bag, parameters, args.record, args.boxes, encode, args.inputs)
    else:
        try:
            result = _replay_live(args, path, read_parameters(path, changes(args)))
        except KeyboardInterrupt:
            if args.node:
                raise
            return 0  # a bare player is a node like others: a signal is how it ends
    summary = result["summary"]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))
    if args.report:
        write_run_report(args.report, args.bag, args.record, read_parameters(path, changes(args)), result)
    _print(summary)
    accounted = summary["frames_in"] == summary["frames_processed"] + sum(summary["drops"].values())
    return 0 if summary["frames_processed"] and accounted else 1


def _refuse_what_does_nothing(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that the chosen kind of replay does not use."""
    of_live = {
        "--rate": args.rate != 1.0,
        "--no-node": not args.node,
        "--namespace": bool(args.namespace),
        "--node-log": args.node_log is not None,
    }
    useless = [name for name, given in of_live.items() if given and args.offline]
    if useless:
        raise ValueError(f"{', '.join(useless)} cannot be used with --offline, which runs no node")
    if args.report and not args.record:
        raise ValueError("--report needs --record: the page shows the recorded bag")
    if args.boxes and not args.offline:
        raise ValueError("--boxes needs --offline; the boxes of a node are in the bag of --record")


def changes(args: argparse.Namespace) -> dict[str, str]:
    """Return the node's parameters that options give, as they are typed."""
    given = {name: getattr(args, name) for name in ("model", "backend") if getattr(args, name)}
    for text in args.set:
        name, separator, value = text.partition(":=")
        if not separator:
            raise ValueError(f"--set {text}: want NAME:=VALUE")
        given[name] = value
    return given


def _replay_live(args: argparse.Namespace, path: Path, parameters: PerceptionParameters) -> dict[str, Any]:
    from occbev.ros import player_node
    from occbev.ros.transport import use_large_image_profile

    with BagReader(args.bag) as bag, contextlib.ExitStack() as stack:
        planned = player_node.plan(bag, parameters, args.namespace)
        for topic, reason in planned.skipped.items():
            print(f"not played: {topic}: {reason}", file=sys.stderr)
        use_large_image_profile()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="occbev_replay_")))
        frame_log = folder / "node.jsonl"
        node = stack.enter_context(perception_process(args, path, frame_log)) if args.node else None
        writer = player_node.open_writer(args.record, args.namespace)
        context = player_node.start_context()
        stack.callback(context.try_shutdown)
        player = player_node.PlayerNode(
            bag,
            planned,
            parameters,
            rate=args.rate,
            namespace=args.namespace,
            writer=writer,
            context=context,
        )
        stack.callback(player.destroy_node)
        if writer is not None:
            stack.enter_context(writer)
        with player_node.Spinner(player):
            _drive(player, args, node, frame_log)
        if node is not None:
            end_group(node)
        result = _account(args, parameters, player, frame_log)
        if writer is not None and args.inputs:
            keep_inputs(writer, bag, parameters, result["frames"], args.namespace)
        return result


def _drive(player: PlayerNode, args: argparse.Namespace, node: subprocess.Popen[bytes] | None, frame_log: Path) -> None:
    """Wait for the node, play, wait for the last results."""

    def alive() -> bool:
        return node is None or node.poll() is None

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("waiting for the node", total=None)
        player.wait_for_perception(args.wait, alive)
        progress.update(task, description=f"playing {args.bag.name}, percent", total=100)
        player.play(lambda share: progress.update(task, completed=round(100 * share)), alive, args.loop)
        progress.update(task, description="waiting for the last results", completed=99)
        drain(player, frame_log if node is not None else None)


def drain(player: PlayerNode, frame_log: Path | None) -> None:
    """Return when every anchor image has its outcome, or nothing has come for a while."""
    quiet_since, seen = time.monotonic(), -1
    wanted, done = Counter(player.log.anchors), Counter[int]()
    reader = FrameLogReader(frame_log) if frame_log is not None else None
    while time.monotonic() - quiet_since < IDLE_S:
        came = [Counter(s for s, _ in messages) for messages in player.log.received.values()]
        if reader is not None:
            done.update(line["stamp_ns"] for line in reader.new())
        else:
            done = reduce(or_, came, Counter())
        if not wanted - done:
            time.sleep(0.2)  # the last result is on its way
            return
        count = done.total() + sum(counter.total() for counter in came)
        if count != seen:
            quiet_since, seen = time.monotonic(), count
        time.sleep(0.05)


@contextlib.contextmanager
def perception_process(args: argparse.Namespace, path: Path, frame_log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the perception node as a child in a process group of its own; whatever happens, it ends with us."""
    values = {
        "params_file": path,
        "model": args.model,
        "backend": args.backend,
        "namespace": args.namespace,
    }
    assignments = [f"{name}:={value}" for name, value in values.items() if value]
    assignments += ["use_sim_time:=true", f"frame_log_path:={frame_log}", *args.set]
    command = [sys.executable, "-m", "occbev", "run", *assignments]
    with contextlib.ExitStack() as stack:
        if args.node_log:
            args.node_log.parent.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(args.node_log.open("wb")) if args.node_log else None
        process = subprocess.Popen(
            command,
            stdout=log or sys.stderr,
            stderr=log or None,
            start_new_session=True,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
        )
        try:
            yield process
        finally:
            end_group(process)


def _account(
    args: argparse.Namespace, parameters: PerceptionParameters, player: PlayerNode, frame_log: Path
) -> dict[str, Any]:
    """Join the player's log and the node's frame log."""
    book = player.log
    lines = read_frame_log(frame_log) if args.node else _lines_from_results(player)
    unrecorded = LOST if args.node else UNANSWERED
    frames = frames_of(book.anchors, book.sent, lines, parameters.anchor_camera, unrecorded)
    published = {topic: len(messages) for topic, messages in book.received.items()}
    fallback_sets = len({line["stamp_ns"] for line in lines} - set(book.anchors))
    summary = summarise(frames, published, fallback_sets)
    return {
        "bag": str(args.bag),
        "rate": args.rate,
        "offline": False,
        "summary": summary,
        "player": {"lag_ms": round(book.lag_ns / 1e6, 2), "published": book.published},
        "frames": frames,
    }


def _lines_from_results(player: PlayerNode) -> list[dict[str, Any]]:
    """Make the frame log of a node that was started elsewhere: a key time with a result was processed."""
    arrived: dict[tuple[int, int], int] = {}
    for messages in player.log.received.values():
        passes: Counter[int] = Counter()
        for stamp, steady in messages:
            key = (stamp, passes[stamp])
            passes[stamp] += 1
            arrived[key] = max(steady, arrived.get(key, 0))
    nearest = {
        stamp: {c: min(sent, key=lambda s: abs(s - stamp)) for c, sent in player.log.sent.items() if sent}
        for stamp, _ in arrived
    }
    return [
        {
            "stamp_ns": stamp,
            "outcome": "processed",
            "at_ns": steady,
            "images": nearest[stamp],
            "cameras": sorted(nearest[stamp]),
            "missing": {},
            "boxes": None,
            "stages_ms": {},
            "published_ns": steady,
        }
        for (stamp, _), steady in sorted(arrived.items(), key=lambda item: item[1])
    ]


def _print(summary: dict[str, Any]) -> None:
    console = Console(stderr=True, highlight=False)
    share = summary["frames_processed"] / max(1, summary["frames_in"])
    drops = ", ".join(f"{reason} {count}" for reason, count in summary["drops"].items()) or "none"
    console.print(
        f"{summary['frames_processed']} of {summary['frames_in']} frames processed ({share:.1%}), "
        f"{summary['rate_hz']:.2f} Hz; dropped: {drops}"
    )
    if summary["drops"].get("replaced_by_newer"):
        console.print(
            "replaced_by_newer: images came faster than this machine processes them; --rate 0.5 plays at half speed, "
            "--offline drops nothing",
            soft_wrap=True,
        )
    table = Table("stage", "p50 ms", "p95 ms", title="latency", title_justify="left")
    for stage, values in summary["latency_ms"].items():
        table.add_row(stage, f"{values['p50']:.1f}", f"{values['p95']:.1f}")
    console.print(table)
