"""One network of each view transform goes through both stages by the same calls."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

from occbev.config import ConfigError, ModelConfig, save_config
from occbev.grid import GRIDS
from occbev.inference.families import load_model
from occbev_training.data import datasets
from occbev_training.data.augment import AugmentConfig
from occbev_training.data.datasets import TrainingSample, with_past
from occbev_training.data.label_frame import boxes_in_frame, in_base_link
from occbev_training.engine.config import OptimConfig, TrainingConfig
from occbev_training.engine.stages import StageInputs, train_stage
from occbev_training.export.run_folder import read_run
from occbev_training.losses.config import LossConfig
from occbev_training.models.families import reduced
from occbev_training.models.families.record import LIDAR_HEIGHT
from occbev_training.occupancy.prepare import PrepareConfig, prepare
from occbev_training.sources.recording import OccupancyTruth

# configuration -> terms of stage 1, and of stage 2
FAMILIES = {
    "bevdet4d_r50": ({"depth"}, {"heatmap", "box", "depth"}),
    "bevdepth_r50_megvii": ({"depth"}, {"heatmap", "box", "depth"}),
    "flashocc_r50_m0": ({"depth"}, {"semantics", "lovasz", "geometric_scale", "semantic_scale", "depth"}),
    "bevformer_tiny": (set(), {"query_class", "query_box"}),
    "bevformer_base_occ": (set(), {"semantics", "lovasz", "geometric_scale", "semantic_scale"}),
    "detr3d_r101": (set(), {"query_class", "query_box"}),
}


def _model(repository: Path, name: str) -> ModelConfig:
    """Return the reduced network; all of them on one grid, so that they share caches."""
    published = load_model(repository / "config/models" / f"{name}.yaml")
    model = in_base_link(reduced(published))
    return replace(model, grid=replace(model.grid, lo=(-16.0, -16.0, -1.0)))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[Path, Path]:
    """A drive of three key frames to train on, and another to score; all reduced networks share size and grid."""
    from tests.training.conftest import TinyRecording

    model = _model(repository, "bevformer_tiny")

    class Recording(TinyRecording):
        def occupancy_truth(self, key: int) -> OccupancyTruth:
            semantics = np.full(model.grid.shape, 17, np.uint8)
            semantics[:, :, 1] = 11
            semantics[8:10, 9 + key, 2:4] = 4
            mask = np.ones(model.grid.shape, bool)
            return OccupancyTruth(semantics, mask, mask, model.grid)

    root = tmp_path_factory.mktemp("families")
    config = PrepareConfig(model.image, model.grid, 0.3)
    for name in ("train", "evaluation_data"):
        prepare({name: lambda n=name: Recording(name=n, keys=3)}, root / name, config)
    return root / "train", root / "evaluation_data"


@pytest.mark.parametrize("name", FAMILIES)
def test_both_stages(repository: Path, caches: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    save_config(tmp_path / "model.yaml", _model(repository, name))
    inputs = StageInputs(*caches)
    loss = LossConfig(occupied=0.0, lovasz=1.0, geometric_scale=1.0, semantic_scale=1.0)
    config = TrainingConfig(
        model=str(tmp_path / "model.yaml"),
        steps=2,
        batch=2,
        workers=0,
        log_every=1,
        validate_every=0,
        freeze_norms=True,
        loss=loss,
        optim=OptimConfig(scales={"image_encoder": 0.1}),
        augment=AugmentConfig(bev_rotate=20.0, grid_mask=0.7, photometric=True),
    )
    for stage, terms in zip(("pretrain", "finetune"), FAMILIES[name], strict=True):
        assert train_stage(replace(config, stage=stage), inputs, tmp_path / stage)
        lines = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").open()]
        known = {"step", "planned", "total", "lr", "gradient_norm", "samples_per_s", "data_wait"}
        wanted = terms | ({"reconstruction"} if stage == "pretrain" else set())
        assert set(lines[0]) - known == wanted
        assert all(math.isfinite(line["total"]) for line in lines[:2])
        assert lines[1]["gradient_norm"] > 0
        assert lines[-1]["validation"]
        inputs = replace(inputs, start=tmp_path / stage / "weights.safetensors")
    record = json.loads((tmp_path / "finetune" / "run.json").read_text())
    carried = {n.split(".")[0] for n in record["begun_from"]["transfer"]["carried"]}
    assert "image_encoder" in carried
    assert "view_transform" in carried or name == "detr3d_r101"
    run = read_run(tmp_path / "finetune")
    told = run.provenance["stage_2"]
    assert (told["steps"], told["samples"], told["seed"]) == (2, 3, config.seed)
    assert told["begun_from"]["start"] == "weights.safetensors"
    assert run.provenance["data"] == "1 drives of train"
    assert run.metrics["validation"]["step"] == 2
    assert run.model == load_model(tmp_path / "model.yaml")


def test_the_past_is_as_long_as_the_config_says(
    repository: Path, caches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training leaves frames out at random, validation sees consecutive ones."""
    asked = set()

    def spied(*arguments: Any, vary: bool = True) -> TrainingSample:
        asked.add((arguments[-1], vary))
        return with_past(*arguments, vary=vary)

    monkeypatch.setattr(datasets, "with_past", spied)
    save_config(tmp_path / "model.yaml", _model(repository, "bevformer_tiny"))
    config = TrainingConfig(
        model=str(tmp_path / "model.yaml"), steps=1, batch=1, workers=0, history=1, optim=OptimConfig(scales={})
    )
    assert train_stage(config, StageInputs(*caches), tmp_path / "run")
    assert asked == {(1, True), (1, False)}


def test_published_grids_in_lidar_axes_become_the_preset_of_detection(repository: Path) -> None:
    """Heights above the road stay what they were; quirks of published weights are left behind."""
    published = load_model(repository / "config/models/bevformer_base.yaml")
    model = in_base_link(published)
    assert model.grid == GRIDS["det"]
    assert (model.bev.frame, model.bevformer.z_range, model.query_head.z_range) == (
        "base_link",
        (-3.0, 5.0),
        (-3.0, 5.0),
    )
    assert published.bevformer.reference_quirks
    assert not model.bevformer.reference_quirks
    own = load_model(repository / "config/models/occbev-tiny.yaml")
    assert in_base_link(own) == own


def test_published_axes_are_kept_for_boxes_and_refused_for_voxels(
    repository: Path, caches: tuple[Path, Path], tmp_path: Path
) -> None:
    published = reduced(load_model(repository / "config/models/bevformer_tiny.yaml"))
    grid = replace(published.grid, lo=(-16.0, -16.0, -1.0 - LIDAR_HEIGHT))
    save_config(tmp_path / "model.yaml", replace(published, grid=grid))
    config = TrainingConfig(
        model=str(tmp_path / "model.yaml"),
        frame="published",
        stage="finetune",
        steps=1,
        batch=1,
        workers=0,
        log_every=1,
        validate_every=0,
        optim=OptimConfig(scales={}),
    )
    assert train_stage(config, StageInputs(*caches), tmp_path / "boxes")
    with pytest.raises(ConfigError, match="'lidar' axes.*frame: base_link"):
        train_stage(replace(config, stage="pretrain"), StageInputs(*caches), tmp_path / "voxels")


def test_boxes_in_lidar_axes_are_where_the_lidar_sees_them() -> None:
    """Forward of the vehicle is along y of its LiDAR, 0.94 m behind and 1.84 m below."""
    boxes = np.array([[10.94, 0, 1.84, 4, 2, 1.5, 0.0, 3, 0]], np.float32)
    np.testing.assert_array_equal(boxes_in_frame(boxes, "base_link"), boxes)
    moved = boxes_in_frame(boxes, "lidar")[0]
    np.testing.assert_allclose(moved, [0, 10, 0, 4, 2, 1.5, np.pi / 2, 0, 3], atol=1e-5)
