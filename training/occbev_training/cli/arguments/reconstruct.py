"""Show what a pre-training run predicts for samples, and score it on voxels that a camera sees.

    occbev-train reconstruct out/stage1 --data PAIRS_OR_CACHE --out reconstruction.png

Scores on the run's own training samples show only whether it can learn them.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, help="folder of a finished pre-training run")
    parser.add_argument("--data", type=Path, required=True, help="pair shards or sample cache")
    parser.add_argument(
        "--split", default="train", choices=("train", "validation"), help="split of pair shards (default: train)"
    )
    parser.add_argument("--samples", type=int, default=4, help="number of samples, evenly spaced")
    parser.add_argument("--out", type=Path, help="picture (PNG); by default none is drawn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
