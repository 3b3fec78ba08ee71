"""Targets, losses and decoding of the published CenterPoint heads, whose classes are split into tasks.

Their quirks are kept: truncated centres, class-agnostic suppression within a task, and circle radii that
squared distances are compared to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from occbev.grid import BevGrid
from occbev.inference.postprocess import rotated_nms
from occbev.results import Boxes3D
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

SCALE_FACTORS = (1.0, 0.7, 0.7, 0.4, 0.55, 1.1, 1.0, 1.0, 1.5, 3.5)
"""Factor on a box's size before rotated suppression, in class order: small things are made larger."""

CIRCLE_RADII = (4.0, 12.0, 10.0, 1.0, 0.85, 0.175)
"""Per task of six; a squared distance up to this suppresses."""


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


@dataclass(frozen=True)
class TaskDecoding:
    """How a task's maps become boxes.

    nms: "scale" for rotated overlap of scaled boxes, "circle" for centre distance.
    score: least score. reach: largest |x|, |y| and |z| of a centre.
    """

    nms: str = "scale"
    score: float = 0.1
    overlap: float = 0.2
    reach: tuple[float, float, float] = (61.2, 61.2, 10.0)
    candidates: int = 500
    kept: int = 500
    factors: tuple[float, ...] = SCALE_FACTORS
    radii: tuple[float, ...] = CIRCLE_RADII

    def __post_init__(self) -> None:
        if self.nms not in ("scale", "circle"):
            raise ValueError(f"nms {self.nms!r}: must be scale or circle")


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


def clamped_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss on probabilities clamped to [1e-4, 1 - 1e-4], per centre."""
    p = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = target == 1
    found = -((1 - p) ** 2) * (p + 1e-12).log()
    quiet = -((1 - target) ** 4) * p**2 * (1 - p + 1e-12).log()
    count = mean_over_processes(centre.sum().float()).clamp(min=1)
    count = count + torch.finfo(torch.float32).eps
    return torch.where(centre, found, quiet).sum() / count


def decode_tasks(
    heatmap: Tensor,
    box: Tensor,
    tasks: Sequence[int],
    bev: BevGrid,
    decoding: TaskDecoding | None = None,
) -> list[Boxes3D]:
    """Turn maps of a batch into boxes per sample, best first within each task; z is the centre's.

    Arguments as in `centre_losses`; tasks: number of classes of each task.
    """
    decoding = decoding or TaskDecoding()
    samples: list[list[Boxes3D]] = [[] for _ in range(len(heatmap))]
    first = 0
    for index, (scores, boxes) in enumerate(split_tasks(heatmap.detach(), box.detach(), tasks)):
        for sample, found in enumerate(samples):
            candidates = _candidates(scores[sample], boxes[sample], bev, decoding)
            kept = _suppress(candidates, index, first, decoding)
            found.append(Boxes3D(kept.box, kept.label + first, kept.score))
        first += tasks[index]
    return [_join(found) for found in samples]


def circle_nms(boxes: Boxes3D, radius: float) -> NDArray[np.bool_]:
    """Return which of (M,) boxes, best first, have no better kept one with squared distance <= radius."""
    offset = boxes.box[:, None, :2] - boxes.box[None, :, :2]
    rivals = (offset**2).sum(-1) <= radius
    keep = np.ones(len(boxes), bool)
    for index in range(len(boxes)):
        if keep[index]:
            keep[index + 1 :] &= ~rivals[index, index + 1 :]
    return keep


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


def _candidates(scores: Tensor, boxes: Tensor, bev: BevGrid, decoding: TaskDecoding) -> Boxes3D:
    """Return the best cells of (K, Y, X) with their boxes (10, Y, X); neighbours are not compared."""
    probability = scores.float().sigmoid().flatten(1)  # (K, Y * X)
    count = min(decoding.candidates, probability.shape[1])
    per_class, cells = probability.topk(count, 1)
    best, index = per_class.flatten().topk(min(decoding.candidates, per_class.numel()))
    label, cell = index // count, cells.flatten()[index]
    values = boxes.float().flatten(1)[:, cell].T.double()  # (M, 10)
    columns = bev.shape[0]
    place = torch.stack([cell % columns, cell // columns], 1) + values[:, :2]
    centre = place * values.new_tensor(bev.pitch) + values.new_tensor(bev.lo)
    yaw = torch.atan2(values[:, 6], values[:, 7])[:, None]
    box = torch.cat([centre, values[:, 2:3], values[:, 3:6].exp(), yaw, values[:, 8:10]], 1)
    near = (box[:, :3].abs() <= box.new_tensor(decoding.reach)).all(1) & (best > decoding.score)
    return Boxes3D(box[near].float().cpu().numpy(), label[near].cpu().numpy(), best[near].cpu().numpy())


def _suppress(boxes: Boxes3D, task: int, first: int, decoding: TaskDecoding) -> Boxes3D:
    if decoding.nms == "circle":
        return boxes[circle_nms(boxes, decoding.radii[task])][: decoding.kept]
    scaled = boxes.box.copy()
    scaled[:, 3:6] *= np.array(decoding.factors, np.float32)[boxes.label + first, None]
    alike = Boxes3D(scaled, np.zeros_like(boxes.label), boxes.score)  # all classes compete
    return boxes[rotated_nms(alike, decoding.overlap)][: decoding.kept]


def _join(parts: Sequence[Boxes3D]) -> Boxes3D:
    box, label, score = (np.concatenate([getattr(p, n) for p in parts]) for n in ("box", "label", "score"))
    return Boxes3D(box, label, score)
