"""What `occbev-train simulate` does; its arguments and its help are in arguments/simulate.py."""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from occbev.cli.progress import Progress
from occbev.rig import CameraRig
from occbev_training.cli.inputs import choose_output
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive, split_of
from occbev_training.simulator.lidar import LidarConfig, read_lidar
from occbev_training.workers import start_workers

SINGLE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Set for the workers: threads of the linear algebra library only wait for each other on 3 x 3 products."""


def run(args: argparse.Namespace) -> int:
    """Render all drives that are not there yet; returns 0."""
    args.out = choose_output(args.out, args.position, "the folder of drives")
    if args.drives < 1 or args.workers < 1:
        raise ValueError(f"--drives {args.drives} and --workers {args.workers} must be at least 1")
    config = _config(args)
    seeds = list(range(args.first_seed, args.first_seed + args.drives))
    _record(args.out, config, seeds)
    os.environ.update(SINGLE_THREAD)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("simulated drives", total=len(seeds))
        # Fresh interpreters: a forked child would inherit Embree's threads in an unknown state.
        with start_workers(args.workers) as pool:
            jobs = [pool.submit(write_seed, seed, config, args.out, args.format) for seed in seeds]
            try:
                for job in as_completed(jobs):
                    job.result()
                    progress.advance(task)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    if args.format != "bag":
        from occbev_training.sources.nuscenes_writer import merge_nuscenes

        print(f"{args.out}: a nuScenes root of {merge_nuscenes(args.out)} drives")
    if args.format != "nuscenes":
        print(f"{args.out / 'bags'}: ROS 2 bags; their truth is in {args.out / 'truth'}")
    return 0


def write_seed(seed: int, config: DriveConfig, out: Path, form: str) -> None:
    """Render and write one drive in every form that is asked for and not there yet."""
    # Here and not above: a bag needs no nuScenes writer, and each worker pays only for what it writes.
    from occbev_training.sources.nuscenes_writer import is_written, write_drive

    name = SimulatedDrive.name_of(seed)
    bag, truth = out / "bags" / name, out / "truth" / name
    tables = form != "bag" and not is_written(out, name)
    bags = form != "nuscenes" and not (bag.exists() and truth.exists())
    if not tables and not bags:
        return
    cv2.setNumThreads(1)
    drive = SimulatedDrive(seed, config)
    if tables:
        write_drive(drive, out)
    if bags:
        _write_bag(drive, bag, truth)


def _write_bag(drive: SimulatedDrive, bag: Path, truth: Path) -> None:
    from occbev_training.sources.bag_writer import write_bag
    from occbev_training.sources.truth import write_truth

    if not bag.exists():
        write_bag(drive, bag)
    if not truth.exists():
        write_truth(drive, truth)


def _config(args: argparse.Namespace) -> DriveConfig:
    rig = None if args.rig is None else CameraRig.load(args.rig)
    lidar = LidarConfig() if args.rig is None else read_lidar(args.rig)
    lidar = replace(lidar, rate=args.sweep_rate)
    return DriveConfig(
        args.keys,
        args.key_rate,
        args.image,
        lidar=lidar,
        rig=rig,
        random_rigs=args.random_rigs,
        fisheyes=args.fisheyes,
        world=args.world,
    )


def _record(out: Path, config: DriveConfig, seeds: list[int]) -> None:
    """Keep what was simulated beside it; refuse to mix two configurations in one folder."""
    path = out / "simulation.json"
    settings: dict[str, Any] = json.loads(json.dumps(config.as_record()))
    known = json.loads(path.read_text()) if path.exists() else {"config": settings, "seeds": []}
    if known["config"] != settings:
        raise ValueError(f"{path}: the drives there were made with other settings; choose another folder")
    every = sorted({*known["seeds"], *seeds})
    splits = sorted({split_of(seed) for seed in every})
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": settings, "seeds": every, "splits": splits}, indent=1))
