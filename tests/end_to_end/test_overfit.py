"""Pre-training learns the two real frames that have images and LiDAR by heart: labels, loss and network agree."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

from occbev_training.cli import main

pytestmark = pytest.mark.skipif("OCCBEV_LONG_TESTS" not in os.environ, reason="takes minutes; 'make test-loop' runs it")


@pytest.mark.parametrize("seed", [0, 1])
def test_two_real_frames_are_learned_by_heart(
    shared: Path,
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.chdir(repository)
    cache, run, picture = tmp_path / "cache", tmp_path / "run", tmp_path / "picture.png"
    for name in ("nuscenes-one", "nuscenes-0103"):
        _run(
            "prepare",
            cache,
            "--nuscenes",
            shared / "data" / name,
            "--model",
            "config/training/near_model.yaml",
            "--label-window",
            0.2,
            "--near-hits",
            1,
        )
    _run("pretrain", "config/training/overfit_real.yaml", "--data", cache, "--out", run, "--threads", 1, "--seed", seed)
    capsys.readouterr()
    _run("reconstruct", run, "--data", cache, "--out", picture, "--json")
    iou = json.loads(capsys.readouterr().out)["iou"]
    assert set(iou) == {"scene-0061/0000", "scene-0103/0001"}  # no sweep is near scene-0103/0000
    assert min(iou.values()) >= 0.8, iou
    assert cv2.imread(str(picture)).shape[1] >= 1400


def _run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments
