"""Compare labels with the simulator's truth, and with the labels of the published recipe.

occbev-train label-truth --drives 4 --first-seed 10000 --keys 5
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--drives", type=int, default=4, help="simulated drives")
    parser.add_argument(
        "--first-seed", type=int, default=10_000, help="seed of the first drive; from 10000 on they are for validation"
    )
    parser.add_argument("--keys", type=int, default=5, help="key frames of a drive")
    parser.add_argument("--every", type=int, default=2, help="compare every n-th key frame")
    parser.add_argument("--window", type=float, default=1.0, help="seconds of sweeps before and after a label")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
