"""Targets and losses of the published CenterPoint heads, whose classes are split into tasks.

Their quirk is kept: truncated centres. Decoding stands in `occbev.inference.task_boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from occbev.grid import BevGrid
from occbev.inference.families.bevdet import BevDetModel
from occbev_training.losses.config import LossConfig
from occbev_training.losses.normalise import mean_over_processes
from occbev_training.losses.voxels_and_centres import draw_gaussians, gaussian_radius
from occbev_training.models.heads.centre_head import split_tasks

MAX_BOXES = 500
BOX_PARTS: Mapping[str, slice] = {
    "xy": slice(0, 2),
    "z": slice(2, 3),
    "whl": slice(3, 6),
    "yaw": slice(6, 8),
    "vel": slice(8, 10),
}
"""Channels of each reported part of the box loss."""


@dataclass(frozen=True)
class TaskTargets:
    """What one task should say of a batch.

    heatmap: (B, K, Y, X). place: (M,) flat index over (B, Y, X). box: (M, 10); velocity may be NaN.
    """

    heatmap: Tensor
    place: Tensor
    box: Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weights of the published recipes; the defaults are those of BEVDet."""

    heatmap: float = 1.0
    box: float = 0.25
    velocity: float = 0.2


def task_targets(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], tasks: Sequence[int], bev: BevGrid
) -> list[TaskTargets]:
    """Make every task's targets.

    boxes: (M, 9) per sample, geometric centres. labels: (M,) per sample, over all classes.
    tasks: number of classes of each task.
    """
    targets, first = [], 0
    for classes in tasks:
        mine = [_of_task(b, label, first, classes) for b, label in zip(boxes, labels, strict=True)]
        targets.append(_one_task([m[0] for m in mine], [m[1] for m in mine], classes, bev))
        first += classes
    return targets


def centre_losses(
    heatmap: Tensor,
    box: Tensor,
    targets: Sequence[TaskTargets],
    weights: LossWeights | None = None,
) -> dict[str, Tensor]:
    """Return the weighted loss terms of every task, named as published (`task0.loss_xy`).

    heatmap: (B, K, Y, X) logits. box: (B, tasks * 10, Y, X).
    """
    weights, terms = weights or LossWeights(), {}
    split = split_tasks(heatmap, box, [t.heatmap.shape[1] for t in targets])
    for index, ((scores, boxes), target) in enumerate(zip(split, targets, strict=True)):
        prefix = f"task{index}.loss_"
        terms[prefix + "heatmap"] = weights.heatmap * clamped_focal(scores, target.heatmap)
        error = _box_error(boxes, target) * weights.box
        for part, channels in BOX_PARTS.items():
            factor = weights.velocity if part == "vel" else 1.0
            terms[prefix + part] = factor * error[channels].sum()
    return terms


def task_terms(
    answers: Mapping[str, Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    model: BevDetModel,
    weights: LossConfig,
) -> dict[str, Tensor]:
    """Return the weighted terms `heatmap` and `box`, summed over tasks; boxes, labels: of each sample."""
    targets = task_targets(boxes, labels, model.bevdet.tasks, model.bev)
    factors = LossWeights(weights.heatmap, weights.box, weights.velocity)
    terms = centre_losses(answers["heatmap"], answers["box"], targets, factors)
    heatmap = [value for name, value in terms.items() if name.endswith("heatmap")]
    box = [value for name, value in terms.items() if not name.endswith("heatmap")]
    return {"heatmap": torch.stack(heatmap).sum(), "box": torch.stack(box).sum()}


def clamped_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss on probabilities clamped to [1e-4, 1 - 1e-4], per centre."""
    p = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = target == 1
    found = -((1 - p) ** 2) * (p + 1e-12).log()
    quiet = -((1 - target) ** 4) * p**2 * (1 - p + 1e-12).log()
    count = mean_over_processes(centre.sum().float()).clamp(min=1)
    count = count + torch.finfo(torch.float32).eps
    return torch.where(centre, found, quiet).sum() / count


def _of_task(box: Tensor, label: Tensor, first: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return a task's boxes and labels, class by class, at most MAX_BOXES."""
    mine = (label >= first) & (label < first + classes)
    box, label = box[mine].float(), label[mine].long() - first
    order = torch.argsort(label, stable=True)[:MAX_BOXES]
    return box[order], label[order]


def _one_task(boxes: Sequence[Tensor], labels: Sequence[Tensor], classes: int, bev: BevGrid) -> TaskTargets:
    box, label = torch.cat(list(boxes)), torch.cat(list(labels))
    sample = torch.cat([torch.full((len(b),), i, device=box.device) for i, b in enumerate(boxes)])
    place = (box[:, :2] - box.new_tensor(bev.lo)) / box.new_tensor(bev.pitch)
    cell = place.trunc()  # a centre up to one cell below the border counts as inside
    inside = ((cell >= 0) & (cell < cell.new_tensor(bev.shape))).all(1) & (box[:, 3:5] > 0).all(1)
    sample, box, label, place, cell = (v[inside] for v in (sample, box, label, place, cell))
    x, y = cell.long().unbind(1)
    columns, rows = bev.shape
    heatmap = box.new_zeros(len(boxes), classes, rows, columns)
    radius = gaussian_radius(box[:, 3] / bev.pitch[0], box[:, 4] / bev.pitch[1])
    draw_gaussians(heatmap, sample * classes + label, x, y, radius)
    yaw = box[:, 6:7]
    target = torch.cat([place - cell, box[:, 2:3], box[:, 3:6].log(), yaw.sin(), yaw.cos(), box[:, 7:9]], 1)
    return TaskTargets(heatmap, (sample * rows + y) * columns + x, target)


def _box_error(prediction: Tensor, target: TaskTargets) -> Tensor:
    """Return the mean absolute error of each channel (10,) at the centres; unknown values count 0."""
    count = mean_over_processes(prediction.new_tensor(float(len(target.place)), dtype=torch.float32))
    if len(target.place) == 0:
        return prediction.float().sum() * prediction.new_zeros(prediction.shape[1])
    at_centre = prediction.float().permute(0, 2, 3, 1).flatten(0, 2)[target.place]
    known = torch.isfinite(target.box)
    error = (at_centre - torch.where(known, target.box, at_centre.detach())).abs()
    return error.sum(0) / (count + 1e-4)
