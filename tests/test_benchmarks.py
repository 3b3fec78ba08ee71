"""Benchmarks: rounds are interleaved, and what is compared computes the same."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest

from occbev.benchmarks import Report, run_interleaved
from occbev.benchmarks.markdown import write_section
from occbev.benchmarks.pipeline import (
    encode_frames,
    plain_network_images,
    plain_occupancy,
    six_cameras,
)
from occbev.cli import main
from occbev.config import ImageConfig
from occbev.grid import VoxelGrid, volume_from_xyz
from occbev.inference.postprocess import decode_occupancy
from occbev.inference.preprocess import Preprocessor


def test_rounds_are_interleaved_after_one_that_is_not_measured() -> None:
    calls: list[str] = []
    timings = run_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert set(timings) == {"a", "b"}
    assert all(0 <= t.wall_ms <= t.p95_ms for t in timings.values())


def test_the_report_names_the_machine() -> None:
    record = Report("probe", {"x_ms": 1.0}, {"y_vs_x": 2.0}).as_record()
    assert record["bench"] == "probe"
    assert {"processor", "cores"} <= set(record["machine"])


def test_a_run_replaces_its_own_section_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "docs/benchmarks.md"
    day = datetime.date(2026, 1, 2)
    for bench, value in (("one", 1.0), ("two", 2.0), ("one", 3.25)):
        write_section(path, Report(bench, {"set": {"x|y_ms": value}}).as_record(), f"occbev bench {bench}", day)
    text = path.read_text()
    assert text.index("## one") < text.index("## two")
    assert "| set.x\\|y_ms | 3.25 |" in text
    assert "| set.x\\|y_ms | 2 |" in text
    assert "| 1 |" not in text
    assert text.count("`occbev bench one`, 2026-01-02") == 1


def test_the_command_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("occbev.benchmarks.pipeline.run", lambda options: Report("pipeline", {"x_ms": options.rounds}))
    assert main(["bench", "pipeline", "--rounds", "2", "--json", "--markdown", str(tmp_path / "b.md")]) == 0
    assert "`occbev bench pipeline --rounds 2`" in (tmp_path / "b.md").read_text()


def test_the_plain_preprocessing_makes_nearly_the_same_images() -> None:
    config, rig = ImageConfig(), six_cameras()
    frames = encode_frames(rig)
    ours = Preprocessor(config).prepare(frames, rig)[0]
    plain = plain_network_images(frames, config.width, config.height, np.array(config.mean), np.array(config.std))
    assert ours.shape == plain.shape
    assert np.abs(ours - plain).mean() < 0.03, "two grey levels: the JPEG is decoded at half its size"


def test_the_plain_occupancy_decoding_is_equal() -> None:
    grid = VoxelGrid((0, 0, 0), (1, 1, 1), (5, 4, 3))
    logits = np.random.default_rng(0).normal(size=(18, 3, 4, 5)).astype(np.float32)
    label, confidence = plain_occupancy(logits)
    ours = decode_occupancy(logits, grid)
    np.testing.assert_array_equal(volume_from_xyz(ours.label), label)
    np.testing.assert_allclose(volume_from_xyz(ours.confidence), confidence, rtol=1e-5)


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pipeline", "--rounds", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert main(["bench", "pipeline", "--model", "no-such-model"]) == 2
    assert "no model package 'no-such-model'" in capsys.readouterr().err
