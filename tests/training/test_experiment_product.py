"""The experiment with a network of the product: the whole of it with a small network on small drives, and its page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

from occbev.config import (
    BevEncoderConfig,
    DepthConfig,
    DetectionHeadConfig,
    EncoderConfig,
    ImageConfig,
    LiftConfig,
    OccupancyHeadConfig,
    save_config,
)
from occbev.grid import GRIDS, BevGrid
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev_training.engine.config import TrainingConfig
from occbev_training.experiment import product
from occbev_training.experiment.plan import Drives, PlanError, register
from occbev_training.experiment.product import (
    ProductPlace,
    ProductPlan,
    do_product_task,
    load_any_plan,
    make_caches,
    product_tasks,
)
from occbev_training.experiment.product_report import product_chapter
from occbev_training.experiment.report import to_markdown
from occbev_training.experiment.runs import read_rows, run_tasks

ROOT = Path(__file__).parents[2]

MODEL = LiftSplatModel(
    image=ImageConfig(width=64, height=32),
    encoder=EncoderConfig(channels=16),
    lift=LiftConfig(channels=8, depth=DepthConfig(1.0, 21.0, 2.0), max_points=2048),
    bev=BevGrid((-16.0, -16.0), (1.6, 1.6), (20, 20)),
    bev_encoder=BevEncoderConfig(channels=(8, 12), blocks=(1, 1), out_channels=12),
    grid=GRIDS["tiny"],
    occupancy=replace(OccupancyHeadConfig(), channels=8),
    detection=DetectionHeadConfig(channels=8),
)


@pytest.fixture
def place(tmp_path: Path, make_recording: type[Any], monkeypatch: pytest.MonkeyPatch) -> ProductPlace:
    """A registered plan of one seed, with drives that are made at once."""

    @dataclass(frozen=True)
    class Drive:
        seed: int
        keys: int = 2

        @property
        def name(self) -> str:
            return f"sim-{self.seed:06d}"

        def __call__(self) -> Any:
            return make_recording(self.name, self.keys, self.seed)

    monkeypatch.setattr(product, "Simulate", Drive)
    save_config(tmp_path / "model.yaml", MODEL)
    for stage in product.STAGES:
        recipe = TrainingConfig(stage=stage, model=str(tmp_path / "model.yaml"), threads=1, workers=0)
        save_config(tmp_path / f"{stage}.yaml", recipe)
    plan = ProductPlan(
        Drives(9990, 2),
        Drives(780_000, 1),
        name="small",
        keys=2,
        pretrain=str(tmp_path / "pretrain.yaml"),
        finetune=str(tmp_path / "finetune.yaml"),
        pretrain_steps=2,
        finetune_steps=1,
        batch=2,
        accumulate=2,
        percents=(50.0,),
        seeds=1,
        draws=20,
    )
    path = tmp_path / "small.yaml"
    save_config(path, plan)
    register(path, plan)
    return ProductPlace.of(path, tmp_path / "out")


def test_every_task_is_done_once_and_pairs_are_compared(place: ProductPlace) -> None:
    plan = place.plan
    assert [done for done, _ in make_caches(place, 1)] == [1, 2, 3]
    tasks = product_tasks(plan)
    assert [task.key for task in tasks] == ["phase1-O-seed0", "run-O-50-seed0", "run-R-50-seed0", "run-R0-50-seed0"]
    rows = list(run_tasks(place, tasks, 1, do_product_task))
    assert [row["steps"] for row in rows] == [2, 1, 3, 1]
    assert rows[1]["data"] == rows[2]["data"] == rows[3]["data"]  # the same labelled drive, the same test drives
    assert len(list(place.share(50.0, 0).iterdir())) == 1
    assert {"mAP", "NDS"} <= set(rows[1]["summary"])
    begun = (place.folder(tasks[1].key) / "run.json").read_text()
    assert '"start": "weights.safetensors"' in begun
    for task in tasks[2:]:
        assert '"part": "image_encoder"' in (place.folder(task.key) / "run.json").read_text()  # ImageNet weights
    assert list(run_tasks(place, tasks, 1, do_product_task)) == []
    chapter = product_chapter(plan, read_rows(place.rows, plan.hash), "command")
    text = to_markdown(chapter.sections, "results")
    assert "- O - R at 50 % of labels: " in text
    assert "- O - R0 at 50 % of labels: " in text
    assert "Every run of the plan is here." in text
    assert "| O | mean | " in text
    gain = 100 * (rows[1]["summary"]["NDS"] - rows[3]["summary"]["NDS"])
    assert f" {gain:+.2f} ({gain:+.2f}) |" in text[text.index("| O - R0 | 50 % |") :]
    assert "on cpu" in text or "on cuda" in text


def test_no_test_drive_is_scored_for_a_plan_that_changed(place: ProductPlace) -> None:
    save_config(place.path, replace(place.plan, finetune_steps=2))
    with pytest.raises(PlanError, match="registers"):
        do_product_task(product_tasks(place.plan)[0], place.path, place.out)
    assert not list(place.out.glob("*/runs"))


def test_a_recipe_or_a_network_that_changes_makes_another_plan(place: ProductPlace, tmp_path: Path) -> None:
    before = place.plan.hash
    save_config(tmp_path / "model.yaml", replace(MODEL, detection=DetectionHeadConfig(channels=12)))
    changed = ProductPlace.of(place.path, place.out).plan.hash
    assert changed != before
    recipe = TrainingConfig(stage="finetune", model=str(tmp_path / "model.yaml"), balance="cbgs")
    save_config(tmp_path / "finetune.yaml", recipe)
    assert ProductPlace.of(place.path, place.out).plan.hash not in (before, changed)


def test_notes_and_further_arms_are_told_and_leave_the_plan_what_it_is(place: ProductPlace) -> None:
    noted = replace(place.plan, arms=("O", "R0"), notes=("Mind the gap.",))
    assert noted.hash == place.plan.hash
    row = {
        "kind": "run",
        "arm": "O",
        "percent": 50.0,
        "seed": 0,
        "summary": {},
        "cpu_hours": 0,
        "seconds": 0,
        "device": "cpu",
    }
    text = to_markdown(product_chapter(noted, [row], "command").sections, "results")
    assert "Mind the gap." in text
    assert "arm R |" not in text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"train": Drives(20_000, 2)}, "train: seeds"),
        ({"test": Drives(9990, 2)}, "test: seeds"),
        ({"seeds": 0}, "must be at least 1"),
        ({"accumulate": 3}, "must divide batch"),
    ],
)
def test_plans_that_cannot_be_right_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        ProductPlan(**{"train": Drives(1, 2), "test": Drives(20_000, 1), **wrong})


def test_what_was_not_run_says_so() -> None:
    plan = load_any_plan(ROOT / "config" / "experiment" / "tiny.yaml")
    assert isinstance(plan, ProductPlan)
    assert plan.model.name == "occbev-tiny"
    text = to_markdown(product_chapter(plan, [], "the command").sections, "results")
    assert "**Not measured.**" in text
    assert "the command" in text
    assert f"{plan.samples():,} samples" in text
