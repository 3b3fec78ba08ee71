"""Frames with their truth of space, from a folder: held-out drives with dense truth, or pairs with LiDAR labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from occbev.config import ModelConfig
from occbev.inference.ground_grid import GroundGridConfig
from occbev_training.data.pair_samples import PairSamples, open_pairs
from occbev_training.data.shards import INDEX_NAME
from occbev_training.evaluation.data import EvaluationData, EvaluationDataError, open_evaluation_data
from occbev_training.evaluation.space import Frames, dense_frames, pair_frames


def count_frames(folder: Path, model: ModelConfig, split: str | None = None) -> int:
    """Return how many frames a folder holds; split: of pairs, "train" or "validation", None for all."""
    return len(_open(folder, model, split))


def open_frames(
    folder: Path, model: ModelConfig, limit: int, config: GroundGridConfig | None = None, split: str | None = None
) -> Frames:
    """Open the frames of a folder, at most `limit`, evenly spread; split: as of `count_frames`.

    Raises:
        EvaluationDataError, CacheError: the folder holds no such frames.
    """
    data, config = _open(folder, model, split), config or GroundGridConfig()
    indices = np.unique(np.linspace(0, len(data) - 1, min(limit, len(data))).round().astype(int)).tolist()
    if isinstance(data, PairSamples):
        return pair_frames(data, indices, config)
    return dense_frames(data, indices, model.grid, config)


def _open(folder: Path, model: ModelConfig, split: str | None = None) -> EvaluationData | PairSamples:
    if (folder / INDEX_NAME).exists():
        return open_pairs(folder, model.image, model.grid, split)
    if split is not None:
        raise EvaluationDataError(f"{folder}: has no split {split!r}; only a folder of pairs has splits")
    return open_evaluation_data(folder)
