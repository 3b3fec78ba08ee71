"""Which losses a run uses and how much each counts: the section `loss` of `config/training/*.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from occbev.config import ConfigError, formerly


@dataclass(frozen=True)
class LossConfig:
    """Which losses, and how much each counts; a weight of 0 leaves a term out."""

    occupancy: str = "three_state"
    """Stage 1: three_state (what was observed, balanced, weighted by evidence) or occbev_paper (focal, unobserved is free)."""
    reconstruction: float = 1.0
    """Occupancy of stage 1."""
    depth: float = 1.0
    """LiDAR depth along image rays, of networks that predict depth."""
    depth_kind: str = "ce"
    """ce, or bce for BEVDepth's sum of binary terms over all bins (its published weight is 3)."""
    heatmap: float = 1.0
    """Box centres."""
    box: float = 0.25
    """Box offsets, height, size and heading."""
    velocity: float = 0.2
    """Factor on the two velocity terms among the box terms."""
    queries: float = 1.0
    """Factor on the published class and box terms of object queries."""
    semantics: float = 1.0
    """Cross-entropy of semantic occupancy."""
    occupied: float = 0.5
    """Lovasz surrogate of the occupied IoU, beside the semantic term."""
    lovasz: float = 0.0
    """Lovasz surrogate of the IoU of every class."""
    geometric_scale: float = 0.0
    """Scene-class affinity of occupied against free: precision, recall, specificity."""
    semantic_scale: float = 0.0
    """Scene-class affinity of every class."""
    max_class_weight: float = formerly(3.0, "most")
    """Largest weight of a rare semantic class relative to the commonest; 1 weighs all alike."""

    def __post_init__(self) -> None:
        if self.occupancy not in ("three_state", "occbev_paper"):
            raise ConfigError(f"loss.occupancy {self.occupancy!r}: must be three_state or occbev_paper")
        if self.depth_kind not in ("ce", "bce"):
            raise ConfigError(f"loss.depth_kind {self.depth_kind!r}: must be ce or bce")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and value < 0:
                raise ConfigError(
                    f"loss.{field.name} {value}: must be at least 0, or the network would learn the opposite"
                )
