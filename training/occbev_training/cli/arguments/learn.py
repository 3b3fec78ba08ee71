"""From a folder of bags to a package that the node runs, in one command.

    occbev-train learn BAGS --out out/mine
    occbev-train learn BAGS --out out/mine --topics vehicle/topics.yaml --minutes 60
    occbev-train learn BAGS --out out/mine --package PACKAGE
    occbev-train learn BAGS --out out/mine --pretrain config/training/pretrain_tiny.yaml

It prints a plan first, then runs the single commands in order: bag-check, pairs, adapt (or pretrain, export, evaluate
and calibrate). Give the command again to resume it: finished steps are not repeated. OUT/package is the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.share import here_or_shipped
from occbev_training.cli.arguments.adapt import INTERVAL_HELP, WINDOW
from occbev_training.cli.arguments.shared import INPUTS_HELP, add_body_arguments, add_input_arguments, minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("inputs", type=Path, nargs="+", help=INPUTS_HELP)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for all results; finished steps in it are not repeated"
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--package", default="occbev-tiny", help="package to adapt (default occbev-tiny)")
    way.add_argument(
        "--pretrain",
        type=here_or_shipped,
        metavar="CONFIG",
        help="stage 1 by this training config, instead of adapting",
    )
    parser.add_argument("--steps", type=int, help="optimiser steps (default: of the configuration)")
    parser.add_argument("--minutes", type=minutes, help="shorten the plan so that the training takes at most this long")
    parser.add_argument(
        "--rehearsal-drives",
        type=int,
        help="simulated drives in the training, so that boxes and classes are not forgotten; 0 for none",
    )
    parser.add_argument("--key-interval", type=float, help=INTERVAL_HELP)
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds of sweeps before and after a label")
    parser.add_argument("--workers", type=int, default=2, help="processes that make pairs and simulated drives")
    parser.add_argument("--plan", action="store_true", help="print the plan and do nothing")
    add_body_arguments(parser)
    add_input_arguments(parser)
