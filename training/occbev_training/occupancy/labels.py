"""Three-state occupancy labels from a window of sweeps: no boxes, no class, no network.

A cell is occupied, free or unobserved at the key time; what moved is found by the beams that later
went through it. Beside the state each cell keeps which cameras see it and how many sweeps agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numba import njit
from numpy.typing import NDArray

from occbev.classes import FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.files import file_name
from occbev.geometry import invert_transform, transform_points
from occbev.grid import GRIDS, VoxelGrid
from occbev.results import FrameSet
from occbev.rig import Camera
from occbev.trajectory import PoseError
from occbev_training.data.shards import LabelVolumes, camera_bit
from occbev_training.occupancy.boxes import BoxReturns, read_tracks, returns_in_boxes
from occbev_training.occupancy.rays import (
    MAX_SWEEPS,
    BundleScratch,
    CameraRays,
    Evidence,
    Hits,
    RayBundle,
    bundle_rays,
    cast,
    gather_hits,
    joined,
    mark_visible,
)
from occbev_training.sources.deskew import EgoBox, RayLimits, Rays, deskew_rays, middle_ns
from occbev_training.sources.recording import Recording, RecordingError, describe_error

logger = logging.getLogger(__name__)


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
    camera_spacing: float = 3.0 / 1266
    """Angle between neighbouring rows of camera rays far away: 3 pixels of a nuScenes front camera."""
    camera_aspect: float = 5 / 3
    """Columns of camera rays are this much farther apart than rows: what is seen at a flat angle is ground."""
    camera_levels: int = 4
    """Rasters of camera rays, each twice as dense as the one before; 1 walks every ray in full."""
    camera_near: float = 5.0
    """The first raster reaches so far, each further one twice as far, the last to `camera_range`."""
    camera_range: float = 60.0
    """Length of camera rays."""
    unobserved_path: float = 5.0
    """A camera ray ends after this long in unobserved cells: what hides there is not known."""
    ego_masks: str = ""
    """Folder of <camera>.png whose white pixels show the vehicle itself; no camera ray goes through them."""
    objects: str = "evidence"
    """What moves is found by "evidence", or by "boxes": then labels are not free of annotations."""
    box_growth: float = 1.1
    """Factor on the size of boxes, for the boxes variant."""

    def __post_init__(self) -> None:
        if not self.window > 0 or not 1 <= self.max_sweeps <= MAX_SWEEPS:
            raise ValueError(
                f"label window must be positive and max_sweeps 1..{MAX_SWEEPS}; got {self.window} and {self.max_sweeps}"
            )
        if self.ground_columns % 2 == 0:
            raise ValueError(f"ground_columns must be odd; got {self.ground_columns}")
        if self.camera_spacing <= 0 or self.camera_aspect <= 0 or self.camera_levels < 1:
            raise ValueError(
                f"camera_spacing, camera_aspect and camera_levels must be positive; "
                f"got {self.camera_spacing}, {self.camera_aspect} and {self.camera_levels}"
            )
        if self.objects not in ("evidence", "boxes"):
            raise ValueError(f"objects must be evidence or boxes; got {self.objects!r}")

    @property
    def hash(self) -> str:
        """Twelve hex digits over every parameter, and over the masks that one of them names."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self) | {"ego_masks": ""}, sort_keys=True).encode())
        for path in sorted(Path(self.ego_masks).glob("*.png")) if self.ego_masks else []:
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class OccupancyLabel:
    """The label of one key frame, in ego at the key time, indexed [x, y, z].

    state: (X, Y, Z) uint8, 0 unobserved, 1 free, 2 occupied. camera_visible: (X, Y, Z) uint8, bit
    `camera_bit(i)` = camera i of the rig sees the cell (observed cells only). hit_sweeps, pass_sweeps: (X, Y, Z)
    uint8 sweeps that ended in or went through the cell. stats: counts by name.
    """

    state: NDArray[np.uint8]
    camera_visible: NDArray[np.uint8]
    hit_sweeps: NDArray[np.uint8]
    pass_sweeps: NDArray[np.uint8]
    stats: Mapping[str, int]
    grid: VoxelGrid

    @property
    def volumes(self) -> LabelVolumes:
        """What of it is stored."""
        return LabelVolumes(self.state, self.camera_visible, self.hit_sweeps, self.pass_sweeps, self.grid.hash)


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

    timed: whether its points came with their own times. ego2global: (4, 4) at `stamp_ns`.
    """

    stamp_ns: int
    middle_ns: int
    rays: Rays
    timed: bool
    ego2global: NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """The sweeps that make one label, in time order.

    bundles: their rays in ego at the key time. reference: which were measured at the key time.
    lost: reason -> number of sweeps that could not be used. objects: flat cells in which each sweep's
    returns from boxes lie, carried to the key time; empty without boxes.
    """

    sweeps: tuple[SweepRays, ...]
    bundles: tuple[RayBundle, ...]
    reference: tuple[bool, ...]
    lost: Mapping[str, int] = field(default_factory=dict)
    objects: tuple[NDArray[np.int64], ...] = ()

    @property
    def reference_bits(self) -> int:
        """`reference` as bits."""
        return sum(1 << number for number, now in enumerate(self.reference) if now)

    def only(self, keep: Sequence[int]) -> Window:
        """Return the window of some of its sweeps."""
        return Window(
            tuple(self.sweeps[i] for i in keep),
            tuple(self.bundles[i] for i in keep),
            tuple(self.reference[i] for i in keep),
            self.lost,
            tuple(self.objects[i] for i in keep) if self.objects else (),
        )


@dataclass(frozen=True)
class Examined:
    """A label with the rays and the evidence behind it; decision: None of the published recipe, which weighs nothing."""

    key: int
    label: OccupancyLabel
    window: Window
    decision: Decision | None


class LabelBuilder:
    """Makes the labels of one recording; sweeps stay decoded while neighbouring keys need them."""

    def __init__(self, recording: Recording, config: LabelConfig | None = None, grid: VoxelGrid | None = None) -> None:
        self.recording = recording
        self.config = config or LabelConfig()
        self.grid = grid or GRIDS["occ3d"]
        self._rays: dict[int, SweepRays | str] = {}
        self.first_unreadable = ""
        """Why the first sweep that cannot be read cannot."""
        self._tracks = read_tracks(recording) if self.config.objects == "boxes" else {}
        self._scratch = BundleScratch(self.grid)
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
        sweeps, lost = self._sweeps_around(stamp_ns)
        global2key = invert_transform(self.recording.trajectory.at(stamp_ns))
        bundles = [self._bundle(sweep, global2key) for sweep in sweeps]
        half = self._period_ns / 2
        reference = tuple(abs(sweep.middle_ns - stamp_ns) <= half for sweep in sweeps)
        if self.config.objects != "boxes":
            return Window(tuple(sweeps), tuple(bundles), reference, lost)
        carried = [self._carry_over(sweep, stamp_ns, global2key) for sweep in sweeps]
        bundles = [joined(bundle, moved) for bundle, moved in zip(bundles, carried, strict=True)]
        objects = tuple(np.unique(moved.end_cell[moved.hit]) for moved in carried)
        return Window(tuple(sweeps), tuple(bundles), reference, lost, objects)

    def judge(self, window: Window) -> Decision:
        """Turn the rays of a window into states."""
        config, grid = self.config, self.grid
        hits = gather_hits(window.bundles, grid)
        ground = ground_cells(hits, grid, config.ground_height, config.ground_columns)
        skimmed = ground if config.ground_grazing else None
        evidence = cast(window.bundles, hits, grid, config.conflict_distance, skimmed)
        decision = decide(evidence, ground, self._far, grid, config, len(window.sweeps), window.reference_bits)
        if window.objects:
            decision.state[self._cells_in_boxes(window)] = OCCUPIED_STATE
        # At the key time the vehicle itself is there: what was hit was there before or after it.
        own = self._own_cells
        decision.state[own[decision.state[own] == OCCUPIED_STATE]] = UNOBSERVED_STATE
        return decision

    @cached_property
    def _own_cells(self) -> NDArray[np.int64]:
        """Flat cells whose centre lies in the vehicle."""
        box, inside = self.config.ego_box, np.ones(self.grid.shape, np.bool_)
        for centre, lo, hi in zip(self._axes, box.lo, box.hi, strict=True):
            inside &= (centre >= lo) & (centre <= hi)
        return np.flatnonzero(inside)

    @property
    def _axes(self) -> list[NDArray[np.float64]]:
        """The cells' centres along x, y and z, shaped to be broadcast: all centres at once take 15 MB."""
        grid = self.grid
        lines = [
            lo + (np.arange(n) + 0.5) * pitch for lo, pitch, n in zip(grid.lo, grid.pitch, grid.shape, strict=True)
        ]
        return list(np.ix_(*lines))

    def _cells_in_boxes(self, window: Window) -> NDArray[np.int64]:
        """Return the cells in which returns carried with their boxes make an occupied cell."""
        cells, count = np.unique(np.concatenate(window.objects), return_counts=True)
        now = [cells for cells, at_key in zip(window.objects, window.reference, strict=True) if at_key]
        return np.union1d(cells[count >= self.config.near_hits], np.concatenate([[], *now])).astype(np.int64)

    @cached_property
    def _far(self) -> NDArray[np.bool_]:
        """Which cells (X*Y*Z,) are farther from the LiDAR at the key time than `far_range`."""
        squares = [
            (centre - lidar) ** 2 for centre, lidar in zip(self._axes, self.recording.lidar2ego[:3, 3], strict=True)
        ]
        return (np.sqrt(sum(squares)) > self.config.far_range).reshape(-1)

    def _label(self, key: int, window: Window, decision: Decision, frames: FrameSet | None) -> OccupancyLabel:
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

    def _sweeps_around(self, stamp_ns: int) -> tuple[list[SweepRays], dict[str, int]]:
        """Return the usable sweeps around a stamp in time order, and how many were not usable by reason."""
        stamps = self.recording.sweep_stamp_ns
        gap = np.abs(stamps - stamp_ns)
        near = np.flatnonzero(gap <= self.config.window * 1e9)
        chosen = np.sort(near[np.argsort(gap[near], kind="stable")][: self.config.max_sweeps])
        wanted = set(chosen.tolist())
        self._rays = {index: rays for index, rays in self._rays.items() if index in wanted}
        found = [self._sweep(int(index)) for index in chosen]
        usable = [sweep for sweep in found if not isinstance(sweep, str)]
        return usable, dict(Counter(reason for reason in found if isinstance(reason, str)))

    def _sweep(self, index: int) -> SweepRays | str:
        """Return the rays of one sweep in ego at its own stamp, or why it cannot be used."""
        if index not in self._rays:
            trajectory, config = self.recording.trajectory, self.config
            try:
                sweep = self.recording.sweep(index)
                ego2global = trajectory.at(sweep.stamp_ns)
                rays = deskew_rays(sweep, trajectory, sweep.stamp_ns, config.ego_box, config.limits)
            except PoseError:
                self._rays[index] = "without_pose"
            except Exception as error:  # whatever a reader or decompressor raises costs this sweep alone
                logger.warning("%s sweep %d: %s", self.recording.name, index, describe_error(error))
                self._rays[index] = "unreadable"
                self.first_unreadable = self.first_unreadable or describe_error(error)
            else:
                timed = sweep.time_offset is not None
                self._rays[index] = SweepRays(sweep.stamp_ns, middle_ns(sweep), rays, timed, ego2global)
        return self._rays[index]

    def _bundle(self, sweep: SweepRays, global2key: NDArray[np.float64]) -> RayBundle:
        margin, collapse = self.config.conflict_margin, self.config.collapse
        rays = sweep.rays
        if self._tracks:
            rays = replace(rays, hit=rays.hit & ~self._in_boxes(sweep)[0])
        ego2key = global2key @ sweep.ego2global
        return bundle_rays(rays, ego2key, self.grid, margin, collapse, self._scratch)

    def _in_boxes(self, sweep: SweepRays) -> tuple[NDArray[np.bool_], list[BoxReturns]]:
        """Return which rays of a sweep end in a box, and each box's share of them."""
        global2ego = invert_transform(sweep.ego2global)
        found = returns_in_boxes(sweep.rays, sweep.stamp_ns, global2ego, self._tracks, self.config.box_growth)
        inside = np.zeros(len(sweep.rays), np.bool_)
        for part in found:
            inside[part.rays] = True
        return inside, found

    def _carry_over(self, sweep: SweepRays, stamp_ns: int, global2key: NDArray[np.float64]) -> RayBundle:
        """Return a sweep's returns from boxes where their boxes are at the key time; they carve nothing."""
        places = [np.zeros((0, 3))]
        for part in self._in_boxes(sweep)[1]:
            box = self._tracks[part.instance].at(stamp_ns)
            if box is not None:  # else it is not there at the key time, so it belongs nowhere
                move = global2key @ box @ invert_transform(part.box2global) @ sweep.ego2global
                places.append(transform_points(move, sweep.rays.end[part.rays]))
        ends = np.concatenate(places)
        rays = Rays(ends, ends, np.ones(len(ends), np.bool_))
        return bundle_rays(rays, np.eye(4), self.grid, 0.0, True, self._scratch)

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
            "sweeps_without_pose": window.lost.get("without_pose", 0),
            "sweeps_unreadable": window.lost.get("unreadable", 0),
            "reference_sweeps": sum(window.reference),
            "low_support": int(len(window.sweeps) < expected / 2),
            "rays": sum(len(sweep.rays) for sweep in window.sweeps),
            "bundles": sum(len(bundle) for bundle in window.bundles),
        }
        for sweep in window.sweeps:
            for reason, count in sweep.rays.dropped.items():
                stats[f"points_{reason}"] = stats.get(f"points_{reason}", 0) + count
        return stats

    def _visibility(self, key: int, frames: FrameSet, state: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Mark what each camera sees from where it was at its own exposure."""
        visible = np.zeros(self.grid.shape, np.uint8)
        trajectory = self.recording.trajectory
        global2ego = invert_transform(trajectory.at(int(self.recording.key_stamp_ns[key])))
        for number, camera in enumerate(self.recording.rig.cameras):
            frame = frames.frames.get(camera.name)
            if frame is None:
                continue
            pose = trajectory.at(frame.stamp_ns) if frame.ego2global is None else frame.ego2global
            cam2ego = global2ego @ pose @ camera.cam2ego
            rays, bit = self._rays_of(camera), camera_bit(number)
            mark_visible(rays, cam2ego, state, self.grid, bit, self.config.unobserved_path, visible)
        return visible

    def _rays_of(self, camera: Camera) -> CameraRays:
        known = self._camera_rays.get(camera.name)
        if known is None or known[0] is not camera:
            mask = read_ego_mask(camera, self.config.ego_masks)
            self._camera_rays[camera.name] = known = (
                camera,
                camera_rays(camera, self.config, mask),
            )
        return known[1]


_RECENT: list[LabelBuilder] = []
"""The builder of the last `build_label` call, kept for the next key of the same recording."""


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


def read_ego_mask(camera: Camera, folder: str) -> NDArray[np.bool_] | None:
    """Read a camera's mask (H, W) of the vehicle itself; None without a folder or a file in it.

    Raises RecordingError where the mask has another size than the camera's images.
    """
    path = Path(folder) / f"{file_name(camera.name, 'camera name')}.png"
    if not folder or not path.is_file():
        return None
    import cv2

    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None or mask.shape != (camera.height, camera.width):
        found = "no image" if mask is None else f"{mask.shape[1]}x{mask.shape[0]} pixels"
        raise RecordingError(f"{path}: {found}; {camera.name} has {camera.width}x{camera.height}")
    return mask > 127


def camera_rays(camera: Camera, config: LabelConfig, ego_mask: NDArray[np.bool_] | None = None) -> CameraRays:
    """Build a camera's rasters of rays: coarse ones for near cells, the finest for the far ones.

    ego_mask: (H, W) pixels that show the vehicle; their rays are NaN and see nothing.
    """
    finer = range(config.camera_levels)
    step = 2 ** (config.camera_levels - 1)
    columns, rows = (
        step * max(1, int(np.ceil(size / (step * spacing * focal))))
        for size, spacing, focal in zip(
            (camera.width, camera.height),
            (config.camera_spacing * config.camera_aspect, config.camera_spacing),
            np.diag(camera.intrinsic)[:2],
            strict=True,
        )
    )
    rasters = []
    for level in finer:
        rays = pixel_rays(camera, rows * 2**level // step, columns * 2**level // step)
        # Within 4 um at 60 m, for half the memory of a worker's largest tables.
        rasters.append(_remove_masked(rays, ego_mask).astype(np.float32))
    until = [min(config.camera_near * 2**level, config.camera_range) for level in finer]
    return CameraRays(tuple(rasters), (*until[:-1], config.camera_range))


def _remove_masked(rays: NDArray[np.float64], mask: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Make rays (V, U, 3) through masked pixels NaN."""
    if mask is not None:
        rows, columns = rays.shape[:2]
        v = ((np.arange(rows) + 0.5) * mask.shape[0] / rows).astype(np.int64)
        u = ((np.arange(columns) + 0.5) * mask.shape[1] / columns).astype(np.int64)
        rays[mask[v[:, None], u]] = np.nan
    return rays


def pixel_rays(camera: Camera, rows: int, columns: int) -> NDArray[np.float64]:
    """Return unit directions (rows, columns, 3) in the camera frame, evenly over the image.

    They go through the real lens and do not depend on the image's resolution; NaN where the lens shows nothing.
    """
    u = (np.arange(columns) + 0.5) * camera.width / columns
    v = (np.arange(rows) + 0.5) * camera.height / rows
    pixels = np.stack(np.meshgrid(u, v), -1)
    return camera.lens.unproject(pixels).reshape(rows, columns, 3)


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
    pass_sweeps = evidence.passes
    state = _count_passes(pass_sweeps, far, config.far_passes)
    ratio = config.dynamic_ratio if sweeps > config.few_sweeps else config.dynamic_ratio_few
    contradicted = evidence.conflicts >= np.maximum(config.dynamic_minimum, ratio * hits.count)
    dynamic = _moving_components(
        hits.cell, hits.row, solid, contradicted & solid, np.array(grid.shape), config.component_share
    )
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
def _count_passes(passes, far, far_passes):  # type: ignore[no-untyped-def]
    """Return free (1) or unobserved (0) by the number of sweeps that passed each cell."""
    state = np.zeros(len(passes), np.uint8)
    for cell in range(len(passes)):
        if passes[cell] > 0 and (passes[cell] >= far_passes or not far[cell]):
            state[cell] = 1
    return state


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
