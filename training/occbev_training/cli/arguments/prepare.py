"""Decode and label every key frame once, into a sample cache that training reads.

    occbev-train prepare NUSCENES_ROOT --scenes train.txt --out CACHE
    occbev-train prepare BAGS --labels LABELS --out CACHE          # your own boxes, from 'occbev-train labels'
    occbev-train prepare --simulate 120 --first-seed 0 --keys 16 --out CACHE
    occbev-train prepare --simulate 200 --random-rigs --no-labels --out CACHE      # every drive through a rig of its own

Give the command again to resume it. A drive that is incomplete, or whose content changed, is made again. What cannot be
read is named and left out; the rest is made, and the status is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.share import here_or_shipped
from occbev_training.cli.arguments.shared import (
    INPUTS_HELP,
    MAX_GAP,
    WORLD_HELP,
    WORLDS,
    add_body_arguments,
    add_input_arguments,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("inputs", type=Path, nargs="*", help=INPUTS_HELP)
    parser.add_argument("--out", type=Path, help="folder of the cache")
    parser.add_argument("--nuscenes", type=Path, metavar="ROOT", help="another input: a nuScenes-like root")
    parser.add_argument(
        "--labels", type=Path, metavar="FOLDER", help="boxes of the drives: FOLDER/DRIVE.json, or one plain JSON file"
    )
    parser.add_argument(
        "--max-gap",
        type=float,
        default=MAX_GAP,
        help=f"largest time in seconds from a key frame to its labels (default {MAX_GAP})",
    )
    parser.add_argument("--simulate", type=int, default=0, metavar="DRIVES", help="simulate this many drives")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first simulated drive")
    parser.add_argument("--keys", type=int, default=16, help="key frames of a simulated drive")
    parser.add_argument("--key-rate", type=float, default=2.0, help="key frames per second of a simulated drive")
    parser.add_argument("--world", choices=WORLDS, default=WORLDS[0], help=WORLD_HELP)
    parser.add_argument("--random-rigs", action="store_true", help="simulate every drive through a rig of its own")
    parser.add_argument(
        "--fisheyes",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the random rigs with fisheyes (default 0)",
    )
    parser.add_argument("--key-interval", type=float, default=0.5, help="seconds between key frames of a bag")
    parser.add_argument(
        "--model",
        type=here_or_shipped,
        default="config/models/occbev-tiny.yaml",
        help="model config: input size and voxel grid",
    )
    parser.add_argument(
        "--label-window",
        type=float,
        default=1.0,
        help="seconds of sweeps before and after a label",
    )
    parser.add_argument(
        "--near-hits", type=int, default=2, help="sweeps that must hit a near voxel; 1 where there are few sweeps"
    )
    parser.add_argument("--no-labels", action="store_true", help="make no three-state labels; fine-tuning needs none")
    add_body_arguments(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    add_input_arguments(parser)
