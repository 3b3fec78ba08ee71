"""Adaptation without labels: what is held out, what is minimised, and how it is scored against LiDAR labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from occbev.classes import FREE_STATE, OCCUPIED_STATE  # noqa: E402
from occbev.config import ImageConfig, ModelConfig  # noqa: E402
from occbev.geometry import make_transform  # noqa: E402
from occbev.grid import GRIDS  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.results import Boxes3D  # noqa: E402
from occbev_training.cli import adapt as command  # noqa: E402
from occbev_training.data.augment import NO_AUGMENTATION, augment_boxes, draw_augmentation  # noqa: E402
from occbev_training.data.cache import CachedSample, CacheError, CacheInfo  # noqa: E402
from occbev_training.data.datasets import Collate, TrainingBatch, augmented  # noqa: E402
from occbev_training.data.pair_samples import PairSamples, taught_path, with_boxes  # noqa: E402
from occbev_training.engine import adapt  # noqa: E402
from occbev_training.engine.adapt import average_weights, divide, keep_source  # noqa: E402
from occbev_training.engine.taught_boxes import (  # noqa: E402
    BEYOND,
    Teacher,
    join_boxes,
    measured_depth,
    mirror_draw,
    move_onto_returns,
)
from occbev_training.evaluation.label_scores import LabelScores, depth_errors  # noqa: E402
from occbev_training.losses.adaptation import occupied_score  # noqa: E402
from occbev_training.losses.objectives import run_network  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402
from occbev_training.models.network import NetworkOutput  # noqa: E402

GRID = GRIDS["tiny"]
SECOND = 1_000_000_000


@dataclass(frozen=True)
class Stamped(PairSamples):
    """Pairs that exist by name alone: drive and whole seconds."""

    @property
    def stamp_ns(self):
        return np.array([int(key) * SECOND for _, key in self.pairs], np.int64)


def drives(names: str, seconds: int) -> Stamped:
    pairs = tuple((name, str(second)) for name in names for second in range(seconds))
    return Stamped(Path("pairs"), CacheInfo(ImageConfig(), (), GRID), pairs, "")


def test_no_sweep_of_a_training_label_is_of_the_held_out_time() -> None:
    train, held_out = divide(drives("ab", 10), window=2.0, share=0.3)
    assert [key for _, key in held_out.pairs] == ["7", "8", "9"] * 2
    assert [key for _, key in train.pairs] == ["0", "1", "2", "3", "4"] * 2, "a label at 5 s looks ahead to 7 s"


def test_of_many_drives_whole_ones_are_held_out() -> None:
    train, held_out = divide(drives("abcdefghij", 4), window=2.0, share=0.2)
    assert {drive for drive, _ in held_out.pairs} == {"a", "f"}
    assert not {drive for drive, _ in train.pairs} & {"a", "f"}


def test_a_drive_too_short_to_hold_out_is_refused_with_its_length() -> None:
    with pytest.raises(CacheError, match=r"over 2.0 s are too few .* shorter --window"):
        divide(drives("a", 3), window=2.0, share=0.5)


def test_the_score_of_a_semantic_head_is_the_log_odds_of_its_occupied_mass() -> None:
    logits = torch.randn(1, 18, 2, 2, 2)
    occupied = 1 - logits.softmax(1)[0, -1].flatten()
    score = occupied_score(NetworkOutput({"occupancy_logits": logits}), 0, torch.arange(8))
    torch.testing.assert_close(torch.sigmoid(score), occupied)
    geometric = occupied_score(NetworkOutput({"reconstruction_logits": logits[:, :2]}), 0, torch.tensor([3]))
    torch.testing.assert_close(geometric, (logits[0, 1] - logits[0, 0]).flatten()[3:4])


def a_sample(state: np.ndarray) -> CachedSample:
    """One camera that looks along x and sees everything; a return 10 m and one 20 m ahead, the latter on the road."""
    optical = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    pixel, depth = np.array([[48.0, 24.0], [8.0, 56.0]], np.float32), np.array([10.0, 20.0], np.float32)
    nothing = np.zeros(GRID.shape, np.uint8)
    return CachedSample(
        np.zeros((1, 64, 96, 3), np.uint8),
        np.ones(1, bool),
        np.array([[[80.0, 0, 48], [0, 80, 40], [0, 0, 1]]]),
        make_transform(optical, (0, 0, 1.5))[None],
        np.zeros(2, np.uint8),
        pixel,
        depth,
        state,
        np.ones(GRID.shape, np.uint8),
        nothing,
        nothing,
        np.zeros((0, 9), np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        nothing,
        nothing.astype(bool),
    )


def test_scores_count_observed_voxels_and_rays_through_free_space() -> None:
    state = np.full(GRID.shape, FREE_STATE, np.uint8)
    state[30] = OCCUPIED_STATE  # a wall 8 m ahead
    state[:, :3] = 0
    scores = LabelScores(GRID, prior=np.ones(GRID.shape, bool))
    assert scores.add(a_sample(state), state == OCCUPIED_STATE) == 1.0
    record = scores.as_record()
    assert record["iou"] == record["RayIoU"] == 1.0
    assert record["mean_grid_iou"] < 0.05
    worse = LabelScores(GRID)
    moved = np.roll(state == OCCUPIED_STATE, 4, 0)  # 3.2 m too far
    worse.add(a_sample(state), moved | (state == 0))
    assert worse.as_record()["iou"] == 0.0, "voxels that nobody observed are not counted"
    assert worse.as_record()["RayIoU_by_threshold"]["2"] < 0.1
    assert worse.as_record()["RayIoU_by_threshold"]["4"] > 0.5


def test_depth_errors_are_of_the_nearest_return_and_apart_for_obstacles() -> None:
    sample = a_sample(np.zeros(GRID.shape, np.uint8))
    every, obstacle = depth_errors(sample, np.full((1, 4, 6), 15.0), stride=16)
    assert sorted(every.tolist()) == [0.25, 0.5]
    assert obstacle.tolist() == [0.5], "the road is no obstacle"
    behind = replace(sample, lidar_pixel=sample.lidar_pixel[[0, 0]], lidar_depth=np.array([30.0, 10.0], np.float32))
    assert depth_errors(behind, np.full((1, 4, 6), 10.0), stride=16)[0].tolist() == [0.0]


def test_a_return_decides_the_depth_of_its_cell_and_no_other() -> None:
    logits = torch.zeros(1, 1, 4, 1, 2)
    depth = measured_depth(logits, torch.tensor([[[[1, -1]]]]))
    assert depth.shape == (1, 4, 1, 2)
    share = depth.softmax(1)[0, :, 0]
    assert share[1 + BEYOND, 0] > 0.99
    assert measured_depth(logits, torch.tensor([[[[3, -1]]]])).argmax(1)[0, 0, 0] == 3, "the last bin has none beyond"
    torch.testing.assert_close(share[:, 1], torch.full((4,), 0.25))


def test_the_teacher_says_what_the_network_says_where_no_return_is(repository: Path) -> None:
    model = reduced(load_model(repository / "config/models/occbev-tiny.yaml"))
    torch.manual_seed(0)
    network = build_model(model, "finetune").eval()
    teacher = Teacher.of(network, model)
    assert teacher is not None
    batch = a_batch(model)
    with torch.no_grad():
        own = run_network(network, batch, model).answers
    blind = teacher.maps(replace(batch, depth_bin=torch.full_like(batch.depth_bin, -1)))
    for name, map_ in zip(("heatmap", "box"), blind, strict=True):
        torch.testing.assert_close(map_, own[name], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(teacher.maps(batch)[0], own["heatmap"], atol=1e-4), "returns change what it finds"


def some_boxes(*rows: tuple[float, float, float], label: int = 0) -> Boxes3D:
    """Cars: x, y, score."""
    box = np.array([[x, y, 0.8, 4.5, 1.8, 1.6, 0.0, 0.0, 0.0] for x, y, _ in rows], np.float32)
    return Boxes3D(box, np.full(len(rows), label), np.array([score for *_, score in rows], np.float32))


def test_boxes_of_two_images_are_joined_and_one_that_a_single_image_shows_counts_half() -> None:
    joined = join_boxes([some_boxes((10.0, 0.0, 0.6), (30.0, 5.0, 0.8)), some_boxes((11.0, 0.0, 0.6))])
    assert joined.box[:, 0].tolist() == pytest.approx([10.5, 30.0])
    assert joined.score.tolist() == pytest.approx([0.6, 0.4])
    turned = some_boxes((11.0, 0.0, 0.6))
    turned.box[:, 6] = np.pi - 0.1
    assert join_boxes([some_boxes((10.0, 0.0, 0.7)), turned]).box[0, 6] == pytest.approx(-0.1 * 0.6 / 1.3)
    assert len(join_boxes([some_boxes((10.0, 0.0, 0.6)), some_boxes((10.0, 0.0, 0.6), label=1)])) == 2
    assert len(join_boxes([Boxes3D.empty(), Boxes3D.empty()])) == 0


def test_a_box_is_moved_onto_the_returns_of_its_near_faces() -> None:
    sample = a_sample(np.zeros(GRID.shape, np.uint8))
    across, up = (part.ravel() for part in np.meshgrid(np.linspace(-0.8, 0.8, 9), np.linspace(0.5, 1.4, 5)))
    back = np.stack([np.full(across.shape, 12.0), across, up], 1)  # the rear face of a car 12 m ahead
    intrinsic, ego2cam = sample.intrinsic[0], np.linalg.inv(sample.cam2ego[0])
    seen = back @ ego2cam[:3, :3].T + ego2cam[:3, 3]
    pixel = (seen @ intrinsic.T)[:, :2] / seen[:, 2:]
    sample = replace(
        sample,
        lidar_camera=np.zeros(len(seen), np.uint8),
        lidar_pixel=pixel.astype(np.float32),
        lidar_depth=seen[:, 2].astype(np.float32),
    )
    moved = move_onto_returns(some_boxes((13.0, 0.6, 0.9)), sample)
    assert moved.box[0, 0] == pytest.approx(12.0 + 4.5 / 2, abs=0.45)
    assert abs(moved.box[0, 1]) < 0.3
    far = move_onto_returns(some_boxes((30.0, 0.0, 0.9)), sample)
    assert far.box[0, :2].tolist() == [30.0, 0.0], "nothing is around it"


def test_boxes_that_were_found_stand_in_place_of_labels(tmp_path: Path) -> None:
    sample, path = a_sample(np.zeros(GRID.shape, np.uint8)), taught_path(tmp_path, "drive/1")
    path.parent.mkdir()
    found = some_boxes((10.0, 0.0, 0.6))
    np.savez(path, box=found.box, label=found.label)
    taught = with_boxes(sample, path)
    assert taught.boxes[0, :7].tolist() == found.box[0, :7].tolist()
    assert np.isnan(taught.boxes[0, 7:]).all(), "a single frame says nothing of velocities"
    assert taught.lidar_points.tolist() == [1]


def test_a_mirrored_scene_is_its_own_inverse() -> None:
    draw = mirror_draw(2, (64, 48))
    boxes = some_boxes((10.0, 3.0, 0.6)).box
    once = augment_boxes(boxes, draw)
    assert once[0, :2].tolist() == [10.0, -3.0]
    assert augment_boxes(once, draw)[0, :2].tolist() == [10.0, 3.0]
    assert all(image.matrix[0, 0] == -1 for image in draw.images)


def test_weights_are_averaged_and_counters_taken_as_they_are() -> None:
    old, new = (torch.nn.BatchNorm1d(2) for _ in range(2))
    with torch.no_grad():
        new.weight.fill_(3.0)
    new.num_batches_tracked.fill_(7)
    mixed = average_weights(old, new, 0.25)
    assert mixed.weight.tolist() == [1.5, 1.5]
    assert mixed.num_batches_tracked.item() == 7
    assert new.weight.tolist() == [3.0, 3.0], "the adapted network stays as it is"


@pytest.mark.parametrize(("max_forgotten", "share"), [(1.0, 1.0), (0.1, 0.55), (0.02, 0.4)])
def test_the_largest_share_of_new_weights_is_taken_that_keeps_the_scores_of_the_source(
    monkeypatch: pytest.MonkeyPatch, repository: Path, max_forgotten: float, share: float
) -> None:
    def score(network: torch.nn.Module, *_: object) -> dict[str, float]:
        away = network.bias.item()  # of 1 for the adapted weights, 0 for the source's
        return {"occupancy_iou": 0.5 - 0.08 * away, "car_AP_2m_30m": 0.6 - 0.09 * away}

    monkeypatch.setattr(adapt, "simulated_scores", score)
    model = load_model(repository / "config/models/occbev-tiny.yaml")
    source, adapted = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        source.bias.fill_(0.0)
        adapted.bias.fill_(1.0)
    network, taken = keep_source(source, adapted, model, drives("a", 2), max_forgotten)
    assert taken == share
    assert network.bias.item() == pytest.approx(share)
    assert keep_source(source, adapted, model, None, max_forgotten)[1] == 1.0, "nothing is rehearsed"


@dataclass
class AdaptRun:
    """An adaptation whose network, training and scores are stand-ins: of all pairs its IoU is 0.5, of a few 0.3."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    validated: float = 0.35
    trained: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        fakes = {
            "load_network": lambda *_: torch.nn.Linear(1, 1),
            "learns_from": lambda *_: True,
            "score_pairs": lambda network, package, samples, most=None, min_free=None: {"iou": 0.3 if most else 0.5},
            "fit_threshold": lambda network, package, samples: (package.model, {}),
            "Trainer": self.trainer,
        }
        for name, fake in (fakes | dict.fromkeys(("_objective", "_loader"), lambda *_: None)).items():
            self.monkeypatch.setattr(adapt, name, fake)

    def trainer(self, config: Any, network: Any, objective: Any, loader: Any, folder: Path, validate: Any) -> Any:
        def run(*_: object) -> bool:
            self.monkeypatch.setattr(adapt, "score_pairs", lambda *_: {"iou": self.validated})
            validate(network)
            self.__post_init__()
            self.trained.append(config.steps)
            return True

        progress = SimpleNamespace(step=config.steps, planned=config.steps, seconds=1.0, processor_seconds=1.0)
        return SimpleNamespace(run=run, progress=progress)

    def go(self, seconds: int = 10, **training: int) -> Any:
        model = SimpleNamespace(grid=GRID, family="lss", name="a")
        package = SimpleNamespace(model=model, hash="0")
        config = adapt.AdaptConfig(replace(adapt.AdaptConfig().training, stage="adapt", **training))
        data = adapt.AdaptData(*divide(drives("a", seconds), 2.0, 0.3), None, None)
        return adapt.adapt(package, data, config, self.folder)


def test_validations_of_a_few_pairs_are_compared_with_the_same_few_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AdaptRun(tmp_path / "better", monkeypatch).go()
    assert (tmp_path / "better" / adapt.BEST).exists(), "0.35 is better than 0.3 on these pairs"
    AdaptRun(tmp_path / "worse", monkeypatch, validated=0.25).go()
    assert not (tmp_path / "worse" / adapt.BEST).exists()


def test_a_run_is_repeated_for_other_steps_and_refused_for_other_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = AdaptRun(tmp_path / "run", monkeypatch)
    assert [run.go(steps=steps).steps for steps in (20, 20, 40)] == [20, 20, 40]
    assert run.trained == [20, 40]
    with pytest.raises(CacheError, match=r"was begun on .*'learned': 5.* now are given .*'learned': 12"):
        run.go(seconds=20, steps=40)


def test_ranges_are_taken_from_pairs_whether_or_not_boxes_were_looked_for_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[str, Any] = {}

    def export(*_: object, calibration: Any) -> Any:
        taken["frames"] = calibration
        return SimpleNamespace(metrics={"int8_agreement": 0.9})

    monkeypatch.setattr(command, "export_package", export)
    package = SimpleNamespace(has=lambda name: True, model=SimpleNamespace(name="a"))
    data = adapt.AdaptData(replace(drives("a", 3), taught=tmp_path), drives("b", 1), None, None)
    found = SimpleNamespace(network=None, model=None)
    command.export_like(package, found, tmp_path, {}, {}, [], data)
    assert taken["frames"].taught is None, "the training may show fewer pairs than there are: others have no file"


def test_only_boxes_from_depth_are_taught(repository: Path) -> None:
    for name, stage in (("occbev-tiny", "pretrain"), ("bevformer_tiny", "finetune"), ("bevdet4d_r50", "finetune")):
        model = reduced(load_model(repository / "config/models" / f"{name}.yaml"))
        assert Teacher.of(build_model(model, stage), model) is None, name


def a_batch(model: ModelConfig) -> TrainingBatch:
    """One camera of the network's size, with returns in every fourth pixel of its middle, all 9 m away."""
    size = model.image.height, model.image.width
    rows, columns = np.meshgrid(np.arange(size[0] // 3, size[0], 4), np.arange(0, size[1], 4), indexing="ij")
    pixel = np.stack([columns.ravel(), rows.ravel()], 1).astype(np.float32)
    volume = np.zeros(model.grid.shape, np.uint8)
    sample = replace(
        a_sample(volume),
        images=np.random.default_rng(0).integers(0, 255, (1, *size, 3)).astype(np.uint8),
        lidar_camera=np.zeros(len(pixel), np.uint8),
        lidar_pixel=pixel,
        lidar_depth=np.full(len(pixel), 9.0, np.float32),
        camera_visible=volume,
        hit_sweeps=volume,
        pass_sweeps=volume,
        semantics=volume,
        mask_camera=volume.astype(bool),
    )
    still = draw_augmentation(0, 1, (size[1], size[0]), NO_AUGMENTATION)
    return Collate(model)([augmented("one", sample, still, model)])


def test_options_of_several_numbers_are_handed_on() -> None:
    from argparse import ArgumentParser

    from occbev_training.cli.arguments.shared import add_input_arguments

    parser = ArgumentParser()
    add_input_arguments(parser)
    given = ["--lidar-origin", "-0.5", "0", "1.8", "--clock-fix", "--rig", "rig.yaml"]
    words = command.given_arguments(parser.parse_args(given), add_input_arguments)
    assert parser.parse_args(words) == parser.parse_args(given)


def test_learn_makes_pairs_with_the_body_that_it_is_given() -> None:
    from argparse import ArgumentParser

    from occbev_training.cli import learn
    from occbev_training.cli.arguments import learn as learn_arguments
    from occbev_training.cli.arguments import pairs as pair_arguments

    body = [-0.4, -0.3, 0.05, 0.6, 0.3, 0.9]
    parser, of_pairs = ArgumentParser(), ArgumentParser()
    learn_arguments.add_arguments(parser)
    pair_arguments.add_arguments(of_pairs)
    words = ["bags", "--out", "out", "--key-interval", "0.5", "--ego-box", *map(str, body)]
    command, *given = learn._pairs_step(parser.parse_args(words), "occ3d").words
    assert command == "pairs"
    assert of_pairs.parse_args(given).ego_box == body
