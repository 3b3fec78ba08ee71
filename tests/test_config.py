"""The strict loader: round trips, bases, and messages that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from occbev.config import ConfigError, ModelConfig, from_record, load_config, save_config, to_record
from occbev.grid import GRIDS


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = from_record(ModelConfig, {"name": "x", "lift": {"depth": {"step": 0.5}}, "grid": "tiny"})
    assert config.lift.depth.bins == 88
    assert config.grid == GRIDS["tiny"]
    save_config(tmp_path / "model.yaml", config)
    assert load_config(tmp_path / "model.yaml", ModelConfig) == config


def test_a_file_is_laid_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\nlift: {channels: 32, stride: 8}")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nlift: {channels: 48}")
    config = load_config(tmp_path / "top.yaml", ModelConfig)
    assert (config.name, config.lift.channels, config.lift.stride) == ("base", 48, 8)


def test_numbers_that_yaml_reads_as_text_become_floats() -> None:
    assert from_record(ModelConfig, {"lift": {"depth": {"step": "5e-1"}}}).lift.depth.step == 0.5
    assert from_record(ModelConfig, {"lift": {"depth": {"hi": 60}}}).lift.depth.hi == 60.0


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
        from_record(ModelConfig, record)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml", ModelConfig)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"list\.yaml: holds a list"):
        load_config(tmp_path / "list.yaml", ModelConfig)


def test_plain_values_hold_no_python_objects() -> None:
    record = to_record(ModelConfig())
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
        load_config(path, ModelConfig)
