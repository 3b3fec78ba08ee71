"""The pose messages of a vehicle's CAN bus, as nuScenes' CAN expansion holds them: ROOT/can_bus/SCENE_pose.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occbev.ego_signals import EgoSignals
from occbev_training.sources.recording import RecordingError

FIELDS = ("accel", "rotation_rate", "vel")
"""Fields of a message in the order of `EgoSignals`, three numbers each, in base_link and SI units."""


@dataclass(frozen=True)
class CanBus:
    """Messages of one scene. stamp_ns: (P,) increasing. values: (P, 9), see `EgoSignals`."""

    stamp_ns: NDArray[np.int64]
    values: NDArray[np.float64]

    def at(self, stamp_ns: int) -> EgoSignals:
        """Return the last message that is not later, the first where there is none, as published weights know them."""
        place = max(0, int(np.searchsorted(self.stamp_ns, stamp_ns, side="right")) - 1)
        return EgoSignals.of(self.values[place].tolist())


def read_can_bus(root: Path, scene: str) -> CanBus | None:
    """Read the messages of one scene, None where there is no file.

    Raises:
        RecordingError: the file is there but holds no such messages.
    """
    path = root / "can_bus" / f"{scene}_pose.json"
    if not path.is_file():
        return None
    try:
        rows = sorted(json.loads(path.read_bytes()), key=lambda row: int(row["utime"]))
        stamp_ns = np.array([int(row["utime"]) * 1000 for row in rows], np.int64)
        values = np.array([[row[name] for name in FIELDS] for row in rows], np.float64).reshape(-1, 3 * len(FIELDS))
    except (ValueError, KeyError, TypeError) as error:
        raise RecordingError(f"{path}: want rows with utime and {', '.join(FIELDS)}: {error}") from error
    if not len(rows) or not np.all(np.isfinite(values)):
        raise RecordingError(f"{path}: {'holds no message' if not len(rows) else 'holds values that are not finite'}")
    return CanBus(stamp_ns, values)
