"""Turn unlabelled drives into pre-training pairs: three-state labels, measured, gated, in shards.

    occbev-train pairs OUT BAG_OR_FOLDER_OR_NUSCENES_ROOT ... --workers 2
    occbev-train pairs OUT --simulate 4 --first-seed 0
    occbev-train pairs OUT ROOT --task-index 3 --num-tasks 16    # one task of an array job
    occbev-train pairs OUT --join                                # index what the tasks made

Finished stretches are kept when the command is given again; the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from occbev.grid import GRIDS
from occbev_training.data.shards import ShardReader
from occbev_training.occupancy.labels import LabelConfig
from occbev_training.occupancy.pairs import (
    PairConfig,
    Unit,
    UnitReport,
    join_units,
    make_unit,
    my_share,
    units_of,
)
from occbev_training.occupancy.quality import LIMITS
from occbev_training.sources.discovery import Opener, Simulate, find_recordings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("out", type=Path, help="folder of the shards")
    parser.add_argument(
        "inputs", type=Path, nargs="*", help="bags, folders of bags, nuScenes roots"
    )
    parser.add_argument("--simulate", type=int, default=0, metavar="DRIVES", help="simulate drives")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="seed of the first simulated drive"
    )
    parser.add_argument("--keys", type=int, default=20, help="key frames of a simulated drive")
    parser.add_argument("--grid", default="occ3d", choices=sorted(GRIDS), help="voxel grid")
    parser.add_argument(
        "--window", type=float, default=1.0, help="seconds of sweeps on either side"
    )
    parser.add_argument(
        "--key-interval", type=float, default=0.5, help="seconds between key frames of a bag"
    )
    parser.add_argument("--min-cameras", type=int, help="fewest cameras; default all but one")
    parser.add_argument(
        "--min-support",
        type=float,
        default=0.5,
        help="share of the expected sweeps that must be there",
    )
    parser.add_argument(
        "--no-gate", action="store_true", help="mark samples that break a limit, keep them"
    )
    parser.add_argument("--lidar", action="store_true", help="store the key sweep, too")
    parser.add_argument("--segment", type=int, default=200, help="key frames of one unit of work")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--task-index", type=int, default=0, help="this task of an array job")
    parser.add_argument("--num-tasks", type=int, default=1, help="tasks of the array job")
    parser.add_argument("--join", action="store_true", help="only index what is finished")
    parser.add_argument(
        "--validation", type=float, default=0.1, help="share of the validation split"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )


def run(args: argparse.Namespace) -> int:
    """Make the pairs, index them, print the quality table; 1 if no sample was kept."""
    console = Console(stderr=args.json)
    config = PairConfig(
        LabelConfig(window=args.window), GRIDS[args.grid], args.segment, args.min_cameras,
        min_support=args.min_support,
        gate=not args.no_gate, lidar=args.lidar,
    )  # fmt: skip
    refused: Counter[str] = Counter()
    if not args.join:
        openers = [
            opener for path in args.inputs for opener in find_recordings(path, args.key_interval)
        ]
        openers += [Simulate(args.first_seed + i, args.keys) for i in range(args.simulate)]
        if not openers:
            raise ValueError("no input: name bags or nuScenes roots, or give --simulate")
        jobs = _jobs(openers, config, args.task_index, args.num_tasks)
        for report in _with_progress(jobs, args.out, config, args.workers, console):
            refused.update(report.refused)
    splits = {"train": 0, "validation": 0}
    if args.join or args.num_tasks == 1:
        splits |= join_units(
            args.out, {"train": 1 - args.validation, "validation": args.validation}
        )
        _print(args, console, splits, refused)
        return 0 if sum(splits.values()) else 1
    return 0


def _jobs(
    openers: Sequence[Opener], config: PairConfig, task_index: int, num_tasks: int
) -> list[tuple[Opener, Unit]]:
    """List this task's units with the way to their recording."""
    by_name = {opener.name: opener for opener in openers}
    if len(by_name) != len(openers):
        raise ValueError("two inputs have the same name; a name is the key of its samples")
    units = [
        unit for opener in openers for unit in units_of(opener.name, opener.keys(), config.segment)
    ]
    return [(by_name[unit.drive], unit) for unit in my_share(units, task_index, num_tasks)]


def _work(opener: Opener, unit: Unit, out: Path, config: PairConfig) -> UnitReport:
    """Make one unit in this process."""
    recording = opener()
    return make_unit(
        recording, replace(unit, last=min(unit.last, len(recording.key_stamp_ns))), out, config
    )


def _one_thread() -> None:
    """Processes are the unit of parallel work: keep libraries from adding threads of their own."""
    import cv2

    cv2.setNumThreads(1)
    os.environ["NUMBA_NUM_THREADS"] = "1"


def _reports(
    jobs: Sequence[tuple[Opener, Unit]], out: Path, config: PairConfig, workers: int
) -> Iterator[UnitReport]:
    """Run the jobs here or in worker processes, in the order in which they end."""
    if workers <= 1:
        yield from (_work(opener, unit, out, config) for opener, unit in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        futures = [pool.submit(_work, opener, unit, out, config) for opener, unit in jobs]
        for future in as_completed(futures):
            yield future.result()


def _with_progress(
    jobs: Sequence[tuple[Opener, Unit]],
    out: Path,
    config: PairConfig,
    workers: int,
    console: Console,
) -> Iterator[UnitReport]:
    """Show key frames done, rate, time left and what was refused."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[refused]}"))  # fmt: skip
    refused: Counter[str] = Counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = sum(unit.last - unit.first for _, unit in jobs)
        task = progress.add_task("key frames", total=total, rate="", refused="")
        for report in _reports(jobs, out, config, workers):
            refused.update(report.refused)
            done = report.unit.last - report.unit.first
            speed = progress.tasks[0].finished_speed or progress.tasks[0].speed or 0.0
            text = " ".join(f"{name} {count}" for name, count in refused.most_common() if count)
            progress.update(task, advance=done, rate=f"{speed:.1f}/s", refused=text)
            yield report


def _print(
    args: argparse.Namespace, console: Console, splits: dict[str, int], refused: Counter[str]
) -> None:
    """Print how many samples there are, the quality table, and the reasons of what was refused."""
    rows = ShardReader(args.out).rows if sum(splits.values()) else []
    quality = {}
    for limit in LIMITS:
        values = np.array([row[limit.name] for row in rows if row.get(limit.name) is not None])
        broken = sum(limit.name in row["flags"].split(",") for row in rows)
        if len(values):
            quality[limit.name] = {
                "median": float(np.median(values)), "worst": float(values.min() if limit.at_least > -np.inf else values.max()),
                "measured": len(values), "flagged": broken + refused[limit.name],
            }  # fmt: skip
    if args.json:
        record = {
            "samples": len(rows),
            "splits": splits,
            "refused": dict(refused),
            "quality": quality,
        }
        print(json.dumps(record, sort_keys=True))
        return
    table = Table("measure", "bound", "median", "worst", "measured", "out of bounds", title=f"{len(rows)} pairs in {args.out}: {splits}")  # fmt: skip
    for limit in LIMITS:
        if limit.name in quality:
            q = quality[limit.name]
            bound = (
                f">= {limit.at_least:g}" if limit.at_least > -np.inf else f"<= {limit.at_most:g}"
            )
            table.add_row(limit.text, bound, f"{q['median']:.4g}", f"{q['worst']:.4g}", str(q["measured"]), str(q["flagged"]))  # fmt: skip
    console.print(table)
    for name, count in refused.most_common():
        if count:
            console.print(f"refused: {name} {count}", highlight=False)
