"""CenterPoint tasks: targets, losses and decoding against cases worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from occbev.config import ConfigError  # noqa: E402
from occbev.grid import BevGrid  # noqa: E402
from occbev.inference.families import load_model, read_model  # noqa: E402
from occbev.inference.pipeline import boxes_of  # noqa: E402
from occbev.inference.postprocess import BoxDecoding, OutputError  # noqa: E402
from occbev.inference.task_boxes import TaskDecoding, decode_tasks, squared_circle_nms  # noqa: E402
from occbev.results import Boxes3D  # noqa: E402
from occbev_training.losses.centre_heads import (  # noqa: E402
    LossWeights,
    centre_losses,
    clamped_focal,
    task_targets,
)
from occbev_training.models.heads.centre_head import CentreHead  # noqa: E402

BEV = BevGrid((-12.8, -12.8), (0.8, 0.8), (32, 32))
SIX = (1, 2, 2, 1, 2, 2)
NAN = float("nan")


def box(x: float, y: float, length: float = 4.0, width: float = 2.0, **changes: float) -> list[float]:
    row = {
        "z": 0.5,
        "l": length,
        "w": width,
        "h": 1.5,
        "yaw": 0.3,
        "vx": 1.0,
        "vy": -2.0,
        **changes,
    }
    return [x, y, *row.values()]


def targets_of(rows: list[list[float]], labels: list[int], tasks: tuple[int, ...] = (10,)):
    boxes = torch.tensor(rows).reshape(-1, 9)
    return task_targets([boxes], [torch.tensor(labels, dtype=torch.long)], tasks, BEV)


def test_a_target_holds_the_box_at_its_truncated_cell() -> None:
    (target,) = targets_of([box(1.0, -3.0)], [2])
    assert target.place.tolist() == [12 * 32 + 17]  # (1 + 12.8) / 0.8 = 17.25, (-3 + 12.8) / 0.8 = 12.25
    want = [
        0.25,
        0.25,
        0.5,
        *(math.log(v) for v in (4, 2, 1.5)),
        math.sin(0.3),
        math.cos(0.3),
        1,
        -2,
    ]
    torch.testing.assert_close(target.box[0], torch.tensor(want), rtol=1e-4, atol=1e-5)
    assert target.heatmap[0, 2, 12, 17] == 1
    assert (target.heatmap == 1).sum() == 1
    assert not target.heatmap[0, [0, 1, 3]].any()


def test_a_centre_just_below_the_border_counts_as_cell_zero() -> None:
    (target,) = targets_of([box(-13.2, 0.0), box(-13.7, 0.0), box(12.9, 0.0)], [0, 0, 0])
    assert len(target.place) == 1  # the second is more than a cell away, the third beyond the top
    assert target.place[0] % 32 == 0
    assert target.box[0, 0] == pytest.approx(-0.5, abs=1e-4)


def test_tasks_split_the_classes() -> None:
    rows, labels = [box(0, 0), box(2, 2), box(-5, 1)], [2, 9, 1]
    targets = targets_of(rows, labels, SIX)
    assert [len(t.place) for t in targets] == [0, 2, 0, 0, 0, 1]
    assert [t.heatmap.shape[1] for t in targets] == list(SIX)
    assert targets[1].heatmap[0, 1, 16, 16] == 1  # construction vehicle, the task's second class
    assert targets[5].heatmap[0, 1].max() == 1


def test_boxes_without_a_size_are_left_out_and_no_box_is_fine() -> None:
    (target,) = targets_of([box(0, 0, length=0.0)], [0])
    assert len(target.place) == 0
    (empty,) = targets_of([], [])
    assert not empty.heatmap.any()


def maps_for(target, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps that say the target exactly."""
    heatmap = torch.full((1, classes, 32, 32), -12.0)
    heatmap[target.heatmap == 1] = 12.0
    boxes = torch.zeros(1, 10, 32 * 32)
    boxes[0][:, target.place] = target.box.nan_to_num().T
    return heatmap, boxes.view(1, 10, 32, 32)


def test_box_losses_are_means_over_boxes_with_their_weights() -> None:
    rows = [box(1.0, -3.0), box(-4.0, 5.0, vx=NAN, vy=NAN)]
    targets = targets_of(rows, [2, 0])
    heatmap, boxes = maps_for(targets[0], 10)
    boxes = boxes + 0.5
    terms = centre_losses(heatmap, boxes, targets, LossWeights(velocity=0.2))
    got = {name: float(value) for name, value in terms.items()}
    n = 2 / 2.0001
    assert got["task0.loss_xy"] == pytest.approx(0.25 * 0.5 * 2 * n, rel=1e-4)
    assert got["task0.loss_whl"] == pytest.approx(0.25 * 0.5 * 3 * n, rel=1e-4)
    assert got["task0.loss_vel"] == pytest.approx(0.25 * 0.2 * 0.5 * 2 * n / 2, rel=1e-4)  # one is NaN
    assert set(got) == {f"task0.loss_{p}" for p in ("xy", "z", "whl", "yaw", "vel", "heatmap")}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_losses_and_gradients_are_finite_for_any_number_of_boxes(count: int) -> None:
    rng = np.random.default_rng(count)
    rows = [box(*rng.uniform(-12, 12, 2), vx=NAN, vy=NAN) for _ in range(count)]
    targets = targets_of(rows, list(range(count)), SIX)
    torch.manual_seed(0)
    head = CentreHead(8, SIX, width=8)
    terms = centre_losses(*head(torch.randn(1, 8, 32, 32)), targets)
    total = sum(terms.values())
    total.backward()
    assert len(terms) == 36
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def test_the_focal_loss_by_hand() -> None:
    logits, target = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.5]])
    want = 0.25 * math.log(2) + 0.5**4 * 0.25 * math.log(2)
    assert float(clamped_focal(logits, target)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("tasks", [(10,), SIX])
@pytest.mark.parametrize("nms", ["scale", "circle"])
def test_decoding_undoes_the_targets(tasks: tuple[int, ...], nms: str) -> None:
    rows = [box(1.0, -3.0), box(-8.0, 7.0, 0.7, 0.7, yaw=-2.0)]
    targets = targets_of(rows, [1, 8], tasks)
    maps = [maps_for(t, n) for t, n in zip(targets, tasks, strict=True)]
    heatmap, boxes = (torch.cat(parts, 1)[0].numpy() for parts in zip(*maps, strict=True))
    found = decode_tasks(heatmap, boxes, tasks, BEV, TaskDecoding(nms=(nms,), radii=(1.0,) * 6))
    order = np.argsort(found.label)
    assert found.label[order].tolist() == [1, 8]
    np.testing.assert_allclose(found.box[order], rows, rtol=1e-4, atol=1e-4)


def decoded(rows: list[list[float]], labels: list[int], decoding: TaskDecoding | None = None) -> Boxes3D:
    heatmap, boxes = (array[0].numpy() for array in maps_for(targets_of(rows, labels)[0], 10))
    return decode_tasks(heatmap, boxes, (10,), BEV, decoding or TaskDecoding())


def test_classes_of_one_task_compete_and_small_things_are_enlarged() -> None:
    near = [box(0.2, 0.2, 0.4, 0.4), box(1.0, 0.2, 0.4, 0.4)]  # 0.8 m apart: no overlap as they are
    assert len(decoded(near, [9, 9])) == 1  # a factor of 3.5 makes them overlap
    assert len(decoded(near, [9, 9], TaskDecoding(factors=(1.0,) * 10))) == 2
    one = decoded([box(0.2, 0.2), box(0.2, 0.2)], [0, 1])
    assert len(one) == 1
    assert np.isclose(one.box[0, 3], 4.0, atol=1e-3)  # sizes come back unscaled


def test_circle_suppression_compares_squared_distances() -> None:
    rows = np.zeros((4, 9), np.float32)
    rows[:, 0] = 0.0, 1.9, 2.0, 2.1
    found = Boxes3D(rows, np.zeros(4, np.int64), np.linspace(0.9, 0.6, 4).astype(np.float32))
    assert squared_circle_nms(found, 4.0).tolist() == [True, False, False, True]


def test_every_task_has_boxes_of_its_own_where_two_find_something() -> None:
    """A pedestrian beside a car in one cell: merged maps would give both the box of the better one."""
    targets = targets_of([box(0.2, 0.2), box(0.3, 0.3, 0.6, 0.6)], [0, 8], SIX)
    maps = [maps_for(t, n) for t, n in zip(targets, SIX, strict=True)]
    heatmap, boxes = (torch.cat(parts, 1)[0].numpy() for parts in zip(*maps, strict=True))
    found = decode_tasks(heatmap, boxes, SIX, BEV, TaskDecoding())
    assert dict(zip(found.label.tolist(), found.box[:, 3], strict=True)) == pytest.approx({0: 4.0, 8: 0.6})


def test_what_is_weak_or_far_is_left_out_and_few_cells_are_enough() -> None:
    small = BevGrid((-1.6, -1.6), (0.8, 0.8), (4, 4))  # fewer cells than candidates
    heatmap, boxes = np.full((10, 4, 4), -9.0, np.float32), np.zeros((10, 4, 4), np.float32)
    heatmap[3, 1, 1] = 2.0
    assert len(decode_tasks(heatmap, boxes, (10,), small, TaskDecoding())) == 1
    assert len(decode_tasks(heatmap, boxes, (10,), small, TaskDecoding(), threshold=0.95)) == 0
    far = boxes.copy()
    far[2] = 99.0
    assert len(decode_tasks(heatmap, far, (10,), small, TaskDecoding())) == 0
    far[2], far[0, 1, 1] = 0.0, -1.1e6
    assert len(decode_tasks(heatmap, far, (10,), small, TaskDecoding())) == 0


def test_decoding_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="scale or circle"):
        TaskDecoding(nms=("soft",))
    with pytest.raises(ConfigError, match=r"bevdet: decoding\.radii .* 1 values"):
        read_model({"family": "bevdet", "bevdet": {"decoding": {"nms": ["circle"]}}})
    maps = np.zeros((10, 32, 32), np.float32)
    with pytest.raises(OutputError, match="exported again"):
        decode_tasks(maps, maps, SIX, BEV, TaskDecoding())
    heatmap, boxes = maps.copy(), maps.copy()
    heatmap[0, 3, 3], boxes[3, 3, 3] = 9.0, np.nan
    with pytest.raises(OutputError, match="not finite"):
        decode_tasks(heatmap, boxes, (10,), BEV, TaskDecoding())


@pytest.mark.parametrize("name", ["bevdet_r50", "bevdepth_r50_first", "bevdepth_r50_megvii"])
def test_the_robot_decodes_as_published(repository: Path, name: str) -> None:
    """`boxes_of`, which pipeline, evaluation and node run, gives what each task's rule gives, moved to base_link."""
    model = load_model(repository / "config/models" / f"{name}.yaml")
    parts, plane = model.bevdet, model.bev.shape[::-1]
    rng = np.random.default_rng(0)
    heatmap = rng.normal(-4, 1.5, (10, *plane)).astype(np.float32)
    boxes = rng.normal(0, 1, (10 * len(parts.tasks), *plane)).astype(np.float32)
    found = boxes_of({"heatmap": heatmap[None], "box": boxes[None]}, model, BoxDecoding(max_boxes=10_000))
    want = decode_tasks(heatmap, boxes, parts.tasks, model.bev, parts.decoding)
    assert len(found) == len(want) > 50
    np.testing.assert_array_equal(found.label, want.label)
    if model.bev.frame == "base_link":
        np.testing.assert_array_equal(found.box, want.box)
    assert (np.diff(found.score) <= 0).all()
    most = parts.decoding.boxes * len(parts.tasks)
    assert len(found) <= most
