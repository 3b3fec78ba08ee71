"""Conversion of published checkpoints: complete or refused, and the package that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from occbev.config import save_config  # noqa: E402
from occbev.grid import BevGrid, VoxelGrid  # noqa: E402
from occbev.inference.families.bevformer import BevFormerConfig, BevFormerModel  # noqa: E402
from occbev.inference.families.queries import QueryHeadConfig, ResNetConfig  # noqa: E402
from occbev.inference.model_package import ModelPackage  # noqa: E402
from occbev_training.cli import convert, main  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import load_strictly, read_weights  # noqa: E402
from occbev_training.models.renaming import to_reference  # noqa: E402

MODEL = BevFormerModel(
    name="small",
    resnet=ResNetConfig(depth=18, stages=(4,), levels=1, channels=16),
    bevformer=BevFormerConfig(channels=16, heads=2, hidden=16, layers=1),
    query_head=QueryHeadConfig(queries=3, layers=1, heads=2, hidden=16),
    bev=BevGrid((-4.0, -4.0), (1.0, 1.0), (8, 8)),
    grid=VoxelGrid((-4.0, -4.0, -1.0), (1.0, 1.0, 1.0), (8, 8, 4)),
)


@pytest.fixture
def families(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    save_config(folder / "small.yaml", MODEL)
    monkeypatch.setattr(convert, "share_path", lambda relative: folder)
    return folder


def checkpoint(folder: Path, stage: str) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    network = build_model(MODEL, stage)
    state = to_reference(network.state_dict(), network.reference_names)
    path = folder / f"{stage}.pth"
    torch.save({"state_dict": state, "meta": {"epoch": 24}}, path)
    return path, network


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_checkpoint_becomes_a_package_of_its_stage(families: Path, tmp_path: Path, capsys, stage: str) -> None:
    path, network = checkpoint(tmp_path, stage)
    out = tmp_path / "package"
    arguments = ["convert", str(path), "--family", "small", "--out", str(out), "--json"]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    want = network.state_dict()
    assert (record["stage"], record["converted"]) == (stage, len(want))
    assert record["dropped"] == record["missing"] == record["mismatched"] == 0
    package = ModelPackage.load(out)
    assert package.model == MODEL
    weights, saved = read_weights(package.path("weights.safetensors"))
    assert saved["stage"] == stage
    fresh = build_model(package.model, stage)
    load_strictly(fresh, weights, "package")
    assert all(torch.equal(value, want[name]) for name, value in fresh.state_dict().items())


def test_the_prefix_of_lightning_may_be_there_or_lack(families: Path, tmp_path: Path, capsys) -> None:
    path, network = checkpoint(tmp_path, "finetune")
    content = torch.load(path, weights_only=True)
    torch.save({"state_dict": {f"model.{n}": v for n, v in content["state_dict"].items()}}, path)
    assert main(["convert", str(path), "--family", "small", "--out", str(tmp_path / "package"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"] == len(network.state_dict())
    bare = {"backbone.conv": torch.zeros(1), "head.conv": torch.zeros(1)}  # one of Megvii's without its trainer
    assert convert.take_prefix(bare, {"model.backbone.conv", "model.head.conv"}).keys() == {
        "model.backbone.conv",
        "model.head.conv",
    }


def test_an_incomplete_checkpoint_is_refused(families: Path, tmp_path: Path, capsys) -> None:
    path, _ = checkpoint(tmp_path, "finetune")
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["pts_bbox_head.transformer.level_embeds"]
    torch.save(content, path)
    out = tmp_path / "package"
    assert main(["convert", str(path), "--family", "small", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "view_transform.level_embeds" in error
    assert not out.exists()


def test_an_unknown_family_is_named_with_the_known_ones(families: Path, tmp_path: Path, capsys) -> None:
    path, _ = checkpoint(tmp_path, "pretrain")
    assert main(["convert", str(path), "--family", "smal", "--out", str(tmp_path / "p")]) == 2
    assert "known are ['small']" in capsys.readouterr().err
