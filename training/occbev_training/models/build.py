"""Make a network from its configuration: one entry for every family and stage.

    network = build_model(load_model(path), "pretrain")

has the parts `image_encoder`, `view_transform`, `bev_encoder` and `temporal` as far as the family has them, and the
`occupancy_decoder` that Occ-BEV pre-trains with; "finetune" has `detection_head` and `occupancy_head` instead.
`occbev_training.models.checkpoints.transfer` begins one from the other by these names and reports every weight.
How a network is called is said in `occbev_training.models.geometry`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from occbev.config import ConfigError, ModelConfig
from occbev_training.models.families import training_family
from occbev_training.models.heads.occupancy_head import GEOMETRY, SEMANTICS
from occbev_training.models.heads.record import heads_of

TRAINING_STAGES = ("pretrain", "finetune")


def build_model(config: ModelConfig, stage: str) -> nn.Module:
    """Build a network with random weights.

    stage: "pretrain" has the occupancy decoder, "finetune" the semantic and the detection head.
    """
    if stage not in TRAINING_STAGES:
        raise ConfigError(f"stage {stage!r}: must be one of {TRAINING_STAGES}")
    return training_family(config).build(config, stage)


def build_for_weights(config: ModelConfig, names: Iterable[str]) -> nn.Module:
    """Build the network that these weights are of, with random weights: it has the heads that they name.

    names: of weights, such as the keys of a state. Pre-training has one head, fine-tuning those that it could train.
    """
    parts = {name.partition(".")[0] for name in names}
    stages = {head.stage for head in training_family(config).heads if head.part in parts}
    if stages == {"pretrain"}:
        return build_model(config, "pretrain")
    network = build_model(config, "finetune")
    if "pretrain" in stages:
        network = with_geometry(network, config)
    for head in heads_of(network):
        if head.part not in parts:
            setattr(network, head.part, None)
    return network


def with_geometry(network: nn.Module, config: ModelConfig) -> nn.Module:
    """Give a network of fine-tuning the decoder of pre-training in place of the semantic head; returns it."""
    pretrained = build_model(config, "pretrain")
    for head, part in ((SEMANTICS, None), (GEOMETRY, getattr(pretrained, GEOMETRY.part))):
        setattr(network, head.part, part)
    if getattr(network, "view_transform", None) is None:  # DETR3D reads the images without one
        network.view_transform = pretrained.view_transform
    return network
