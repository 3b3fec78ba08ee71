"""Losses of both stages: occupancy in three states, depth, box centres, boxes, semantic occupancy.

Every one is a sum over what is labelled, divided by how much that is, and is 0 where nothing is. How much
it is counts in all processes, so that many of them learn what one would from the joined batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from occbev.classes import FREE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.grid import BevGrid
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev_training.losses.config import LossConfig
from occbev_training.losses.normalise import mean_over_processes

LIDAR_ONLY_WEIGHT = 0.25
"""Weight of voxels that no camera sees: without them surfaces grow thick behind their first hit."""

MIN_RADIUS = 2
"""Smallest radius of a centre's Gaussian, in cells."""


# --- stage 1 ---------------------------------------------------------------------------------


def three_state_loss(logits: Tensor, state: Tensor, visible: Tensor, evidence: Tensor) -> Tensor:
    """Reconstruct what was observed, and say nothing of the rest.

    logits: (B, 2, Z, Y, X), free and occupied. state: (B, Z, Y, X), see `occbev.classes`.
    visible: (B, Z, Y, X) bool, seen by a living camera.
    evidence: (B, Z, Y, X), LiDAR sweeps that hit the voxel or passed through it.
    """
    observed = torch.nonzero(state.flatten() != UNOBSERVED_STATE).squeeze(1)
    occupied = state.flatten()[observed] == OCCUPIED_STATE
    weight = observation_weights(occupied, visible.flatten()[observed], evidence.flatten()[observed])
    score = (logits[:, 1] - logits[:, 0]).flatten()[observed].float()
    loss = functional.binary_cross_entropy_with_logits(score, occupied.float(), reduction="none")
    return (weight * loss).sum() / mean_over_processes(weight.sum()).clamp(min=1e-6)


def observation_weights(occupied: Tensor, visible: Tensor, evidence: Tensor) -> Tensor:
    """Return the weight (M,) of M observed voxels: visibility x confidence x class balance.

    The classes are balanced by the inverse root of their frequency among the voxels given.
    """
    confidence = 1 - torch.exp(-evidence.float() / 2)
    seen = torch.where(visible.bool(), 1.0, LIDAR_ONLY_WEIGHT)
    count = mean_over_processes(torch.stack([occupied.sum(), (~occupied).sum()]).float())
    share = count[0] / count.sum().clamp(min=1)
    balance = torch.where(occupied, share, 1 - share).clamp(min=1e-4).rsqrt()
    return confidence * seen * balance


def paper_loss(logits: Tensor, state: Tensor) -> Tensor:
    """Occ-BEV's published loss: focal over all voxels, what was not observed counting as free."""
    return voxel_focal_loss(logits, state == OCCUPIED_STATE)


def voxel_focal_loss(logits: Tensor, occupied: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the focal loss over both channels, each a target of its own.

    logits: (B, 2, Z, Y, X). occupied: (B, Z, Y, X) bool. mask: restrict to these voxels; the sum over both
    channels is then divided by the voxels, as published, else by the entries.
    """
    wanted = torch.stack([~occupied, occupied], 1).to(logits.dtype)
    loss = sigmoid_focal(logits, wanted)
    if mask is None:
        return loss.mean()
    return (loss * mask[:, None]).sum() / mean_over_processes(mask.sum().float()).clamp(min=1)


def sigmoid_focal(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of each entry (Lin et al. 2017, eq. 5); target of 0 and 1."""
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = torch.where(target > 0.5, torch.sigmoid(-logits), torch.sigmoid(logits))
    weight = torch.where(target > 0.5, alpha, 1 - alpha)
    return weight * missed**gamma * cross_entropy


def depth_loss(logits: Tensor, bins: Tensor, kind: str = "ce") -> Tensor:
    """Supervise the depth distribution where a LiDAR return gives it.

    logits: (B, N, D, h, w). bins: (B, N, h, w) int64, negative where unknown.
    kind: "ce", or "bce" for BEVDepth's sum of binary terms over all bins.
    """
    labelled = bins >= 0
    scores = logits.movedim(2, -1)[labelled].float()  # (M, D)
    target = bins[labelled]
    if kind == "bce":
        return depth_bce(scores.softmax(1), target)
    if kind != "ce":
        raise ValueError(f"depth loss {kind!r}: must be ce or bce")
    total = functional.cross_entropy(scores, target, reduction="sum")
    return total / mean_over_processes(labelled.sum().float()).clamp(min=1)


def depth_bce(probability: Tensor, bins: Tensor) -> Tensor:
    """BEVDepth's loss: binary cross-entropy over all bins, per supervised cell.

    probability: (M, D). bins: (M,), negative where unknown.
    """
    labelled = bins >= 0
    with torch.autocast(probability.device.type, enabled=False):
        one_hot = functional.one_hot(bins[labelled], probability.shape[1]).float()
        total = functional.binary_cross_entropy(probability[labelled].float(), one_hot, reduction="sum")
    return total / mean_over_processes(labelled.sum().float()).clamp(min=1)


# --- stage 2: semantic occupancy -------------------------------------------------------------


def semantic_loss(logits: Tensor, semantics: Tensor, mask: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Cross-entropy over the voxels of the mask.

    logits: (B, K, Z, Y, X). semantics: (B, Z, Y, X) class. mask: (B, Z, Y, X) bool.
    class_weight: (K,), by default those of `balanced_weights` over this batch.
    """
    target = torch.where(mask, semantics.long(), _IGNORED)
    if class_weight is None:
        counts = torch.bincount(semantics[mask].long(), minlength=logits.shape[1])
        class_weight = balanced_weights(counts)
    weight = class_weight.to(logits.device, torch.float32)
    total = functional.cross_entropy(
        logits.float().flatten(2), target.flatten(1), weight, ignore_index=_IGNORED, reduction="sum"
    )
    counted = weight[semantics[mask].long()].sum()
    return total / mean_over_processes(counted).clamp(min=1e-6)


_IGNORED = 255


def balanced_weights(counts: Tensor, max_weight: float = 10.0) -> Tensor:
    """Return the inverse root of each class's frequency (K,), relative to the commonest class.

    max_weight: the largest weight, which classes that do not occur get as well.
    """
    common = counts.max().clamp(min=1).float()
    return (common / counts.float().clamp(min=1)).sqrt().clamp(max=max_weight)


def lovasz_softmax(probability: Tensor, labels: Tensor) -> Tensor:
    """Mean Lovasz surrogate over the classes that occur (Berman et al. 2018, eq. 9).

    probability: (K, M). labels: (M,) class.
    """
    present = torch.unique(labels).tolist()
    if not present:
        return probability.sum() * 0
    return torch.stack([lovasz(probability[c], labels == c) for c in present]).mean()


def geometric_scale_loss(probability: Tensor, labels: Tensor, free: int = FREE) -> Tensor:
    """Scene-class affinity of occupied against free (Cao & de Charette 2022, eq. 2).

    Arguments as in `lovasz_softmax`. Returns 0 where no voxel is occupied.
    """
    return class_affinity(1 - probability[free], labels != free)


def semantic_scale_loss(probability: Tensor, labels: Tensor) -> Tensor:
    """Mean scene-class affinity over the classes that occur; arguments as in `lovasz_softmax`."""
    present = torch.unique(labels).tolist()
    if not present:
        return probability.sum() * 0
    return torch.stack([class_affinity(probability[c], labels == c) for c in present]).mean()


def class_affinity(probability: Tensor, target: Tensor) -> Tensor:
    """Return -log precision - log recall - log specificity of one class, each where it is defined.

    probability: (M,). target: (M,) bool.
    """
    wanted = target.float()
    if not bool(target.any()):
        return probability.sum() * 0
    hit = (probability * wanted).sum()
    terms = [_minus_log(hit / probability.sum().clamp(min=1e-12)), _minus_log(hit / wanted.sum())]
    others = 1 - wanted
    if bool(others.any()):
        terms.append(_minus_log(((1 - probability) * others).sum() / others.sum()))
    return torch.stack(terms).sum()


def _minus_log(value: Tensor) -> Tensor:
    return -value.clamp(min=1e-12, max=1.0).log()


def lovasz(probability: Tensor, target: Tensor) -> Tensor:
    """Lovasz extension of the Jaccard loss of one class (Berman et al. 2018, alg. 1).

    probability: (M,). target: (M,) bool. Returns 0 where no voxel is of the class.
    """
    positives = target.sum()
    if positives == 0:
        return probability.sum() * 0
    error, order = torch.sort((target.float() - probability).abs(), descending=True)
    truth = target[order].float()
    intersection = positives - truth.cumsum(0)
    union = positives + (1 - truth).cumsum(0)
    jaccard = 1 - intersection / union
    return (error * torch.diff(jaccard, prepend=jaccard.new_zeros(1))).sum()


# --- stage 2: boxes --------------------------------------------------------------------------


@dataclass(frozen=True)
class CentreTargets:
    """What the detection head should say of a batch.

    heatmap: (B, K, Y, X), 1 at centres. place: (M,) flat index over (B, Y, X) of cells that have a box to learn.
    box: (M, 10) in the channels of the head; velocities are NaN where unknown.
    """

    heatmap: Tensor
    place: Tensor
    box: Tensor


def centre_targets(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], grid: BevGrid, classes: int, reach: int = 0
) -> CentreTargets:
    """Make the targets of a batch (Yin et al. 2021, section 3).

    boxes: (M, 9) per sample, in the frame of `grid`. labels: (M,) per sample. reach: as `DetectionHeadConfig.reach`.
    Boxes whose centre is outside the grid, or with a size that is not positive, are left out.
    """
    sample = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)]).long()
    box, label = torch.cat(list(boxes)).float(), torch.cat(list(labels)).long()
    sample = sample.to(box.device)
    place = (box[:, :2] - box.new_tensor(grid.lo)) / box.new_tensor(grid.pitch)
    cell = place.floor()
    inside = ((cell >= 0) & (cell < cell.new_tensor(grid.shape))).all(1)
    kept = inside & (box[:, 3:6] > 0).all(1)
    sample, box, label, place, cell = (v[kept] for v in (sample, box, label, place, cell))
    x, y = cell.long().unbind(1)
    columns, rows = grid.shape
    radius = gaussian_radius(box[:, 3] / grid.pitch[0], box[:, 4] / grid.pitch[1])
    heatmap = box.new_zeros(len(boxes), classes, rows, columns)
    draw_gaussians(heatmap, sample * classes + label, x, y, radius)
    target = torch.cat(
        [place - cell, box[:, 2:3], box[:, 3:6].log(), box[:, 6:7].sin(), box[:, 6:7].cos(), box[:, 7:9]], 1
    )
    if reach == 0:
        return CentreTargets(heatmap, (sample * rows + y) * columns + x, target)
    return CentreTargets(heatmap, *_spread(target, sample, x, y, reach, (len(boxes), rows, columns)))


def _spread(
    target: Tensor, sample: Tensor, x: Tensor, y: Tensor, reach: int, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Give the cells around each centre its box as seen from there; a cell between two centres takes the nearer one.

    target: (M, 10) at the centres. sample, x, y: (M,). shape: (B, Y, X).
    Returns: place and box as in `CentreTargets`.
    """
    steps = torch.arange(-reach, reach + 1, device=x.device)
    dy, dx = (d.flatten() for d in torch.meshgrid(steps, steps, indexing="ij"))
    px, py = x[:, None] + dx, y[:, None] + dy  # (M, cells of one box)
    inside = (px >= 0) & (px < shape[2]) & (py >= 0) & (py < shape[1])
    place = ((sample[:, None] * shape[1] + py) * shape[2] + px)[inside]
    near = target[:, None].repeat(1, len(dx), 1)
    near[:, :, 0] -= dx
    near[:, :, 1] -= dy
    near = near[inside]
    distance = (near[:, :2] - 0.5).square().sum(1)  # from the cell's centre
    nearest = distance.new_full((shape[0] * shape[1] * shape[2],), torch.inf)
    nearest.scatter_reduce_(0, place, distance, "amin")
    chosen = distance == nearest[place]
    return place[chosen], near[chosen]


def gaussian_radius(length: Tensor, width: Tensor, overlap: float = 0.1) -> Tensor:
    """Return how far in cells (M,) a box's centre may move and still overlap (Law & Deng 2018).

    length, width: (M,) in cells. The divisor 2 in all three roots is theirs, and everyone's since.
    """
    total, area = length + width, length * width
    one = (total + (total**2 - 4 * area * (1 - overlap) / (1 + overlap)).clamp(min=0).sqrt()) / 2
    two = (2 * total + (4 * total**2 - 16 * (1 - overlap) * area).clamp(min=0).sqrt()) / 2
    b = -2 * overlap * total
    three = (b + (b**2 + 16 * overlap * (1 - overlap) * area).sqrt()) / 2
    return torch.stack([one, two, three]).amin(0).floor().clamp(min=MIN_RADIUS)


def draw_gaussians(maps: Tensor, plane: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> None:
    """Draw a peak of 1 at each (x, y) of a plane; where peaks meet the higher one stays."""
    if len(plane) == 0:
        return
    rows, columns = maps.shape[-2:]
    reach = int(radius.max())
    steps = torch.arange(-reach, reach + 1, device=maps.device)
    dy, dx = (d.flatten() for d in torch.meshgrid(steps, steps, indexing="ij"))
    sigma = ((2 * radius + 1) / 6)[:, None]
    value = torch.exp(-(dx**2 + dy**2) / (2 * sigma**2))  # (M, reach^2)
    px, py = x[:, None] + dx, y[:, None] + dy
    near = (dx.abs() <= radius[:, None]) & (dy.abs() <= radius[:, None])
    drawn = near & (px >= 0) & (px < columns) & (py >= 0) & (py < rows)
    place = ((plane[:, None] * rows + py) * columns + px)[drawn]
    maps.view(-1).scatter_reduce_(0, place, value[drawn], "amax")


def centre_terms(
    answers: Mapping[str, Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    model: LiftSplatModel,
    weights: LossConfig,
) -> dict[str, Tensor]:
    """Return the weighted terms `heatmap` and `box` of our own centre head; boxes, labels: of each sample."""
    centres = centre_targets(boxes, labels, model.bev, len(model.detection_classes), model.detection.reach)
    return {
        "heatmap": weights.heatmap * heatmap_loss(answers["heatmap"], centres.heatmap),
        "box": weights.box * box_loss(answers["box"], centres, weights.velocity),
    }


def heatmap_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss of centres (Zhou et al. 2019, eq. 1), per object.

    logits, target: (B, K, Y, X).
    """
    logits = logits.float()
    probability = torch.sigmoid(logits)
    found = -((1 - probability) ** 2) * functional.logsigmoid(logits)
    quiet = -((1 - target) ** 4) * probability**2 * functional.logsigmoid(-logits)
    centre = target == 1
    count = mean_over_processes(centre.sum().float()).clamp(min=1)
    return torch.where(centre, found, quiet).sum() / count


def box_loss(prediction: Tensor, targets: CentreTargets, velocity: float = 0.2) -> Tensor:
    """L1 over the box channels at the places of boxes, summed over channels, per place.

    prediction: (B, 10, Y, X). velocity: weight of the two velocity channels; unknown ones count 0.
    """
    count = mean_over_processes(prediction.new_tensor(float(len(targets.place))))
    if len(targets.place) == 0:
        return prediction.float().sum() * 0
    at_centre = prediction.float().permute(0, 2, 3, 1).flatten(0, 2)[targets.place]  # (M, 10)
    known = torch.isfinite(targets.box)
    error = (at_centre - torch.where(known, targets.box, at_centre.detach())).abs()
    weight = error.new_ones(error.shape[1])
    weight[-2:] = velocity
    return (error * weight).sum() / count
