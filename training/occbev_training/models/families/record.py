"""What training knows of a family of networks: the record that each family fills in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Generic, TypeVar

from numpy.typing import ArrayLike
from torch import Tensor, nn

from occbev.config import LiftConfig, ModelConfig
from occbev.grid import VoxelGrid
from occbev.inference.tables import Augmentation
from occbev_training.models.geometry import Geometry
from occbev_training.models.graphs import Graph
from occbev_training.models.heads.record import Head
from occbev_training.models.history import History, MotionTables, PastFrames, View
from occbev_training.models.lift_splat.stereo import Matching
from occbev_training.models.network import NetworkOutput

Model = TypeVar("Model", bound=ModelConfig)

LIDAR_HEIGHT = 2.0
"""Metres, rounded, by which heights in LiDAR axes are lower than in base_link."""

REDUCED_CELLS = 16
"""Cells along each side of a reduced BEV."""


class TrainingFamily(Generic[Model]):
    """A family: its networks and graphs, its geometry and past frames in training, and its targets.

    network: the class of its networks. graphs: form -> the class of the graph that takes it; "onnx" is the form that
    is written as ONNX, "native" that which torch runs, "factored" that which is written for OpenVINO, if there is one.
    heads: in the order of the graphs' outputs. skips_frames: whether a sample in training leaves one past frame out.
    """

    network: ClassVar[type[nn.Module]]
    graphs: ClassVar[Mapping[str, type[Graph]]]
    heads: ClassVar[tuple[Head, ...]]
    skips_frames: ClassVar[bool] = False

    def build(self, model: Model, stage: str) -> nn.Module:
        """Build a network with random weights, see `occbev_training.models.build`."""
        raise NotImplementedError

    def geometry(
        self,
        model: Model,
        intrinsic: ArrayLike,
        cam2ego: ArrayLike,
        camera_valid: ArrayLike,
        augmentations: Sequence[Augmentation | None] | None = None,
    ) -> Geometry:
        """Return what the network takes as geometry.

        intrinsic: (B, N, 3, 3) of network-size images. cam2ego: (B, N, 4, 4). camera_valid: (B, N).
        Augmentation is folded in; augmentations: of each sample, for networks that tell it apart.
        A network with a memory gets the geometry of a first frame: no motion.
        """
        raise NotImplementedError

    def lift(self, model: Model) -> LiftConfig | None:
        """Return the cells and bins that depth labels are made for; None where the network predicts no depth."""
        return None

    def default_history(self, model: Model) -> int:
        """Return the past frames of a sample where the configuration of the training names no number."""
        return model.past_frames

    def history(
        self, model: Model, windows: Sequence[Sequence[View | None]], keys: Sequence[View], geometry: Geometry
    ) -> History:
        """Return the past frames of a batch of samples.

        windows: past frames of each sample, newest first, None where there is none. geometry: of the key frames.
        """
        return History((), None, geometry)

    def run(
        self,
        network: nn.Module,
        images: Tensor,
        camera_valid: Tensor,
        geometry: Geometry,
        past: Sequence[PastFrames] = (),
        motion: MotionTables | Matching | None = None,
    ) -> NetworkOutput:
        """Run a network on normalised images (B, N, 3, H, W); past: of `history`, normalised as well."""
        output: NetworkOutput = network(images, camera_valid, geometry)
        return output

    def in_base_link(self, model: Model) -> Model:
        """Return the configuration with its grids in base_link, see `occbev_training.data.label_frame`."""
        grid = model.grid
        if grid.frame != "base_link":
            grid = replace(grid, lo=(*grid.lo[:2], grid.lo[2] + LIDAR_HEIGHT), frame="base_link")
        return replace(model, bev=replace(model.bev, frame="base_link"), grid=grid)

    def reduce(self, model: Model) -> Model:
        """Return the same architecture with small images, a small BEV and narrow layers: seconds on a CPU.

        Every kind of part, frame, quirk and the number of frames, tasks and levels stay.
        """
        side = (REDUCED_CELLS, REDUCED_CELLS)
        return replace(
            model,
            image=replace(model.image, width=96, height=64),
            bev=replace(model.bev, lo=(-16.0, -16.0), pitch=(2.0, 2.0), shape=side),
            grid=VoxelGrid((-16.0, -16.0, -1.0), (2.0, 2.0, 0.8), (*side, 8), model.grid.frame),
            occupancy=replace(model.occupancy, channels=8, height_channels=4, cell_channels=4),
        )

    def takes_lite0(self, model: Model) -> bool:
        """Whether its image encoder begins from the ImageNet weights of EfficientNet-Lite0."""
        return False

    def describe(self, model: Model) -> dict[str, str]:
        """Say in words what its image encoder, view transform and memory are."""
        raise NotImplementedError
