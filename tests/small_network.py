"""A Lift-Splat network that a test builds, trains and exports in a moment."""

from __future__ import annotations

from occbev.config import (
    BevEncoderConfig,
    DepthConfig,
    DetectionHeadConfig,
    EncoderConfig,
    ImageConfig,
    LiftConfig,
    OccupancyHeadConfig,
)
from occbev.grid import GRIDS, BevGrid
from occbev.inference.families.lift_splat import LiftSplatModel

SMALL = LiftSplatModel(
    name="probe",
    image=ImageConfig(width=96, height=64),
    encoder=EncoderConfig(channels=16),
    lift=LiftConfig(channels=8, depth=DepthConfig(1.0, 17.0, 2.0), max_points=2048),
    bev=BevGrid((-16, -12), (1, 1), (32, 24)),
    bev_encoder=BevEncoderConfig((8, 12, 16), (1, 1, 1), 16),
    grid=GRIDS["tiny"],
    occupancy=OccupancyHeadConfig(8, 4, 4),
    detection=DetectionHeadConfig(8),
)
