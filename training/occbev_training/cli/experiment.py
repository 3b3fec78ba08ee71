"""What `occbev-train experiment` does; its arguments and its help are in arguments/experiment.py."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from occbev.config import ConfigError
from occbev.share import here_or_shipped
from occbev_training.cli.arguments.experiment import SMOKE

if TYPE_CHECKING:
    from occbev_training.experiment.report import Results
    from occbev_training.experiment.runs import Workplace


def run(args: argparse.Namespace) -> int:
    """Register, run or report; 1 while the plan has runs that are missing."""
    # Before torch is loaded; worker processes inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from occbev_training.experiment import plan as plans
    from occbev_training.experiment.runs import Workplace

    console = Console()
    path = here_or_shipped(SMOKE) if args.smoke else args.plan
    if path is None:
        raise ConfigError("no plan: name one, such as config/experiment/mechanism.yaml, or give --smoke")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: must be at least 1")
    if args.register:
        console.print(f"{plans.register(path)} written; commit it", highlight=False, soft_wrap=True)
        return 0
    if args.docs is not None or args.rows is not None:
        return _report(args, path, console)
    place = Workplace.of(path, args.out or Path("out") / plans.load_plan(path).name)
    if args.found is not None:
        return _look_for_objects(place, args.found, console)
    return _carry_out(place, args, console)


def _report(args: argparse.Namespace, path: Path, console: Console) -> int:
    """Report on rows that are there; with --docs on those of every plan beside this one."""
    from occbev_training.experiment.report import Chapter, write_docs

    folder = args.rows.parent if args.docs is None else args.docs.parent / "results"
    results = _results(path, args.rows or folder)
    if args.docs is not None:
        others = [other for other in sorted(path.parent.glob("*.yaml")) if other != path]
        chapters = [Chapter(results, _command(path, results.plan.world.recorded is not None))]
        for other in others:
            found = _results(other, folder)
            if found.rows:
                chapters.append(Chapter(found, _command(other, found.plan.world.recorded is not None)))
        write_docs(args.docs, chapters)
    _print_answer(console, results)
    return 1 if results.missing else 0


def _results(path: Path, rows: Path) -> Results:
    """Read the rows of a plan, from a file or the folder that holds the plan's, and what was found beside them."""
    from occbev_training.experiment.plan import load_plan
    from occbev_training.experiment.report import Results
    from occbev_training.experiment.runs import read_rows

    plan = load_plan(path)
    file = rows / f"{plan.name}.jsonl" if rows.suffix != ".jsonl" else rows
    found = file.with_name(f"{plan.name}-found.json")
    return Results(plan, read_rows(file, plan.hash), found=json.loads(found.read_text()) if found.exists() else None)


def _command(path: Path, recorded: bool) -> str:
    """Return the commands that repeat a chapter of the page."""
    name = path.stem
    lines = [
        f"occbev-train experiment {path} --out out/{name} --jobs 2 --keep docs/results/{name}.jsonl"
        + (" --recording RECORDING" if recorded else "")
    ]
    if not recorded:
        lines.append(f"occbev-train experiment {path} --out out/{name} --found docs/results")
    return "\n".join([*lines, f"occbev-train experiment {path} --docs docs/results.md"])


def _look_for_objects(place: Workplace, folder: Path, console: Console) -> int:
    """Write which objects of the test drives are found only with pre-training, and pictures of some."""
    from occbev.reports.rendering import write_picture
    from occbev_training.experiment.found import draw_findings, look_for_objects

    plan, (first, second) = place.plan, ("O", "R")
    if plan.world.recorded is not None:
        raise ConfigError(f"--found: {place.path} has a real drive for its test drives, whose pictures are not drawn")
    seeds = _results(place.path, place.rows).seeds_of(plan.family_percent, first, second)
    if not seeds:
        raise ConfigError(f"--found: {place.rows} holds no seed of both {first} and {second}; do the runs first")
    findings = look_for_objects(place, (first, second), plan.family_percent, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{plan.name}-found.json"
    target.write_text(json.dumps(findings.record(first, second), indent=1) + "\n")
    write_picture(str(folder / f"{plan.name}-found.jpg"), draw_findings(place, findings, first, second))
    console.print(f"{target} and its picture written", highlight=False, soft_wrap=True)
    return 0


def _carry_out(place: Workplace, args: argparse.Namespace, console: Console) -> int:
    """Do what the plan says, then write OUT/report.html; 1 while a run is missing."""
    from occbev_training.experiment.report import draw_frames, sections_of, to_page

    _do_tasks(place, args, console)
    results = _results(place.path, place.rows)
    page = place.out / "report.html"
    pictures = {"What the network sees: four frames of development drives": draw_frames(place.scored("development"))}
    command = _command(place.path, place.plan.world.recorded is not None)
    page.write_text(to_page(f"Experiment {place.plan.name}", sections_of(results, command), pictures))
    if args.keep is not None:
        args.keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place.rows, args.keep)
    _print_answer(console, results)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 1 if results.missing else 0


def _do_tasks(place: Workplace, args: argparse.Namespace, console: Console) -> None:
    """Make the drives, then do every task; prints a line for each."""
    from occbev_training.experiment.runs import run_tasks, tasks_of
    from occbev_training.experiment.world import make_world

    for done, total in make_world(place.world, place.plan.world, args.jobs, args.recording):
        console.print(f"drive {done} of {total}", highlight=False)
    for row in run_tasks(place, tasks_of(place.plan), args.jobs):
        score = f"  mAP {100 * row['mAP']:.2f}" if "mAP" in row else ""
        console.print(f"{row['key']}{score}  {3600 * row['cpu_hours']:.0f} CPU seconds", highlight=False)


def _print_answer(console: Console, results: Results) -> None:
    from occbev_training.experiment.report import sections_of

    for line in sections_of(results, "")[0].text:
        console.print(line.replace("**", ""), highlight=False, markup=False, soft_wrap=True)
