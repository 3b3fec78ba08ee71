"""Matching and losses of object queries: published numbers; zero, one and many objects; unknown values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from occbev_training.losses import queries as losses  # noqa: E402
from occbev_training.losses.voxels_and_centres import sigmoid_focal, voxel_focal_loss  # noqa: E402
from occbev_training.models.heads.query_head import encode_boxes  # noqa: E402

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
WEIGHTS = torch.tensor([1.0] * 8 + [0.2] * 2)
BOXES = torch.tensor(
    [
        [1.0, 2, 0, 4, 2, 1.5, 0.3, 1, 0],
        [-5, 3, 0, 1, 1, 2, 2.0, 0, 0],
        [7, 7, 1, 8, 3, 3, -1, 0, 2],
    ]
)
LABELS = torch.tensor([2, 0, 3])


@pytest.fixture
def focal(golden_folder: Path) -> dict[str, torch.Tensor]:
    with np.load(golden_folder / "bevformer_g_focal.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def test_published_occupancy_focal(focal) -> None:
    logits = focal["occ.logits"].clone().requires_grad_()
    wanted = torch.nn.functional.one_hot(focal["occ.labels"], 2).float()
    each = sigmoid_focal(logits, wanted)
    torch.testing.assert_close(each, focal["occ.loss_elementwise"], **CLOSE)
    torch.testing.assert_close(each.mean(), focal["occ.loss_mean"], **CLOSE)
    each.mean().backward()
    torch.testing.assert_close(logits.grad, focal["occ.grad_logits"], **CLOSE)
    volume = logits.detach().T.reshape(1, 2, 1, 1, 50)
    occupied, mask = (v.view(1, 1, 1, 50).bool() for v in (focal["occ.labels"], focal["occ.mask"]))
    masked = voxel_focal_loss(volume, occupied, mask)
    torch.testing.assert_close(masked, focal["occ.loss_masked"], **CLOSE)


def test_published_detection_focal(focal) -> None:
    logits = focal["det.logits"].clone().requires_grad_()
    wanted = torch.nn.functional.one_hot(focal["det.labels"], 11)[:, :10].float()
    each = sigmoid_focal(logits, wanted) * focal["det.weights"][:, None]
    loss = losses.CLASS_WEIGHT * each.sum() / focal["det.avg_factor"].float()
    torch.testing.assert_close(loss, focal["det.loss"], **CLOSE)
    loss.backward()
    torch.testing.assert_close(logits.grad, focal["det.grad_logits"], **CLOSE)


def test_published_class_cost(focal) -> None:
    cost = losses.class_cost(focal["det.logits"], focal["cost.gt_labels"])
    torch.testing.assert_close(losses.CLASS_WEIGHT * cost, focal["cost.cls_cost"], **CLOSE)


def perfect(order: list[int], queries: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (Q, 4) and codes (Q, 10) that answer BOXES in the given order, then nothing."""
    logits, codes = torch.full((queries, 4), -8.0), torch.zeros(queries, 10)
    codes[: len(order)] = encode_boxes(BOXES)[order]
    logits[range(len(order)), LABELS[order]] = 8.0
    return logits, codes


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_queries_find_their_objects_in_any_order(order: list[int]) -> None:
    matches = losses.match(*perfect(order), encode_boxes(BOXES), LABELS)
    found = dict(zip(matches.target.tolist(), matches.query.tolist(), strict=True))
    assert [found[target] for target in order] == [0, 1, 2]


def test_the_right_answer_costs_nearly_nothing() -> None:
    logits, codes = (v[None, None] for v in perfect([1, 2, 0]))
    terms = losses.query_loss(logits, codes, [BOXES], [LABELS], WEIGHTS)
    assert set(terms) == {"loss_cls", "loss_bbox"}
    assert float(sum(terms.values())) < 1e-3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_objects(count: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 5, 4, requires_grad=True)
    codes = torch.randn(2, 2, 5, 10, requires_grad=True)
    boxes, labels = [BOXES[:count], BOXES[:0]], [LABELS[:count], LABELS[:0]]
    terms = losses.query_loss(logits, codes, boxes, labels, WEIGHTS)
    assert set(terms) == {"loss_cls", "loss_bbox", "d0.loss_cls", "d0.loss_bbox"}
    sum(terms.values()).backward()
    assert torch.isfinite(logits.grad).all()
    assert int((codes.grad.abs().sum(-1) > 0).sum()) == 2 * count  # both layers, matched queries only


def test_unknown_velocity_counts_as_nothing() -> None:
    boxes = BOXES.clone()
    boxes[:, 7:] = math.nan
    logits, codes = perfect([0, 1, 2])
    codes[:, 8:] = 100.0
    codes.requires_grad_()
    terms = losses.query_loss(logits[None, None], codes[None, None], [boxes], [LABELS], WEIGHTS)
    terms["loss_bbox"].backward()
    assert terms["loss_bbox"].item() == pytest.approx(0, abs=1e-5)
    assert (codes.grad[:, 8:] == 0).all()


def test_a_box_without_size_is_not_regressed() -> None:
    boxes = BOXES[:1].clone()
    boxes[0, 3] = 0
    codes = torch.zeros(1, 1, 5, 10, requires_grad=True)
    terms = losses.query_loss(torch.zeros(1, 1, 5, 4), codes, [boxes], [LABELS[:1]], WEIGHTS)
    sum(terms.values()).backward()
    assert float(terms["loss_bbox"]) == 0
    assert (codes.grad == 0).all()
