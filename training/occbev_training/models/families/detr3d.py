"""DETR3D in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from occbev.inference.families.detr3d import Detr3dModel
from occbev.inference.reference_points import projection_table
from occbev.inference.tables import Augmentation
from occbev_training.models.families.queries import (
    QueryTraining,
    extent_of,
    make_query_head,
    make_voxel_decoder,
    place_cameras,
)
from occbev_training.models.geometry import Geometry
from occbev_training.models.graphs import Detr3dGraph
from occbev_training.models.heads.occupancy_head import GEOMETRY
from occbev_training.models.heads.query_head import QUERIES, QueryHead
from occbev_training.models.heads.record import build_heads
from occbev_training.models.heads.voxel_decoder import VoxelDecoder
from occbev_training.models.queries.detr3d import CameraSampling, CameraViews, PillarSampling
from occbev_training.models.queries.query_networks import Detr3dNetwork, PyramidEncoder


def _decoder(model: Detr3dModel) -> VoxelDecoder:
    return make_voxel_decoder(model, model.resnet.channels, 2)


def _query_head(model: Detr3dModel) -> QueryHead:
    head, resnet = model.query_head, model.resnet
    attend = (resnet.channels, model.max_cameras, resnet.levels, extent_of(model, head), head.dropout)
    return make_query_head(model, head, resnet.channels, lambda: CameraSampling(*attend))


HEADS = (GEOMETRY.built_by(_decoder), QUERIES.built_by(_query_head))
"""Heads of the family."""


class Detr3dTraining(QueryTraining[Detr3dModel]):
    """DETR3D."""

    network = Detr3dNetwork
    graphs: ClassVar = {"onnx": Detr3dGraph, "native": Detr3dGraph}
    heads = HEADS

    def build(self, model: Detr3dModel, stage: str) -> nn.Module:
        """Build a network with random weights."""
        channels, encoder = model.resnet.channels, PyramidEncoder(model.resnet)
        view = PillarSampling(channels, model.bev, model.query_head.z_range) if stage == "pretrain" else None
        return Detr3dNetwork(encoder, build_heads(self.heads, model, stage), view)

    def geometry(
        self,
        model: Detr3dModel,
        intrinsic: ArrayLike,
        cam2ego: ArrayLike,
        camera_valid: ArrayLike,
        augmentations: Sequence[Augmentation | None] | None = None,
    ) -> Geometry:
        """Return projection matrices."""
        size = (model.image.width, model.image.height)
        samples = zip(np.asarray(intrinsic), np.asarray(cam2ego), strict=True)
        projections = [projection_table(*rig, size, model.bev.frame) for rig in samples]
        return CameraViews(torch.from_numpy(np.stack(projections)), place_cameras(model, cam2ego))

    def describe(self, model: Detr3dModel) -> dict[str, str]:
        """Say in words what it is made of."""
        view = "none: object queries read the images (DETR3D)"
        return {**super().describe(model), "view transform": view, "memory": "none"}


FAMILY = Detr3dTraining()
