"""What the processes of one training run share: sums, decisions, and the state of their random generators.

Everything works in a single process too, where it costs nothing.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed


def broadcast_decision(decision: list[Any]) -> list[Any]:
    """Return what the first process decided."""
    if distributed.is_available() and distributed.is_initialized():
        broadcast_object_list(decision)
    return decision


def gather_values(value: Any) -> list[Any]:
    """Return the value of every process, in order of rank."""
    if distributed.is_available() and distributed.is_initialized():
        found: list[Any] = gather_object([value])
        return found
    return [value]


def random_state() -> dict[str, Any]:
    """Return the state of every random generator of this process, as values that `torch.load` reads safely."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, internal, normal = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), normal],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was taken."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, normal = state["python"]
    random.setstate((version, tuple(internal), normal))
