"""Occupancy labels: time and memory of a full label, and its traversal against plain ray casting.

Ten copies of one sweep, 0.5 m apart, on the grid of Occ3D: the published nuScenes sweep where the
shared data is there, else a simulated one. Reading files and packing labels do not count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from occbev.benchmarks import Options, Report, run_interleaved
from occbev.geometry import invert_transform, make_transform
from occbev.grid import GRIDS, VoxelGrid
from occbev.results import CameraFrame, FrameSet, Sweep
from occbev.rig import CameraRig
from occbev.trajectory import Trajectory
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig
from occbev_training.occupancy.rays import BundleScratch, Hits, RayBundle, bundle_rays, cast
from occbev_training.sources.deskew import Rays, deskew_rays
from occbev_training.sources.recording import Recording

COPIES, SPACING, PERIOD_NS = 10, 0.5, 50_000_000
PYTHON_RAYS = 600


@dataclass
class Copies:
    """A recording of one sweep seen from ten places in a row; implements `Recording`."""

    source: str
    rig: CameraRig
    frames: FrameSet
    sweeps: Sequence[Sweep]
    trajectory: Trajectory
    name: str = "copies"

    def __post_init__(self) -> None:
        self.lidar2ego = self.sweeps[0].lidar2ego
        self.sweep_stamp_ns = self.trajectory.stamp_ns
        self.key_stamp_ns = self.sweep_stamp_ns[COPIES // 2 : COPIES // 2 + 1]

    def sweep(self, index: int) -> Sweep:
        """Return one copy."""
        return self.sweeps[index]

    def frame_set(self, key: int) -> FrameSet:
        """Return the key frame."""
        return self.frames

    def annotations(self, key: int) -> None:
        """No labels."""

    def occupancy_truth(self, key: int) -> None:
        """No labels."""


def load_copies() -> Copies:
    """Return the benchmark's input; its `source` says what it is."""
    shared = Path(os.environ.get("OCCBEV_SHARED", "../shared")) / "data" / "nuscenes-one"
    if shared.is_dir():
        from occbev_training.sources.nuscenes import open_nuscenes

        recording: Recording = open_nuscenes(shared).recordings()[0]
        source = "one nuScenes sweep"
    else:
        from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
        from occbev_training.simulator.lidar import LidarConfig

        recording = SimulatedDrive(20_000, DriveConfig(keys=1, lidar=LidarConfig(columns=1800)))
        source = "one simulated sweep"
    stamp = int(recording.key_stamp_ns[0])
    nearest = int(np.argmin(np.abs(recording.sweep_stamp_ns - stamp)))
    sweep = recording.sweep(nearest)
    return _copies(
        f"{source}, {len(sweep.points)} returns",
        recording.rig,
        recording.frame_set(0),
        sweep,
        recording.trajectory.at(sweep.stamp_ns),
    )


def _copies(source: str, rig: CameraRig, frames: FrameSet, sweep: Sweep, ego2global: NDArray[np.float64]) -> Copies:
    """Repeat a sweep along a straight drive, with a noise of 2 cm; cameras keep their delays."""
    rng = np.random.default_rng(0)
    places = (np.arange(COPIES) - COPIES // 2) * SPACING
    stamps = sweep.stamp_ns + np.arange(COPIES, dtype=np.int64) * PERIOD_NS
    path = np.stack([ego2global @ make_transform(np.eye(3), [x, 0, 0]) for x in places])
    sweeps = []
    for stamp in stamps:
        points = sweep.points + rng.normal(0, 0.02, sweep.points.shape).astype(np.float32)
        sweeps.append(Sweep(points, int(stamp), sweep.lidar2ego, sweep.intensity))
    late = int(stamps[COPIES // 2]) - frames.stamp_ns
    moved = {
        name: None if f is None else CameraFrame(name, f.stamp_ns + late, b"", f.ego2global)
        for name, f in frames.frames.items()
    }
    return Copies(source, rig, FrameSet(int(stamps[COPIES // 2]), moved), sweeps, Trajectory(stamps, path))


def run(options: Options) -> Report:
    """Measure; see the module's first line for what."""
    recording, grid = load_copies(), GRIDS["occ3d"]
    builder = LabelBuilder(recording, LabelConfig(), grid)

    def full_label() -> None:
        builder.forget()
        builder.build(0)

    rays, motions = _rays(recording)
    scratch = BundleScratch(grid)

    def collapse_labels() -> NDArray[np.uint8]:
        return _states(
            [bundle_rays(r, m, grid, 0.8, True, scratch) for r, m in zip(rays, motions, strict=True)],
            grid,
        )

    def plain() -> NDArray[np.uint8]:
        return _plain_states(rays, motions, grid)

    timing = run_interleaved({"label": full_label, "collapsed": collapse_labels, "plain": plain}, options.rounds)
    ours, theirs = collapse_labels(), plain()
    free = theirs == 1
    steps = _plain_steps(rays, motions, grid)
    arrays_ms = _python_ms(_python, rays[0], motions[0], grid)
    scalars_ms = _python_ms(_plain.py_func, rays[0], motions[0], grid)
    one, two, rss = _throughput(_labels)
    plain_one, plain_two, _ = _throughput(_plains)
    values: dict[str, Any] = {
        "input": recording.source,
        "cpu_s_per_frame": timing["label"].cpu_ms / 1e3,
        "plain_ns_per_step": timing["plain"].cpu_ms * 1e6 / steps,
        "free_kept": float((free & (ours == 1)).sum() / free.sum()),
        "free_added": float((~free & (ours == 1)).sum() / free.sum()),
        "rss_mb": rss,
        "frames_per_s_one_worker": one,
        "frames_per_s_two_workers": two,
        "two_plain_vs_one": plain_two / plain_one,  # what the cores give: two may share one's units
    }
    ratios = {
        "traversal_vs_plain": timing["plain"].cpu_ms / timing["collapsed"].cpu_ms,
        "vs_python": arrays_ms / (timing["collapsed"].cpu_ms / COPIES),
        "vs_python_scalars": scalars_ms / (timing["collapsed"].cpu_ms / COPIES),
        "two_workers_vs_one": two / one,
    }
    return Report("labels", values, ratios)


def _rays(recording: Copies) -> tuple[list[Rays], list[NDArray[np.float64]]]:
    """Return each sweep's rays in its own ego frame, and the motion (4, 4) into the key's."""
    key = int(recording.key_stamp_ns[0])
    global2key = invert_transform(recording.trajectory.at(key))
    rays = [deskew_rays(s, recording.trajectory, s.stamp_ns) for s in recording.sweeps]
    return rays, [global2key @ recording.trajectory.at(s.stamp_ns) for s in recording.sweeps]


def _states(bundles: Sequence[RayBundle], grid: VoxelGrid) -> NDArray[np.uint8]:
    """Occupied, free and unobserved by our traversal alone: nothing is contradicted without hit cells."""
    nothing = np.zeros(0, np.int64)
    row = np.full(grid.size, -1, np.int32)
    hits = Hits(nothing, nothing, nothing.astype(np.uint64), np.zeros((0, 3)), row)
    state = (cast(bundles, hits, grid, 0.2).passes != 0).astype(np.uint8)
    for bundle in bundles:
        state[bundle.end_cell[bundle.hit]] = 2
    return state


@njit(cache=True)
def _plain(end, origin, motion, lo, pitch, shape, state):  # type: ignore[no-untyped-def]
    """Mark passed (1) and hit (2) cells, beam by beam; returns the number of steps.

    The baseline of this benchmark, and so a walk of its own: it shares nothing with `occupancy.rays`.
    """
    nx, ny, nz = shape[0], shape[1], shape[2]
    steps = 0
    o, e = np.empty(3), np.empty(3)
    for i in range(len(end)):
        for a in range(3):
            o[a] = (
                motion[a, 0] * origin[i, 0]
                + motion[a, 1] * origin[i, 1]
                + motion[a, 2] * origin[i, 2]
                + motion[a, 3]
                - lo[a]
            ) / pitch[a]
            e[a] = (
                motion[a, 0] * end[i, 0] + motion[a, 1] * end[i, 1] + motion[a, 2] * end[i, 2] + motion[a, 3] - lo[a]
            ) / pitch[a]
        dx, dy, dz = e[0] - o[0], e[1] - o[1], e[2] - o[2]
        ix, iy, iz = int(np.floor(o[0])), int(np.floor(o[1])), int(np.floor(o[2]))
        jx, jy, jz = int(np.floor(e[0])), int(np.floor(e[1])), int(np.floor(e[2]))
        sx, sy, sz = (1 if dx > 0 else -1), (1 if dy > 0 else -1), (1 if dz > 0 else -1)
        tx = ((ix + (sx > 0)) - o[0]) / dx if dx != 0 else np.inf
        ty = ((iy + (sy > 0)) - o[1]) / dy if dy != 0 else np.inf
        tz = ((iz + (sz > 0)) - o[2]) / dz if dz != 0 else np.inf
        wx, wy, wz = (
            abs(1 / dx) if dx != 0 else np.inf,
            abs(1 / dy) if dy != 0 else np.inf,
            abs(1 / dz) if dz != 0 else np.inf,
        )
        while 0 <= ix < nx and 0 <= iy < ny and 0 <= iz < nz:
            cell = (ix * ny + iy) * nz + iz
            if ix == jx and iy == jy and iz == jz:
                state[cell] = 2
                break
            if state[cell] == 0:
                state[cell] = 1
            steps += 1
            if tx <= ty and tx <= tz:
                if tx >= 1.0:
                    break
                ix += sx
                tx += wx
            elif ty <= tz:
                if ty >= 1.0:
                    break
                iy += sy
                ty += wy
            else:
                if tz >= 1.0:
                    break
                iz += sz
                tz += wz
    return steps


def _plain_states(rays: Sequence[Rays], motions: Sequence[NDArray[np.float64]], grid: VoxelGrid) -> NDArray[np.uint8]:
    """Occupied, free and unobserved by the plain traversal."""
    state = np.zeros(grid.size, np.uint8)
    parts = (np.array(grid.lo), np.array(grid.pitch), np.array(grid.shape))
    for r, m in zip(rays, motions, strict=True):
        _plain(r.end, r.origin, m, *parts, state)
    return state


def _plain_steps(rays: Sequence[Rays], motions: Sequence[NDArray[np.float64]], grid: VoxelGrid) -> int:
    state = np.zeros(grid.size, np.uint8)
    parts = (np.array(grid.lo), np.array(grid.pitch), np.array(grid.shape))
    return sum(_plain(r.end, r.origin, m, *parts, state) for r, m in zip(rays, motions, strict=True))


def _python_ms(cast: Callable[..., None], rays: Rays, motion: NDArray[np.float64], grid: VoxelGrid) -> float:
    """Processor time in ms of one sweep cast in Python, extrapolated from some of its beams."""
    chosen = np.linspace(0, len(rays) - 1, PYTHON_RAYS).astype(int)
    state = np.zeros(grid.size, np.uint8)
    parts = (np.array(grid.lo), np.array(grid.pitch), np.array(grid.shape))
    start = time.process_time()
    cast(rays.end[chosen], rays.origin[chosen], motion, *parts, state)
    return (time.process_time() - start) * 1e3 * len(rays) / PYTHON_RAYS


def _python(
    end: NDArray[np.float64],
    origin: NDArray[np.float64],
    motion: NDArray[np.float64],
    lo: NDArray[np.float64],
    pitch: NDArray[np.float64],
    shape: NDArray[np.int64],
    state: NDArray[np.uint8],
) -> None:
    """Cast rays as label scripts write it: one small array for each of cell, step and crossing.

    The baseline of this benchmark in plain Python, see `_plain`.
    """
    cells = state.reshape(shape)
    for point, start in zip(end, origin, strict=True):
        o = (motion[:3, :3] @ start + motion[:3, 3] - lo) / pitch
        e = (motion[:3, :3] @ point + motion[:3, 3] - lo) / pitch
        direction = e - o
        step = np.where(direction > 0, 1, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            width = np.abs(1.0 / direction)
            crossing = np.where(direction != 0, (np.floor(o) + (step > 0) - o) / direction, np.inf)
        cell, last = np.floor(o).astype(int), np.floor(e).astype(int)
        while np.all(cell >= 0) and np.all(cell < shape):
            if np.array_equal(cell, last):
                cells[tuple(cell)] = 2
                break
            if cells[tuple(cell)] == 0:
                cells[tuple(cell)] = 1
            axis = int(np.argmin(crossing))
            if crossing[axis] >= 1.0:
                break
            cell[axis] += step[axis]
            crossing[axis] += width[axis]


def _throughput(job: Callable[[int], float], rounds: int = 5, frames: int = 5) -> tuple[float, float, float]:
    """Return frames per second of one process and of two beside each other, and the memory of one in MB.

    In turns, and medians: a processor's clock changes from one second to the next.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    memory = 0.0
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in range(2)]
        for started in [pool.submit(job, 1) for pool in pools]:  # compile outside the measurement
            started.result()
        for workers in (1, 2) * rounds:
            start = time.perf_counter()
            running = [pool.submit(job, frames) for pool in pools[:workers]]
            memory = max(memory, *(each.result() for each in running))
            rates[workers - 1].append(workers * frames / (time.perf_counter() - start))
    return float(np.median(rates[0])), float(np.median(rates[1])), memory


_BUILDERS: list[LabelBuilder] = []
_RAYS: list[tuple[list[Rays], list[NDArray[np.float64]]]] = []


def _labels(frames: int) -> float:
    """Make labels in a worker process; returns its peak resident memory in MB."""
    if not _BUILDERS:
        _BUILDERS.append(LabelBuilder(load_copies(), LabelConfig(), GRIDS["occ3d"]))
    for _ in range(frames):
        _BUILDERS[0].forget()
        _BUILDERS[0].build(0)
    return _peak_mb()


def _plains(frames: int) -> float:
    """Cast plainly in a worker process; returns its peak resident memory in MB."""
    if not _RAYS:
        _RAYS.append(_rays(load_copies()))
    for _ in range(frames):
        _plain_states(*_RAYS[0], GRIDS["occ3d"])
    return _peak_mb()


def _peak_mb() -> float:
    """Return the largest resident memory of this process; a child's getrusage holds that of its parent, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")
