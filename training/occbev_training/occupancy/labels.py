"""Three-state occupancy labels from a window of sweeps: no boxes, no class, no network.

A cell is occupied, free or unobserved at the key time; what moved is found by the beams that later
went through it. Beside the state each cell keeps which cameras see it and how many sweeps agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import NDArray

from occbev.classes import FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.geometry import invert_transform
from occbev.grid import GRIDS, VoxelGrid
from occbev.results import FrameSet, Sweep
from occbev.rig import Camera
from occbev.trajectory import PoseError
from occbev_training.occupancy.rays import (
    MAX_SWEEPS,
    CameraRays,
    Evidence,
    Hits,
    RayBundle,
    bundle_rays,
    bundle_slots,
    cast,
    gather_hits,
    mark_visible,
)
from occbev_training.sources.deskew import EgoBox, RayLimits, Rays, deskewed_rays
from occbev_training.sources.recording import Recording


@dataclass(frozen=True)
class LabelConfig:
    """Every parameter that a label depends on; metres and seconds. Its hash travels with the label."""

    window: float = 1.0
    """Sweeps at most this far from the key time are used."""
    max_sweeps: int = MAX_SWEEPS
    """At most this many sweeps, the nearest in time."""
    limits: RayLimits = field(default_factory=RayLimits)
    """Which returns become rays."""
    ego_box: EgoBox = field(default_factory=EgoBox)
    """The vehicle's body: returns inside are dropped and carve nothing."""
    collapse: bool = True
    """Join beams of one sweep that share an end cell: about twice as fast, nearly the same label."""
    conflict_margin: float = 0.8
    """A beam contradicts returns only where it goes on for this long."""
    conflict_distance: float = 0.2
    """A beam contradicts returns only if it goes by their centroid nearer than this."""
    ground_height: float = 0.25
    """Returns less than this above the lowest ones around are ground, which does not move."""
    ground_columns: int = 5
    """Side of the square of columns, in cells, in which the lowest returns are looked for."""
    ground_grazing: bool = True
    """Beams that end on the ground do not free the cells of its own layer that they skim over."""
    dynamic_minimum: int = 2
    """Fewest contradicting beams of a dynamic cell."""
    dynamic_ratio: float = 2.0
    """A dynamic cell has this many contradicting beams per return."""
    few_sweeps: int = 4
    """With fewer other sweeps than this in the window, `dynamic_ratio_few` counts instead."""
    dynamic_ratio_few: float = 1.0
    """Ratio for short windows."""
    component_share: float = 0.5
    """A connected component moves as a whole if at least this share of its cells is dynamic."""
    reference_ratio: float = 2.0
    """A beam at the key time frees a hit cell that does not move as a whole only if this many times
    more sweeps contradict than hit it: foliage and fences let beams through."""
    far_range: float = 30.0
    """Beyond this one hit is enough for occupied where fewer than `far_passes` sweeps went through,
    and free needs that many."""
    near_hits: int = 2
    """Sweeps that must hit a cell nearer than `far_range`, unless the reference sweep does."""
    far_passes: int = 2
    """Sweeps that must pass a cell beyond `far_range` for free."""
    camera_spacing: float = 2.5 / 1266
    """Angle between neighbouring camera rays far away: 2.5 pixels of a nuScenes front camera."""
    camera_levels: int = 4
    """Rasters of camera rays, each twice as dense as the one before; 1 walks every ray in full."""
    camera_near: float = 6.0
    """The first raster reaches so far, each further one twice as far, the last to `camera_range`."""
    camera_range: float = 60.0
    """Length of camera rays."""
    unobserved_path: float = 5.0
    """A camera ray ends after this long in unobserved cells: what hides there is not known."""

    def __post_init__(self) -> None:
        if not self.window > 0 or not 1 <= self.max_sweeps <= MAX_SWEEPS:
            raise ValueError(
                f"label window must be positive and max_sweeps 1..{MAX_SWEEPS}; "
                f"got {self.window} and {self.max_sweeps}"
            )
        if self.ground_columns % 2 == 0:
            raise ValueError(f"ground_columns must be odd; got {self.ground_columns}")
        if self.camera_spacing <= 0 or self.camera_levels < 1:
            raise ValueError(
                f"camera_spacing and camera_levels must be positive; "
                f"got {self.camera_spacing} and {self.camera_levels}"
            )

    @property
    def hash(self) -> str:
        """Twelve hex digits over every parameter."""
        record = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class OccupancyLabel:
    """The label of one key frame, in ego at the key time, indexed [x, y, z].

    state: (X, Y, Z) uint8, 0 unobserved, 1 free, 2 occupied. camera_visible: (X, Y, Z) uint8, bit i
    = camera i of the rig sees the cell (observed cells only). hit_sweeps, pass_sweeps: (X, Y, Z)
    uint8 sweeps that ended in or went through the cell. stats: counts by name.
    """

    state: NDArray[np.uint8]
    camera_visible: NDArray[np.uint8]
    hit_sweeps: NDArray[np.uint8]
    pass_sweeps: NDArray[np.uint8]
    stats: Mapping[str, int]
    grid: VoxelGrid


@dataclass(frozen=True)
class Decision:
    """What the evidence of a window amounts to.

    state, pass_sweeps: (X*Y*Z,) uint8. dynamic, ground: (H,) bool, hit cells that hold something
    that moved, and hit cells that are ground.
    """

    state: NDArray[np.uint8]
    pass_sweeps: NDArray[np.uint8]
    dynamic: NDArray[np.bool_]
    ground: NDArray[np.bool_]
    evidence: Evidence


@dataclass(frozen=True)
class SweepRays:
    """A decoded sweep: rays in ego at `stamp_ns`; `middle_ns` is half-way through its points.

    timed: whether its points came with their own times.
    """

    stamp_ns: int
    middle_ns: int
    rays: Rays
    timed: bool


@dataclass(frozen=True)
class Window:
    """The sweeps that make one label, in time order.

    bundles: their rays in ego at the key time. reference: which were measured at the key time.
    without_pose: number of sweeps that could not be used.
    """

    sweeps: tuple[SweepRays, ...]
    bundles: tuple[RayBundle, ...]
    reference: tuple[bool, ...]
    without_pose: int = 0

    @property
    def reference_bits(self) -> int:
        """`reference` as bits."""
        return sum(1 << number for number, now in enumerate(self.reference) if now)

    def only(self, keep: Sequence[int]) -> Window:
        """Return the window of some of its sweeps."""
        parts = (self.sweeps, self.bundles, self.reference)
        sweeps, bundles, reference = (tuple(part[i] for i in keep) for part in parts)
        return Window(sweeps, bundles, reference, self.without_pose)


@dataclass(frozen=True)
class Examined:
    """A label with the rays and the evidence behind it."""

    key: int
    label: OccupancyLabel
    window: Window
    decision: Decision


class LabelBuilder:
    """Makes the labels of one recording; sweeps stay decoded while neighbouring keys need them."""

    def __init__(
        self, recording: Recording, config: LabelConfig | None = None, grid: VoxelGrid | None = None
    ) -> None:
        self.recording = recording
        self.config = config or LabelConfig()
        self.grid = grid or GRIDS["occ3d"]
        self._rays: dict[int, SweepRays | None] = {}
        self._slots = bundle_slots(self.grid)
        self._camera_rays: dict[str, tuple[Camera, CameraRays]] = {}

    def build(self, key: int, frames: FrameSet | None = None) -> OccupancyLabel:
        """Label one key frame; `frames` spares reading its images again. Raises PoseError without a pose."""
        return self.examine(key, frames).label

    def examine(self, key: int, frames: FrameSet | None = None) -> Examined:
        """Label one key frame and keep what the label was made of; otherwise as `build`."""
        window = self.window(key)
        decision = self.judge(window)
        return Examined(key, self._label(key, window, decision, frames), window, decision)

    def forget(self) -> None:
        """Drop the decoded sweeps."""
        self._rays = {}

    def window(self, key: int) -> Window:
        """Collect the sweeps around one key frame in its ego frame."""
        stamp_ns = int(self.recording.key_stamp_ns[key])
        sweeps, without_pose = self._sweeps_around(stamp_ns)
        bundles = tuple(self._bundle(sweep, stamp_ns) for sweep in sweeps)
        half = self._period_ns / 2
        reference = tuple(abs(sweep.middle_ns - stamp_ns) <= half for sweep in sweeps)
        return Window(tuple(sweeps), bundles, reference, without_pose)

    def judge(self, window: Window) -> Decision:
        """Turn the rays of a window into states."""
        config, grid = self.config, self.grid
        hits = gather_hits(window.bundles, grid)
        ground = ground_cells(hits, grid, config.ground_height, config.ground_columns)
        skimmed = ground if config.ground_grazing else None
        evidence = cast(window.bundles, hits, grid, config.conflict_distance, skimmed)
        return decide(
            evidence, ground, self._far, grid, config, len(window.sweeps), window.reference_bits
        )

    @cached_property
    def _far(self) -> NDArray[np.bool_]:
        """Which cells (X*Y*Z,) are farther from the LiDAR at the key time than `far_range`."""
        away = self.grid.centres().reshape(-1, 3) - self.recording.lidar2ego[:3, 3]
        return np.linalg.norm(away, axis=-1) > self.config.far_range

    def _label(
        self, key: int, window: Window, decision: Decision, frames: FrameSet | None
    ) -> OccupancyLabel:
        """Add visibility and counts to decided states."""
        shape, hits = self.grid.shape, decision.evidence.hits
        hit_sweeps = np.zeros(self.grid.size, np.uint8)
        hit_sweeps[hits.cell] = np.bitwise_count(hits.sweeps)
        state = decision.state.reshape(shape)
        visible = self._visibility(key, frames or self.recording.frame_set(key), state)
        stats = self._stats(window)
        stats |= {"hit_cells": len(hits.cell), "dynamic_cells": int(decision.dynamic.sum())}
        for name, value in (("unobserved", 0), ("free", 1), ("occupied", 2)):
            stats[name] = int(np.count_nonzero(state == value))
        stats["camera_visible"] = int(np.count_nonzero(visible))
        counts = hit_sweeps.reshape(shape), decision.pass_sweeps.reshape(shape)
        return OccupancyLabel(state, visible, *counts, stats, self.grid)

    def _sweeps_around(self, stamp_ns: int) -> tuple[list[SweepRays], int]:
        """Return the usable sweeps around a stamp in time order, and how many had no pose."""
        stamps = self.recording.sweep_stamp_ns
        gap = np.abs(stamps - stamp_ns)
        near = np.flatnonzero(gap <= self.config.window * 1e9)
        chosen = np.sort(near[np.argsort(gap[near], kind="stable")][: self.config.max_sweeps])
        wanted = set(chosen.tolist())
        self._rays = {index: rays for index, rays in self._rays.items() if index in wanted}
        found = [self._sweep(int(index)) for index in chosen]
        usable = [sweep for sweep in found if sweep is not None]
        return usable, len(found) - len(usable)

    def _sweep(self, index: int) -> SweepRays | None:
        """Return the rays of one sweep in ego at its own stamp, or None where it has no pose."""
        if index not in self._rays:
            sweep = self.recording.sweep(index)
            trajectory, config = self.recording.trajectory, self.config
            try:
                rays = deskewed_rays(
                    sweep, trajectory, sweep.stamp_ns, config.ego_box, config.limits
                )
            except PoseError:
                self._rays[index] = None
            else:
                self._rays[index] = SweepRays(
                    sweep.stamp_ns, _middle_ns(sweep), rays, sweep.time_offset is not None
                )
        return self._rays[index]

    def _bundle(self, sweep: SweepRays, stamp_ns: int) -> RayBundle:
        ego2reference = self.recording.trajectory.relative(sweep.stamp_ns, stamp_ns)
        margin, collapse = self.config.conflict_margin, self.config.collapse
        return bundle_rays(sweep.rays, ego2reference, self.grid, margin, collapse, self._slots)

    @cached_property
    def _period_ns(self) -> float:
        stamps = self.recording.sweep_stamp_ns
        return float(np.median(np.diff(stamps))) if len(stamps) > 1 else 1e8

    def _stats(self, window: Window) -> dict[str, int]:
        """Count what went into a label."""
        expected = min(2 * self.config.window * 1e9 / self._period_ns + 1, self.config.max_sweeps)
        stats = {
            "sweeps": len(window.sweeps),
            "sweeps_expected": round(expected),
            "sweeps_without_pose": window.without_pose,
            "reference_sweeps": sum(window.reference),
            "low_support": int(len(window.sweeps) < expected / 2),
            "rays": sum(len(sweep.rays) for sweep in window.sweeps),
            "bundles": sum(len(bundle) for bundle in window.bundles),
        }
        for sweep in window.sweeps:
            for reason, count in sweep.rays.dropped.items():
                stats[f"points_{reason}"] = stats.get(f"points_{reason}", 0) + count
        return stats

    def _visibility(
        self, key: int, frames: FrameSet, state: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Mark what each camera sees from where it was at its own exposure."""
        visible = np.zeros(self.grid.shape, np.uint8)
        cameras = self.recording.rig.cameras
        if len(cameras) > 8:
            raise ValueError(
                f"{len(cameras)} cameras; visibility has one bit for each of at most 8"
            )
        trajectory = self.recording.trajectory
        global2ego = invert_transform(trajectory.at(int(self.recording.key_stamp_ns[key])))
        for bit, camera in enumerate(cameras):
            frame = frames.frames.get(camera.name)
            if frame is None:
                continue
            pose = trajectory.at(frame.stamp_ns) if frame.ego2global is None else frame.ego2global
            cam2ego = global2ego @ pose @ camera.cam2ego
            mark_visible(self._rays_of(camera), cam2ego, state, self.grid, bit,
                         self.config.unobserved_path, visible)  # fmt: skip
        return visible

    def _rays_of(self, camera: Camera) -> CameraRays:
        known = self._camera_rays.get(camera.name)
        if known is None or known[0] is not camera:
            self._camera_rays[camera.name] = known = (camera, camera_rays(camera, self.config))
        return known[1]


_RECENT: list[LabelBuilder] = []
"""The builder of the last `build_label` call, kept for the next key of the same recording."""


def _middle_ns(sweep: Sweep) -> int:
    """Return the time half-way between the first and the last point of a sweep."""
    offset = sweep.time_offset
    if offset is None or not np.isfinite(offset).any():
        return sweep.stamp_ns
    return sweep.stamp_ns + round((float(np.nanmin(offset)) + float(np.nanmax(offset))) / 2 * 1e9)


def build_label(
    recording: Recording,
    key: int,
    config: LabelConfig | None = None,
    grid: VoxelGrid | None = None,
    frames: FrameSet | None = None,
) -> OccupancyLabel:
    """Label one key frame; consecutive keys of one recording share decoded sweeps, as in `LabelBuilder`."""
    wanted = (config or LabelConfig(), grid or GRIDS["occ3d"])
    for builder in _RECENT:
        if builder.recording is recording and (builder.config, builder.grid) == wanted:
            return builder.build(key, frames)
    _RECENT[:] = [LabelBuilder(recording, *wanted)]
    return _RECENT[0].build(key, frames)


def camera_rays(camera: Camera, config: LabelConfig) -> CameraRays:
    """Build a camera's rasters of rays: coarse ones for near cells, the finest for the far ones."""
    finer = range(config.camera_levels)
    step = 2 ** (config.camera_levels - 1)
    columns, rows = (
        step * max(1, int(np.ceil(size / (step * config.camera_spacing * focal))))
        for size, focal in zip(
            (camera.width, camera.height), np.diag(camera.intrinsic)[:2], strict=True
        )
    )
    rasters = [
        pixel_rays(camera, rows * 2**level // step, columns * 2**level // step) for level in finer
    ]
    until = [min(config.camera_near * 2**level, config.camera_range) for level in finer]
    return CameraRays(tuple(rasters), (*until[:-1], config.camera_range))


def pixel_rays(camera: Camera, rows: int, columns: int) -> NDArray[np.float64]:
    """Return unit directions (rows, columns, 3) in the camera frame, evenly over the image.

    They go through the real lens and do not depend on the image's resolution.
    """
    u = (np.arange(columns) + 0.5) * camera.width / columns
    v = (np.arange(rows) + 0.5) * camera.height / rows
    pixels = np.stack(np.meshgrid(u, v), -1).reshape(-1, 2)
    rays = np.concatenate([_undistorted(camera, pixels), np.ones((len(pixels), 1))], axis=1)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    return rays.reshape(rows, columns, 3)


def _undistorted(camera: Camera, pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the slopes x/z, y/z (R, 2) of the rays through pixels (R, 2) of the native image."""
    k = camera.intrinsic
    if camera.distortion_model == "none" or not any(camera.distortion):
        y = (pixels[:, 1] - k[1, 2]) / k[1, 1]
        return np.stack([(pixels[:, 0] - k[0, 2] - k[0, 1] * y) / k[0, 0], y], axis=-1)
    import cv2

    enough = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-8)
    source, distortion = pixels[:, None], np.array(camera.distortion)
    if camera.distortion_model == "equidistant":
        slopes = cv2.fisheye.undistortPoints(source, k, distortion, criteria=enough)
    elif hasattr(cv2, "undistortPointsIter"):  # OpenCV 4; in OpenCV 5 it is the plain function
        slopes = cv2.undistortPointsIter(source, k, distortion, np.eye(3), np.eye(3), enough)
    else:
        slopes = cv2.undistortPoints(source, k, distortion, criteria=enough)
    return slopes.reshape(-1, 2)


def ground_cells(hits: Hits, grid: VoxelGrid, height: float, columns: int) -> NDArray[np.bool_]:
    """Return which hit cells (H,) lie less than `height` above the lowest returns of the columns around."""
    return _ground_cells(hits.cell, hits.centroid, np.array(grid.shape), columns // 2, height)


def decide(
    evidence: Evidence,
    ground: NDArray[np.bool_],
    far: NDArray[np.bool_],
    grid: VoxelGrid,
    config: LabelConfig,
    sweeps: int,
    reference: int,
) -> Decision:
    """Turn evidence into states.

    ground: (H,) hit cells that are ground. far: (X*Y*Z,) cells beyond the far range.
    sweeps: number in the window. reference: bits of those at the key time, which decide first.
    """
    hits, solid = evidence.hits, ~ground
    state, pass_sweeps = _passed_cells(evidence.passes, far, config.far_passes)
    ratio = config.dynamic_ratio if sweeps > config.few_sweeps else config.dynamic_ratio_few
    contradicted = evidence.conflicts >= np.maximum(config.dynamic_minimum, ratio * hits.count)
    dynamic = _moving_components(hits.cell, hits.row, solid, contradicted & solid,
                                 np.array(grid.shape), config.component_share)  # fmt: skip
    bits, hit_sweeps = np.uint64(reference), np.bitwise_count(hits.sweeps)
    hit_now = (hits.sweeps & bits) != 0
    outvoted = np.bitwise_count(evidence.conflict_sweeps) >= config.reference_ratio * hit_sweeps
    free_now = ((evidence.conflict_sweeps & bits) != 0) & solid & (dynamic | outvoted)
    lone_far = far[hits.cell] & (pass_sweeps[hits.cell] < config.far_passes)
    supported = (hit_sweeps >= config.near_hits) | lone_far
    state[hits.cell] = np.select(
        [hit_now, free_now, ~dynamic & supported],
        [OCCUPIED_STATE, FREE_STATE, OCCUPIED_STATE],
        UNOBSERVED_STATE,
    )
    return Decision(state, pass_sweeps, dynamic, ground, evidence)


@njit(cache=True, nogil=True)
def _passed_cells(passes, far, far_passes):  # type: ignore[no-untyped-def]
    """Count the sweeps that passed each cell; returns free (1) or unobserved (0), and the counts."""
    state, count = np.zeros(len(passes), np.uint8), np.zeros(len(passes), np.uint8)
    for cell in range(len(passes)):
        bits = passes[cell]
        if bits != 0:
            seen = 0
            while bits != 0:
                bits &= bits - np.uint64(1)
                seen += 1
            count[cell] = seen
            if seen >= far_passes or not far[cell]:
                state[cell] = 1
    return state, count


@njit(cache=True, nogil=True)
def _ground_cells(cell, centroid, shape, reach, height):  # type: ignore[no-untyped-def]
    """Return which hit cells lie less than `height` above the lowest returns of the columns around."""
    nx, ny, nz = shape
    lowest = np.full((nx, ny), np.inf)
    for h in range(len(cell)):
        ix, iy = cell[h] // nz // ny, cell[h] // nz % ny
        lowest[ix, iy] = min(lowest[ix, iy], centroid[h, 2])
    ground = np.empty(len(cell), np.bool_)
    for h in range(len(cell)):
        ix, iy = cell[h] // nz // ny, cell[h] // nz % ny
        floor = np.inf
        for jx in range(max(0, ix - reach), min(nx, ix + reach + 1)):
            for jy in range(max(0, iy - reach), min(ny, iy + reach + 1)):
                floor = min(floor, lowest[jx, jy])
        ground[h] = centroid[h, 2] < floor + height
    return ground


@njit(cache=True, nogil=True)
def _root(parent, h):  # type: ignore[no-untyped-def]
    """Find the representative of a set, halving the path."""
    while parent[h] != h:
        parent[h] = parent[parent[h]]
        h = parent[h]
    return h


@njit(cache=True, nogil=True)
def _moving_components(cell, row, solid, contradicted, shape, share):  # type: ignore[no-untyped-def]
    """Join solid hit cells by their 26 neighbours; returns the cells of components that move."""
    _, ny, nz = shape
    parent = np.arange(len(cell))
    for h in range(len(cell)):
        if not solid[h]:
            continue
        ix, iy, iz = cell[h] // nz // ny, cell[h] // nz % ny, cell[h] % nz
        for jx in range(max(0, ix - 1), ix + 1):
            for jy in range(max(0, iy - 1), min(ny, iy + 2)):
                for jz in range(max(0, iz - 1), min(nz, iz + 2)):
                    r = row[(jx * ny + jy) * nz + jz]
                    if r >= 0 and r < h and solid[r]:
                        parent[_root(parent, h)] = _root(parent, r)
    size, moving = np.zeros(len(cell), np.int64), np.zeros(len(cell), np.int64)
    for h in range(len(cell)):
        if solid[h]:
            root = _root(parent, h)
            size[root] += 1
            moving[root] += contradicted[h]
    dynamic = np.zeros(len(cell), np.bool_)
    for h in range(len(cell)):
        if solid[h]:
            root = _root(parent, h)
            dynamic[h] = moving[root] > 0 and moving[root] >= share * size[root]
    return dynamic
