"""Every published network of the BEVDet family: its weights' names and shapes, both ways, and their number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from occbev.config import ModelConfig  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.lift_splat.bevdet_names import rules_for  # noqa: E402
from occbev_training.models.renaming import load_reference, to_reference  # noqa: E402

TABLES = {
    "bevdet_r50": "bevdet-r50",
    "bevdet4d_r50": "bevdet4d-r50",
    "bevdepth4d_r50": "bevdepth4d-r50-bevdet-dev3",
    "bevdepth_r50_first": "bevdepth-r50-bevdet-master",
    "bevdepth_r50_megvii": "bevdepth-r50-megvii",
    "bevdepth4d_r50_megvii": "bevdepth-r50-megvii-2key-da",
    "bevdet_occ_r50": "bevdet-occ-r50",
    "bevdet_occ_r50_4d_stereo": "bevdet-occ-r50-4d-stereo",
    "flashocc_r50_m1": "flashocc-r50",
    "flashocc_r50_m0": "flashocc-r50-m0",
}
MILLIONS = {
    "bevdet_r50": 44.25,
    "bevdet_occ_r50": 29.02,
    "bevdet_occ_r50_4d_stereo": 34.97,
    "flashocc_r50_m1": 44.74,
    "flashocc_r50_m0": 39.94,
}


def model_config(repository: Path, name: str) -> ModelConfig:
    return load_model(repository / "config" / "models" / f"{name}.yaml")


def on_meta(config: ModelConfig, stage: str = "finetune") -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(config, stage)


@pytest.mark.parametrize("name", TABLES)
def test_every_published_weight_has_its_place(repository: Path, golden_folder: Path, name: str) -> None:
    path = golden_folder / f"{TABLES[name]}_state_dict.json"
    table = json.loads(path.read_text())
    config = model_config(repository, name)
    network, rules = on_meta(config), rules_for(config)
    state = {key: torch.empty(shape, device="meta") for key, shape in table.items()}
    report = load_reference(network, state, rules)
    assert report.complete, (report, report.dropped[:3], report.missing[:3], report.mismatched[:3])
    assert len(report.converted) == len(table)
    back = to_reference(network.state_dict(), rules)
    assert {key: list(value.shape) for key, value in back.items()} == table


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_as_many_as_published(repository: Path, name: str) -> None:
    network = on_meta(model_config(repository, name))
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(count, 2) == MILLIONS[name]


@pytest.mark.parametrize("name", TABLES)
def test_the_pretraining_decoder_attaches(repository: Path, name: str) -> None:
    config = model_config(repository, name)
    network, target = on_meta(config, "pretrain"), on_meta(config)
    assert network.occupancy_decoder is not None
    assert network.detection_head is None
    parts = {n.split(".")[0] for n in network.state_dict()} - {"occupancy_decoder"}
    for part in parts:
        mine, theirs = getattr(network, part), getattr(target, part)
        assert set(mine.state_dict()) == set(theirs.state_dict())
    assert {"image_encoder", "view_transform", "bev_encoder"} <= parts
