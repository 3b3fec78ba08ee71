"""The frame of labels, base_link, and networks whose grids were published in LiDAR axes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occbev.config import ModelConfig
from occbev.geometry import frame2ego, invert_transform
from occbev.inference.postprocess import move_boxes
from occbev.results import Boxes3D
from occbev_training.models.families import training_family


def in_base_link(model: ModelConfig) -> ModelConfig:
    """Return a network's config with its grids in base_link and without the quirks of published weights.

    Labels, pairs and both stages then share one frame, so that a pre-trained BEV means the same when it is
    fine-tuned. Grids that were in LiDAR axes cover the same heights above the road as before.
    """
    moved: ModelConfig = training_family(model).in_base_link(model)
    return moved


def boxes_in_frame(boxes: NDArray[np.float32], frame: str) -> NDArray[np.float32]:
    """Move boxes (M, 9) from base_link into the frame of a BEV."""
    scores = np.ones(len(boxes), np.float32)
    moved = move_boxes(Boxes3D(boxes, np.zeros(len(boxes), np.int64), scores), invert_transform(frame2ego(frame)))
    return moved.box
