"""What adaptation minimises: occupancy and depth of unlabelled frames, and what fine-tuning learned of rehearsed ones.

Occupancy is predicted by an existing head: 1 - P(free) of the semantic head, or the geometric decoder if there is no
semantic head. So no head is added or removed. Boxes on unlabelled frames come from a teacher: the network before
adaptation, given the LiDAR's depth.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev.classes import OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.config import ModelConfig
from occbev_training.data.datasets import TrainingBatch
from occbev_training.losses import voxels_and_centres as losses
from occbev_training.losses.config import LossConfig
from occbev_training.losses.normalise import mean_over_processes
from occbev_training.losses.objectives import FinetuneObjective, depth_term, run_network, shown
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, LiftSplat
from occbev_training.models.network import NetworkOutput, OccBevNetwork

REHEARSED = "rehearsed_"
"""Loss terms of rehearsed frames begin with this."""


@dataclass(frozen=True)
class SourcedBatch:
    """A batch, and whether it is rehearsed: simulated frames with boxes and classes, not the user's own."""

    batch: TrainingBatch
    rehearsed: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its samples, for messages."""
        return self.batch.names

    def to(self, device: torch.device) -> SourcedBatch:
        """Move every tensor."""
        return SourcedBatch(self.batch.to(device), self.rehearsed)


CERTAIN = 12.0
"""Logit of the depth bin that a LiDAR return gives, against those that the network says of the others."""

BEYOND = 1
"""Bins beyond a return at which its feature cell is splatted: the nearest return of 16x16 pixels lies on the near side,
and the heads know the network's own depth, which is spread to the far one.
"""

CENTRE_WEIGHT = 4.0
"""Weight of taught centres against those of labels: probabilities far from 0 and 1 give small losses."""

LEAST_CENTRE = 0.1
"""Centre probabilities of the teacher below this teach no box."""


@dataclass(frozen=True)
class Teacher:
    """The network before adaptation, given the LiDAR's depth; the student learns to find the same boxes from images alone.

    Its detection head works where depth is right, and depth is what fails first on unknown cameras.
    """

    network: OccBevNetwork

    @classmethod
    def of(cls, network: nn.Module) -> Teacher | None:
        """Copy a network; None where it has no boxes, a memory, or no plain Lift-Splat."""
        known = isinstance(network, OccBevNetwork) and isinstance(network.view_transform, LiftSplat)
        if not known or network.detection_head is None or network.temporal is not None:
            return None
        return cls(copy.deepcopy(network).eval().requires_grad_(False))

    def terms(self, output: NetworkOutput, batch: TrainingBatch, model: ModelConfig) -> dict[str, Tensor]:
        """Return the loss of an output's boxes against those of the teacher: `taught_heatmap` and `taught_box`."""
        assert output.depth_logits is not None
        heatmap, box = self.boxes(output.depth_logits, batch, model)
        logits, peaks = output.answers["heatmap"].float(), functional.max_pool2d(heatmap, 3, 1, 1) == heatmap
        count = mean_over_processes(heatmap[peaks & (heatmap > LEAST_CENTRE)].sum()).clamp(min=1)
        each = functional.binary_cross_entropy_with_logits(logits, heatmap, reduction="none")
        found = CENTRE_WEIGHT * ((torch.sigmoid(logits) - heatmap).square() * each).sum() / count
        sure = heatmap.amax(1, keepdim=True)
        sure = sure * (sure > LEAST_CENTRE)
        error = (output.answers["box"].float() - box).abs()[:, :-2] * sure  # a single frame says nothing of velocities
        return {"taught_heatmap": found, "taught_box": error.sum() / mean_over_processes(sure.sum()).clamp(min=1)}

    @torch.no_grad()
    def boxes(self, depth_logits: Tensor, batch: TrainingBatch, model: ModelConfig) -> tuple[Tensor, Tensor]:
        """Return centres (B, K, Y, X) as probabilities and boxes (B, 10, Y, X), by the LiDAR's depth where it is known.

        depth_logits: (B, N, D, h, w), of the student, for all other cells.
        """
        network = self.network.to(batch.images.device)
        view, geometry, head = network.view_transform, batch.geometry, network.detection_head
        assert isinstance(geometry, BatchedPoints)
        assert isinstance(head, nn.Module)
        images = shown(batch.images, batch.camera_valid, batch.shown, model.image)
        _, context = view.predict_depth(network.image_encoder(images.flatten(0, 1)), geometry.ray.flatten(0, 1))
        logits = measured_depth(depth_logits, batch.depth_bin)
        bev = network.bev_encoder(view.pool(logits, context, batch.camera_valid, geometry))
        heatmap, box = head(bev)
        return torch.sigmoid(heatmap.float()), box.float()


def measured_depth(logits: Tensor, bins: Tensor) -> Tensor:
    """Return depth logits (B * N, D, h, w) with nearly all mass `BEYOND` bins behind the bin of each return.

    bins: (B, N, h, w), negative without a return.
    """
    known = (bins >= 0).flatten(0, 1)[:, None]
    sure = (
        functional.one_hot((bins + BEYOND).clamp(0, logits.shape[2] - 1), logits.shape[2]).movedim(-1, 2).flatten(0, 1)
        * CERTAIN
    )
    return torch.where(known, sure, logits.detach().flatten(0, 1).float())


@dataclass(frozen=True)
class AdaptObjective:
    """Occupancy and depth of the user's frames; boxes, classes and depth of rehearsed ones, at `rehearsal` of the weight.

    teacher: says where boxes are in the user's frames, at `taught` of the weight; None for none.
    """

    model: ModelConfig
    weights: LossConfig
    finetune: FinetuneObjective
    rehearsal: float = 1.0
    teacher: Teacher | None = None
    taught: float = 1.0

    def __call__(self, network: nn.Module, batch: SourcedBatch) -> Mapping[str, Tensor]:
        """Return the weighted terms: `occupancy`, `occupied`, `depth` and taught ones, or rehearsed ones by their names."""
        if batch.rehearsed:
            terms = self.finetune(network, batch.batch)
            return {f"{REHEARSED}{name}": self.rehearsal * term for name, term in terms.items()}
        output = run_network(network, batch.batch, self.model)
        terms = occupancy_terms(output, batch.batch, self.weights) | depth_term(output, batch.batch, self.weights)
        return terms | self._taught(output, batch.batch)

    def _taught(self, output: NetworkOutput, batch: TrainingBatch) -> dict[str, Tensor]:
        if self.teacher is None or not self.taught:
            return {}
        factors = {"taught_heatmap": self.taught * self.weights.heatmap, "taught_box": self.taught * self.weights.box}
        return {name: factors[name] * term for name, term in self.teacher.terms(output, batch, self.model).items()}


def occupancy_terms(output: NetworkOutput, batch: TrainingBatch, weights: LossConfig) -> dict[str, Tensor]:
    """Return the cross-entropy of observed voxels, and the Lovasz surrogate of the IoU of those that a camera sees."""
    observed = [torch.nonzero(state.flatten() != UNOBSERVED_STATE).squeeze(1) for state in batch.state]
    score = torch.cat([occupied_score(output, i, at) for i, at in enumerate(observed)])
    state, visible, evidence = (
        torch.cat([one.flatten()[at] for one, at in zip(volumes, observed, strict=True)])
        for volumes in (batch.state, batch.visible, batch.evidence)
    )
    occupied = state == OCCUPIED_STATE
    weight = losses.observation_weights(occupied, visible, evidence)
    each = functional.binary_cross_entropy_with_logits(score, occupied.float(), reduction="none")
    terms = {"occupancy": (weight * each).sum() / mean_over_processes(weight.sum()).clamp(min=1e-6)}
    if weights.occupied:
        seen = visible.bool()
        terms["occupied"] = losses.lovasz(torch.sigmoid(score[seen]), occupied[seen])
    factors = {"occupancy": weights.reconstruction, "occupied": weights.occupied}
    return {name: factors[name] * term for name, term in terms.items()}


def occupied_score(output: NetworkOutput, sample: int, voxels: Tensor) -> Tensor:
    """Return the log odds (M,) of occupied at flat voxels (M,) of the sample."""
    if "occupancy_logits" in output.answers:
        logits = output.answers["occupancy_logits"][sample].flatten(1).index_select(1, voxels).float()  # (K, M)
        return torch.logsumexp(logits[:-1], 0) - logits[-1]
    free, occupied = output.answers["reconstruction_logits"][sample].flatten(1).index_select(1, voxels).float()
    return occupied - free
