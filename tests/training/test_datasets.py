"""Key frames become cached samples, and those batches: complete, repeatable, right when a camera is gone."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

from occbev.config import ImageConfig, LiftConfig
from occbev.geometry import invert_transform, project_points, transform_points
from occbev.grid import GRIDS, BevGrid, VoxelGrid
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev_training.data.augment import NO_AUGMENTATION, AugmentConfig, draw_augmentation
from occbev_training.data.cache import CachedSample, CacheError, SampleCache, open_cache, read_sample, write_sample
from occbev_training.data.datasets import (
    NO_DEPTH,
    PositionBatches,
    SampleDataset,
    augmented,
    batches,
    sample_of,
    thinned,
)
from occbev_training.occupancy.prepare import PrepareConfig, prepare, resample_truth
from occbev_training.sources.recording import OccupancyTruth

MODEL = LiftSplatModel(
    image=ImageConfig(width=64, height=32),
    lift=LiftConfig(channels=8, max_points=4096),
    bev=BevGrid((-16.0, -16.0), (1.6, 1.6), (20, 20)),
    grid=GRIDS["tiny"],
)
PREPARE = PrepareConfig(MODEL.image, MODEL.grid, 0.3)


def tiny_truth(key: int) -> OccupancyTruth:
    """Random classes on the tiny grid, seen everywhere but in one corner."""
    rng = np.random.default_rng(key)
    semantics = rng.choice([17, 11, 4], GRIDS["tiny"].shape, p=[0.8, 0.15, 0.05]).astype(np.uint8)
    mask = np.ones(GRIDS["tiny"].shape, bool)
    mask[:5, :5] = False
    return OccupancyTruth(semantics, mask, mask, GRIDS["tiny"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> SampleCache:
    """Two drives of three key frames."""
    root = tmp_path_factory.mktemp("cache")
    recording = _recording_class(request)
    jobs = {name: (lambda n=name: recording(name=n, keys=3, seed=len(n))) for name in ("a", "bb")}
    assert prepare(jobs, root, PREPARE) == 6
    return open_cache(root)


def _recording_class(request: pytest.FixtureRequest) -> type:
    """The tiny drive of conftest with dense truth on the tiny grid."""
    module = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "TinyRecording"))

    class Recording(module.TinyRecording):  # type: ignore[misc, name-defined]
        def occupancy_truth(self, key: int) -> OccupancyTruth:
            return tiny_truth(key)

    return Recording


def test_a_cache_opens_with_every_sample_and_reads_back_what_was_made(cache: SampleCache) -> None:
    assert cache.drives == ("a", "bb")
    assert len(cache) == 6
    assert cache.info.cameras == ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_BACK")
    sample = cache[4]
    assert sample.images.shape == (3, 32, 64, 3)
    assert sample.images.std() > 10
    np.testing.assert_array_equal(sample.semantics, tiny_truth(1).semantics)
    assert sample.boxes.shape == (2, 9)
    assert set(np.unique(sample.state)) <= {0, 1, 2}
    assert (sample.state == 2).any()
    assert (sample.camera_visible[sample.state == 0] == 0).all()


def test_camera_poses_are_carried_from_their_own_capture_time(
    cache: SampleCache, request: pytest.FixtureRequest
) -> None:
    """A static point in global coordinates projects to one pixel by the cached pose and by the camera's own."""
    recording = _recording_class(request)(name="a", keys=3, seed=1)
    sample, frames = cache[1], recording.frame_set(1)
    ego2global = recording.trajectory.at(int(recording.key_stamp_ns[1]))
    for index, camera in enumerate(recording.rig.cameras):
        frame = frames.frames[camera.name]
        point = transform_points(frame.ego2global @ camera.cam2ego, np.array([[0.5, 0.2, 8.0]]))
        in_key = transform_points(invert_transform(ego2global), point)
        pixel, depth = project_points(
            transform_points(invert_transform(sample.cam2ego[index]), in_key), camera.intrinsic
        )
        want, _ = project_points(np.array([[0.5, 0.2, 8.0]]), camera.intrinsic)
        np.testing.assert_allclose(pixel, want, atol=1e-6)
        np.testing.assert_allclose(depth, 8.0, atol=1e-9)


def test_lidar_pixels_come_back_to_the_returns(cache: SampleCache) -> None:
    """Lifting the stored pixels to their depth gives points inside the LiDAR's reach in front of the camera."""
    sample = cache[0]
    assert len(sample.lidar_depth) > 20
    rays = np.concatenate([sample.lidar_pixel, np.ones((len(sample.lidar_pixel), 1))], 1)
    camera = sample.lidar_camera
    points = np.einsum("pij,pj->pi", np.linalg.inv(sample.intrinsic)[camera], rays) * sample.lidar_depth[:, None]
    ego = np.einsum("pij,pj->pi", sample.cam2ego[camera][:, :3, :3], points) + sample.cam2ego[camera][:, :3, 3]
    assert np.abs(ego[:, :2]).max() < 22  # the sweep holds points up to 15 m on each axis
    assert ((ego[:, 2] > -0.8) & (ego[:, 2] < 3.6)).all()


def test_writing_is_exact_and_repeatable(cache: SampleCache, tmp_path: Path) -> None:
    first = write_sample(tmp_path / "x.npz", cache[2])
    again = read_sample(tmp_path / "x.npz")
    for field in fields(CachedSample):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(cache[2], field.name))
    assert write_sample(tmp_path / "y.npz", again) == first


def test_finished_drives_are_kept_and_a_drive_without_its_record_is_not_there(
    cache: SampleCache, tmp_path: Path
) -> None:
    def never() -> None:
        raise AssertionError("a finished drive was opened again")

    jobs = {"a": never, "bb": never}
    assert prepare(jobs, cache.root, PREPARE) == 6  # type: ignore[arg-type]
    for other in (replace(PREPARE, near_hits=3), replace(PREPARE, grid=GRIDS["occ3d"])):
        with pytest.raises(CacheError, match="asked for is"):
            prepare(jobs, cache.root, other)  # type: ignore[arg-type]
    (tmp_path / "half").mkdir()
    write_sample(tmp_path / "half" / "0000.npz", cache[0])
    with pytest.raises(CacheError, match="no finished drive"):
        open_cache(tmp_path)


def test_caches_that_do_not_fit_are_refused(cache: SampleCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"64x32.*takes 96x32"):
        SampleDataset(cache, replace(MODEL, image=ImageConfig(width=96, height=32)), NO_AUGMENTATION, 0)
    off_centre = replace(cache, info=replace(cache.info, grid=VoxelGrid((0, -16, -1), (0.8, 0.8, 0.8), (40, 40, 8))))
    with pytest.raises(CacheError, match="not centred"):
        SampleDataset(off_centre, replace(MODEL, grid=off_centre.info.grid), NO_AUGMENTATION, 0)
    record = json.loads((cache.root / "a" / "drive.json").read_text())
    for name, width in (("a", 64), ("b", 96)):
        (tmp_path / name).mkdir()
        record["info"]["image"]["width"] = width
        (tmp_path / name / "drive.json").write_text(json.dumps(record))
    with pytest.raises(CacheError, match="drive b was made with"):
        open_cache(tmp_path)
    record["info"]["image"]["width"] = 64
    record["labels"]["near_hits"] += 1
    (tmp_path / "b" / "drive.json").write_text(json.dumps(record))
    assert len(open_cache(tmp_path)) == 6
    with pytest.raises(CacheError, match="labels of drive b"):
        open_cache(tmp_path, labelled=True)
    with pytest.raises(CacheError, match=r"\['zz'\] are not in this cache"):
        open_cache(cache.root, ["a", "zz"])
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CacheError, match=r"broken\.npz"):
        read_sample(broken)


def test_every_epoch_shows_every_sample_once_in_another_order() -> None:
    epochs = [[sample_of(p, 7, seed=3) for p in range(e * 7, e * 7 + 7)] for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_processes_share_the_positions_and_a_later_start_skips_what_was_done() -> None:
    def first(n: int, **kwargs: int) -> list[list[int]]:
        return list(itertools.islice(PositionBatches(2, **kwargs), n))

    assert first(3) == [[0, 1], [2, 3], [4, 5]]
    assert first(2, first=1) == [[2, 3], [4, 5]]
    ranks = [first(3, rank=r, world=2) for r in range(2)]
    assert sorted(itertools.chain(*ranks[0], *ranks[1])) == list(range(12))


def test_batches_are_the_same_from_workers_and_from_the_process_itself(cache: SampleCache) -> None:
    dataset = SampleDataset(cache, MODEL, AugmentConfig(), seed=5)
    here = list(itertools.islice(batches(dataset, 2, 0), 7))
    stream = iter(batches(dataset, 2, 1, first=1))
    there = [next(stream)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)  # Ctrl-C reaches it, too; it is the trainer's to answer
    there += itertools.islice(stream, 5)
    for mine, other in zip(here[1:], there, strict=True):
        assert mine.names == other.names
        for name in (
            "images",
            "camera_valid",
            "depth_bin",
            "state",
            "visible",
            "evidence",
            "semantics",
            "semantics_mask",
        ):
            assert (getattr(mine, name) == getattr(other, name)).all(), name
        assert (mine.geometry.pixel == other.geometry.pixel).all()
    assert here[0].images.shape == (2, 3, 3, 32, 64)
    assert here[0].state.shape == (2, 8, 40, 40)
    assert here[0].images.flatten(0, 1).is_contiguous(memory_format=_channels_last())


def _channels_last() -> object:
    import torch

    return torch.channels_last


def test_depth_labels_take_the_nearest_return_of_a_patch(cache: SampleCache) -> None:
    draw = draw_augmentation(0, 3, (64, 32), NO_AUGMENTATION)
    sample = replace(
        cache[0],
        lidar_camera=np.array([1, 1, 1, 2], np.uint8),
        lidar_pixel=np.array([[17.0, 2], [30, 15.9], [40, 2], [1, 31]], np.float32),
        lidar_depth=np.array([9.7, 7.2, 0.9, 50], np.float32),
    )
    bins = augmented("x", sample, draw, MODEL).depth_bin
    assert bins.shape == (3, 2, 4)
    assert bins[1, 0, 1] == 6  # [7, 8) m
    assert (np.delete(bins.ravel(), 8 + 1) == NO_DEPTH).all()  # 0.9 m and 50 m are outside the bins


def test_without_augmentation_everything_stays_where_it_was(cache: SampleCache) -> None:
    raw = cache[3]
    sample = augmented("x", raw, draw_augmentation(1, 3, (64, 32), NO_AUGMENTATION), MODEL)
    np.testing.assert_array_equal(sample.images, raw.images)
    np.testing.assert_array_equal(sample.semantics_mask, raw.mask_camera)
    np.testing.assert_array_equal(sample.visible, raw.camera_visible != 0)
    np.testing.assert_allclose(sample.cam2ego, raw.cam2ego)


def test_what_only_a_missing_camera_saw_is_not_asked_for(cache: SampleCache) -> None:
    raw = cache[0]
    bits = np.zeros_like(raw.camera_visible)
    bits[0], bits[1] = 0b001, 0b011  # x = 0: camera 0 alone, x = 1: cameras 0 and 1
    raw = replace(
        raw,
        camera_visible=bits,
        mask_camera=np.ones_like(raw.mask_camera),
        lidar_points=np.array([9, 9]),
        boxes=np.array([_box_before(raw, 0), _box_before(raw, 1)], np.float32),
    )
    draw = draw_augmentation(0, 3, (64, 32), NO_AUGMENTATION)
    alive = np.array([False, True, True])
    sample = augmented("x", raw, replace(draw, alive=alive), MODEL)
    assert not sample.visible[0].any()
    assert sample.visible[1].all()
    assert not sample.semantics_mask[0].any()
    assert sample.semantics_mask[1:].all()
    assert not sample.images[0].any()
    assert (sample.depth_bin[0] == NO_DEPTH).all()
    np.testing.assert_allclose(sample.boxes, raw.boxes[1:])


def _box_before(sample: CachedSample, camera: int) -> list[float]:
    """A small box four metres before a camera."""
    x, y, z = transform_points(sample.cam2ego[camera], np.array([[0, 0, 4.0]]))[0]
    return [x, y, z, 0.5, 0.5, 0.5, 0, 0, 0]


def test_boxes_without_a_return_are_not_asked_for(cache: SampleCache) -> None:
    raw = replace(
        cache[0],
        boxes=np.array([_box_before(cache[0], i) for i in range(2)], np.float32),
        lidar_points=np.array([0, 3]),
    )
    sample = augmented("x", raw, draw_augmentation(0, 3, (64, 32), NO_AUGMENTATION), MODEL)
    np.testing.assert_allclose(sample.boxes, raw.boxes[1:])


def test_dense_truth_comes_onto_another_grid() -> None:
    """Half the pitch repeats voxels; double the pitch keeps what is occupied and seen; outside nothing is known."""
    source = VoxelGrid((-2.0, -2.0, 0.0), (1.0, 1.0, 1.0), (4, 4, 2))
    semantics = np.full(source.shape, 17, np.uint8)
    semantics[1, 2, 0], semantics[0, 0, 1] = 4, 11
    mask = np.ones(source.shape, bool)
    mask[0, 0, 1] = mask[3] = False
    fine = VoxelGrid((-2.0, -2.0, 0.0), (0.5, 0.5, 0.5), (8, 8, 4))
    got, seen = resample_truth(semantics, mask, source, fine)
    wanted = np.where(mask, semantics, 17)
    np.testing.assert_array_equal(got, wanted.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    np.testing.assert_array_equal(seen, mask.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    coarse = VoxelGrid((-4.0, -4.0, 0.0), (2.0, 2.0, 2.0), (4, 4, 1))
    got, seen = resample_truth(semantics, mask, source, coarse)
    assert got[1, 2, 0] == 4
    assert (np.delete(got.ravel(), 6) == 17).all()  # the unseen road stays unknown
    assert seen[1:3, 1:3].all()
    assert not seen[[0, 3]].any()
    assert not seen[:, [0, 3]].any()


def test_thinning_keeps_about_as_many_as_asked_and_only_what_was_set() -> None:
    mask = np.random.default_rng(0).random((50, 50, 20)) < 0.5
    kept = thinned(mask, 5000, seed=1)
    assert 4600 < np.count_nonzero(kept) < 5400
    assert not (kept & ~mask).any()
    np.testing.assert_array_equal(thinned(mask, 10**6, seed=1), mask)


def test_voxels_that_no_camera_sees_are_learned_only_where_the_truth_is_dense(
    cache: SampleCache,
) -> None:
    seen = np.zeros(MODEL.grid.shape, bool)
    seen[:2] = True
    raw = replace(cache[0], mask_camera=seen)
    draw = draw_augmentation(0, 3, (64, 32), NO_AUGMENTATION)
    np.testing.assert_array_equal(augmented("x", raw, draw, MODEL).semantics_mask, seen)
    supervised = augmented("x", raw, draw, MODEL, unseen_voxels=200).semantics_mask
    assert supervised[seen].all()
    assert 100 < np.count_nonzero(supervised & ~seen) < 300
    blind = replace(raw, mask_camera=np.zeros_like(seen))
    assert not augmented("x", blind, draw, MODEL, unseen_voxels=200).semantics_mask.any()
