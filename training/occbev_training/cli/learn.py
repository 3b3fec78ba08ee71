"""What `occbev-train learn` does; its arguments and its help are in arguments/learn.py."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from occbev.cli.console import make_console
from occbev.config import load_config
from occbev.inference.model_package import ModelPackage, find_package
from occbev_training.cli.adapt import adapt_config, choose_interval, given_arguments, grid_name
from occbev_training.cli.arguments.adapt import MIN_TRAVEL
from occbev_training.cli.arguments.shared import add_bag_arguments, add_body_arguments, add_input_arguments
from occbev_training.cli.inputs import count_keys, describe_problems, find_inputs
from occbev_training.engine.config import TrainingConfig
from occbev_training.engine.stages import model_to_train
from occbev_training.sources.discovery import OpenBag
from occbev_training.sources.recording import RecordingError

SECONDS_PER_PAIR, SECONDS_PER_DRIVE, SECONDS_PER_STEP = 1.5, 8.0, 2.5
"""What a pair, a simulated drive and a training step take of one core with occbev-tiny, for the plan."""


@dataclass(frozen=True)
class Step:
    """One command. must: whether the way ends where it fails."""

    words: tuple[str, ...]
    must: bool = True

    def __str__(self) -> str:
        return f"occbev-train {shlex.join(self.words)}"


@dataclass(frozen=True)
class Plan:
    """What is done with which drives. frames: drive -> key frames. bags: of the drives. seconds: of one core, about."""

    frames: dict[str, int]
    bags: tuple[Path, ...]
    problems: dict[str, str]
    steps: tuple[Step, ...]
    seconds: float


def run(args: argparse.Namespace) -> int:
    """Print the plan and follow it; the status is that of the first step that must not fail and did."""
    from occbev_training.cli import main

    console = make_console()
    plan = make_plan(args)
    print_plan(plan, console)
    if args.plan:
        return 0
    for number, step in enumerate(plan.steps, 1):
        console.print(f"\n[bold]{number} of {len(plan.steps)}[/]  {step}", highlight=False, soft_wrap=True)
        status = main(step.words)
        if status and step.must:
            return status
    console.print(
        f"\n{args.out / 'package'} is ready; next: {next_command(args, plan.bags)}", highlight=False, soft_wrap=True
    )
    return 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Look at the inputs and decide on the steps."""
    args.key_interval = args.key_interval or choose_interval(args)
    found = find_inputs(args, args.inputs, args.out / "infos", args.key_interval)
    frames = count_keys(found)
    if not frames:
        raise RecordingError(f"no drive can be used: {'; '.join(describe_problems(found.problems))}")
    how = ("--no-turns", *given_arguments(args, add_bag_arguments))
    used = [opener for opener in found.openers if opener.name in frames]
    bags = tuple(dict.fromkeys(opener.path for opener in used if isinstance(opener, OpenBag)))
    checks = tuple(Step(("bag-check", str(bag), *how), must=False) for bag in bags)
    training, seconds = _pretrain_steps(args) if args.pretrain else _adapt_steps(args)
    seconds += SECONDS_PER_PAIR * sum(frames.values())
    return Plan(frames, bags, dict(found.problems), checks + training, seconds)


def print_plan(plan: Plan, console: Console) -> None:
    """Print drives, frames, steps and about how long it takes."""
    for name, count in plan.frames.items():
        console.print(f"{name}: {count} key frames", highlight=False)
    for name, reason in plan.problems.items():
        console.print(f"left out: {name}: {reason}", highlight=False, markup=False)
    console.print(
        f"drives: {len(plan.frames)}; key frames: {sum(plan.frames.values())}; about {max(1.0, plan.seconds / 60):.0f} min "
        "of one CPU core; a GPU is used if there is one",
        highlight=False,
        soft_wrap=True,
    )
    for step in plan.steps:
        console.print(f"  {step}", highlight=False, soft_wrap=True)


def next_command(args: argparse.Namespace, bags: Sequence[Path]) -> str:
    """Return the command that shows the package at work; topics and a rig that were given go into a parameter file."""
    bag, package = shlex.quote(str(bags[0])) if bags else "BAG", args.out / "package"
    if args.topics is None and args.rig is None:
        return f"occbev replay {bag} --model {shlex.quote(str(package))}"
    if args.topics is None:
        rig = shlex.quote(f"rig:={args.rig}")
        return f"occbev replay {bag} --model {shlex.quote(str(package))} --set {rig}"
    path = args.out / "perception.yaml"
    parameters = {"topics": str(args.topics.resolve()), "model": str(package.resolve())}
    if args.rig is not None:
        parameters["rig"] = str(args.rig.resolve())
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": parameters}}))
    return f"occbev replay {bag} --params-file {shlex.quote(str(path))}"


def _pairs_step(args: argparse.Namespace, grid: str, *more: str) -> Step:
    """Make the pairs; one input that cannot be read costs no other, and the next step needs pairs."""
    how = {
        "--key-interval": f"{args.key_interval:g}",
        "--window": f"{args.window:g}",
        "--grid": grid,
        "--min-travel": f"{MIN_TRAVEL:g}",
        "--workers": str(args.workers),
    }
    given = (word for option in how.items() for word in option)
    words = ("pairs", *map(str, args.inputs), "--out", str(args.out / "pairs"), "--lidar", *given, *more)
    body, inputs = given_arguments(args, add_body_arguments), given_arguments(args, add_input_arguments)
    return Step((*words, *body, *inputs), must=False)


def _adapt_steps(args: argparse.Namespace) -> tuple[tuple[Step, ...], float]:
    package = ModelPackage.load(find_package(args.package))
    given = _given(args, ("steps", "minutes", "rehearsal_drives"))
    words = (
        "adapt",
        str(args.package),
        str(args.out / "pairs"),
        "--out",
        str(args.out),
        "--workers",
        str(args.workers),
    )
    config = adapt_config(argparse.Namespace(config=None, threads=None, held_out=None, **vars_of(args)))
    seconds = SECONDS_PER_STEP * config.training.steps + SECONDS_PER_DRIVE * config.rehearsal_drives
    boxes = args.inputs[0] / "boxes.json"
    known = ("--boxes", str(boxes)) if boxes.is_file() else ()
    return (_pairs_step(args, grid_name(package.model)), Step((*words, *given, *known))), seconds


def _pretrain_steps(args: argparse.Namespace) -> tuple[tuple[Step, ...], float]:
    config = load_config(args.pretrain, TrainingConfig)
    root, package = str(args.out / "pairs"), str(args.out / "package")
    folder = args.out / "pretrain"
    given = _given(args, ("steps", "minutes"))
    steps = (
        _pairs_step(args, grid_name(model_to_train(config)), "--validation", "0.2", "--divide-drives"),
        Step(("pretrain", str(args.pretrain), "--data", root, "--out", str(folder), *given)),
        Step(("export", str(folder), "--out", package)),
        Step(("evaluate", package, "--pairs", root, "--split", "validation"), must=False),
        Step(("calibrate", package, root, "--split", "validation"), must=False),
    )
    return steps, SECONDS_PER_STEP * (args.steps or config.steps)


def _given(args: argparse.Namespace, names: Sequence[str]) -> tuple[str, ...]:
    """Return the options among these that were given, as words."""
    options = ((f"--{name.replace('_', '-')}", getattr(args, name)) for name in names)
    return tuple(word for option, value in options if value is not None for word in (option, str(value)))


def vars_of(args: argparse.Namespace) -> dict[str, object]:
    """Return the options that decide on an adaptation's config."""
    return {"steps": args.steps, "rehearsal_drives": args.rehearsal_drives}
