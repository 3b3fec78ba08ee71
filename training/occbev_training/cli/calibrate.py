"""What `occbev-train calibrate` does; its arguments and its help are in arguments/calibrate.py."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from occbev.cli.progress import Progress
from occbev.inference.model_package import ModelPackage
from occbev_training.evaluation.space import fit_space
from occbev_training.evaluation.space_data import count_frames, open_frames
from occbev_training.export.calibrate import write_calibration


def run(args: argparse.Namespace) -> int:
    """Fit, write and print."""
    if args.limit < 1:
        raise ValueError(f"--limit {args.limit}: want at least one frame")
    package, console = ModelPackage.load(args.package), Console(stderr=args.json)
    total = min(args.limit, count_frames(args.data, package.model, args.split))
    with Progress(console=console) as progress:
        task = progress.add_task("frames", total=total)
        frames = open_frames(args.data, package.model, args.limit, split=args.split)
        fitted_on = f"{total} frames of {args.name or args.data.resolve().name}"
        fit = fit_space(package, frames, fitted_on, progress=lambda done: progress.update(task, completed=done))
    record = write_calibration(package, fit)
    if args.json:
        print(json.dumps({"package": str(args.package), **record}))
        return 0
    for name in ("voxels", "obstacles"):
        before, after = record[f"{name}_ece"], record[f"{name}_ece_calibrated"]
        console.print(f"{name}: expected calibration error {before:.3f}, calibrated {after:.3f}", highlight=False)
    console.print(f"{args.package}: space.npz, reliability.png, README.md")
    return 0
