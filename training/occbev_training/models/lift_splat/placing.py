"""Frustum points of a batch into BEV cells, compiled: what `occbev.inference.tables` does for one rig on the robot.

Every sample of a training has a rig of its own, since augmentation changes it, so that this runs for each of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from occbev.config import LiftConfig
from occbev.grid import BevGrid
from occbev.inference.tables import LiftPoints, bin_depths, depth_scale, feature_rays


def place_frusta(
    intrinsic: ArrayLike, cam2ego: ArrayLike, image_size: tuple[int, int], lift: LiftConfig, bev: BevGrid
) -> LiftPoints:
    """Return what `occbev.inference.tables.lift_points` does, to the bit, without ever holding all points."""
    matrices, poses = np.asarray(intrinsic, np.float64), np.asarray(cam2ego, np.float64)
    rays = feature_rays(matrices, poses, image_size, lift)
    depths = depth_scale(matrices, lift)[:, None] * bin_depths(lift)  # (N, D)
    lo, hi = lift.z_range
    lower, spans = np.array([*bev.lo, lo]), np.array([*bev.pitch, hi - lo])
    counts, scales = np.array([*bev.shape, lift.height_bins]), np.array([1.0, 1.0, lift.height_bins])
    cell = _find_cells(rays, depths, poses[:, :3, 3], lower, spans, scales, counts, lift.reference_quirks)
    kept, order = sort_stably(cell, bev.size * lift.height_bins)
    pixels = rays.shape[1]
    pixel = order // (depths.shape[1] * pixels) * pixels + order % pixels
    return LiftPoints(pixel.astype(np.int32), order, kept)


def sort_stably(keys: NDArray[np.int32], count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the keys below `count` in order, and where each was; those of one value stay in order, -1 is left out."""
    begins = _begins(keys, count)
    return _spread(keys, begins, int(begins[-1]))


def find_begins(keys: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """Return where the entries of each value below `count` begin in sorted keys (count,)."""
    return np.asarray(_begins(keys, count)[:-1], np.int32)


@njit(cache=True, nogil=True)
def _find_cells(rays, depths, origins, lower, spans, scales, counts, quirks):  # type: ignore[no-untyped-def]
    """Return the flat cell of each point (N * D * P,) int32, -1 outside; rays: (N, P, 3), depths: (N, D)."""
    cameras, bins, pixels = len(rays), depths.shape[1], rays.shape[1]
    cell = np.full(cameras * bins * pixels, -1, np.int32)
    place = np.empty(3)
    at = 0
    for camera in range(cameras):
        for number in range(bins):
            for pixel in range(pixels):
                inside = True
                for axis in range(3):
                    point = rays[camera, pixel, axis] * depths[camera, number] + origins[camera, axis]
                    value = (point - lower[axis]) / spans[axis] * scales[axis]
                    value = np.trunc(value) if quirks else np.floor(value)
                    inside = inside and value >= 0 and value < counts[axis]
                    place[axis] = value
                if inside:
                    cell[at] = (int(place[2]) * counts[1] + int(place[1])) * counts[0] + int(place[0])
                at += 1
    return cell


@njit(cache=True, nogil=True)
def _begins(keys, count):  # type: ignore[no-untyped-def]
    """Return where each value's entries begin when sorted, and their number at the end (count + 1,)."""
    begins = np.zeros(count + 1, np.int64)
    for key in keys:
        if key >= 0:
            begins[key + 1] += 1
    for value in range(count):
        begins[value + 1] += begins[value]
    return begins


@njit(cache=True, nogil=True)
def _spread(keys, begins, total):  # type: ignore[no-untyped-def]
    """Put entries in order, each after those of its value that came before."""
    following = begins[:-1].copy()
    kept, order = np.empty(total, np.int32), np.empty(total, np.int32)
    for at in range(len(keys)):
        key = keys[at]
        if key >= 0:
            kept[following[key]] = key
            order[following[key]] = at
            following[key] += 1
    return kept, order
