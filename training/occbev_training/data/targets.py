"""Training targets of a sample for voxels and pixels, each in one compiled pass.

Training draws a new augmentation every time a sample is shown, so that this runs for every sample of every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from occbev.classes import FREE, UNOBSERVED_STATE
from occbev.grid import VoxelGrid
from occbev_training.data.augment import Draw, live_bits, voxel_sources
from occbev_training.data.cache import CachedSample


@dataclass(frozen=True)
class VoxelTargets:
    """Volumes (X, Y, Z), moved with the scene.

    visible: seen by a living camera. evidence: sweeps that hit or passed. semantics_mask: supervised semantics.
    """

    state: NDArray[np.uint8]
    visible: NDArray[np.bool_]
    evidence: NDArray[np.uint8]
    semantics: NDArray[np.uint8]
    semantics_mask: NDArray[np.bool_]


def voxel_targets(
    sample: CachedSample,
    draw: Draw,
    alive: NDArray[np.bool_],
    grid: VoxelGrid,
    semantic_voxels: int,
    unseen_voxels: int = 0,
) -> VoxelTargets:
    """Move the label of a sample with a draw and choose which semantics are supervised.

    alive: (N,), cameras that show something. semantic_voxels: about so many of the voxels that they see have a say.
    unseen_voxels: as in `TrainingConfig`; without any dense truth there are none.
    What only a missing camera could see is not asked for.
    """
    plane, height = voxel_sources(draw, grid)
    volumes = np.empty((5, *grid.shape), np.uint8)
    label = (sample.state, sample.camera_visible, sample.hit_sweeps, sample.pass_sweeps, sample.semantics)
    state, bits, hits, passes, semantics = (np.ascontiguousarray(volume) for volume in label)
    mask = np.ascontiguousarray(sample.mask_camera)
    live, fills = np.uint8(live_bits(alive)), np.array([UNOBSERVED_STATE, FREE], np.uint8)
    seen = _move_label(state, bits, hits, passes, semantics, mask, plane, height, live, fills, volumes)
    state, visible, evidence, semantics, chosen = volumes
    if seen:
        hidden = chosen.size - seen if unseen_voxels else 0
        seed, shares = np.uint32(draw.seed & 0xFFFFFFFF), (_share(semantic_voxels, seen), _share(unseen_voxels, hidden))
        _choose(chosen.reshape(-1), seed, shares[0], shares[1])
        chosen[plane < 0] = chosen[..., height < 0] = 0  # nothing is known of what was outside before the turn
    return VoxelTargets(state, visible.view(bool), evidence, semantics, chosen.view(bool))


def _share(most: int, count: int) -> np.uint32:
    """Return below which of 2 ** 32 numbers one of `count` voxels is chosen, for about `most` of them."""
    return np.uint32(0xFFFFFFFF * min(1.0, most / count) if count else 0)


def nearest_depth(
    camera: NDArray[np.uint8],
    pixel: NDArray[np.float32],
    depth: NDArray[np.float32],
    matrices: NDArray[np.float64],
    scale: NDArray[np.float64],
    alive: NDArray[np.bool_],
    shape: tuple[int, int, int],
    stride: int,
) -> NDArray[np.float32]:
    """Return the depth of the nearest return in each stride x stride patch (N, h, w), infinite without one.

    camera (P,), pixel (P, 2), depth (P,): returns in the images. matrices: (N, 3, 3), what moves each image's pixels.
    scale: (N,), metres per unit of depth of each camera.
    shape: of the result; returns outside it or of a camera that is not alive are left out.
    """
    nearest = np.full(shape, np.inf, np.float32)
    _take_nearest(camera, pixel, depth, np.ascontiguousarray(matrices[:, :2]), scale, alive, stride, nearest)
    return nearest


@njit(cache=True, nogil=True)
def _move_label(state, bits, hits, passes, semantics, mask, plane, height, live, fills, out):  # type: ignore[no-untyped-def]
    """Fill out (5, X, Y, Z) with state, visible, evidence, semantics and mask; return how many the mask holds.

    plane: (X, Y) flat index over (X, Y) of where each column comes from, height: (Z,); -1 where that is outside.
    fills: state and semantics of what comes from there.
    """
    columns, rows = plane.shape
    layers = len(height)
    upright = True
    for z in range(layers):
        upright = upright and height[z] == z
    for x in range(columns):
        for y in range(rows):
            source = plane[x, y]
            a, b = source // rows, source % rows
            if source >= 0 and upright:  # the usual case: columns are copied whole, sixteen voxels at a time
                for z in range(layers):
                    by = bits[a, b, z]
                    visible = by & live
                    out[0, x, y, z] = state[a, b, z]
                    out[1, x, y, z] = visible != 0
                    out[2, x, y, z] = min(np.uint16(hits[a, b, z]) + np.uint16(passes[a, b, z]), np.uint16(255))
                    out[3, x, y, z] = semantics[a, b, z]
                    out[4, x, y, z] = mask[a, b, z] & ((visible != 0) | (by == 0))
                continue
            for z in range(layers):
                c = height[z]
                inside = source >= 0 and c >= 0
                by = bits[a, b, c] if inside else np.uint8(0)
                visible = by & live
                out[0, x, y, z] = state[a, b, c] if inside else fills[0]
                out[1, x, y, z] = visible != 0
                out[2, x, y, z] = min(int(hits[a, b, c]) + int(passes[a, b, c]), 255) if inside else 0
                out[3, x, y, z] = semantics[a, b, c] if inside else fills[1]
                out[4, x, y, z] = inside and mask[a, b, c] and (visible != 0 or by == 0)
    return np.sum(out[4].ravel() != 0)


@njit(cache=True, nogil=True)
def _choose(mask, seed, share, other_share):  # type: ignore[no-untyped-def]
    """Keep voxels of a mask (M,) whose number is at most the share, and set others by the other share.

    A voxel's number is a hash of its index and the seed (Wellons 2018, "lowbias32"): eight of them cost as much as one
    of a generator.
    """
    for i in range(len(mask)):
        number = np.uint32(i) ^ seed
        number = np.uint32((number ^ (number >> np.uint32(16))) * np.uint32(0x7FEB352D))
        number = np.uint32((number ^ (number >> np.uint32(15))) * np.uint32(0x846CA68B))
        number ^= number >> np.uint32(16)
        limit = share if mask[i] else other_share
        mask[i] = (number <= limit) & (limit > 0)


@njit(cache=True, nogil=True)
def _take_nearest(camera, pixel, depth, matrices, scale, alive, stride, nearest):  # type: ignore[no-untyped-def]
    """Lower every patch of nearest (N, h, w) to the depths of the returns that lie in it, in units of `scale`."""
    _, rows, columns = nearest.shape
    for index in range(len(camera)):
        which = camera[index]
        if not alive[which]:
            continue
        m, px, py = matrices[which], np.float64(pixel[index, 0]), np.float64(pixel[index, 1])
        u = m[0, 0] * px + m[0, 1] * py + m[0, 2]
        v = m[1, 0] * px + m[1, 1] * py + m[1, 2]
        if u >= 0 and v >= 0 and u < columns * stride and v < rows * stride:
            row, column = int(v // stride), int(u // stride)
            nearest[which, row, column] = min(nearest[which, row, column], np.float32(depth[index] / scale[which]))
