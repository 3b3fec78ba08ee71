"""Our own Lift-Splat networks in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

from numpy.typing import ArrayLike
from torch import Tensor, nn

from occbev.config import ConfigError, DepthConfig, DetectionHeadConfig, EncoderConfig, LiftConfig
from occbev.inference.families.lift_splat import LiftSplatModel, SplatModel
from occbev.inference.tables import Augmentation
from occbev_training.models.encoders.image_encoder import ImageEncoder
from occbev_training.models.families.record import TrainingFamily
from occbev_training.models.geometry import Geometry
from occbev_training.models.graphs import BagGraph, FactoredGatherGraph, FactoredGraph
from occbev_training.models.heads.detection_head import CENTRES, DetectionHead
from occbev_training.models.heads.occupancy_head import GEOMETRY, SEMANTICS, OccupancyDecoder
from occbev_training.models.heads.record import build_heads
from occbev_training.models.history import History, MotionTables, PastFrames, View, into_key, stack_images
from occbev_training.models.lift_splat.bev_encoder import BevEncoder
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, LiftSplat, batch_geometry
from occbev_training.models.lift_splat.stereo import Matching
from occbev_training.models.lift_splat.temporal import TemporalFusion
from occbev_training.models.network import Frame, NetworkOutput, OccBevNetwork

Splat = TypeVar("Splat", bound=SplatModel)


class SplatTraining(TrainingFamily[Splat]):
    """What networks that lift and splat share."""

    def geometry(
        self,
        model: Splat,
        intrinsic: ArrayLike,
        cam2ego: ArrayLike,
        camera_valid: ArrayLike,
        augmentations: Sequence[Augmentation | None] | None = None,
    ) -> Geometry:
        """Return `batch_geometry`."""
        return batch_geometry(intrinsic, cam2ego, model, augmentations)

    def lift(self, model: Splat) -> LiftConfig | None:
        """Return its view transform."""
        return model.lift

    def history(
        self, model: Splat, windows: Sequence[Sequence[View | None]], keys: Sequence[View], geometry: Geometry
    ) -> History:
        """Return past frames newest first, lifted into the key frame's BEV.

        The key frame stands in for what is missing, as published.
        """
        assert isinstance(geometry, BatchedPoints)
        steps = range(len(windows[0]))
        past = [self._past(model, [w[step] for w in windows], keys, geometry.ray) for step in steps]
        return History(tuple(past), None, geometry)

    def _past(self, model: Splat, views: Sequence[View | None], keys: Sequence[View], ray: Tensor) -> PastFrames:
        seen = [view or key for view, key in zip(views, keys, strict=True)]
        poses = [
            view.cam2ego if view is key else into_key(key, view) @ view.cam2ego
            for view, key in zip(seen, keys, strict=True)
        ]
        rigs = ([v.intrinsic for v in seen], poses, [v.camera_valid for v in seen])
        geometry = self.geometry(model, *rigs, [v.augmentation for v in seen])
        assert isinstance(geometry, BatchedPoints)
        # The depth net reads the cameras of the key frame, as published: where the vehicle was says nothing of depth.
        return PastFrames(*stack_images(seen), replace(geometry, ray=ray))

    def run(
        self,
        network: nn.Module,
        images: Tensor,
        camera_valid: Tensor,
        geometry: Geometry,
        past: Sequence[PastFrames] = (),
        motion: MotionTables | Matching | None = None,
    ) -> NetworkOutput:
        """Run a network; past: newest first, motion: of stereo."""
        frames = [_as_frame(frame) for frame in past]
        output: NetworkOutput = network(images, camera_valid, geometry, frames, motion)
        return output

    def reduce(self, model: Splat) -> Splat:
        """Return the same architecture at a small size."""
        small = super().reduce(model)
        lift = replace(
            model.lift,
            canonical_focal=model.lift.canonical_focal * small.image.width / model.image.width,
            depth=DepthConfig(1.0, 25.0, 4.0, model.lift.depth.spacing),
            height_bins=8 if model.lift.height_bins > 1 else 1,
            max_points=2048,
            max_cells=0,
            channels=8,
        )
        bev_encoder = replace(model.bev_encoder, channels=(8, 16, 32), out_channels=16)
        return replace(small, lift=lift, bev_encoder=bev_encoder)

    def describe(self, model: Splat) -> dict[str, str]:
        """Say in words what it is made of."""
        depth = model.lift.depth
        return {
            "view transform": f"Lift-Splat, {depth.bins} depth bins from {depth.lo} to {depth.hi} m",
            "memory": f"{model.past_frames} past frames" if model.past_frames else "none",
        }


def _decoder(model: LiftSplatModel) -> OccupancyDecoder:
    return OccupancyDecoder(model.bev_encoder.out_channels, model.occupancy, model.bev, model.grid)


def _semantic_head(model: LiftSplatModel) -> OccupancyDecoder:
    kinds = len(model.occupancy_classes) - 1
    return OccupancyDecoder(model.bev_encoder.out_channels, model.occupancy, model.bev, model.grid, kinds)


def _detection_head(model: LiftSplatModel) -> DetectionHead:
    return DetectionHead(model.bev_encoder.out_channels, model.detection, len(model.detection_classes))


HEADS = (GEOMETRY.built_by(_decoder), SEMANTICS.built_by(_semantic_head), CENTRES.built_by(_detection_head))
"""Heads of our own networks."""


class LiftSplatTraining(SplatTraining[LiftSplatModel]):
    """Our own networks."""

    network = OccBevNetwork
    graphs: ClassVar = {"onnx": FactoredGatherGraph, "native": BagGraph, "factored": FactoredGraph}
    heads = HEADS

    def build(self, model: LiftSplatModel, stage: str) -> OccBevNetwork:
        """Build a network with random weights."""
        if model.lift.stride != 16:
            raise ConfigError(f"lift.stride {model.lift.stride}: the image encoder's stride is 16")
        frames = 1 + model.past_frames
        temporal = TemporalFusion(None, frames, newest_first=True) if frames > 1 else None
        parts = (
            ImageEncoder(model.encoder),
            LiftSplat(model.encoder.channels, model.lift, model.bev.shape),
            BevEncoder(model.lift.channels * frames, model.bev_encoder, model.bev),
        )
        return OccBevNetwork(*parts, build_heads(self.heads, model, stage), temporal)

    def reduce(self, model: LiftSplatModel) -> LiftSplatModel:
        """Return the same architecture at a small size."""
        encoder = replace(model.encoder, backbone="tf_efficientnet_lite0", channels=16)
        return replace(super().reduce(model), encoder=encoder, detection=DetectionHeadConfig(8))

    def takes_lite0(self, model: LiftSplatModel) -> bool:
        """Whether its backbone is EfficientNet-Lite0."""
        return model.encoder.backbone == EncoderConfig().backbone

    def describe(self, model: LiftSplatModel) -> dict[str, str]:
        """Say in words what it is made of."""
        return {"image encoder": f"{model.encoder.backbone}, {model.encoder.stages} stages", **super().describe(model)}


def _as_frame(past: PastFrames) -> Frame:
    assert past.geometry is None or isinstance(past.geometry, BatchedPoints)
    assert past.motion is None or isinstance(past.motion, Matching)
    return Frame(past.images, past.camera_valid, past.geometry, past.motion)


FAMILY = LiftSplatTraining()
