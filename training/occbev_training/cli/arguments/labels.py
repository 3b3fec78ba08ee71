"""Convert your own boxes, from a topic of the bag or from files, for 'prepare'.

    occbev-train labels BAG --out LABELS                            # the only topic of boxes in the bag
    occbev-train labels BAG --topic /perception/objects --out LABELS
    occbev-train labels BAG --boxes boxes.json --out LABELS         # plain JSON, see docs/prepare-dataset.md
    occbev-train labels BAG --boxes label_2 --frame CAM_FRONT --times times.txt --out LABELS      # KITTI
    occbev-train prepare BAG --labels LABELS --out CACHE

Topics may be vision_msgs/Detection3DArray, or Autoware's DetectedObjects and TrackedObjects. Every box is transformed
to base_link at the nearest key frame. LABELS/DRIVE.json holds the boxes; LABELS/DRIVE.jpg shows them: look at it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev_training.cli.arguments.shared import INPUTS_HELP, MAX_GAP, add_input_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("inputs", type=Path, nargs="+", help=INPUTS_HELP)
    parser.add_argument("--out", type=Path, required=True, help="folder for DRIVE.json and DRIVE.jpg")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--topic", help="topic of boxes (default: the only one in the bag)")
    source.add_argument(
        "--boxes", type=Path, help="plain JSON, KITTI .txt or a folder of these; for several drives FOLDER/DRIVE.json"
    )
    parser.add_argument(
        "--frame", help="frame of the boxes, where the file names none: base_link, a camera, a TF frame"
    )
    parser.add_argument("--times", type=Path, metavar="FILE", help="stamps of KITTI frames, one per line, in ns or s")
    parser.add_argument("--min-score", type=float, default=0.0, help="lowest score of a box that is read (default 0)")
    parser.add_argument(
        "--max-gap",
        type=float,
        default=MAX_GAP,
        help=f"largest time in seconds from a key frame to its labels (default {MAX_GAP})",
    )
    parser.add_argument("--key-interval", type=float, default=0.5, help="seconds between key frames of a bag")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_input_arguments(parser)
