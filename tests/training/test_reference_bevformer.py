"""Published checkpoints of the BEVFormer and DETR3D families: every name and shape, both ways."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from occbev.inference.families import load_model  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import transfer  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402
from occbev_training.models.renaming import load_reference, to_reference  # noqa: E402

# family, stage, parameters in millions as published
FAMILIES = (
    ("bevformer_tiny", "finetune", 33.52),
    ("bevformer_small", "finetune", 59.46),
    ("bevformer_base", "finetune", 69.03),
    ("bevformer_base_occ", "finetune", 61.25),
    ("occ_bev_sweep2", "pretrain", 62.90),
    ("detr3d_r101", "finetune", 53.67),
)


def build(repository: Path, name: str, stage: str) -> torch.nn.Module:
    config = load_model(repository / f"config/models/{name}.yaml")
    with torch.device("meta"):
        return build_model(config, stage)


def published(golden_folder: Path, name: str) -> dict[str, torch.Tensor]:
    table = json.loads((golden_folder / f"{name}_state_dict.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in table.items()}


@pytest.mark.parametrize(("name", "stage", "millions"), FAMILIES)
def test_every_key_both_ways(repository: Path, golden_folder: Path, name: str, stage: str, millions: float) -> None:
    model, table = build(repository, name, stage), published(golden_folder, name)
    report = load_reference(model, table, model.reference_names)
    assert report.complete, str(report)
    assert len(report.converted) == len(table)
    back = to_reference(model.state_dict(), model.reference_names)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in table.items()}
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_values_survive_both_ways(repository: Path, golden_folder: Path) -> None:
    model = build(repository, "bevformer_tiny", "finetune").to_empty(device="cpu")
    state = {
        k: torch.rand(v.shape).to(torch.int64 if v.ndim == 0 else torch.float32)
        for k, v in published(golden_folder, "bevformer_tiny").items()
    }
    assert load_reference(model, state, model.reference_names).complete
    back = to_reference(model.state_dict(), model.reference_names)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_small_occupancy_has_the_published_number_of_entries(repository: Path) -> None:
    assert len(build(repository, "bevformer_small_occ", "finetune").state_dict()) == 789


def test_a_checkpoint_of_another_family_is_refused(repository: Path, golden_folder: Path) -> None:
    model = build(repository, "bevformer_small", "finetune")
    report = load_reference(model, published(golden_folder, "bevformer_base"), model.reference_names)
    assert not report.complete
    assert report.dropped
    assert report.mismatched


# The specification's transfer table counts entries of the published state dicts.
@pytest.mark.parametrize(
    ("target", "carried"),
    [("bevformer_base", 857), ("bevformer_base_occ", 819), ("detr3d_r101", 690)],
)
def test_pre_training_hands_on_what_the_published_one_did(repository: Path, target: str, carried: int) -> None:
    source = build(repository, "occ_bev_sweep2", "pretrain").state_dict()
    report = transfer(source, build(repository, target, "finetune"))
    assert len(report.carried) == carried
    assert sum(map(len, (report.carried, report.mismatched, report.unused))) == len(source)


@pytest.mark.parametrize(
    ("name", "stage", "parts"),
    [
        ("bevformer_tiny", "finetune", ("view_transform.layers", "view_transform.can_bus", "detection_head.layers")),
        ("occ_bev_sweep2", "pretrain", ("occupancy_decoder",)),
        ("detr3d_r101", "finetune", ("detection_head.layers", "detection_head.reference_points")),
    ],
)
def test_matrices_begin_xavier_uniform(repository: Path, name: str, stage: str, parts: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network = build_model(reduced(load_model(repository / f"config/models/{name}.yaml")), stage)
    for key, weight in network.named_parameters():
        if not key.startswith(parts) or weight.ndim < 2:
            continue
        if "attention_weights" in key or "sampling_offsets" in key:
            assert not weight.any(), key
            continue
        fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(weight)
        largest = math.sqrt(6 / (fan_in + fan_out))
        assert 0.8 * largest < weight.abs().max() <= largest, key
