"""Scores of frames: what is missing is not scored, parts add up, single frames are judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from occbev.grid import VoxelGrid
from occbev.results import Boxes3D
from occbev_training.evaluation.scores import (
    VISIBILITY,
    FrameResult,
    OccupancyCounts,
    OccupancyView,
    Scores,
    count_occupancy,
    found_share,
)
from occbev_training.metrics.occupancy import GridError, confusion, score_occupied_iou
from occbev_training.sources.recording import Annotations

GRID = VoxelGrid((-12.0, -12.0, 0.0), (1.0, 1.0, 1.0), (24, 24, 3))


def _view(seed: int, **more: object) -> tuple[np.ndarray, OccupancyView]:
    """A predicted volume, and a truth that it is right about in two of three voxels."""
    random = np.random.default_rng(seed)
    truth = np.where(random.random(GRID.shape) < 0.7, 17, random.integers(0, 17, GRID.shape))
    label = np.where(random.random(GRID.shape) < 0.67, truth, random.integers(0, 18, GRID.shape))
    mask = random.random(GRID.shape) < 0.6
    return label.astype(np.uint8), OccupancyView(truth.astype(np.uint8), mask, GRID, **more)


def _counted(label: np.ndarray, truth: OccupancyView) -> OccupancyCounts:
    return count_occupancy(label, GRID, truth)


def _boxes(centres: list[tuple[float, float]], score: float = 0.9) -> Boxes3D:
    box = np.array([[x, y, 0.8, 4.4, 1.9, 1.6, 0, 0, 0] for x, y in centres], np.float32)
    return Boxes3D(box.reshape(-1, 9), np.zeros(len(box), np.int64), np.full(len(box), score, np.float32))


def _annotated(centres: list[tuple[float, float]]) -> Annotations:
    return Annotations(_boxes(centres), ("",) * len(centres), np.full(len(centres), 9))


def test_who_saw_a_voxel_partitions_all_voxels() -> None:
    views = np.full(GRID.shape, 2, np.uint8)
    views[:5] = 1
    label, truth = _view(0, mask_lidar=np.arange(3) < np.full(GRID.shape, 2), views=views)
    counts = count_occupancy(label, GRID, truth)
    occupied, said = truth.semantics != 17, label != 17
    assert counts.seen_by.sum() == np.count_nonzero(occupied | said)
    first = truth.mask_camera & (views == 1)
    assert counts.seen_by[0, 0] == np.count_nonzero(occupied & said & first)
    assert counts.seen_by[2].sum() > 0
    assert counts.seen_by[4:].sum() == 0
    unknown = count_occupancy(label, GRID, _view(0)[1])
    assert unknown.seen_by[:4].sum() == 0  # only the camera mask is known
    assert VISIBILITY[4:] == ("any camera", "no camera")
    np.testing.assert_array_equal(unknown.confusion, confusion(truth.semantics, label, truth.mask_camera))


def test_frames_without_dense_truth_are_left_out_and_draws_keep_step() -> None:
    pairs = [_view(seed) for seed in range(4)]
    counts = [_counted(*pair) for pair in pairs]
    counts.insert(1, None)
    frames = [FrameResult(f"d/{i}", f"d{i}", occupancy=c) for i, c in enumerate(counts)]
    scores = Scores.of(frames)
    assert scores.measured == ("occupancy",)
    total = sum(c.confusion for c in counts if c is not None)
    assert scores.summary()["occupancy_iou"] == score_occupied_iou(total)
    times = np.array([0, 5, 0, 2, 0])
    drawn = scores._draw(times)
    assert drawn["occupancy_iou"] == score_occupied_iou(counts[3].confusion)
    lo, hi = scores.intervals(40).bounds["occupancy_iou"]
    assert lo <= scores.summary()["occupancy_iou"] <= hi
    assert "detection" not in scores.as_record()


def test_a_ring_is_averaged_over_the_classes_in_it() -> None:
    frames = [FrameResult("d/0", "d", _boxes([(5, 0)]), _annotated([(5, 0)]))]
    rings = list(Scores.of(frames).as_record()["detection_by_range"].values())
    assert rings[0]["mAP"] == pytest.approx(1.0)
    assert rings[-1]["mAP"] is None


def test_nothing_is_scored_of_a_network_that_predicts_nothing_known() -> None:
    frames = [FrameResult("d/0", "d", annotations=_annotated([(5, 0)]))]
    scores = Scores.of(frames)
    assert (scores.measured, scores.summary(), scores.intervals()) == ((), {}, None)


def test_rays_are_scored_only_where_every_frame_knows_its_origins() -> None:
    origins = np.array([[0, 0, 1.5]], np.float32)
    with_rays = _counted(*_view(0, origins=origins))
    without = _counted(*_view(1))
    assert Scores.of([FrameResult("a", "a", occupancy=with_rays)]).rays is not None
    mixed = [FrameResult("a", "a", occupancy=with_rays), FrameResult("b", "b", occupancy=without)]
    assert Scores.of(mixed).measured == ("occupancy",)


def test_a_network_without_classes_has_no_score_of_classes() -> None:
    label, truth = _view(0, origins=np.array([[0, 0, 1.5]], np.float32))
    counts = count_occupancy(np.where(label == 17, label, 0).astype(np.uint8), GRID, truth, has_classes=False)
    scores = Scores.of([FrameResult("a", "a", occupancy=counts)])
    assert scores.summary() == {"occupancy_iou": _counted(label, truth).iou}
    occupancy = scores.as_record()["occupancy"]
    assert (occupancy["mIoU"], occupancy["class_iou"], scores.measured) == (None, {}, ("occupancy",))


def test_other_grids_are_refused() -> None:
    label, truth = _view(0)
    shifted = replace(GRID, lo=(-24.0, -12.0, 0.0))  # of the same shape
    with pytest.raises(GridError, match=r"predicted on 24x24x3 .*\(-24.0, -12.0, 0.0\).*true ones are on .*\(-12.0, "):
        count_occupancy(label, shifted, truth)


def test_one_frame_is_judged_by_what_is_found_and_what_is_wrong() -> None:
    truth = _annotated([(10, 0), (20, 5)])
    assert found_share(_boxes([(10, 0), (20, 5)]), truth) == 1.0
    assert found_share(_boxes([(10, 0)]), truth) == pytest.approx(2 / 3)
    assert found_share(_boxes([(10, 0), (0, 30)]), truth) == pytest.approx(1 / 2)
    assert found_share(_boxes([(10, 0), (20, 5)], score=0.1), truth) == 0.0
    assert np.isnan(found_share(_boxes([]), _annotated([])))
