"""Score a model package on drives that it never saw, or result files by the official rules.

    occbev-train evaluate occbev-tiny --data CACHE
    occbev-train evaluate PACKAGE --data CACHE --fit-priors TRAINING_CACHE --priors priors.npz
    occbev-train evaluate PACKAGE --data VALIDATION_CACHE --calibrate --json report.json
    occbev-train evaluate PACKAGE --data NUSCENES_ROOT --scenes val.txt --out out/evaluation --workers 2
    occbev-train evaluate PACKAGE --pairs out/pairs --boxes boxes.json
    occbev-train evaluate --results results.json --nuscenes NUSCENES_ROOT
    occbev-train evaluate --voxels FOLDER_OF_NPZ --nuscenes NUSCENES_ROOT

The headline is the AP of cars within 30 m that have at least 5 LiDAR returns, at 2 m. Packages of every family
are accepted; what a network does not predict is not scored. Drives are scored in order; the memory of a network
starts empty in each drive.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev_training.cli.arguments.shared import BOOTSTRAP_DRAWS, add_version_arguments, package_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "package", type=package_path, nargs="?", help="model package: a folder, or the name of a shipped one"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="evaluation drives: a sample cache, a nuScenes root, or a folder of simulated bags and their truth",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FOLDER",
        help="score occupancy and depth against the LiDAR labels of 'occbev-train pairs', for drives without other truth",
    )
    parser.add_argument("--split", choices=("train", "validation"), help="with --pairs: only this split")
    parser.add_argument(
        "--boxes", type=Path, metavar="JSON", help="with --pairs: labelled boxes, to score boxes as well"
    )
    parser.add_argument(
        "--results", type=Path, metavar="JSON", help="score this nuScenes result file instead of a package"
    )
    parser.add_argument(
        "--voxels", type=Path, metavar="FOLDER", help="score these Occ3D results, one <sample token>.npz a sample"
    )
    parser.add_argument("--nuscenes", type=Path, metavar="ROOT", help="nuScenes root that the result files belong to")
    add_version_arguments(parser)
    parser.add_argument(
        "--scenes",
        type=Path,
        metavar="FILE",
        help="only these drives, one name per line (default for result files: the drives that they name)",
    )
    parser.add_argument(
        "--limit", type=int, help="number of samples: evenly spaced, or the first ones for a network with a memory"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; the scores do not depend on it (default 1)")
    parser.add_argument("--backend", default="auto", help="runtime, as for the node")
    parser.add_argument(
        "--precision",
        default="auto",
        help="auto, or f32 to compute in 32 bits even where the hardware has a faster type",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of the runtime, in each process")
    parser.add_argument(
        "--fit-priors",
        type=Path,
        metavar="CACHE",
        help="compute the priors from these training drives",
    )
    parser.add_argument("--priors", type=Path, help="file for the fitted priors")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="find the occupancy.min_free with the best occupied IoU on these drives, which should be validation"
        " drives; 'occbev-train export --calibration' takes the file of --json",
    )
    parser.add_argument("--min-free", type=float, help="score with this occupancy.min_free instead of the package's")
    parser.add_argument(
        "--draws",
        type=int,
        default=BOOTSTRAP_DRAWS,
        help=f"bootstrap samples of drives for the 95 %% intervals; 0 for no intervals (default {BOOTSTRAP_DRAWS})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write metrics.json, plots, the worst frames as pictures and, of a nuScenes root, results.json",
    )
    parser.add_argument(
        "--save-voxels", action="store_true", help="also write FOLDER/voxels/<sample token>.npz in Occ3D's format"
    )
    parser.add_argument("--json", type=Path, help="write all scores to this file")
