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

from occbev.classes import FREE, UNOBSERVED_STATE
from occbev.config import ImageConfig, LiftConfig
from occbev.geometry import invert_transform, project_points, transform_points
from occbev.grid import GRIDS, BevGrid, VoxelGrid
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.preprocess import Preprocessor
from occbev_training.data.augment import (
    NO_AUGMENTATION,
    AugmentConfig,
    Draw,
    augment_pixels,
    augment_voxels,
    draw_augmentation,
    live_bits,
)
from occbev_training.data.cache import CachedSample, CacheError, SampleCache, open_cache, read_sample, write_sample
from occbev_training.data.datasets import (
    NO_DEPTH,
    PositionBatches,
    SampleDataset,
    augmented,
    batches,
    sample_of,
)
from occbev_training.data.reference_inputs import depth_to_bin
from occbev_training.data.samples import open_samples
from occbev_training.data.shards import LabelVolumes
from occbev_training.data.targets import voxel_targets
from occbev_training.occupancy.prepare import PrepareConfig, make_sample, prepare, resample_truth
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


@pytest.mark.parametrize(
    ("sweeps", "known"), [([100_000_000], True), ([1_000_000_000, 1_100_000_000], False), ([], False)]
)
def test_depth_comes_from_a_sweep_of_the_key_time_alone(
    request: pytest.FixtureRequest, sweeps: list[int], known: bool
) -> None:
    recording = _recording_class(request)(name="a", keys=3, seed=1)
    recording.sweep_stamp_ns = recording.key_stamp_ns[0] + np.array(sweeps, np.int64)
    nothing = np.zeros(MODEL.grid.shape, np.uint8)
    unlabelled = LabelVolumes(nothing, nothing, nothing, nothing, MODEL.grid.hash)
    frames, preprocessor = recording.frame_set(0), Preprocessor(MODEL.image)
    sample, _ = make_sample(recording, 0, PREPARE, preprocessor, lambda *_: unlabelled, frames)
    assert (len(sample.lidar_depth) > 0) == known


def test_loading_takes_no_random_number_from_dropout(cache: SampleCache) -> None:
    """Else a run that is resumed, which opens its loader again, would draw other numbers than one that never stopped."""
    import torch

    before = torch.get_rng_state()
    iter(batches(SampleDataset(cache, MODEL, NO_AUGMENTATION, 0), 1, 0))
    assert torch.equal(torch.get_rng_state(), before)


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


def test_a_long_drive_stays_in_the_order_of_time(cache: SampleCache, tmp_path: Path) -> None:
    record = json.loads((cache.root / "a" / "drive.json").read_text())
    files = {f"{key:04d}.sample": "" for key in range(9_998, 10_002)}
    moments = {"stamp_ns": [1, 2, 3, 4], "ego2global": [np.eye(4).tolist()] * 4, "signals": [None] * 4}
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "drive.json").write_text(json.dumps(record | moments | {"files": files}))
    long = open_cache(tmp_path)
    assert {long.name(index): long.moment(index).stamp_ns for index in range(4)} == {
        "long/9998": 1,
        "long/9999": 2,
        "long/10000": 3,
        "long/10001": 4,
    }


def test_writing_is_exact_and_repeatable(cache: SampleCache, tmp_path: Path) -> None:
    first = write_sample(tmp_path / "x.sample", cache[2])
    again = read_sample(tmp_path / "x.sample")
    for field in fields(CachedSample):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(cache[2], field.name))
    assert write_sample(tmp_path / "y.sample", again) == first


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
    write_sample(tmp_path / "half" / "0000.sample", cache[0])
    with pytest.raises(CacheError, match="no finished drive"):
        open_cache(tmp_path)


def test_a_folder_without_samples_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no pairs .* and no sample cache .*'occbev-train pairs' or 'prepare'"):
        open_samples(tmp_path, MODEL, "pretrain", "train")
    with pytest.raises(CacheError, match="no sample cache .*'occbev-train prepare' makes one"):
        open_samples(tmp_path, MODEL, "finetune", "train")


def test_caches_that_do_not_fit_are_refused(cache: SampleCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"64x32.*takes 96x32"):
        SampleDataset(cache, replace(MODEL, image=ImageConfig(width=96, height=32)), NO_AUGMENTATION, 0)
    with pytest.raises(CacheError, match=r"labels are on 40x40x8 .* predicts 200x200x16 .*make them on its grid"):
        SampleDataset(cache, replace(MODEL, grid=GRIDS["occ3d"]), NO_AUGMENTATION, 0)
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


def labelled(shape: tuple[int, int, int], cameras: int, seed: int) -> CachedSample:
    """A sample of random voxels and returns, all combinations of them; everything else is empty."""
    rng = np.random.default_rng(seed)
    returns = 500
    return CachedSample(
        images=np.zeros((cameras, 32, 64, 3), np.uint8),
        camera_valid=np.ones(cameras, bool),
        intrinsic=np.tile(np.array([[40.0, 0, 32], [0, 44, 16], [0, 0, 1]]), (cameras, 1, 1)),
        cam2ego=np.tile(np.eye(4), (cameras, 1, 1)),
        lidar_camera=rng.integers(0, cameras, returns).astype(np.uint8),
        lidar_pixel=rng.uniform((-5, -5), (69, 37), (returns, 2)).astype(np.float32),
        lidar_depth=rng.uniform(0.5, 60, returns).astype(np.float32),
        state=rng.integers(0, 3, shape).astype(np.uint8),
        camera_visible=(rng.integers(0, 1 << cameras, shape) * (rng.random(shape) < 0.7)).astype(np.uint8),
        hit_sweeps=rng.integers(0, 256, shape).astype(np.uint8),
        pass_sweeps=rng.integers(0, 256, shape).astype(np.uint8),
        boxes=np.zeros((0, 9), np.float32),
        labels=np.zeros(0, np.int64),
        lidar_points=np.zeros(0, np.int64),
        semantics=rng.integers(0, 18, shape).astype(np.uint8),
        mask_camera=rng.random(shape) < 0.6,
    )


@pytest.mark.parametrize("seed", range(6))
def test_compiled_targets_are_those_of_plain_numpy_to_the_bit(seed: int) -> None:
    """The same targets written down array by array: flips, turns and scales, with a camera that is missing."""
    grid, cameras = MODEL.grid, 5
    augment = AugmentConfig(camera_drop=1.0, bev_rotate=40.0 * (seed % 2), bev_scale=(0.9, 1.1) if seed > 3 else (1, 1))
    raw, draw = labelled(grid.shape, cameras, seed), draw_augmentation(seed, cameras, (64, 32), augment)
    got = augmented("x", raw, draw, MODEL)

    bits = augment_voxels(raw.camera_visible, draw, grid)
    visible = (bits & live_bits(draw.alive)) != 0
    mask = augment_voxels(raw.mask_camera, draw, grid) & ~((bits != 0) & ~visible)
    evidence = np.minimum(raw.hit_sweeps.astype(int) + raw.pass_sweeps, 255).astype(np.uint8)
    np.testing.assert_array_equal(got.visible, visible)
    np.testing.assert_array_equal(got.semantics_mask, mask)
    np.testing.assert_array_equal(got.state, augment_voxels(raw.state, draw, grid, UNOBSERVED_STATE))
    np.testing.assert_array_equal(got.evidence, augment_voxels(evidence, draw, grid))
    np.testing.assert_array_equal(got.semantics, augment_voxels(raw.semantics, draw, grid, FREE))
    assert 0 < np.count_nonzero(visible) < np.count_nonzero(bits)

    pixel = augment_pixels(raw.lidar_camera, raw.lidar_pixel, draw)
    inside = np.all((pixel >= 0) & (pixel < (64, 32)), axis=-1) & draw.alive[raw.lidar_camera]
    column, row = (pixel[inside] // 16).astype(int).T
    nearest = np.full((cameras, 2, 4), np.inf, np.float32)
    np.minimum.at(nearest, (raw.lidar_camera[inside], row, column), raw.lidar_depth[inside])
    np.testing.assert_array_equal(got.depth_bin, depth_to_bin(nearest, MODEL.lift.depth))
    assert (got.depth_bin != NO_DEPTH).any()


def test_supervised_voxels_are_about_as_many_as_asked_and_others_each_time() -> None:
    shape = (100, 100, 16)
    grid = VoxelGrid((-20.0, -20.0, -1.0), (0.4, 0.4, 0.4), shape)
    raw, alive = labelled(shape, 3, 0), np.ones(3, bool)
    whole = voxel_targets(raw, still(0), alive, grid, 10**6).semantics_mask
    first, second = (voxel_targets(raw, still(seed), alive, grid, 5000).semantics_mask for seed in (1, 2))
    for kept in (first, second):
        assert 4700 < np.count_nonzero(kept) < 5300
        assert not (kept & ~whole).any()
        columns = np.count_nonzero(kept.reshape(10, -1), axis=1)  # everywhere alike
        assert columns.min() > 350
    both, count = np.count_nonzero(first & second), np.count_nonzero(whole)
    assert both == pytest.approx(5000**2 / count, rel=0.25)  # as of two draws that know nothing of each other
    np.testing.assert_array_equal(voxel_targets(raw, still(1), alive, grid, 5000).semantics_mask, first)


def still(seed: int) -> Draw:
    return draw_augmentation(seed, 3, (64, 32), NO_AUGMENTATION)


def test_a_cache_of_an_earlier_version_is_read(cache: SampleCache, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "0000.npz", **vars(cache[1]))
    again = read_sample(tmp_path / "0000.npz")
    for field in fields(CachedSample):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(cache[1], field.name))


def test_a_damaged_sample_is_named(cache: SampleCache, tmp_path: Path) -> None:
    path = tmp_path / "0001.sample"
    write_sample(path, cache[0])
    whole = path.read_bytes()
    for damaged in (whole[:40], whole[:-9], b"", whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match=r"0001\.sample: not a whole sample"):
            read_sample(path)
    packed = whole.index(b"\x04\x22\x4d\x18")  # where a frame of LZ4 begins
    path.write_bytes(whole[:packed] + bytes(12) + whole[packed + 12 :])
    with pytest.raises(CacheError, match=r"0001\.sample"):
        read_sample(path)


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
    turned = replace(draw, bev_angle=np.pi / 4)
    beyond = augment_voxels(np.ones(MODEL.grid.shape, bool), turned, MODEL.grid) == 0
    assert beyond.any()
    asked = augmented("x", raw, turned, MODEL, unseen_voxels=10_000).semantics_mask
    assert not asked[beyond].any(), "nobody knows what stands beyond the grid"
