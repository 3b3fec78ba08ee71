"""The demo, small: a second of drive through simulator, bag, player, DDS, node, scores and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 wheels or a ROS 2 distribution")
pytest.importorskip("vision_msgs", reason="needs vision_msgs, which the set-up builds")
pytest.importorskip("embreex", reason="the simulator casts rays with embreex")

from occbev.cli import main
from occbev.inference.model_package import PackageError, find_package

KEYS = {
    "frames_in",
    "frames_processed",
    "drops",
    "published",
    "rate_hz",
    "latency_ms",
    "detection",
    "occupancy",
    "versions",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one short run with the shipped model."""
    try:
        find_package("occbev-tiny")
    except PackageError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("demo")
    short = ["--seconds", "1", "--image", "160x90", "--out", str(folder)]
    assert main(["demo", *short]) == 0
    return folder


@pytest.mark.ros
@pytest.mark.slow
def test_every_frame_is_accounted_for(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert summary["frames_in"] == 5
    assert summary["frames_in"] == summary["frames_processed"] + sum(summary["drops"].values())
    total = summary["latency_ms"]["total"]
    assert 0 < total["p50"] <= total["p95"]
    assert max(summary["published"].values()) == summary["frames_processed"]


@pytest.mark.ros
@pytest.mark.slow
def test_scores_stand_beside_what_they_must_beat(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    detection, occupancy = summary["detection"], summary["occupancy"]
    for table in ("AP", "AP_30m", "AP_30m_prior"):
        assert set(detection[table]["car"]) == {"0.5", "1.0", "2.0", "4.0"}
    assert 0 <= detection["mAP"] <= 1
    assert 0 < occupancy["iou"] < 1
    assert 0 < occupancy["iou_mean_of_training_set"] < 1


@pytest.mark.ros
@pytest.mark.slow
def test_the_page_shows_pictures_and_the_drive_is_kept(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert page.count("<img") == page.count("class=scene ")
    assert page.count("<img") >= 1
    assert len(list(out.glob("drive-*"))) == 1


def test_a_drive_that_training_may_have_seen_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", "7", "--out", str(tmp_path)]) == 2
    assert "--seed 7 is of the train drives" in capsys.readouterr().err
