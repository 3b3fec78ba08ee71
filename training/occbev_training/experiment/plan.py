"""What an experiment does, decided before it is run: the schema of `config/experiment/*.yaml`, and its registration.

A plan is registered by a file beside it that holds its hash. Test drives are scored only for a registered plan.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from occbev.config import ConfigError, load_config, to_record
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev_training.data.augment import AugmentConfig
from occbev_training.experiment.network import MODEL
from occbev_training.experiment.statistics import SCORED
from occbev_training.simulator.drive import SEED_RANGES, WORLDS

SPLITS: Mapping[str, str] = {"train": "train", "development": "validation", "test": "test", "unseen_rig": "test"}
"""Split of an experiment -> the split of the simulator from which its seeds are taken."""

ARMS: Mapping[str, str] = {
    "R": "random weights, trained on boxes for as many steps as the others in both phases",
    "R0": "random weights, trained on boxes for the steps of phase 2 alone",
    "D": "phase 1 learns LiDAR depth of each image; the BEV trunk begins from random weights",
    "O": "phase 1 learns occupancy in three states (Occ-BEV with our labels)",
    "Op": "phase 1 learns occupancy as published: unobserved is free, no visibility, moving objects leave trails",
    "X": "control: as O, with the occupancy of another drive",
    "I-image": "as O, of which the image encoder alone is carried over",
    "I-view": "as O, of which the image encoder and the view transform are carried over",
    "I-bev": "as O, of which the BEV trunk alone is carried over",
    "V": "as O, without the weights of visibility and evidence",
    "K": "check: as R, with a depth that is the same everywhere",
}
"""Arm -> what it is."""

PHASE1: Mapping[str, str] = {"I-image": "O", "I-view": "O", "I-bev": "O"}
"""Arms that begin from the phase 1 of another arm."""

WITHOUT_PHASE1 = ("R", "R0", "K")
"""Arms that have no phase 1."""


class PlanError(ConfigError):
    """A plan cannot be run, or its test drives may not be scored; the text says why."""


@dataclass(frozen=True)
class Drives:
    """Consecutive simulated drives."""

    first_seed: int
    """Seed of the first."""
    count: int
    """How many."""

    @property
    def seeds(self) -> range:
        """Their seeds."""
        return range(self.first_seed, self.first_seed + self.count)


@dataclass(frozen=True)
class RecordedPlan:
    """A real drive that takes the place of labelled and test drives: the first half has labels, the second is scored."""

    name: str
    """Name of its bag, without the ending."""
    blocks: int = 7
    """Blocks of time of each half, which stand for drives."""
    block_keys: int = 3
    """Key frames of a block."""
    key_interval: float = 0.05
    """Least seconds between key frames."""

    def __post_init__(self) -> None:
        if min(self.blocks, self.block_keys) < 1 or self.key_interval < 0:
            raise PlanError("recorded: blocks and block_keys must be at least 1, key_interval not below 0")


@dataclass(frozen=True)
class WorldPlan:
    """The drives, and how they are recorded."""

    train: Drives = Drives(7000, 60)
    """Drives of both phases; labelled ones are chosen among them."""
    development: Drives = Drives(17000, 6)
    """Drives that settings and checks are judged on."""
    test: Drives = Drives(730_000, 20)
    """Drives that the answer is taken from."""
    unseen_rig: Drives = Drives(740_000, 4)
    """Test drives of a vehicle whose cameras no training drive has."""
    keys: int = 8
    """Key frames of a drive."""
    key_rate: float = 2.0
    """Key frames per second."""
    rings: int = 16
    """Beams of the LiDAR."""
    columns: int = 360
    """Firings per rotation of the LiDAR."""
    version: str = WORLDS[0]
    """Which streets are drawn."""
    recorded: RecordedPlan | None = None
    """A real drive with labels; simulated drives then have its cameras, `train` has no boxes and `test` is not used."""

    def __post_init__(self) -> None:
        for name, split in SPLITS.items():
            drives: Drives = getattr(self, name)
            allowed = SEED_RANGES[split]
            if drives.count < 1 or drives.seeds[0] not in allowed or drives.seeds[-1] not in allowed:
                raise PlanError(f"world.{name}: seeds {drives.seeds}, must be within {allowed}")
        seeds = [seed for name in SPLITS for seed in getattr(self, name).seeds]
        if len(set(seeds)) != len(seeds):
            raise PlanError("world: a drive is in two splits; their seeds must not overlap")

    @property
    def simulated(self) -> tuple[str, ...]:
        """The splits that are simulated."""
        return tuple(SPLITS) if self.recorded is None else ("train", "development")

    @property
    def labelled_split(self) -> str:
        """The split that labelled drives are chosen from."""
        return "train" if self.recorded is None else "labelled"

    def count(self, split: str) -> int:
        """How many drives a split has, or blocks."""
        if split in self.simulated:
            drives: Drives = getattr(self, split)
            return drives.count
        return 0 if self.recorded is None else self.recorded.blocks

    def keys_of(self, split: str) -> int:
        """Key frames of a drive of a split, or of a block."""
        return self.keys if self.recorded is None or split in self.simulated else self.recorded.block_keys

    def as_record(self) -> dict[str, Any]:
        """The plan as plain values. `recorded` is left out if it is None, so the hash of such a plan does not depend on it."""
        record: dict[str, Any] = to_record(self)
        return {name: value for name, value in record.items() if (name, value) != ("recorded", None)}


@dataclass(frozen=True)
class Settings:
    """What may be tuned, for each arm by as many trials."""

    lr: float = 3e-3
    """Peak learning rate of both phases."""
    encoder_scale: float = 1.0
    """Factor on the learning rate of the image encoder and the view transform in phase 2."""


@dataclass(frozen=True)
class RunGroup:
    """Runs that belong together: every arm with the seeds 0, 1, ... at one share of the labelled drives."""

    arms: tuple[str, ...]
    """Keys of `ARMS`."""
    percent: float
    """Share of the training drives that have boxes."""
    seeds: int
    """How many seeds."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise PlanError(f"runs: arms {unknown} are unknown; known are {sorted(ARMS)}")
        if not 0 < self.percent <= 100 or self.seeds < 1:
            raise PlanError(f"runs: percent {self.percent} must be above 0 and at most 100, seeds {self.seeds} above 0")


@dataclass(frozen=True)
class Plan:
    """One experiment."""

    name: str = "mechanism"
    """Name in results."""
    world: WorldPlan = field(default_factory=WorldPlan)
    """Drives."""
    pretrain_steps: int = 300
    """Optimiser steps of phase 1."""
    finetune_steps: int = 150
    """Optimiser steps of phase 2."""
    batch: int = 16
    """Samples of a step."""
    settings: Mapping[str, Settings] = field(default_factory=dict)
    """Arm -> its settings, where they are not the default."""
    trials: tuple[Settings, ...] = ()
    """Settings that every arm of the family was tried with on development drives; see `trial_percent`."""
    trial_percent: float = 25.0
    """Share of labelled drives of the trials."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation, the same in both phases and all arms."""
    runs: tuple[RunGroup, ...] = ()
    """What is run on test drives, in this order."""
    family: tuple[tuple[str, str], ...] = (("O", "R"), ("O", "D"))
    """The differences that are tested, first minus second; everything else is exploratory."""
    family_percent: float = 10.0
    """Share of labelled drives at which they are tested."""
    draws: int = 10_000
    """Bootstrap draws."""
    check_seed: int = 100
    """Seed of the checks and trials, which no run on test drives has."""
    checks: str = "first"
    """When the trained sanity checks are run: first, after_family, or none of any kind."""
    departures: tuple[str, ...] = ()
    """Where this plan departs from the design of the experiment, and why."""

    def __post_init__(self) -> None:
        if min(self.pretrain_steps, self.finetune_steps, self.batch, self.draws) < 1:
            raise PlanError("pretrain_steps, finetune_steps, batch and draws must be at least 1")
        if self.checks not in ("first", "after_family", "none"):
            raise PlanError(f"checks {self.checks!r}: must be first, after_family or none")
        if self.world.recorded is not None and self.checks != "none":
            raise PlanError(f"checks {self.checks!r}: they are made for simulated test drives; a real drive wants none")
        tested = {arm for pair in self.family for arm in pair}
        run = {arm for group in self.runs if group.percent == self.family_percent for arm in group.arms}
        if self.runs and not tested <= run:
            raise PlanError(f"family: arms {sorted(tested - run)} are not run at {self.family_percent:g} percent")
        if any(group.seeds > self.check_seed for group in self.runs):
            raise PlanError(
                f"check_seed {self.check_seed}: runs on test drives have it, too; want at least their number of seeds"
            )

    @property
    def hash(self) -> str:
        """Sixteen hex digits over everything that a result depends on, the network included.

        Of the product's own sections only values that are not defaults count, so a new key there changes no hash.
        """
        augment = differences(to_record(self.augment), to_record(AugmentConfig()))
        model = differences(to_record(MODEL), to_record(LiftSplatModel()))
        plan = to_record(self) | {"augment": augment, "world": self.world.as_record()}
        record = {"plan": plan, "model": model, "scored": [*SCORED]}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def family_seeds(self) -> int:
        """How many paired seeds the tested differences have."""
        tested = {arm for pair in self.family for arm in pair}
        groups = [g for g in self.runs if g.percent == self.family_percent]
        return min((max((g.seeds for g in groups if arm in g.arms), default=0) for arm in tested), default=0)

    def settings_of(self, arm: str) -> Settings:
        """Settings of an arm."""
        return self.settings.get(arm, Settings())

    def labelled(self, percent: float) -> int:
        """How many drives have boxes, or blocks of a recording."""
        return max(1, math.ceil(self.world.count(self.world.labelled_split) * percent / 100 - 1e-9))


def differences(record: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that are not those of the default, section by section."""
    found = {}
    for key, value in record.items():
        other = default.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            inner = differences(value, other)
            if inner:
                found[key] = inner
        elif value != other:
            found[key] = value
    return found


def load_plan(path: Path) -> Plan:
    """Read a plan; raises ConfigError naming the file and the key."""
    return load_config(path, Plan)


class Registered(Protocol):
    """What a registration says of a plan."""

    @property
    def hash(self) -> str:
        """Hex digits over everything that a result depends on."""
        ...

    @property
    def family(self) -> tuple[tuple[str, str], ...]:
        """The differences that are tested, first minus second."""
        ...

    @property
    def family_percent(self) -> float:
        """Share of labelled drives at which they are tested."""
        ...

    @property
    def family_seeds(self) -> int:
        """How many paired seeds they have."""
        ...


def registration_of(path: Path) -> Path:
    """File that registers a plan."""
    return path.with_suffix(".registered.json")


def register(path: Path, plan: Registered) -> Path:
    """Write the registration of a plan beside its file; raises PlanError if another plan is registered there."""
    target = registration_of(path)
    if target.exists() and _registered_hash(target) != plan.hash:
        raise PlanError(f"{target}: registers {_registered_hash(target)}, the plan has {plan.hash}; take another name")
    record = {
        "plan": path.name,
        "hash": plan.hash,
        "tested": [f"{a} - {b}" for a, b in plan.family],
        "at_percent": plan.family_percent,
        "paired_seeds": plan.family_seeds,
        "tests": (
            "exact sign-flip permutation over seeds, Holm over the family; two-level bootstrap intervals"
            if plan.family
            else "none; two-level bootstrap intervals"
        ),
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    return target


def require_registered(path: Path, plan: Registered) -> None:
    """Refuse to score test drives of a plan that differs from its committed registration; raises PlanError."""
    target = registration_of(path)
    if not target.exists():
        raise PlanError(
            f"{path}: not registered, so no test drive is scored; 'occbev-train experiment {path} --register'"
        )
    known = _registered_hash(target)
    if known != plan.hash:
        raise PlanError(f"{path}: has hash {plan.hash}, {target.name} registers {known}; no test drive is scored")
    if _differs_from_commit(target):
        raise PlanError(f"{target}: not committed as it stands; commit it before test drives are scored")


def _registered_hash(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path}: no registration: {error}") from error


def _differs_from_commit(path: Path) -> bool:
    """Whether a file in a git work tree is not the committed one; False outside of one."""
    folder = path.resolve().parent

    def git(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)

    try:
        if git("rev-parse", "--is-inside-work-tree").returncode:
            return False
        ignored = git("check-ignore", "-q", path.name).returncode == 0
        committed = git("show", f"HEAD:./{path.name}")
        return not ignored and committed.stdout != path.read_bytes()
    except FileNotFoundError:  # no git here
        return False
