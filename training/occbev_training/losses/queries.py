"""Matching and losses of object queries (Carion et al. 2020): one query per object, the others learn "no object".

Every term is 0 where nothing is labelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from occbev.config import ModelConfig
from occbev.grid import BevGrid
from occbev_training.losses.config import LossConfig
from occbev_training.losses.normalise import mean_over_processes
from occbev_training.losses.voxels_and_centres import sigmoid_focal
from occbev_training.models.heads.query_head import CODE_VALUES, VELOCITY_WEIGHT, encode_boxes

CLASS_WEIGHT = 2.0
BOX_WEIGHT = 0.25
MATCHED_VALUES = 8
"""Values of a box code that matching compares: all but velocity."""

_IMPOSSIBLE = 1e4


@dataclass(frozen=True)
class Matches:
    """Which query finds which object: (M,) indices each."""

    query: Tensor
    target: Tensor


def query_terms(
    answers: Mapping[str, Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    model: ModelConfig,
    weights: LossConfig,
) -> dict[str, Tensor]:
    """Return the weighted terms `query_class` and `query_box`, summed over layers; boxes, labels: of each sample."""
    near = [_within(box, model.bev) for box in boxes]
    boxes = [box[keep] for box, keep in zip(boxes, near, strict=True)]
    labels = [label[keep] for label, keep in zip(labels, near, strict=True)]
    codes = answers["box_codes"].float()
    code_weights = codes.new_tensor([1.0] * (CODE_VALUES - 2) + [VELOCITY_WEIGHT] * 2)
    each = query_loss(answers["class_logits"].float(), codes, boxes, labels, code_weights)
    return {
        f"query_{name}": weights.queries * torch.stack([v for k, v in each.items() if k.endswith(suffix)]).sum()
        for name, suffix in (("class", "loss_cls"), ("box", "loss_bbox"))
    }


def _within(boxes: Tensor, bev: BevGrid) -> Tensor:
    """Return which of (M, 9) boxes have their centre inside the BEV: references reach no further."""
    lo, hi = boxes.new_tensor(bev.lo), boxes.new_tensor(bev.hi)
    return ((boxes[:, :2] >= lo) & (boxes[:, :2] <= hi)).all(1)


def match(logits: Tensor, codes: Tensor, target_codes: Tensor, labels: Tensor) -> Matches:
    """Assign queries to the objects of one sample at the least cost.

    logits: (Q, K). codes: (Q, 10). target_codes: (M, 10). labels: (M,). All objects are found if Q >= M.
    """
    with torch.no_grad():
        matched = slice(0, MATCHED_VALUES)
        distance = torch.cdist(codes[:, matched].float(), target_codes[:, matched].float(), p=1)
        cost = CLASS_WEIGHT * class_cost(logits.float(), labels) + BOX_WEIGHT * distance
        cost = torch.nan_to_num(cost, _IMPOSSIBLE, _IMPOSSIBLE, -_IMPOSSIBLE)
        query, target = linear_sum_assignment(cost.cpu().numpy())
    return Matches(*(torch.as_tensor(i, device=logits.device) for i in (query, target)))


def class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the focal loss (Q, M) that saying each object's class adds to saying nothing."""
    score = logits.sigmoid()[:, labels]
    found = -alpha * (1 - score) ** gamma * (score + 1e-12).log()
    quiet = -(1 - alpha) * score**gamma * (1 - score + 1e-12).log()
    return found - quiet


def query_loss(
    class_logits: Tensor,
    box_codes: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    code_weights: Tensor,
) -> dict[str, Tensor]:
    """Return `loss_cls` and `loss_bbox` of the last decoder layer and `d0.loss_cls` .. of those before.

    class_logits: (L, B, Q, K). box_codes: (L, B, Q, 10). boxes: (M, 9) per sample, in the frame of the
    codes. labels: (M,) per sample. code_weights: (10,). Unknown (NaN) velocities count as nothing, boxes
    that are not finite otherwise are matched but not regressed.
    """
    targets = [encode_boxes(b.to(box_codes)) for b in boxes]
    terms = {}
    last = len(class_logits) - 1
    for layer, (logits, codes) in enumerate(zip(class_logits, box_codes, strict=True)):
        name = "" if layer == last else f"d{layer}."
        cls, box = layer_loss(logits, codes, targets, labels, code_weights)
        terms[f"{name}loss_cls"], terms[f"{name}loss_bbox"] = cls, box
    return terms


def layer_loss(
    logits: Tensor,
    codes: Tensor,
    targets: Sequence[Tensor],
    labels: Sequence[Tensor],
    code_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the weighted class and box loss of one layer; logits (B, Q, K), codes and targets (M, 10)."""
    wanted = torch.zeros_like(logits)
    found, truth = [], []
    for sample, (target, label) in enumerate(zip(targets, labels, strict=True)):
        label = label.to(logits.device, torch.int64)
        matches = match(logits[sample], codes[sample], target, label)
        wanted[sample, matches.query, label[matches.target]] = 1
        found.append(codes[sample, matches.query])
        truth.append(target[matches.target])
    positives = mean_over_processes(wanted.sum()).clamp(min=1)
    cls = sigmoid_focal(logits.float(), wanted.float()).sum() / positives
    box = box_code_loss(torch.cat(found), torch.cat(truth), code_weights) / positives
    return CLASS_WEIGHT * torch.nan_to_num(cls), BOX_WEIGHT * torch.nan_to_num(box)


def box_code_loss(codes: Tensor, targets: Tensor, code_weights: Tensor) -> Tensor:
    """Return the weighted L1 sum over (M, 10) codes."""
    usable = torch.isfinite(targets[:, :MATCHED_VALUES]).all(1, keepdim=True)
    known = torch.isfinite(targets) & usable
    error = (codes - torch.where(known, targets, codes.detach())).abs()
    return (error * code_weights * known).sum()
