"""Scores of predictions and of priors, on boxes and grids that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from occbev.classes import DETECTION_CLASSES, FREE
from occbev.config import ImageConfig
from occbev.geometry import frame2ego
from occbev.grid import GRIDS, BevGrid
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.results import Boxes3D
from occbev_training.data.cache import CachedSample, CacheInfo, SampleCache, write_sample
from occbev_training.evaluation.frames import (
    Prediction,
    Priors,
    best_boxes,
    best_threshold,
    box_channels,
    boxes_of,
    detection_scores,
    evaluate,
    fit_priors,
    reconstruction_iou,
    score_priors,
)
from occbev_training.sources.recording import Annotations

MODEL = LiftSplatModel(
    image=ImageConfig(width=64, height=32),
    bev=BevGrid((-16.0, -16.0), (1.0, 1.0), (32, 32)),
    grid=GRIDS["tiny"],
)
CAR, WALKER = DETECTION_CLASSES.index("car"), DETECTION_CLASSES.index("pedestrian")


def _sample(boxes: list[list[float]], labels: list[int], occupied: np.ndarray, points: int = 9) -> CachedSample:
    """A sample of which only the truth matters; occupied: (X, Y, Z) bool."""
    grid = GRIDS["tiny"].shape
    nothing = np.zeros(grid, np.uint8)
    return CachedSample(
        np.zeros((1, 32, 64, 3), np.uint8),
        np.ones(1, bool),
        np.eye(3)[None],
        np.eye(4)[None],
        np.zeros(0, np.uint8),
        np.zeros((0, 2), np.float32),
        np.zeros(0, np.float32),
        np.where(occupied, 2, 1).astype(np.uint8),
        nothing + 1,
        nothing,
        nothing,
        np.array(boxes, np.float32).reshape(-1, 9),
        np.array(labels, np.int64),
        np.full(len(labels), points),
        np.where(occupied, 4, FREE).astype(np.uint8),
        np.ones(grid, bool),
    )


def _cache(folder: Path, samples: list[CachedSample]) -> SampleCache:
    (folder / "d").mkdir(parents=True)
    for index, sample in enumerate(samples):
        write_sample(folder / "d" / f"{index:04d}.sample", sample)
    files = tuple(("d", f"{index:04d}.sample") for index in range(len(samples)))
    return SampleCache(folder, CacheInfo(MODEL.image, ("CAM_FRONT",), MODEL.grid), files)


def _maps(boxes: list[list[float]], labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Network outputs that say exactly these boxes."""
    heatmap = np.full((10, 32, 32), -12.0, np.float32)
    box = np.zeros((10, 32, 32), np.float32)
    for label, one in zip(labels, np.array(boxes), strict=True):
        x, y = np.floor(MODEL.bev.map_coordinates(one[:2])).astype(int)
        heatmap[label, y, x] = 4.0
        box[:, y, x] = box_channels(one[None])[0]
        box[:2, y, x] = MODEL.bev.map_coordinates(one[:2]) - (x, y)
        box[8:, y, x] = one[7:]
    return heatmap, box


def _logits(occupied: np.ndarray, classes: int, label: int) -> np.ndarray:
    """(K, Z, Y, X) logits that say `label` where occupied, else the last class."""
    volume = np.swapaxes(occupied, 0, 2)
    out = np.zeros((classes, *volume.shape), np.float32)
    out[label] = np.where(volume, 5, 0)
    out[-1] = np.where(volume, 0, 5)
    return out


ROAD = np.zeros(GRIDS["tiny"].shape, bool)
ROAD[:, 10:30, 1] = True
BOXES = [[5.3, 2.2, 0.8, 4.4, 1.9, 1.6, 0.3, 2.0, 0.5], [-7.4, -3.1, 0.9, 0.6, 0.7, 1.7, 1.0, 0, 0]]


def test_a_perfect_prediction_scores_one(tmp_path: Path) -> None:
    cache = _cache(tmp_path, [_sample(BOXES, [CAR, WALKER], ROAD)] * 3)
    heatmap, box = _maps(BOXES, [CAR, WALKER])
    scores = evaluate(cache, lambda index: Prediction(heatmap, box, _logits(ROAD, 18, 4)), MODEL)
    summary = scores.summary()
    assert summary["car_AP_2m_30m"] == pytest.approx(1.0)
    assert scores.full.ap["pedestrian"][0.5] == pytest.approx(1.0)
    assert scores.full.tp_errors["car"]["orient_err"] == pytest.approx(0.0, abs=1e-5)
    assert summary["occupancy_iou"] == pytest.approx(1.0)
    assert summary["occupancy_miou"] == pytest.approx(1.0)


def test_boxes_of_published_axes_are_scored_in_base_link() -> None:
    maps = _maps([[3.0, 2.0, 0.0, 4.0, 2.0, 1.5, 0.3, 1.0, 0.0]], [CAR])
    lidar = replace(MODEL, bev=replace(MODEL.bev, frame="lidar"))
    here, there = (boxes_of(Prediction(*maps), model) for model in (MODEL, lidar))
    assert len(here) == len(there) > 0
    wanted = frame2ego("lidar") @ [*here.box[0, :3], 1.0]
    np.testing.assert_allclose(there.box[0, :3], wanted[:3], atol=1e-4)


def test_occupancy_axes_are_not_swapped(tmp_path: Path) -> None:
    """A prediction that is turned by a quarter must lose."""
    cache = _cache(tmp_path, [_sample(BOXES, [CAR, WALKER], ROAD)])
    heatmap, box = _maps(BOXES, [CAR, WALKER])
    turned = np.swapaxes(ROAD, 0, 1)
    scores = evaluate(cache, lambda index: Prediction(heatmap, box, _logits(turned, 18, 4)), MODEL)
    assert scores.summary()["occupancy_iou"] == pytest.approx(20 * 20 / (2 * 40 * 20 - 20 * 20))


def test_only_the_chosen_samples_are_scored(tmp_path: Path) -> None:
    cache = _cache(tmp_path, [_sample(BOXES, [CAR, WALKER], ROAD), _sample([], [], ~ROAD)])
    heatmap, box = _maps(BOXES, [CAR, WALKER])
    right = Prediction(heatmap, box, _logits(ROAD, 18, 4))
    assert evaluate(cache, lambda index: right, MODEL, indices=[0]).summary()["occupancy_iou"] == pytest.approx(1.0)
    assert evaluate(cache, lambda index: right, MODEL).summary()["occupancy_iou"] < 0.5


def _boxes(centres: list[tuple[float, float]]) -> Boxes3D:
    box = np.array([[x, y, 0.8, 4.4, 1.9, 1.6, 0, 0, 0] for x, y in centres], np.float32)
    return Boxes3D(box, np.full(len(box), CAR), np.linspace(0.9, 0.5, len(box)).astype(np.float32))


def test_near_scores_neither_reward_nor_punish_hidden_and_far_truths() -> None:
    truth = Annotations(_boxes([(10, 0), (20, 5), (35, 0), (12, -6)]), ("",) * 4, np.array([9, 9, 9, 2]))
    everything, only_near = (
        _boxes([(35, 0), (12, -6), (10, 0), (20, 5)]),
        _boxes([(10, 0), (20, 5)]),
    )
    for predicted in (everything, only_near):
        _, near = detection_scores([predicted], [truth])
        assert near.truths["car"] == 2
        assert near.ap["car"][2.0] == pytest.approx(1.0)
    full, _ = detection_scores([only_near], [truth])
    assert full.ap["car"][2.0] < 0.6
    _, wrong = detection_scores([_boxes([(0, 20), (10, 0), (20, 5)])], [truth])
    assert wrong.ap["car"][2.0] < 0.8  # where nothing is, a box is wrong


def test_priors_answer_what_every_training_frame_holds(tmp_path: Path) -> None:
    """Cars always stand in one place: the mean map finds them; the mean grid is the road."""
    cache = _cache(tmp_path, [_sample([BOXES[0]], [CAR], ROAD)] * 4)
    priors = fit_priors(cache, MODEL)
    scores = score_priors(cache, priors, MODEL)
    assert scores["car_AP_2m_30m"] == pytest.approx(1.0)
    assert scores["occupancy_iou"] == pytest.approx(1.0)
    np.testing.assert_allclose(priors.boxes(MODEL.bev).box[0, 3:6], BOXES[0][3:6], rtol=1e-3)
    empty = _cache(tmp_path / "more", [_sample([BOXES[0]], [CAR], ROAD), _sample([], [], ~ROAD)])
    assert score_priors(empty, priors, MODEL, [0])["occupancy_iou"] == pytest.approx(1.0)
    assert score_priors(empty, priors, MODEL)["occupancy_iou"] < 1
    priors.save(tmp_path / "priors.npz")
    again = Priors.load(tmp_path / "priors.npz")
    np.testing.assert_array_equal(again.occupancy(), ROAD)
    np.testing.assert_array_equal(again.boxes(MODEL.bev).box, priors.boxes(MODEL.bev).box)
    assert (tmp_path / "priors.npz").stat().st_size < 200_000


def test_priors_know_nothing_of_scattered_cars(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def scattered() -> list[list[float]]:
        return [[*rng.uniform(-15, 15, 2), 0.8, 4.4, 1.9, 1.6, 0, 0, 0] for _ in range(3)]

    seen = _cache(tmp_path / "a", [_sample(scattered(), [CAR] * 3, ROAD) for _ in range(12)])
    evaluation_data = _cache(tmp_path / "b", [_sample(scattered(), [CAR] * 3, ROAD) for _ in range(12)])
    assert score_priors(evaluation_data, fit_priors(seen, MODEL), MODEL)["car_AP_2m_30m"] < 0.1


def test_boxes_without_returns_and_unseen_voxels_do_not_enter_the_priors(tmp_path: Path) -> None:
    sample = _sample([BOXES[0]], [CAR], ROAD, points=0)
    hidden = replace(sample, mask_camera=np.zeros_like(sample.mask_camera))
    priors = fit_priors(_cache(tmp_path, [hidden]), MODEL)
    assert priors.heatmap.max() == 0
    assert not priors.occupied.any()


def test_the_best_threshold_equals_a_search() -> None:
    rng = np.random.default_rng(3)
    seen = rng.integers(0, 30, (8, 8, 4)).astype(np.int32)
    occupied = np.minimum(seen, rng.integers(0, 30, (8, 8, 4))).astype(np.int32)
    share = np.round(255 * np.divide(occupied, seen, out=np.zeros(seen.shape), where=seen > 0)).astype(np.uint8)

    def iou(threshold: float) -> float:
        chosen = share > 255 * threshold
        return float(occupied[chosen].sum() / (occupied.sum() + (seen - occupied)[chosen].sum()))

    best = max(iou(t) for t in np.arange(-0.002, 1.002, 0.5 / 255))
    assert iou(best_threshold(share, occupied, seen)) == pytest.approx(best)


def test_reconstruction_is_scored_where_cameras_and_lidar_looked(tmp_path: Path) -> None:
    sample = _sample([], [], ROAD)
    half = sample.state.copy()
    half[20:] = 0  # unobserved: what is said there does not count
    cache = _cache(tmp_path, [replace(sample, state=half)])
    wrong_there = ROAD.copy()
    wrong_there[20:] = ~ROAD[20:]
    logits = _logits(wrong_there, 2, 0)[::-1]  # occupied is the second channel
    assert reconstruction_iou(cache, lambda index: Prediction(reconstruction=logits), [0]) == pytest.approx(1.0)


def test_priors_that_are_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"p\.npz"):
        Priors.load(tmp_path / "p.npz")


def test_joined_boxes_are_the_best_ones() -> None:
    joined = best_boxes([_boxes([(0, 0), (1, 0)]), _boxes([(2, 0)])], 2)
    assert joined.box[:, 0].tolist() == [0, 2]
