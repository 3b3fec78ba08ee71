"""Write simulated drives: as a nuScenes data root, as ROS 2 bags with their truth beside them, or as both.

    occbev-train simulate --out out/drives --drives 4 --format bag
    occbev-train simulate --out out/drives --drives 4 --world v2           # streets that look more like real ones
    occbev-train simulate --out out/drives --rig rig.yaml --format bag     # through your cameras and LiDAR

Each seed is one drive. Seeds 0 to 9999 are for training, 10000 to 19999 for validation, higher ones for tests
and demonstrations. Finished drives stay when the command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev_training.cli.arguments.shared import WORLD_HELP, WORLDS

FORMATS = ("nuscenes", "bag", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("position", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder to write to; a nuScenes root, bags/ and truth/")
    parser.add_argument("--drives", type=int, default=1, help="number of drives (default 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first drive (default 0)")
    parser.add_argument("--keys", type=int, default=20, help="key frames per drive (default 20)")
    parser.add_argument("--key-rate", type=float, default=2.0, help="key frames per second (default 2)")
    parser.add_argument("--sweep-rate", type=float, default=10.0, help="LiDAR rotations per second (default 10)")
    parser.add_argument(
        "--image",
        type=image_size,
        default=(352, 128),
        metavar="WxH",
        help="picture size; 640x360 is a full frame, 352x128 (default) is what the network sees",
    )
    parser.add_argument(
        "--rig",
        type=Path,
        metavar="YAML",
        help="rig file: any number of cameras of any size, lens and place, and with the key lidar a LiDAR;"
        " takes the place of --image",
    )
    parser.add_argument(
        "--random-rigs",
        action="store_true",
        help="every drive through cameras and a LiDAR of its own, chosen by its seed",
    )
    parser.add_argument(
        "--fisheyes",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the random rigs with fisheyes (default 0)",
    )
    parser.add_argument("--world", choices=WORLDS, default=WORLDS[0], help=WORLD_HELP)
    parser.add_argument("--format", choices=FORMATS, default="nuscenes", help="what to write (default nuscenes)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")


def image_size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT; raises argparse.ArgumentTypeError saying what is wanted."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: want WIDTHxHEIGHT such as 640x360") from None
    if min(width, height) < 16:
        raise argparse.ArgumentTypeError(f"{text!r}: both sides must be at least 16 pixels")
    return width, height
