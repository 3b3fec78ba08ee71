"""The strict loader: round trips, bases, and messages that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from occbev.config import ConfigError, save_config, to_record
from occbev.grid import GRIDS
from occbev.inference.families import FAMILIES, load_model, read_model
from occbev.inference.families.lift_splat import LiftSplatModel


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = read_model({"name": "x", "lift": {"depth": {"step": 0.5}}, "grid": "tiny"})
    assert config.lift.depth.bins == 88
    assert config.grid == GRIDS["tiny"]
    save_config(tmp_path / "model.yaml", config)
    assert load_model(tmp_path / "model.yaml") == config


def test_a_file_is_laid_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\nlift: {channels: 32, stride: 8}")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nlift: {channels: 48}")
    config = load_model(tmp_path / "top.yaml")
    assert (config.name, config.lift.channels, config.lift.stride) == ("base", 48, 8)


def test_numbers_that_yaml_reads_as_text_become_floats() -> None:
    assert read_model({"lift": {"depth": {"step": "5e-1"}}}).lift.depth.step == 0.5
    assert read_model({"lift": {"depth": {"hi": 60}}}).lift.depth.hi == 60.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"lift": {"chanels": 3}}, r"lift\.chanels: unknown key; did you mean 'channels'"),
        ({"lift": {"channels": "many"}}, r"lift\.channels: want int, got 'many'"),
        ({"lift": {"channels": True}}, r"lift\.channels: want int, got True"),
        ({"image": {"width": 350}}, r"image: image size 350x128"),
        ({"grid": "huge"}, r"grid: grid 'huge' is unknown"),
        ({"lift": {"z_range": [1]}}, r"lift\.z_range: want 2 values"),
        ({"image": 3}, r"image: want keys and values, got 3"),
        ({"bev": {"lo": [0, 0], "pitch": [0, 1], "shape": [2, 2]}}, r"bev: a BEV grid has two"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(record: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model(record)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_model(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"list\.yaml: holds a list"):
        load_model(tmp_path / "list.yaml")


def test_plain_values_hold_no_python_objects() -> None:
    record = to_record(LiftSplatModel())
    assert record["grid"]["axis_order"] == "xyz"
    assert record["lift"]["depth"] == {
        "lo": 1.0,
        "hi": 45.0,
        "step": 1.0,
        "spacing": "uniform",
    }


@pytest.mark.parametrize("value", [".nan", ".inf", "1e999"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"lift:\n  depth:\n    lo: {value}\n")
    with pytest.raises(ConfigError, match=r"model\.yaml: lift\.depth\.lo.*not finite"):
        load_model(path)


def test_every_model_of_the_tree_is_read_as_its_family(repository: Path) -> None:
    files = sorted((repository / "config/models").glob("*.yaml"))
    models = {path.stem: load_model(path) for path in files}
    assert all(type(model) is FAMILIES[model.family].config for model in models.values())
    assert {model.family for model in models.values()} == set(FAMILIES)
    for model in models.values():
        assert read_model(to_record(model)) == model


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"family": "bevformr"}, r"model\.family 'bevformr': must be one of \[.*'bevformer'.*did you mean 'bevformer'"),
        ({"family": "detr3d", "bevformer": {}}, r"model\.bevformer: a 'detr3d' network has no such section"),
        (
            {"family": "bevformer", "memory": 2},
            r"model\.memory: a 'bevformer' network has no such section, only \['lss'\]",
        ),
        (
            {"encoder": {"backbone": "resnet50"}},
            r"model\.encoder: backbone 'resnet50': must be one of .*tf_efficientnet_lite0",
        ),
        ({"encoder": {"channels": 8}}, r"model\.encoder: channels 8: must be at least 16"),
        ({"family": "detr3d", "resnet": {"depth": 99}}, r"model\.resnet: depth 99: must be one of \(14, 18, 50, 101\)"),
        ({"family": "bevdet", "bevdet": {"depth": 99}}, r"model\.bevdet: bevdet\.depth 99: must be one of"),
    ],
)
def test_a_model_of_another_family_is_refused_by_name(record: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model(record, "model")


def test_earlier_forms_are_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    old = {"family": "lss", "memory": 0, "resnet": None, "bevdet": {"frames": 2, "published_buffers": "lift"}}
    model = read_model(old)
    assert (model.family, model.bevdet.frames, model.bevdet.reference_buffers) == ("bevdet", 2, "lift")
    assert "family 'bevdet'" in caplog.text
    assert "reference_buffers" in caplog.text
    assert old["bevdet"]["published_buffers"] == "lift"  # the caller's record is left alone
