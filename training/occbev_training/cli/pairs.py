"""What `occbev-train pairs` does; its arguments and its help are in arguments/pairs.py."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from occbev.cli.console import make_console
from occbev.cli.progress import Progress
from occbev.files import replace_file
from occbev.grid import GRIDS
from occbev_training.cli.inputs import describe_problems, ego_box, ego_masks, find_inputs, split_output
from occbev_training.data.shards import ShardReader
from occbev_training.occupancy.executors import Job, run_jobs
from occbev_training.occupancy.labels import LabelConfig
from occbev_training.occupancy.pairs import (
    UNEXPECTED_ERROR,
    PairConfig,
    Unit,
    UnitFailure,
    UnitReport,
    join_units,
    my_share,
    read_reports,
    remove_units_beyond,
    units_of,
)
from occbev_training.occupancy.quality import LIMITS
from occbev_training.sources.deskew import RayLimits
from occbev_training.sources.discovery import Opener, Simulate

SUMMARY = "quality.json"
"""The quality table and what was refused, kept beside the shards."""


def run(args: argparse.Namespace) -> int:
    """Make the pairs, index them, print the quality table; 1 if no sample was kept, an input failed, or the code did."""
    console = make_console(stderr=args.json)
    if not console.is_terminal:
        logging.getLogger("occbev_training").setLevel(logging.ERROR)  # the end names each problem once
    args.inputs, args.out = split_output(args.inputs, args.out, "the pairs", bool(args.simulate or args.join))
    config = _config(args)
    if not 0 <= args.validation < 1:
        raise ValueError(f"--validation {args.validation:g}: want a share of at least 0 and below 1")
    problems, unexpected = dict[str, str](), 0
    if not args.join:
        jobs, problems = _find_jobs(args, config)
        for result in _with_progress(jobs, args, config, console):
            if isinstance(result, UnitFailure):
                problems[result.unit.name] = result.reason
            else:
                unexpected += result.refused.get(UNEXPECTED_ERROR, 0)
    failed = bool(problems or unexpected)
    if not args.join and args.num_tasks > 1:
        _print_problems(problems, console)
        return 1 if failed else 0
    splits = {"train": 0, "validation": 0}
    shares = {"train": 1 - args.validation, "validation": args.validation}
    splits |= join_units(args.out, shares, args.divide_drives)
    _report(args, console, splits, problems)
    return 1 if failed or not sum(splits.values()) else 0


def _config(args: argparse.Namespace) -> PairConfig:
    limits = RayLimits(max_range=args.max_range)
    label = LabelConfig(args.window, limits=limits, ego_box=ego_box(args), ego_masks=ego_masks(args))
    return PairConfig(
        label,
        GRIDS[args.grid],
        args.segment,
        args.min_cameras,
        args.min_support,
        min_travel=args.min_travel,
        gate=not args.no_gate,
        lidar=args.lidar,
        variant=args.labels,
    )


def _find_jobs(args: argparse.Namespace, config: PairConfig) -> tuple[list[Job], dict[str, str]]:
    """Open every input once; return this task's jobs, and inputs that cannot be opened -> why."""
    jobs: dict[Unit, Opener] = {}
    keys: dict[str, int] = {}

    def cut(opener: Opener) -> None:
        keys[opener.name] = opener.keys()
        jobs.update(dict.fromkeys(units_of(opener.name, keys[opener.name], config.segment), opener))

    simulated = [Simulate(args.first_seed + i, args.keys) for i in range(args.simulate)]
    found = find_inputs(args, args.inputs, args.out / "infos", args.key_interval, simulated, cut)
    remove_units_beyond(args.out, keys)
    chosen = my_share(list(jobs), args.task_index, args.num_tasks)
    return [(jobs[unit], unit) for unit in chosen], found.problems


def _with_progress(
    jobs: Sequence[Job], args: argparse.Namespace, config: PairConfig, console: Console
) -> Iterator[UnitReport | UnitFailure]:
    """Show key frames done, rate, time left and what was refused; without a terminal, a line for each unit."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[refused]}"),
    )
    refused: Counter[str] = Counter()
    with Progress(*columns, console=console) as progress:
        total = sum(unit.last - unit.first for _, unit in jobs)
        task = progress.add_task("key frames", total=total, rate="", refused="")

        def advance() -> None:
            speed = progress.tasks[0].finished_speed or progress.tasks[0].speed or 0.0
            progress.update(task, advance=1, rate=f"{speed:.1f}/s")

        for result in run_jobs(jobs, args.out, config, args.workers, args.executor, args.ray_address, advance):
            if isinstance(result, UnitReport):
                refused.update(result.refused)
                progress.update(task, refused=_counts(refused))
                if not console.is_terminal:
                    counts = _counts(Counter(result.refused))
                    console.print(
                        f"{result.unit.name}: {result.samples} pairs{f'; refused: {counts}' if counts else ''}",
                        highlight=False,
                        markup=False,
                    )
            yield result


def _counts(refused: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in refused.most_common() if count)


def _report(
    args: argparse.Namespace,
    console: Console,
    splits: Mapping[str, int],
    problems: Mapping[str, str],
) -> None:
    """Print how many samples there are, the quality table, and the reasons of what was refused."""
    refused, missing, skipped = Counter[str](), Counter[str](), Counter[str]()
    reasons: dict[str, str] = {}
    calibration: dict[str, dict[str, str]] = {}
    for report in read_reports(args.out):
        calibration.setdefault(report.unit.drive, dict(report.calibration))
        refused.update(report.refused)
        missing.update(report.missing)
        skipped.update(report.skipped)
        reasons = {**report.reasons, **reasons}
    rows = ShardReader(args.out).rows if sum(splits.values()) else []
    quality = _quality(rows, refused)
    record = {
        "samples": len(rows),
        "splits": dict(splits),
        "refused": dict(refused),
        "missing_images": dict(missing),
        "skipped_messages": dict(skipped),
        "reasons": reasons,
        "calibration": calibration,
        "problems": dict(problems),
        "quality": quality,
    }
    if args.out.is_dir():
        with replace_file(args.out / SUMMARY) as temporary:
            temporary.write_text(json.dumps(record, sort_keys=True, indent=1) + "\n")
    if args.json:
        print(json.dumps(record, sort_keys=True))
        return
    table = Table(
        "measure",
        "bound",
        "median",
        "worst",
        "measured",
        "out of bounds",
        title=escape(f"{len(rows)} pairs in {args.out}: {dict(splits)}"),
    )
    for limit in LIMITS:
        if limit.name in quality:
            q = quality[limit.name]
            bound = f">= {limit.at_least:g}" if limit.at_least > -np.inf else f"<= {limit.at_most:g}"
            table.add_row(
                limit.text, bound, f"{q['median']:.4g}", f"{q['worst']:.4g}", str(q["measured"]), str(q["flagged"])
            )
    console.print(table)
    lines = [(f"refused: {name}", count, _REMEDY.get(name, "")) for name, count in refused.most_common()]
    lines += [(f"pairs without an image of {name}", count, "") for name, count in missing.most_common()]
    for text, count, remedy in lines:
        if count:
            reason = reasons.get(text.rpartition(" ")[2], "")
            first = f"; the first: {reason}" if reason else ""
            console.print(f"{text} {count}{remedy}{first}", highlight=False, markup=False, soft_wrap=True)
    if skipped:
        console.print(f"messages skipped: {_counts(skipped)}", highlight=False, markup=False)
    if rows and args.validation > 0 and not splits["validation"]:
        drives = len({row["drive"] for row in rows})
        why = "there is one drive" if drives == 1 else f"the {drives} drives met within 100 m of each other"
        console.print(
            f"no validation split: {why}; 'adapt' holds out a part of them; 'pretrain' needs pairs of other drives "
            "for --validation, or the end of each drive held out by --divide-drives",
            highlight=False,
        )
    _print_problems(problems, console)


_REMEDY = {
    "low_support": ": too few of the expected sweeps are there; --min-support 0 keeps such frames",
    "unexpected_error": ": a fault of occbev, please report it; its traceback is logged at debug level",
    "too_few_cameras": ": --min-cameras says how many must be there",
}


def _print_problems(problems: Mapping[str, str], console: Console) -> None:
    for line in describe_problems(problems):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _quality(rows: Sequence[Mapping[str, Any]], refused: Counter[str]) -> dict[str, dict[str, float]]:
    """Return median, worst and counts of every measure."""
    quality = {}
    for limit in LIMITS:
        values = np.array([row[limit.name] for row in rows if row.get(limit.name) is not None])
        broken = sum(limit.name in row["flags"].split(",") for row in rows)
        if len(values):
            quality[limit.name] = {
                "median": float(np.median(values)),
                "worst": float(values.min() if limit.at_least > -np.inf else values.max()),
                "measured": len(values),
                "flagged": broken + refused[limit.name],
            }
    return quality
