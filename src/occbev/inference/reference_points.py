"""Geometry of BEVFormer and DETR3D: where BEV pillars project to, and how the vehicle moved between frames.

All of it is input of the exported graphs, as the tables of Lift-Splat are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.ego_signals import GRAVITY, EgoSignals
from occbev.geometry import frame2ego, transform_points, wrap_angle, wxyz_from_rotation, yaw_from_rotation
from occbev.grid import BevGrid
from occbev.inference.capacity import Tables, check_capacity
from occbev.lens import Lens

NEAREST = 1e-5
"""Depth in metres from which a point counts as before a camera."""

FAR_AWAY = 10.0
"""Table entries are kept within this many image sizes; what lies beyond samples nothing either way."""


def pillar_points(bev: BevGrid, z_range: tuple[float, float], heights: int) -> NDArray[np.float64]:
    """Return points on the pillar over every cell, (Y * X, D, 3) metres in the grid's frame.

    The lowest and highest are half a metre inside z_range.
    """
    columns, rows = np.meshgrid(np.arange(bev.shape[0]) + 0.5, np.arange(bev.shape[1]) + 0.5)
    ground = bev.metres(np.stack([columns, rows], -1).reshape(-1, 2))
    z = np.linspace(z_range[0] + 0.5, z_range[1] - 0.5, heights)
    ground, z = np.broadcast_arrays(ground[:, None, :], z[None, :, None])
    return np.concatenate([ground, z[..., :1]], -1)


def frame_to_images(intrinsic: ArrayLike, cam2ego: ArrayLike, frame: str = "base_link") -> NDArray[np.float64]:
    """Return frame2img (N, 4, 4): points of a grid's frame to pixels times depth, depth, 1."""
    intrinsic, cam2ego = np.asarray(intrinsic, np.float64), np.asarray(cam2ego, np.float64)
    projection = np.tile(np.eye(4), (len(intrinsic), 1, 1))
    projection[:, :3, :3] = intrinsic
    return projection @ np.linalg.inv(cam2ego) @ frame2ego(frame)


def project(
    points: ArrayLike, frame2img: ArrayLike, image_size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return where points (..., 3) appear in N images, and whether they do.

    frame2img: (N, 4, 4). image_size: (width, height).
    Returns: x and y in 0..1 of the image (N, ..., 2), and (N, ...) bool.
    """
    points, frame2img = np.asarray(points, np.float64), np.asarray(frame2img, np.float64)
    flat = points.reshape(-1, 3)
    rays = flat @ np.swapaxes(frame2img[:, :3, :3], 1, 2) + frame2img[:, None, :3, 3]
    depth = rays[..., 2:]
    place = rays[..., :2] / np.maximum(depth, NEAREST) / image_size
    visible = (depth[..., 0] > NEAREST) & np.all((place > 0) & (place < 1), -1)
    shape = (len(frame2img), *points.shape[:-1])
    return place.astype(np.float32).reshape(*shape, 2), visible.reshape(shape)


def see_points(
    points: ArrayLike, intrinsic: ArrayLike, cam2ego: ArrayLike, image_size: tuple[int, int], frame: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return where points (..., 3) of a grid's frame appear in N images, and whether they do; see `project`.

    intrinsic: (N, 3, 3), or (N, 3, 18) of lenses that are no pinholes. cam2ego: (N, 4, 4).
    """
    intrinsic, points = np.asarray(intrinsic, np.float64), np.asarray(points, np.float64)
    if intrinsic.shape[2] == 3:
        return project(points, frame_to_images(intrinsic, cam2ego, frame), image_size)
    places, visible = [], []
    for matrix, pose in zip(intrinsic, np.asarray(cam2ego, np.float64), strict=True):
        frame2cam = np.linalg.inv(pose) @ frame2ego(frame)
        pixels, away = Lens.from_matrix(matrix).see(transform_points(frame2cam, points.reshape(-1, 3)))
        places.append(pixels / image_size)
        visible.append((away > NEAREST) & np.all((places[-1] > 0) & (places[-1] < 1), -1))
    shape = (len(intrinsic), *points.shape[:-1])
    return np.stack(places).astype(np.float32).reshape(*shape, 2), np.stack(visible).reshape(shape)


def reference_tables(points: NDArray[np.float32], visible: NDArray[np.bool_], max_rows: int, max_slots: int) -> Tables:
    """Return which queries each camera sees as tables of fixed size.

    points: (N, Q, D, 2). visible: (N, Q, D). max_rows: queries per camera. max_slots: cameras per query.
    Returns: table_query (N, R) int32, table_points (N, R, D, 2), table_slot (Q, S) int32: rows of
    N * R that belong to a query, N * R where there is none.
    Raises: TableCapacityError naming what is needed and what there is.
    """
    hit: NDArray[np.bool_] = np.asarray(visible.any(-1))  # (N, Q)
    cameras, queries = hit.shape
    most_rows, most_slots = int(hit.sum(1).max(initial=0)), int(hit.sum(0).max(initial=0))
    check_capacity("queries that one camera sees", most_rows, max_rows, "bevformer.max_rows")
    check_capacity("cameras that see one query", most_slots, max_slots, "bevformer.max_slots")
    query = np.zeros((cameras, max_rows), np.int32)
    places = np.full((cameras, max_rows, *points.shape[2:]), -FAR_AWAY, np.float32)
    slot = np.full((queries, max_slots), cameras * max_rows, np.int32)
    used = np.zeros(queries, np.int64)
    for camera in range(cameras):
        seen = np.flatnonzero(hit[camera])
        query[camera, : len(seen)] = seen
        places[camera, : len(seen)] = np.clip(points[camera, seen], -FAR_AWAY, FAR_AWAY)
        slot[seen, used[seen]] = camera * max_rows + np.arange(len(seen))
        used[seen] += 1
    return {"table_query": query, "table_points": places, "table_slot": slot}


# --- motion between two frames ---------------------------------------------------------------


@dataclass(frozen=True)
class EgoMotion:
    """How the vehicle came from the frame before to this one.

    delta: (3,) metres in global axes. yaw: of this frame, radians. turn: since then, radians.
    seconds: since then, 0 where they are not known.
    """

    delta: NDArray[np.float64]
    yaw: float
    turn: float
    seconds: float = 0.0

    @classmethod
    def between(cls, previous: ArrayLike, current: ArrayLike, seconds: float = 0.0) -> EgoMotion:
        """Derive it from both (4, 4) poses in global axes; seconds: between them, 0 if unknown."""
        before, now = np.asarray(previous, np.float64), np.asarray(current, np.float64)
        yaws = [yaw_from_rotation(pose[:3, :3]) for pose in (before, now)]
        turn = float(wrap_angle(yaws[1] - yaws[0]))
        return cls(now[:3, 3] - before[:3, 3], yaws[1], turn, seconds)


def bev_shift(motion: EgoMotion, bev: BevGrid, reference_quirks: bool = False) -> NDArray[np.float32]:
    """Return what to add to x and y in 0..1 of the grid to find a cell in the frame before, (2,).

    reference_quirks: as published, which takes the grid's y for forward in every frame.
    """
    length = math.hypot(motion.delta[0], motion.delta[1])
    angle = motion.yaw - math.atan2(motion.delta[1], motion.delta[0])
    forward, right = length * math.cos(angle), length * math.sin(angle)
    ego_axes = bev.frame == "base_link" and not reference_quirks
    shift = (forward, -right) if ego_axes else (right, forward)
    extent = np.asarray(bev.pitch) * bev.shape
    return (shift / extent).astype(np.float32)


def align_table(turn: float, bev: BevGrid, centre: tuple[float, float] | None = None) -> NDArray[np.int32]:
    """Return which cell of the frame before turns into each cell, (Y * X,); Y * X for none.

    turn: radians. centre: of the turn, column and row in cells; by default where the vehicle is.
    """
    columns, rows = bev.shape
    if centre is None:
        x, y = bev.map_coordinates((0.0, 0.0))
        centre = float(x), float(y)
    dx, dy = np.meshgrid(np.arange(columns) + 0.5 - centre[0], np.arange(rows) + 0.5 - centre[1])
    cos, sin = math.cos(turn), math.sin(turn)
    column = np.rint(centre[0] + cos * dx - sin * dy - 0.5).astype(np.int64)
    row = np.rint(centre[1] + sin * dx + cos * dy - 0.5).astype(np.int64)
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    return np.where(inside, row * columns + column, bev.size).astype(np.int32).reshape(-1)


def signals_of_motion(pose: ArrayLike, motion: EgoMotion | None) -> EgoSignals:
    """Derive velocity and yaw rate from two poses, means over the time between, and gravity from this one.

    How the speed changes and how the vehicle rolls and pitches stays unknown, and so zero.
    """
    ego2global = np.asarray(pose, np.float64)[:3, :3]
    gravity, none = GRAVITY * ego2global[2], np.zeros(3)
    if motion is None or motion.seconds <= 0:
        return EgoSignals(gravity, none, none)
    velocity = ego2global.T @ motion.delta / motion.seconds
    return EgoSignals(gravity, np.array([0.0, 0.0, motion.turn / motion.seconds]), velocity)


def can_bus(pose: ArrayLike, motion: EgoMotion | None, signals: EgoSignals | None = None) -> NDArray[np.float32]:
    """Return ego motion as published weights read it, (18,): raw metres, radians and degrees.

    pose: (4, 4) ego2global. motion: None in the first frame. signals: None for those that the motion tells.
    """
    pose = np.asarray(pose, np.float64)
    signals = signals or signals_of_motion(pose, motion)
    yaw = yaw_from_rotation(pose[:3, :3]) % (2 * math.pi)
    delta, turn = (np.zeros(3), 0.0) if motion is None else (motion.delta, motion.turn)
    return np.concatenate([delta, wxyz_from_rotation(pose[:3, :3]), signals.values, [yaw, math.degrees(turn)]]).astype(
        np.float32
    )


def motion_tables(
    motion: EgoMotion | None,
    bev: BevGrid,
    centre: tuple[float, float] | None = None,
    reference_quirks: bool = False,
) -> Tables:
    """Return state_known (1,), table_align (1, Q) and table_shift (1, 2) of an exported graph."""
    if motion is None:
        return {
            "state_known": np.zeros(1, np.float32),
            "table_align": np.full((1, bev.size), bev.size, np.int32),
            "table_shift": np.zeros((1, 2), np.float32),
        }
    return {
        "state_known": np.ones(1, np.float32),
        "table_align": align_table(motion.turn, bev, centre)[None],
        "table_shift": bev_shift(motion, bev, reference_quirks)[None],
    }


def warp_table(key2past: ArrayLike, bev: BevGrid, reference_quirks: bool = False) -> NDArray[np.float32]:
    """Return where each cell of the key frame was in the past one, (Y, X, 2) as grid sampling takes it.

    key2past: (4, 4), the BEV's frame at the key time -> that of the past frame, BEV augmentation folded in;
        only its planar part is used. reference_quirks: cells stand for their lower corner, not their centre.
    """
    columns, rows = bev.shape
    planar = np.asarray(key2past, np.float64)[[[0], [1], [3]], [0, 1, 3]]
    shift = 0.0 if reference_quirks else 0.5
    cell2frame = np.array(
        [
            [bev.pitch[0], 0, bev.lo[0] + shift * bev.pitch[0]],
            [0, bev.pitch[1], bev.lo[1] + shift * bev.pitch[1]],
            [0, 0, 1],
        ]
    )
    key2past_cells = np.linalg.inv(cell2frame) @ planar @ cell2frame
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    cells = np.stack([x, y, np.ones_like(x)], -1)  # (Y, X, 3)
    place = cells @ key2past_cells[:2].T
    return (place / (columns - 1, rows - 1) * 2 - 1).astype(np.float32)


def projection_table(
    intrinsic: ArrayLike, cam2ego: ArrayLike, image_size: tuple[int, int], frame: str
) -> NDArray[np.float32]:
    """Return (N, 4, 4): points of the frame to x and y in 0..1 of the image times depth, depth, 1.

    intrinsic: (N, 3, 3) of images of image_size (width, height). cam2ego: (N, 4, 4).
    """
    if np.shape(intrinsic)[2] > 3:
        raise ValueError(
            "a network that projects in its graph, as DETR3D does, takes pinholes: want image.lens rectify"
        )
    scale = np.diag([1 / image_size[0], 1 / image_size[1], 1.0, 1.0])
    return (scale @ frame_to_images(intrinsic, cam2ego, frame)).astype(np.float32)
