"""Every task of a plan in order, in processes of one thread each; finished tasks are not repeated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from occbev_training.experiment import checks
from occbev_training.experiment.network import build_slim
from occbev_training.experiment.phases import (
    cpu_seconds,
    finetune,
    phase1_of,
    pretrain,
    score_detection,
    score_occupancy,
)
from occbev_training.experiment.plan import (
    Plan,
    PlanError,
    Registered,
    RunGroup,
    Settings,
    load_plan,
    require_registered,
)
from occbev_training.experiment.pool import Pool, labelled_pool, whole_pool
from occbev_training.experiment.statistics import CUT
from occbev_training.models.checkpoints import load_strictly, read_weights
from occbev_training.workers import start_workers

Row = dict[str, Any]

CHECKED: tuple[tuple[str, float], ...] = (("R", 100.0), ("R", 5.0), ("K", 100.0))
"""Arms and shares of labelled drives that the trained checks look at, on development drives."""


@dataclass(frozen=True)
class Task:
    """One piece of work that ends in a row. kind: "check", "phase1", "trial" or "run"; key: its name and its folder."""

    kind: str
    arm: str = ""
    percent: float = 0.0
    seed: int = 0
    settings: Settings | None = None

    @property
    def key(self) -> str:
        """Name that no other task of the plan has."""
        parts = [self.kind, self.arm]
        if self.kind in ("run", "trial"):
            parts.append(f"{self.percent:g}")
        if self.settings is not None:
            parts.append(f"lr{self.settings.lr:g}-scale{self.settings.encoder_scale:g}")
        if self.kind != "check":
            parts.append(f"seed{self.seed}")
        return "-".join(parts)

    @property
    def needs(self) -> str | None:
        """Key of the task that must be done before; None without one."""
        if self.kind == "check":
            return Task("phase1", "O", seed=0).key if self.arm == "frames" else None
        start = phase1_of(self.arm) if self.kind in ("run", "trial") else None
        return None if start is None else Task("phase1", start, seed=self.seed).key


def tasks_of(plan: Plan) -> list[Task]:
    """Return every task, in order: checks without training, trials, trained checks, then the runs by group and seed.

    All arms of a seed stand together, so that a part of the plan still holds whole pairs. The trained checks come after
    the runs of the tested family where the plan says so.
    """
    checked = plan.checks != "none"
    tasks = dict.fromkeys([Task("check", name) for name in checks.UNTRAINED] if checked else [])
    for arm in sorted({arm for pair in plan.family for arm in pair}, reverse=True) if plan.trials else ():
        for settings in plan.trials:
            _add(tasks, Task("trial", arm, plan.trial_percent, plan.check_seed, settings))
    trained = [Task("trial", arm, percent, plan.check_seed) for arm, percent in CHECKED] if checked else []
    tested = [group for group in plan.runs if group.percent == plan.family_percent and _tests(plan, group)]
    order: list[RunGroup | Task] = [*trained, *plan.runs]
    if plan.checks == "after_family":
        order = [*tested, *trained, *plan.runs]
    for entry in order:
        if isinstance(entry, Task):
            _add(tasks, entry)
        else:
            _add_group(tasks, entry)
    return [task for task in tasks if checked or task.kind != "check"]


def _tests(plan: Plan, group: RunGroup) -> bool:
    return any(arm in group.arms for pair in plan.family for arm in pair)


def _add_group(tasks: dict[Task, None], group: RunGroup) -> None:
    for seed in range(group.seeds):
        for arm in group.arms:
            _add(tasks, Task("run", arm, group.percent, seed))


def _add(tasks: dict[Task, None], task: Task) -> None:
    start = phase1_of(task.arm)
    if start is not None:
        tasks[Task("phase1", start, seed=task.seed)] = None
        if (start, task.seed) == ("O", 0):
            tasks[Task("check", "frames")] = None
    tasks[task] = None


class Place(Protocol):
    """Where a plan of any kind is carried out."""

    @property
    def path(self) -> Path:
        """File of the plan."""
        ...

    @property
    def out(self) -> Path:
        """Folder of everything."""
        ...

    @property
    def plan(self) -> Registered:
        """The plan."""
        ...

    @property
    def runs(self) -> Path:
        """Folder of everything that depends on the plan."""
        ...

    @property
    def rows(self) -> Path:
        """File of the results, one JSON line for each task."""
        ...

    def folder(self, task_key: str) -> Path:
        """Folder of a task's training."""
        ...


class PlanFolders:
    """What of an output folder belongs to one plan, by its hash: rows and runs."""

    out: Path
    plan: Any

    @property
    def runs(self) -> Path:
        """Folder of everything that depends on the plan."""
        return self.out / self.plan.hash

    @property
    def rows(self) -> Path:
        """File of the results, one JSON line for each task."""
        return self.runs / "rows.jsonl"

    def folder(self, task_key: str) -> Path:
        """Folder of a task's training."""
        return self.runs / "runs" / task_key


@dataclass(frozen=True)
class Workplace(PlanFolders):
    """Where a plan is carried out. path: its file. out: folder that holds `world/`, and `HASH/` with rows and runs."""

    path: Path
    out: Path
    plan: Plan = field(compare=False)

    @classmethod
    def of(cls, path: Path, out: Path) -> Workplace:
        """Read the plan."""
        return cls(path, out, load_plan(path))

    @property
    def world(self) -> Path:
        """Folder of the drives."""
        return self.out / "world"

    def scored(self, split: str) -> Pool:
        """Open drives to score; raises PlanError for test drives of a plan that is not registered as it stands."""
        if split != "development":
            require_registered(self.path, self.plan)
        return whole_pool(self.world, split, self.plan.world)


def read_rows(path: Path, plan_hash: str | None = None) -> list[Row]:
    """Read result rows, those of one plan; a last line that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if plan_hash in (None, row["plan"])]


def begin_with(place: Place, kept: Path) -> int:
    """Copy the rows of a plan from a file `kept` if its output folder has none; returns how many."""
    rows = read_rows(kept, place.plan.hash)
    if place.rows.exists() or not rows:
        return 0
    place.runs.mkdir(parents=True, exist_ok=True)
    place.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def require_same_drives(place: Workplace) -> None:
    """Raise PlanError if rows here were scored on other test drives, such as those of another version of the simulator."""
    scored = {row["data"]["scored"] for row in read_rows(place.rows, place.plan.hash) if row["kind"] == "run"}
    here = place.scored("test").hash if scored else ""
    if scored and scored != {here}:
        raise PlanError(
            f"{place.rows}: rows of test drives {', '.join(sorted(scored))}, those in {place.world} are {here}: another "
            "version of the simulator or another processor rendered them; begin anew in an empty --out without --keep"
        )


def run_tasks(place: Place, tasks: Sequence[Task], workers: int, do: Callable[..., Row] | None = None) -> Iterator[Row]:
    """Do every task that has no row yet; yields its row after it was written. do: in place of `do_task`; picklable.

    Rows may come from elsewhere, without the weights of phase 1: those that a task needs are trained again.
    """
    place.runs.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in read_rows(place.rows, place.plan.hash)}
    needed = {task.needs for task in tasks if task.key not in done}
    begun = {key for key in needed if key is not None and key in done}
    lost = {key for key in begun if not (place.folder(key) / "weights.safetensors").exists()}
    waiting = [task for task in tasks if task.key not in done or task.key in lost]
    work = partial(do or do_task, path=place.path, out=place.out)
    if workers <= 1:
        results: Iterator[Row] = map(work, waiting)
    else:
        results = _side_by_side(waiting, work, workers)
    for row in results:
        if row["key"] not in done:
            _append(place.rows, row)
        yield row


def _append(path: Path, row: Row) -> None:
    """Add a line; what a killed process left unfinished is cut off first."""
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _side_by_side(tasks: Sequence[Task], work: partial[Row], workers: int) -> Iterator[Row]:
    waiting, running = list(tasks), dict[Future[Row], Task]()
    with start_workers(workers, _begin) as pool:
        try:
            while waiting or running:
                _submit(pool, waiting, running, work, workers)
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    row = future.result()
                    del running[future]
                    yield row
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _submit(
    pool: ProcessPoolExecutor, waiting: list[Task], running: dict[Future[Row], Task], work: partial[Row], workers: int
) -> None:
    """Start the first tasks whose needs are done."""
    for task in list(waiting):
        if len(running) >= workers:
            return
        unfinished = {other.key for other in (*waiting, *running.values())}
        if task.needs not in unfinished:
            waiting.remove(task)
            running[pool.submit(work, task)] = task


def _begin() -> None:
    torch.set_num_threads(1)


def do_task(task: Task, path: Path, out: Path) -> Row:
    """Do one task in this process and return its row."""
    place = Workplace.of(path, out)
    before = time.process_time()
    result = _KINDS[task.kind](task, place)
    common = {
        "key": task.key,
        "kind": task.kind,
        "arm": task.arm,
        "plan": place.plan.hash,
        "seed": task.seed,
        "cpu_hours": round((time.process_time() - before) / 3600, 5),
    }
    return common | result


def _check(task: Task, place: Workplace) -> Row:
    start = None if task.needs is None else place.folder(task.needs) / "weights.safetensors"
    return {"checks": checks.look(task.arm, place.world, place.plan, start)}


def _phase1(task: Task, place: Workplace) -> Row:
    folder, plan = place.folder(task.key), place.plan
    pretrain(task.arm, task.seed, plan, place.world, folder)
    iou = None
    if task.arm != "D":
        network = build_slim("pretrain", task.seed)
        path = folder / "weights.safetensors"
        load_strictly(network, read_weights(path)[0], str(path))
        # A real drive has no dense truth.
        split = "development" if task.seed == plan.check_seed or plan.world.recorded else "test"
        iou = score_occupancy(network.eval(), place.scored(split))
    return {"steps": plan.pretrain_steps, "occupancy_iou": iou, "cpu_hours": cpu_seconds(folder) / 3600}


def _run(task: Task, place: Workplace) -> Row:
    plan, folder = place.plan, place.folder(task.key)
    # Opened before hours of training, because it refuses a plan that is not registered.
    split = "development" if task.kind == "trial" else "test"
    pool = place.scored(split)
    settings = task.settings or plan.settings_of(task.arm)
    start = None if task.needs is None else place.folder(task.needs) / "weights.safetensors"
    network = finetune(task.arm, task.percent, task.seed, settings, plan, place.world, folder, start)
    record = score_detection(network, pool)
    labelled = labelled_pool(place.world, plan.world, task.percent, task.seed)
    row = {
        "percent": task.percent,
        "split": split,
        "lr": settings.lr,
        "encoder_scale": settings.encoder_scale,
        "labelled_drives": labelled.numbers,
        "data": {"labelled": labelled.hash, "scored": pool.hash},
        "mAP": float(record.mean_ap()[0]),
        "mAP_nuscenes": float(record.mean_ap(counted=CUT)[0]),
        "AP": record.class_ap(),
        "cpu_hours": cpu_seconds(folder) / 3600,
        "matches": record.as_record(),
    }
    if split == "test" and "unseen_rig" in plan.world.simulated:
        row["mAP_unseen_rig"] = float(score_detection(network, place.scored("unseen_rig")).mean_ap()[0])
    return row


_KINDS: Mapping[str, Any] = {"check": _check, "phase1": _phase1, "trial": _run, "run": _run}
