"""Show the running nodes in a terminal, from /diagnostics: cameras, time offsets, drops by reason, latency.

occbev monitor
occbev monitor --json
occbev monitor --check      # status 0 while a node reports and has no error: for health checks
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from occbev.ros.monitor_node import Listener, Part

Nodes = Mapping[str, Mapping[str, "Part"]]
"""Full name of a perception node -> name of a part -> its newest state."""

COLOURS = {0: "green", 1: "yellow", 2: "red"}
LEVELS = {0: "ok", 1: "warning", 2: "error"}
ERROR = 2
STALE_S = 3.0
"""A node that was not heard for this long is shown as stale."""

ROUND_S = 1.5
"""Within so many seconds every node reports once."""

WHOLE, LATENCY = "perception", "latency"
REMARKS = ("transforms", "ego motion", "model")
CAMERA_COLUMNS = ("rate_hz", "age_s", "offset_ms", "received", "used")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print the first report of each node as JSON and end")
    parser.add_argument(
        "--check", action="store_true", help="print one line for each node and end; 1 if one has an error"
    )
    parser.add_argument("--wait", type=float, default=10.0, help="with --json or --check: seconds to wait for a node")


def run(args: argparse.Namespace) -> int:
    """Show the dashboard until interrupted; with --json or --check 1 if no node was heard."""
    if args.json and args.check:
        raise ValueError("--json and --check: give one of them")
    from occbev.ros.monitor_node import Listener

    with Listener() as listener:
        if args.json:
            return _print_json(_listen(listener, args.wait))
        return _check(_listen(listener, args.wait)) if args.check else _watch(listener)


def _listen(listener: Listener, seconds: float) -> Nodes:
    """Return the first report of each node that is heard, none after `seconds`."""
    deadline, nodes = time.monotonic() + seconds, listener.listen(0.0)
    while time.monotonic() < deadline:
        found, nodes = bool(nodes), listener.listen(0.1)
        if nodes and not found:
            deadline = time.monotonic() + ROUND_S
    return nodes


def _check(nodes: Nodes) -> int:
    """Print the state of each node as a whole; 0 if there is one and none has an error, as a health check wants it."""
    wholes = {node: parts[WHOLE] for node, parts in nodes.items() if WHOLE in parts}
    for node, whole in wholes.items():
        print(f"{node}: {LEVELS.get(whole.level, 'stale')}: {whole.text}")
    if not wholes:
        print("no perception node reports on /diagnostics")
    return 0 if wholes and all(whole.level < ERROR for whole in wholes.values()) else 1


def _print_json(nodes: Nodes) -> int:
    record = {
        node: {p.name: {"level": p.level, "text": p.text, "values": p.values} for p in parts.values()}
        for node, parts in nodes.items()
    }
    print(json.dumps(record, indent=2))
    return 0 if record else 1


def _watch(listener: Listener) -> int:
    with Live(dashboard({}), console=Console(), refresh_per_second=4, screen=True) as live:
        while True:
            live.update(dashboard(listener.listen(0.25)))


def dashboard(nodes: Nodes) -> Group:
    """Lay the parts of each node out as tables."""
    heard = {node: parts for node, parts in nodes.items() if WHOLE in parts}
    if not heard:
        return Group(Text("waiting for a perception node on /diagnostics", style="yellow"))
    return Group(*(_node(name, parts) for name, parts in heard.items()))


def _node(name: str, parts: Mapping[str, Part]) -> Group:
    whole = parts[WHOLE]
    age_s = time.monotonic() - whole.heard_s
    stale = f"  (not heard for {age_s:.0f} s)" if age_s > STALE_S else ""
    title = Text(f"{name}: {whole.text}{stale}", style="red" if stale else COLOURS.get(whole.level, "red"))
    remarks = [_remark(parts[name]) for name in REMARKS if name in parts]
    return Group(title, _sets(whole), _cameras(parts), _latencies(parts), *remarks)


def _sets(whole: Part) -> Table:
    table = Table("sets", "count", title_justify="left", box=None)
    for key, value in whole.values.items():
        table.add_row(key, value)
    return table


def _cameras(parts: Mapping[str, Part]) -> Table:
    table = Table("camera", *CAMERA_COLUMNS, "dropped", "state", box=None)
    for part in parts.values():
        if part.name in (WHOLE, LATENCY, *REMARKS):
            continue
        losses = {k.split(".", 1)[1]: v for k, v in part.values.items() if k.startswith(("dropped.", "refused."))}
        dropped = ", ".join(f"{reason} {count}" for reason, count in losses.items())
        columns = (part.values.get(key, "") for key in CAMERA_COLUMNS)
        table.add_row(part.name, *columns, dropped, Text(part.text, style=COLOURS.get(part.level, "red")))
    return table


def _latencies(parts: Mapping[str, Part]) -> Table:
    table = Table("stage", "p50 ms", "p95 ms", box=None)
    values = parts[LATENCY].values if LATENCY in parts else {}
    for stage in dict.fromkeys(key.split(".")[0] for key in values):
        table.add_row(stage, values.get(f"{stage}.p50_ms", ""), values.get(f"{stage}.p95_ms", ""))
    return table


def _remark(part: Part) -> Text:
    values = ", ".join(f"{key} {value}" for key, value in part.values.items())
    return Text(f"{part.name}: {part.text} ({values})", style=COLOURS.get(part.level, "red"))
