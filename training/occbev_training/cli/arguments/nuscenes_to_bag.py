"""Turn a nuScenes data root into ROS 2 bags, one per scene.

    occbev-train nuscenes-to-bag data/nuscenes --out out/bags --scene scene-0103

Every ego pose of the tables is written to /odometry and /tf with its own stamp, so that the pose at the exposure of each
camera is known. Images and sweeps whose files are missing are counted and left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("root", type=Path, help="nuScenes data root (holds v1.0-*, samples, sweeps)")
    parser.add_argument("position", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder that gets one bag per scene, named after it")
    parser.add_argument("--scene", action="append", help="only this scene; may be given again")
    parser.add_argument("--version", help="folder of the tables, where the root holds several")
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap", help="bag storage")
    parser.add_argument("--truth", action="store_true", help="write boxes and labels to SCENE.truth too")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
