"""Past key frames of a sample: which ones."""

from __future__ import annotations

import numpy as np

from occbev.config import ModelConfig
from occbev_training.data.samples import Samples
from occbev_training.models.families import training_family


def history_length(model: ModelConfig, asked: int = -1) -> int:
    """Return how many past frames a sample of the network has; `asked` as `TrainingConfig.history`."""
    if model.past_frames == 0:
        return 0
    return asked if asked >= 0 else training_family(model).default_history(model)


def past_indices(samples: Samples, index: int, length: int, rng: np.random.Generator | None = None) -> list[int | None]:
    """Choose the past frames of a sample, newest first; None before its drive begins.

    rng: leaves one of the `length` + 1 frames before out, so that a network learns unequal steps (Li et al. 2022,
        section 3.6); None takes consecutive frames.
    """
    drive = samples.drive(index)
    steps = list(range(1, length + 1))
    if length and rng is not None:
        steps = list(range(1, length + 2))
        steps.pop(int(rng.integers(len(steps))))
    places = [index - step for step in steps]
    return [place if place >= 0 and samples.drive(place) == drive else None for place in places]
