"""What each stage of training minimises: a network and a batch in, weighted loss terms out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from occbev.classes import FREE
from occbev.config import ConfigError, ImageConfig, ModelConfig
from occbev.grid import BevGrid
from occbev_training.data.datasets import TrainingBatch
from occbev_training.data.windows import PastFrames
from occbev_training.losses import voxels_and_centres as losses
from occbev_training.losses.centre_heads import LossWeights, centre_losses, task_targets
from occbev_training.losses.config import LossConfig
from occbev_training.losses.queries import query_loss
from occbev_training.models.geometry import Geometry
from occbev_training.models.heads.query_head import CODE_VALUES, VELOCITY_WEIGHT
from occbev_training.models.lift_splat.lift_splat import BatchedPoints
from occbev_training.models.network import Frame, NetworkOutput
from occbev_training.models.queries.bevformer import BevFormerViews, Motion
from occbev_training.models.queries.query_networks import BevFormerNetwork, PastFrame, remember


@dataclass(frozen=True)
class PretrainObjective:
    """Stage 1: reconstruct occupancy, with depth along the image rays where the network predicts it."""

    model: ModelConfig
    weights: LossConfig

    def __call__(self, network: nn.Module, batch: TrainingBatch) -> Mapping[str, Tensor]:
        """Return the weighted terms `reconstruction` and `depth`."""
        output = run_network(network, batch, self.model)
        logits = output.reconstruction_logits
        assert logits is not None, "stage 1 needs the occupancy decoder"
        if self.weights.occupancy == "occbev_paper":
            loss = losses.paper_loss(logits, batch.state)
        else:
            loss = losses.three_state_loss(logits, batch.state, batch.visible, batch.evidence)
        return {"reconstruction": self.weights.reconstruction * loss} | depth_term(output, batch, self.weights)


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

        They are `heatmap` and `box`, or `query_class` and `query_box` of detection, `semantics`, `occupied` and
        further losses of occupancy.
        """
        output = run_network(network, batch, self.model)
        terms: dict[str, Tensor] = {}
        if output.heatmap is not None and output.box is not None:
            terms |= self._detection(output.heatmap, output.box, batch)
        if output.class_logits is not None and output.box_codes is not None:
            terms |= self._queries(output.class_logits, output.box_codes, batch)
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

    def _queries(self, class_logits: Tensor, box_codes: Tensor, batch: TrainingBatch) -> dict[str, Tensor]:
        bev = self.model.bev
        near = [_within(box, bev) for box in batch.boxes]
        boxes = [box[keep] for box, keep in zip(batch.boxes, near, strict=True)]
        labels = [label[keep] for label, keep in zip(batch.labels, near, strict=True)]
        weights = box_codes.new_tensor([1.0] * (CODE_VALUES - 2) + [VELOCITY_WEIGHT] * 2)
        each = query_loss(class_logits.float(), box_codes.float(), boxes, labels, weights)
        sums = {
            f"query_{name}": torch.stack([v for k, v in each.items() if k.endswith(suffix)]).sum()
            for name, suffix in (("class", "loss_cls"), ("box", "loss_bbox"))
        }
        return {name: self.weights.queries * value for name, value in sums.items()}

    def _occupancy(self, logits: Tensor, batch: TrainingBatch) -> dict[str, Tensor]:
        weights, counts = self.weights, batch.semantics_mask.flatten(1).sum(1).tolist()
        logits, semantics = at_voxels(logits, batch.semantics, batch.semantics_mask)
        mask = torch.ones_like(semantics, dtype=torch.bool)
        loss = losses.semantic_loss(logits, semantics, mask, self.class_weight)
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


def _within(boxes: Tensor, bev: BevGrid) -> Tensor:
    """Return which of (M, 9) boxes have their centre inside the BEV: references reach no further."""
    lo, hi = boxes.new_tensor(bev.lo), boxes.new_tensor(bev.hi)
    return ((boxes[:, :2] >= lo) & (boxes[:, :2] <= hi)).all(1)


def score_occupied_iou(probability: Tensor, labels: Tensor) -> Tensor:
    """Lovasz surrogate of the occupied IoU; probability (K, M), labels (M,), both of one sample."""
    return losses.lovasz(1 - probability[FREE], labels != FREE)


def depth_term(output: NetworkOutput, batch: TrainingBatch, weights: LossConfig) -> dict[str, Tensor]:
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


def run_network(network: nn.Module, batch: TrainingBatch, model: ModelConfig) -> NetworkOutput:
    """Normalise the images of a batch and run the network, with what it is to remember.

    Raises: ConfigError for a network with a cost volume, which would be trained on an empty one.
    """
    if model.bevdet is not None and model.bevdet.stereo:
        raise ConfigError(
            f"{model.name}: bevdet.stereo is not trained: batches do not say where a pixel was in the frame before"
        )
    images = shown(batch.images, batch.camera_valid, batch.shown, model.image)
    geometry: Geometry = batch.geometry
    if model.family == "bevformer" and batch.past:
        bare: nn.Module = getattr(network, "module", network)  # the past is seen without gradients
        assert isinstance(bare, BevFormerNetwork)
        assert batch.motion is not None
        assert isinstance(geometry, BevFormerViews)
        bev = remember(bare, [_past_frame(frame, model) for frame in batch.past])
        assert bev is not None
        motion = Motion(bev, batch.motion.known, batch.motion.align, batch.motion.shift)
        geometry = replace(geometry, motion=motion)
    output: NetworkOutput
    if model.family == "lss" and batch.past:
        past = [_lift_frame(frame, model) for frame in batch.past]
        output = network(images, batch.camera_valid, geometry, past)
    else:
        output = network(images, batch.camera_valid, geometry)
    return output


def _lift_frame(frame: PastFrames, model: ModelConfig) -> Frame:
    assert isinstance(frame.geometry, BatchedPoints)
    images = shown(frame.images, frame.camera_valid, None, model.image)
    return Frame(images, frame.camera_valid, frame.geometry)


def _past_frame(frame: PastFrames, model: ModelConfig) -> PastFrame:
    assert isinstance(frame.geometry, BevFormerViews)
    assert frame.motion is not None
    images = shown(frame.images, frame.camera_valid, None, model.image)
    motion = frame.motion
    return PastFrame(images, frame.geometry, motion.known, motion.align, motion.shift)


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
