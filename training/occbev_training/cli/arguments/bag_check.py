"""Check whether a bag can become training pairs: one verdict per requirement; status 1 if a necessary one is not met.

occbev-train bag-check BAG
occbev-train bag-check BAG --topics vehicle/topics.yaml
occbev-train bag-check BAG --ego-box      # also propose a box around the vehicle's own body
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev_training.cli.arguments.shared import add_bag_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bag", type=Path, help="bag folder, .mcap or .db3 file")
    parser.add_argument("--ego-box", action="store_true", help="propose a box around the vehicle's own body")
    parser.add_argument(
        "--no-turns",
        action="store_true",
        help="skip the comparison of clocks in turns of the vehicle, which takes longest",
    )
    parser.add_argument(
        "--no-pair", action="store_true", help="make no pair and do not compare the calibration with the images"
    )
    add_bag_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
