"""What each stage of training minimises: a network and a batch in, weighted loss terms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from occbev.classes import FREE
from occbev.config import ImageConfig, ModelConfig
from occbev_training.data.datasets import TrainingBatch
from occbev_training.losses import voxels_and_centres as losses
from occbev_training.losses.centre_heads import task_terms
from occbev_training.losses.config import LossConfig
from occbev_training.losses.queries import query_terms
from occbev_training.models.families import training_family
from occbev_training.models.heads.occupancy_head import CELL_FACTORS, logits_at
from occbev_training.models.network import NetworkOutput

Answers = Mapping[str, Tensor]
"""Output of a head -> tensor, see `NetworkOutput.answers`."""


@dataclass(frozen=True)
class PretrainObjective:
    """Stage 1: reconstruct occupancy, with depth along the image rays where the network predicts it."""

    model: ModelConfig
    weights: LossConfig

    def __call__(self, network: nn.Module, batch: TrainingBatch) -> Mapping[str, Tensor]:
        """Return the weighted terms `reconstruction` and `depth`."""
        output = run_network(network, batch, self.model)
        logits = output.answers["reconstruction_logits"]
        if self.weights.occupancy == "occbev_paper":
            loss = losses.paper_loss(logits, batch.state)
        else:
            loss = losses.three_state_loss(logits, batch.state, batch.visible, batch.evidence)
        return {"reconstruction": self.weights.reconstruction * loss} | depth_term(output, batch, self.weights)


@dataclass(frozen=True)
class FinetuneObjective:
    """Stage 2: boxes and semantic occupancy, or geometric where nothing has classes, with depth as an auxiliary.

    class_weight: (K,) of the semantic classes, from the whole training set.
    """

    model: ModelConfig
    weights: LossConfig
    class_weight: Tensor

    def __call__(self, network: nn.Module, batch: TrainingBatch) -> Mapping[str, Tensor]:
        """Return the weighted terms of the heads that the network has, and `depth`.

        They are `heatmap` and `box`, or `query_class` and `query_box` of detection, `semantics`, `occupied` and
        further losses of occupancy.
        """
        output = run_network(network, batch, self.model)
        terms: dict[str, Tensor] = {}
        for head in training_family(self.model).heads:
            if head.answered(output.answers):
                terms |= HEAD_LOSSES[head.loss](output.answers, batch, self)
        return terms | depth_term(output, batch, self.weights)


def semantic_terms(answers: Answers, batch: TrainingBatch, objective: FinetuneObjective) -> dict[str, Tensor]:
    """Return the weighted terms of the semantic head: `semantics` and those of whole regions that have a weight."""
    weights, counts = objective.weights, batch.semantics_mask.flatten(1).sum(1).tolist()
    logits, semantics = at_voxels(answers, batch.semantics, batch.semantics_mask)
    mask = torch.ones_like(semantics, dtype=torch.bool)
    loss = losses.semantic_loss(logits, semantics, mask, objective.class_weight)
    terms = {"semantics": weights.semantics * loss}
    # Losses of whole regions: of each sample, so that it does not matter which samples share a batch.
    probability = logits.float().softmax(1)[0, :, 0, 0].split(counts, 1)  # (K, M) of each sample
    labels = semantics.flatten().long().split(counts)
    for name, weight, region in (
        ("occupied", weights.occupied, score_occupied_iou),
        ("lovasz", weights.lovasz, losses.lovasz_softmax),
        ("geometric_scale", weights.geometric_scale, losses.geometric_scale_loss),
        ("semantic_scale", weights.semantic_scale, losses.semantic_scale_loss),
    ):
        if weight:
            each = [region(p, label) for p, label in zip(probability, labels, strict=True)]
            terms[name] = weight * torch.stack(each).mean()
    return terms


def geometry_terms(answers: Answers, batch: TrainingBatch, objective: FinetuneObjective) -> dict[str, Tensor]:
    """Return the weighted term `reconstruction` of a decoder that goes on learning beside the boxes."""
    logits = answers["reconstruction_logits"]
    loss = losses.three_state_loss(logits, batch.state, batch.visible, batch.evidence)
    return {"reconstruction": objective.weights.reconstruction * loss}


HeadLoss = Callable[[Answers, TrainingBatch, FinetuneObjective], dict[str, Tensor]]
"""Weighted terms of a head that answered."""

BoxLoss = Callable[[Answers, Sequence[Tensor], Sequence[Tensor], Any, LossConfig], dict[str, Tensor]]
"""The same of boxes (M, 9) and labels (M,) of each sample, a model, and the weights."""


def _of_boxes(terms: BoxLoss) -> HeadLoss:
    return lambda answers, batch, objective: terms(
        answers, batch.boxes, batch.labels, objective.model, objective.weights
    )


HEAD_LOSSES: Mapping[str, HeadLoss] = {
    "geometry": geometry_terms,
    "semantics": semantic_terms,
    "centres": _of_boxes(losses.centre_terms),
    "tasks": _of_boxes(task_terms),
    "queries": _of_boxes(query_terms),
}
"""`Head.loss` -> what a head of that kind minimises in stage 2."""


def score_occupied_iou(probability: Tensor, labels: Tensor) -> Tensor:
    """Lovasz surrogate of the occupied IoU; probability (K, M), labels (M,), both of one sample."""
    return losses.lovasz(1 - probability[FREE], labels != FREE)


def depth_term(output: NetworkOutput, batch: TrainingBatch, weights: LossConfig) -> dict[str, Tensor]:
    """Return the weighted depth loss of networks that predict depth."""
    if output.depth_logits is None or not weights.depth:
        return {}
    loss = losses.depth_loss(output.depth_logits, batch.depth_bin, weights.depth_kind)
    return {"depth": weights.depth * loss}


def at_voxels(answers: Answers, semantics: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the M voxels of a mask: logits (1, K, 1, 1, M) and semantics (1, 1, 1, M).

    answers: those of a semantic head, its outputs or its factors. A softmax over every voxel of the grid would cost more
    than the rest of the head.
    """
    chosen = [torch.nonzero(one.flatten()).squeeze(1) for one in mask]
    columns = [semantic_logits(answers, i, at) for i, at in enumerate(chosen)]
    labels = [one.flatten()[at] for one, at in zip(semantics, chosen, strict=True)]
    return torch.cat(columns, 1)[None, :, None, None], torch.cat(labels)[None, None, None]


def semantic_logits(answers: Answers, sample: int, voxels: Tensor) -> Tensor:
    """Return the logits (K, M) of a semantic head at flat voxels (M,) of a sample."""
    if "occupancy_logits" in answers:
        return answers["occupancy_logits"][sample].flatten(1).index_select(1, voxels)
    occupied, kinds = (answers[name][sample] for name in CELL_FACTORS)
    return logits_at(occupied, kinds, voxels)


def run_network(network: nn.Module, batch: TrainingBatch, model: ModelConfig) -> NetworkOutput:
    """Normalise the images of a batch and run the network, with what it is to remember."""
    images = shown(batch.images, batch.camera_valid, batch.shown, model.image)
    past = [replace(frame, images=shown(frame.images, frame.camera_valid, None, model.image)) for frame in batch.past]
    family = training_family(model)
    return family.run(network, images, batch.camera_valid, batch.geometry, past, batch.motion)


def shown(images: Tensor, camera_valid: Tensor, pixels: Tensor | None, image: ImageConfig) -> Tensor:
    """Return network input of (B, N, 3, h, w) uint8 images; cameras and pixels that are not shown are zero."""
    out = normalise_images(images, image) * camera_valid[:, :, None, None, None]
    return out if pixels is None else out * pixels[:, None, None]


def normalise_images(images: Tensor, image: ImageConfig) -> Tensor:
    """Turn (B, N, 3, h, w) uint8 RGB into network input; the memory order of the images is kept."""
    if image.channel_order == "bgr_swapped":
        images = images.flip(2)
    mean, std = (
        images.new_tensor(image.mean, dtype=torch.float32),
        images.new_tensor(image.std, dtype=torch.float32),
    )
    return (images.float() - mean[:, None, None]) / std[:, None, None]


def prefer_channels_last(network: nn.Module) -> None:
    """Store the weights of 2D convolutions channels last, the layout that CPUs and tensor cores want."""
    for weight in network.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def keep_large_depthwise_in_float32(network: nn.Module) -> None:
    """Run depthwise convolutions over 3x3 in float32 under autocast.

    On CPUs their bfloat16 backward pass takes four to eight times as long as the float32 one
    (measured: 84 against 19 ms for 672 channels of 8x22, 12 images).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.kernel_size) > 3:
            _disable_autocast(module)


def _disable_autocast(module: nn.Module) -> None:
    forward = module.forward

    def in_float32(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = forward(x.float())
            return result.to(x.dtype)

    module.forward = in_float32  # type: ignore[method-assign]
