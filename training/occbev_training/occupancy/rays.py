"""Voxel traversal: which cells a beam ends in, passes, and contradicts, counted per sweep.

Rays come from `sources.deskew`; the evidence made here is turned into states by `labels`.
Every count is an integer and every mean a quotient of integer sums, so order changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from occbev.grid import VoxelGrid
from occbev_training.sources.deskew import Rays

MAX_SWEEPS = 63
"""A cell keeps a number of sweeps in six bits."""


@dataclass(frozen=True)
class RayBundle:
    """Rays of one sweep in one grid, each the mean of `weight` beams that end in (or leave by) one cell.

    origin, end: (G, 3) float64 in the grid's frame. end_cell: (G,) int64 flat index, -1 where the
    beam leaves the grid. hit: (G,) bool, whether the end is a return inside the grid.
    margin: (G,) float64 metres before the end in which passing contradicts nothing.
    end_mm: (G, 3) int64 sum of the beams' ends above the grid's corner.
    """

    origin: NDArray[np.float64]
    end: NDArray[np.float64]
    end_cell: NDArray[np.int64]
    hit: NDArray[np.bool_]
    weight: NDArray[np.int64]
    margin: NDArray[np.float64]
    end_mm: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.end)


@dataclass(frozen=True)
class Hits:
    """Cells that hold returns.

    cell: (H,) int64 flat index, increasing. count: (H,) int64 returns. sweeps: (H,) uint64, one bit
    per sweep. centroid: (H, 3) float64. row: (X*Y*Z,) int32 place of a cell in these arrays, or -1.
    """

    cell: NDArray[np.int64]
    count: NDArray[np.int64]
    sweeps: NDArray[np.uint64]
    centroid: NDArray[np.float64]
    row: NDArray[np.int32]


@dataclass(frozen=True)
class Evidence:
    """What a window of sweeps says of a grid.

    passes: (X*Y*Z,) uint8 sweeps that passed the cell.
    conflicts: (H,) int64 beams that went through the returns of a hit cell.
    conflict_sweeps: (H,) uint64, one bit per sweep.
    """

    hits: Hits
    passes: NDArray[np.uint8]
    conflicts: NDArray[np.int64]
    conflict_sweeps: NDArray[np.uint64]


def bundle_rays(
    rays: Rays,
    ego2grid: NDArray[np.float64],
    grid: VoxelGrid,
    margin: float,
    collapse: bool = True,
    scratch: BundleScratch | None = None,
) -> RayBundle:
    """Carry rays into the grid's frame and join those of one end cell or one exit cell.

    Beams that miss the grid are left out. With `collapse` off each beam stays alone.
    scratch: to be used again for further sweeps of one thread.
    """
    scratch = scratch or BundleScratch(grid)
    parts = _bundle(
        rays.end,
        rays.origin,
        rays.hit,
        np.ascontiguousarray(ego2grid[:3]),
        np.array(grid.lo),
        np.array(grid.pitch),
        np.array(grid.shape),
        margin,
        collapse,
        *scratch.rows(len(rays)),
    )
    return RayBundle(*parts)


def joined(one: RayBundle, other: RayBundle) -> RayBundle:
    """Put two bundles of one sweep together; cells of both stay apart, their counts add up."""
    parts = (field.name for field in fields(RayBundle))
    return RayBundle(*(np.concatenate([getattr(one, p), getattr(other, p)]) for p in parts))


class BundleScratch:
    """Memory of `bundle_rays`, kept from sweep to sweep of one thread: fresh pages cost more than the work in them."""

    def __init__(self, grid: VoxelGrid) -> None:
        self.slots = np.full(2 * grid.size, -1, np.int32)
        self.rows(0)

    def rows(self, count: int) -> tuple[NDArray[Any], ...]:
        """Return slots, and one row per beam for at least `count` beams."""
        if count == 0 or len(self._rows[0]) < count:
            self._rows = (np.empty((count, 8), np.int64), np.empty((count, 3)), np.empty((count, 3)),
                          np.empty(count, np.int64), np.empty(count, np.bool_), np.empty(count, np.int64))  # fmt: skip
        return self.slots, *self._rows


def gather_hits(bundles: Sequence[RayBundle], grid: VoxelGrid) -> Hits:
    """Count returns and their centroid per cell over all sweeps."""
    if len(bundles) > MAX_SWEEPS:
        raise ValueError(
            f"{len(bundles)} sweeps; a cell has one bit for each of at most {MAX_SWEEPS}"
        )
    row = np.full(grid.size, -1, np.int32)
    for bundle in bundles:
        row[bundle.end_cell[bundle.hit]] = 0
    cell = np.flatnonzero(row == 0)
    row[cell] = np.arange(len(cell), dtype=np.int32)
    count, total = np.zeros(len(cell), np.int64), np.zeros((len(cell), 3), np.int64)
    sweeps = np.zeros(len(cell), np.uint64)
    for number, bundle in enumerate(bundles):
        _add_hits(bundle.end_cell, bundle.hit, bundle.weight, bundle.end_mm,
                  np.uint64(1 << number), row, count, total, sweeps)  # fmt: skip
    centroid = total / np.maximum(count, 1)[:, None] / 1000.0 + np.array(grid.lo)
    return Hits(cell, count, sweeps, centroid, row)


def cast(
    bundles: Sequence[RayBundle],
    hits: Hits,
    grid: VoxelGrid,
    distance: float,
    ground: NDArray[np.bool_] | None = None,
) -> Evidence:
    """Walk every ray and mark the cells that it passes and the hit cells that it contradicts.

    distance: metres within which a ray must go by the centroid of a cell's returns to contradict them.
    ground: (H,) hit cells that are ground. A beam that ends there, nearer to z = 0 than to its sensor,
    skims over the cells of the same layer before it: they hold the same ground, so they are not passed.
    """
    ground = np.zeros(len(hits.cell), np.bool_) if ground is None else ground
    passes = np.zeros(grid.size, np.uint16)
    passes[hits.cell] = _HIT
    conflicts = np.zeros(len(hits.cell), np.int64)
    conflict_sweeps = np.zeros(len(hits.cell), np.uint64)
    lo, pitch, shape = np.array(grid.lo), np.array(grid.pitch), np.array(grid.shape)
    for number, bundle in enumerate(bundles):
        _cast(bundle.origin, bundle.end, bundle.end_cell, bundle.weight, bundle.margin,
              lo, pitch, shape, number, hits.row, hits.centroid, ground, distance,
              passes, conflicts, conflict_sweeps)  # fmt: skip
    return Evidence(hits, (passes & _COUNT).astype(np.uint8), conflicts, conflict_sweeps)


@dataclass(frozen=True)
class CameraRays:
    """Rays of one camera in rasters of rising density, each twice as fine as the one before.

    directions: (V, U, 3) float unit vectors in the camera frame per level; a ray's parent stands at
    half its row and column. until: metres up to which a level is dense enough, per level.
    """

    directions: tuple[NDArray[np.floating], ...]
    until: tuple[float, ...]


def beams_through(
    bundle: RayBundle, hits: Hits, solid: NDArray[np.bool_], grid: VoxelGrid, distance: float
) -> int:
    """Count the beams of one sweep that contradict at least one of the hit cells chosen by `solid` (H,)."""
    return int(_beams_through(bundle.origin, bundle.end, bundle.end_cell, bundle.weight, bundle.margin,
                              np.array(grid.lo), np.array(grid.pitch), np.array(grid.shape),
                              hits.row, hits.centroid, solid, distance))  # fmt: skip


def mark_visible(
    rays: CameraRays,
    cam2grid: NDArray[np.float64],
    state: NDArray[np.uint8],
    grid: VoxelGrid,
    bit: int,
    unobserved_limit: float,
    visible: NDArray[np.uint8],
) -> None:
    """Set `bit` in `visible` (X, Y, Z) for every observed cell that a camera sees.

    A ray ends with the first occupied cell, after `unobserved_limit` metres in unobserved cells,
    or at the last `until`. Where a coarse ray and all its neighbours come through, finer rays go
    on from there; where they disagree, finer rays start at the camera.
    """
    rows, columns = rays.directions[0].shape[:2]
    begun = np.full(((rows + 1) // 2, (columns + 1) // 2), _DISAGREE, np.uint8)
    unknown, start = np.zeros(begun.shape), 0.0
    marked = state.reshape(-1).copy()  # one volume to read and to write: each cell is one access
    passed = None
    for direction, stop in zip(rays.directions, rays.until, strict=True):
        if passed is not None:
            begun = _agreement(passed)
        passed, unknown = _see(direction, np.ascontiguousarray(cam2grid[:3], np.float64), start, stop,
                               begun, unknown, marked, np.array(grid.lo), np.array(grid.pitch),
                               np.array(grid.shape), unobserved_limit)  # fmt: skip
        start = stop
    _set_seen(marked, np.uint8(1 << bit), visible.reshape(-1))


_ENDED, _PASSED, _DISAGREE = 0, 1, 2
_SEEN = 4
"""Bit beside the state of a cell that a camera has seen."""

_COUNT, _LAST, _HIT = 63, 63 << 6, 1 << 15
"""What `_cast` keeps of a cell in 16 bits: how many sweeps passed it, the last of them counted from 1,
and whether it holds returns."""


def traverse(
    origin: NDArray[np.float64], end: NDArray[np.float64], grid: VoxelGrid
) -> NDArray[np.int64]:
    """Return the flat indices of the cells that one ray passes, in order, without its end cell."""
    cells, inside = grid.indices(np.asarray(end, np.float64)[None])
    end_cell = int(grid.flat(cells)[0]) if inside[0] else -1
    room = sum(grid.shape) + 3
    passed, leave = np.empty(room, np.int64), np.empty(room)
    lo, pitch = np.array(grid.lo), np.array(grid.pitch)
    count = _walk((np.asarray(origin, np.float64) - lo) / pitch,
                  (np.asarray(end, np.float64) - lo) / pitch,
                  end_cell, np.array(grid.shape), passed, leave)  # fmt: skip
    return passed[:count]


# --- kernels: coordinates are in cells from the grid's corner, t runs from 0 (origin) to 1 (end) ---


@njit(cache=True, nogil=True, inline="always")
def _clip_axis(o, d, n, t0, t1):  # type: ignore[no-untyped-def]
    """Narrow [t0, t1] to where o + d t lies in [0, n); an empty range means a miss."""
    if d == 0.0:
        if o < 0.0 or o >= n:
            return 1.0, 0.0
        return t0, t1
    a, b = -o / d, (n - o) / d
    if a > b:
        a, b = b, a
    return max(t0, a), min(t1, b)


@njit(cache=True, nogil=True, inline="always")
def _start_axis(o, d, n, t0):  # type: ignore[no-untyped-def]
    """Return the first cell, step, offset and reciprocal of one axis.

    The t at which the ray leaves cell i is (i + offset) * reciprocal: always from the integer
    cell, so that nothing drifts along the ray. Clipping repairs rounding on the entry face only.
    """
    cell = min(max(int(np.floor(o + d * t0)), 0), n - 1)
    if d > 0.0:
        return cell, 1, 1.0 - o, 1.0 / d
    if d < 0.0:
        return cell, -1, -o, 1.0 / d
    return cell, 0, np.inf, 1.0


@njit(cache=True, nogil=True, inline="always")
def _enter(o, e, shape, skip):  # type: ignore[no-untyped-def]
    """Clip a segment to the grid; returns whether it crosses after t = skip, where, and how it steps."""
    dx, dy, dz = e[0] - o[0], e[1] - o[1], e[2] - o[2]
    t0, t1 = _clip_axis(o[0], dx, shape[0], skip, 1.0)
    t0, t1 = _clip_axis(o[1], dy, shape[1], t0, t1)
    t0, t1 = _clip_axis(o[2], dz, shape[2], t0, t1)
    crosses = t0 < t1 and not (dx == 0.0 and dy == 0.0 and dz == 0.0)
    if not crosses:
        t0 = 0.0
    return (
        crosses,
        t0,
        t1,
        _start_axis(o[0], dx, shape[0], t0),
        _start_axis(o[1], dy, shape[1], t0),
        _start_axis(o[2], dz, shape[2], t0),
    )


@njit(cache=True, nogil=True)
def _walk(o, e, end_cell, shape, cells, leave):  # type: ignore[no-untyped-def]
    """Write the cells that a ray passes and the t at which it leaves each; returns their number.

    One axis per step, ties x before y before z (Amanatides and Woo 1987). Stops before the end cell.
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    crosses, _, t1, (ix, sx, ax, gx), (iy, sy, ay, gy), (iz, sz, az, gz) = _enter(o, e, shape, 0.0)
    if not crosses:
        return 0
    tx, ty, tz = (ix + ax) * gx, (iy + ay) * gy, (iz + az) * gz
    for count in range(nx + ny + nz + 3):
        cell = (ix * ny + iy) * nz + iz
        if cell == end_cell:
            return count
        cells[count] = cell
        t = min(tx, ty, tz)
        leave[count] = t
        if t >= t1:
            return count + 1
        if tx == t:
            ix += sx
            if ix < 0 or ix >= nx:
                return count + 1
            tx = (ix + ax) * gx
        elif ty == t:
            iy += sy
            if iy < 0 or iy >= ny:
                return count + 1
            ty = (iy + ay) * gy
        else:
            iz += sz
            if iz < 0 or iz >= nz:
                return count + 1
            tz = (iz + az) * gz
    return nx + ny + nz + 3


@njit(cache=True, nogil=True, inline="always")
def _goes_by(centroid, origin, direction, square, distance):  # type: ignore[no-untyped-def]
    """Whether a line passes a point nearer than `distance`; `square` is the direction's squared length."""
    px, py, pz = centroid[0] - origin[0], centroid[1] - origin[1], centroid[2] - origin[2]
    along = px * direction[0] + py * direction[1] + pz * direction[2]
    return px * px + py * py + pz * pz - along * along / square < distance * distance


@njit(cache=True, nogil=True, inline="always")
def _pace(start, step, offset, reciprocal, size):  # type: ignore[no-untyped-def]
    """Return how far an axis is from its next and next but one crossing, and the cells left on it."""
    left = size - 1 - start if step > 0 else start
    return (
        (start + offset) * reciprocal,
        (start + step + offset) * reciprocal,
        start + step + offset,
        left,
    )


@njit(cache=True, nogil=True)
def _cast(origin, end, end_cell, weight, margin, lo, pitch, shape, number, row, centroid, ground, distance,
          passes, conflicts, conflict_sweeps):  # type: ignore[no-untyped-def]  # fmt: skip
    """Add one sweep's rays to the evidence.

    The walk is that of `_walk`, kept apart for speed: the crossing after the next one is computed
    ahead, so that a step waits for no arithmetic, and every cell costs one access to memory.
    """
    ny, nz = shape[1], shape[2]
    tag, bit = (number + 1) << 6, np.uint64(1) << np.uint64(number)
    o, e = np.empty(3), np.empty(3)
    for g in range(len(end)):
        for a in range(3):
            o[a], e[a] = (origin[g, a] - lo[a]) / pitch[a], (end[g, a] - lo[a]) / pitch[a]
        crosses, _, t1, (ix, sx, ax, gx), (iy, sy, ay, gy), (iz, sz, az, gz) = _enter(
            o, e, shape, 0.0
        )
        if not crosses:
            continue
        tx, next_x, fx, left_x = _pace(ix, sx, ax, gx, shape[0])
        ty, next_y, fy, left_y = _pace(iy, sy, ay, gy, shape[1])
        tz, next_z, fz, left_z = _pace(iz, sz, az, gz, shape[2])
        cell, last, skimmed = (ix * ny + iy) * nz + iz, end_cell[g], -1
        # The lowest returns of a wall whose foot is hidden are no ground: they lie high up.
        if last >= 0 and row[last] >= 0 and ground[row[last]] and end[g, 2] < 0.5 * origin[g, 2]:
            skimmed = last % nz
        direction = (end[g, 0] - origin[g, 0], end[g, 1] - origin[g, 1], end[g, 2] - origin[g, 2])
        square = direction[0] ** 2 + direction[1] ** 2 + direction[2] ** 2
        latest = 1.0 - margin[g] / np.sqrt(square)
        while cell != last:
            t = min(tx, ty, tz)
            if iz != skimmed:
                seen = passes[cell]
                if seen & _LAST != tag:
                    passes[cell] = (seen & ~_LAST | tag) + 1
                if seen >= _HIT and t <= latest:
                    r = row[cell]
                    if _goes_by(centroid[r], origin[g], direction, square, distance):
                        conflicts[r] += weight[g]
                        conflict_sweeps[r] |= bit
            if t >= t1:
                break
            if tx == t:
                if left_x == 0:
                    break
                left_x -= 1
                cell += sx * ny * nz
                tx, fx = next_x, fx + sx
                next_x = fx * gx
            elif ty == t:
                if left_y == 0:
                    break
                left_y -= 1
                cell += sy * nz
                ty, fy = next_y, fy + sy
                next_y = fy * gy
            else:
                if left_z == 0:
                    break
                left_z -= 1
                cell += sz
                iz += sz
                tz, fz = next_z, fz + sz
                next_z = fz * gz


@njit(cache=True, nogil=True)
def _beams_through(origin, end, end_cell, weight, margin, lo, pitch, shape, row, centroid, solid,
                   distance):  # type: ignore[no-untyped-def]  # fmt: skip
    """Add the weights of rays that go through the returns of a chosen cell."""
    room = shape[0] + shape[1] + shape[2] + 3
    cells, leave = np.empty(room, np.int64), np.empty(room, np.float64)
    total = 0
    for g in range(len(end)):
        count = _walk(
            (origin[g] - lo) / pitch, (end[g] - lo) / pitch, end_cell[g], shape, cells, leave
        )
        direction = (end[g, 0] - origin[g, 0], end[g, 1] - origin[g, 1], end[g, 2] - origin[g, 2])
        square = direction[0] ** 2 + direction[1] ** 2 + direction[2] ** 2
        latest = 1.0 - margin[g] / np.sqrt(square) if square > 0.0 else 0.0
        for i in range(count):
            r = row[cells[i]]
            if (
                r >= 0
                and solid[r]
                and leave[i] <= latest
                and _goes_by(centroid[r], origin[g], direction, square, distance)
            ):
                total += weight[g]
                break
    return total


@njit(cache=True, nogil=True)
def _agreement(passed):  # type: ignore[no-untyped-def]
    """Tell for every ray of a raster whether it and its eight neighbours passed, ended, or disagree."""
    rows, columns = passed.shape
    result = np.empty((rows, columns), np.uint8)
    for v in range(rows):
        for u in range(columns):
            result[v, u] = passed[v, u]
            for w in range(max(0, v - 1), min(rows, v + 2)):
                for x in range(max(0, u - 1), min(columns, u + 2)):
                    if passed[w, x] != passed[v, u]:
                        result[v, u] = _DISAGREE
    return result


@njit(cache=True, nogil=True)
def _set_seen(marked, bit, visible):  # type: ignore[no-untyped-def]
    """Set a camera's bit where its rays left their mark."""
    for cell in range(len(marked)):
        if marked[cell] >= _SEEN:
            visible[cell] |= bit


@njit(cache=True, nogil=True)
def _see(direction, cam2grid, start, stop, begun, unknown, marked, lo, pitch, shape,
         unobserved_limit):  # type: ignore[no-untyped-def]  # fmt: skip
    """Walk one raster of camera rays up to `stop`, from `start` where the parents passed.

    Returns: which rays passed (V, U) and how far each went through unobserved cells (V, U).
    """
    rows, columns = direction.shape[:2]
    passed, walked = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns))
    o, e = np.empty(3), np.empty(3)
    for a in range(3):
        o[a] = (cam2grid[a, 3] - lo[a]) / pitch[a]
    inside = 0 <= o[0] < shape[0] and 0 <= o[1] < shape[1] and 0 <= o[2] < shape[2]
    for v in range(rows):
        for u in range(columns):
            parent = begun[v // 2, u // 2]
            if parent == _ENDED or np.isnan(direction[v, u, 0]):  # or it shows the vehicle itself
                continue
            for a in range(3):
                along = (cam2grid[a, 0] * direction[v, u, 0] + cam2grid[a, 1] * direction[v, u, 1]
                         + cam2grid[a, 2] * direction[v, u, 2])  # fmt: skip
                e[a] = o[a] + along * stop / pitch[a]
            skip = start / stop if parent == _PASSED else 0.0
            before = unknown[v // 2, u // 2] if parent == _PASSED else 0.0
            passed[v, u], walked[v, u] = _see_ray(
                o, e, inside, skip, stop, before, marked, shape, unobserved_limit
            )
    return passed, walked


@njit(cache=True, nogil=True, inline="always")
def _within(o, e, shape, t):  # type: ignore[no-untyped-def]
    """As `_enter` for a ray that begins in the grid: no face has to be found, it walks until it leaves."""
    dx, dy, dz = e[0] - o[0], e[1] - o[1], e[2] - o[2]
    x, y, z = o[0] + dx * t, o[1] + dy * t, o[2] + dz * t
    crosses = 0.0 <= x < shape[0] and 0.0 <= y < shape[1] and 0.0 <= z < shape[2]
    return (
        crosses,
        t,
        1.0,
        _start_axis(o[0], dx, shape[0], t),
        _start_axis(o[1], dy, shape[1], t),
        _start_axis(o[2], dz, shape[2], t),
    )


@njit(cache=True, nogil=True, inline="always")
def _see_ray(o, e, inside, skip, length, unknown, marked, shape, unobserved_limit):  # type: ignore[no-untyped-def]  # fmt: skip
    """Walk one camera ray from t = skip to its end; returns whether it got there, and the unknown path.

    The walk is that of `_cast`: crossings ahead, cells left on each axis, one access for each cell.
    """
    ny, nz = shape[1], shape[2]
    if inside:
        crosses, t, t1, (ix, sx, ax, gx), (iy, sy, ay, gy), (iz, sz, az, gz) = _within(
            o, e, shape, skip
        )
    else:
        crosses, t, t1, (ix, sx, ax, gx), (iy, sy, ay, gy), (iz, sz, az, gz) = _enter(
            o, e, shape, skip
        )
    through = False
    if not crosses:
        through = t1 >= 1.0 and not inside
    else:
        tx, next_x, fx, left_x = _pace(ix, sx, ax, gx, shape[0])
        ty, next_y, fy, left_y = _pace(iy, sy, ay, gy, shape[1])
        tz, next_z, fz, left_z = _pace(iz, sz, az, gz, shape[2])
        cell = (ix * ny + iy) * nz + iz
        while True:
            leave = min(tx, ty, tz)
            state = marked[cell]
            if state == 0:
                unknown += (min(leave, t1) - t) * length
                if unknown > unobserved_limit:
                    break
            elif state == 1:
                marked[cell] = 1 | _SEEN
            elif state != 1 | _SEEN:  # occupied
                marked[cell] = 2 | _SEEN
                break
            if leave >= t1:
                through = t1 >= 1.0
                break
            t = leave
            if tx == leave:
                if left_x == 0:
                    break
                left_x -= 1
                cell += sx * ny * nz
                tx, fx = next_x, fx + sx
                next_x = fx * gx
            elif ty == leave:
                if left_y == 0:
                    break
                left_y -= 1
                cell += sy * nz
                ty, fy = next_y, fy + sy
                next_y = fy * gy
            else:
                if left_z == 0:
                    break
                left_z -= 1
                cell += sz
                tz, fz = next_z, fz + sz
                next_z = fz * gz
    return through, unknown


@njit(cache=True, nogil=True)
def _add_hits(end_cell, hit, weight, end_mm, bit, row, count, total, sweeps):  # type: ignore[no-untyped-def]
    """Add one sweep's returns to the hit cells."""
    for g in range(len(end_cell)):
        if hit[g]:
            r = row[end_cell[g]]
            count[r] += weight[g]
            sweeps[r] |= bit
            for axis in range(3):
                total[r, axis] += end_mm[g, axis]


@njit(cache=True, nogil=True, inline="always")
def _millimetres(value):  # type: ignore[no-untyped-def]
    """Round metres to integer millimetres."""
    return int(np.floor(value * 1000.0 + 0.5))


@njit(cache=True, nogil=True, inline="always")
def _moved(m, p, lo):  # type: ignore[no-untyped-def]
    """Move a point by a (3, 4) transform; the result counts from the grid's corner."""
    x, y, z = p[0], p[1], p[2]
    return (
        m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3] - lo[0],
        m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3] - lo[1],
        m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3] - lo[2],
    )


@njit(cache=True, nogil=True, inline="always")
def _exit(o, e, pitch, shape):  # type: ignore[no-untyped-def]
    """Clip a beam that ends outside the grid; returns where its part within starts and ends, in t."""
    t0, t1 = _clip_axis(o[0] / pitch[0], (e[0] - o[0]) / pitch[0], shape[0], 0.0, 1.0)
    t0, t1 = _clip_axis(o[1] / pitch[1], (e[1] - o[1]) / pitch[1], shape[1], t0, t1)
    return _clip_axis(o[2] / pitch[2], (e[2] - o[2]) / pitch[2], shape[2], t0, t1)


@njit(cache=True, nogil=True, inline="always")
def _clamped(value, size):  # type: ignore[no-untyped-def]
    """Return the cell of a coordinate that lies on the grid up to rounding."""
    return min(max(int(np.floor(value)), 0), size - 1)


_WEIGHT, _SPARE = 6, 7
"""Columns of `_bundle`'s sums after end x, y, z and origin x, y, z, all in millimetres."""


@njit(cache=True, nogil=True)
def _bundle(end, origin, hit, ego2grid, lo, pitch, shape, margin, collapse,
            slots, sums, out_origin, out_end, out_cell, out_hit, used):  # type: ignore[no-untyped-def]  # fmt: skip
    """Carry beams into the grid frame, find end or exit cells, and sum beams that share one.

    `slots` maps an end cell (first half) or an exit cell (second half) to its bundle, -1 for none; it
    is left as it was found. What stands in the other scratch rows does not matter.
    One row of sums fills one cache line.
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    count = 0
    for i in range(len(end)):
        e, o = _moved(ego2grid, end[i], lo), _moved(ego2grid, origin[i], lo)
        cx, cy, cz = np.floor(e[0] / pitch[0]), np.floor(e[1] / pitch[1]), np.floor(e[2] / pitch[2])
        inside = cx >= 0 and cx < nx and cy >= 0 and cy < ny and cz >= 0 and cz < nz
        beyond, key = 0, -1
        if inside:
            flat = (int(cx) * ny + int(cy)) * nz + int(cz)
            if collapse and hit[i]:
                key = flat
        else:
            flat = -1
            t0, t1 = _exit(o, e, pitch, shape)
            if t0 >= t1:
                continue
            if collapse:
                length = np.sqrt((e[0] - o[0]) ** 2 + (e[1] - o[1]) ** 2 + (e[2] - o[2]) ** 2)
                beyond = _millimetres((1.0 - t1) * length)
                e = (
                    o[0] + (e[0] - o[0]) * t1,
                    o[1] + (e[1] - o[1]) * t1,
                    o[2] + (e[2] - o[2]) * t1,
                )
                exit_x, exit_y = _clamped(e[0] / pitch[0], nx), _clamped(e[1] / pitch[1], ny)
                key = nx * ny * nz + (exit_x * ny + exit_y) * nz + _clamped(e[2] / pitch[2], nz)
        group = slots[key] if key >= 0 else -1
        if group < 0:
            group = count
            count += 1
            used[group], out_cell[group], out_hit[group] = key, flat, inside and hit[i]
            for column in range(_SPARE):
                sums[group, column] = 0
            sums[group, _SPARE] = beyond
            if key >= 0:
                slots[key] = group
            for a in range(3):
                out_origin[group, a], out_end[group, a] = o[a] + lo[a], e[a] + lo[a]
        row = sums[group]
        row[0] += _millimetres(e[0])
        row[1] += _millimetres(e[1])
        row[2] += _millimetres(e[2])
        row[3] += _millimetres(o[0])
        row[4] += _millimetres(o[1])
        row[5] += _millimetres(o[2])
        row[_WEIGHT] += 1
        row[_SPARE] = min(row[_SPARE], beyond)
    for g in range(count):
        if used[g] >= 0:
            slots[used[g]] = -1
            scale = 1000.0 * sums[g, _WEIGHT]
            for a in range(3):
                out_end[g, a] = sums[g, a] / scale + lo[a]
                out_origin[g, a] = sums[g, 3 + a] / scale + lo[a]
    out_margin = np.maximum(0.0, margin - sums[:count, _SPARE] / 1000.0)
    return (
        out_origin[:count].copy(),
        out_end[:count].copy(),
        out_cell[:count].copy(),
        out_hit[:count].copy(),
        sums[:count, _WEIGHT].copy(),
        out_margin,
        sums[:count, :3].copy(),
    )
