"""Geometry tables: calibration as the integer and float inputs of an exported Lift-Splat graph.

Geometry stays outside the graph. Each kept frustum point adds `depth[table_depth] * feature[table_pixel]`
to one BEV cell. Two equal forms of the same sum exist: bags (torch and OpenVINO's embedding bag) and
staged padded gathers (plain ONNX).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.config import LiftConfig
from occbev.geometry import frame2ego, invert_transform
from occbev.grid import BevGrid
from occbev.inference.capacity import TableCapacityError, Tables, check_capacity
from occbev.lens import Lens

GATHER_WIDTH = 8
"""Rows that one stage of the gather form adds up."""

GATHER_STAGES = 4
"""Stages of the gather form: a cell holds at most GATHER_WIDTH ** GATHER_STAGES points."""

CAPACITY = "lift.max_points"
"""Configuration key of the room for frustum points."""

RAY_CHANNELS = 4
"""Channels of `ray_table`."""

FORMS = {
    "bag": "table_offset",
    "gather": "table_cell",
    "slots": "table_slot",
    "projection": "table_projection",
}
"""Kind of tables -> the input of a graph that tells of it: two of Lift-Splat, that of BEVFormer and that of DETR3D."""


@dataclass(frozen=True)
class LiftPoints:
    """The frustum points that fall into the BEV, sorted by cell.

    pixel: (P,) int32, flat index over features (N, h, w).
    depth: (P,) int32, flat index over depth probabilities (N, D, h, w).
    cell: (P,) int32 ascending, flat index over BEV cells (Y, X).
    """

    pixel: NDArray[np.int32]
    depth: NDArray[np.int32]
    cell: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.cell)


def lift_points(
    intrinsic: ArrayLike, cam2ego: ArrayLike, image_size: tuple[int, int], lift: LiftConfig, bev: BevGrid
) -> LiftPoints:
    """Place every frustum point of every camera in the BEV (Philion & Fidler 2020, eq. 1-3).

    intrinsic: (N, 3, 3) of the network-size images, augmentation folded in, or (N, 3, 18) of other lenses, see `Lens`.
    cam2ego: (N, 4, 4) into the frame of `bev`, BEV augmentation folded in.
    image_size: (width, height). A feature cell stands for the centre of its stride x stride pixels,
    a depth bin for its centre. Points outside the BEV or `lift.z_range` are left out.
    """
    rays, depths, origins = _frustum(intrinsic, cam2ego, image_size, lift)
    # Axis by axis, along memory: half of the time that points with three coordinates side by side take.
    axes = [
        np.ascontiguousarray(rays[:, :, axis])[:, None] * depths[:, :, None] + origins[:, axis, None, None]
        for axis in range(3)
    ]
    return _sort_into_cells(axes, lift, bev)


def frustum_points(
    intrinsic: ArrayLike, cam2ego: ArrayLike, image_size: tuple[int, int], lift: LiftConfig
) -> NDArray[np.float64]:
    """Return where every depth bin of every feature cell is, (N, D, h, w, 3) in ego; see `lift_points`."""
    rays, depths, origins = _frustum(intrinsic, cam2ego, image_size, lift)
    points = rays[:, None] * depths[:, :, None, None] + origins[:, None, None]
    rows, columns = image_size[1] // lift.stride, image_size[0] // lift.stride
    return points.reshape(*points.shape[:2], rows, columns, 3)


def _frustum(
    intrinsic: ArrayLike, cam2ego: ArrayLike, image_size: tuple[int, int], lift: LiftConfig
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the rays of feature cells (N, h * w, 3) per metre of depth, the depths (N, D), the cameras' places (N, 3)."""
    intrinsic, cam2ego = np.asarray(intrinsic, np.float64), np.asarray(cam2ego, np.float64)
    rays = feature_rays(intrinsic, cam2ego, image_size, lift)
    return rays, depth_scale(intrinsic, lift)[:, None] * bin_depths(lift), cam2ego[:, :3, 3]


def feature_rays(
    intrinsic: NDArray[np.float64], cam2ego: NDArray[np.float64], image_size: tuple[int, int], lift: LiftConfig
) -> NDArray[np.float64]:
    """Return how far each feature cell's point moves in ego per metre of depth, (N, h * w, 3); see `lift_points`."""
    if intrinsic.shape[2] > 3:
        return lens_rays(intrinsic, image_size, lift) @ np.swapaxes(cam2ego[:, :3, :3], 1, 2)
    return feature_pixels(image_size, lift) @ np.swapaxes(cam2ego[:, :3, :3] @ np.linalg.inv(intrinsic), 1, 2)


def depth_scale(intrinsic: ArrayLike, lift: LiftConfig) -> NDArray[np.float64]:
    """Return metres per unit of the depth bins, for each camera (N,): 1, or as `lift.canonical_focal` says."""
    matrices = np.asarray(intrinsic, np.float64)
    if not lift.canonical_focal:
        return np.ones(len(matrices))
    return np.sqrt(np.abs(np.linalg.det(matrices[:, :2, :2]))) / lift.canonical_focal


def lens_rays(matrices: ArrayLike, image_size: tuple[int, int], lift: LiftConfig) -> NDArray[np.float64]:
    """Return where each feature cell looks in its camera's frame, (N, h * w, 3) per metre; see `Lens.rays`."""
    pixels = feature_pixels(image_size, lift)[:, :2]
    return np.stack([Lens.from_matrix(matrix).rays(pixels) for matrix in np.asarray(matrices)])


def place_points(points: ArrayLike, lift: LiftConfig, bev: BevGrid) -> LiftPoints:
    """Sort frustum points (N, D, h, w, 3) in ego into cells; those outside are left out.

    With `lift.reference_quirks` indices are truncated towards zero, as the published weights know it:
    points up to one cell below the lower border count as inside.
    """
    points = np.asarray(points)
    flat = points.reshape(*points.shape[:2], -1, 3)
    return _sort_into_cells([flat[..., axis] for axis in range(3)], lift, bev)


def _sort_into_cells(axes: Sequence[NDArray[Any]], lift: LiftConfig, bev: BevGrid) -> LiftPoints:
    """Sort points whose x, y and z are given (N, D, h * w) into cells; see `place_points`."""
    shape, count = axes[0].shape, axes[0].size
    assert count < 2**31, "frustum indices must fit int32"
    lo, hi = lift.z_range
    inside, cells = np.ones(shape, bool), np.zeros(shape, np.int32)
    scales = ((lo, hi - lo, lift.height_bins), (bev.lo[1], bev.pitch[1], 1), (bev.lo[0], bev.pitch[0], 1))
    for axis, (begin, extent, parts), most in zip(
        axes[::-1], scales, (lift.height_bins, *bev.shape[::-1]), strict=True
    ):
        place = axis - begin
        place /= extent
        if parts > 1:
            place *= parts
        inside &= place > -1 if lift.reference_quirks else place >= 0
        inside &= place < most
        cells *= most
        with np.errstate(invalid="ignore"):  # of points outside, which are left out
            # Whole numbers are cut towards zero, which is down for all but the points that the quirk adds.
            cells += place.astype(np.int32)
    depth = np.flatnonzero(inside)
    # One number holds cell and place: sorting such takes half of the time that sorting places by their cells does.
    key = cells.reshape(-1).take(depth).astype(np.min_scalar_type(bev.size * lift.height_bins * count))
    size = key.dtype.type(count)
    key = np.sort(key * size + depth.astype(key.dtype))
    cell = key // size
    depth = key - cell * size
    pixels = np.arange(shape[0] * shape[2], dtype=np.int32).reshape(shape[0], 1, shape[2])
    pixel = np.broadcast_to(pixels, shape).reshape(-1).take(depth)
    return LiftPoints(*(part.astype(np.int32, copy=False) for part in (pixel, depth, cell)))


def bin_depths(lift: LiftConfig) -> NDArray[np.float64]:
    """Return the depth (D,) that stands for each bin: its centre, or its near edge as published."""
    index, depth = np.arange(lift.depth.bins, dtype=np.float64), lift.depth
    if depth.spacing == "log":  # ever wider bins, each published one lifted to its near edge
        ratio = (depth.hi - 1) / depth.lo
        return depth.lo * np.power(ratio, index / max(1, depth.bins - 1), dtype=np.float64)
    return depth.lo + (index + (0 if lift.reference_quirks else 0.5)) * depth.step


@dataclass(frozen=True)
class Augmentation:
    """What training changed of one sample; folded into its intrinsics and poses, but told apart by some depth nets.

    image: (N, 3, 3), network pixels as recorded to augmented ones. scene: (4, 4), ego to augmented ego.
    """

    image: NDArray[np.float64]
    scene: NDArray[np.float64]


def camera_parameters(
    intrinsic: ArrayLike, cam2ego: ArrayLike, src2img: ArrayLike | None = None, bda: ArrayLike | None = None
) -> NDArray[np.float32]:
    """Return what a camera-aware depth net reads of each camera, (N, 27) (Li et al. 2022, section 3.2).

    intrinsic: (N, 3, 3) of the source images. cam2ego: (N, 4, 4). src2img: (N, 3, 3), source to network
    pixels. bda: (3, 3) or (4, 4), BEV augmentation, which cam2ego does not hold.
    """
    intrinsic, cam2ego = np.asarray(intrinsic, np.float64), np.asarray(cam2ego, np.float64)
    count = len(intrinsic)
    image = np.broadcast_to(np.eye(3) if src2img is None else np.asarray(src2img), (count, 3, 3))
    ego = np.broadcast_to(np.eye(3) if bda is None else np.asarray(bda)[:3, :3], (count, 3, 3))
    parts = [
        intrinsic[:, 0, :1],
        intrinsic[:, 1, 1:2],
        intrinsic[:, 0, 2:],
        intrinsic[:, 1, 2:],
        image[:, 0],
        image[:, 1],
        ego[:, 0, :2],
        ego[:, 1, :2],
        ego[:, 2, 2:],
        cam2ego[:, :3].reshape(count, 12),
    ]
    return np.concatenate(parts, 1).astype(np.float32)


def bag_tables(points: LiftPoints, bev: BevGrid, max_points: int, height_bins: int = 1) -> Tables:
    """Return the bag form, padded to `max_points` with entries of weight 0.

    table_pixel, table_depth (max_points,) int32; table_weight (max_points,) float32;
    table_offset (cells,) int32: where each cell's entries begin, always below max_points.
    """
    check_capacity("frustum points", len(points) + 1, max_points, CAPACITY)
    offset = np.zeros(bev.size * height_bins, np.int32)
    np.cumsum(np.bincount(points.cell, minlength=len(offset))[:-1], out=offset[1:])
    return {
        "table_pixel": _pad(points.pixel, max_points),
        "table_depth": _pad(points.depth, max_points),
        "table_weight": _pad(np.ones(len(points), np.float32), max_points),
        "table_offset": offset,
    }


def gather_capacities(bev: BevGrid, max_points: int, height_bins: int = 1, max_cells: int = 0) -> tuple[int, ...]:
    """Rows of each stage of the gather form, the reserved all-zero last row included.

    A cell's last row of a stage may be nearly empty, so that each cell that holds points takes one more.
    """
    cells = max_cells or bev.size * height_bins
    return tuple(max_points // GATHER_WIDTH**stage + cells + 1 for stage in range(1, GATHER_STAGES + 1))


def gather_tables(
    points: LiftPoints, bev: BevGrid, max_points: int, height_bins: int = 1, max_cells: int = 0
) -> Tables:
    """Return the gather form: stage 1 adds weighted points, each later stage adds rows of the one before.

    table_pixel, table_depth (rows1, 8) int32, table_weight (rows1, 8) float32;
    table_stage2.. (rows_i, 8) int32 into the rows before; table_cell (cells,) int32 into the last rows.
    The last row of every stage is zero and serves as padding.
    """
    capacities = gather_capacities(bev, max_points, height_bins, max_cells)
    check_capacity("frustum points", len(points) + 1, max_points, CAPACITY)
    if max_cells:
        filled = len(np.unique(points.cell))
        check_capacity("cells with frustum points", filled, max_cells, "lift.max_cells")
    slots, row_cell = _group(points.cell)
    used = slots >= 0
    tables: Tables = {
        "table_pixel": _pad(np.where(used, points.pixel[slots] if len(points) else 0, 0), capacities[0]),
        "table_depth": _pad(np.where(used, points.depth[slots] if len(points) else 0, 0), capacities[0]),
        "table_weight": _pad(used.astype(np.float32), capacities[0]),
    }
    for stage in range(2, GATHER_STAGES + 1):
        zero_row = capacities[stage - 2] - 1
        slots, row_cell = _group(row_cell)
        tables[f"table_stage{stage}"] = _pad(np.where(slots >= 0, slots, zero_row), capacities[stage - 1], zero_row)
    if len(row_cell) and np.any(np.diff(row_cell) == 0):
        raise TableCapacityError(f"a BEV cell holds over {GATHER_WIDTH**GATHER_STAGES} frustum points")
    cell = np.full(bev.size * height_bins, capacities[-1] - 1, np.int32)
    cell[row_cell] = np.arange(len(row_cell))
    return tables | {"table_cell": cell}


def ray_table(
    intrinsic: ArrayLike, cam2ego: ArrayLike, image_size: tuple[int, int], lift: LiftConfig
) -> NDArray[np.float32]:
    """Return what calibration gives for each feature cell: (N, 4, h, w), camera-aware depth's input.

    Channels: slope of the ray across the camera's axis, which grows with the column; metres that it climbs
    in ego per metre of depth; height of the camera above ground in metres / 2; ten times the angle that a
    pixel spans. A mirrored image reads as that of the camera which would take it in the mirrored scene.
    """
    intrinsic, cam2ego = np.asarray(intrinsic, np.float64), np.asarray(cam2ego, np.float64)
    rows, columns = image_size[1] // lift.stride, image_size[0] // lift.stride
    if intrinsic.shape[2] > 3:
        rays = np.nan_to_num(lens_rays(intrinsic, image_size, lift))
        across = np.arctan2(rays[..., :1], rays[..., 2:])  # a slope has no end beside a fisheye
    else:
        rays = feature_pixels(image_size, lift) @ np.swapaxes(np.linalg.inv(intrinsic), 1, 2)
        across = rays[..., :1]  # (N, h * w, 1), rays in cam per metre of depth
    climb = rays @ cam2ego[:, 2, :3, None]
    height = np.broadcast_to(cam2ego[:, 2, 3, None, None] / 2, climb.shape)
    area = np.linalg.det(intrinsic[:, :2, :2])  # negative where augmentation mirrored the image
    slope, focal = across * np.sign(area)[:, None, None], np.sqrt(np.abs(area))
    pixel_angle = np.broadcast_to(10 / focal[:, None, None], climb.shape)
    table = np.concatenate([slope, climb, height, pixel_angle], -1)
    return np.ascontiguousarray(
        np.swapaxes(table, 1, 2).reshape(len(intrinsic), RAY_CHANNELS, rows, columns), np.float32
    )


def image_to_past(
    intrinsic: ArrayLike, cam2global: ArrayLike, past_intrinsic: ArrayLike, past_cam2global: ArrayLike
) -> NDArray[np.float32]:
    """Return img2past (N, 3, 4): (u d, v d, d, 1) of a pixel at depth d to its place in the image before.

    The place is u, v times depth, depth. intrinsics: (N, 3, 3) of network-size images. poses: (N, 4, 4).
    """
    cam2past = np.linalg.inv(np.asarray(past_cam2global, np.float64)) @ np.asarray(cam2global, np.float64)
    img2past = np.asarray(past_intrinsic, np.float64) @ cam2past[:, :3]
    img2past[..., :3] = img2past[..., :3] @ np.linalg.inv(np.asarray(intrinsic, np.float64))
    return img2past.astype(np.float32)


def gate_parameters(intrinsic: ArrayLike, cam2ego: ArrayLike, src2img: ArrayLike) -> NDArray[np.float32]:
    """Return what BEVDet's first BEVDepth reads of each camera, (N, 33): its matrices, row by row.

    Arguments as in `camera_parameters`.
    """
    intrinsic, cam2ego = np.asarray(intrinsic, np.float64), np.asarray(cam2ego, np.float64)
    count = len(intrinsic)
    image = np.broadcast_to(np.asarray(src2img, np.float64), (count, 3, 3))
    turn, shift = image.copy(), np.zeros((count, 3))
    turn[:, :2, 2], shift[:, :2] = 0, image[:, :2, 2]
    parts = [
        intrinsic.reshape(count, 9),
        turn.reshape(count, 9),
        shift,
        cam2ego[:, :3, :3].reshape(count, 9),
        cam2ego[:, :3, 3],
    ]
    return np.concatenate(parts, 1).astype(np.float32)


def to_bev_frame(cam2ego: ArrayLike, bev: BevGrid) -> NDArray[np.float64]:
    """Return cam2frame (..., 4, 4): where cameras are in the frame of a BEV, `base_link` or `lidar`."""
    cam2ego = np.asarray(cam2ego, np.float64)
    if bev.frame == "base_link":
        return cam2ego
    ego2frame: NDArray[np.float64] = invert_transform(frame2ego(bev.frame))
    return ego2frame @ cam2ego


def move_to_frame(ego2ego: ArrayLike, bev: BevGrid) -> NDArray[np.float64]:
    """Return a change of ego (4, 4) as one of the frame of a BEV."""
    to_ego = frame2ego(bev.frame)
    frame2frame: NDArray[np.float64] = invert_transform(to_ego) @ np.asarray(ego2ego, np.float64) @ to_ego
    return frame2frame


@lru_cache(maxsize=16)
def feature_pixels(image_size: tuple[int, int], lift: LiftConfig) -> NDArray[np.float64]:
    """Return the pixel (h * w, 3) as u, v, 1 that stands for each feature cell, row by row."""
    columns, rows = (size // lift.stride for size in image_size)
    if lift.reference_quirks:  # from the first pixel to the last one, both included
        across, down = (np.linspace(0, s - 1, n) for s, n in zip(image_size, (columns, rows), strict=True))
    else:
        across, down = ((np.arange(n, dtype=np.float64) + 0.5) * lift.stride for n in (columns, rows))
    u, v = np.meshgrid(across, down)
    pixels = np.stack([u, v, np.ones_like(u)], -1).reshape(-1, 3)
    pixels.flags.writeable = False  # every caller gets the same array
    return pixels


def _group(key: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Pack runs of equal ascending keys into rows: (rows, 8) item indices (-1 = none) and each row's key."""
    if len(key) == 0:
        return np.zeros((0, GATHER_WIDTH), np.int64), np.zeros(0, np.int32)
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    rank = np.arange(len(key)) - np.repeat(starts, np.diff(np.r_[starts, len(key)]))
    opens_row = rank % GATHER_WIDTH == 0
    row = np.cumsum(opens_row) - 1
    slots = np.full((int(row[-1]) + 1, GATHER_WIDTH), -1, np.int64)
    slots[row, rank % GATHER_WIDTH] = np.arange(len(key))
    return slots, key[opens_row]


def _pad(rows: NDArray[np.generic], length: int, fill: int = 0) -> NDArray[np.int32]:
    out = np.full((length, *rows.shape[1:]), fill, np.float32 if rows.dtype == np.float32 else np.int32)
    out[: len(rows)] = rows
    return out
