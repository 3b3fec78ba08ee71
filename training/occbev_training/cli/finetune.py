"""Stage 2: learn boxes and semantic occupancy, beginning from the weights of stage 1.

    occbev-train finetune config/training/finetune_tiny.yaml --data CACHE --out runs/stage2 \\
        --from runs/stage1/weights.safetensors

What was carried over from stage 1 is written to run.json. Resuming, repeating a run, options for every key of
the config, and several processes as for pretrain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev_training.cli.pretrain import add_stage_arguments, run_stage

STAGE = "finetune"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_stage_arguments(parser)
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        help="weights.safetensors of stage 1, or ImageNet weights (.pth) to train without it",
    )


def run(args: argparse.Namespace) -> int:
    """Train; exits with 0 when the plan was finished and 130 when it was stopped."""
    return run_stage(args, STAGE, args.start)
