"""The BEVDet family: BEVDet, BEVDet4D, BEVDepth, BEVDet-Occ and FlashOcc from shared parts.

The same line as our own networks, `OccBevNetwork`, with past frames and the parts that `BevDetConfig` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from occbev.inference.families.bevdet import BevDetConfig, BevDetModel
from occbev.inference.tables import bin_depths, feature_pixels
from occbev_training.models.encoders.image_necks import DeconvolutionNeck, PyramidNeck, ResNetImageEncoder
from occbev_training.models.encoders.resnet import ResNet
from occbev_training.models.heads.centre_head import TASKS, CentreHead
from occbev_training.models.heads.detection_head import BOX_CHANNELS
from occbev_training.models.heads.occupancy_head import GEOMETRY, SEMANTICS, OccupancyDecoder
from occbev_training.models.heads.record import build_heads
from occbev_training.models.heads.reference_occupancy import PlaneOccupancy, VolumeOccupancy
from occbev_training.models.layers import at_least_float32
from occbev_training.models.lift_splat.bev_residual_encoder import (
    PlaneBlock,
    PlaneEncoder,
    ResidualStages,
    TrunkEncoder,
    VolumeBlock,
    VolumeEncoder,
)
from occbev_training.models.lift_splat.bevdet_names import rules_for
from occbev_training.models.lift_splat.depth_net import (
    CameraAwareDepth,
    DepthAggregation,
    GatedDepth,
    PlainDepth,
    matching_cost,
)
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, Splatter, splat_volume_by_gather
from occbev_training.models.lift_splat.stereo import MatchingGrid
from occbev_training.models.lift_splat.temporal import TemporalFusion
from occbev_training.models.network import Frame, OccBevNetwork
from occbev_training.models.renaming import Rules

MATCHING_STAGE = 1
"""ResNet stage whose stride-4 map the cost volume matches."""

DECONVOLUTION_SCALES = (0.25, 0.5, 1, 2)
"""From strides 4, 8, 16 and 32 to stride 16."""


class ReferenceLift(Splatter):
    """Lift-Splat with one of the published depth nets."""

    def __init__(
        self,
        depth_net: nn.Module,
        config: BevDetModel,
        aggregate: nn.Module | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """aggregate: refines the lifted volume. buffers: constants that checkpoints carry."""
        super().__init__(config.lift, config.bev.shape)
        self.depth_net, self.aggregate = depth_net, aggregate
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)

    def predict_depth(self, features: Tensor, ray: Tensor, cost: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return depth logits (M, D, h, w) and context (M, C, h, w) of M = B * N images."""
        logits, context = self.depth_net(features, ray, cost)
        return logits, context

    def pool(self, logits: Tensor, context: Tensor, camera_valid: Tensor, points: BatchedPoints) -> Tensor:
        """Return the BEV of depth logits and context."""
        if self.aggregate is None:
            return super().pool(logits, context, camera_valid, points)
        rows = self.refined_rows(self.aggregate, logits, context, camera_valid.flatten())
        cells = functional.embedding_bag(
            points.depth, rows, points.offset, mode="sum", per_sample_weights=points.weight
        )
        return self.to_bev(cells)

    def gather(self, logits: Tensor, context: Tensor, camera_valid: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Return the BEV as `pool` does, by the tables of `gather_tables`."""
        if self.aggregate is None:
            return super().gather(logits, context, camera_valid, tables)
        rows = self.refined_rows(self.aggregate, logits, context, camera_valid.flatten())
        return self.to_bev(splat_volume_by_gather(rows, tables))

    def refined_rows(self, aggregate: nn.Module, logits: Tensor, context: Tensor, camera_valid: Tensor) -> Tensor:
        """Return the refined volume (M * D * h * w, C).

        camera_valid: (M,); a missing camera adds nothing: the refinement has biases, so that it is silenced after it.
        """
        volume = aggregate(context[:, :, None] * at_least_float32(logits).softmax(1)[:, None])  # (M, C, D, h, w)
        volume = at_least_float32(volume) * camera_valid.view(-1, 1, 1, 1, 1)
        return volume.permute(0, 2, 3, 4, 1).reshape(-1, self.channels)


class BevDetNetwork(OccBevNetwork):
    """`OccBevNetwork` with stereo matching and published names and conventions."""

    reference_names: Rules = ()
    """Rules that turn our weight names into those of published checkpoints."""
    first_boxes = False
    """Whether the head speaks of boxes as BEVDet's first release did."""
    image_encoder: ResNetImageEncoder
    view_transform: ReferenceLift
    matching_grid: MatchingGrid | None
    """Where depth hypotheses fall in the image before, of networks with stereo."""

    def run_heads(self, bev: Tensor) -> dict[str, Tensor]:
        """Run the heads, see `OccBevNetwork.run_heads`; boxes are l, w, h and yaw whatever the head was trained for."""
        outputs = super().run_heads(bev)
        if self.first_boxes and "box" in outputs:
            outputs["box"] = from_first_boxes(outputs["box"])
        return outputs

    def frame_bev(self, frame: Frame, older: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return one frame's refined BEV and its depth logits; older: the next older frame's matching map."""
        assert frame.points is not None
        features, match = self.image_encoder.with_matching(frame.images.flatten(0, 1))
        cost = None
        if match is not None and older is not None and frame.matching is not None:
            known = frame.matching.known.repeat_interleave(frame.images.shape[1])
            cost = self.matching_cost(match, older, frame.matching.img2past.flatten(0, 1), known)
        ray = frame.points.ray.flatten(0, 1)
        logits, context = self.view_transform.predict_depth(features, ray, cost)
        bev = self.view_transform.pool(logits, context, frame.camera_valid, frame.points)
        return (bev if self.temporal is None else self.temporal.refine(bev)), logits

    @torch.no_grad()
    def matching_map(self, frame: Frame) -> Tensor | None:
        """Return the stride-4 map of a network with stereo, else None; that of a missing camera is zero."""
        if self.matching_grid is None:
            return None
        matching: Tensor = self.image_encoder.matching(frame.images.flatten(0, 1))
        return matching * frame.camera_valid.view(-1, 1, 1, 1)

    def matching_cost(self, match: Tensor, older: Tensor, img2past: Tensor, known: Tensor) -> Tensor:
        """Return how well each depth hypothesis fits (M, D, h / 4, w / 4), zero where nothing is known.

        match, older: (M, F, h / 4, w / 4) of this frame and the one before. img2past: (M, 3, 4). known: (M,) or (1,).
        """
        assert self.matching_grid is not None
        with torch.no_grad():
            return matching_cost(match, older, self.matching_grid(img2past)) * known.view(-1, 1, 1, 1)


def from_first_boxes(box: Tensor) -> Tensor:
    """Turn boxes (B, tasks * 10, Y, X) of BEVDet's first release into ours: w, l, h and r = -yaw - pi / 2 become
    l, w, h and yaw."""
    x, y, z, width, length, height, sin, cos, vx, vy = box.unflatten(1, (-1, BOX_CHANNELS)).unbind(2)
    # yaw = -r - pi / 2: sin yaw = -cos r and cos yaw = -sin r.
    return torch.stack([x, y, z, length, width, height, -cos, -sin, vx, vy], 2).flatten(1, 2)


def build_bevdet(config: BevDetModel, stage: str) -> BevDetNetwork:
    """Build a network of the family with random weights; stage: "pretrain" or "finetune"."""
    parts = config.bevdet
    encoders = _image_encoder(parts), _view_transform(config, parts), _bev_encoder(config, parts)
    temporal = _temporal(config, parts)
    network = BevDetNetwork(*encoders, build_heads(HEADS, config, stage), temporal)
    network.reference_names = rules_for(config)
    network.first_boxes = parts.first_boxes
    size = (config.image.width, config.image.height)
    network.matching_grid = MatchingGrid(size, config.lift) if parts.stereo else None
    return network


def _image_encoder(parts: BevDetConfig) -> ResNetImageEncoder:
    stages = (MATCHING_STAGE, *parts.stages) if parts.stereo else parts.stages
    backbone = ResNet(parts.depth, stages, frozen_stages=parts.frozen_stages)
    widths = backbone.widths[1:] if parts.stereo else backbone.widths
    if parts.neck == "pyramid":
        neck: nn.Module = PyramidNeck(widths, parts.neck_channels)
    else:
        level = parts.neck_channels // len(widths)
        neck = DeconvolutionNeck(widths, level, DECONVOLUTION_SCALES)
    return ResNetImageEncoder(backbone, neck, MATCHING_STAGE if parts.stereo else None)


def _view_transform(config: BevDetModel, parts: BevDetConfig) -> ReferenceLift:
    sizes = (parts.neck_channels, config.lift.depth.bins, config.lift.channels)
    if parts.depth_net == "plain":
        depth_net: nn.Module = PlainDepth(*sizes)
    elif parts.depth_net == "gated":
        depth_net = GatedDepth(*sizes)
    else:
        depth_net = CameraAwareDepth(
            *sizes, pyramid=parts.pyramid_channels, deformable=parts.deformable, stereo=parts.stereo
        )
    aggregate = DepthAggregation(config.lift.channels) if parts.aggregate_depth else None
    return ReferenceLift(depth_net, config, aggregate, reference_buffers(config))


def _temporal(config: BevDetModel, parts: BevDetConfig) -> TemporalFusion | None:
    if parts.frames == 1:
        return None
    width, blocks = config.lift.channels, parts.align_blocks
    block = VolumeBlock if parts.bev_encoder == "volume" else PlaneBlock
    align = ResidualStages(width, (width,), (blocks,), (1,), block) if blocks else None
    return TemporalFusion(align, parts.frames, parts.newest_first)


def _bev_encoder(config: BevDetModel, parts: BevDetConfig) -> nn.Module:
    inputs, outputs = config.lift.channels * parts.frames, config.bev_encoder.out_channels
    if parts.bev_encoder == "volume":
        return VolumeEncoder(inputs, outputs)
    width = config.bev_encoder.channels[0]
    if parts.bev_encoder == "trunk":
        return TrunkEncoder(inputs, width, outputs // 4)
    return PlaneEncoder(inputs, width, parts.bev_hidden, outputs)


def _centre_head(config: BevDetModel) -> CentreHead | None:
    tasks = config.bevdet.tasks
    return CentreHead(config.bev_encoder.out_channels, tasks) if tasks else None


def _semantic_head(config: BevDetModel) -> nn.Module | None:
    width, parts, classes = config.bev_encoder.out_channels, config.bevdet, len(config.occupancy_classes)
    if parts.occupancy == "none":
        return None
    if parts.occupancy == "volume":
        return VolumeOccupancy(width, parts.occupancy_hidden, classes)
    return PlaneOccupancy(width, parts.occupancy_hidden, config.grid.shape[2], classes)


def _decoder(config: BevDetModel) -> nn.Module:
    """Return the Occ-BEV decoder: free and occupied; for a 3D encoder its own head with two classes."""
    width, parts = config.bev_encoder.out_channels, config.bevdet
    if parts.bev_encoder == "volume":
        return VolumeOccupancy(width, parts.occupancy_hidden, 2)
    return OccupancyDecoder(width, config.occupancy, config.bev, config.grid)


HEADS = (GEOMETRY.built_by(_decoder), SEMANTICS.built_by(_semantic_head), TASKS.built_by(_centre_head))
"""Heads of the family."""


def reference_buffers(config: BevDetModel) -> dict[str, Tensor]:
    """Return the geometry constants that some checkpoints carry; the network reads none of them."""
    kind, lift, bev = config.bevdet.reference_buffers, config.lift, config.bev
    if kind == "none":
        return {}
    lo = torch.tensor([*bev.lo, lift.z_range[0]])
    shape = torch.tensor([*bev.shape, lift.height_bins])
    height = (lift.z_range[1] - lift.z_range[0]) / lift.height_bins
    pitch = torch.tensor([*bev.pitch, height])
    frustum = _frustum(config)
    if kind == "lift":
        return {"dx": pitch, "bx": lo + pitch / 2, "nx": shape, "frustum": frustum}
    frustum = torch.cat([frustum, torch.ones_like(frustum[..., :1])], -1)
    return {
        "voxel_size": pitch,
        "voxel_coord": lo + pitch / 2,
        "voxel_num": shape,
        "frustum": frustum,
    }


def _frustum(config: BevDetModel) -> Tensor:
    """Return (D, h, w, 3): u, v and depth of every frustum point."""
    size, lift = (config.image.width, config.image.height), config.lift
    rows, columns = size[1] // lift.stride, size[0] // lift.stride
    pixels = feature_pixels(size, lift)[:, :2].reshape(1, rows, columns, 2)
    depths = bin_depths(lift)[:, None, None, None]
    parts = (
        np.broadcast_to(pixels, (len(depths), rows, columns, 2)),
        np.broadcast_to(depths, (len(depths), rows, columns, 1)),
    )
    return torch.from_numpy(np.concatenate(parts, -1).astype(np.float32))
