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
from occbev_training.models.queries.detr3d import CameraSampling, CameraViews, PillarSampling
from occbev_training.models.queries.query_networks import Detr3dNetwork, PyramidEncoder


class Detr3dTraining(QueryTraining[Detr3dModel]):
    """DETR3D."""

    network = Detr3dNetwork
    graphs: ClassVar = {"onnx": Detr3dGraph, "native": Detr3dGraph}

    def build(self, model: Detr3dModel, stage: str) -> nn.Module:
        """Build a network with random weights."""
        head, resnet, encoder = model.query_head, model.resnet, PyramidEncoder(model.resnet)
        if stage == "pretrain":
            view = PillarSampling(resnet.channels, model.bev, head.z_range)
            decoder = make_voxel_decoder(model, resnet.channels, 2)
            return Detr3dNetwork(encoder, view_transform=view, occupancy_decoder=decoder)
        attend = (resnet.channels, model.max_cameras, resnet.levels, extent_of(model, head), head.dropout)
        detection = make_query_head(model, head, resnet.channels, lambda: CameraSampling(*attend))
        return Detr3dNetwork(encoder, detection)

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
