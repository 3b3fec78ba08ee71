"""Names of the BEVDet family's published checkpoints, as rules for `renaming`."""

from __future__ import annotations

from occbev.inference.families.bevdet import BevDetModel
from occbev_training.models.renaming import Rules

_HEAD: Rules = (
    (r"^detection_head\.shared\.0\.", "pts_bbox_head.shared_conv.conv."),
    (r"^detection_head\.shared\.1\.", "pts_bbox_head.shared_conv.bn."),
    (r"^detection_head\.tasks\.(\d+)\.(\w+)\.0\.0\.", r"pts_bbox_head.task_heads.\1.\2.0.conv."),
    (r"^detection_head\.tasks\.(\d+)\.(\w+)\.0\.1\.", r"pts_bbox_head.task_heads.\1.\2.0.bn."),
    (r"^detection_head\.tasks\.(\d+)\.(\w+)\.1\.", r"pts_bbox_head.task_heads.\1.\2.1."),
)

_IMAGE: Rules = (
    (r"^image_encoder\.backbone\.", "img_backbone."),
    (r"^image_encoder\.neck\.lateral\.(\d)\.", r"img_neck.lateral_convs.\1.conv."),
    (r"^image_encoder\.neck\.smooth\.", "img_neck.fpn_convs.0.conv."),
    (r"^image_encoder\.neck\.levels\.", "img_neck.deblocks."),
)

_LIFT: Rules = (
    (r"^view_transform\.depth_net\.predict\.", "img_view_transformer.depth_net."),
    (r"^view_transform\.depth_net\.cost_net\.", "img_view_transformer.depth_net.cost_volumn_net."),
    (r"^view_transform\.", "img_view_transformer."),
)

_GATED_LIFT: Rules = (
    (r"^view_transform\.depth_net\.predict\.", "img_view_transformer.depthnet."),
    (r"^view_transform\.depth_net\.context\.", "img_view_transformer.featnet."),
    (r"^view_transform\.depth_net\.reduce\.", "img_view_transformer.se.input_conv."),
    (r"^view_transform\.depth_net\.gate\.", "img_view_transformer.se.fc."),
    (r"^view_transform\.depth_net\.blocks\.", "img_view_transformer.extra_depthnet.layers.0."),
    (r"^view_transform\.depth_net\.deform\.", "img_view_transformer.dcn."),
    (r"^view_transform\.", "img_view_transformer."),
)

_BEV: Rules = (
    (r"^bev_encoder\.backbone\.", "img_bev_encoder_backbone."),
    (r"^bev_encoder\.neck\.up\.0\.", "img_bev_encoder_neck.up2.1."),
    (r"^bev_encoder\.neck\.up\.1\.", "img_bev_encoder_neck.up2.2."),
    (r"^bev_encoder\.neck\.up\.3\.", "img_bev_encoder_neck.up2.4."),
    (r"^bev_encoder\.neck\.", "img_bev_encoder_neck."),
    (r"^temporal\.align\.", "pre_process_net."),
)

_VOLUME: Rules = (
    (r"(\.layers\.\d\.\d\.(?:conv1|conv2|downsample))\.0\.", r"\1.conv."),
    (r"(\.layers\.\d\.\d\.(?:conv1|conv2|downsample))\.1\.", r"\1.bn."),
    (r"^bev_encoder\.neck\.0\.", "bev_encoder.neck.conv.conv."),
    (r"^bev_encoder\.neck\.1\.", "bev_encoder.neck.conv.bn."),
)

_MEGVII: Rules = (
    (r"^img_(backbone|neck)\.", r"model.backbone.img_\1."),
    (r"^pts_bbox_head\.", "model.head."),
    (r"^bev_encoder\.trunk\.", "model.head.trunk."),
    (r"^bev_encoder\.neck\.levels\.", "model.head.neck.deblocks."),
    (r"^view_transform\.aggregate\.", "model.backbone.depth_aggregation_net."),
    (r"^view_transform\.", "model.backbone."),
)


def rules_for(config: BevDetModel) -> Rules:
    """Return the rules of a network of the family."""
    parts = config.bevdet
    if parts.bev_encoder == "trunk":
        return (*_HEAD, *_IMAGE, *_MEGVII)
    lift = _GATED_LIFT if parts.depth_net == "gated" else _LIFT
    volume = _VOLUME if parts.bev_encoder == "volume" else ()
    return (*_HEAD, *_IMAGE, *lift, *volume, *_BEV, *_occupancy(bool(parts.stereo)))


def _occupancy(stereo: bool) -> Rules:
    """Stereo BEVDet-Occ holds its head at the top level, FlashOcc's code base below `occ_head`."""
    prefix = "" if stereo else "occ_head."
    return (
        (r"^occupancy_head\.reduce\.0\.", f"{prefix}final_conv.conv."),
        (r"^occupancy_head\.predict\.", f"{prefix}predicter."),
    )
