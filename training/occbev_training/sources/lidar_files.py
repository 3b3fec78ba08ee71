"""LiDAR files of plain float32 rows, as nuScenes, T4 and KITTI write them; a wrong number of columns is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occbev_training.sources.recording import RecordingError

COLUMNS = 5
"""Number of values of a point in nuScenes and T4: x, y, z, intensity, ring."""

_OTHER_COLUMNS = (3, 4, 5, 6, 7, 8)
_CLEARLY = 2.0
"""Another number of columns is taken for the right one if it makes points this many times smoother."""


def read_lidar_file(path: Path, columns: int = COLUMNS) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Read points (M, 3) in metres and their intensity (M,), None if the file has none.

    Raises:
        RecordingError: naming the file, where it is no file of such rows, or clearly one of other rows.
    """
    if path.suffix == ".pcd":
        raise RecordingError(f"{path}: a PCD file; rows of float32 are read, as in nuScenes' .pcd.bin")
    values = np.fromfile(path, "<f4")
    fitting = [n for n in _OTHER_COLUMNS if len(values) % n == 0 and n != columns]
    if path.stat().st_size % 4 or len(values) % columns:
        remedy = f"; rows of {fitting} would fit: --lidar-columns" if fitting else "; it is cut"
        raise RecordingError(f"{path}: {path.stat().st_size} bytes are no rows of {columns} float32{remedy}")
    other = _smoother_columns(values, columns, fitting)
    if other is not None:
        raise RecordingError(f"{path}: its rows look like {other} float32, not {columns}; give --lidar-columns {other}")
    rows = values.reshape(-1, columns)
    intensity = np.ascontiguousarray(rows[:, 3]) if columns > 3 else None
    return np.ascontiguousarray(rows[:, :3]), intensity


def _smoother_columns(values: NDArray[np.float32], columns: int, others: list[int]) -> int | None:
    """Return the number of columns that the values clearly have, where it is another.

    Neighbours in a file are neighbours in a scan, so that coordinates change little from row to row; where
    columns are mixed up they jump. Whole numbers in the fifth column are rings, which proves five.
    """
    rows = values.reshape(-1, columns)
    if len(rows) < 100 or (columns == COLUMNS and np.mean(rows[:, 4] == np.rint(rows[:, 4])) > 0.95):
        return None
    best = min(others, key=lambda n: _roughness(values, n), default=columns)
    return best if _roughness(values, best) * _CLEARLY < _roughness(values, columns) else None


def _roughness(values: NDArray[np.float32], columns: int) -> float:
    """Return the mean step from row to row of x, y and z, over their spread."""
    points = values.reshape(-1, columns)[:, :3].astype(np.float64)
    points = points[np.isfinite(points).all(1)]
    if len(points) < 2:
        return np.inf
    return float(np.mean(np.abs(np.diff(points, axis=0)).mean(0) / np.maximum(points.std(0), 1e-6)))
