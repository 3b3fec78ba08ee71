"""Decoding: known peaks and voxels come back in metres, wrong outputs are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occbev.classes import DETECTION_CLASSES, FREE, OCCUPANCY_CLASSES
from occbev.geometry import make_transform, rotation_from_yaw
from occbev.grid import BevGrid, VoxelGrid, volume_from_xyz
from occbev.inference import postprocess
from occbev.inference.factors import Factors, decode_factors
from occbev.inference.postprocess import (
    NMS_RADIUS,
    BoxDecoding,
    OutputError,
    bev_overlap,
    circle_nms,
    decode_boxes,
    decode_occupancy,
    rotated_nms,
    voxels_in_view,
)
from occbev.results import Boxes3D
from occbev.rig import Camera, CameraRig

BEV = BevGrid((-12.0, -8.0), (0.8, 0.5), (30, 32))
GRID = VoxelGrid((-4.0, -3.0, -1.0), (0.5, 0.5, 1.0), (16, 12, 4))
FORWARD = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def maps(*objects: tuple[str, float, tuple[float, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Write objects (class, score, x y z l w h yaw vx vy) into maps as the training targets do."""
    heatmap = np.full((len(DETECTION_CLASSES), 32, 30), -8.0, np.float32)
    box = np.zeros((10, 32, 30), np.float32)
    for name, score, (x, y, z, length, width, height, yaw, vx, vy) in objects:
        column, row = BEV.map_coordinates([x, y])
        i, j = int(row), int(column)
        heatmap[DETECTION_CLASSES.index(name), i, j] = np.log(score / (1 - score))
        box[:, i, j] = [
            column - j,
            row - i,
            z,
            *np.log([length, width, height]),
            np.sin(yaw),
            np.cos(yaw),
            vx,
            vy,
        ]
    return heatmap, box


CAR = (3.3, -2.2, 0.8, 4.5, 1.9, 1.6, 2.5, -3.0, 0.5)
WALKER = (-6.1, 5.0, 0.9, 0.6, 0.7, 1.8, -3.0, 0.0, 1.2)


def test_objects_come_back_in_metres_best_first() -> None:
    boxes = decode_boxes(*maps(("pedestrian", 0.4, WALKER), ("car", 0.9, CAR)), BEV, cameras=("front",))
    np.testing.assert_allclose(boxes.box, [CAR, WALKER], atol=1e-5)
    assert [DETECTION_CLASSES[i] for i in boxes.label] == ["car", "pedestrian"]
    np.testing.assert_allclose(boxes.score, [0.9, 0.4], rtol=1e-5)
    assert boxes.cameras == ("front",)
    assert boxes.box.dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(st.floats(-11.9, 11.9), st.floats(-7.9, 7.9), st.floats(-3.1, 3.1), st.floats(0.2, 15))
def test_any_box_survives_encoding(x: float, y: float, yaw: float, length: float) -> None:
    truth = (x, y, 0.3, length, 2.0, 1.5, yaw, 1.0, -1.0)
    boxes = decode_boxes(*maps(("truck", 0.5, truth)), BEV)
    np.testing.assert_allclose(boxes.box, [truth], atol=1e-4)


def test_threshold_count_and_local_maxima() -> None:
    heatmap, box = maps(("car", 0.9, CAR), ("car", 0.15, WALKER))
    assert len(decode_boxes(heatmap, box, BEV, BoxDecoding(threshold=0.2))) == 1
    assert len(decode_boxes(heatmap, box, BEV, BoxDecoding(max_boxes=1))) == 1
    assert len(decode_boxes(heatmap, box, BEV, BoxDecoding(max_boxes=0))) == 0
    row, column = np.argwhere(heatmap[0] > 0)[0]
    heatmap[0, row, column + 1] = heatmap[0, row, column] - 0.1  # a shoulder is no peak
    assert len(decode_boxes(heatmap, box, BEV, BoxDecoding(nms="none"))) == 2


def test_cells_within_reach_have_a_say_by_their_squared_probability() -> None:
    heatmap, box = maps(("car", 0.8, CAR))
    row, column = np.argwhere(heatmap[0] > 0)[0]
    heatmap[0, row, column + 1] = 0.0  # a probability of 0.5
    box[:, row, column + 1] = box[:, row, column]  # seen from there one cell further on along x
    share = 0.5**2 / (0.5**2 + 0.8**2)
    alone, together = (decode_boxes(heatmap, box, BEV, reach=reach).box[0] for reach in (0, 1))
    np.testing.assert_allclose(alone, CAR, atol=1e-5)
    np.testing.assert_allclose(together[0] - CAR[0], share * BEV.pitch[0], atol=1e-3)
    np.testing.assert_allclose(together[1:], CAR[1:], atol=1e-3)


def test_a_peak_in_the_corner_has_fewer_cells_around_it() -> None:
    corner = (BEV.lo[0] + 0.1, BEV.lo[1] + 0.1, *CAR[2:])
    found = decode_boxes(*maps(("car", 0.9, corner)), BEV, reach=2)
    np.testing.assert_allclose(found.box, [corner], atol=1e-2)


def test_nothing_over_the_threshold_is_an_empty_result() -> None:
    boxes = decode_boxes(*maps(), BEV)
    assert len(boxes) == 0
    assert boxes.box.shape == (0, 9)


def boxes_at(*rows: tuple[float, ...], label: int = 0) -> Boxes3D:
    box = np.array([[*row, 0, 0] for row in rows], np.float32)
    return Boxes3D(box, np.full(len(box), label), np.linspace(1, 0.5, len(box), dtype=np.float32))


def test_circle_nms_keeps_the_best_of_each_class() -> None:
    radius = np.array([NMS_RADIUS[name] for name in DETECTION_CLASSES])
    row = (1, 1, 1, 4, 2, 1.5, 0)
    near, chain, far = (
        (1.5, 2, 1, 4, 2, 1.5, 0),
        (2.2, 2.9, 1, 4, 2, 1.5, 0),
        (9, 9, 1, 4, 2, 1.5, 0),
    )
    np.testing.assert_array_equal(circle_nms(boxes_at(row, near, chain, far), radius), [True, False, True, True])
    mixed = Boxes3D(boxes_at(row, near).box, np.array([0, 8]), np.array([0.9, 0.8], np.float32))
    assert circle_nms(mixed, radius).all()


def test_rotated_nms_and_overlap() -> None:
    a, half = (20, 30, 1, 4, 2, 1.5, 0.7), (20, 30, 1, 2, 2, 1.5, 0.7)
    assert bev_overlap(boxes_at(a).box[0], boxes_at(a).box[0]) == pytest.approx(1, abs=1e-4)
    assert bev_overlap(boxes_at(a).box[0], boxes_at(half).box[0]) == pytest.approx(0.5, abs=1e-4)
    square, turned = (-5, 2, 0, 2, 2, 1, 0), (-5, 2, 0, 2, 2, 1, np.pi / 4)
    octagon = 8 * (np.sqrt(2) - 1)  # the area that a square of side 2 shares with itself turned by 45 degrees
    assert bev_overlap(boxes_at(square).box[0], boxes_at(turned).box[0]) == pytest.approx(
        octagon / (8 - octagon), rel=1e-4
    )
    assert bev_overlap(boxes_at(a).box[0], boxes_at(square).box[0]) == 0
    kept = rotated_nms(boxes_at(a, half, square), 0.2)
    np.testing.assert_array_equal(kept, [True, False, True])


def test_wrong_maps_are_refused() -> None:
    heatmap, box = maps()
    with pytest.raises(OutputError, match="want"):
        decode_boxes(heatmap, box[:8], BEV)
    with pytest.raises(OutputError, match="want"):
        decode_boxes(heatmap.swapaxes(1, 2), box, BEV)
    heatmap[3, 4, 5] = np.nan
    with pytest.raises(OutputError, match="not finite"):
        decode_boxes(heatmap, box, BEV)
    with pytest.raises(ValueError, match="threshold"):
        BoxDecoding(threshold=0)
    with pytest.raises(ValueError, match="nms"):
        BoxDecoding(nms="soft")


def occupancy_logits(seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(len(OCCUPANCY_CLASSES), *GRID.shape[::-1]))
    logits[FREE] += 2
    return logits.astype(np.float32)


@pytest.mark.parametrize("chunk", [7, 100, 40_000])
def test_occupancy_is_arg_max_and_softmax(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "CHUNK", chunk)
    logits = occupancy_logits()
    probability = np.exp(logits) / np.exp(logits).sum(0)
    with ThreadPoolExecutor(2) as pool:
        occupancy = decode_occupancy(logits, GRID, ("front",), pool=pool)
    np.testing.assert_array_equal(volume_from_xyz(occupancy.label), logits.argmax(0))
    np.testing.assert_allclose(volume_from_xyz(occupancy.confidence), probability.max(0), rtol=1e-5)
    np.testing.assert_array_equal(occupancy.state, np.where(occupancy.label == FREE, 1, 2))
    assert occupancy.label.shape == GRID.shape
    assert (occupancy.label.dtype, occupancy.state.dtype) == (np.uint8, np.uint8)


def test_ties_go_to_the_first_class() -> None:
    assert (decode_occupancy(np.zeros_like(occupancy_logits()), GRID).label == 0).all()


def test_a_voxel_is_free_only_with_the_least_probability() -> None:
    """With min_free 0.5 a voxel is occupied as soon as its other classes together are likelier than free."""
    logits = occupancy_logits()
    share = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
    free = share[-1] >= 0.5
    want = np.where(free, len(logits) - 1, logits[:-1].argmax(0))
    occupancy = decode_occupancy(logits, GRID, min_free=0.5)
    np.testing.assert_array_equal(volume_from_xyz(occupancy.label), want)
    assert ((logits.argmax(0) == len(logits) - 1) & ~free).any()  # the case is there
    np.testing.assert_allclose(
        volume_from_xyz(occupancy.confidence),
        np.take_along_axis(share, want[None], 0)[0],
        rtol=1e-5,
    )


def test_unobserved_voxels_have_no_confidence() -> None:
    observed = np.random.default_rng(1).random(GRID.shape) < 0.5
    occupancy = decode_occupancy(occupancy_logits(), GRID, (), observed)
    np.testing.assert_array_equal(occupancy.state == 0, ~observed)
    assert not occupancy.confidence[~observed].any()
    assert (occupancy.confidence[observed] > 0).all()


def factored(split: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Logits whose kinds are those of whole cells, and their factors as a graph gives them."""
    random, (x, y, z) = np.random.default_rng(0), GRID.shape
    cells = (z, y // split, x // split)
    occupied = 2 * random.standard_normal((split, split, *cells))
    kinds = 2 * random.standard_normal((FREE, *cells))
    kinds -= np.log(np.exp(kinds).sum(0))
    voxels = occupied.transpose(2, 3, 0, 4, 1).reshape(z, y, x)
    logits = voxels + kinds.repeat(split, 2).repeat(split, 3)
    logits = np.concatenate([logits, np.zeros((1, z, y, x))]).astype(np.float32)
    share = 1 / (1 + np.exp(-occupied))
    kind = kinds.argmax(0).astype(np.uint8)
    return logits, (share.astype(np.float32), kind, np.exp(kinds.max(0)).astype(np.float32))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("min_free", [0.0, 0.5, 2.0])
def test_factors_decode_as_their_logits_do(split: int, min_free: float) -> None:
    logits, factors = factored(split)
    observed = np.random.default_rng(1).random(GRID.shape) < 0.5
    want = decode_occupancy(logits, GRID, ("front",), observed, min_free)
    got = decode_factors(Factors(*factors, FREE, min_free), GRID, ("front",), observed)
    np.testing.assert_array_equal(got.label, want.label)
    np.testing.assert_array_equal(got.state, want.state)
    np.testing.assert_allclose(got.confidence, want.confidence, rtol=1e-5)
    assert len(set(np.unique(got.label))) > (1 if min_free < 2 else 0)
    assert got.cameras == want.cameras
    assert got.label.strides == want.label.strides
    x, y, z = np.indices(GRID.shape).reshape(3, -1)
    for occupancy in (got, want):
        label, confidence = occupancy.look_up(z, y * GRID.shape[0] + x)
        np.testing.assert_array_equal(label, want.label.reshape(-1))
        known = want.state.reshape(-1) > 0
        np.testing.assert_allclose(confidence[known], want.confidence.reshape(-1)[known], rtol=1e-5)


@pytest.mark.parametrize("min_free", [0.0, 0.3, 0.5, 0.7, 2.0])
def test_the_largest_probability_of_a_free_voxel_is_exact(min_free: float) -> None:
    most, least = Factors(*factored(1)[1], FREE, min_free).most_occupied, np.float32(min_free)
    assert np.float32(1) - most >= least
    assert np.float32(1) - np.nextafter(most, np.float32(2)) < least


def test_what_was_decided_outlasts_the_buffers_of_a_runtime() -> None:
    _, arrays = factored(2)
    wanted, got = (decode_factors(Factors(*arrays, FREE, 0.5), GRID, ground=(11,)) for _ in range(2))
    want = wanted.label.copy(), wanted.confidence.copy(), wanted.evidence.obstacle.copy()
    for array in arrays:
        array[:] = 1
    for one, other in zip((got.label, got.confidence, got.evidence.obstacle), want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_broken_factors_are_refused() -> None:
    _, (occupied, kind, share) = factored(2)
    for wrong in (
        (occupied.swapaxes(2, 4), kind, share),
        (occupied, kind[1:], share),
        (occupied, kind, share[:, 1:]),
    ):
        with pytest.raises(OutputError, match="do not fit"):
            decode_factors(Factors(*wrong, FREE, 0.5), GRID)
    for position in (0, 2):
        broken = [occupied.copy(), kind, share.copy()]
        broken[position].flat[3] = np.nan
        with pytest.raises(OutputError, match="not finite"):
            decode_factors(Factors(*broken, FREE, 0.5), GRID)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_occupancy_is_refused(value: float) -> None:
    logits = occupancy_logits()
    logits[4, 1, 2, 3] = value
    with pytest.raises(OutputError, match="not finite"):
        decode_occupancy(logits, GRID)
    with pytest.raises(OutputError, match="do not fit"):
        decode_occupancy(occupancy_logits().swapaxes(1, 3), GRID)


def test_voxels_in_view_are_those_that_project_into_the_image() -> None:
    cameras = [
        Camera(
            f"c{yaw}",
            64,
            32,
            [[40, 0, 32], [0, 40, 10], [0, 0, 1]],
            make_transform(rotation_from_yaw(yaw) @ FORWARD, [0.13, 0.2, 0.7]),
        )
        for yaw in (0.1, 2.0)
    ]
    seen = voxels_in_view(CameraRig(tuple(cameras)), GRID)
    expected = [camera.project(GRID.centres().reshape(-1, 3))[2].reshape(GRID.shape) for camera in cameras]
    np.testing.assert_array_equal(seen, expected)
    assert 0.02 < seen.mean() < 0.5
