"""Arguments of the commands that read bags."""

from __future__ import annotations

import argparse

from occbev.messages.topics import load_topics
from occbev.rig import CameraRig
from occbev_training.sources.bag_index import BagOptions


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
