"""Arguments of the commands that read bags."""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.messages.topics import PROFILE_NAMES, load_topics
from occbev.rig import CameraRig
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.point_times import MODES


def add_bag_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how bags are read."""
    bags = parser.add_argument_group("bags")
    bags.add_argument(
        "--profile", choices=PROFILE_NAMES, default="auto", help="naming scheme of the topics (default: auto)"
    )
    bags.add_argument("--topics", type=Path, help="YAML file that names all topics; `occbev rig BAG` writes one")
    bags.add_argument("--rig", type=Path, help="rig file, in place of the bag's camera_info")
    bags.add_argument("--base-frame", default="base_link", help="frame of the vehicle")
    bags.add_argument(
        "--lidar-origin",
        type=float,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="where the LiDAR stands in base_link, for clouds that come in base_link",
    )
    bags.add_argument("--point-times", default="auto", metavar="HOW", help=f"{', '.join(MODES)} or FIELD:UNIT:absolute")
    clocks = bags.add_mutually_exclusive_group()
    clocks.add_argument("--clock-fix", action="store_true", help="measure clock offsets and correct them")
    clocks.add_argument("--ignore-clocks", action="store_true", help="take stamps as they are")


def bag_options(args: argparse.Namespace, key_interval: float = 0.0) -> BagOptions:
    """Turn the arguments of `add_bag_arguments` into options."""
    return BagOptions(
        None if args.topics is None else load_topics(args.topics),
        args.profile,
        key_interval=key_interval,
        base_frame=args.base_frame,
        rig=None if args.rig is None else CameraRig.load(args.rig),
        lidar_origin=None if args.lidar_origin is None else tuple(args.lidar_origin),
        point_times=args.point_times,
    )
