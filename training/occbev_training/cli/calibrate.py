"""Make a package's probabilities of occupancy honest, on drives that its training never saw.

    occbev-train calibrate PACKAGE DATA

DATA is what `evaluate --data` takes (simulated bags with their truth, a sample cache, a nuScenes root), or a folder
of pairs, whose labels are the LiDAR's. Writes space.npz and reliability.png into the package, and the calibration
errors before and after into its card. The node then publishes free, blocked and unknown by what was measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from occbev.inference.model_package import ModelPackage
from occbev_training.evaluation.space import MAX_FRAMES, fit_space
from occbev_training.evaluation.space_data import count_frames, open_frames
from occbev_training.export.calibrate import write_calibration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("package", type=Path, help="folder of the model package, which is changed")
    parser.add_argument("data", type=Path, help="held-out drives with their truth, or a folder of pairs")
    parser.add_argument("--limit", type=int, default=MAX_FRAMES, help=f"most frames (default {MAX_FRAMES})")
    parser.add_argument("--split", choices=["train", "validation"], help="of a folder of pairs (default: all of them)")
    parser.add_argument("--name", help="what the frames are, in words, for the card (default: the folder's name)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Fit, write and print."""
    if args.limit < 1:
        raise ValueError(f"--limit {args.limit}: want at least one frame")
    package, console = ModelPackage.load(args.package), Console(stderr=args.json)
    total = min(args.limit, count_frames(args.data, package.model, args.split))
    with Progress(console=console, disable=not console.is_terminal) as progress:
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
