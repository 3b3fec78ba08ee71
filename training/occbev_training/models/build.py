"""Make a network from its configuration: one entry for every family and stage.

    network = build_model(load_config(path, ModelConfig), "pretrain")

has the parts `image_encoder`, `view_transform`, `bev_encoder` and `temporal` as far as the family has them, and the
`occupancy_decoder` that Occ-BEV pre-trains with; "finetune" has `detection_head` and `occupancy_head` instead.
`occbev_training.models.checkpoints.transfer` begins one from the other by these names and reports every weight.
How a network is called is said in `occbev_training.models.geometry`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from occbev.config import ConfigError, ModelConfig
from occbev_training.models.encoders.image_encoder import ImageEncoder
from occbev_training.models.heads.detection_head import DetectionHead
from occbev_training.models.heads.occupancy_head import OccupancyDecoder
from occbev_training.models.lift_splat.bev_encoder import BevEncoder
from occbev_training.models.lift_splat.bevdet import build_bevdet
from occbev_training.models.lift_splat.lift_splat import LiftSplat
from occbev_training.models.lift_splat.temporal import TemporalFusion
from occbev_training.models.network import OccBevNetwork
from occbev_training.models.queries.query_networks import build_query_network

TRAINING_STAGES = ("pretrain", "finetune")
QUERY_FAMILIES = ("bevformer", "detr3d")

HEADS = ("occupancy_decoder", "occupancy_head", "detection_head")
"""Parts of a network that answer: geometric occupancy, semantic occupancy, boxes."""


def build_model(config: ModelConfig, stage: str) -> nn.Module:
    """Build a network of any family with random weights; arguments as of `build_network`."""
    if config.family not in QUERY_FAMILIES:
        return build_network(config, stage)
    if stage not in TRAINING_STAGES:
        raise ConfigError(f"stage {stage!r}: must be one of {TRAINING_STAGES}")
    return build_query_network(config, stage)


def build_for_weights(config: ModelConfig, names: Iterable[str]) -> nn.Module:
    """Build the network that these weights are of, with random weights: it has the heads that they name.

    names: of weights, such as the keys of a state. Pre-training has one head, fine-tuning those that it could train.
    """
    parts = {name.partition(".")[0] for name in names}
    if "occupancy_decoder" not in parts:
        network = build_model(config, "finetune")
    elif "detection_head" not in parts:
        return build_model(config, "pretrain")
    else:
        network = with_geometry(build_model(config, "finetune"), config)
    for head in HEADS:
        if head not in parts and getattr(network, head, None) is not None:
            setattr(network, head, None)
    return network


def with_geometry(network: nn.Module, config: ModelConfig) -> nn.Module:
    """Give a network of fine-tuning the decoder of pre-training in place of the semantic head; returns it."""
    pretrained = build_model(config, "pretrain")
    network.occupancy_head, network.occupancy_decoder = None, pretrained.occupancy_decoder
    if getattr(network, "view_transform", None) is None:  # DETR3D reads the images without one
        network.view_transform = pretrained.view_transform
    return network


def build_network(config: ModelConfig, stage: str) -> OccBevNetwork:
    """Build a Lift-Splat network with random weights.

    stage: "pretrain" has the occupancy decoder, "finetune" the semantic and the detection head.
    """
    if stage not in TRAINING_STAGES:
        raise ConfigError(f"stage {stage!r}: must be one of {TRAINING_STAGES}")
    if config.family != "lss":
        raise ConfigError(f"family {config.family!r}: only lss can be built here")
    if config.bevdet is not None:
        return build_bevdet(config, stage)
    if config.lift.stride != 16:
        raise ConfigError(f"lift.stride {config.lift.stride}: the image encoder's stride is 16")
    frames = 1 + config.past_frames
    temporal = TemporalFusion(None, frames, newest_first=True) if frames > 1 else None
    parts = (
        ImageEncoder(config.encoder),
        LiftSplat(config.encoder.channels, config.lift, config.bev.shape),
        BevEncoder(config.lift.channels * frames, config.bev_encoder),
    )
    if stage == "pretrain":
        decoder = _occupancy(config, 0)
        return OccBevNetwork(*parts, occupancy_decoder=decoder, temporal=temporal)
    width = config.bev_encoder.out_channels
    detection = DetectionHead(width, config.detection, len(config.detection_classes))
    occupancy = _occupancy(config, len(config.occupancy_classes) - 1)
    return OccBevNetwork(*parts, occupancy_head=occupancy, detection_head=detection, temporal=temporal)


def _occupancy(config: ModelConfig, kinds: int) -> OccupancyDecoder:
    width = config.bev_encoder.out_channels
    return OccupancyDecoder(width, config.occupancy, config.bev, config.grid, kinds)
