"""Confidence intervals: whole drives are drawn, and what they hold is what a plain re-count holds."""

from __future__ import annotations

import numpy as np
import pytest

from occbev.classes import DETECTION_CLASSES
from occbev.results import Boxes3D
from occbev_training.metrics.bootstrap import bootstrap, draw_samples
from occbev_training.metrics.detection import TP_ERRORS, evaluate_detection, match_detection
from occbev_training.sources.recording import Annotations


def _frames(count: int, seed: int = 0) -> tuple[list[Boxes3D], list[Annotations]]:
    """Random truths, and predictions that find most of them roughly."""
    random = np.random.default_rng(seed)
    predictions, truths = [], []
    for _ in range(count):
        size = int(random.integers(3, 12))
        box = np.zeros((size, 9), np.float32)
        box[:, :2] = random.uniform(-45, 45, (size, 2))
        box[:, 2:6] = 0.8, 4.0, 2.0, 1.6
        box[:, 6:] = random.normal(size=(size, 3))
        label = random.integers(0, 3, size)
        truths.append(
            Annotations(Boxes3D(box, label, np.ones(size, np.float32)), ("",) * size, random.integers(0, 9, size))
        )
        moved = box + random.normal(scale=0.7, size=box.shape).astype(np.float32)
        moved[:, 3:6] = np.abs(moved[:, 3:6]) + 0.1
        score = random.random(size).astype(np.float32)
        predictions.append(Boxes3D(moved, label, score)[random.random(size) < 0.8])
    return predictions, truths


def test_drives_are_drawn_whole() -> None:
    drives = ["a", "a", "b", "c", "c", "c"]
    times = draw_samples(drives, 50)
    assert times.shape == (50, 6)
    assert (times[:, 0] == times[:, 1]).all()
    assert (times[:, 3] == times[:, 5]).all()
    assert (times[:, 0] + times[:, 2] + times[:, 3] == 3).all()
    assert (times.std(0) > 0).all()


def test_frames_are_drawn_where_there_is_one_drive() -> None:
    assert draw_samples(["a"] * 5, 20).std() > 0
    found = bootstrap(lambda times: {"mean": float(times.mean())}, ["a"] * 5, 20)
    assert found is not None
    assert found.unit == "frame"
    assert found.bounds["mean"] == (1.0, 1.0)
    assert bootstrap(lambda times: {"mean": 0.0}, ["a"], 20) is None


def test_an_interval_covers_the_mean_of_drives() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    drives = [f"d{i // 4}" for i in range(400)]
    found = bootstrap(lambda times: {"mean": float(times @ values / times.sum())}, drives, 500)
    assert found is not None
    lo, hi = found.bounds["mean"]
    assert lo < values.mean() < hi
    error = values.reshape(100, 4).mean(1).std() / np.sqrt(100)
    assert hi - lo == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found.as_record()["units"] == 100


def test_a_resample_scores_as_if_the_frames_had_been_recorded_so_often() -> None:
    predictions, truths = _frames(12)
    times = np.random.default_rng(2).multinomial(12, np.full(12, 1 / 12))
    index = np.repeat(np.arange(12), times)
    fast = match_detection(predictions, truths).scores_resampled(times)
    plain = evaluate_detection([predictions[i] for i in index], [truths[i] for i in index])
    for name in DETECTION_CLASSES:
        assert fast.ap[name] == pytest.approx(plain.ap[name])
        for error in TP_ERRORS:
            assert fast.tp_errors[name][error] == pytest.approx(plain.tp_errors[name][error], nan_ok=True)
    assert fast.nds == pytest.approx(plain.nds)
    assert dict(fast.truths) == dict(plain.truths)


def test_rings_partition_boxes_and_the_whole_is_one_ring() -> None:
    predictions, truths = _frames(20)
    outcome = match_detection(predictions, truths)
    whole = outcome.scores()
    assert outcome.scores_within(0, np.inf).nds == pytest.approx(whole.nds)
    rings = [outcome.scores_within(lo, hi) for lo, hi in ((0, 20), (20, 35), (35, np.inf))]
    for name in ("car", "truck"):
        assert sum(ring.truths[name] for ring in rings) == whole.truths[name]
        assert sum(ring.predictions[name] for ring in rings) == whole.predictions[name]
        assert min(r.ap[name][2.0] for r in rings) < whole.ap[name][2.0] < max(r.ap[name][2.0] for r in rings)


def test_a_box_beyond_the_border_of_a_ring_counts_where_its_truth_is() -> None:
    def boxes(x: float) -> Boxes3D:
        row = np.array([[x, 0, 0.8, 4, 2, 1.6, 0, 0, 0]], np.float32)
        return Boxes3D(row, np.zeros(1, np.int64), np.ones(1, np.float32))

    truth = Annotations(boxes(19.8), ("",), np.array([9]))
    outcome = match_detection([boxes(20.2)], [truth])
    near, far = outcome.scores_within(0, 20), outcome.scores_within(20, 50)
    assert near.ap["car"][2.0] == pytest.approx(1.0)
    assert (near.predictions["car"], far.predictions["car"], far.truths["car"]) == (1, 0, 0)
