"""Calibrate a package's occupancy probabilities on drives that its training never saw.

    occbev-train calibrate PACKAGE DATA

DATA is what `evaluate --data` takes (simulated bags with their truth, a sample cache, a nuScenes root), or a folder
of pairs, whose labels come from LiDAR. Writes space.npz and reliability.png into the package, and the calibration
errors before and after into its card. The node uses them to decide what it publishes as free, blocked or unknown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev_training.cli.arguments.shared import CALIBRATION_FRAMES, package_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "package", type=package_path, help="model package: a folder, or the name of a shipped one; it is changed"
    )
    parser.add_argument("data", type=Path, help="evaluation drives with their truth, or a folder of pairs")
    parser.add_argument(
        "--limit", type=int, default=CALIBRATION_FRAMES, help=f"largest number of frames (default {CALIBRATION_FRAMES})"
    )
    parser.add_argument("--split", choices=["train", "validation"], help="split of a folder of pairs (default: all)")
    parser.add_argument("--name", help="description of the frames for the card (default: the folder's name)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
