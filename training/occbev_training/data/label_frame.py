"""The frame of labels, base_link, and networks whose grids were published in LiDAR axes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from occbev.config import ModelConfig
from occbev.geometry import frame2ego, invert_transform
from occbev.inference.postprocess import move_boxes
from occbev.results import Boxes3D

LIDAR_HEIGHT = 2.0
"""Metres, rounded, by which heights in LiDAR axes are lower than in base_link."""


def in_base_link(model: ModelConfig) -> ModelConfig:
    """Return a network's config with its grids in base_link and without the quirks of published weights.

    Labels, pairs and both stages then share one frame, so that a pre-trained BEV means the same when it is
    fine-tuned. Grids that were in LiDAR axes cover the same heights above the road as before.
    """
    former, head, grid = model.bevformer, model.query_head, model.grid
    if former is not None:
        former = replace(former, reference_quirks=False, turn_centre=None)
    if grid.frame != "base_link":
        grid = replace(grid, lo=(*grid.lo[:2], grid.lo[2] + LIDAR_HEIGHT), frame="base_link")
    if model.bev.frame != "base_link":
        if former is not None:
            former = replace(former, z_range=_raise(former.z_range))
        if head is not None:
            head = replace(head, z_range=_raise(head.z_range))
    return replace(
        model,
        bev=replace(model.bev, frame="base_link"),
        grid=grid,
        bevformer=former,
        query_head=head,
    )


def _raise(heights: tuple[float, float]) -> tuple[float, float]:
    return heights[0] + LIDAR_HEIGHT, heights[1] + LIDAR_HEIGHT


def boxes_in_frame(boxes: NDArray[np.float32], frame: str) -> NDArray[np.float32]:
    """Move boxes (M, 9) from base_link into the frame of a BEV."""
    scores = np.ones(len(boxes), np.float32)
    moved = move_boxes(Boxes3D(boxes, np.zeros(len(boxes), np.int64), scores), invert_transform(frame2ego(frame)))
    return moved.box
