"""Stage 2: learn boxes and semantic occupancy, starting from the weights of stage 1.

    occbev-train finetune config/training/finetune_tiny.yaml --data CACHE --out out/stage2 \\
        --from out/stage1

run.json lists the weights that were taken from stage 1. Resuming, repeating a run, options for every key of the
config, and several processes work as for pretrain.
"""

from __future__ import annotations

import argparse

from occbev_training.cli.arguments.pretrain import add_stage_arguments, weights_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_stage_arguments(parser)
    parser.add_argument(
        "--from",
        dest="start",
        type=weights_path,
        help="the folder of stage 1 or its weights.safetensors, or ImageNet or detector weights (.pth, see pretrain --imagenet) to train without it",
    )
