"""BEVFormer in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from occbev.config import ConfigError
from occbev.inference.families.bevformer import BevFormerModel
from occbev.inference.reference_points import (
    EgoMotion,
    can_bus,
    motion_tables,
    pillar_points,
    see_points,
)
from occbev.inference.tables import Augmentation
from occbev_training.models.families.queries import (
    QueryTraining,
    make_query_head,
    make_voxel_decoder,
    place_cameras,
    raise_heights,
)
from occbev_training.models.families.record import REDUCED_CELLS
from occbev_training.models.geometry import Geometry
from occbev_training.models.graphs import BevFormerGraph
from occbev_training.models.heads.occupancy_head import GEOMETRY, SEMANTICS
from occbev_training.models.heads.query_head import QUERIES, QueryHead
from occbev_training.models.heads.record import build_heads
from occbev_training.models.heads.voxel_decoder import VoxelDecoder
from occbev_training.models.history import History, MotionTables, PastFrames, View, stack_images
from occbev_training.models.lift_splat.stereo import Matching
from occbev_training.models.network import NetworkOutput
from occbev_training.models.queries.bevformer import BevFormer, BevFormerViews, Motion, pair_cameras
from occbev_training.models.queries.query_networks import (
    BevAttention,
    BevFormerNetwork,
    PastFrame,
    PyramidEncoder,
    remember,
)


def _decoder(model: BevFormerModel) -> VoxelDecoder:
    return make_voxel_decoder(model, model.bevformer.channels, 2)


def _semantic_head(model: BevFormerModel) -> VoxelDecoder | None:
    former = model.bevformer
    return make_voxel_decoder(model, former.channels, len(model.occupancy_classes)) if former.occupancy else None


def _query_head(model: BevFormerModel) -> QueryHead | None:
    former, head = model.bevformer, model.query_head
    if head is None:
        return None
    attend = (former.channels, head.heads, 1, head.points, head.dropout)
    return make_query_head(model, head, former.channels, lambda: BevAttention(*attend))


HEADS = (GEOMETRY.built_by(_decoder), SEMANTICS.built_by(_semantic_head), QUERIES.built_by(_query_head))
"""Heads of the family."""


class BevFormerTraining(QueryTraining[BevFormerModel]):
    """BEVFormer; a sample leaves one past frame out, so that unequal steps are learned."""

    network = BevFormerNetwork
    graphs: ClassVar = {"onnx": BevFormerGraph, "native": BevFormerGraph}
    heads = HEADS
    skips_frames = True

    def build(self, model: BevFormerModel, stage: str) -> nn.Module:
        """Build a network with random weights."""
        encoder = PyramidEncoder(model.resnet)
        view = BevFormer(model.bevformer, model.bev, len(encoder.neck.output))
        heads = build_heads(self.heads, model, stage)
        if not any(heads.values()):
            raise ConfigError(f"{model.name}: set query_head or bevformer.occupancy, else it has no head")
        return BevFormerNetwork(encoder, view, heads)

    def geometry(
        self,
        model: BevFormerModel,
        intrinsic: ArrayLike,
        cam2ego: ArrayLike,
        camera_valid: ArrayLike,
        augmentations: Sequence[Augmentation | None] | None = None,
    ) -> Geometry:
        """Return the views of first frames."""
        former, size = model.bevformer, (model.image.width, model.image.height)
        samples = zip(np.asarray(intrinsic), np.asarray(cam2ego), strict=True)
        pillars = pillar_points(model.bev, former.z_range, former.heights)
        seen = [see_points(pillars, *rig, size, model.bev.frame) for rig in samples]
        points, visible = (torch.from_numpy(np.stack(part)) for part in zip(*seen, strict=True))
        valid = torch.as_tensor(np.asarray(camera_valid), dtype=torch.float32)
        hits = pair_cameras(points, visible, valid, former.reference_quirks)
        still = torch.from_numpy(can_bus(np.eye(4), None)).expand(len(seen), -1)
        return BevFormerViews(hits, still, place_cameras(model, cam2ego))

    def default_history(self, model: BevFormerModel) -> int:
        """Return the past frames of the published tiny and small recipes."""
        return 2

    def history(
        self, model: BevFormerModel, windows: Sequence[Sequence[View | None]], keys: Sequence[View], geometry: Geometry
    ) -> History:
        """Return past frames oldest first, the key frame's motion, and its geometry with can_bus."""
        assert isinstance(geometry, BevFormerViews)
        steps: list[Sequence[View | None]] = [*zip(*[w[::-1] for w in windows], strict=True)]
        frames: list[PastFrames] = []
        before: Sequence[View | None] = [None] * len(keys)
        for views in steps:
            motions = [_motion(b, v) for b, v in zip(before, views, strict=True)]
            filled = [view or key for view, key in zip(views, keys, strict=True)]
            images, valid = stack_images(filled)
            still = self.geometry(model, [v.intrinsic for v in filled], [v.cam2ego for v in filled], valid)
            assert isinstance(still, BevFormerViews)
            seen = replace(still, can_bus=_can_bus(views, motions))
            frames.append(PastFrames(images, valid, seen, _tables(motions, model)))
            before = views
        motions = [_motion(b, v) for b, v in zip(before, keys, strict=True)]
        return History(tuple(frames), _tables(motions, model), replace(geometry, can_bus=_can_bus(keys, motions)))

    def run(
        self,
        network: nn.Module,
        images: Tensor,
        camera_valid: Tensor,
        geometry: Geometry,
        past: Sequence[PastFrames] = (),
        motion: MotionTables | Matching | None = None,
    ) -> NetworkOutput:
        """Run a network; past: oldest first, seen without gradients."""
        assert isinstance(geometry, BevFormerViews)
        if past:
            assert isinstance(motion, MotionTables)
            bare: nn.Module = getattr(network, "module", network)
            assert isinstance(bare, BevFormerNetwork)
            bev = remember(bare, [_past_frame(frame) for frame in past])
            assert bev is not None
            geometry = replace(geometry, motion=Motion(bev, motion.known, motion.align, motion.shift))
        output: NetworkOutput = network(images, camera_valid, geometry)
        return output

    def in_base_link(self, model: BevFormerModel) -> BevFormerModel:
        """Return the configuration in base_link, without the quirks of published weights."""
        former = replace(model.bevformer, reference_quirks=False, turn_centre=None)
        if model.bev.frame != "base_link":
            former = replace(former, z_range=raise_heights(former.z_range))
        return replace(super().in_base_link(model), bevformer=former)

    def reduce(self, model: BevFormerModel) -> BevFormerModel:
        """Return the same architecture at a small size."""
        former = model.bevformer
        centre = None if former.turn_centre is None else (REDUCED_CELLS / 2, REDUCED_CELLS / 2)
        small = replace(
            former, turn_centre=centre, channels=32, heads=4, hidden=32, layers=2, max_rows=REDUCED_CELLS**2
        )
        return replace(super().reduce(model), bevformer=small)

    def describe(self, model: BevFormerModel) -> dict[str, str]:
        """Say in words what it is made of."""
        view = f"BEVFormer, {model.bevformer.layers} layers"
        return {**super().describe(model), "view transform": view, "memory": "the BEV of the frame before"}


def _motion(before: View | None, now: View | None) -> EgoMotion | None:
    if before is None or now is None or before.ego2global is None or now.ego2global is None:
        return None
    return EgoMotion.between(before.ego2global, now.ego2global, (now.stamp_ns - before.stamp_ns) / 1e9)


def _tables(motions: Sequence[EgoMotion | None], model: BevFormerModel) -> MotionTables:
    former = model.bevformer
    each = [motion_tables(m, model.bev, former.turn_centre, former.reference_quirks) for m in motions]
    joined = (
        torch.from_numpy(np.concatenate([t[name] for t in each]))
        for name in ("state_known", "table_align", "table_shift")
    )
    return MotionTables(*joined)


def _can_bus(views: Sequence[View | None], motions: Sequence[EgoMotion | None]) -> Tensor:
    poses = [np.eye(4) if v is None or v.ego2global is None else v.ego2global for v in views]
    signals = [None if view is None else view.signals for view in views]
    return torch.from_numpy(np.stack([can_bus(*each) for each in zip(poses, motions, signals, strict=True)]))


def _past_frame(frame: PastFrames) -> PastFrame:
    assert isinstance(frame.geometry, BevFormerViews)
    assert isinstance(frame.motion, MotionTables)
    motion = frame.motion
    return PastFrame(frame.images, frame.geometry, motion.known, motion.align, motion.shift)


FAMILY = BevFormerTraining()
