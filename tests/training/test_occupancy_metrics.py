"""Occupancy scores: by hand, against golden arrays, and ray casting against a brute-force march."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from occbev.geometry import make_transform, rotation_from_yaw
from occbev.grid import GRIDS, VoxelGrid
from occbev_training.metrics import occupancy
from occbev_training.metrics.occupancy import (
    binary_counts,
    binary_iou,
    cast_rays,
    class_ious,
    confusion,
    grouped_counts,
    mean_iou,
    range_rings,
    ray_counts,
    ray_directions,
    ray_origins,
    ray_scores,
    ring_names,
    score_occupied_iou,
)

GOLDEN = Path(__file__).parents[1] / "golden"

SMALL = VoxelGrid((-4.0, -4.0, -1.0), (0.5, 0.5, 0.5), (16, 16, 8))


@pytest.fixture(params=["compiled", "arrays"])
def either_walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the compiled walk and with the one that needs numpy alone."""
    if request.param == "arrays":
        monkeypatch.setattr(occupancy, "_caster", lambda: occupancy._cast_arrays)
    else:
        pytest.importorskip("numba")


def test_confusion_by_hand() -> None:
    truth = np.array([0, 1, 1, 2, 255, 2], np.uint8)
    guess = np.array([0, 1, 2, 2, 1, 0], np.uint8)
    counts = confusion(truth, guess, classes=3)
    assert counts.tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 1]]
    np.testing.assert_allclose(class_ious(counts), [1 / 2, 1 / 2, 1 / 3])
    assert mean_iou(counts, free=2) == pytest.approx(0.5)
    assert score_occupied_iou(counts, free=2) == pytest.approx(2 / 4)
    masked = confusion(truth, guess, np.array([1, 1, 0, 0, 1, 0], bool), 3)
    assert masked.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_absent_classes_are_left_out_of_the_mean() -> None:
    counts = np.zeros((18, 18))
    counts[4, 4], counts[4, 17], counts[17, 17] = 3, 1, 9
    assert mean_iou(counts) == pytest.approx(0.75)
    assert math.isnan(mean_iou(np.zeros((18, 18))))


def test_wrong_shapes_and_classes_are_errors() -> None:
    with pytest.raises(ValueError, match="one shape"):
        confusion(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="predicted class 18"):
        confusion(np.zeros(2, np.uint8), np.full(2, 18, np.uint8))
    with pytest.raises(ValueError, match="shape"):
        cast_rays(np.zeros((4, 4, 4), np.uint8), [[0, 0, 0]], SMALL)
    with pytest.raises(ValueError, match="cubic"):
        cast_rays(np.zeros((4, 4, 4), np.uint8), [[0, 0, 0]], VoxelGrid((0, 0, 0), (1, 1, 2), (4, 4, 4)))


def test_binary_iou_by_hand() -> None:
    truth = np.array([1, 1, 0, 0, 1], bool)
    guess = np.array([1, 0, 1, 0, 1], bool)
    assert binary_counts(truth, guess).tolist() == [2, 1, 1]
    assert binary_iou(binary_counts(truth, guess)) == pytest.approx(0.5)
    mask = np.array([1, 0, 0, 1, 0], bool)
    assert binary_iou(binary_counts(truth, guess, mask)) == 1.0
    assert math.isnan(binary_iou([0, 0, 0]))


@pytest.mark.parametrize("mask", ["camera", "lidar", "none"])
def test_golden_miou(mask: str) -> None:
    with np.load(GOLDEN / "occ3d_miou.npz", allow_pickle=False) as golden:
        counts = sum(
            confusion(
                golden["gt"][i],
                golden["pred"][i],
                None if mask == "none" else golden[f"mask_{mask}"][i],
            )
            for i in range(3)
        )
        np.testing.assert_array_equal(counts, golden[f"hist_{mask}"])
        np.testing.assert_array_equal(class_ious(counts), golden[f"iou_{mask}"])
        assert 100 * mean_iou(counts) == golden[f"miou_{mask}"]


def test_golden_rays(either_walk: None) -> None:
    with np.load(GOLDEN / "rayiou.npz", allow_pickle=False) as golden:
        np.testing.assert_array_equal(ray_directions(), golden["rays"])
        for sample in range(2):
            origins = golden[f"origins{sample}"][0]
            for name, volume in (("pred", golden["pred"][sample]), ("gt", golden["gt"][sample])):
                rays = golden["rays"][::20]  # the golden file holds every fourth
                label, distance = cast_rays(volume, origins, GRIDS["occ3d"], rays=rays)
                expected = golden[f"pcd_{name}{sample}"].reshape(len(origins), -1, 2)[:, ::5]
                np.testing.assert_array_equal(label, expected[..., 0].reshape(-1))
                away = np.abs(distance - expected[..., 1].reshape(-1))
                assert np.mean(away < 1e-3) >= 0.998


def test_golden_scores_of_all_rays() -> None:
    pytest.importorskip("numba")
    with np.load(GOLDEN / "rayiou.npz", allow_pickle=False) as golden:
        each = [
            ray_counts(golden["gt"][i], golden["pred"][i], golden[f"origins{i}"][0], GRIDS["occ3d"]) for i in range(2)
        ]
        scores = ray_scores(sum(each))
        np.testing.assert_allclose(scores.class_iou, golden["iou_per_class"], atol=1e-3)
        assert scores.ray_iou == pytest.approx(float(golden["RayIoU"]), abs=1e-3)
        for threshold, score in scores.by_threshold.items():
            assert score == pytest.approx(float(golden[f"RayIoU@{threshold:.0f}"]), abs=1e-3)


def test_a_wall_is_met_where_it_stands(either_walk: None) -> None:
    labels = np.full(SMALL.shape, 17, np.uint8)
    labels[12] = 15  # x in [2, 2.5)
    rays = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0.8, 0.6, 0]], np.float32)
    label, distance = cast_rays(labels, [[0.1, 0.1, 0.1]], SMALL, rays=rays)
    assert label.tolist() == [15, 17, 17, 15]
    np.testing.assert_allclose(distance, [2.4, 4.1, 3.9, 2.4 / 0.8], atol=1e-5)


def test_a_ray_from_outside_enters_or_misses(either_walk: None) -> None:
    labels = np.full(SMALL.shape, 17, np.uint8)
    labels[8, 8, 2] = 4  # x, y in [0, 0.5), z in [0, 0.5)
    rays = np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0]], np.float32)
    label, distance = cast_rays(labels, [[-9.0, 0.2, 0.2]], SMALL, rays=rays)
    assert label.tolist() == [4, 17, 17]
    assert distance[0] == pytest.approx(9.5, abs=1e-5)
    assert distance[2] == 0


def test_rays_equal_a_fine_march(either_walk: None) -> None:
    """Every ray against small steps through the volume: same label, same place within the step."""
    generator = np.random.default_rng(3)
    labels = np.where(generator.random(SMALL.shape) < 0.03, generator.integers(0, 17, SMALL.shape), 17)
    labels = labels.astype(np.uint8)
    rays = generator.normal(size=(150, 3))
    rays = (rays / np.linalg.norm(rays, axis=1, keepdims=True)).astype(np.float32)
    origins = generator.uniform((-3, -3, -0.5), (3, 3, 2), (4, 3)).astype(np.float32)
    label, distance = cast_rays(labels, origins, SMALL, rays=rays)
    along = np.arange(0, 14, 0.002)
    wrong = 0
    for o, origin in enumerate(origins):
        for r, ray in enumerate(rays):
            cells, inside = SMALL.indices(origin + along[:, None] * ray)
            seen = np.where(inside, labels[tuple(cells.T)], 17)
            first = int(np.argmax(seen != 17)) if (seen != 17).any() else None
            got = o * len(rays) + r
            if first is None:
                wrong += label[got] != 17
                continue
            same = np.all(cells == cells[first], axis=1) & inside
            leaves = along[same].max()
            wrong += label[got] != seen[first] or abs(distance[got] - leaves) > 0.01
    assert wrong <= 6  # of 600: steps may jump over a corner


def test_a_perfect_guess_scores_one() -> None:
    labels = np.random.default_rng(2).integers(0, 18, SMALL.shape).astype(np.uint8)
    assert ray_scores(ray_counts(labels, labels, [[0, 0, 1.0]], SMALL)).ray_iou == 1.0


def test_origins_are_near_and_at_most_eight() -> None:
    lidar = np.stack([make_transform(rotation_from_yaw(0.3), (4.0 * k, 1.0, 1.8)) for k in range(40)])
    ego = make_transform(np.eye(3), (80.0, 0.0, 0.0))
    origins = ray_origins(lidar, 20, ego)
    assert origins.shape == (8, 3)
    assert origins.dtype == np.float32
    assert np.abs(origins[:, :2]).max() < 39
    np.testing.assert_allclose(origins[[0, -1], 0], [-36, 36])
    assert len(ray_origins(lidar[18:23], 2, ego)) == 5


def test_rays_of_the_preset() -> None:
    rays = ray_directions()
    assert rays.shape == (39 * 360, 3)
    np.testing.assert_allclose(np.linalg.norm(rays, axis=1), 1, atol=1e-6)
    elevation = np.rad2deg(np.arcsin(rays[::360, 2]))
    assert elevation[0] == pytest.approx(-45, abs=1e-4)
    assert elevation[-1] == pytest.approx(12.5, abs=0.2)
    assert GRIDS["occ3d"].shape == (200, 200, 16)


def test_golden_rays_of_all_directions() -> None:
    """Every fourth ray, which is all that the golden file holds, out of a walk of all of them."""
    pytest.importorskip("numba")
    with np.load(GOLDEN / "rayiou.npz", allow_pickle=False) as golden:
        for sample in range(2):
            origins = golden[f"origins{sample}"][0]
            for name, volume in (("pred", golden["pred"][sample]), ("gt", golden["gt"][sample])):
                label, distance = (a[::4] for a in cast_rays(volume, origins, GRIDS["occ3d"]))
                expected = golden[f"pcd_{name}{sample}"].reshape(-1, 2)
                np.testing.assert_array_equal(label, expected[:, 0])
                assert np.mean(np.abs(distance - expected[:, 1]) < 1e-3) >= 0.998


def test_many_volumes_are_walked_as_each_alone() -> None:
    """Codes hold seven volumes at a time."""
    generator = np.random.default_rng(4)
    labels = np.where(generator.random((9, *SMALL.shape)) < 0.05, 4, 17).astype(np.uint8)
    rays, origins = ray_directions()[::97], [[0.1, 0.2, 0.3], [-9.0, 0.0, 0.5]]
    label, distance = cast_rays(labels, origins, SMALL, rays=rays)
    for number, volume in enumerate(labels):
        alone = cast_rays(volume, origins, SMALL, rays=rays)
        np.testing.assert_array_equal(label[number], alone[0])
        np.testing.assert_array_equal(distance[number], alone[1])


def test_rings_partition_the_visible_voxels() -> None:
    generator = np.random.default_rng(7)
    truth, guess = (generator.random(SMALL.shape) < 0.4 for _ in range(2))
    mask = generator.random(SMALL.shape) < 0.7
    rings = range_rings(SMALL)
    counts = grouped_counts(truth, guess, rings, len(ring_names()), mask)
    np.testing.assert_array_equal(counts.sum(0), binary_counts(truth, guess, mask))
    assert counts[1:].sum() == 0  # a grid of +-4 m lies in the first ring
    far = range_rings(GRIDS["occ3d"])
    assert far[100, 100] == 0
    assert far[0, 0] == 4
    assert far[199, 100] == 3  # 39.8 m ahead
    assert ring_names() == ("0-10 m", "10-20 m", "20-30 m", "30-40 m", "over 40 m")
    by_layer = np.broadcast_to(np.arange(SMALL.shape[2], dtype=np.uint8), SMALL.shape)
    layers = grouped_counts(truth, guess, by_layer, 5, mask)
    for layer in range(5):
        expected = binary_counts(truth[..., layer], guess[..., layer], mask[..., layer])
        np.testing.assert_array_equal(layers[layer], expected)
