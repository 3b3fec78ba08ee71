"""Turn unlabelled drives into pre-training pairs: images and three-state labels, each measured, in shards.

    occbev-train pairs BAG_OR_FOLDER_OR_NUSCENES_ROOT_OR_INFOS.pkl ... --out OUT --workers 2
    occbev-train pairs --out OUT --simulate 4 --first-seed 0
    occbev-train pairs ROOT --out OUT --task-index 3 --num-tasks 16    # one task of an array job
    occbev-train pairs --out OUT --join                                # index what the tasks made
    occbev-train pairs BAGS --out OUT --executor ray --ray-address auto

Give the command again to resume it. The same input gives the same bytes; an input whose content changed is made again.
An input that cannot be read is named and left out; the others are made, and the status is 1. The status is also 1 if no
pair was made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev_training.cli.arguments.shared import (
    EXECUTORS,
    GRIDS,
    INPUTS_HELP,
    LABEL_VARIANTS,
    add_body_arguments,
    add_input_arguments,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("inputs", type=Path, nargs="*", help=INPUTS_HELP)
    parser.add_argument("--out", type=Path, help="folder of the shards")
    parser.add_argument(
        "--labels",
        choices=LABEL_VARIANTS,
        default="occbev",
        help="how labels are made (default: occbev, without boxes)",
    )
    parser.add_argument("--simulate", type=int, default=0, metavar="DRIVES", help="simulate drives")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first simulated drive")
    parser.add_argument("--keys", type=int, default=20, help="key frames of a simulated drive")
    add_input_arguments(parser)
    parser.add_argument("--grid", default="occ3d", choices=GRIDS, help="voxel grid")
    parser.add_argument("--window", type=float, default=1.0, help="seconds of sweeps before and after a label")
    parser.add_argument("--key-interval", type=float, default=0.5, help="seconds between key frames of a bag")
    add_body_arguments(parser)
    parser.add_argument("--max-range", type=float, default=60.0, help="range in metres up to which beams are used")
    parser.add_argument("--min-cameras", type=int, help="smallest number of cameras of a pair (default: all but one)")
    parser.add_argument(
        "--min-support",
        type=float,
        default=0.5,
        help="smallest share of the expected sweeps",
    )
    parser.add_argument(
        "--min-travel", type=float, default=0.5, help="metres between key frames; nearer ones count as standing"
    )
    parser.add_argument(
        "--no-gate", action="store_true", help="mark pairs that break a limit instead of leaving them out"
    )
    parser.add_argument("--lidar", action="store_true", help="also store the sweep at the key time")
    parser.add_argument("--segment", type=int, default=200, help="key frames per unit of work")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--executor", choices=EXECUTORS, default="local", help="where the work runs (default: local)")
    parser.add_argument(
        "--ray-address", help="address of a running Ray cluster, or auto; without it one is started here"
    )
    parser.add_argument("--task-index", type=int, default=0, help="number of this task in an array job")
    parser.add_argument("--num-tasks", type=int, default=1, help="number of tasks in the array job")
    parser.add_argument("--join", action="store_true", help="only write the index of finished pairs")
    parser.add_argument("--validation", type=float, default=0.1, help="share of the validation split")
    parser.add_argument(
        "--divide-drives",
        action="store_true",
        help="where all drives met, or there is one: hold the end of each out for validation",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
