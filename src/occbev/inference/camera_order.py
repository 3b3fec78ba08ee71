"""Assign the cameras of a rig to the cameras that a network was trained with.

BEVFormer and DETR3D have weights for each camera. The order that they were trained with travels with them; the cameras
of a rig are found by name, or for other names by where they look.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.config import ConfigError
from occbev.geometry import wrap_angle
from occbev.rig import CameraRig

MAX_PLACES = 8
"""Cameras that an order may hold: every way to assign them is tried."""


@dataclass(frozen=True)
class CameraOrder:
    """The cameras that weights belong to, in their order; empty if the order does not matter."""

    names: tuple[str, ...] = ()
    """Names of the cameras."""
    yaw_deg: tuple[float, ...] = ()
    """Where each looks: degrees from straight ahead, to the left."""

    def __post_init__(self) -> None:
        if len(self.names) != len(self.yaw_deg) or len(self.names) > MAX_PLACES:
            raise ConfigError(
                f"cameras: {len(self.names)} names and {len(self.yaw_deg)} directions; want as many, at most {MAX_PLACES}"
            )

    def places_by_direction(self, cam2ego: ArrayLike) -> NDArray[np.int32]:
        """Return the place (N,) of each camera, no place twice, with the least sum of squared angles.

        cam2ego: (N, 4, 4). Without an order they keep theirs. Raises: ConfigError for more cameras than places.
        """
        poses = np.asarray(cam2ego, np.float64)
        if not self.names:
            return np.arange(len(poses), dtype=np.int32)
        if len(poses) > len(self.names):
            raise ConfigError(f"{len(poses)} cameras, the network has weights for {len(self.names)}: {self.names}")
        yaw = np.arctan2(poses[:, 1, 2], poses[:, 0, 2])
        squares = np.asarray(wrap_angle(yaw[:, None] - np.deg2rad(self.yaw_deg))) ** 2  # (N, places)
        ways = np.array(list(itertools.permutations(range(len(self.names)), len(poses))), np.int32)
        best: NDArray[np.int32] = ways[squares[np.arange(len(poses)), ways].sum(1).argmin()]
        return best

    def knows(self, rig: CameraRig) -> bool:
        """Whether every camera of the rig has the name of one of its own."""
        return bool(self.names) and set(rig.names) <= set(self.names)

    def places(self, rig: CameraRig) -> NDArray[np.int32]:
        """Return the place (N,) of each camera of a rig: by name, or where a name is unknown all by direction."""
        if self.knows(rig):
            return np.array([self.names.index(name) for name in rig.names], np.int32)
        return self.places_by_direction(rig.cam2egos)

    def describe(self, rig: CameraRig) -> str:
        """Say which camera takes which place, and how it was chosen; empty if the order does not matter."""
        if not self.names:
            return ""
        pairs = zip(rig.names, self._names_at(self.places(rig)), strict=True)
        how = "name" if self.knows(rig) else "viewing direction"
        return f"by {how}: " + ", ".join(f"{own} as {trained}" for own, trained in pairs)

    def _names_at(self, places: NDArray[np.int32]) -> Sequence[str]:
        return [self.names[place] for place in places]
