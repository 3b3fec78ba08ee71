"""What `occbev-train label-truth` does; its arguments and its help are in arguments/label_truth.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from occbev.cli.console import make_console
from occbev.cli.progress import Progress
from occbev_training.occupancy.comparison import Comparison, compare_key
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive

BOUNDS = {
    "precision": (0.97, 1.0),
    "recall": (0.97, 1.0),
    "observed": (0.9, 1.0),
    "static_lost": (0.0, 0.015),
    "trails_removed": (0.95, 1.0),
}
"""What the labels are held to: lower and upper bound."""


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 if a bound is broken."""
    console = make_console(stderr=args.json)
    total: Comparison | None = None
    jobs = [
        (seed, key)
        for seed in range(args.first_seed, args.first_seed + args.drives)
        for key in range(0, args.keys, args.every)
    ]
    if not jobs:
        raise ValueError("nothing to compare: --drives and --keys must be positive")
    builder: LabelBuilder | None = None
    drive: SimulatedDrive | None = None
    with Progress(console=console) as progress:
        for seed, key in progress.track(jobs, description="key frames"):
            if drive is None or drive.seed != seed:
                drive = SimulatedDrive(seed, DriveConfig(keys=args.keys))
                builder = LabelBuilder(drive, LabelConfig(window=args.window))
            assert builder is not None
            found = compare_key(builder, drive, key)
            total = found if total is None else total + found
    assert total is not None
    record = total.as_record()
    broken = [name for name, (low, high) in BOUNDS.items() if not low <= record[name] <= high]
    if args.json:
        print(json.dumps({"key_frames": len(jobs), **record, "broken": broken}))
    else:
        _print(console, record, len(jobs))
    return 1 if broken else 0


def _print(console: Console, record: Mapping[str, Any], keys: int) -> None:
    table = Table("measure", "found", "bound", title=f"{keys} key frames against the simulator's truth")
    for name, value in record.items():
        if name != "paper":
            bound = BOUNDS.get(name)
            text = "" if bound is None else f">= {bound[0]:g}" if bound[1] == 1.0 else f"<= {bound[1]:g}"
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value), text)
    console.print(table)
    faults = Table("published recipe", "share", title="what its occupied voxels are, and its free ones")
    for name, value in record["paper"].items():
        faults.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(faults)
