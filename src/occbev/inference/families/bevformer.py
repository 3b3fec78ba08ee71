"""BEVFormer: BEV queries that read the images where their pillars appear, and the BEV of the frame before."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from occbev.config import ConfigError
from occbev.inference.capacity import Tables
from occbev.inference.families.queries import QueryFamily, QueryModel
from occbev.inference.families.record import Arrays, Moment
from occbev.inference.reference_points import (
    EgoMotion,
    can_bus,
    motion_tables,
    pillar_points,
    reference_tables,
    see_points,
)
from occbev.rig import CameraRig


@dataclass(frozen=True)
class BevFormerConfig:
    """BEVFormer view transform; detection classes and grids stand elsewhere."""

    channels: int = 256
    """Width of queries and features."""
    heads: int = 8
    """Attention heads."""
    hidden: int = 512
    """Width inside the feed-forward layers."""
    layers: int = 6
    """Encoder layers."""
    heights: int = 4
    """Points on each pillar."""
    z_range: tuple[float, float] = (-5.0, 3.0)
    """Pillars stand between these heights, metres in the frame of the BEV."""
    camera_points: int = 8
    """Places that a head reads per camera and level, all heights together."""
    temporal_points: int = 4
    """Places that a head reads in each of the two BEVs."""
    cameras: int = 6
    """Most cameras; each has its own embedding."""
    level_rows: int = 4
    """Rows of the level embedding; there may be more than levels."""
    dropout: float = 0.1
    """Dropout in training."""
    turn_centre: tuple[float, float] | None = None
    """Column and row about which the BEV is turned; by default where the vehicle is."""
    occupancy: bool = False
    """A semantic occupancy head in fine-tuning."""
    max_rows: int = 16384
    """Capacity of an exported graph: queries that one camera sees."""
    max_slots: int = 3
    """Capacity of an exported graph: cameras that see one query."""
    reference_quirks: bool = False
    """Behave as the published code does, which its weights have learned."""

    def __post_init__(self) -> None:
        if self.channels % self.heads or self.camera_points % self.heights:
            raise ConfigError(
                f"bevformer: heads {self.heads} must divide channels {self.channels}, and heights"
                f" {self.heights} camera_points {self.camera_points}"
            )


@dataclass(frozen=True)
class BevFormerModel(QueryModel):
    """Configuration of a BEVFormer."""

    family: str = "bevformer"
    bevformer: BevFormerConfig = field(default_factory=BevFormerConfig)
    """View transform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named, known = len(self.cameras.names), self.bevformer.cameras
        if named > known:
            raise ConfigError(
                f"cameras.names holds {named} cameras, bevformer.cameras is {known}: must be at least {named}"
            )

    @property
    def max_cameras(self) -> int:
        """Cameras that it has weights for."""
        return self.bevformer.cameras

    @property
    def past_frames(self) -> int:
        """One, which holds all before it."""
        return 1


class BevFormer(QueryFamily[BevFormerModel]):
    """BEVFormer."""

    config = BevFormerModel

    def tables(self, model: BevFormerModel, rig: CameraRig, alive: NDArray[np.bool_], form: str) -> Tables:
        """Return `reference_tables`, missing cameras, which take up room otherwise, left out; and table_camera (N,)."""
        former, size = model.bevformer, (model.image.width, model.image.height)
        pillars = pillar_points(model.bev, former.z_range, former.heights)
        places, visible = see_points(pillars, rig.lens_matrices, rig.cam2egos, size, model.bev.frame)
        visible &= alive[:, None, None]
        tables = reference_tables(places, visible, former.max_rows, former.max_slots)
        return tables | {"table_camera": model.cameras.places(rig)}

    def first_state(self, model: BevFormerModel, cameras: int) -> Arrays:
        """Return state_in_bev (1, C, Y, X) of nothing."""
        columns, rows = model.bev.shape
        return {"state_in_bev": np.zeros((1, model.bevformer.channels, rows, columns), np.float32)}

    def motion(self, model: BevFormerModel, now: Moment, before: Moment | None) -> Arrays:
        """Return can_bus (1, 18), state_known (1,), table_align (1, Q) and table_shift (1, 2)."""
        former = model.bevformer
        motion = None
        if before is not None:
            assert before.ego2global is not None
            assert now.ego2global is not None
            seconds = (now.stamp_ns - before.stamp_ns) / 1e9
            motion = EgoMotion.between(before.ego2global, now.ego2global, seconds)
        signals = can_bus(np.eye(4) if now.ego2global is None else now.ego2global, motion, now.signals)
        tables = motion_tables(motion, model.bev, former.turn_centre, former.reference_quirks)
        return {"can_bus": signals[None], **tables}


FAMILY = BevFormer()
