"""The BEVDet family in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import nn

from occbev.config import ConfigError
from occbev.inference.families.bevdet import BevDetModel
from occbev_training.models.families.lift_splat import SplatTraining
from occbev_training.models.geometry import Geometry
from occbev_training.models.graphs import BagGraph, GatherGraph
from occbev_training.models.history import History, View
from occbev_training.models.lift_splat.bevdet import BevDetNetwork, build_bevdet


class BevDetTraining(SplatTraining[BevDetModel]):
    """BEVDet, BEVDet4D, BEVDepth, BEVDet-Occ and FlashOcc."""

    network = BevDetNetwork
    graphs: ClassVar = {"onnx": GatherGraph, "native": BagGraph}
    box_loss = "tasks"

    def build(self, model: BevDetModel, stage: str) -> nn.Module:
        """Build a network with random weights."""
        return build_bevdet(model, stage)

    def history(
        self, model: BevDetModel, windows: Sequence[Sequence[View | None]], keys: Sequence[View], geometry: Geometry
    ) -> History:
        """Return past frames as every network that lifts and splats gets them.

        Raises: ConfigError for a network with a cost volume, which would be trained on an empty one.
        """
        if model.bevdet.stereo:
            raise ConfigError(
                f"{model.name}: bevdet.stereo is not trained: batches do not say where a pixel was in the frame before"
            )
        return super().history(model, windows, keys, geometry)

    def reduce(self, model: BevDetModel) -> BevDetModel:
        """Return the same architecture at a small size."""
        parts = replace(
            model.bevdet,
            depth=14,
            neck_channels=32,
            pyramid_channels=8,
            bev_hidden=16,
            occupancy_hidden=16,
            source_width=192,
            source_height=144,
        )
        return replace(super().reduce(model), bevdet=parts)

    def describe(self, model: BevDetModel) -> dict[str, str]:
        """Say in words what it is made of."""
        return {"image encoder": f"ResNet-{model.bevdet.depth}", **super().describe(model)}


FAMILY = BevDetTraining()
