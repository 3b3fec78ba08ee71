"""The threshold on free: every value is scored as the decoder would, and the best one reaches the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from occbev.grid import VoxelGrid
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.postprocess import decode_occupancy
from occbev.results import Occupancy
from occbev_training.metrics.calibration import MIN_FREE, FreeThreshold, fit_min_free
from occbev_training.metrics.occupancy import confusion, score_occupied_iou

GRID = VoxelGrid((-2.0, -3.0, -1.0), (0.5, 0.5, 0.5), (8, 12, 4))
CLASSES = 5


def _sample(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, logits that lean towards it and underrate occupied, and a mask."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, CLASSES, GRID.shape).astype(np.uint8)
    truth[random.random(GRID.shape) < 0.5] = CLASSES - 1
    truth[0, 0, 0] = 255
    logits = random.normal(size=(CLASSES, *GRID.shape[::-1])).astype(np.float32)
    logits[-1] += 1.5
    for label in range(CLASSES):
        logits[label] += 1.2 * np.swapaxes(truth == label, 0, 2)
    return truth, logits, random.random(GRID.shape) < 0.8


def _decoder(logits: np.ndarray) -> Callable[[float], Occupancy]:
    return lambda min_free: decode_occupancy(logits, GRID, min_free=min_free)


def test_every_threshold_counts_what_the_decoder_would_say() -> None:
    threshold, expected = FreeThreshold(CLASSES), {}
    for truth, logits, mask in map(_sample, range(2)):
        threshold.add(truth, _decoder(logits), mask)
        for index in (0, 1, 77, 100, 199, 200):
            label = decode_occupancy(logits, GRID, min_free=float(MIN_FREE[index])).label
            expected[index] = expected.get(index, 0) + confusion(truth, label, mask, CLASSES)
    for index, counts in expected.items():
        np.testing.assert_array_equal(threshold.counts(index), counts)


def test_the_best_threshold_beats_the_likeliest_class() -> None:
    threshold = FreeThreshold(CLASSES)
    for seed in range(3):
        truth, logits, mask = _sample(seed)
        threshold.add(truth, _decoder(logits), mask)
    scores = [score_occupied_iou(threshold.counts(index), CLASSES - 1) for index in range(len(MIN_FREE))]
    best = threshold.best()
    assert best.occupancy_iou == max(scores) > scores[0] + 0.02
    assert best.min_free == pytest.approx(MIN_FREE[int(np.argmax(scores))])
    assert threshold.as_record()["tried"][100][1] == scores[100]


def test_counts_add_up_over_processes() -> None:
    whole, parts = FreeThreshold(CLASSES), [FreeThreshold(CLASSES), FreeThreshold(CLASSES)]
    for seed in range(2):
        truth, logits, mask = _sample(seed)
        whole.add(truth, _decoder(logits), mask)
        parts[seed].add(truth, _decoder(logits), mask)
    parts[0].merge(parts[1])
    assert parts[0].as_record() == whole.as_record()


def test_nothing_to_calibrate_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="occupied voxels"):
        FreeThreshold(CLASSES).best()


def test_reports_without_a_threshold_are_refused() -> None:
    assert fit_min_free({"calibration": {"min_free": 0.625}}, "r.json") == 0.625
    with pytest.raises(ValueError, match=r"r\.json.*--calibrate"):
        fit_min_free({"summary": {}}, "r.json")
    with pytest.raises(ValueError, match=r"1\.5"):
        fit_min_free({"calibration": {"min_free": 1.5}}, "r.json")


def test_export_takes_the_threshold_of_a_report(tmp_path) -> None:
    export = pytest.importorskip("occbev_training.cli.export")
    report = tmp_path / "report.json"
    report.write_text('{"calibration": {"min_free": 0.7}}')
    model = LiftSplatModel()
    chosen = export._calibrate(model, report)
    assert chosen == replace(model, occupancy=replace(model.occupancy, min_free=0.7))
    assert export._calibrate(model, None) is model
