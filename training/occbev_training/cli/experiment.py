"""What `occbev-train experiment` does; its arguments and its help are in arguments/experiment.py."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from rich.console import Console

from occbev.config import ConfigError
from occbev.share import here_or_shipped
from occbev_training.cli.arguments.experiment import SMOKE


def run(args: argparse.Namespace) -> int:
    """Register, run or report; 1 while the plan has runs that are missing."""
    # Before torch is loaded; worker processes inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from occbev_training.experiment import plan as plans
    from occbev_training.experiment.report import Results, draw_frames, sections_of, to_page, write_docs
    from occbev_training.experiment.runs import Workplace, read_rows

    console = Console()
    path = here_or_shipped(SMOKE) if args.smoke else args.plan
    if path is None:
        raise ConfigError("no plan: name one, such as config/experiment/mechanism.yaml, or give --smoke")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: must be at least 1")
    if args.register:
        console.print(f"{plans.register(path)} written; commit it", highlight=False, soft_wrap=True)
        return 0
    plan = plans.load_plan(path)
    kept = f"docs/results/{plan.name}.jsonl"
    command = (
        f"occbev-train experiment {path} --out out/{plan.name} --jobs 2 --keep {kept}\n"
        f"occbev-train experiment {path} --docs docs/results.md"
    )
    if args.docs is not None or args.rows is not None:
        rows = args.rows or args.docs.parent / "results" / f"{plan.name}.jsonl"
        results = Results(plan, read_rows(rows, plan.hash))
        if args.docs is not None:
            write_docs(args.docs, results, command)
        _print_answer(console, results)
        return 1 if results.missing else 0
    place = Workplace.of(path, args.out or Path("out") / plan.name)
    _carry_out(place, args.jobs, console)
    results = Results(plan, read_rows(place.rows, plan.hash))
    page = place.out / "report.html"
    pictures = {"What the network sees: four frames of development drives": draw_frames(place.scored("development"))}
    page.write_text(to_page(f"Experiment {plan.name}", sections_of(results, command), pictures))
    if args.keep is not None:
        args.keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place.rows, args.keep)
    _print_answer(console, results)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 1 if results.missing else 0


def _carry_out(place: object, jobs: int, console: Console) -> None:
    """Make the drives, then do every task; prints a line for each."""
    from occbev_training.experiment.runs import Workplace, run_tasks, tasks_of
    from occbev_training.experiment.world import make_world

    assert isinstance(place, Workplace)
    for done, total in make_world(place.world, place.plan.world, jobs):
        console.print(f"drive {done} of {total}", highlight=False)
    tasks = tasks_of(place.plan)
    for row in run_tasks(place, tasks, jobs):
        score = f"  mAP {100 * row['mAP']:.2f}" if "mAP" in row else ""
        console.print(f"{row['key']}{score}  {3600 * row['cpu_hours']:.0f} CPU seconds", highlight=False)


def _print_answer(console: Console, results: object) -> None:
    from occbev_training.experiment.report import Results, sections_of

    assert isinstance(results, Results)
    for line in sections_of(results, "")[0].text:
        console.print(line.replace("**", ""), highlight=False, markup=False, soft_wrap=True)
