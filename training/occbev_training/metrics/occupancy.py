"""Scores of occupancy: confusion and mIoU over a mask, binary IoU, and RayIoU on the CPU.

Counts are added over a whole data set and divided once; nothing is a mean of per-sample scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.classes import FREE, OCCUPANCY_CLASSES
from occbev.geometry import invert_transform, transform_points
from occbev.grid import VoxelGrid

Array = NDArray[np.float64]

RAY_THRESHOLDS = (1.0, 2.0, 4.0)
"""Depth differences in metres within which a ray of the right class is right."""

MAX_ORIGINS = 8
ORIGIN_LIMIT = 39.0
"""LiDAR positions count as ray origins while |x| and |y| are below this many metres."""

RING_EDGES = (0.0, 10.0, 20.0, 30.0, 40.0)
"""Metres from the vehicle in the plane at which a ring of the IoU by range begins; the last one has no end."""

MAX_ELEVATION = 0.21
"""Elevations in radians of the rays go on in steps until one reaches this."""


class GridError(ValueError):
    """Voxels that cannot be compared because they are on different grids."""


def require_grid(truth: VoxelGrid, predicted: VoxelGrid) -> None:
    """Raise GridError unless both grids are one: grids of equal shape may differ in place and pitch."""
    if truth != predicted:
        raise GridError(
            f"voxels are predicted on {describe_grid(predicted)}, the true ones are on {describe_grid(truth)}; "
            "score them on a cache that 'occbev-train prepare' made for this model"
        )


def describe_grid(grid: VoxelGrid) -> str:
    """Return a grid in words, for messages."""
    cells = "x".join(map(str, grid.shape))
    return f"{cells} voxels of {grid.pitch} m from {grid.lo} in {grid.frame}"


def confusion(
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    mask: NDArray[np.bool_] | None = None,
    classes: int = len(OCCUPANCY_CLASSES),
) -> NDArray[np.int64]:
    """Count voxels by (true class, predicted class), as (K, K).

    mask: which voxels count; all if None. A truth outside 0..K-1, such as 255, is not counted.

    Raises:
        ValueError: the shapes differ or a counted prediction is no class.
    """
    if truth.shape != predicted.shape or (mask is not None and mask.shape != truth.shape):
        raise ValueError(
            f"truth {truth.shape}, prediction {predicted.shape} and mask "
            f"{None if mask is None else mask.shape} must have one shape"
        )
    if mask is not None:
        truth, predicted = truth[mask], predicted[mask]
    truth, predicted = truth.reshape(-1), predicted.reshape(-1)
    if truth.size and truth.max() >= classes:
        known = truth < classes
        truth, predicted = truth[known], predicted[known]
    if predicted.size and predicted.max() >= classes:
        raise ValueError(f"predicted class {int(predicted.max())}, classes are 0 to {classes - 1}")
    pair = truth.astype(np.intp) * classes + predicted
    return np.bincount(pair, minlength=classes * classes).reshape(classes, classes)


def class_ious(counts: ArrayLike) -> Array:
    """Return TP / (TP + FP + FN) of each class (K,), NaN where a class is in neither."""
    counts = np.asarray(counts, np.float64)
    right = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - right
    return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)


def mean_iou(counts: ArrayLike, free: int = FREE) -> float:
    """Return the mean IoU over all classes but free, as a fraction; classes in neither are left out."""
    ious = np.delete(class_ious(counts), free)
    return float(np.nanmean(ious)) if np.isfinite(ious).any() else math.nan


def score_occupied_iou(counts: ArrayLike, free: int = FREE) -> float:
    """Return the IoU of occupied (any class but free) against free, from the same counts."""
    counts = np.asarray(counts, np.float64)
    occupied = np.arange(len(counts)) != free
    right = counts[np.ix_(occupied, occupied)].sum()
    union = counts.sum() - counts[free, free]
    return float(right / union) if union else math.nan


def binary_counts(
    truth: NDArray[np.bool_], predicted: NDArray[np.bool_], mask: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Count (both, only truth, only prediction) occupied voxels, as (3,)."""
    if mask is not None:
        truth, predicted = truth & mask, predicted & mask
    both = int(np.count_nonzero(truth & predicted))
    return np.array([both, np.count_nonzero(truth) - both, np.count_nonzero(predicted) - both])


def binary_iou(counts: ArrayLike) -> float:
    """Return the IoU of summed `binary_counts`; NaN where nothing is occupied in either."""
    counts = np.asarray(counts, np.float64)
    return float(counts[0] / counts.sum()) if counts.sum() else math.nan


@functools.lru_cache(maxsize=4)
def range_rings(grid: VoxelGrid) -> NDArray[np.uint8]:
    """Return (X, Y) the ring of RING_EDGES in which each column of voxels stands, by its centre."""
    x, y = (
        lo + (np.arange(n) + 0.5) * pitch
        for lo, pitch, n in zip(grid.lo[:2], grid.pitch[:2], grid.shape[:2], strict=True)
    )
    distance = np.hypot(x[:, None], y[None])
    return (np.searchsorted(RING_EDGES, distance, side="right") - 1).astype(np.uint8)


def grouped_counts(
    truth: NDArray[np.bool_],
    predicted: NDArray[np.bool_],
    group: NDArray[np.uint8],
    groups: int,
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Return `binary_counts` of each group, (groups, 3).

    group: (X, Y, Z), or (X, Y) for whole columns; what is outside 0..groups-1 is not counted.
    """
    group = np.broadcast_to(group if group.ndim == truth.ndim else group[..., None], truth.shape)
    counts = []
    for chosen in (truth & predicted, truth & ~predicted, predicted & ~truth):
        of = group[chosen if mask is None else chosen & mask]
        counts.append(np.bincount(of, minlength=groups)[:groups])
    return np.stack(counts, 1).astype(np.int64)


def ring_names() -> tuple[str, ...]:
    """Return what the rings of RING_EDGES are called, such as "0-10 m"."""
    edges = [*RING_EDGES[1:], math.inf]
    return tuple(
        f"{lo:g}-{hi:g} m" if math.isfinite(hi) else f"over {lo:g} m" for lo, hi in zip(RING_EDGES, edges, strict=True)
    )


@dataclass(frozen=True)
class RayScores:
    """RayIoU. class_iou: (T, K - 1) by threshold and class without free, NaN where absent."""

    class_iou: Array

    @property
    def by_threshold(self) -> dict[float, float]:
        """Threshold in metres -> mean over classes; NaN without a ray to score."""
        return {
            t: float(np.nanmean(row)) if np.isfinite(row).any() else math.nan
            for t, row in zip(RAY_THRESHOLDS, self.class_iou, strict=True)
        }

    @property
    def ray_iou(self) -> float:
        """Mean over the thresholds, as a fraction."""
        return float(np.mean(list(self.by_threshold.values())))


def ray_counts(
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    origins: ArrayLike,
    grid: VoxelGrid,
    classes: int = len(OCCUPANCY_CLASSES),
) -> NDArray[np.int64]:
    """Count the rays of one sample, by class: (2 + T, K) of true ones, predicted ones, right ones by threshold.

    truth, predicted: (X, Y, Z), the last class free. origins: (O, 3) in base_link. Rays whose truth is free
    do not count.
    """
    free = classes - 1
    volumes = np.stack([truth, predicted])
    (true_label, label), (true_depth, depth) = cast_rays(volumes, origins, grid, free)
    counted = true_label != free
    true_label, label = true_label[counted], label[counted]
    away = np.abs(true_depth[counted] - depth[counted])
    same = true_label == label
    rows = [true_label, label, *(true_label[same & (away < limit)] for limit in RAY_THRESHOLDS)]
    return np.stack([np.bincount(row, minlength=classes)[:classes] for row in rows])


def ray_scores(counts: NDArray[np.int64]) -> RayScores:
    """Return the scores of summed `ray_counts` (2 + T, K)."""
    truths, guesses, right = counts[0], counts[1], counts[2:]
    union = (truths + guesses - right)[:, :-1].astype(np.float64)
    hits = right[:, :-1].astype(np.float64)
    return RayScores(np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0))


@functools.lru_cache(maxsize=1)
def ray_directions() -> NDArray[np.float32]:
    """Return the (14040, 3) unit directions of RayIoU: 39 elevations, 360 azimuths each."""
    elevation = [-math.atan(1 / (k + 1)) for k in range(10)]
    step = elevation[-1] - elevation[-2]
    while elevation[-1] < MAX_ELEVATION:
        elevation.append(elevation[-1] + step)
    up, around = np.meshgrid(elevation, np.deg2rad(np.arange(360)), indexing="ij")
    rays = np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)], -1)
    return rays.reshape(-1, 3).astype(np.float32)


def ray_origins(lidar2global: Array, key: int, ego2global: Array) -> NDArray[np.float32]:
    """Return the (O, 3) ray origins of one key frame: LiDAR positions of its scene near enough to it.

    lidar2global: (K, 4, 4) of all key frames of the scene. ego2global: (4, 4) of the key frame `key`.
    """
    positions = transform_points(invert_transform(ego2global), lidar2global[:, :3, 3])
    near = np.all(np.abs(positions[:, :2]) < ORIGIN_LIMIT, axis=1)
    near[key] = True
    positions = positions[near]
    if len(positions) > MAX_ORIGINS:
        chosen = np.round(np.linspace(0, len(positions) - 1, MAX_ORIGINS)).astype(np.int64)
        positions = positions[chosen]
    return positions.astype(np.float32)


def cast_rays(
    labels: NDArray[np.uint8],
    origins: ArrayLike,
    grid: VoxelGrid,
    free: int = FREE,
    rays: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Follow rays to the first voxel that is not free.

    labels: (X, Y, Z), or several volumes (V, X, Y, Z), which one walk serves. origins: (O, 3) in the
    grid's frame. rays: (R, 3) directions; those of RayIoU if None.
    Returns: label (O * R,) and distance (O * R,) in metres at which the ray leaves that voxel, with V
        in front for several volumes; a ray that meets nothing gets free and leaves the grid, one that
        never enters the grid free and 0.
    """
    if labels.shape[-3:] != grid.shape or labels.ndim not in (3, 4):
        raise ValueError(f"labels have shape {labels.shape}, the grid {grid.shape}")
    if len(set(grid.pitch)) != 1:
        raise ValueError(f"rays need cubic voxels, the grid's pitch is {grid.pitch}")
    rays = ray_directions() if rays is None else rays
    volumes = labels.reshape(-1, *grid.shape)
    origins = np.asarray(origins, np.float32).reshape(-1, 3)
    label, length = _caster()(volumes, origins, np.ascontiguousarray(rays, np.float32), grid, free)
    distance = (length * grid.pitch[0]).astype(np.float32)
    return (label[0], distance[0]) if labels.ndim == 3 else (label, distance)


Floats = NDArray[np.float32]
Cast = tuple[NDArray[np.uint8], Array]
"""Label and distance in voxels of every ray, (V, O * R)."""

_BORDER = 128
"""Code of the cells around a grid; below it, bit v says that volume v is not free."""


@functools.lru_cache(maxsize=1)
def _caster() -> Callable[[NDArray[np.uint8], Floats, Floats, VoxelGrid, int], Cast]:
    """Return the compiled walk where numba is installed, else the array form."""
    try:
        import numba
    except ImportError:
        return _cast_arrays
    walk = numba.njit(cache=True, nogil=True)(_walk_rays)

    def cast(volumes: NDArray[np.uint8], origins: Floats, rays: Floats, grid: VoxelGrid, free: int) -> Cast:
        lo, pitch = np.asarray(grid.lo, np.float32), np.asarray(grid.pitch, np.float32)
        parts = [
            walk(*_encode(volumes[first : first + 7], free), origins, rays, lo, pitch, free)
            for first in range(0, len(volumes), 7)
        ]
        label, length = zip(*parts, strict=True)
        return np.concatenate(label), np.concatenate(length)

    return cast


def _encode(volumes: NDArray[np.uint8], free: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return labels (V, X + 2, Y + 2, Z + 2) of at most 7 volumes and their codes (X + 2, Y + 2, Z + 2)."""
    shape = tuple(n + 2 for n in volumes.shape[1:])
    padded = np.full((len(volumes), *shape), free, np.uint8)
    padded[:, 1:-1, 1:-1, 1:-1] = volumes
    solid = (volumes != free).view(np.uint8)
    inner = solid[0].copy()
    for number in range(1, len(solid)):
        inner |= solid[number] << np.uint8(number)
    code = np.full(shape, _BORDER, np.uint8)
    code[1:-1, 1:-1, 1:-1] = inner
    return padded, code


def _walk_rays(
    labels: NDArray[np.uint8],
    code: NDArray[np.uint8],
    origins: Floats,
    rays: Floats,
    lo: Floats,
    pitch: Floats,
    free: int,
) -> Cast:
    """Step each ray from voxel to voxel (Amanatides & Woo 1987) until every volume stopped it.

    The form that numba compiles; labels and code of `_encode`. Starts and directions are rounded through
    float32 as the reference does. Ties go to z, then y, then x, and an axis with a zero direction is never
    stepped.
    """
    volumes, (nx, ny, nz) = labels.shape[0], code.shape
    stride_x, stride_y = ny * nz, nz
    cells, flat = code.reshape(-1), labels.reshape(volumes, -1)
    label = np.full((volumes, len(origins) * len(rays)), np.uint8(free), np.uint8)
    length = np.zeros((volumes, len(origins) * len(rays)))
    n = -1
    for o in range(len(origins)):
        x = np.float64((origins[o, 0] - lo[0]) / pitch[0])
        y = np.float64((origins[o, 1] - lo[1]) / pitch[1])
        z = np.float64((origins[o, 2] - lo[2]) / pitch[2])
        for r in range(len(rays)):
            n += 1
            dx = np.float64((rays[r, 0] + origins[o, 0] - lo[0]) / pitch[0]) - x
            dy = np.float64((rays[r, 1] + origins[o, 1] - lo[1]) / pitch[1]) - y
            dz = np.float64((rays[r, 2] + origins[o, 2] - lo[2]) / pitch[2]) - z
            norm = np.sqrt(dx * dx + dy * dy + dz * dz)
            dx, dy, dz = dx / norm, dy / norm, dz / norm
            i, j, k = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
            si, sj, sk = (1 if dx > 0 else -1), (1 if dy > 0 else -1), (1 if dz > 0 else -1)
            tx = ((i + (si > 0)) - x) / dx if dx != 0 else np.inf
            ty = ((j + (sj > 0)) - y) / dy if dy != 0 else np.inf
            tz = ((k + (sk > 0)) - z) / dz if dz != 0 else np.inf
            wx = abs(1 / dx) if dx != 0 else np.inf
            wy = abs(1 / dy) if dy != 0 else np.inf
            wz = abs(1 / dz) if dz != 0 else np.inf
            i, j, k = i + 1, j + 1, k + 1  # of the padded volumes
            outside = not (0 < i < nx - 1 and 0 < j < ny - 1 and 0 < k < nz - 1)
            while outside:
                if (
                    (i >= nx - 1 if si > 0 else i <= 0)
                    or (j >= ny - 1 if sj > 0 else j <= 0)
                    or (k >= nz - 1 if sk > 0 else k <= 0)
                ):
                    break  # beyond the grid and moving away
                if tx < ty and tx < tz:
                    i += si
                    tx += wx
                elif ty < tz:
                    j += sj
                    ty += wy
                else:
                    k += sk
                    tz += wz
                outside = not (0 < i < nx - 1 and 0 < j < ny - 1 and 0 < k < nz - 1)
            if outside:
                continue
            cell = i * stride_x + j * stride_y + k
            step_x, step_y = si * stride_x, sj * stride_y
            wanted, leaves = _BORDER + (1 << volumes) - 1, 0.0
            while True:
                met = cells[cell] & wanted
                if met != 0:
                    if met == _BORDER:
                        break
                    leaves = min(tx, min(ty, tz))
                    for v in range(volumes):
                        if met & (1 << v):
                            label[v, n], length[v, n] = flat[v, cell], leaves
                    wanted &= ~met
                    if wanted == _BORDER:
                        break
                leaves = min(tx, min(ty, tz))
                if tx < ty:
                    if tx < tz:
                        cell += step_x
                        tx += wx
                    else:
                        cell += sk
                        tz += wz
                elif ty < tz:
                    cell += step_y
                    ty += wy
                else:
                    cell += sk
                    tz += wz
            for v in range(volumes):
                if wanted & (1 << v):
                    length[v, n] = leaves
    return label, length


def _cast_arrays(volumes: NDArray[np.uint8], origins: Floats, rays: Floats, grid: VoxelGrid, free: int) -> Cast:
    """The same walk for all rays at once with numpy alone; slower, for machines without numba."""
    starts, directions = _voxel_rays(origins, rays, grid)
    results = [_walk_volume(volume, starts, directions, free) for volume in volumes]
    return np.stack([label for label, _ in results]), np.stack([length for _, length in results])


def _voxel_rays(origins: Floats, rays: Floats, grid: VoxelGrid) -> tuple[Array, Array]:
    """Return starts and unit directions (O * R, 3) in voxels, rounded through float32 as the reference does."""
    lo, pitch = np.asarray(grid.lo, np.float32), np.asarray(grid.pitch, np.float32)
    origins = origins.reshape(-1, 1, 3)
    start = (origins - lo) / pitch
    end = (rays[None] + origins - lo) / pitch
    direction = end.astype(np.float64) - start
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    start = np.broadcast_to(start, direction.shape)
    return start.reshape(-1, 3).astype(np.float64), np.ascontiguousarray(direction.reshape(-1, 3))


def _walk_volume(
    labels: NDArray[np.uint8], starts: Array, directions: Array, free: int
) -> tuple[NDArray[np.uint8], Array]:
    shape = np.array(labels.shape)
    label, length = np.full(len(starts), free, np.uint8), np.zeros(len(starts))
    ray = np.arange(len(starts))
    cell = np.floor(starts).astype(np.int64)
    step = np.where(directions > 0, 1, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        width = np.where(directions != 0, np.abs(1 / directions), np.inf)
        until = np.where(directions != 0, (cell + (step > 0) - starts) / directions, np.inf)
    while len(ray):
        gone = np.any(np.where(step > 0, cell >= shape, cell < 0), axis=1)
        inside = np.all((cell >= 0) & (cell < shape), axis=1)
        length[ray[inside]] = until[inside].min(axis=1)
        found = np.full(len(ray), free, np.uint8)
        found[inside] = labels[tuple(cell[inside].T)]
        label[ray] = found
        going = ~gone & (found == free) & np.isfinite(until).any(axis=1)
        ray, cell, step, until, width = (a[going] for a in (ray, cell, step, until, width))
        tx, ty, tz = until.T
        axis = np.where((tx < ty) & (tx < tz), 0, np.where(ty < tz, 1, 2))
        rows = np.arange(len(ray))
        cell[rows, axis] += step[rows, axis]
        until[rows, axis] += width[rows, axis]
    return label, length
