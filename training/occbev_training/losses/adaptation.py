"""What adaptation minimises: occupancy and depth of unlabelled frames, and what fine-tuning learned of rehearsed ones.

Occupancy is predicted by an existing head: 1 - P(free) of the semantic head, or the geometric decoder if there is no
semantic head. So no head is added or removed. Boxes on unlabelled frames are those that the network
before adaptation found with the LiDAR's depth, see `engine.taught_boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev.classes import OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.config import ModelConfig
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev_training.data.datasets import TrainingBatch
from occbev_training.losses import voxels_and_centres as losses
from occbev_training.losses.config import LossConfig
from occbev_training.losses.normalise import mean_over_processes
from occbev_training.losses.objectives import FinetuneObjective, depth_term, run_network
from occbev_training.models.heads.occupancy_head import CELL_FACTORS, occupied_at
from occbev_training.models.network import NetworkOutput

REHEARSED, TAUGHT = "rehearsed_", "taught_"
"""Loss terms of rehearsed frames, and those of boxes that were found, begin with this."""


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


@dataclass(frozen=True)
class AdaptObjective:
    """Occupancy and depth of the user's frames; boxes, classes and depth of rehearsed ones, at `rehearsal` of the weight.

    taught: weight of the boxes that were found in the user's frames; 0 where none were looked for.
    """

    model: ModelConfig
    weights: LossConfig
    finetune: FinetuneObjective
    rehearsal: float = 1.0
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
        if not self.taught:
            return {}
        assert isinstance(self.model, LiftSplatModel), "boxes are looked for by our own centre heads alone"
        terms = losses.centre_terms(output.answers, batch.boxes, batch.labels, self.model, self.weights)
        return {f"{TAUGHT}{name}": self.taught * term for name, term in terms.items()}


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
    answers, (of_cells, _) = output.answers, CELL_FACTORS
    if of_cells in answers:
        return occupied_at(answers[of_cells][sample], voxels)
    if "occupancy_logits" in answers:
        logits = answers["occupancy_logits"][sample].flatten(1).index_select(1, voxels).float()  # (K, M)
        return torch.logsumexp(logits[:-1], 0) - logits[-1]
    free, occupied = answers["reconstruction_logits"][sample].flatten(1).index_select(1, voxels).float()
    return occupied - free
