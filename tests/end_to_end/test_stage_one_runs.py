"""Every recipe of stage 1 ships at reduced size: pretrain, export, replay; boxes alone leave the voxels geometric."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")
pytest.importorskip("onnxruntime")

from tests.training.conftest import TinyRecording

from occbev.cli import main
from occbev.config import save_config
from occbev.inference.families import load_model
from occbev.inference.model_package import ModelPackage
from occbev_training.cli import main as train
from occbev_training.data.label_frame import in_base_link
from occbev_training.models.families import reduced
from occbev_training.occupancy.prepare import PrepareConfig, prepare
from occbev_training.sources.bag_writer import write_bag

KEYS = 2

# recipe -> the model that it trains, where it is not its own
RECIPES = {"tiny": "", "bevdet": "", "bevformer": "", "detr3d": "", "bevformer of Occ-BEV": "occ_bev_sweep2"}


class Unlabelled(TinyRecording):
    """A drive with boxes, without dense truth."""

    def occupancy_truth(self, key: int) -> None:
        return None


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drive") / "bag"
    write_bag(TinyRecording(keys=KEYS), path)
    return path


def run_stage(stage: str, config: Path, folder: Path, cache: Path, *more: str) -> ModelPackage:
    """One step of a stage, exported."""
    arguments = ["--data", cache, "--out", folder / "run", "--steps", "1", "--batch", "1", "--workers", "0", *more]
    arguments += ["--model", folder / "model.yaml", "--precision", "fp32", "--freeze_norms", "true"]
    assert train([stage, str(config), *map(str, arguments)]) == 0
    assert train(["export", str(folder / "run"), "--out", str(folder / "package"), "--cameras", "3"]) == 0
    return ModelPackage.load(folder / "package")


def make_inputs(repository: Path, folder: Path, name: str) -> Path:
    """Write a reduced model as model.yaml; returns a cache of a drive that fits it."""
    model = in_base_link(reduced(load_model(repository / "config/models" / f"{name}.yaml")))
    model = replace(model, grid=replace(model.grid, lo=(-16.0, -16.0, -1.0)))
    save_config(folder / "model.yaml", model)
    config = PrepareConfig(model.image, model.grid, 0.3, near_hits=1)
    prepare({"drive": lambda: Unlabelled(name="drive", keys=KEYS)}, folder / "cache", config)
    return folder / "cache"


def replay(bag: Path, package: ModelPackage, folder: Path) -> list[dict[str, Any]]:
    out = folder / "boxes.jsonl"
    arguments = ["replay", bag, "--offline", "--model", package.folder, "--boxes", out, "--backend", "onnxruntime"]
    assert main([*map(str, arguments), "--json", str(folder / "summary.json")]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == KEYS
    return lines


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_stage_one_becomes_a_package_that_runs(
    repository: Path, bag: Path, tmp_path: Path, recipe: str
) -> None:
    config = repository / "config/training" / f"pretrain_{recipe.split()[0]}.yaml"
    name = RECIPES[recipe] or Path(str(load_text(config))).stem
    package = run_stage("pretrain", config, tmp_path, make_inputs(repository, tmp_path, name))
    assert package.predicts == "geometric voxels: free, occupied or unknown, without classes; neither classes nor boxes"
    lines = replay(bag, package, tmp_path)
    assert [line["box"] for line in lines] == [[], []]
    assert np.isfinite([line["occupied"] for line in lines]).all()


def load_text(config: Path) -> str:
    """The model that a recipe names."""
    from occbev.config import load_config
    from occbev_training.engine.config import TrainingConfig

    return load_config(config, TrainingConfig).model


def test_every_recipe_is_tried(repository: Path) -> None:
    recipes = {path.stem.removeprefix("pretrain_") for path in (repository / "config/training").glob("pretrain_*.yaml")}
    assert recipes == {*RECIPES} - {"bevformer of Occ-BEV"} | {"paper"}, "labels of the paper are refused by training"


def test_fine_tuning_on_boxes_alone_leaves_geometric_voxels(repository: Path, bag: Path, tmp_path: Path) -> None:
    cache = make_inputs(repository, tmp_path, "occbev-tiny")
    package = run_stage("finetune", repository / "config/training/finetune_tiny.yaml", tmp_path, cache)
    assert package.predicts == "boxes and geometric voxels: free, occupied or unknown, without classes"
    assert "geometric occupancy (free, occupied, unknown) without classes" in (package.folder / "README.md").read_text()
    replay(bag, package, tmp_path)
