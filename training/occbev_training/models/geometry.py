"""What calibration says to each view transform, for a batch: the third argument of every network.

Pre-training, fine-tuning and validation of any family run as

    network = build_model(model, stage)
    geometry = make_geometry(model, intrinsic, cam2ego, camera_valid)    # in the loader, on the CPU
    output = network(images, camera_valid, geometry.to(device))          # a NetworkOutput
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike

from occbev.config import ModelConfig
from occbev.inference.reference_points import (
    camera_tables,
    can_bus,
    frame_to_images,
    pillar_points,
    project,
)
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, batch_geometry
from occbev_training.models.queries.bevformer import BevFormerViews, pair_cameras
from occbev_training.models.queries.detr3d import CameraViews

Geometry: TypeAlias = BatchedPoints | BevFormerViews | CameraViews


def make_geometry(model: ModelConfig, intrinsic: ArrayLike, cam2ego: ArrayLike, camera_valid: ArrayLike) -> Geometry:
    """Return what a network of the model's family takes as geometry.

    intrinsic: (B, N, 3, 3) of network-size images. cam2ego: (B, N, 4, 4). camera_valid: (B, N).
    Augmentation is folded in. A BEVFormer gets the views of a first frame: no motion.
    """
    if model.family == "lss":
        return batch_geometry(intrinsic, cam2ego, model)
    samples = zip(np.asarray(intrinsic), np.asarray(cam2ego), strict=True)
    if model.family == "detr3d":
        tables = [camera_tables(model, *rig)["table_projection"] for rig in samples]
        return CameraViews(torch.from_numpy(np.concatenate(tables)))
    frame2img = np.stack([frame_to_images(*rig, model.bev.frame) for rig in samples])
    return _bevformer_views(model, frame2img, camera_valid)


def _bevformer_views(model: ModelConfig, frame2img: np.ndarray, camera_valid: ArrayLike) -> BevFormerViews:
    former, size = model.bevformer, (model.image.width, model.image.height)
    assert former is not None, f"{model.name}: family bevformer needs the key bevformer"
    pillars = pillar_points(model.bev, former.z_range, former.heights)
    seen = [project(pillars, matrices, size) for matrices in frame2img]
    points, visible = (torch.from_numpy(np.stack(part)) for part in zip(*seen, strict=True))
    valid = torch.as_tensor(np.asarray(camera_valid), dtype=torch.float32)
    hits = pair_cameras(points, visible, valid, former.reference_quirks)
    still = torch.from_numpy(can_bus(np.eye(4), None)).expand(len(frame2img), -1)
    return BevFormerViews(hits, still)
