"""The evaluation benchmark: its boxes hold ties, its oracle is compared number by number, its absence is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from occbev.benchmarks import Options
from occbev_training.benchmarks import evaluation as bench
from occbev_training.metrics.detection import DetectionScores, score_boxes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SAMPLES", 12)
    monkeypatch.setattr(bench, "BOXES", 60)
    monkeypatch.setattr(bench, "ORIGINS", 2)


def test_without_the_devkit_the_rest_is_measured_and_the_report_says_so(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv(bench.DEVKIT_VARIABLE, str(tmp_path / "python"))
    record = bench.run(Options(rounds=1)).as_record()
    assert record["ratios"] == {}
    assert "make devkit" in record["values"]["devkit"]
    assert record["values"]["rays"] == 2 * 14040
    assert record["values"]["predictions"] == 720
    assert record["values"]["equal_scores"] > 500
    assert record["values"]["rayiou_ms"] > 0


def test_the_devkit_says_the_same(small: None) -> None:
    try:
        bench.devkit_python()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    truths = bench.make_truths(12, 40)
    predictions = bench.make_predictions(truths, 12, 60)
    record = bench.run_devkit(predictions, truths, 12)
    assert bench.compare(score_boxes(predictions, truths), record["scores"]) < 1e-9
    assert record["cpu_ms"] > 0


def test_a_number_that_differs_is_named() -> None:
    truths = bench.make_truths(4, 40)
    scores = score_boxes(bench.make_predictions(truths, 4, 60), truths)
    theirs = _serialized(scores)
    assert bench.compare(scores, theirs) == 0
    theirs["label_tp_errors"]["car"]["vel_err"] += 1e-3
    with pytest.raises(bench.DevkitError, match="vel_err of car"):
        bench.compare(scores, theirs)


def _serialized(scores: DetectionScores) -> dict:
    """The form of the devkit's own record."""
    return {
        "nd_score": scores.nds,
        "mean_ap": scores.mean_ap,
        "label_aps": {n: {str(t): v for t, v in by.items()} for n, by in scores.ap.items()},
        "label_tp_errors": {
            n: {e: None if np.isnan(v) else v for e, v in by.items()} for n, by in scores.tp_errors.items()
        },
    }
