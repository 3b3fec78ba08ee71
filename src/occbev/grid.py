"""Voxel and BEV grids: the only place that knows both metres and array axes.

Arrays outside the network are indexed [x, y, z] as in Occ3D; network volumes are (..., Z, Y, X)
and BEV maps (..., Y, X). The conversions between them live here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class VoxelGrid:
    """An axis-aligned box of voxels in one frame.

    lo: lower corner x, y, z. pitch: voxel size x, y, z. shape: voxels along x, y, z.
    """

    lo: tuple[float, float, float]
    pitch: tuple[float, float, float]
    shape: tuple[int, int, int]
    frame: str = "base_link"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lo", tuple(float(v) for v in self.lo))
        object.__setattr__(self, "pitch", tuple(float(v) for v in self.pitch))
        object.__setattr__(self, "shape", tuple(int(v) for v in self.shape))
        if not (len(self.lo) == len(self.pitch) == len(self.shape) == 3):
            raise ValueError(f"a grid has three axes; got lo {self.lo}, pitch {self.pitch}, shape {self.shape}")
        if not np.isfinite([*self.lo, *self.pitch]).all():
            raise ValueError(f"grid corner and pitch must be finite; got {self.lo} and {self.pitch}")
        if min(self.pitch) <= 0 or min(self.shape) <= 0:
            raise ValueError(f"grid pitch and shape must be positive; got {self.pitch} and {self.shape}")

    @property
    def hi(self) -> tuple[float, float, float]:
        """Upper corner x, y, z."""
        x, y, z = (lo + pitch * n for lo, pitch, n in zip(self.lo, self.pitch, self.shape, strict=True))
        return x, y, z

    @property
    def size(self) -> int:
        """Number of voxels."""
        return int(np.prod(self.shape))

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this grid in labels, checkpoints and engines."""
        return hashlib.sha256(json.dumps(self.as_record(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def bev(self) -> BevGrid:
        """The grid's ground plane."""
        return BevGrid(self.lo[:2], self.pitch[:2], self.shape[:2], self.frame)

    def as_record(self) -> dict[str, Any]:
        """The grid as plain values, for YAML and JSON."""
        return {
            "lo": list(self.lo),
            "pitch": list(self.pitch),
            "shape": list(self.shape),
            "frame": self.frame,
            "axis_order": "xyz",
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> VoxelGrid:
        """Read `as_record` back; raises ValueError for an axis order other than xyz."""
        if record.get("axis_order", "xyz") != "xyz":
            raise ValueError(f"grid axis order {record['axis_order']!r}: only 'xyz' is supported")
        return cls(record["lo"], record["pitch"], record["shape"], record.get("frame", "base_link"))

    def indices(self, points: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the voxel (M, 3) of each of (M, 3) points and which of them lie in the grid.

        Half-open: 0 <= floor((p - lo) / pitch) < shape. Never clamped; NaN is outside.
        """
        cells = np.floor((np.asarray(points, np.float64) - self.lo) / self.pitch)
        with np.errstate(invalid="ignore"):
            inside = np.all((cells >= 0) & (cells < self.shape), axis=-1)
        return np.where(inside[..., None], cells, 0).astype(np.int64), inside

    def flatten(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return (ix * ny + iy) * nz + iz of (M, 3) voxel indices."""
        i = np.asarray(indices, np.int64)
        return (i[..., 0] * self.shape[1] + i[..., 1]) * self.shape[2] + i[..., 2]

    def centres(self, indices: ArrayLike | None = None) -> NDArray[np.float64]:
        """Return centres (..., 3) of (..., 3) voxel indices, or of all voxels (X, Y, Z, 3)."""
        if indices is None:
            indices = np.stack(np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij"), -1)
        return np.asarray(self.lo) + (np.asarray(indices) + 0.5) * np.asarray(self.pitch)


@dataclass(frozen=True)
class BevGrid:
    """A ground-plane grid. lo, pitch, shape along x (forward) and y (left)."""

    lo: tuple[float, float]
    pitch: tuple[float, float]
    shape: tuple[int, int]
    frame: str = "base_link"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lo", tuple(float(v) for v in self.lo))
        object.__setattr__(self, "pitch", tuple(float(v) for v in self.pitch))
        object.__setattr__(self, "shape", tuple(int(v) for v in self.shape))
        if not np.isfinite([*self.lo, *self.pitch]).all():
            raise ValueError(f"grid corner and pitch must be finite; got {self.lo} and {self.pitch}")
        if len(self.shape) != 2 or min(self.pitch) <= 0 or min(self.shape) <= 0:
            raise ValueError(f"a BEV grid has two positive axes; got pitch {self.pitch}, shape {self.shape}")

    @property
    def hi(self) -> tuple[float, float]:
        """Upper corner x, y."""
        return (
            self.lo[0] + self.pitch[0] * self.shape[0],
            self.lo[1] + self.pitch[1] * self.shape[1],
        )

    @property
    def size(self) -> int:
        """Number of cells."""
        return self.shape[0] * self.shape[1]

    def map_coordinates(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Return continuous (column, row) = (x, y) cell coordinates (M, 2); cell i spans [i, i + 1)."""
        return (np.asarray(xy, np.float64) - self.lo) / self.pitch

    def metres(self, map_coordinates: ArrayLike) -> NDArray[np.float64]:
        """Invert `map_coordinates`."""
        return np.asarray(map_coordinates, np.float64) * self.pitch + self.lo


def volume_from_xyz(array: NDArray[Any]) -> NDArray[Any]:
    """Turn a label array (..., X, Y, Z) into network order (..., Z, Y, X); a view."""
    return np.swapaxes(array, -1, -3)


def xyz_from_volume(volume: NDArray[Any]) -> NDArray[Any]:
    """Turn a network volume (..., Z, Y, X) into label order (..., X, Y, Z); a view."""
    return np.swapaxes(volume, -1, -3)


GRIDS: dict[str, VoxelGrid] = {
    "occ3d": VoxelGrid((-40.0, -40.0, -1.0), (0.4, 0.4, 0.4), (200, 200, 16)),
    "det": VoxelGrid((-51.2, -51.2, -3.0), (0.512, 0.512, 0.5), (200, 200, 16)),
    "tiny": VoxelGrid((-16.0, -16.0, -1.0), (0.8, 0.8, 0.8), (40, 40, 8)),
}
"""Named presets; `occ3d` is the grid of Occ3D-nuScenes."""
