"""What `occbev-train experiment` does; its arguments and its help are in arguments/experiment.py."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from occbev.config import ConfigError
from occbev.share import here_or_shipped
from occbev_training.cli.arguments.experiment import SMOKE

if TYPE_CHECKING:
    from occbev_training.experiment.report import Chapter, Results
    from occbev_training.experiment.runs import Workplace


def run(args: argparse.Namespace) -> int:
    """Register, run or report; 1 while the plan has runs that are missing."""
    # Before torch is loaded; worker processes inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from occbev_training.experiment import plan as plans
    from occbev_training.experiment.product import ProductPlan, load_any_plan
    from occbev_training.experiment.runs import Workplace

    console = Console()
    path = here_or_shipped(SMOKE) if args.smoke else args.plan
    if path is None:
        raise ConfigError("no plan: name one, such as config/experiment/mechanism.yaml, or give --smoke")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: must be at least 1")
    if args.register:
        written = plans.register(path, load_any_plan(path))
        console.print(f"{written} written; commit it", highlight=False, soft_wrap=True)
        return 0
    if args.docs is not None or args.rows is not None:
        return _report(args, path, console)
    if isinstance(load_any_plan(path), ProductPlan):
        return _carry_out_product(path, args, console)
    place = Workplace.of(path, args.out or Path("out") / plans.load_plan(path).name)
    if args.found is not None:
        return _look_for_objects(place, args.found, console)
    return _carry_out(place, args, console)


def _report(args: argparse.Namespace, path: Path, console: Console) -> int:
    """Report on rows that are there; with --docs on those of every registered plan beside this one."""
    from occbev_training.experiment.plan import registration_of
    from occbev_training.experiment.report import write_docs

    folder = args.rows.parent if args.docs is None else args.docs.parent / "results"
    chapter, missing = _chapter(path, args.rows or folder)
    if args.docs is not None:
        plans = [plan for plan in sorted(path.parent.glob("*.yaml")) if plan.name not in (path.name, SMOKE.name)]
        others = [_chapter(plan, folder)[0] for plan in plans if registration_of(plan).exists()]
        write_docs(args.docs, [chapter, *others])
    _print_answer(console, chapter)
    return 1 if missing else 0


def _chapter(path: Path, rows: Path) -> tuple[Chapter, int]:
    """Return the chapter of a plan of any kind, and how many of its tasks are not run."""
    from occbev_training.experiment.product import ProductPlan, load_any_plan, product_tasks
    from occbev_training.experiment.product_report import product_chapter
    from occbev_training.experiment.report import chapter_of
    from occbev_training.experiment.runs import read_rows

    plan = load_any_plan(path)
    if isinstance(plan, ProductPlan):
        found = read_rows(_rows_file(rows, plan.name), plan.hash)
        return product_chapter(plan, found, _command(path)), len(product_tasks(plan)) - len(found)
    results = _results(path, rows)
    return chapter_of(results, _command(path)), len(results.missing)


def _rows_file(rows: Path, name: str) -> Path:
    """Return the file itself, or that of the plan in a folder."""
    return rows if rows.suffix == ".jsonl" else rows / f"{name}.jsonl"


def _results(path: Path, rows: Path) -> Results:
    """Read the rows of a plan, from a file or the folder that holds the plan's, and what was found beside them."""
    from occbev_training.experiment.plan import load_plan
    from occbev_training.experiment.report import Results
    from occbev_training.experiment.runs import read_rows

    plan = load_plan(path)
    file = _rows_file(rows, plan.name)
    found = file.with_name(f"{plan.name}-found.json")
    return Results(plan, read_rows(file, plan.hash), found=json.loads(found.read_text()) if found.exists() else None)


def _command(path: Path) -> str:
    """Return the commands that repeat a chapter of the page."""
    from occbev_training.experiment.product import ProductPlan, load_any_plan

    plan, name = load_any_plan(path), path.stem
    product = isinstance(plan, ProductPlan)
    recorded = not isinstance(plan, ProductPlan) and plan.world.recorded is not None
    run = f"occbev-train experiment {path} --out out/{name} --jobs 2 --keep docs/results/{name}.jsonl"
    lines = [run + (" --recording RECORDING" if recorded else "")]
    if not product and not recorded:
        lines.append(f"occbev-train experiment {path} --out out/{name} --found docs/results")
    return "\n".join([*lines, f"occbev-train experiment {path} --docs docs/results.md"])


def _carry_out_product(path: Path, args: argparse.Namespace, console: Console) -> int:
    """Do what a plan with a network of the product says; 1 while a run is missing."""
    import torch

    from occbev_training.experiment.product import ProductPlace, do_product_task, make_caches, product_tasks
    from occbev_training.experiment.runs import begin_with, run_tasks

    place = ProductPlace.of(path, args.out or Path("out") / path.stem)
    if args.keep is not None:
        begin_with(place, args.keep)
    for done, total in make_caches(place, args.jobs):
        console.print(f"drive {done} of {total}", highlight=False)
    # A GPU takes one task at a time, and loaders keep it busy; without one, tasks of one thread stand side by side.
    on_gpu = torch.cuda.is_available()
    work = partial(do_product_task, loaders=args.jobs if on_gpu else 0)
    for row in run_tasks(place, product_tasks(place.plan), 1 if on_gpu else args.jobs, work):
        console.print(f"{row['key']}  {row['seconds']:.0f} seconds", highlight=False)
    if args.keep is not None:
        args.keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place.rows, args.keep)
    chapter, missing = _chapter(path, place.rows)
    _print_answer(console, chapter)
    return 1 if missing else 0


def _look_for_objects(place: Workplace, folder: Path, console: Console) -> int:
    """Write which objects of the test drives are found only with pre-training, and pictures of some."""
    from occbev_training.experiment.found import draw_findings, look_for_objects, seeds_with_weights, write_findings

    plan, (first, second) = place.plan, ("O", "R")
    if plan.world.recorded is not None:
        raise ConfigError(f"--found: {place.path} has a real drive for its test drives, whose pictures are not drawn")
    seeds = seeds_with_weights(place, (first, second), plan.family_percent)
    if not seeds:
        raise ConfigError(f"--found: {place.runs} holds no seed of both {first} and {second}; do the runs first")
    findings = look_for_objects(place, (first, second), plan.family_percent, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{plan.name}-found.json"
    target.write_text(json.dumps(findings.record(first, second), indent=1) + "\n")
    write_findings(folder / f"{plan.name}-found.jpg", draw_findings(place, findings, first, second))
    console.print(f"{target} and its picture written", highlight=False, soft_wrap=True)
    return 0


def _carry_out(place: Workplace, args: argparse.Namespace, console: Console) -> int:
    """Do what the plan says, then write OUT/report.html; 1 while a run is missing."""
    from occbev_training.experiment.report import chapter_of, draw_frames, to_page

    _do_tasks(place, args, console)
    results = _results(place.path, place.rows)
    page = place.out / "report.html"
    pictures = {"What the network sees: four frames of development drives": draw_frames(place.scored("development"))}
    chapter = chapter_of(results, _command(place.path))
    page.write_text(to_page(f"Experiment {place.plan.name}", chapter.sections, pictures))
    if args.keep is not None:
        args.keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place.rows, args.keep)
    _print_answer(console, chapter)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 1 if results.missing else 0


def _do_tasks(place: Workplace, args: argparse.Namespace, console: Console) -> None:
    """Make the drives, then do every task; prints a line for each."""
    from occbev_training.experiment.runs import begin_with, require_same_drives, run_tasks, tasks_of
    from occbev_training.experiment.world import make_world

    kept = 0 if args.keep is None else begin_with(place, args.keep)
    if kept:
        console.print(f"begins with {kept} rows of {args.keep}", highlight=False, soft_wrap=True)
    for done, total in make_world(place.world, place.plan.world, args.jobs, args.recording):
        console.print(f"drive {done} of {total}", highlight=False)
    require_same_drives(place)
    for row in run_tasks(place, tasks_of(place.plan), args.jobs):
        score = f"  mAP {100 * row['mAP']:.2f}" if "mAP" in row else ""
        console.print(f"{row['key']}{score}  {3600 * row['cpu_hours']:.0f} CPU seconds", highlight=False)


def _print_answer(console: Console, chapter: Chapter) -> None:
    for line in chapter.sections[0].text:
        console.print(line.replace("**", ""), highlight=False, markup=False, soft_wrap=True)
