"""What `occbev-train pretrain` does; its arguments and its help are in arguments/pretrain.py."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn

from occbev.cli.progress import Progress
from occbev.config import ConfigError, load_config
from occbev_training.engine.config import TrainingConfig
from occbev_training.engine.stages import StageInputs, load_inputs, train_stage
from occbev_training.engine.trainer import Trainer

STAGE = "pretrain"
_YES_NO = {"true": "True", "false": "False"}
RUN_CONFIG, RUN_MODEL, RUN_INPUTS = "config.yaml", "model.yaml", "inputs.yaml"


def run(args: argparse.Namespace) -> int:
    """Train; exits with 0 when the plan was finished and 130 when it was stopped."""
    return run_stage(args, STAGE, args.start or args.imagenet)


def run_stage(args: argparse.Namespace, stage: str, start: Path | None) -> int:
    """Train one stage as the arguments say."""
    first = int(os.environ.get("RANK", "0")) == 0
    console = Console(quiet=not first)
    logging.basicConfig(
        level=logging.INFO if first else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
    )
    config, inputs = _parse_options(args)
    if config.stage != stage:
        raise ConfigError(f"{args.config}: stage is {config.stage}, the command is {stage}")
    if start is not None:
        inputs = replace(inputs, start=start)
    with Display(console) as display, signals() as prepared:
        finished = train_stage(config, inputs, args.out, display.show, prepared)
    return 0 if finished else 130


def _parse_options(args: argparse.Namespace) -> tuple[TrainingConfig, StageInputs]:
    """Return config and inputs: those of a file, or those of a run folder, with what the options change."""
    repeats = args.config.is_dir()
    config = load_config(args.config / RUN_CONFIG if repeats else args.config, TrainingConfig)
    if repeats:
        config = replace(config, model=str(args.config / RUN_MODEL))
    arguments = [*parse_assignments(args.assignments), *args.more]
    if args.steps is not None:
        arguments += ["--steps", str(args.steps), "--epochs", "0"]
    config = overridden(config, [*arguments, "--help"] if args.config_help else arguments)
    given = StageInputs(args.data, args.validation, None, args.minutes)
    inputs = load_inputs(args.config / RUN_INPUTS, given) if repeats else given
    if args.out is None:
        raise ConfigError("--out is missing: the folder of the run")
    if inputs.data is None:
        raise ConfigError("--data is missing: pair shards or a sample cache to train on")
    return config, inputs


def overridden(config: TrainingConfig, arguments: Sequence[str]) -> TrainingConfig:
    """Lay options such as `--optim.lr 1e-4` over a config; tyro ends the process on unknown ones."""
    changed: TrainingConfig = tyro.cli(
        TrainingConfig,
        args=[_YES_NO.get(a, a) for a in arguments],
        default=config,
        prog="occbev-train ... CONFIG",
        config=(tyro.conf.FlagConversionOff,),  # --freeze_norms true, as in YAML and as --set writes it
    )
    return changed


def parse_assignments(items: Sequence[str]) -> list[str]:
    """Turn KEY=VALUE pairs into options."""
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: want KEY=VALUE")
    pairs = (item.partition("=") for item in items)
    return [text for key, _, value in pairs for text in (f"--{key}", value)]


class Display:
    """A progress bar with the numbers that tell how a run goes on a terminal; plain lines in either case."""

    def __init__(self, console: Console) -> None:
        self._console, self._task = console, TaskID(0)
        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[total_loss]}  lr {task.fields[lr]}"),
            TextColumn("{task.fields[samples_per_s]} samples/s  data wait {task.fields[data_wait]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)

    def __enter__(self) -> Display:
        self._progress.start()
        self._task = self._progress.add_task(
            "training", total=None, total_loss="-", lr="-", samples_per_s="-", data_wait="-"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, line: Mapping[str, Any]) -> None:
        """Take in one line of metrics.jsonl."""
        self._progress.update(self._task, completed=line["step"], total=line["planned"])
        if "validation" not in line:
            self._progress.update(
                self._task,
                total_loss=f"{line['total']:.4g}",
                lr=f"{line['lr']:.2g}",
                samples_per_s=f"{line['samples_per_s']:.3g}",
                data_wait=f"{line['data_wait']:.0%}",
            )
        numbers = line.get("validation") or {k: v for k, v in line.items() if k not in ("step", "planned")}
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._console.print(
            f"{'validation ' if 'validation' in line else ''}step {line['step']}/{line['planned']}  {text}",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def signals() -> Iterator[Callable[[Trainer], None]]:
    """Turn SIGINT and SIGTERM into a request to stop, for a trainer that is handed over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def prepared(trainer: Trainer) -> None:
        def stop(_: int, __: FrameType | None) -> None:
            trainer.stop_requested = True

        for number in before:
            signal.signal(number, stop)

    try:
        yield prepared
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
