"""Tell whether a bag can become training pairs: one verdict per requirement, exit status 1 if a must fails.

occbev-train bag-check BAG
occbev-train bag-check BAG --ego-box      # also propose the vehicle's own body
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from occbev_training.cli.bag_arguments import add_bag_arguments, bag_options
from occbev_training.sources.bag_check import check_bag, fix_clocks, propose_ego_box
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.deskew import EgoBox
from occbev_training.sources.recording import RecordingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bag", type=Path, help="bag folder, .mcap or .db3 file")
    parser.add_argument("--ego-box", action="store_true", help="propose the box of the vehicle's own returns")
    parser.add_argument(
        "--no-turns", action="store_true", help="skip the comparison of clocks by turns, which takes longest"
    )
    add_bag_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the verdicts."""
    options = bag_options(args)
    if args.clock_fix:
        options = fix_clocks(args.bag, options)
    verdicts = check_bag(args.bag, options, not args.no_turns)
    failed = [verdict for verdict in verdicts if verdict.must and not verdict.ok]
    box, reason = _ego_box(args.bag, options) if args.ego_box and not failed else (None, "")
    if args.json:
        record = {"bag": str(args.bag), "ok": not failed, "verdicts": [asdict(v) for v in verdicts]}
        found = {"ego_box": asdict(box)} if box else {"no_ego_box": reason} if reason else {}
        print(json.dumps(record | found))
        return 1 if failed else 0
    table = Table("", "requirement", "found", title=f"{args.bag}: {'usable' if not failed else 'not usable'}")
    for verdict in verdicts:
        mark = "[green]ok" if verdict.ok else ("[red]MUST" if verdict.must else "[yellow]should")
        table.add_row(mark, verdict.requirement, verdict.text)
    console = Console()
    console.print(table)
    if box is not None:
        corners = " ".join(f"{v:g}" for v in (*box.lo, *box.hi))
        console.print(f"ego box: lo {box.lo}, hi {box.hi}; pairs --ego-box {corners}", highlight=False)
    elif reason:
        console.print(f"no ego box: {reason}", highlight=False, markup=False)
    return 1 if failed else 0


def _ego_box(path: Path, options: BagOptions) -> tuple[EgoBox | None, str]:
    """Return the proposed box, or None and why there is none."""
    recording = BagRecording(path, options)
    try:
        box = propose_ego_box(recording)
    except RecordingError as error:
        return None, str(error)
    finally:
        recording.close()
    return box, "" if box else "nothing near the vehicle is hit in nearly every sweep"
