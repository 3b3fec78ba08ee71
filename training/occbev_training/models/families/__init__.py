"""The families of networks in training. A new one is a file beside this one and a line in `TRAINING`.

A file holds `FAMILY`, the family's record: see `occbev_training.models.families.record`. Its configuration, and what the
robot needs of it, stand in `occbev.inference.families`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from occbev.config import ModelConfig
from occbev.inference.tables import Augmentation
from occbev_training.models.families import bevdet, bevformer, detr3d, lift_splat
from occbev_training.models.families.record import TrainingFamily
from occbev_training.models.geometry import Geometry
from occbev_training.models.graphs import Graph, GraphError

TRAINING: Mapping[str, TrainingFamily[Any]] = {
    "lss": lift_splat.FAMILY,
    "bevdet": bevdet.FAMILY,
    "bevformer": bevformer.FAMILY,
    "detr3d": detr3d.FAMILY,
}
"""Key `family` of a model's configuration -> its record."""


def training_family(model: ModelConfig) -> TrainingFamily[Any]:
    """Return the record of a model's family."""
    return TRAINING[model.family]


def make_geometry(
    model: ModelConfig,
    intrinsic: Sequence[ArrayLike],
    cam2ego: ArrayLike,
    camera_valid: ArrayLike,
    augmentations: Sequence[Augmentation | None] | None = None,
) -> Geometry:
    """Return what a network of the model's family takes as geometry, see `TrainingFamily.geometry`."""
    family = training_family(model)
    return family.geometry(model, _same_lenses(intrinsic), cam2ego, camera_valid, augmentations)


def _same_lenses(intrinsics: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    """Bring rigs of pinholes (N, 3, 3) and of other lenses (N, 3, 18) into one shape."""
    arrays = [np.asarray(intrinsic, np.float64) for intrinsic in intrinsics]
    columns = max(array.shape[2] for array in arrays)
    if all(array.shape[2] == columns for array in arrays):
        return arrays
    return [np.pad(array, ((0, 0), (0, 0), (0, columns - array.shape[2]))) for array in arrays]


def make_graph(network: nn.Module, form: str = "onnx") -> Graph:
    """Make the graph of a network of any family; form: a key of `TrainingFamily.graphs`.

    Raises: GraphError if it has none.
    """
    for family in TRAINING.values():
        if type(network) is family.network:
            if form not in family.graphs:
                raise GraphError(f"a {type(network).__name__} has no {form!r} graph, only {sorted(family.graphs)}")
            return family.graphs[form](network)
    raise GraphError(f"a {type(network).__name__} is no network of a known family")


def reduced(model: ModelConfig) -> ModelConfig:
    """Return the same architecture at a small size, see `TrainingFamily.reduce`."""
    reduced: ModelConfig = training_family(model).reduce(model)
    return reduced
