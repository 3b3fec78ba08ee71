"""Losses against published results, by hand, and with nothing to learn from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from occbev.classes import FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE  # noqa: E402
from occbev.grid import BevGrid  # noqa: E402
from occbev_training.losses.voxels_and_centres import (  # noqa: E402
    CentreTargets,
    balanced_weights,
    box_loss,
    centre_targets,
    depth_loss,
    gaussian_radius,
    geometric_scale_loss,
    heatmap_loss,
    lovasz,
    lovasz_softmax,
    observation_weights,
    paper_loss,
    semantic_loss,
    semantic_scale_loss,
    sigmoid_focal,
    three_state_loss,
)

GRID = BevGrid((-10, -20), (1, 2), (20, 20))  # x and y differ, so that an exchange shows
VOLUME = (1, 2, 3, 4)


def volume(value: float, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.full(VOLUME, value, dtype=dtype)


def scores(free: float, occupied: float) -> Tensor:
    return torch.stack([torch.full(VOLUME, free), torch.full(VOLUME, occupied)], 1).requires_grad_()


def car(x: float, y: float, yaw: float = 0.3) -> list[float]:
    return [x, y, 0.7, 4.5, 1.9, 1.6, yaw, 2.0, -1.0]


def test_focal_equals_the_published_one(golden_folder: Path) -> None:
    golden = np.load(golden_folder / "bevformer_g_focal.npz", allow_pickle=False)
    logits = torch.from_numpy(golden["occ.logits"]).requires_grad_()
    target = torch.nn.functional.one_hot(torch.from_numpy(golden["occ.labels"]), 2).float()
    loss = sigmoid_focal(logits, target)
    np.testing.assert_allclose(loss.detach(), golden["occ.loss_elementwise"], atol=1e-5, rtol=1e-4)
    loss.mean().backward()
    np.testing.assert_allclose(logits.grad, golden["occ.grad_logits"], atol=1e-6, rtol=1e-4)


def test_depth_loss_equals_the_published_one(golden_folder: Path) -> None:
    golden = np.load(golden_folder / "bevdepth_gt.npz", allow_pickle=False)
    logits = torch.from_numpy(golden["depth_pred"])[None].log()
    bins = torch.from_numpy(golden["bins_index"])[None]
    assert 3 * float(depth_loss(logits, bins, "bce")) == pytest.approx(float(golden["loss_depth"]), rel=1e-5)


def test_depth_loss_counts_labelled_cells_only() -> None:
    logits = torch.zeros(1, 2, 5, 2, 3, requires_grad=True)
    bins = torch.full((1, 2, 2, 3), -1)
    assert float(depth_loss(logits, bins)) == 0
    bins[0, 1, 0, 2] = 4
    loss = depth_loss(logits, bins)
    assert float(loss) == pytest.approx(np.log(5))
    loss.backward()
    assert set(map(tuple, torch.nonzero(logits.grad.abs().sum(2))[:, [1, 2, 3]].tolist())) == {(1, 0, 2)}
    with pytest.raises(ValueError, match="'l1'"):
        depth_loss(logits, bins, "l1")


def test_unobserved_voxels_teach_nothing() -> None:
    logits = scores(3.0, -2.0)
    state = volume(UNOBSERVED_STATE)
    loss = three_state_loss(logits, state, volume(1), volume(4))
    loss.backward()
    assert float(loss) == 0
    assert float(logits.grad.abs().sum()) == 0
    state[0, 1, 2, 3] = OCCUPIED_STATE
    logits = scores(3.0, -2.0)
    three_state_loss(logits, state, volume(1), volume(4)).backward()
    assert torch.nonzero(logits.grad[0, 1]).tolist() == [[1, 2, 3]]
    assert float(logits.grad[0, 1, 1, 2, 3]) < 0  # occupied should rise
    assert float(logits.grad[0, 0, 1, 2, 3]) > 0


def test_three_state_loss_is_a_weighted_cross_entropy() -> None:
    state, visible, evidence = volume(UNOBSERVED_STATE), volume(0).bool(), volume(0)
    state[0, 0, 0, :3] = torch.tensor([OCCUPIED_STATE, FREE_STATE, FREE_STATE], dtype=torch.uint8)
    visible[0, 0, 0, :2] = True
    evidence[0, 0, 0, :3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    confidence = 1 - np.exp(-np.array([1, 2, 3]) / 2)
    weight = confidence * [1, 1, 0.25] * np.array([1 / 3, 2 / 3, 2 / 3]) ** -0.5
    entropy = np.log1p(np.exp(np.array([-0.5, 0.5, 0.5])))
    got = three_state_loss(scores(0.2, 0.7), state, visible, evidence)
    assert float(got) == pytest.approx(float((weight * entropy).sum() / weight.sum()), rel=1e-5)


def test_free_voxels_keep_weight_among_real_proportions() -> None:
    """Nine in ten voxels are free and most of them were passed by few sweeps."""
    rng = torch.Generator().manual_seed(0)
    occupied = torch.rand(20000, generator=rng) < 0.1
    evidence = torch.randint(1, 11, (20000,), generator=rng)
    weight = observation_weights(occupied, torch.ones(20000, dtype=torch.bool), evidence)
    assert float(weight[~occupied].mean()) > 0.3
    assert float(weight[occupied].mean() / weight[~occupied].mean()) == pytest.approx(3, rel=0.1)


def test_paper_loss_takes_unobserved_for_free() -> None:
    state = volume(UNOBSERVED_STATE)
    state[0, 0, 0, 0] = OCCUPIED_STATE
    free = torch.where(state == OCCUPIED_STATE, state, FREE_STATE).to(torch.uint8)
    assert float(paper_loss(scores(0.4, -0.3), state)) == float(paper_loss(scores(0.4, -0.3), free))
    target = torch.stack([state != OCCUPIED_STATE, state == OCCUPIED_STATE], 1).float()
    expected = float(sigmoid_focal(scores(0.4, -0.3), target).mean())
    assert float(paper_loss(scores(0.4, -0.3), state)) == pytest.approx(expected)


def test_semantic_loss_is_that_of_torch_over_the_mask() -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 18, 3, 4, 5, generator=rng)
    semantics = torch.randint(0, 18, (2, 3, 4, 5), generator=rng, dtype=torch.uint8)
    mask = torch.rand(2, 3, 4, 5, generator=rng) < 0.5
    weight = torch.rand(18, generator=rng) + 0.5
    chosen = logits.movedim(1, -1)[mask]
    expected = torch.nn.functional.cross_entropy(chosen, semantics[mask].long(), weight)
    assert float(semantic_loss(logits, semantics, mask, weight)) == pytest.approx(float(expected), rel=1e-5)
    nothing = semantic_loss(logits.requires_grad_(), semantics, torch.zeros_like(mask))
    nothing.backward()
    assert float(nothing) == 0


def test_rare_classes_weigh_more_but_not_without_end() -> None:
    weight = balanced_weights(torch.tensor([10000, 100, 1, 0]))
    assert weight.tolist() == [1, 10, 10, 10]
    assert balanced_weights(torch.tensor([400, 100])).tolist() == [1, 2]


def test_lovasz_of_certain_answers_is_one_minus_iou() -> None:
    target = torch.tensor([True, True, True, False, False])
    answer = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])  # intersection 2, union 4
    assert float(lovasz(answer, target)) == pytest.approx(0.5)
    assert float(lovasz(target.float(), target)) == pytest.approx(0)
    assert float(lovasz(answer, torch.zeros(5, dtype=torch.bool))) == 0


def test_centre_targets_by_hand() -> None:
    boxes = torch.tensor([car(3.25, -7.5), car(50, 0)])
    targets = centre_targets([torch.zeros(0, 9), boxes], [torch.zeros(0).long(), torch.tensor([2, 2])], GRID, 3)
    assert targets.heatmap.shape == (2, 3, 20, 20)
    assert torch.nonzero(targets.heatmap == 1).tolist() == [[1, 2, 6, 13]]  # y row (-7.5 + 20) / 2, x column 13
    assert targets.place.tolist() == [1 * 400 + 6 * 20 + 13]
    expected = [0.25, 0.25, 0.7, *np.log([4.5, 1.9, 1.6]), np.sin(0.3), np.cos(0.3), 2, -1]
    np.testing.assert_allclose(targets.box[0], expected, rtol=1e-5)
    sigma = 5 / 6
    assert float(targets.heatmap[1, 2, 6, 15]) == pytest.approx(np.exp(-4 / (2 * sigma**2)))
    assert float(targets.heatmap[1, 2, 6, 16]) == 0  # beyond the radius of two cells


def test_cells_beside_a_centre_learn_the_box_of_the_nearest_one() -> None:
    boxes = torch.tensor([car(3.25, -7.5), car(-9.9, -19.9), car(-7.9, -19.9)])  # cells (13, 6), (0, 0), (2, 0)
    targets = centre_targets([boxes], [torch.zeros(3).long()], GRID, 1, reach=1)
    assert len(torch.unique(targets.place)) == len(targets.place) == 9 + 8  # two rows of four cells at the border
    x, y = targets.place % 20, targets.place // 20
    centre = torch.stack([x, y], 1) + targets.box[:, :2]
    metres = centre * torch.tensor(GRID.pitch) + torch.tensor(GRID.lo)
    apart = (metres[:, None] - boxes[None, :, :2]).norm(dim=2)
    assert float(apart.amin(1).max()) < 1e-5
    middle = torch.stack([x, y], 1) + 0.5
    own = (middle * torch.tensor(GRID.pitch) + torch.tensor(GRID.lo))[:, None] - boxes[None, :, :2]
    assert torch.equal(apart.argmin(1), own.norm(dim=2).argmin(1))


def test_peaks_that_meet_keep_the_higher_value_and_borders_clip() -> None:
    boxes = torch.tensor([car(-9.5, -19), car(-8.5, -19), car(9.9, 19.9)])
    both = centre_targets([boxes], [torch.zeros(3).long()], GRID, 1).heatmap[0, 0]
    single = [centre_targets([b[None]], [torch.zeros(1).long()], GRID, 1).heatmap[0, 0] for b in boxes]
    assert torch.equal(both, torch.stack(single).amax(0))
    assert int((both == 1).sum()) == 3


@pytest.mark.parametrize("box", [car(10.0, 0), car(-10.01, 0), car(0, 20), [0, 0, 0, 0, 1, 1, 0, 0, 0]])
def test_boxes_outside_or_without_size_are_left_out(box: list[float]) -> None:
    targets = centre_targets([torch.tensor([box], dtype=torch.float32)], [torch.zeros(1).long()], GRID, 1)
    assert float(targets.heatmap.sum()) == 0
    assert len(targets.place) == 0


def test_radius_grows_with_size_from_its_minimum() -> None:
    radius = gaussian_radius(torch.tensor([1.0, 5.0, 40.0]), torch.tensor([1.0, 2.0, 40.0]))
    assert radius[0] == 2
    assert radius[2] > radius[1]
    # Any shift by the radius along both axes leaves the asked overlap.
    r, side = float(radius[2]), 40.0
    assert (side - r) ** 2 / (2 * side**2 - (side - r) ** 2) >= 0.1


def test_perfect_answer_has_no_box_loss_and_unknown_velocity_no_say() -> None:
    boxes = torch.tensor([car(3.25, -7.5)])
    boxes[0, 7] = float("nan")
    targets = centre_targets([boxes], [torch.zeros(1).long()], GRID, 1)
    prediction = torch.zeros(1, 10, 20, 20)
    prediction[0, :, 6, 13] = torch.nan_to_num(targets.box[0], nan=7.0)
    prediction.requires_grad_()
    loss = box_loss(prediction, targets)
    loss.backward()
    assert float(loss) == 0
    assert torch.isfinite(prediction.grad).all()
    worse = prediction.detach().clone()
    worse[0, 2, 6, 13] += 0.5  # height
    worse[0, 9, 6, 13] += 1.0  # velocity
    worse[0, 0, 5, 5] += 9.0  # where no object is
    assert float(box_loss(worse, targets)) == pytest.approx(0.5 + 0.2, rel=1e-5)


def test_heatmap_loss_falls_towards_the_target_and_is_safe_without_objects() -> None:
    targets = centre_targets([torch.tensor([car(3.25, -7.5)])], [torch.zeros(1).long()], GRID, 1)
    right = torch.full((1, 1, 20, 20), -9.0)
    right[0, 0, 6, 13] = 9.0
    assert float(heatmap_loss(right, targets.heatmap)) < 1e-3
    assert float(heatmap_loss(-right, targets.heatmap)) > 100
    empty = CentreTargets(torch.zeros(1, 1, 20, 20), torch.zeros(0).long(), torch.zeros(0, 10))
    prediction = torch.randn(1, 10, 20, 20, requires_grad=True)
    loss = box_loss(prediction, empty) + heatmap_loss(prediction[:, :1], empty.heatmap)
    loss.backward()
    assert torch.isfinite(loss)
    assert float(box_loss(prediction, empty)) == 0


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([-200.0, 200.0]).view(1, 2, 1, 1).requires_grad_()
    heatmap_loss(logits, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)).backward()
    assert torch.isfinite(logits.grad).all()


def test_every_class_has_its_own_map() -> None:
    boxes = torch.tensor([car(0.5, 1), car(0.5, 1)])
    heatmap = centre_targets([boxes], [torch.tensor([0, 3])], GRID, 4).heatmap
    assert [float(m.max()) for m in heatmap[0]] == [1, 0, 0, 1]


def test_lovasz_over_classes_is_one_minus_mean_iou_of_certain_answers() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    answer = torch.tensor([0, 1, 1, 1, 2])
    probability = torch.nn.functional.one_hot(answer, 4).T.float()
    ious = [1 / 2, 2 / 3, 1.0]  # the class that does not occur does not count
    assert float(lovasz_softmax(probability, labels)) == pytest.approx(1 - sum(ious) / 3)
    assert float(lovasz_softmax(probability[:, :0], labels[:0])) == 0


def test_scale_losses_by_hand() -> None:
    """Precision, recall and specificity of occupied against free, and of each class that occurs."""
    labels = torch.tensor([0, 0, 1, 1])  # 1 is free
    occupied = torch.tensor([0.9, 0.6, 0.2, 0.1])
    probability = torch.stack([occupied, 1 - occupied])
    precision, recall, specificity = 1.5 / 1.8, 1.5 / 2, 1.7 / 2
    wanted = -sum(math.log(v) for v in (precision, recall, specificity))
    assert float(geometric_scale_loss(probability, labels, free=1)) == pytest.approx(wanted, rel=1e-5)
    other = -sum(math.log(v) for v in (1.7 / 2.2, 1.7 / 2, 1.5 / 2))
    got = float(semantic_scale_loss(probability, labels))
    assert got == pytest.approx((wanted + other) / 2, rel=1e-5)
    nothing = torch.ones(4, dtype=torch.long)
    assert float(geometric_scale_loss(probability, nothing, free=1)) == 0
    assert float(semantic_scale_loss(probability[:, :0], labels[:0])) == 0


def test_scale_losses_pull_towards_the_truth() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (200,))
    logits = torch.zeros(3, 200, requires_grad=True)
    losses = []
    for _ in range(60):
        probability = logits.softmax(0)
        loss = geometric_scale_loss(probability, labels, 2) + semantic_scale_loss(probability, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 40 * gradient).detach().requires_grad_()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert (logits.argmax(0) == labels).float().mean() > 0.98
