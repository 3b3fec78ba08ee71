"""What `--help` states without importing slow modules is what these modules hold."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the modules that are compared need the training environment")

from occbev.config import ConfigError
from occbev.grid import GRIDS
from occbev.messages.topics import PROFILE_NAMES
from occbev_training.benchmarks import fuzz
from occbev_training.cli.arguments import shared
from occbev_training.cli.arguments.pretrain import weights_path
from occbev_training.evaluation import space
from occbev_training.export.run_folder import is_run, read_run
from occbev_training.metrics import bootstrap
from occbev_training.occupancy import executors, pairs
from occbev_training.simulator import drive
from occbev_training.sources import deskew, labelled, lidar_files, point_times


def test_defaults_and_choices_are_those_of_the_modules() -> None:
    assert shared.PROFILES == PROFILE_NAMES
    assert set(shared.GRIDS) == set(GRIDS)
    assert shared.POINT_TIMES == point_times.MODES
    assert shared.LIDAR_COLUMNS == lidar_files.COLUMNS
    assert shared.MAX_GAP == labelled.MAX_GAP
    assert shared.LABEL_VARIANTS == pairs.VARIANTS
    assert shared.EXECUTORS == executors.EXECUTORS
    assert shared.CALIBRATION_FRAMES == space.MAX_FRAMES
    assert shared.BOOTSTRAP_DRAWS == bootstrap.DRAWS
    assert shared.WORLDS == drive.WORLDS
    assert (*deskew.EgoBox().lo, *deskew.EgoBox().hi) == shared.EGO_BOX
    assert tuple(fuzz.COUNTS) == shared.FUZZED


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon"])
def test_a_time_limit_leaves_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=shared.minutes)
    assert parser.parse_args(["--minutes", "0.5"]).minutes == 0.5
    with pytest.raises(SystemExit):
        parser.parse_args(["--minutes", text])
    assert f"--minutes: {'invalid' if text == 'soon' else text}" in capsys.readouterr().err


def test_a_run_is_named_by_its_folder_or_its_weights(tmp_path: Path) -> None:
    assert weights_path(str(tmp_path)) == tmp_path / "weights.safetensors"
    assert weights_path("other.safetensors") == Path("other.safetensors")


def test_packages_are_named_by_folder_or_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (shared.package_path("occbev-tiny") / "config.yaml").is_file()
    (tmp_path / "mine").mkdir()
    assert shared.package_path("mine") == Path("mine")
    assert shared.package_path("no/such") == Path("no/such")


def test_a_run_that_is_not_finished_or_damaged_is_named(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert is_run(tmp_path)
    with pytest.raises(ConfigError, match="the run is not finished"):
        read_run(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"run\.json: .*stage.* is missing"):
        read_run(tmp_path)
