"""What BEVFormer and DETR3D share: a ResNet with a feature pyramid, object queries, weights for each camera."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from occbev.config import RESNET_DEPTHS, ConfigError, ModelConfig
from occbev.geometry import frame2ego
from occbev.inference.camera_order import CameraOrder
from occbev.inference.families.record import Family, Outputs
from occbev.inference.postprocess import BoxDecoding
from occbev.inference.query_boxes import QueryDecoding, decode_queries
from occbev.results import Boxes3D
from occbev.rig import CameraRig

REFERENCE_CAMERAS = 6
"""Cameras that a DETR3D has weights for if it names none, as published."""


@dataclass(frozen=True)
class ResNetConfig:
    """Image encoder of published networks: a residual network and a feature pyramid."""

    depth: int = 50
    """14, 18, 50 or 101."""
    stages: tuple[int, ...] = (2, 3, 4)
    """Stages that the pyramid takes."""
    levels: int = 4
    """Maps that the pyramid returns."""
    channels: int = 256
    """Width of these maps."""
    caffe_style: bool = False
    """Stages stride in their first 1x1 convolution."""
    deformable_stages: tuple[int, ...] = ()
    """Stages with modulated deformable convolutions."""
    frozen_stages: int = 2
    """Leading parts that are not trained: 1 = the stem, 2 = the stem and the first stage."""

    def __post_init__(self) -> None:
        if self.depth not in RESNET_DEPTHS:
            raise ConfigError(f"depth {self.depth}: must be one of {RESNET_DEPTHS}")


@dataclass(frozen=True)
class QueryHeadConfig:
    """Detection by object queries (BEVFormer, DETR3D)."""

    queries: int = 900
    """Boxes that the head proposes."""
    layers: int = 6
    """Decoder layers, each of which predicts."""
    heads: int = 8
    """Attention heads."""
    hidden: int = 512
    """Width inside the feed-forward layers."""
    points: int = 4
    """Places that a head reads in the BEV."""
    z_range: tuple[float, float] = (-5.0, 3.0)
    """Heights that reference points can have, metres."""
    dropout: float = 0.1
    """Dropout in training."""


@dataclass(frozen=True)
class QueryModel(ModelConfig):
    """What both families have."""

    resnet: ResNetConfig = field(default_factory=ResNetConfig)
    """Image encoder."""
    query_head: QueryHeadConfig | None = None
    """Detection head; null for none."""
    cameras: CameraOrder = field(default_factory=CameraOrder)
    """Cameras in the order that the weights were trained with."""


Query = TypeVar("Query", bound=QueryModel)


class QueryFamily(Family[Query]):
    """What both families do."""

    def describe_cameras(self, model: Query, rig: CameraRig) -> str:
        """Say which camera takes the place of which, see `CameraOrder`."""
        return model.cameras.describe(rig)

    def decode_boxes(
        self, model: Query, outputs: Outputs, decoding: BoxDecoding, cameras: tuple[str, ...] = ()
    ) -> Boxes3D | None:
        """Decode the outputs of object queries; each object is found once, so nothing is suppressed."""
        if not {"class_logits", "box_codes"} <= set(outputs):
            return None
        answers = outputs["class_logits"][0], outputs["box_codes"][0]
        queries = QueryDecoding(decoding.threshold, decoding.max_boxes)
        return decode_queries(*answers, frame2ego(model.bev.frame), queries, cameras)
