"""Past frames: which ones, that they lie where the key frame says, and how a BEVFormer came from one to the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch

from occbev.config import ConfigError, ImageConfig, LiftConfig
from occbev.ego_signals import EgoSignals
from occbev.geometry import invert_transform, transform_points
from occbev.grid import GRIDS, BevGrid
from occbev.inference.families.bevdet import BevDetConfig, BevDetModel
from occbev.inference.families.bevformer import BevFormerModel
from occbev.inference.families.lift_splat import LiftSplatModel, SplatModel
from occbev.results import FrameSet
from occbev_training.data.augment import NO_AUGMENTATION, AugmentConfig
from occbev_training.data.cache import CacheError, SampleCache, open_cache
from occbev_training.data.datasets import Collate, SampleDataset, batches
from occbev_training.data.samples import balanced_order
from occbev_training.data.windows import history_length, past_indices
from occbev_training.engine.config import TrainingConfig
from occbev_training.engine.stages import model_to_train
from occbev_training.losses.objectives import run_network
from occbev_training.models.build import build_model
from occbev_training.models.families import make_geometry, reduced, training_family
from occbev_training.occupancy.prepare import PrepareConfig, prepare

MODEL = LiftSplatModel(
    image=ImageConfig(width=64, height=32),
    lift=LiftConfig(channels=8, max_points=4096),
    bev=BevGrid((-16.0, -16.0), (1.6, 1.6), (20, 20)),
    grid=GRIDS["tiny"],
)
LIFT = BevDetModel(image=MODEL.image, lift=MODEL.lift, bev=MODEL.bev, grid=MODEL.grid, bevdet=BevDetConfig(frames=3))
FORMER = BevFormerModel(image=MODEL.image, bev=MODEL.bev, grid=MODEL.grid)


def said(key: int) -> EgoSignals:
    """What a vehicle says at a key frame: nine numbers that no pose tells."""
    return EgoSignals.of([10 * key + number for number in range(9)])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SampleCache:
    """Two drives of four key frames, without voxels."""
    from tests.training.conftest import TinyRecording

    class Recording(TinyRecording):
        def occupancy_truth(self, key: int) -> None:
            return None

        def frame_set(self, key: int) -> FrameSet:
            """Drive "a" says of its motion what follows from the key, drive "b" nothing."""
            return replace(super().frame_set(key), signals=said(key) if self.name == "a" else None)

    root = tmp_path_factory.mktemp("windows")
    jobs = {name: (lambda n=name: Recording(name=n, keys=4, seed=ord(n))) for name in "ab"}
    prepare(jobs, root, PrepareConfig(MODEL.image, MODEL.grid, None))
    return open_cache(root)


def test_past_frames_are_of_the_same_drive_and_a_bevformer_leaves_one_out(
    cache: SampleCache,
) -> None:
    rng = np.random.default_rng(0)
    assert past_indices(cache, 3, 2) == [2, 1]
    assert past_indices(cache, 1, 2) == [0, None]
    assert past_indices(cache, 4, 2) == [None, None]  # the second drive begins
    drawn = {tuple(past_indices(cache, 3, 2, rng)) for _ in range(60)}
    assert drawn == {(2, 1), (2, 0), (1, 0)}
    assert [history_length(m) for m in (MODEL, LIFT, FORMER)] == [0, 2, 2]
    assert (history_length(FORMER, 3), history_length(MODEL, 3), history_length(LIFT, 0)) == (
        3,
        0,
        0,
    )


@pytest.mark.parametrize("augment", [NO_AUGMENTATION, AugmentConfig(bev_rotate=40, bev_scale=(0.9, 1.1))])
def test_a_still_point_of_a_past_image_is_lifted_to_where_it_is_now(cache: SampleCache, augment: AugmentConfig) -> None:
    """Whatever the draw, a past camera's ray to a still point ends where the key frame has the point."""
    dataset = SampleDataset(cache, LIFT, augment, seed=3)
    for position in range(8):
        sample = dataset[position]
        index = next(i for i in range(8) if cache.name(i) == sample.name)
        for step, view in enumerate(sample.past, 1):
            if view is None:
                continue
            past = cache[index - step]
            in_cam = np.array([[0.3, 0.1, 7.0]])
            point = transform_points(cache.moment(index - step).ego2global @ past.cam2ego[1], in_cam)
            now = transform_points(invert_transform(cache.moment(index).ego2global), point)
            key = sample.view
            still = make_geometry(LIFT, [key.intrinsic], [key.cam2ego], [key.camera_valid])
            (frame,) = training_family(LIFT).history(LIFT, [[view]], [key], still).past
            ego2ego = np.linalg.inv(key.ego2global) @ view.ego2global
            lifted = transform_points(ego2ego @ view.cam2ego[1], in_cam)
            change = sample.cam2ego[1] @ np.linalg.inv(cache[index].cam2ego[1])
            np.testing.assert_allclose(lifted, transform_points(change, now), atol=1e-6)
            wanted = make_geometry(LIFT, [view.intrinsic], [ego2ego @ view.cam2ego], [view.camera_valid])
            assert torch.equal(frame.geometry.pixel, wanted.pixel)


@pytest.mark.parametrize(
    "model",
    [replace(LIFT, bevdet=BevDetConfig(frames=3, depth_net="camera")), replace(MODEL, memory=2)],
    ids=["bevdepth", "occbev"],
)
def test_the_depth_net_does_not_see_where_the_vehicle_was(cache: SampleCache, model: SplatModel) -> None:
    """A past camera stands on the vehicle as the key frame's does, which is what a robot says of every frame."""
    dataset = SampleDataset(cache, model, AugmentConfig(bev_rotate=40, bev_scale=(0.9, 1.1)), seed=0)
    sample = next(s for p in range(8) if None not in (s := dataset[p]).past)
    batch = Collate(model)([sample])
    assert len(batch.past) == 2
    for frame in batch.past:
        torch.testing.assert_close(frame.geometry.ray, batch.geometry.ray)
        assert not torch.equal(frame.geometry.pixel, batch.geometry.pixel)


def test_what_has_no_past_sees_its_own_frame_again(cache: SampleCache) -> None:
    dataset = SampleDataset(cache, LIFT, NO_AUGMENTATION, seed=0)
    first = next(dataset[p] for p in range(8) if dataset[p].past == (None, None))
    batch = Collate(LIFT)([first])
    assert len(batch.past) == 2
    for frame in batch.past:
        assert torch.equal(frame.images, batch.images)
        assert torch.equal(frame.geometry.pixel, batch.geometry.pixel)


def test_the_past_is_zero_for_the_first_epochs(cache: SampleCache) -> None:
    """BEVDet4D's recipe: eight samples an epoch, one epoch without a past, be there one or not."""
    model = reduced(replace(LIFT, bevdet=BevDetConfig(frames=2)))
    model = replace(model, image=MODEL.image, grid=MODEL.grid)
    hidden, shown = (SampleDataset(cache, model, NO_AUGMENTATION, seed=0, past_after=n) for n in (1, 0))
    torch.manual_seed(0)
    network = build_model(model, "finetune").eval()
    joined: list[torch.Tensor] = []
    network.bev_encoder.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0]))
    for dataset, position in ((hidden, 0), (hidden, 7), (hidden, 8), (shown, 0)):
        with torch.no_grad():
            run_network(network, Collate(model)([dataset[position]]), model)
    width = model.lift.channels
    assert all(bev[:, :width].any() for bev in joined)
    assert [bool(bev[:, width:].any()) for bev in joined] == [False, False, True, True]


def test_networks_that_do_not_lift_have_a_past_from_the_beginning(repository: Path) -> None:
    config = TrainingConfig(model=str(repository / "config/models/bevformer_tiny.yaml"), past_after=3)
    with pytest.raises(ConfigError, match="past_after 3: must be 0 for bevformer_tiny"):
        model_to_train(config)


def test_a_bevformer_gets_frames_oldest_first_with_the_motion_between(cache: SampleCache) -> None:
    dataset = SampleDataset(cache, FORMER, NO_AUGMENTATION, seed=0)
    samples = [dataset[p] for p in range(8)]
    full = next(s for s in samples if None not in s.past)
    empty = next(s for s in samples if s.past == (None, None))
    batch = Collate(FORMER)([full, empty])
    assert len(batch.past) == 2
    assert batch.past[0].motion.known.tolist() == [0, 0]
    assert batch.past[1].motion.known.tolist() == [1, 0]
    assert batch.motion.known.tolist() == [1, 0]
    np.testing.assert_array_equal(batch.past[0].images[0].permute(0, 2, 3, 1), full.past[1].images)
    np.testing.assert_array_equal(batch.past[1].images[0].permute(0, 2, 3, 1), full.past[0].images)
    moved = full.ego2global[:3, 3] - full.past[0].ego2global[:3, 3]
    np.testing.assert_allclose(batch.geometry.can_bus[0, :3], moved, atol=1e-4)
    forward = np.linalg.norm(moved[:2]) / (1.6 * 20)
    assert float(batch.motion.shift[0, 0]) == pytest.approx(forward, rel=0.05)  # 6 m/s, nearly straight
    assert (batch.geometry.can_bus[1, :3] == 0).all()


def test_what_a_vehicle_says_of_its_motion_reaches_every_frame(cache: SampleCache) -> None:
    for augment in (NO_AUGMENTATION, AugmentConfig(bev_rotate=40, bev_scale=(0.9, 1.1))):
        dataset = SampleDataset(cache, FORMER, augment, seed=0)
        samples = {name: next(s for p in range(8) if (s := dataset[p]).name == name) for name in ("a/0003", "b/0003")}
        batch = Collate(FORMER)(list(samples.values()))
        key = said(3).move(samples["a/0003"].augmentation.scene)
        np.testing.assert_allclose(batch.geometry.can_bus[0, 7:16], key.values, rtol=1e-5, atol=1e-5)
        assert batch.geometry.can_bus[1, 13] == pytest.approx(6, abs=0.7), "of poses alone"
        older = batch.past[1].geometry.can_bus[0, 7:16]
        assert any(
            np.allclose(older, said(k).move(samples["a/0003"].augmentation.scene).values, atol=1e-4) for k in (1, 2)
        )


def test_workers_make_the_same_windows(cache: SampleCache) -> None:
    dataset = SampleDataset(cache, FORMER, AugmentConfig(), seed=1)
    here, there = (next(iter(batches(dataset, 2, workers))) for workers in (0, 1))
    assert here.names == there.names
    for mine, other in zip(here.past, there.past, strict=True):
        assert torch.equal(mine.images, other.images)
        assert torch.equal(mine.motion.shift, other.motion.shift)


def test_rigs_of_different_sizes_share_a_batch(cache: SampleCache) -> None:
    samples = [SampleDataset(cache, LIFT, NO_AUGMENTATION, seed=0)[p] for p in range(2)]
    fewer = replace(
        samples[1],
        images=samples[1].images[:2],
        camera_valid=samples[1].camera_valid[:2],
        intrinsic=samples[1].intrinsic[:2],
        cam2ego=samples[1].cam2ego[:2],
        depth_bin=samples[1].depth_bin[:2],
        past=tuple(
            v
            and replace(
                v,
                images=v.images[:2],
                camera_valid=v.camera_valid[:2],
                intrinsic=v.intrinsic[:2],
                cam2ego=v.cam2ego[:2],
            )
            for v in samples[1].past
        ),
    )
    batch = Collate(LIFT)([samples[0], fewer])
    assert batch.camera_valid.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not batch.images[1, 2].any()
    assert (batch.depth_bin[1, 2] < 0).all()


def test_a_cache_without_poses_is_named(cache: SampleCache) -> None:
    old = replace(cache, moments=())
    with pytest.raises(CacheError, match="holds no poses"):
        SampleDataset(old, LIFT, NO_AUGMENTATION, seed=0)[0]


class _Boxes:
    """Samples that hold given labels."""

    root = Path("boxes")

    def __init__(self, labels: list[list[int]]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        labels = np.array(self.labels[index], np.int64)
        return {"labels": labels, "lidar_points": np.ones(len(labels), np.int64)}


def test_balanced_classes_are_seen_alike_often() -> None:
    """CBGS by hand: 40 samples hold a car, 2 of them a bicycle too: 42 pairs, 4 for each of ten classes."""
    samples = _Boxes([[0, 0]] * 38 + [[0, 7]] * 2 + [[]] * 5)
    order = balanced_order(samples, 10, seed=0)
    assert len(order) == 8
    assert np.isin(order[4:], [38, 39]).all()
    assert (order[:4] < 40).all()
    np.testing.assert_array_equal(order, balanced_order(samples, 10, seed=0))
    with pytest.raises(CacheError, match="no sample holds a box"):
        balanced_order(_Boxes([[], []]), 10, seed=0)
