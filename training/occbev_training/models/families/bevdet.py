"""The BEVDet family in training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from occbev.inference.families.bevdet import BevDetModel
from occbev.inference.tables import image_to_past
from occbev_training.models.families.lift_splat import SplatTraining
from occbev_training.models.geometry import Geometry
from occbev_training.models.graphs import BagGraph, GatherGraph
from occbev_training.models.history import History, View
from occbev_training.models.lift_splat.bevdet import HEADS, BevDetNetwork, build_bevdet
from occbev_training.models.lift_splat.stereo import Matching, join_matchings


class BevDetTraining(SplatTraining[BevDetModel]):
    """BEVDet, BEVDet4D, BEVDepth, BEVDet-Occ and FlashOcc."""

    network = BevDetNetwork
    graphs: ClassVar = {"onnx": GatherGraph, "native": BagGraph}
    heads = HEADS

    def build(self, model: BevDetModel, stage: str) -> nn.Module:
        """Build a network with random weights."""
        return build_bevdet(model, stage)

    def default_history(self, model: BevDetModel) -> int:
        """Return the frames that it joins, and with stereo one more that the oldest of them is matched with."""
        return model.past_frames + model.bevdet.stereo

    def history(
        self, model: BevDetModel, windows: Sequence[Sequence[View | None]], keys: Sequence[View], geometry: Geometry
    ) -> History:
        """Return past frames newest first; with stereo the last of them is there to be matched with alone."""
        history = super().history(model, windows, keys, geometry)
        if not model.bevdet.stereo:
            return history
        steps: list[Sequence[View | None]] = [keys, *zip(*windows, strict=True), [None] * len(keys)]
        motions = [_match(now, before, keys) for now, before in itertools.pairwise(steps)]
        past = [replace(frame, motion=motion) for frame, motion in zip(history.past, motions[1:], strict=True)]
        past[model.past_frames :] = [replace(frame, geometry=None) for frame in past[model.past_frames :]]
        return History(tuple(past), motions[0], geometry)

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


def _match(views: Sequence[View | None], before: Sequence[View | None], keys: Sequence[View]) -> Matching:
    """Return where the cameras of each sample saw things in the frame before."""
    known, matrices = [], []
    for now, past, key in zip(views, before, keys, strict=True):
        known.append(now is not None and past is not None)
        still = np.tile(np.eye(3, 4, dtype=np.float32), (len(key.images), 1, 1))
        matrices.append(torch.from_numpy(_image_to_past(now, past) if now and past else still))
    return join_matchings(known, matrices)


def _image_to_past(now: View, past: View) -> NDArray[np.float32]:
    assert now.ego2global is not None
    assert past.ego2global is not None
    poses = (now.ego2global @ now.cam2ego, past.ego2global @ past.cam2ego)
    return image_to_past(now.intrinsic, poses[0], past.intrinsic, poses[1])


FAMILY = BevDetTraining()
