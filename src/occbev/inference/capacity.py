"""What all geometry tables share: their type, and the error of a rig that needs more room than a graph has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tables = dict[str, NDArray[np.int32] | NDArray[np.float32]]


class TableCapacityError(ValueError):
    """A rig needs more table entries than the exported graph has; the message names both numbers."""


def check_capacity(what: str, needed: int, capacity: int, key: str) -> None:
    """Raise TableCapacityError if a rig needs more than there is; key: the configuration that says how much."""
    if needed > capacity:
        raise TableCapacityError(
            f"this rig needs {needed} {what}, the exported graph holds {capacity}; export with a larger {key}"
        )
