"""The BEVDet family: BEVDet, BEVDet4D, BEVDepth, BEVDet-Occ and FlashOcc."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.config import RESNET_DEPTHS, ConfigError, formerly
from occbev.geometry import frame2ego
from occbev.inference.families.lift_splat import SplatFamily, SplatModel
from occbev.inference.families.record import Arrays, Moment, Outputs
from occbev.inference.postprocess import BoxDecoding, move_boxes
from occbev.inference.tables import Augmentation, camera_parameters, gate_parameters, image_to_past, move_to_frame
from occbev.inference.task_boxes import TaskDecoding, decode_tasks
from occbev.results import Boxes3D


@dataclass(frozen=True)
class BevDetConfig:
    """Parts of a network of the BEVDet family, where it differs from our own Lift-Splat networks."""

    source_width: int = 1600
    """Width of the images that the published camera parameters are given for."""
    source_height: int = 900
    """Height of these images."""
    depth: int = 50
    """Depth of the ResNet: 14, 18, 50 or 101."""
    stages: tuple[int, ...] = (3, 4)
    """ResNet stages that the neck takes."""
    frozen_stages: int = 0
    """Leading parts of the ResNet that are not trained: 1 = the stem."""
    neck: str = "pyramid"
    """Image neck: pyramid (two levels, added) or deconvolution (four levels, concatenated)."""
    neck_channels: int = 256
    """Channels of the image features."""
    depth_net: str = "plain"
    """plain (one convolution), camera (camera-aware) or gated (BEVDet's first BEVDepth)."""
    pyramid_channels: int = 96
    """Width of each branch of the camera-aware depth net's spatial pyramid."""
    deformable: bool = False
    """A deformable convolution ends the camera-aware depth net."""
    aggregate_depth: bool = False
    """Refine the lifted volume along each image row (Megvii's depth aggregation)."""
    frames: int = 1
    """Key frame and past frames whose BEV features are joined."""
    newest_first: bool = True
    """Order in which they are joined."""
    align_blocks: int = 2
    """Residual blocks that every frame passes before they are joined; 0 = none."""
    stereo: bool = False
    """Match stride-4 features of neighbouring frames in a cost volume that helps depth."""
    bev_encoder: str = "plane"
    """plane (2D), volume (3D) or trunk (a ResNet-18 with a deconvolution neck)."""
    bev_hidden: int = 512
    """Width inside the plane's neck."""
    tasks: tuple[int, ...] = (10,)
    """Classes of each detection task, in class order; empty = no detection head."""
    occupancy: str = "none"
    """Semantic head: none, plane (channels to height) or volume (3D)."""
    occupancy_hidden: int = 512
    """Width of the semantic head's hidden layer."""
    first_boxes: bool = False
    """The head encodes boxes as BEVDet's first release did: width before length, and its own definition of yaw."""
    decoding: TaskDecoding = field(default_factory=TaskDecoding)
    """How the detection head's maps become boxes."""
    reference_buffers: str = formerly("none", "published_buffers")
    """Geometry constants kept for exact round trips of checkpoints: none, lift or voxel."""

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "depth": RESNET_DEPTHS,
            "neck": ("pyramid", "deconvolution"),
            "depth_net": ("plain", "camera", "gated"),
            "bev_encoder": ("plane", "volume", "trunk"),
            "occupancy": ("none", "plane", "volume"),
            "reference_buffers": ("none", "lift", "voxel"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"bevdet.{name} {getattr(self, name)!r}: must be one of {known}")
        if self.frames < 1:
            raise ConfigError(f"bevdet.frames {self.frames}: must be at least 1")
        if self.stereo and (self.depth_net != "camera" or self.frames < 2):
            raise ConfigError("bevdet.stereo: needs depth_net camera and at least 2 frames")
        if self.tasks:
            self.decoding.check(len(self.tasks), sum(self.tasks))

    @property
    def matching_channels(self) -> int:
        """Channels of the maps that stereo matches: those of the ResNet's first stage."""
        return 64 if self.depth == 18 else 256


TRUNK_STRIDE = 8
"""Cells of the BEV per cell of the coarsest map of the encoder `trunk`."""

MATCHING_STRIDE = 4
"""Pixels of the input image per cell of the maps that stereo matches."""


@dataclass(frozen=True)
class BevDetModel(SplatModel):
    """Configuration of a network of the family."""

    family: str = "bevdet"
    bevdet: BevDetConfig = field(default_factory=BevDetConfig)
    """Its parts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bevdet.bev_encoder == "trunk" and any(cells % TRUNK_STRIDE for cells in self.bev.shape):
            raise ConfigError(
                f"bev.shape {self.bev.shape}: must be multiples of {TRUNK_STRIDE} for bevdet.bev_encoder trunk"
            )

    @property
    def past_frames(self) -> int:
        """Frames before this one that the network builds on."""
        return self.bevdet.frames - 1


class BevDet(SplatFamily[BevDetModel]):
    """Networks of the BEVDet family."""

    config = BevDetModel

    def calibration(
        self, model: BevDetModel, intrinsic: ArrayLike, cam2frame: ArrayLike, augmentation: Augmentation | None = None
    ) -> NDArray[np.float32]:
        """Return the published camera parameters (N, K, 1, 1): those of source images, which were scaled to the
        network's width and cut to the lower rows; augmentation stands in them beside the camera's own."""
        parts, intrinsic, cam2frame = model.bevdet, np.asarray(intrinsic, np.float64), np.asarray(cam2frame, np.float64)
        if parts.depth_net == "plain":
            return np.zeros((len(intrinsic), 1, 1, 1), np.float32)
        scale = model.image.width / parts.source_width
        src2img = np.diag([scale, scale, 1.0])
        src2img[1, 2] = model.image.height - round(scale * parts.source_height)
        scene = np.eye(4)
        if augmentation is not None:
            src2img, scene = augmentation.image @ src2img, move_to_frame(augmentation.scene, model.bev)
            cam2frame = np.linalg.inv(scene) @ cam2frame
        source = np.linalg.inv(src2img) @ intrinsic[:, :, :3]
        if parts.depth_net == "gated":
            return gate_parameters(source, cam2frame, src2img)[:, :, None, None]
        return camera_parameters(source, cam2frame, src2img, scene)[:, :, None, None]

    def first_state(self, model: BevDetModel, cameras: int) -> Arrays:
        """Return the state of networks that lift and splat; with stereo also state_in_match (N, F, h / 4, w / 4)."""
        state = super().first_state(model, cameras)
        if model.bevdet.stereo:
            size = (model.image.height // MATCHING_STRIDE, model.image.width // MATCHING_STRIDE)
            state["state_in_match"] = np.zeros((cameras, model.bevdet.matching_channels, *size), np.float32)
        return state

    def motion(self, model: BevDetModel, now: Moment, before: Moment | None) -> Arrays:
        """Return the motion of networks that lift and splat; with stereo also table_matching (N, 3, 4)."""
        motion = super().motion(model, now, before)
        if model.bevdet.stereo:
            motion["table_matching"] = matching_table(now, before)
        return motion

    def decode_boxes(
        self, model: BevDetModel, outputs: Outputs, decoding: BoxDecoding, cameras: tuple[str, ...] = ()
    ) -> Boxes3D | None:
        """Decode every task as published; of `decoding` the threshold and the number of boxes count."""
        if not {"heatmap", "box"} <= set(outputs):
            return None
        maps, parts = (outputs["heatmap"][0], outputs["box"][0]), model.bevdet
        boxes = decode_tasks(*maps, parts.tasks, model.bev, parts.decoding, decoding.threshold, cameras)
        return move_boxes(boxes[: decoding.max_boxes], frame2ego(model.bev.frame))


def matching_table(now: Moment, before: Moment | None) -> NDArray[np.float32]:
    """Return img2past (N, 3, 4) of `image_to_past`; that of a camera that stands still in a first frame."""
    if before is None:
        return np.tile(np.eye(3, 4, dtype=np.float32), (len(now.rig), 1, 1))
    assert before.ego2global is not None
    assert now.ego2global is not None
    return image_to_past(
        now.rig.intrinsics,
        now.ego2global @ now.rig.cam2egos,
        before.rig.intrinsics,
        before.ego2global @ before.rig.cam2egos,
    )


FAMILY = BevDet()
