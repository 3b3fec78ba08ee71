"""Our own Lift-Splat networks: camera features with depth, splatted into a BEV, with a memory of past BEVs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.config import (
    BevEncoderConfig,
    ConfigError,
    DetectionHeadConfig,
    EncoderConfig,
    LiftConfig,
    ModelConfig,
)
from occbev.geometry import frame2ego, invert_transform
from occbev.inference.capacity import Tables
from occbev.inference.families.record import Arrays, Family, Moment, Outputs
from occbev.inference.postprocess import BoxDecoding, decode_boxes, move_boxes
from occbev.inference.reference_points import warp_table
from occbev.inference.tables import Augmentation, bag_tables, gather_tables, lift_points, ray_table, to_bev_frame
from occbev.results import Boxes3D
from occbev.rig import CameraRig


@dataclass(frozen=True)
class SplatModel(ModelConfig):
    """What every network that lifts and splats has."""

    lift: LiftConfig = field(default_factory=LiftConfig)
    """View transform."""
    bev_encoder: BevEncoderConfig = field(default_factory=BevEncoderConfig)
    """BEV encoder."""


@dataclass(frozen=True)
class LiftSplatModel(SplatModel):
    """Configuration of our own networks; the defaults are those of occbev-tiny."""

    name: str = "occbev-tiny"
    family: str = "lss"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Image encoder."""
    memory: int = 0
    """Past frames whose BEV features are remembered; 0 = none."""
    detection: DetectionHeadConfig = field(default_factory=DetectionHeadConfig)
    """Detection head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 0:
            raise ConfigError(f"memory {self.memory}: must be 0 or the number of past frames")

    @property
    def past_frames(self) -> int:
        """Frames before this one that the network builds on."""
        return self.memory


Splat = TypeVar("Splat", bound=SplatModel)


class SplatFamily(Family[Splat]):
    """What networks that lift and splat share."""

    def tables(self, model: Splat, rig: CameraRig, alive: NDArray[np.bool_], form: str) -> Tables:
        """Return `bag_tables` or `gather_tables`, with table_ray (1, N, K, h, w) of `calibration`."""
        size = (model.image.width, model.image.height)
        intrinsic, cam2frame = rig.lens_matrices, to_bev_frame(rig.cam2egos, model.bev)
        points = lift_points(intrinsic, cam2frame, size, model.lift, model.bev)
        room = (model.bev, model.lift.max_points, model.lift.height_bins)
        tables = (
            bag_tables(points, *room) if form == "bag" else gather_tables(points, *room, max_cells=model.lift.max_cells)
        )
        return tables | {"table_ray": self.calibration(model, intrinsic, cam2frame)[None]}

    def calibration(
        self, model: Splat, intrinsic: ArrayLike, cam2frame: ArrayLike, augmentation: Augmentation | None = None
    ) -> NDArray[np.float32]:
        """Return what the depth net reads of each camera: (N, K, h, w), or (N, K, 1, 1) if constant.

        intrinsic: (N, 3, 3) of network-size images. cam2frame: (N, 4, 4) into the frame of the BEV.
        augmentation: of training, which both hold as well.
        """
        raise NotImplementedError

    def first_state(self, model: Splat, cameras: int) -> Arrays:
        """Return state_in_bev (1, past frames * C, Y, X), or (.., Z, Y, X), of nothing; none without a memory."""
        if not model.past_frames:
            return {}
        columns, rows = model.bev.shape
        channels = model.lift.channels * model.past_frames
        heights = () if model.lift.height_bins == 1 else (model.lift.height_bins,)
        return {"state_in_bev": np.zeros((1, channels, *heights, rows, columns), np.float32)}

    def motion(self, model: Splat, now: Moment, before: Moment | None) -> Arrays:
        """Return state_known (1,) and table_warp (1, Y, X, 2)."""
        key2past = np.eye(4)
        if before is not None:
            assert before.ego2global is not None
            assert now.ego2global is not None
            key2past = invert_transform(before.ego2global) @ now.ego2global
        to_ego = frame2ego(model.bev.frame)
        key2past = invert_transform(to_ego) @ key2past @ to_ego
        warp = warp_table(key2past, model.bev, model.lift.reference_quirks)
        return {"state_known": np.array([float(before is not None)], np.float32), "table_warp": warp[None]}


class LiftSplat(SplatFamily[LiftSplatModel]):
    """Our own networks."""

    config = LiftSplatModel

    def calibration(
        self,
        model: LiftSplatModel,
        intrinsic: ArrayLike,
        cam2frame: ArrayLike,
        augmentation: Augmentation | None = None,
    ) -> NDArray[np.float32]:
        """Return `ray_table`."""
        return ray_table(intrinsic, cam2frame, (model.image.width, model.image.height), model.lift)

    def decode_boxes(
        self, model: LiftSplatModel, outputs: Outputs, decoding: BoxDecoding, cameras: tuple[str, ...] = ()
    ) -> Boxes3D | None:
        """Decode peaks of the heat map."""
        if not {"heatmap", "box"} <= set(outputs):
            return None
        maps = outputs["heatmap"][0], outputs["box"][0]
        boxes = decode_boxes(*maps, model.bev, decoding, cameras, model.detection_classes, model.detection.reach)
        return move_boxes(boxes, frame2ego(model.bev.frame))


FAMILY = LiftSplat()
