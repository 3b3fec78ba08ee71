"""What `occbev-train bag-check` does; its arguments and its help are in arguments/bag_check.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Column, Table

from occbev.cli.console import make_console
from occbev_training.cli.bag_arguments import bag_options
from occbev_training.occupancy.trial import CameraRow, Trial, try_drive
from occbev_training.sources.bag_check import Verdict, check_bag, fix_clocks, propose_ego_box
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.deskew import EgoBox
from occbev_training.sources.recording import RecordingError


def run(args: argparse.Namespace) -> int:
    """Print the verdicts and the cameras; 1 where a requirement that must hold does not."""
    options = bag_options(args)
    if args.clock_fix:
        options = fix_clocks(args.bag, options)
    verdicts, cameras = check_bag(args.bag, options, not args.no_turns), list[CameraRow]()
    if not args.no_pair and all(verdict.ok for verdict in verdicts if verdict.requirement in NEEDED):
        trial = _try(args.bag, replace(options, key_interval=options.key_interval or KEY_INTERVAL))
        verdicts, cameras = verdicts + trial.verdicts, trial.cameras
    failed = [verdict for verdict in verdicts if verdict.must and not verdict.ok]
    box, reason = _ego_box(args.bag, options) if args.ego_box and not failed else (None, "")
    if args.json:
        rows = {"verdicts": [asdict(v) for v in verdicts], "cameras": [asdict(row) for row in cameras]}
        found = {"ego_box": asdict(box)} if box else {"no_ego_box": reason} if reason else {}
        print(json.dumps({"bag": str(args.bag), "ok": not failed} | rows | found))
        return 1 if failed else 0
    console = make_console()
    if cameras:
        console.print(_camera_table(cameras))
    console.print(_verdict_table(f"{args.bag}: {'not usable' if failed else 'usable'}", verdicts))
    if box is not None:
        corners = " ".join(f"{v:g}" for v in (*box.lo, *box.hi))
        console.print(f"ego box: lo {box.lo}, hi {box.hi}; pairs --ego-box {corners}", highlight=False)
    elif reason:
        console.print(f"no ego box: {reason}", highlight=False, markup=False)
    return 1 if failed else 0


NEEDED = ("topics", "messages", "transforms and calibration")
"""Requirements without which no pair can be tried."""

KEY_INTERVAL = 0.5
"""Seconds between key frames, as `pairs` takes them."""


def _try(path: Path, options: BagOptions) -> Trial:
    """Make one pair of the first part of a bag; a recording that breaks meanwhile is a verdict, too."""
    try:
        recording = BagRecording(path, options)
    except RecordingError as error:
        return Trial([Verdict("one pair", False, str(error))], [])
    try:
        return try_drive(recording)
    finally:
        recording.close()


def _verdict_table(title: str, verdicts: Sequence[Verdict]) -> Table:
    table = Table("", *(Column(name, overflow="fold") for name in ("requirement", "found")), title=escape(title))
    for verdict in verdicts:
        mark = "[green]ok" if verdict.ok else ("[red]MUST" if verdict.must else "[yellow]should")
        table.add_row(mark, escape(verdict.requirement), escape(verdict.text))
    return table


def _camera_table(cameras: Sequence[CameraRow]) -> Table:
    names = ("camera, topic", "size, lens", "view", "degrees", "brightest", "images")
    table = Table(*(Column(name, overflow="fold") for name in names), title="cameras")
    for row in cameras:
        across, down = row.fov_deg
        name, size = f"{row.name}\n{row.topic}".rstrip(), f"{row.size}\n{row.lens}"
        cells = (name, size, row.view, f"{across:.0f} x {down:.0f}", row.sky, row.agrees)
        table.add_row(*(escape(cell) for cell in cells))
    return table


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
