"""Calibrate a package's occupancy probabilities on drives that its training never saw.

    occbev-train calibrate PACKAGE DATA

DATA is what `evaluate --data` takes (simulated bags with their truth, a sample cache, a nuScenes root), or a folder
of pairs, whose labels come from LiDAR. Writes space.npz and reliability.png into the package, and the calibration
errors before and after into its card. The node decides by them what it publishes as free, blocked or unknown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev_training.cli.arguments.shared import CALIBRATION_FRAMES, package_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("package", type=package_path, help="folder of the model package, which is changed")
    parser.add_argument("data", type=Path, help="held-out drives with their truth, or a folder of pairs")
    parser.add_argument(
        "--limit", type=int, default=CALIBRATION_FRAMES, help=f"most frames (default {CALIBRATION_FRAMES})"
    )
    parser.add_argument("--split", choices=["train", "validation"], help="of a folder of pairs (default: all of them)")
    parser.add_argument("--name", help="what the frames are, in words, for the card (default: the folder's name)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
