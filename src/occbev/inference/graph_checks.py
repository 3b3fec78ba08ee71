"""Check a graph against its package's configuration and against this machine before it is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.config import ModelConfig

Shape = tuple[int | None, ...]
"""Sizes along the axes, None where one is free."""

MAX_TENSOR = 2**28
"""Most values of one tensor inside a graph: 1 GB of float32, twenty times what the largest known network has."""


class GraphError(ValueError):
    """A graph that is not the one its package describes, saying which tensor and what would be right."""


def require_fit(path: Path, model: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    """Compare the shapes of a graph's inputs and outputs, by name, with the model configuration beside it.

    Raises:
        GraphError: naming the tensor, its shape and the one that the configuration asks for.
    """
    for name, wanted in _wanted_shapes(model).items():
        found = shapes.get(name)
        if found is not None and not _fits(found, wanted):
            raise GraphError(f"{path}: {name} is {_text(found)}, its config.yaml describes {_text(wanted)}")


def require_finite(path: Path, constants: Iterable[tuple[str, NDArray[Any]]]) -> None:
    """Refuse weights that are NaN, and infinite ones but for single numbers, which limits of a clamp may be."""
    for name, values in constants:
        if values.dtype.kind == "f" and (np.isnan(values).any() or (values.size > 1 and np.isinf(values).any())):
            raise GraphError(f"{path}: the weights {name} {values.shape} are not finite")


def require_small(path: Path, shapes: Iterable[tuple[str, Shape]]) -> None:
    """Refuse a graph with a tensor of over `MAX_TENSOR` values before memory is taken for it."""
    for name, shape in shapes:
        values = int(np.prod([float(n or 1) for n in shape]))
        if values > MAX_TENSOR:
            raise GraphError(f"{path}: the tensor {name} {_text(shape)} has {values:.3g} values, at most {MAX_TENSOR}")


def _wanted_shapes(model: ModelConfig) -> dict[str, Shape]:
    volume, plane = model.grid.shape[::-1], model.bev.shape[::-1]
    return {
        "images": (1, None, 3, model.image.height, model.image.width),
        "occupancy_logits": (1, len(model.occupancy_classes), *volume),
        "reconstruction_logits": (1, 2, *volume),
        "heatmap": (1, len(model.detection_classes), *plane),
        "box": (1, None, *plane),
        "class_logits": (1, None, len(model.detection_classes)),
        "box_codes": (1, None, 10),
    }


def _fits(found: Shape, wanted: Shape) -> bool:
    return len(found) == len(wanted) and all(
        a is None or b is None or a == b for a, b in zip(found, wanted, strict=True)
    )


def _text(shape: Shape) -> str:
    return "x".join("?" if n is None else str(n) for n in shape)
