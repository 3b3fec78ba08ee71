"""From network outputs to boxes and voxels in base_link: the last stage before messages and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES, FREE, OCCUPANCY_CLASSES, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.geometry import box_corners, wrap_angle, yaw_from_rotation
from occbev.grid import BevGrid, VoxelGrid, volume_from_xyz, xyz_from_volume
from occbev.results import Boxes3D, Occupancy, VoxelEvidence
from occbev.rig import CameraRig

Floats = NDArray[np.float32]

NMS_RADIUS: dict[str, float] = {
    "car": 1.5,
    "truck": 2.0,
    "construction_vehicle": 2.0,
    "bus": 2.5,
    "trailer": 2.5,
    "barrier": 0.7,
    "motorcycle": 0.6,
    "bicycle": 0.6,
    "pedestrian": 0.3,
    "traffic_cone": 0.3,
}
"""Centres of one class nearer than this (metres) are one object: under the width of its usual member."""

LARGEST_SIZE = 40.0
"""Metres; exp of a wild log size would overflow."""

MAX_HEIGHT = 10.0
"""Metres above or below the frame's origin within which a box has its centre."""

NEAR = 0.1
"""Least depth in metres at which a camera sees a voxel."""

CHUNK = 40_000
"""Voxels decoded at a time: 18 classes of them fit a 3 MB cache."""

NMS_METHODS = ("circle", "rotated", "none")


class OutputError(ValueError):
    """Network outputs that cannot be decoded: wrong shape, or not finite."""


@dataclass(frozen=True)
class BoxDecoding:
    """How heat-map peaks become boxes."""

    threshold: float = 0.1
    """Least score of a box."""
    max_boxes: int = 200
    """Most boxes in one result, the best first."""
    nms: str = "circle"
    """Suppression within a class: circle (by centre distance), rotated (by overlap seen from above) or none."""
    max_overlap: float = 0.2
    """Overlap (intersection over union) above which rotated suppression drops the weaker box."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or self.max_boxes < 0 or self.nms not in NMS_METHODS:
            raise ValueError(
                f"want 0 < threshold < 1, max_boxes >= 0 and nms in {NMS_METHODS}; "
                f"got {self.threshold}, {self.max_boxes}, {self.nms!r}"
            )


def decode_boxes(
    heatmap: Floats,
    box: Floats,
    bev: BevGrid,
    decoding: BoxDecoding | None = None,
    cameras: tuple[str, ...] = (),
    classes: Sequence[str] = DETECTION_CLASSES,
    reach: int = 0,
) -> Boxes3D:
    """Turn centre maps into boxes, best first (Zhou et al. 2019: a peak is its own 3 x 3 neighbourhood's maximum).

    heatmap: (C, Y, X) logits. box: (10, Y, X): offset x, y in cells from the cell's lower corner, z of the
        centre, log l, log w, log h, sin yaw, cos yaw, vx, vy.
    reach: as `DetectionHeadConfig.reach`.
    Raises:
        OutputError: shapes do not fit each other, or the heat map or a box is not finite.
    """
    decoding = decoding or BoxDecoding()
    _check_maps(heatmap, box, bev, classes)
    label, row, column = _peaks(heatmap, decoding)
    logit = heatmap[label, row, column]
    values = _mean_around(heatmap, box, label, row, column, reach)
    boxes = Boxes3D(_to_metres(values, row, column, bev), label.astype(np.int64), _sigmoid(logit), cameras)
    if not np.isfinite(boxes.box).all():
        raise OutputError("the box map holds values that are not finite")
    boxes = boxes[_within_reach(boxes.box, bev)]
    if decoding.nms == "circle":
        return boxes[circle_nms(boxes, np.array([NMS_RADIUS[name] for name in classes]))]
    return boxes[rotated_nms(boxes, decoding.max_overlap)] if decoding.nms == "rotated" else boxes


def move_boxes(boxes: Boxes3D, a2b: NDArray[np.float64]) -> Boxes3D:
    """Move boxes from one upright frame of the vehicle into another; a2b: (4, 4)."""
    if np.array_equal(a2b, np.eye(4)):
        return boxes
    rotation, box = a2b[:3, :3], boxes.box.astype(np.float64)
    box[:, :3] = box[:, :3] @ rotation.T + a2b[:3, 3]
    box[:, 6] = wrap_angle(box[:, 6] + yaw_from_rotation(rotation))
    box[:, 7:9] = box[:, 7:9] @ rotation[:2, :2].T
    return replace(boxes, box=box.astype(np.float32))


def circle_nms(boxes: Boxes3D, radius: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which of (M,) boxes, best first, have no better kept one of their class within radius (C,) metres."""
    x, y = boxes.box[:, 0], boxes.box[:, 1]
    distance = np.hypot(x[:, None] - x, y[:, None] - y)
    return suppress((distance < radius[boxes.label][:, None]) & (boxes.label[:, None] == boxes.label))


def rotated_nms(boxes: Boxes3D, max_overlap: float) -> NDArray[np.bool_]:
    """Return which of (M,) boxes, best first, overlap no better kept one of their class by more (seen from above)."""
    size = len(boxes)
    rivals = np.zeros((size, size), bool)
    reach = np.hypot(boxes.box[:, 3], boxes.box[:, 4]) / 2
    offset = boxes.box[:, None, :2] - boxes.box[None, :, :2]
    near = np.hypot(offset[..., 0], offset[..., 1]) < reach[:, None] + reach[None, :]
    near &= boxes.label[:, None] == boxes.label[None, :]
    for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True):
        rivals[i, j] = rivals[j, i] = bev_overlap(boxes.box[i], boxes.box[j]) > max_overlap
    return suppress(rivals)


def bev_overlap(a: Floats, b: Floats) -> float:
    """Return the intersection over union of two boxes x, y, z, l, w, h, yaw seen from above."""
    quads = box_corners(np.stack([a[:7], b[:7]]))[:, [0, 1, 5, 4], :2]
    origin = quads[0].mean(0)  # float32 corners far from the origin lose the area's last digits
    first, second = np.ascontiguousarray(quads - origin, np.float32)
    area, _ = cv2.intersectConvexConvex(first, second)
    union = a[3] * a[4] + b[3] * b[4] - area
    return float(area / union) if union > 0 else 0.0


def decode_occupancy(
    logits: Floats,
    grid: VoxelGrid,
    cameras: tuple[str, ...] = (),
    observed: NDArray[np.bool_] | None = None,
    min_free: float = 0.0,
    pool: Executor | None = None,
    ground: Sequence[int] = (),
    max_occupied: Floats | None = None,
) -> Occupancy:
    """Turn occupancy logits (K, Z, Y, X), the last class free, into labels with their softmax confidence.

    observed: (X, Y, Z); where it is False the state is unknown and the confidence 0. None: all observed.
    min_free: least probability of free for a voxel to be free; below it the likeliest other class is the label.
    pool: threads that share the work. ground: classes of ground; none where the network knows no classes.
    max_occupied: (Y, X), largest probability of occupied with which a voxel is free; above it, it is unknown.
    Raises:
        OutputError: the volume does not fit the grid, or is not finite.
    """
    free, volume = len(logits) - 1, grid.shape[::-1]
    if logits.shape[1:] != volume:
        raise OutputError(f"occupancy logits {logits.shape} do not fit a grid of {grid.shape} [x, y, z]")
    label, confidence = np.empty(grid.size, np.uint8), np.empty(grid.size, np.float32)
    not_free, on_ground = np.empty((2, grid.size), np.float32)
    flat = logits.reshape(len(logits), -1)

    def decide(start: int) -> None:
        part = slice(start, start + CHUNK)
        with np.errstate(invalid="ignore", over="ignore"):
            on_ground[part] = _decide(flat[:, part], label[part], confidence[part], not_free[part], min_free, ground)

    for _ in (pool.map if pool else map)(decide, range(0, grid.size, CHUNK)):
        pass
    if not np.isfinite(confidence).all():
        raise OutputError("occupancy logits hold values that are not finite")
    not_free, on_ground = not_free.reshape(volume), on_ground.reshape(volume)
    label, confidence = label.reshape(volume), confidence.reshape(volume)
    known = None if max_occupied is None else (not_free <= max_occupied) | (label != free)
    evidence = VoxelEvidence((not_free - on_ground)[None, None], on_ground if len(ground) else None)
    return _occupancy(label, confidence, known, free, grid, cameras, observed, evidence)


def occupied_probability(outputs: Mapping[str, NDArray[Any]]) -> Floats:
    """Return P(occupied) (Z, Y, X) of a graph's outputs for one frame: factors, logits, or geometry."""
    if "occupied" in outputs:
        parts = outputs["occupied"][0].transpose(2, 3, 0, 4, 1)  # (Z, Y / S, S, X / S, S)
        layers, rows, split, columns, _ = parts.shape
        return np.asarray(parts.reshape(layers, rows * split, columns * split), np.float32)
    if "occupancy_logits" not in outputs:
        free, occupied = outputs["reconstruction_logits"][0].astype(np.float32)
        return np.asarray(1 / (1 + np.exp(free - occupied)), np.float32)
    logits = outputs["occupancy_logits"][0].astype(np.float32)
    share = np.exp(logits - logits.max(0))
    return np.asarray(1 - share[-1] / share.sum(0), np.float32)


def decode_geometry(
    logits: Floats,
    grid: VoxelGrid,
    cameras: tuple[str, ...] = (),
    observed: NDArray[np.bool_] | None = None,
    min_free: float = 0.0,
    max_occupied: Floats | None = None,
) -> Occupancy:
    """Turn logits (2, Z, Y, X) of free and occupied into voxels without classes; others as of `decode_occupancy`."""
    volume = grid.shape[::-1]
    if logits.shape != (2, *volume):
        raise OutputError(f"reconstruction logits {logits.shape} do not fit a grid of {grid.shape} [x, y, z]")
    with np.errstate(invalid="ignore", over="ignore"):
        free = 1 / (1 + np.exp(logits[1] - logits[0], dtype=np.float32))
    if not np.isfinite(free).all():
        raise OutputError("reconstruction logits hold values that are not finite")
    is_free = free >= (min_free or 0.5)
    label = np.where(is_free, np.uint8(FREE), np.uint8(OCCUPANCY_CLASSES.index("others")))
    known = None if max_occupied is None else (1 - free <= max_occupied) | ~is_free
    decided = label, np.where(is_free, free, 1 - free), known
    evidence = VoxelEvidence((1 - free)[None, None])
    return replace(_occupancy(*decided, FREE, grid, cameras, observed, evidence), has_classes=False)


def make_unobserved(grid: VoxelGrid, cameras: tuple[str, ...] = ()) -> Occupancy:
    """Return occupancy in which every voxel is unobserved, for networks without an occupancy head."""
    label, confidence = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.float32)
    state = np.full(grid.shape, UNOBSERVED_STATE, np.uint8)
    return Occupancy(label, confidence, state, grid, cameras)


def voxels_in_view(rig: CameraRig, grid: VoxelGrid) -> NDArray[np.bool_]:
    """Return (N, X, Y, Z): which voxel centres each camera of the rig has in its image.

    A view of network order, the order of logits, so that masking them runs along memory.
    """
    axes = [lo + (np.arange(n) + 0.5) * pitch for lo, pitch, n in zip(grid.lo, grid.pitch, grid.shape, strict=True)]
    x, y, z = (axis.astype(np.float32) for axis in axes)
    inside = np.empty((len(rig), *grid.shape[::-1]), bool)
    for index, camera in enumerate(rig.cameras):
        if not camera.lens.is_pinhole:
            inside[index] = volume_from_xyz(camera.project(grid.centres().reshape(-1, 3))[2].reshape(grid.shape))
            continue
        # A projection is affine before its division, so a grid needs three outer sums and no list of points.
        ego2img = (camera.intrinsic @ camera.ego2cam[:3]).astype(np.float32)
        u, v, depth = (row[0] * x + (row[1] * y)[:, None] + (row[2] * z + row[3])[:, None, None] for row in ego2img)
        in_columns = (u >= 0) & (u < camera.width * depth)
        inside[index] = in_columns & (v >= 0) & (v < camera.height * depth) & (depth > NEAR)
    return xyz_from_volume(inside)


def _check_maps(heatmap: Floats, box: Floats, bev: BevGrid, classes: Sequence[str]) -> None:
    plane = bev.shape[::-1]
    if heatmap.shape != (len(classes), *plane) or box.shape != (10, *plane):
        raise OutputError(
            f"heat map {heatmap.shape} and box map {box.shape}; want {(len(classes), *plane)} and {(10, *plane)}"
        )
    if not np.isfinite(heatmap).all():
        raise OutputError("the heat map holds values that are not finite")


def _peaks(heatmap: Floats, decoding: BoxDecoding) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return class, row and column of the best local maxima over the threshold, best first."""
    logit = math.log(decoding.threshold / (1 - decoding.threshold))
    place = np.flatnonzero(heatmap >= np.float32(logit))
    score, is_peak = heatmap.reshape(-1).take(place), np.ones(len(place), bool)
    label, row, column = np.unravel_index(place, heatmap.shape)
    around = np.full((len(heatmap), heatmap.shape[1] + 2, heatmap.shape[2] + 2), -np.inf, np.float32)
    around[:, 1:-1, 1:-1] = heatmap
    corner, flat = np.ravel_multi_index((label, row, column), around.shape), around.reshape(-1)
    for down, right in np.ndindex(3, 3):
        is_peak &= score >= flat.take(corner + (down * around.shape[2] + right))
    label, row, column, score = label[is_peak], row[is_peak], column[is_peak], score[is_peak]
    order = np.lexsort((label, column, row, -score))[: decoding.max_boxes]
    return label[order], row[order], column[order]


def _mean_around(
    heatmap: Floats,
    box: Floats,
    label: NDArray[np.intp],
    row: NDArray[np.intp],
    column: NDArray[np.intp],
    reach: int,
) -> NDArray[np.float64]:
    """Return the boxes (M, 10) at peaks: the mean of what the cells within reach say, by their squared probability."""
    steps = np.arange(-reach, reach + 1)
    down, right = (step.ravel() for step in np.meshgrid(steps, steps, indexing="ij"))
    rows, columns = row[:, None] + down, column[:, None] + right  # (M, cells)
    inside = (rows >= 0) & (rows < heatmap.shape[1]) & (columns >= 0) & (columns < heatmap.shape[2])
    rows, columns = rows.clip(0, heatmap.shape[1] - 1), columns.clip(0, heatmap.shape[2] - 1)
    weight = np.where(inside, _sigmoid(heatmap[label[:, None], rows, columns]) ** 2, 0.0)
    values = box[:, rows, columns].astype(np.float64)
    values[0] += right
    values[1] += down
    mean: NDArray[np.float64] = ((values * weight).sum(2) / weight.sum(1)).T
    return mean


def _to_metres(values: NDArray[np.float64], row: NDArray[np.intp], column: NDArray[np.intp], bev: BevGrid) -> Floats:
    centre = bev.metres(np.stack([column, row], -1) + values[:, :2])
    size = np.exp(np.minimum(values[:, 3:6], math.log(LARGEST_SIZE)))
    yaw = np.arctan2(values[:, 6], values[:, 7])[:, None]
    return np.concatenate([centre, values[:, 2:3], size, yaw, values[:, 8:10]], 1).astype(np.float32)


def _within_reach(box: Floats, bev: BevGrid) -> NDArray[np.bool_]:
    """Return which of (M, 9) boxes have their centre within the BEV (or one cell beside it) and within MAX_HEIGHT."""
    lo, hi, pitch = (np.asarray(corner) for corner in (bev.lo, bev.hi, bev.pitch))
    on_plane = ((box[:, :2] >= lo - pitch) & (box[:, :2] <= hi + pitch)).all(1)
    return on_plane & (np.abs(box[:, 2]) <= MAX_HEIGHT)


def _sigmoid(logit: Floats) -> Floats:
    return (1 / (1 + np.exp(-logit.astype(np.float64)))).astype(np.float32)


def suppress(rivals: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which of (M,) items remain: in order, each that remains drops its later rivals (M, M)."""
    keep = np.ones(len(rivals), bool)
    for better, worse in zip(*(index.tolist() for index in np.nonzero(np.triu(rivals, 1))), strict=True):
        if keep[better]:
            keep[worse] = False
    return keep


def _occupancy(
    label: NDArray[np.uint8],
    confidence: Floats,
    known: NDArray[np.bool_] | None,
    free: int,
    grid: VoxelGrid,
    cameras: tuple[str, ...],
    observed: NDArray[np.bool_] | None,
    evidence: VoxelEvidence,
) -> Occupancy:
    """Make the result of decided voxels (Z, Y, X); those that are not `known` are unknown."""
    state = np.subtract(OCCUPIED_STATE, label == free, dtype=np.uint8)  # free is one below
    if observed is not None:
        known = volume_from_xyz(observed) if known is None else known & volume_from_xyz(observed)
    if known is not None:
        state *= known
        confidence = confidence * known
    label, confidence, state = (xyz_from_volume(volume) for volume in (label, confidence, state))
    return Occupancy(label, confidence, state, grid, cameras, evidence=evidence)


def _decide(
    logits: Floats,
    label: NDArray[np.uint8],
    confidence: Floats,
    not_free: Floats,
    min_free: float,
    ground: Sequence[int],
) -> Floats:
    """Write labels of (K, M) logits, the last class free, their softmax, and 1 - P(free); return P(ground).

    The planes stay in cache between passes. Most voxels are free, so that the likeliest other class is looked for
    where one is not.
    """
    free = logits[-1]
    best = np.maximum.reduce(logits[:-1], axis=0, dtype=np.float32)
    top, total, term = np.maximum(best, free), np.zeros_like(best), np.empty_like(best)
    on_ground = np.zeros_like(best)
    for number, plane in enumerate(logits):
        np.subtract(plane, top, out=term)
        total += np.exp(term, out=term)
        if number in ground:
            on_ground += term
    np.divide(np.exp(np.subtract(free, top, out=term), out=term), total, out=confidence)
    np.subtract(np.float32(1), confidence, out=not_free)
    label[:] = len(logits) - 1
    occupied = np.flatnonzero(~((free > best) & (confidence >= min_free)))
    label[occupied] = logits[:-1, occupied].argmax(0)
    confidence[occupied] = np.exp(best[occupied] - top[occupied]) / total[occupied]
    return on_ground / total
