"""Arguments that several commands share, and the defaults and choices that `--help` states of slow modules.

`tests/training/test_arguments.py` holds these values equal to those of the modules that they are of.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.share import here_or_shipped

PROFILES = ("auto", "occbev", "nuscenes2mcap", "nuscenes2bag", "ros2_dataset_bridge", "autoware")
"""Of occbev.messages.topics."""

GRIDS = ("det", "occ3d", "tiny")
"""Of occbev.grid."""

POINT_TIMES = ("auto", "compensated", "azimuth", "clockwise", "counterclockwise")
"""Of occbev_training.sources.point_times."""

LIDAR_COLUMNS = 5
"""Of occbev_training.sources.lidar_files."""

MAX_GAP = 0.15
"""Of occbev_training.sources.labelled: seconds from a key frame to the labels that are brought to it."""

LABEL_VARIANTS = ("occbev", "boxes", "occbev_paper")
"""Of occbev_training.occupancy.pairs."""

EXECUTORS = ("local", "ray")
"""Of occbev_training.occupancy.executors."""

CALIBRATION_FRAMES = 120
"""Of occbev_training.evaluation.space."""

BOOTSTRAP_DRAWS = 200
"""Of occbev_training.metrics.bootstrap."""

WORLD_HELP = "version of the streets (default v1, in which occbev-tiny is scored); v2 has relief, leaves, worn roads"
"""What `--world` says."""

WORLDS = ("v1", "v2")
"""Of occbev_training.simulator.drive."""

FUZZED = ("images", "rigs", "results", "packages", "bags")
"""Of occbev_training.benchmarks.fuzz."""

EGO_BOX = (-1.3, -1.05, 0.1, 4.0, 1.05, 2.2)
"""Of occbev_training.sources.deskew: lowest, then highest x, y, z."""

INPUTS_HELP = "bags, folders of bags, nuScenes or T4 roots, info .pkl files"


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how recordings are read: bags, nuScenes-like roots and info files."""
    parser.add_argument("--scenes", type=Path, metavar="FILE", help="only these drives, one name per line")
    parser.add_argument("--data-root", type=Path, help="nuScenes root of info .pkl files; default their folder")
    add_root_arguments(parser)
    add_bag_arguments(parser)


def add_body_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what of a recording is the vehicle itself."""
    body = " ".join(f"{value:g}" for value in EGO_BOX)
    parser.add_argument(
        "--ego-box",
        type=float,
        nargs=6,
        metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        help="box around the vehicle's own body in base_link: returns in it are no obstacles "
        f"(default: a car's, {body}); bag-check --ego-box proposes one",
    )
    parser.add_argument(
        "--ego-masks", type=Path, help="folder with CAMERA.png, white where the camera sees the vehicle itself"
    )


def add_root_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how nuScenes-like roots are read."""
    roots = parser.add_argument_group("nuScenes-like roots")
    add_version_arguments(roots)
    roots.add_argument(
        "--lidar-columns",
        type=int,
        default=LIDAR_COLUMNS,
        metavar="N",
        help=f"float32 values per point (default {LIDAR_COLUMNS})",
    )


def add_version_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare which tables of a root are read, and what their categories are."""
    parser.add_argument("--version", help="folder of the tables, if a root has several")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help='YAML lines such as "forklift: construction_vehicle"; null drops'
    )


def add_bag_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how bags are read."""
    bags = parser.add_argument_group("bags")
    bags.add_argument("--profile", choices=PROFILES, default="auto", help="naming scheme of the topics (default: auto)")
    bags.add_argument("--topics", type=Path, help="YAML file that names all topics; `occbev rig BAG` writes one")
    bags.add_argument("--rig", type=Path, help="rig file, in place of the bag's camera_info")
    bags.add_argument("--base-frame", default="base_link", help="frame of the vehicle")
    bags.add_argument(
        "--lidar-origin",
        type=float,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="position of the LiDAR in base_link, for clouds that are in base_link",
    )
    bags.add_argument(
        "--point-times", default="auto", metavar="HOW", help=f"{', '.join(POINT_TIMES)} or FIELD:UNIT:absolute"
    )
    clocks = bags.add_mutually_exclusive_group()
    clocks.add_argument("--clock-fix", action="store_true", help="measure clock offsets and correct them")
    clocks.add_argument("--ignore-clocks", action="store_true", help="take stamps as they are")


def minutes(text: str) -> float:
    """Return a time limit in minutes; raises ArgumentTypeError if it leaves no time."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: want more than 0 minutes")
    return value


def package_path(text: str) -> Path:
    """Return the folder of a model package that is given by its path or by the name of a shipped one."""
    path = here_or_shipped(text)
    return path if path.exists() or "/" in text else here_or_shipped(Path("config/models") / text)
