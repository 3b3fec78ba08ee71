"""Calibration as each view transform takes it, for a batch: the third argument of every network.

Pre-training, fine-tuning and validation of any family run as

    network = build_model(model, stage)
    geometry = make_geometry(model, intrinsic, cam2ego, camera_valid)    # in the loader, on the CPU
    output = network(images, camera_valid, geometry.to(device))          # a NetworkOutput

`make_geometry` and `build_model` stand in `occbev_training.models.families` and `.build`.
"""

from __future__ import annotations

from typing import TypeAlias

from occbev_training.models.lift_splat.lift_splat import BatchedPoints
from occbev_training.models.queries.bevformer import BevFormerViews
from occbev_training.models.queries.detr3d import CameraViews

Geometry: TypeAlias = BatchedPoints | BevFormerViews | CameraViews
