"""Decode and label every key frame once, into a sample cache that training reads.

    occbev-train prepare CACHE --nuscenes ROOT --scenes train.txt
    occbev-train prepare CACHE --simulate 120 --first-seed 0 --keys 16

Finished drives are kept when the command is given again; a drive that was cut off is made anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from occbev.config import ModelConfig
from occbev.inference.families import load_model
from occbev_training.data.label_frame import in_base_link
from occbev_training.occupancy.prepare import PrepareConfig, prepare
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.sources.discovery import OpenScene, chosen_names, read_names
from occbev_training.sources.nuscenes import open_nuscenes
from occbev_training.sources.recording import Recording


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("cache", type=Path, help="folder of the cache")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--nuscenes", type=Path, metavar="ROOT", help="data root in the nuScenes schema")
    parser.add_argument("--scenes", type=Path, metavar="FILE", help="only these scenes of ROOT, one name a line")
    source.add_argument("--simulate", type=int, metavar="DRIVES", help="simulate this many drives")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first simulated drive")
    parser.add_argument("--keys", type=int, default=16, help="key frames of a simulated drive")
    parser.add_argument("--key-rate", type=float, default=2.0, help="key frames per second of a simulated drive")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("config/models/occbev-tiny.yaml"),
        help="model config: input size and voxel grid",
    )
    parser.add_argument(
        "--label-window",
        type=float,
        default=1.0,
        help="seconds of sweeps on either side of a label",
    )
    parser.add_argument(
        "--near-hits", type=int, default=2, help="sweeps that must hit a near voxel; 1 where there is hardly one"
    )
    parser.add_argument("--no-labels", action="store_true", help="no three-state labels: fine-tuning needs none")
    parser.add_argument("--workers", type=int, default=1, help="processes")


def run(args: argparse.Namespace) -> int:
    """Build the cache; prints each drive as it is finished."""
    model = in_base_link(load_model(args.model))  # as training will ask for it
    config = PrepareConfig(model.image, model.grid, None if args.no_labels else args.label_window, args.near_hits)
    if args.scenes and not args.nuscenes:
        raise ValueError("--scenes names scenes of --nuscenes ROOT")
    jobs = _nuscenes_jobs(args) if args.nuscenes else _make_simulated_jobs(args, model)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("drives", total=len(jobs))

        def finished(name: str, count: int) -> None:
            progress.advance(task)
            console.print(f"{name}: {count} samples", highlight=False)

        total = prepare(jobs, args.cache, config, args.workers, finished)
    console.print(f"{args.cache}: {total} samples of {len(jobs)} drives")
    return 0


@dataclass(frozen=True)
class Simulate:
    """Makes one simulated drive; picklable."""

    seed: int
    config: DriveConfig

    def __call__(self) -> Recording:
        """Build the world."""
        return SimulatedDrive(self.seed, self.config)


def _nuscenes_jobs(args: argparse.Namespace) -> dict[str, Callable[[], Recording]]:
    names = read_names(args.scenes) if args.scenes else None
    scenes = chosen_names(open_nuscenes(args.nuscenes).scenes, names, args.nuscenes)
    return {scene: OpenScene(args.nuscenes, scene) for scene in scenes}


def _make_simulated_jobs(args: argparse.Namespace, model: ModelConfig) -> dict[str, Callable[[], Recording]]:
    config = DriveConfig(
        keys=args.keys,
        key_rate=args.key_rate,
        image=(model.image.width, model.image.height),
        grid=model.grid,
    )
    seeds = range(args.first_seed, args.first_seed + args.simulate)
    return {f"sim-{seed:06d}": Simulate(seed, config) for seed in seeds}
