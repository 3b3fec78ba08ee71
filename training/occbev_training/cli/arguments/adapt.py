"""Adapt a model package to your own drives, without labels.

    occbev-train adapt occbev-tiny BAG_OR_FOLDER --out out/adapted
    occbev-train adapt PACKAGE out/pairs --out out/adapted --boxes boxes.json

Occupancy and depth learn from the LiDAR of the drives. So that boxes and classes are not forgotten, training also uses
simulated streets, half of them rendered through your cameras. Some of the drives are held out, for early stopping and for
the scores. OUT gets the package, and report.html with scores and pictures. Give the command again to resume it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.share import here_or_shipped
from occbev_training.cli.arguments.shared import INPUTS_HELP, add_body_arguments, add_input_arguments, minutes

KEY_INTERVALS = (0.1, 0.2, 0.5, 1.0)
"""Seconds between key frames of bags that are chosen from: a few seconds of driving should give enough to learn from."""


INTERVAL_HELP = (
    f"seconds between key frames of bags (default: {KEY_INTERVALS[0]} to {KEY_INTERVALS[-1]:g}, by their length)"
)


WINDOW = 0.25
"""Seconds of sweeps on either side of a label: short, so that little of a drive lies between what is learned and held out."""


MIN_TRAVEL = 0.05
"""Metres between key frames: a vehicle that creeps does not stand."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("package", help="model package: a folder, or the name of a shipped one")
    parser.add_argument("inputs", type=Path, nargs="+", help=f"{INPUTS_HELP}, or one folder of pairs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished run in it is resumed")
    parser.add_argument("--config", type=here_or_shipped, help="configuration (default: config/training/adapt.yaml)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: of the configuration)")
    parser.add_argument("--minutes", type=minutes, help="shorten the plan so that the training takes at most this long")
    parser.add_argument(
        "--held-out", type=float, help="share of the drives that is held out (default: of the configuration)"
    )
    parser.add_argument(
        "--rehearsal-drives",
        type=int,
        help="simulated drives in the training, so that boxes and classes are not forgotten; 0 for none",
    )
    parser.add_argument("--split", choices=("train", "validation"), help="with a folder of pairs: only this split")
    parser.add_argument("--boxes", type=Path, help="JSON with labelled boxes, used for scores only")
    parser.add_argument("--key-interval", type=float, help=INTERVAL_HELP)
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds of sweeps before and after a label")
    parser.add_argument("--workers", type=int, default=2, help="processes that make pairs and simulated drives")
    parser.add_argument("--threads", type=int, help="CPU threads of the training")
    add_body_arguments(parser)
    add_input_arguments(parser)
