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
        np.ascontiguousarray(rays.origin[:1] if rays.origin.strides[0] == 0 else rays.origin),
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
        self._rows: tuple[NDArray[Any], ...] = ()
        self.rows(0)

    def rows(self, count: int) -> tuple[NDArray[Any], ...]:
        """Return slots, and one row per beam for at least `count` beams."""
        if not self._rows or len(self._rows[0]) < count:
            self._rows = (
                np.empty((count, 8), np.int64),
                np.empty((count, 3)),
                np.empty((count, 3)),
                np.empty(count, np.int64),
                np.empty(count, np.bool_),
                np.empty(count, np.int64),
            )
        return self.slots, *self._rows


def gather_hits(bundles: Sequence[RayBundle], grid: VoxelGrid) -> Hits:
    """Count returns and their centroid per cell over all sweeps."""
    if len(bundles) > MAX_SWEEPS:
        raise ValueError(f"{len(bundles)} sweeps; a cell has one bit for each of at most {MAX_SWEEPS}")
    row = np.full(grid.size, -1, np.int32)
    for bundle in bundles:
        _note_hits(bundle.end_cell, bundle.hit, row)
    cell = np.flatnonzero(row == 0)
    row[cell] = np.arange(len(cell), dtype=np.int32)
    count, total = np.zeros(len(cell), np.int64), np.zeros((len(cell), 3), np.int64)
    sweeps = np.zeros(len(cell), np.uint64)
    for number, bundle in enumerate(bundles):
        _add_hits(
            bundle.end_cell, bundle.hit, bundle.weight, bundle.end_mm, np.uint64(1 << number), row, count, total, sweeps
        )
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
    passes, seen = np.zeros(grid.size, np.uint8), np.zeros(grid.size, np.uint8)
    seen[hits.cell] = _HIT
    conflicts = np.zeros(len(hits.cell), np.int64)
    conflict_sweeps = np.zeros(len(hits.cell), np.uint64)
    lo, pitch, shape = np.array(grid.lo), np.array(grid.pitch), np.array(grid.shape)
    for number, bundle in enumerate(bundles):
        _cast(
            bundle.origin,
            bundle.end,
            bundle.end_cell,
            bundle.weight,
            bundle.margin,
            lo,
            pitch,
            shape,
            np.uint64(1 << number),
            hits.row,
            hits.centroid,
            ground,
            distance,
            seen,
            conflicts,
            conflict_sweeps,
        )
        _count_passes(seen, passes)
    return Evidence(hits, passes, conflicts, conflict_sweeps)


@dataclass(frozen=True)
class CameraRays:
    """Rays of one camera in rasters of rising density, each twice as fine as the one before.

    directions: (V, U, 3) float unit vectors in the camera frame per level; a ray's parent stands at
    half its row and column. until: metres up to which a level is dense enough, per level.
    """

    directions: tuple[NDArray[np.floating], ...]
    until: tuple[float, ...]


def beams_through(bundle: RayBundle, hits: Hits, solid: NDArray[np.bool_], grid: VoxelGrid, distance: float) -> int:
    """Count the beams of one sweep that contradict at least one of the hit cells chosen by `solid` (H,)."""
    return int(
        _beams_through(
            bundle.origin,
            bundle.end,
            bundle.end_cell,
            bundle.weight,
            bundle.margin,
            np.array(grid.lo),
            np.array(grid.pitch),
            np.array(grid.shape),
            hits.row,
            hits.centroid,
            solid,
            distance,
        )
    )


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
    on from there; where they disagree, finer rays start where the coarse one did.
    """
    rows, columns = rays.directions[0].shape[:2]
    start = np.zeros(((rows + 1) // 2, (columns + 1) // 2), np.float32)
    unknown = np.zeros(start.shape, np.float32)
    marked = state.reshape(-1).copy()  # one volume to read and to write: each cell is one access
    for level, (direction, stop) in enumerate(zip(rays.directions, rays.until, strict=True), 1):
        passed, walked = _see(
            direction,
            np.ascontiguousarray(cam2grid[:3], np.float64),
            stop,
            start,
            unknown,
            marked,
            np.array(grid.lo),
            np.array(grid.pitch),
            np.array(grid.shape),
            unobserved_limit,
        )
        if level < len(rays.until):
            start, unknown = _onward(passed, walked, start, unknown, stop)
    _set_seen(marked, np.uint8(1 << bit), visible.reshape(-1))


_SEEN = 4
"""Bit beside the state of a cell that a camera has seen."""

_PASSED_NOW, _HIT = np.uint8(1), np.uint8(2)
"""What `_cast` keeps of a cell: whether the sweep at hand passed it, and whether it holds returns."""

_ONE, _NEVER = 1 << 60, 1 << 62
"""The t of a ray's end in the integers that walks count with, and a t that no walk reaches."""
_ROUNDING = 1 << 10
"""More than rounding moves a crossing: one that is not this far from the ray's end is at the end."""


def traverse(origin: NDArray[np.float64], end: NDArray[np.float64], grid: VoxelGrid) -> NDArray[np.int64]:
    """Return the flat indices of the cells that one ray passes, in order, without its end cell."""
    cells, inside = grid.indices(np.asarray(end, np.float64)[None])
    end_cell = int(grid.flatten(cells)[0]) if inside[0] else -1
    room = sum(grid.shape) + 3
    passed, leave = np.empty(room, np.int64), np.empty(room)
    lo, pitch = np.array(grid.lo), np.array(grid.pitch)
    count = _walk(
        (np.asarray(origin, np.float64) - lo) / pitch,
        (np.asarray(end, np.float64) - lo) / pitch,
        end_cell,
        np.array(grid.shape),
        passed,
        leave,
    )
    return passed[:count]


# --- kernels: coordinates are in cells from the grid's corner, t runs from 0 (origin) to 1 (end) ---


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def _clip(ox, oy, oz, dx, dy, dz, nx, ny, nz, skip):  # type: ignore[no-untyped-def]
    """Clip a segment to the grid; returns whether it crosses after t = skip, where it enters and leaves."""
    t0, t1 = _clip_axis(ox, dx, nx, skip, 1.0)
    t0, t1 = _clip_axis(oy, dy, ny, t0, t1)
    t0, t1 = _clip_axis(oz, dz, nz, t0, t1)
    return t0 < t1 and not (dx == 0.0 and dy == 0.0 and dz == 0.0), t0, t1


@njit(cache=True, nogil=True)
def _within(x, y, z, nx, ny, nz):  # type: ignore[no-untyped-def]
    """Whether a point lies in the grid."""
    return 0.0 <= x < nx and 0.0 <= y < ny and 0.0 <= z < nz


@njit(cache=True, nogil=True)
def _start_cell(o, d, n, t0):  # type: ignore[no-untyped-def]
    """Return the cell of one axis at t0; clipping repairs rounding on the entry face only."""
    return min(max(int(np.floor(o + d * t0)), 0), n - 1)


@njit(cache=True, nogil=True)
def _pace(o, d, cell, size):  # type: ignore[no-untyped-def]
    """Return the t of an axis' first crossing, of one cell, and of the crossing that leaves the grid; and the step.

    All in 1 / _ONE: sums of integers are exact, so that nothing drifts along the ray.
    """
    if abs(d) < 1e-200:
        return _NEVER, 0, _NEVER, 0
    width = 1.0 / abs(d)
    if d > 0.0:
        first, left, step = (cell + 1 - o) * width, size - 1 - cell, 1
    else:
        first, left, step = (o - cell) * width, cell, -1
    start, pace = int(min(first, 2.0) * _ONE), int(min(width, 2.0) * _ONE)
    return start, pace, start + (left * pace if left * width < 2.0 else 2 * _ONE), step


@njit(cache=True, nogil=True)
def _step(cell, tx, ty, tz, wx, wy, wz, sx, sy, sz):  # type: ignore[no-untyped-def]
    """Return the flat cell behind the next crossing, ties x before y before z, and the crossings after it."""
    if tz < min(tx, ty):
        return cell + sz, tx, ty, tz + wz
    if tx <= ty:
        return cell + sx, tx + wx, ty, tz
    return cell + sy, tx, ty + wy, tz


@njit(cache=True, nogil=True)
def _walk(o, e, end_cell, shape, cells, leave):  # type: ignore[no-untyped-def]
    """Write the cells that a ray passes and the t at which it leaves each; returns their number.

    One axis per step, ties x before y before z (Amanatides and Woo 1987). Stops before the end cell.
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    dx, dy, dz = e[0] - o[0], e[1] - o[1], e[2] - o[2]
    crosses, t0, _ = _clip(o[0], o[1], o[2], dx, dy, dz, nx, ny, nz, 0.0)
    if not crosses:
        return 0
    ix, iy, iz = _start_cell(o[0], dx, nx, t0), _start_cell(o[1], dy, ny, t0), _start_cell(o[2], dz, nz, t0)
    tx, wx, out_x, sx = _pace(o[0], dx, ix, nx)
    ty, wy, out_y, sy = _pace(o[1], dy, iy, ny)
    tz, wz, out_z, sz = _pace(o[2], dz, iz, nz)
    stop = min(_ONE - _ROUNDING, out_x, out_y, out_z)
    count = 0
    while (ix * ny + iy) * nz + iz != end_cell:
        cells[count] = (ix * ny + iy) * nz + iz
        t = min(tx, ty, tz)
        leave[count] = (t - _ROUNDING) / _ONE
        count += 1
        if t >= stop:
            break
        if tx == t:
            ix, tx = ix + sx, tx + wx
        elif ty == t:
            iy, ty = iy + sy, ty + wy
        else:
            iz, tz = iz + sz, tz + wz
    return count


@njit(cache=True, nogil=True)
def _goes_by(centroid, r, origin, g, direction, square, distance):  # type: ignore[no-untyped-def]
    """Whether ray `g` passes centroid `r` nearer than `distance`; `square` is its direction's squared length."""
    px, py, pz = centroid[r, 0] - origin[g, 0], centroid[r, 1] - origin[g, 1], centroid[r, 2] - origin[g, 2]
    along = px * direction[0] + py * direction[1] + pz * direction[2]
    return px * px + py * py + pz * pz - along * along / square < distance * distance


@njit(cache=True, nogil=True)
def _cast(  # type: ignore[no-untyped-def]
    origin,
    end,
    end_cell,
    weight,
    margin,
    lo,
    pitch,
    shape,
    bit,
    row,
    centroid,
    ground,
    distance,
    seen,
    conflicts,
    conflict_sweeps,
):  # type: ignore[no-untyped-def]
    """Add one sweep's rays to the evidence; `seen` keeps of each cell whether they pass it.

    The walk is that of `_walk` over flat cells, whose crossings are not written down: this loop is most of a label's time.
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    for g in range(len(end)):
        ox, dx = (origin[g, 0] - lo[0]) / pitch[0], (end[g, 0] - origin[g, 0]) / pitch[0]
        oy, dy = (origin[g, 1] - lo[1]) / pitch[1], (end[g, 1] - origin[g, 1]) / pitch[1]
        oz, dz = (origin[g, 2] - lo[2]) / pitch[2], (end[g, 2] - origin[g, 2]) / pitch[2]
        t0 = 0.0
        if not _within(ox, oy, oz, nx, ny, nz):
            crosses, t0, _ = _clip(ox, oy, oz, dx, dy, dz, nx, ny, nz, 0.0)
            if not crosses:
                continue
        ix, iy, iz = _start_cell(ox, dx, nx, t0), _start_cell(oy, dy, ny, t0), _start_cell(oz, dz, nz, t0)
        tx, wx, out_x, sx = _pace(ox, dx, ix, nx)
        ty, wy, out_y, sy = _pace(oy, dy, iy, ny)
        tz, wz, out_z, sz = _pace(oz, dz, iz, nz)
        stop, last = min(_ONE - _ROUNDING, out_x, out_y, out_z), end_cell[g]
        # The lowest returns of a wall whose foot is hidden are no ground: they lie high up.
        if last >= 0 and row[last] >= 0 and ground[row[last]] and end[g, 2] < 0.5 * origin[g, 2]:
            layers = abs(last % nz - iz)
            if layers == 0:
                continue
            stop = min(stop, tz + (layers - 1) * wz)  # where it enters the ground's layer
        direction = (end[g, 0] - origin[g, 0], end[g, 1] - origin[g, 1], end[g, 2] - origin[g, 2])
        square = direction[0] ** 2 + direction[1] ** 2 + direction[2] ** 2
        if square == 0.0:
            continue
        latest = int(max(-1.0, 1.0 - margin[g] / np.sqrt(square)) * _ONE) + _ROUNDING
        sx, sy = sx * ny * nz, sy * nz
        cell = (ix * ny + iy) * nz + iz
        while cell != last:
            t = min(tx, ty, tz)
            known = seen[np.uint64(cell)]
            seen[np.uint64(cell)] = known | _PASSED_NOW
            if known >= _HIT and t <= latest:
                r = row[cell]
                if _goes_by(centroid, r, origin, g, direction, square, distance):
                    conflicts[r] += weight[g]
                    conflict_sweeps[r] |= bit
            if t >= stop:
                break
            cell, tx, ty, tz = _step(cell, tx, ty, tz, wx, wy, wz, sx, sy, sz)


@njit(cache=True, nogil=True)
def _count_passes(seen, passes):  # type: ignore[no-untyped-def]
    """Count the cells that a sweep passed, and forget them for the next one."""
    for cell in range(len(seen)):
        passes[cell] += seen[cell] & _PASSED_NOW
        seen[cell] &= _HIT


@njit(cache=True, nogil=True)
def _beams_through(origin, end, end_cell, weight, margin, lo, pitch, shape, row, centroid, solid, distance):  # type: ignore[no-untyped-def]
    """Add the weights of rays that go through the returns of a chosen cell."""
    room = shape[0] + shape[1] + shape[2] + 3
    cells, leave = np.empty(room, np.int64), np.empty(room, np.float64)
    total = 0
    for g in range(len(end)):
        count = _walk((origin[g] - lo) / pitch, (end[g] - lo) / pitch, end_cell[g], shape, cells, leave)
        direction = (end[g, 0] - origin[g, 0], end[g, 1] - origin[g, 1], end[g, 2] - origin[g, 2])
        square = direction[0] ** 2 + direction[1] ** 2 + direction[2] ** 2
        latest = 1.0 - margin[g] / np.sqrt(square) if square > 0.0 else 0.0
        for i in range(count):
            r = row[cells[i]]
            if (
                r >= 0
                and solid[r]
                and leave[i] <= latest
                and _goes_by(centroid, r, origin, g, direction, square, distance)
            ):
                total += weight[g]
                break
    return total


@njit(cache=True, nogil=True)
def _onward(passed, walked, start, unknown, stop):  # type: ignore[no-untyped-def]
    """Return where finer rays than those of a raster start, NaN for none, and their unknown path so far.

    At `stop` if a ray and its eight neighbours passed, nowhere if all of them ended; else where it started.
    """
    rows, columns = passed.shape
    onward, before = np.empty((rows, columns), np.float32), np.empty((rows, columns), np.float32)
    for v in range(rows):
        top, bottom = max(0, v - 1), min(rows, v + 2)
        for u in range(columns):
            left, right = max(0, u - 1), min(columns, u + 2)
            count = 0
            for w in range(top, bottom):
                for x in range(left, right):
                    count += passed[w, x]
            if count == (bottom - top) * (right - left):
                onward[v, u], before[v, u] = stop, walked[v, u]
            elif count == 0:
                onward[v, u], before[v, u] = np.nan, 0.0
            else:
                onward[v, u], before[v, u] = start[v // 2, u // 2], unknown[v // 2, u // 2]
    return onward, before


@njit(cache=True, nogil=True)
def _set_seen(marked, bit, visible):  # type: ignore[no-untyped-def]
    """Set a camera's bit where its rays left their mark."""
    for cell in range(len(marked)):
        if marked[cell] >= _SEEN:
            visible[cell] |= bit


@njit(cache=True, nogil=True)
def _see(direction, cam2grid, stop, start, unknown, marked, lo, pitch, shape, unobserved_limit):  # type: ignore[no-untyped-def]
    """Walk one raster of camera rays up to `stop`, from where `start` lets the children of each parent begin.

    Returns: which rays passed (V, U) and how far each went through unobserved cells (V, U).
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    rows, columns = direction.shape[:2]
    passed, walked = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns), np.float32)
    ox, oy, oz = (
        (cam2grid[0, 3] - lo[0]) / pitch[0],
        (cam2grid[1, 3] - lo[1]) / pitch[1],
        (cam2grid[2, 3] - lo[2]) / pitch[2],
    )
    turn = np.empty((3, 3))
    for a in range(3):
        for b in range(3):
            turn[a, b] = cam2grid[a, b] * stop / pitch[a]
    inside, per_metre = _within(ox, oy, oz, nx, ny, nz), 1.0 / stop
    for v in range(rows):
        for u in range(columns):
            t0 = start[v // 2, u // 2] * per_metre
            right, down, ahead = direction[v, u, 0], direction[v, u, 1], direction[v, u, 2]
            if np.isnan(t0) or np.isnan(right):  # or it shows the vehicle itself
                continue
            dx = turn[0, 0] * right + turn[0, 1] * down + turn[0, 2] * ahead
            dy = turn[1, 0] * right + turn[1, 1] * down + turn[1, 2] * ahead
            dz = turn[2, 0] * right + turn[2, 1] * down + turn[2, 2] * ahead
            if not inside:
                crosses, t0, t1 = _clip(ox, oy, oz, dx, dy, dz, nx, ny, nz, t0)
                if not crosses:
                    passed[v, u] = t1 >= 1.0
                    continue
            elif not _within(ox + dx * t0, oy + dy * t0, oz + dz * t0, nx, ny, nz):
                continue
            before = unknown[v // 2, u // 2]
            most = int(min((unobserved_limit - before) * per_metre, 2.0) * _ONE)
            ended, dark = _see_ray(ox, oy, oz, dx, dy, dz, t0, nx, ny, nz, most, marked)
            passed[v, u], walked[v, u] = not ended, before + dark * stop / _ONE
    return passed, walked


@njit(cache=True, nogil=True)
def _see_ray(ox, oy, oz, dx, dy, dz, t0, nx, ny, nz, most, marked):  # type: ignore[no-untyped-def]
    """Walk one camera ray from t0 to its end; returns whether it ends before that, and its unknown path.

    The walk is that of `_cast`, by the same `_pace` and `_step`, with another end: a dark path that is too long.
    """
    ix, iy, iz = _start_cell(ox, dx, nx, t0), _start_cell(oy, dy, ny, t0), _start_cell(oz, dz, nz, t0)
    tx, wx, out_x, sx = _pace(ox, dx, ix, nx)
    ty, wy, out_y, sy = _pace(oy, dy, iy, ny)
    tz, wz, out_z, sz = _pace(oz, dz, iz, nz)
    stop = min(_ONE - _ROUNDING, out_x, out_y, out_z)
    sx, sy = sx * ny * nz, sy * nz
    cell, t, dark = (ix * ny + iy) * nz + iz, int(t0 * _ONE), 0
    while True:
        leave = min(tx, ty, tz)
        state = marked[np.uint64(cell)]
        if state == 0:
            dark += min(leave, stop) - t
            ended = dark > most
        else:
            marked[np.uint64(cell)] = state | _SEEN
            ended = state & 2 != 0  # occupied
        if ended or leave >= stop:
            break
        t = leave
        cell, tx, ty, tz = _step(cell, tx, ty, tz, wx, wy, wz, sx, sy, sz)
    return ended or leave < _ONE - _ROUNDING, dark


@njit(cache=True, nogil=True)
def _note_hits(end_cell, hit, row):  # type: ignore[no-untyped-def]
    """Set the row of cells that hold returns to 0."""
    for g in range(len(end_cell)):
        if hit[g]:
            row[end_cell[g]] = 0


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


@njit(cache=True, nogil=True)
def _millimetres(value):  # type: ignore[no-untyped-def]
    """Round metres to integer millimetres."""
    return int(np.floor(value * 1000.0 + 0.5))


@njit(cache=True, nogil=True)
def _move(m, points, i, lo):  # type: ignore[no-untyped-def]
    """Move point `i` by a (3, 4) transform; the result counts from the grid's corner."""
    x, y, z = points[i, 0], points[i, 1], points[i, 2]
    return (
        m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3] - lo[0],
        m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3] - lo[1],
        m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3] - lo[2],
    )


@njit(cache=True, nogil=True)
def _exit(o, e, pitch, shape):  # type: ignore[no-untyped-def]
    """Clip a beam that ends outside the grid; returns where its part within starts and ends, in t."""
    t0, t1 = _clip_axis(o[0] / pitch[0], (e[0] - o[0]) / pitch[0], shape[0], 0.0, 1.0)
    t0, t1 = _clip_axis(o[1] / pitch[1], (e[1] - o[1]) / pitch[1], shape[1], t0, t1)
    return _clip_axis(o[2] / pitch[2], (e[2] - o[2]) / pitch[2], shape[2], t0, t1)


@njit(cache=True, nogil=True)
def _clamp(value, size):  # type: ignore[no-untyped-def]
    """Return the cell of a coordinate that lies on the grid up to rounding."""
    return min(max(int(np.floor(value)), 0), size - 1)


_WEIGHT, _SPARE = 6, 7
"""Columns of `_bundle`'s sums after end x, y, z and origin x, y, z, all in millimetres."""


@njit(cache=True, nogil=True)
def _bundle(  # type: ignore[no-untyped-def]
    end,
    origin,
    hit,
    ego2grid,
    lo,
    pitch,
    shape,
    margin,
    collapse,
    slots,
    sums,
    out_origin,
    out_end,
    out_cell,
    out_hit,
    used,
):  # type: ignore[no-untyped-def]
    """Carry beams into the grid frame, find end or exit cells, and sum beams that share one.

    `slots` maps an end cell (first half) or an exit cell (second half) to its bundle, -1 for none; it
    is left as it was found. What stands in the other scratch rows does not matter.
    One row of sums fills one cache line. origin: one for all beams, or one for each.
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    count, one = 0, len(origin) == 1
    o = _move(ego2grid, origin, 0, lo) if one else (0.0, 0.0, 0.0)
    for i in range(len(end)):
        e = _move(ego2grid, end, i, lo)
        if not one:
            o = _move(ego2grid, origin, i, lo)
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
                exit_x, exit_y = _clamp(e[0] / pitch[0], nx), _clamp(e[1] / pitch[1], ny)
                key = nx * ny * nz + (exit_x * ny + exit_y) * nz + _clamp(e[2] / pitch[2], nz)
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
        sums[group, 0] += _millimetres(e[0])
        sums[group, 1] += _millimetres(e[1])
        sums[group, 2] += _millimetres(e[2])
        sums[group, 3] += _millimetres(o[0])
        sums[group, 4] += _millimetres(o[1])
        sums[group, 5] += _millimetres(o[2])
        sums[group, _WEIGHT] += 1
        sums[group, _SPARE] = min(sums[group, _SPARE], beyond)
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
