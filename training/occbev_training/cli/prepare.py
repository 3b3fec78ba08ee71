"""What `occbev-train prepare` does; its arguments and its help are in arguments/prepare.py."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from occbev.cli.console import make_console
from occbev.cli.progress import Progress
from occbev.config import ImageConfig, ModelConfig, to_record
from occbev.files import file_name
from occbev.inference.families import load_model
from occbev.inference.preprocess import network_camera
from occbev.rig import CameraRig
from occbev_training.cli.inputs import (
    FoundInputs,
    class_map,
    describe_problems,
    ego_box,
    ego_masks,
    find_inputs,
    split_output,
)
from occbev_training.data.label_frame import in_base_link
from occbev_training.occupancy.prepare import DriveReport, PrepareConfig, prepare_drives
from occbev_training.simulator.drive import WORLDS, DriveConfig, SimulatedDrive
from occbev_training.simulator.lidar import LidarConfig, read_lidar
from occbev_training.simulator.rigs import draw_vehicle
from occbev_training.sources.categories import describe_classless
from occbev_training.sources.discovery import Opener
from occbev_training.sources.labelled import OpenLabelled
from occbev_training.sources.recording import Recording


def run(args: argparse.Namespace) -> int:
    """Build the cache; prints each drive as it is finished; 1 if an input or the code failed, or no box is there to learn."""
    args.inputs, args.out = split_output(args.inputs, args.out, "the cache", bool(args.simulate or args.nuscenes))
    model = in_base_link(load_model(args.model))  # as training will ask for it
    window = None if args.no_labels else args.label_window
    config = PrepareConfig(model.image, model.grid, window, args.near_hits, ego_box(args), ego_masks(args))
    console = make_console()
    found = _find(args, model)
    reports = list(_with_progress(found.openers, args, config, console))
    problems = found.problems | {report.name: report.problem for report in reports if report.problem}
    lines, boxless = _summarise(args, [report for report in reports if not report.problem])
    for line in [*describe_problems(problems), *lines]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    unexpected = any(report.unexpected for report in reports)
    return 1 if problems or boxless or unexpected else 0


@dataclass(frozen=True)
class Simulate:
    """Makes one simulated drive; picklable. image: the network's, at whose size pictures are rendered at once."""

    seed: int
    config: DriveConfig
    image: ImageConfig

    @property
    def name(self) -> str:
        """The drive's name."""
        return f"sim-{self.seed:06d}"

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits over another rig or world than the usual; else the seed, which is the name, says all."""
        if self.config.rig is None and not self.config.random_rigs and self.config.world == WORLDS[0]:
            return ""
        asked = json.dumps([self.config.as_record(), to_record(self.image)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:12]

    def keys(self) -> int:
        """Number of key frames."""
        return self.config.keys

    def __call__(self) -> Recording:
        """Build the world."""
        config = self.config
        if config.random_rigs:
            rig, lidar = draw_vehicle(self.seed, config.lidar.rate, config.fisheyes)
            config = replace(config, rig=rig, lidar=lidar, random_rigs=False, fisheyes=0.0)
        if config.rig is not None:
            fitted = tuple(network_camera(camera, self.image) for camera in config.rig.cameras)
            config = replace(config, rig=CameraRig(fitted))
        return SimulatedDrive(self.seed, config)


def _find(args: argparse.Namespace, model: ModelConfig) -> FoundInputs:
    """Find the drives of all inputs, with their labels where there are some."""
    size = (model.image.width, model.image.height)
    rig, lidar = (None, LidarConfig()) if args.rig is None else (CameraRig.load(args.rig), read_lidar(args.rig))
    config = DriveConfig(
        keys=args.keys,
        key_rate=args.key_rate,
        image=size,
        lidar=lidar,
        rig=rig,
        random_rigs=args.random_rigs,
        fisheyes=args.fisheyes,
        world=args.world,
        grid=model.grid,
    )
    seeds = range(args.first_seed, args.first_seed + args.simulate)
    inputs = [*args.inputs, *([] if args.nuscenes is None else [args.nuscenes])]
    found = find_inputs(
        args, inputs, args.out / "infos", args.key_interval, [Simulate(seed, config, model.image) for seed in seeds]
    )
    if args.labels is not None:
        found.openers = [OpenLabelled(o, _labels_of(args, o), class_map(args), args.max_gap) for o in found.openers]
    return found


def _labels_of(args: argparse.Namespace, opener: Opener) -> Path:
    return args.labels / f"{file_name(opener.name, 'drive name')}.json" if args.labels.is_dir() else args.labels


def _with_progress(
    openers: Sequence[Opener], args: argparse.Namespace, config: PrepareConfig, console: Console
) -> Iterator[DriveReport]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    jobs: dict[str, Callable[[], Recording]] = {opener.name: opener for opener in openers}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("drives", total=len(jobs))
        for report in prepare_drives(jobs, args.out, config, args.workers):
            progress.advance(task)
            if not report.problem:
                console.print(f"{report.name}: {report.samples} samples", highlight=False, markup=False)
            yield report


def _summarise(args: argparse.Namespace, reports: Sequence[DriveReport]) -> tuple[list[str], bool]:
    """Return what the cache holds, as lines, and whether a filter, or nothing at all, left it without any box."""
    boxes, classless = Counter[str](), Counter[str]()
    for report in reports:
        boxes.update(report.boxes)
        classless.update(report.classless)
    without = sum(report.without_points for report in reports)
    total = boxes.total()
    lines = [
        f"{report.name}: left out: {count} {what}" for report in reports for what, count in report.left_out.items()
    ]
    lines.append(f"{args.out}: {sum(report.samples for report in reports)} samples of {len(reports)} drives")
    if total:
        listed = ", ".join(f"{name} {count}" for name, count in boxes.most_common())
        lines.append(f"boxes: {listed}; {without} of them without a LiDAR return, which training leaves out")
    if classless:
        lines.append(f"left out: {describe_classless(classless)}")
    useless = total == without and (bool(classless) or bool(total) or args.no_labels)
    if useless and reports:
        lines.append("no box is left: no detection head can be trained on this cache")
    return lines, useless
