"""The published Occ-BEV label recipe, defects included, so that it can be compared with ours fairly.

Do not train your own models with it: space that no beam reached counts as free,
movers smear, outliers are clamped onto the border and the grid stands on the LiDAR.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE_STATE, OCCUPIED_STATE
from occbev.geometry import invert_transform, transform_points
from occbev.grid import VoxelGrid
from occbev_training.occupancy.labels import OccupancyLabel
from occbev_training.sources.recording import Recording

_LOW, _HIGH, _SHAPE = np.array([-51.2, -51.2, -5.0]), np.array([51.2, 51.2, 3.0]), (200, 200, 16)

PAPER_GRID = VoxelGrid(
    tuple(_LOW.tolist()),
    tuple(((_HIGH - _LOW) / (np.array(_SHAPE) - 1)).tolist()),
    _SHAPE,
    frame="lidar_forward",
)
"""The recipe's grid: extent / (n - 1) as pitch, origin at the LiDAR, x forward."""

_LIDAR2FORWARD = np.array([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
"""nuScenes LiDAR axes (x right, y forward) to x forward, y left; the origin stays at the sensor."""

FORWARD2LIDAR = _LIDAR2FORWARD.T
"""The way back: from the recipe's grid to the LiDAR."""


def paper_label(recording: Recording, key: int, keyframes: int = 2) -> OccupancyLabel:
    """Label one key frame as the reference script does, from all sweeps of `keyframes` keys either way.

    State is free wherever it is not occupied; no camera sees anything; `grid` is `PAPER_GRID`.
    Raises PoseError where a sweep has no pose.
    """
    keys = recording.key_stamp_ns
    first, last = keys[max(0, key - keyframes)], keys[min(len(keys) - 1, key + keyframes)]
    stamps = recording.sweep_stamp_ns
    chosen = np.flatnonzero((stamps >= first) & (stamps <= last))
    key_sweeps = {int(np.argmin(np.abs(stamps - stamp))) for stamp in keys}
    clouds = [_cloud(recording, int(i), int(keys[key]), int(i) in key_sweeps) for i in chosen]
    points = np.concatenate([np.zeros((0, 3)), *clouds])
    inside = (np.abs(points[:, :2]) <= 60).all(axis=1) & (np.abs(points[:, 2]) <= 10)
    points = transform_points(_LIDAR2FORWARD, _thin(points[inside], 0.2))
    cells = np.floor((np.clip(points, _LOW, _HIGH) - _LOW) / PAPER_GRID.pitch).astype(np.int64)
    state = np.full(_SHAPE, FREE_STATE, np.uint8)
    state[tuple(cells.T)] = OCCUPIED_STATE
    nothing = np.zeros(_SHAPE, np.uint8)
    occupied = int(np.count_nonzero(state == OCCUPIED_STATE))
    stats = {
        "sweeps": len(chosen),
        "occupied": occupied,
        "free": state.size - occupied,
        "unobserved": 0,
    }
    return OccupancyLabel(state, nothing, nothing, nothing, stats, PAPER_GRID)


def _cloud(recording: Recording, index: int, key_ns: int, is_key: bool) -> NDArray[np.float64]:
    """Return the points (M, 3) of one sweep in the LiDAR frame at the key time, not deskewed."""
    sweep = recording.sweep(index)
    points = np.asarray(sweep.points, np.float64)
    if not is_key:  # the script filters the vehicle's body in these sweeps only
        points = points[~((np.abs(points[:, 0]) < 1.0) & (np.abs(points[:, 1]) < 2.0))]
    ego2key = recording.trajectory.relative(sweep.stamp_ns, key_ns)
    lidar2key = invert_transform(recording.lidar2ego) @ ego2key @ sweep.lidar2ego
    return transform_points(lidar2key, points[np.isfinite(points).all(axis=1)])


def _thin(points: NDArray[np.float64], size: float) -> NDArray[np.float64]:
    """Replace the points of each cube of `size` by their mean."""
    _, place, count = np.unique(
        np.floor(points / size).astype(np.int64), axis=0, return_inverse=True, return_counts=True
    )
    sums = [np.bincount(place.ravel(), points[:, a], len(count)) for a in range(3)]
    return np.stack(sums, axis=-1) / count[:, None]
