"""Networks of the BEVFormer and DETR3D families: ResNet and pyramid, view transform, heads.

Part names are those of `occbev_training.models.network`, so that pre-training hands parts on by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from occbev.inference.families.queries import ResNetConfig
from occbev_training.models.checkpoint_files import read_recorded
from occbev_training.models.encoders.fpn import FeaturePyramid
from occbev_training.models.encoders.resnet import ResNet
from occbev_training.models.heads.record import HeadedNetwork, Heads
from occbev_training.models.network import NetworkOutput
from occbev_training.models.queries.bevformer import BevFormer, BevFormerViews, Motion
from occbev_training.models.queries.deformable_attention import DeformableAttention, Levels
from occbev_training.models.queries.detr3d import CameraScene, CameraViews, PillarSampling
from occbev_training.models.renaming import Rules, reference_names

_TRANSFORMER = "pts_bbox_head.transformer"
_LAYER = r"(coder\.layers\.\d+)"

REFERENCE_NAMES: tuple[tuple[str, str], ...] = (
    (r"^image_encoder\.backbone\.", "img_backbone."),
    (r"^image_encoder\.neck\.lateral\.(\d+)\.", r"img_neck.lateral_convs.\1.conv."),
    (r"^image_encoder\.neck\.output\.(\d+)\.", r"img_neck.fpn_convs.\1.conv."),
    (r"^view_transform\.bev_embedding\.", "pts_bbox_head.bev_embedding."),
    (r"^view_transform\.row_embed\.", "pts_bbox_head.positional_encoding.row_embed."),
    (r"^view_transform\.column_embed\.", "pts_bbox_head.positional_encoding.col_embed."),
    (r"^view_transform\.camera_embeds$", f"{_TRANSFORMER}.cams_embeds"),
    (r"^view_transform\.level_embeds$", f"{_TRANSFORMER}.level_embeds"),
    (r"^view_transform\.can_bus\.", f"{_TRANSFORMER}.can_bus_mlp."),
    (r"^view_transform\.layers\.", f"{_TRANSFORMER}.encoder.layers."),
    (r"^detection_head\.layers\.", f"{_TRANSFORMER}.decoder.layers."),
    (r"^detection_head\.reference_points\.", f"{_TRANSFORMER}.reference_points."),
    (r"^detection_head\.classifiers\.", "pts_bbox_head.cls_branches."),
    (r"^detection_head\.regressors\.", "pts_bbox_head.reg_branches."),
    (r"^detection_head\.(query_embedding|code_weights)", r"pts_bbox_head.\1"),
    (r"^occupancy_(?:decoder|head)\.blocks\.", f"{_TRANSFORMER}.decoder."),
    (r"^occupancy_(?:decoder|head)\.predict\.", f"{_TRANSFORMER}.predicter."),
    (_LAYER + r"\.temporal\.", r"\1.attentions.0."),
    (_LAYER + r"\.attention\.", r"\1.attentions.0.attn."),
    (_LAYER + r"\.(?:spatial|cross)\.", r"\1.attentions.1."),
    (_LAYER + r"\.ffn\.0\.", r"\1.ffns.0.layers.0.0."),
    (_LAYER + r"\.ffn\.3\.", r"\1.ffns.0.layers.1."),
)
"""Rules from our weight names to those of the published checkpoints of both families."""


NECK_NAMES: Rules = ((r"^lateral\.(\d+)\.", r"lateral_convs.\1.conv."), (r"^output\.(\d+)\.", r"fpn_convs.\1.conv."))
"""Rules from the pyramid's own names to those of detectors, which put one of `NECK_PREFIXES` before them."""

NECK_PREFIXES = ("img_neck.", "neck.")


class PyramidEncoder(nn.Module):
    """Images to feature maps of several strides."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.backbone = ResNet(
            config.depth,
            config.stages,
            config.caffe_style,
            config.deformable_stages,
            config.frozen_stages,
            frozen_norms=True,
        )
        self.neck = FeaturePyramid(self.backbone.widths, config.channels, config.levels)

    def load_imagenet(self, path: Path) -> tuple[str, ...]:
        """Load the backbone's weights, see `ResNet.take_weights`, and of a detector such as FCOS3D the pyramid's that fit.

        Returns: the names in the file that were not taken.
        """
        state = read_recorded(path)
        unused = self.backbone.take_weights(state, str(path))
        own = self.neck.state_dict()
        names = [(n, f"{prefix}{p}") for n, p in reference_names(own, NECK_NAMES).items() for prefix in NECK_PREFIXES]
        fitting = {n: full for n, full in names if full in state and state[full].shape == own[n].shape}
        self.neck.load_state_dict({n: state[full] for n, full in fitting.items()}, strict=False)
        return tuple(name for name in unused if name not in fitting.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn (M, 3, H, W) into maps (M, C, H_l, W_l), finest first."""
        maps: list[Tensor] = self.neck(self.backbone(images))
        return maps


@dataclass(frozen=True)
class BevScene:
    """The BEV as decoder queries read it. value: (B, Y * X, C)."""

    value: Tensor
    levels: Levels

    def __len__(self) -> int:
        return len(self.value)


class BevAttention(DeformableAttention):
    """Object queries read the BEV around the ground position of their reference."""

    def forward(  # type: ignore[override]
        self, query: Tensor, position: Tensor, reference: Tensor, scene: BevScene
    ) -> Tensor:
        """Return (B, Q, C) of query and position (B, Q, C) and reference (B, Q, 3) in 0..1."""
        return super().forward(query, position, scene.value, reference[..., :2], scene.levels)


class BevFormerNetwork(HeadedNetwork):
    """Images, calibration and the BEV of the frame before to boxes and occupancy."""

    reference_names = REFERENCE_NAMES

    def __init__(
        self,
        image_encoder: PyramidEncoder,
        view_transform: BevFormer,
        heads: Heads,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.view_transform = view_transform
        self.add_heads(heads)

    def forward(
        self,
        images: Tensor,
        camera_valid: Tensor,
        geometry: BevFormerViews,
    ) -> NetworkOutput:
        """Run every part that is there.

        images: (B, N, 3, H, W) normalised. camera_valid: (B, N), which `geometry` was made with.
        """
        maps = self.image_encoder(images.flatten(0, 1))
        bev = self.view_transform(maps, geometry.hits, geometry.can_bus, geometry.cameras, geometry.motion)
        scene = BevScene(bev.flatten(2).transpose(1, 2), Levels(((int(bev.shape[2]), int(bev.shape[3])),)))
        return NetworkOutput(self.answer({"bev": bev, "scene": scene}), bev=bev)


@dataclass(frozen=True)
class PastFrame:
    """One frame of the history of a training sample.

    images: (B, N, 3, H, W). views: as of a first frame. known, align, shift: as in `Motion`, from the frame before.
    """

    images: Tensor
    views: BevFormerViews
    known: Tensor
    align: Tensor
    shift: Tensor


def remember(network: BevFormerNetwork, frames: Sequence[PastFrame]) -> Tensor | None:
    """Return the BEV (B, C, Y, X) after frames in order, oldest first; None if there are none.

    Nothing is learned from the past: it is seen in eval mode and without gradients (Li et al. 2022, section 4.2).
    """
    was_training, bev = network.training, None
    network.eval()
    with torch.no_grad():
        for frame in frames:
            motion = bev if bev is None else Motion(bev, frame.known, frame.align, frame.shift)
            maps = network.image_encoder(frame.images.flatten(0, 1))
            bev = network.view_transform(maps, frame.views.hits, frame.views.can_bus, frame.views.cameras, motion)
    network.train(was_training)
    return bev


class Detr3dNetwork(HeadedNetwork):
    """Images and projection matrices to boxes; in pre-training to occupancy."""

    reference_names = REFERENCE_NAMES

    def __init__(
        self,
        image_encoder: PyramidEncoder,
        heads: Heads,
        view_transform: PillarSampling | None = None,
    ) -> None:
        """view_transform: gives the BEV to the decoder of pre-training, whose image encoder detection begins from."""
        super().__init__()
        self.image_encoder, self.view_transform = image_encoder, view_transform
        self.add_heads(heads)

    def forward(self, images: Tensor, camera_valid: Tensor, geometry: CameraViews) -> NetworkOutput:
        """images: (B, N, 3, H, W) normalised. camera_valid: (B, N)."""
        maps = self.image_encoder(images.flatten(0, 1))
        scene = CameraScene(maps, geometry.frame2img, camera_valid, geometry.cameras)
        bev = None if self.view_transform is None else self.view_transform(scene)
        return NetworkOutput(self.answer({"bev": bev, "scene": scene}))
