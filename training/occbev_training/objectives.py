"""What each stage of training minimises: a network and a batch in, weighted loss terms out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from occbev.classes import FREE
from occbev.config import ImageConfig, ModelConfig
from occbev_training import losses
from occbev_training.centre_tasks import LossWeights, centre_losses, task_targets
from occbev_training.data.datasets import TrainingBatch
from occbev_training.models.network import NetworkOutput
from occbev_training.train_config import LossConfig


@dataclass(frozen=True)
class PretrainObjective:
    """Stage 1: reconstruct occupancy, with depth along the image rays where the network predicts it."""

    model: ModelConfig
    weights: LossConfig

    def __call__(self, network: nn.Module, batch: TrainingBatch) -> Mapping[str, Tensor]:
        """Return the weighted terms `reconstruction` and `depth`."""
        output = run_network(network, batch, self.model.image)
        logits = output.reconstruction_logits
        assert logits is not None, "stage 1 needs the occupancy decoder"
        if self.weights.occupancy == "occbev_paper":
            loss = losses.paper_loss(logits, batch.state)
        else:
            loss = losses.three_state_loss(logits, batch.state, batch.visible, batch.evidence)
        return {"reconstruction": self.weights.reconstruction * loss} | depth_term(
            output, batch, self.weights
        )


@dataclass(frozen=True)
class FinetuneObjective:
    """Stage 2: boxes and semantic occupancy, with depth kept as an auxiliary.

    class_weight: (K,) of the semantic classes, from the whole training set.
    """

    model: ModelConfig
    weights: LossConfig
    class_weight: Tensor

    def __call__(self, network: nn.Module, batch: TrainingBatch) -> Mapping[str, Tensor]:
        """Return the weighted terms of the heads that the network has, and `depth`.

        They are `heatmap` and `box` of detection, `semantics` and `occupied` of occupancy.
        """
        output = run_network(network, batch, self.model.image)
        terms: dict[str, Tensor] = {}
        if output.heatmap is not None and output.box is not None:
            terms |= self._detection(output.heatmap, output.box, batch)
        if output.occupancy_logits is not None:
            terms |= self._occupancy(output.occupancy_logits, batch)
        return terms | depth_term(output, batch, self.weights)

    def _detection(self, heatmap: Tensor, box: Tensor, batch: TrainingBatch) -> dict[str, Tensor]:
        weights, bev = self.weights, self.model.bev
        if self.model.bevdet is not None:
            tasks = self.model.bevdet.tasks
            targets = task_targets(batch.boxes, batch.labels, tasks, bev)
            published = LossWeights(weights.heatmap, weights.box, weights.velocity)
            return by_head(centre_losses(heatmap, box, targets, published))
        classes = len(self.model.detection_classes)
        centres = losses.centre_targets(batch.boxes, batch.labels, bev, classes)
        return {
            "heatmap": weights.heatmap * losses.heatmap_loss(heatmap, centres.heatmap),
            "box": weights.box * losses.box_loss(box, centres, weights.velocity),
        }

    def _occupancy(self, logits: Tensor, batch: TrainingBatch) -> dict[str, Tensor]:
        weights, counts = self.weights, batch.semantics_mask.flatten(1).sum(1).tolist()
        logits, semantics = at_voxels(logits, batch.semantics, batch.semantics_mask)
        mask = torch.ones_like(semantics, dtype=torch.bool)
        loss = losses.semantic_loss(logits, semantics, mask, self.class_weight)
        terms = {"semantics": weights.semantics * loss}
        # Losses of whole regions: of each sample, so that it does not matter which samples share a batch.
        probability = (
            logits.float().softmax(1)[0, :, 0, 0].split(counts, 1)
        )  # (K, M) of each sample
        labels = semantics.flatten().long().split(counts)
        for name, weight, region in (
            ("occupied", weights.occupied, occupied_iou),
            ("lovasz", weights.lovasz, losses.lovasz_softmax),
            ("geometric_scale", weights.geometric_scale, losses.geometric_scale_loss),
            ("semantic_scale", weights.semantic_scale, losses.semantic_scale_loss),
        ):
            if weight:
                each = [region(p, label) for p, label in zip(probability, labels, strict=True)]
                terms[name] = weight * torch.stack(each).mean()
        return terms


def occupied_iou(probability: Tensor, labels: Tensor) -> Tensor:
    """Lovasz surrogate of the occupied IoU; probability (K, M), labels (M,), both of one sample."""
    return losses.lovasz(1 - probability[FREE], labels != FREE)


def depth_term(
    output: NetworkOutput, batch: TrainingBatch, weights: LossConfig
) -> dict[str, Tensor]:
    """Return the weighted depth loss of networks that predict depth."""
    if output.depth_logits is None or not weights.depth:
        return {}
    loss = losses.depth_loss(output.depth_logits, batch.depth_bin, weights.depth_kind)
    return {"depth": weights.depth * loss}


def by_head(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the terms of all tasks up to `heatmap` and `box`."""
    heatmap = [value for name, value in terms.items() if name.endswith("heatmap")]
    box = [value for name, value in terms.items() if not name.endswith("heatmap")]
    return {"heatmap": torch.stack(heatmap).sum(), "box": torch.stack(box).sum()}


def at_voxels(logits: Tensor, semantics: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the M voxels of a mask: logits (1, K, 1, 1, M) and semantics (1, 1, 1, M).

    A softmax over every voxel of the grid would cost more than the rest of the head.
    """
    chosen = [torch.nonzero(one.flatten()).squeeze(1) for one in mask]
    columns = [one.flatten(1).index_select(1, at) for one, at in zip(logits, chosen, strict=True)]
    labels = [one.flatten()[at] for one, at in zip(semantics, chosen, strict=True)]
    return torch.cat(columns, 1)[None, :, None, None], torch.cat(labels)[None, None, None]


def run_network(network: nn.Module, batch: TrainingBatch, image: ImageConfig) -> NetworkOutput:
    """Normalise the images of a batch and run the network."""
    images = normalised(batch.images, image) * batch.camera_valid[:, :, None, None, None]
    if batch.shown is not None:
        images = images * batch.shown[:, None, None]
    output: NetworkOutput = network(images, batch.camera_valid, batch.points)
    return output


def normalised(images: Tensor, image: ImageConfig) -> Tensor:
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
