"""What BEVFormer and DETR3D share in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from occbev.config import ConfigError
from occbev.inference.families.queries import QueryHeadConfig, QueryModel
from occbev_training.models.families.record import LIDAR_HEIGHT, TrainingFamily
from occbev_training.models.heads.query_head import QueryHead
from occbev_training.models.heads.voxel_decoder import VoxelDecoder

Query = TypeVar("Query", bound=QueryModel)


class QueryTraining(TrainingFamily[Query]):
    """What both families share."""

    def in_base_link(self, model: Query) -> Query:
        """Return the configuration in base_link; reference points are as high above the road as before."""
        head = model.query_head
        if head is not None and model.bev.frame != "base_link":
            head = replace(head, z_range=raise_heights(head.z_range))
        return replace(super().in_base_link(model), query_head=head)

    def reduce(self, model: Query) -> Query:
        """Return the same architecture at a small size."""
        head = model.query_head
        if head is not None:
            head = replace(head, queries=20, layers=2, heads=4, hidden=32)
        resnet = replace(model.resnet, depth=14, channels=32)
        return replace(super().reduce(model), resnet=resnet, query_head=head)

    def describe(self, model: Query) -> dict[str, str]:
        """Say in words what it is made of."""
        deformable = ", deformable convolutions" if model.resnet.deformable_stages else ""
        return {"image encoder": f"ResNet-{model.resnet.depth}{deformable}, {model.resnet.levels} levels"}


def raise_heights(heights: tuple[float, float]) -> tuple[float, float]:
    """Turn heights in LiDAR axes into those in base_link."""
    return heights[0] + LIDAR_HEIGHT, heights[1] + LIDAR_HEIGHT


def place_cameras(model: QueryModel, cam2ego: ArrayLike) -> Tensor:
    """Return whose weights each camera of a batch takes, (B, N), by where it looks.

    cam2ego: (B, N, 4, 4). A mirrored scene mirrors its cameras: each takes the weights of what it looks like.
    """
    return torch.from_numpy(np.stack([model.cameras.places_by_direction(poses) for poses in np.asarray(cam2ego)]))


def make_query_head(
    model: QueryModel, head: QueryHeadConfig, channels: int, attention: Callable[[], nn.Module]
) -> QueryHead:
    """Build the detection head; attention: makes what a decoder layer reads the scene with."""
    return QueryHead(head, channels, len(model.detection_classes), extent_of(model, head), attention)


def extent_of(model: QueryModel, head: QueryHeadConfig) -> tuple[Sequence[float], Sequence[float]]:
    """Return the lower and upper corner (x, y, z) of what reference points span."""
    return (*model.bev.lo, head.z_range[0]), (*model.bev.hi, head.z_range[1])


def make_voxel_decoder(model: QueryModel, channels: int, classes: int) -> VoxelDecoder:
    """Build the decoder of voxels; raises ConfigError if its grid is not that of the BEV."""
    if model.grid.bev != model.bev:
        raise ConfigError(
            f"{model.name}: the voxel decoder gives one column per BEV cell, but grid is"
            f" {model.grid.bev} and bev {model.bev}"
        )
    return VoxelDecoder(channels, model.grid.shape[2], classes)
