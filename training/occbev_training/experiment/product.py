"""The product's own network with and without pre-training, by the product's own recipes: hours of two cores, or one GPU.

Arms R and R0 fine-tune from ImageNet weights, arm O pre-trains on occupancy first. R takes the same steps as O in all, R0
the same steps of fine-tuning, as publications compare. Everything is `occbev-train prepare`, `pretrain`, `finetune` and
`evaluate`, with the seeds, steps and drives of a registered plan.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from occbev.config import ModelConfig, load_config, read_record, to_record
from occbev.inference.families import load_model
from occbev.share import here_or_shipped
from occbev_training.data.cache import open_cache
from occbev_training.engine.config import TrainingConfig
from occbev_training.engine.stages import StageInputs, keep_trainable_heads, model_to_train, predictor, train_stage
from occbev_training.evaluation.frames import evaluate
from occbev_training.experiment.plan import Drives, Plan, PlanError, differences, load_plan, require_registered
from occbev_training.experiment.pool import labelled_drives
from occbev_training.experiment.runs import PlanFolders, Row, Task
from occbev_training.experiment.statistics import MatchRecord
from occbev_training.models.build import build_model
from occbev_training.models.checkpoints import load_strictly, read_weights
from occbev_training.occupancy.prepare import PrepareConfig, prepare_drives
from occbev_training.simulator.drive import SEED_RANGES
from occbev_training.sources.discovery import Simulate

KIND = "product"
"""What `kind` says in the file of such a plan."""

ARMS: Mapping[str, str] = {
    "R": "ImageNet weights of the image encoder, trained on boxes and voxels for as many steps as O in both phases",
    "R0": "ImageNet weights of the image encoder, trained on boxes and voxels for the steps of phase 2 alone",
    "O": "ImageNet weights of the image encoder, phase 1 learns occupancy in three states (Occ-BEV with our labels)",
}
"""Arm -> what it is."""

COMPARED = (("O", "R"), ("O", "R0"))
"""Differences, first minus second: at equal compute, and at equal fine-tuning as publications compare."""


@dataclass(frozen=True)
class ProductPlan:
    """One experiment with a network of the product."""

    train: Drives
    """Simulated drives of both phases; labelled ones are chosen among them."""
    test: Drives
    """Simulated drives that are scored."""
    kind: str = KIND
    """Must be "product"; a plan of the other kind has no such key."""
    name: str = "tiny"
    """Name in results."""
    keys: int = 8
    """Key frames of a drive, at 2 Hz."""
    pretrain: str = "config/training/pretrain_tiny.yaml"
    """Recipe of phase 1."""
    finetune: str = "config/training/finetune_tiny.yaml"
    """Recipe of phase 2."""
    pretrain_steps: int = 100
    """Optimiser steps of phase 1."""
    finetune_steps: int = 200
    """Optimiser steps of phase 2."""
    batch: int = 16
    """Samples of a step."""
    accumulate: int = 1
    """Forward passes that a step's samples are divided into."""
    percents: tuple[float, ...] = (10.0, 100.0)
    """Shares of the training drives that have labels."""
    seeds: int = 3
    """Paired seeds."""
    draws: int = 10_000
    """Bootstrap draws."""
    arms: tuple[str, ...] = ("O", "R", "R0")
    """Keys of `ARMS`."""
    departures: tuple[str, ...] = field(default_factory=tuple)
    """Where this plan departs from the published comparison, and why."""
    notes: tuple[str, ...] = ()
    """What a reader of the answer must know, such as what was added later."""

    def __post_init__(self) -> None:
        for drives, split in ((self.train, "train"), (self.test, "test")):
            if drives.seeds[0] not in SEED_RANGES[split] or drives.seeds[-1] not in SEED_RANGES[split]:
                raise PlanError(f"{split}: seeds {drives.seeds}, must be within {SEED_RANGES[split]}")
        if min(self.keys, self.pretrain_steps, self.finetune_steps, self.batch, self.seeds, self.draws) < 1:
            raise PlanError("keys, pretrain_steps, finetune_steps, batch, seeds and draws must be at least 1")
        if "O" not in self.arms or not set(self.arms) <= set(ARMS):
            raise PlanError(f"arms {self.arms}: want O and others of {sorted(ARMS)}")
        if self.batch % self.accumulate:
            raise PlanError(f"accumulate {self.accumulate}: must divide batch {self.batch}")

    @property
    def hash(self) -> str:
        """Sixteen hex digits over all that a result depends on: the plan, and what is no default in its recipes and model.

        Of the plan, notes and the list of arms are left out: no arm's result depends on which others are run.
        """
        recipes = [differences(to_record(self.recipe(stage)), to_record(TrainingConfig())) for stage in STAGES]
        model = differences(to_record(self.model), to_record(type(self.model)()))
        plan = {name: value for name, value in to_record(self).items() if name not in ("arms", "notes")}
        record = {"plan": plan, "recipes": recipes, "model": model}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def compared(self) -> tuple[tuple[str, str], ...]:
        """Those of `COMPARED` whose arms are run."""
        return tuple(pair for pair in COMPARED if set(pair) <= set(self.arms))

    @property
    def model(self) -> ModelConfig:
        """The network."""
        return load_model(here_or_shipped(self.recipe("finetune").model))

    @property
    def family(self) -> tuple[tuple[str, str], ...]:
        """The differences that are tested: none, of three seeds."""
        return ()

    @property
    def family_percent(self) -> float:
        """The first share of labels."""
        return self.percents[0]

    @property
    def family_seeds(self) -> int:
        """Paired seeds of tested differences."""
        return 0

    def recipe(self, stage: str) -> TrainingConfig:
        """Return the recipe of a stage as its file has it."""
        return load_config(here_or_shipped(getattr(self, stage)), TrainingConfig)

    def samples(self) -> int:
        """Samples that all runs together are trained on."""
        both = self.pretrain_steps + self.finetune_steps
        once = sum(both if arm == "R" else self.finetune_steps for arm in self.arms)
        steps = self.seeds * (self.pretrain_steps + len(self.percents) * once)
        return steps * self.batch


STAGES = ("pretrain", "finetune")


def load_product_plan(path: Path) -> ProductPlan:
    """Read a plan; raises ConfigError naming the file and the key."""
    return load_config(path, ProductPlan)


def load_any_plan(path: Path) -> Plan | ProductPlan:
    """Read a plan of either kind; raises ConfigError naming the file and the key."""
    return load_product_plan(path) if read_record(path).get("kind") == KIND else load_plan(path)


@dataclass(frozen=True)
class ProductPlace(PlanFolders):
    """Where a plan is carried out. path: its file. out: folder of the drives, and of `HASH/` with rows and runs."""

    path: Path
    out: Path
    plan: ProductPlan

    @classmethod
    def of(cls, path: Path, out: Path) -> ProductPlace:
        """Read the plan."""
        return cls(path, out, load_product_plan(path))

    def cache(self, split: str) -> Path:
        """Sample cache of a split."""
        return self.out / "cache" / split

    def share(self, percent: float, seed: int) -> Path:
        """Cache of the labelled drives of a seed: links into that of all training drives."""
        folder = self.runs / "labelled" / f"{percent:g}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in labelled_drives(self.plan.train.count, percent, seed):
            name = Simulate(self.plan.train.seeds[number]).name
            link = folder / name
            if not link.exists():
                link.symlink_to((self.cache("train") / name).resolve(), target_is_directory=True)
        return folder


def product_tasks(plan: ProductPlan) -> list[Task]:
    """Return every task, in order: runs of a seed together, small shares of labels first."""
    tasks: dict[Task, None] = {}
    for percent in plan.percents:
        for seed in range(plan.seeds):
            runs = (Task("run", arm, percent, seed) for arm in plan.arms)
            for task in (Task("phase1", "O", seed=seed), *runs):
                tasks[task] = None
    return list(tasks)


def make_caches(place: ProductPlace, workers: int) -> Iterator[tuple[int, int]]:
    """Make every drive that is not there yet; yields (drives done, drives in all).

    Raises:
        PlanError: a drive cannot be made.
    """
    plan, model = place.plan, model_to_train(place.plan.recipe("finetune"))
    config, done = PrepareConfig(model.image, model.grid), 0
    for split in ("train", "test"):
        drives: Drives = getattr(plan, split)
        jobs = {drive.name: drive for drive in (Simulate(seed, plan.keys) for seed in drives.seeds)}
        for report in prepare_drives(jobs, place.cache(split), config, workers):
            if report.problem:
                raise PlanError(f"{place.cache(split)}: drive {report.name}: {report.problem}")
            done += 1
            yield done, plan.train.count + plan.test.count


def do_product_task(task: Task, path: Path, out: Path, loaders: int = 0) -> Row:
    """Do one task in this process and return its row. loaders: processes that prepare batches, for a GPU to wait less."""
    place = ProductPlace.of(path, out)
    require_registered(path, place.plan)
    begun, before = time.monotonic(), time.process_time()
    result = _pretrain(task, place, loaders) if task.kind == "phase1" else _run(task, place, loaders)
    return {
        "key": task.key,
        "kind": task.kind,
        "arm": task.arm,
        "plan": place.plan.hash,
        "seed": task.seed,
        "cpu_hours": round((time.process_time() - before) / 3600, 5),
        "seconds": round(time.monotonic() - begun, 1),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    } | result


def _pretrain(task: Task, place: ProductPlace, loaders: int) -> Row:
    steps = place.plan.pretrain_steps
    _train("pretrain", steps, task, place, StageInputs(place.cache("train")), loaders)
    return {"steps": steps}


def _run(task: Task, place: ProductPlace, loaders: int) -> Row:
    plan, folder = place.plan, place.folder(task.key)
    data = place.share(task.percent, task.seed)
    start = None
    if task.arm == "O":
        start = place.folder(Task("phase1", "O", seed=task.seed).key) / "weights.safetensors"
    steps = plan.finetune_steps + (plan.pretrain_steps if task.arm == "R" else 0)
    _train("finetune", steps, task, place, StageInputs(data, start=start), loaders)
    model = model_to_train(plan.recipe("finetune"))
    network = keep_trainable_heads(build_model(model, "finetune"), model, open_cache(data))
    path = folder / "weights.safetensors"
    load_strictly(network, read_weights(path)[0], str(path))
    network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    scored = open_cache(place.cache("test"))
    scores = evaluate(scored, predictor(network, model, scored), model)
    assert scores.boxes is not None, "simulated drives have boxes"
    drives = [scored.drives.index(drive) for drive in scores.drives]
    record = MatchRecord.of(scores.boxes, drives)
    return {
        "percent": task.percent,
        "steps": steps,
        "data": {"labelled": open_cache(data).hash, "scored": scored.hash},
        "summary": {name: round(float(value), 5) for name, value in scores.summary().items()},
        "mAP": float(record.mean_ap()[0]),
        "matches": record.as_record(),
    }


def _train(stage: str, steps: int, task: Task, place: ProductPlace, inputs: StageInputs, loaders: int) -> None:
    """Train to the end. A run that was killed continues from its checkpoint; a finished one returns at once."""
    plan, folder = place.plan, place.folder(task.key)
    if (folder / "weights.safetensors").exists():
        return
    config: Any = replace(
        plan.recipe(stage),
        steps=steps,
        batch=plan.batch // plan.accumulate,
        accumulate=plan.accumulate,
        seed=task.seed,
        workers=loaders,
        validate_every=0,
        checkpoint_minutes=1.0,
    )
    train_stage(config, inputs, folder)
