"""From the maps of published CenterPoint heads, whose classes are split into tasks, to boxes in the frame of the BEV.

Their rules are kept: every cell competes, suppression is among all classes of a task, by the overlap of enlarged boxes
or by centre distance, and what lies out of reach is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from occbev.config import ConfigError
from occbev.grid import BevGrid
from occbev.inference.postprocess import LARGEST_SIZE, OutputError, rotated_nms, suppress
from occbev.results import Boxes3D

Floats = NDArray[np.float32]
T = TypeVar("T")

BOX_CHANNELS = 10
"""x, y offset in cells from the cell's lower corner, z, log l, w, h, sin yaw, cos yaw, vx, vy."""

SCALE_FACTORS = (1.0, 0.7, 0.7, 0.4, 0.55, 1.1, 1.0, 1.0, 1.5, 3.5)
"""Factor on a box's size before suppression by overlap, in class order: small things are made larger."""

CIRCLE_RADII = (4.0, 12.0, 10.0, 1.0, 0.85, 0.175)
"""Per task of six; a squared distance up to this suppresses."""


@dataclass(frozen=True)
class TaskDecoding:
    """How each task's maps become boxes; the defaults are those of BEVDet, whose classes are one task."""

    nms: tuple[str, ...] = ("scale",)
    """Suppression of each task: scale (overlap of enlarged boxes) or circle (centre distance); one counts for all."""
    score: float = 0.1
    """Least score of a box, as published; a higher threshold of the user counts."""
    overlap: tuple[float, ...] = (0.2,)
    """Overlap of each task's boxes above which the weaker one goes; one counts for all."""
    factors: tuple[float, ...] = SCALE_FACTORS
    """Factor on the size of each class's boxes before their overlap is taken."""
    radii: tuple[float, ...] = CIRCLE_RADII
    """Of each task: the squared distance of centres in square metres up to which the weaker one goes."""
    reach: tuple[float, float, float] = (61.2, 61.2, 10.0)
    """Largest |x|, |y| and |z| of a centre in the frame of the BEV, metres."""
    candidates: int = 500
    """Cells of each task that are looked at, the best first."""
    boxes: int = 500
    """Most boxes of each task."""

    def __post_init__(self) -> None:
        if not self.nms or set(self.nms) - {"scale", "circle"}:
            raise ConfigError(f"decoding.nms {self.nms!r}: each must be scale or circle")

    def check(self, tasks: int, classes: int) -> None:
        """Raise ConfigError if it does not fit the number of tasks and classes."""
        for name in ("nms", "overlap"):
            if len(getattr(self, name)) not in (1, tasks):
                raise ConfigError(f"decoding.{name} {getattr(self, name)}: must hold 1 or {tasks} values, one per task")
        if "scale" in self.nms and len(self.factors) != classes:
            raise ConfigError(f"decoding.factors {self.factors}: must hold {classes} values, one per class")
        if "circle" in self.nms and len(self.radii) != tasks:
            raise ConfigError(f"decoding.radii {self.radii}: must hold {tasks} values, one per task")


def decode_tasks(
    heatmap: Floats,
    box: Floats,
    tasks: Sequence[int],
    bev: BevGrid,
    decoding: TaskDecoding,
    threshold: float = 0.0,
    cameras: tuple[str, ...] = (),
) -> Boxes3D:
    """Turn the maps of one frame into boxes in the frame of the BEV, best first; z is the centre's.

    heatmap: (K, Y, X) logits. box: (tasks * 10, Y, X). tasks: number of classes of each task, in class order.
    threshold: least score, where it is above the published one.
    Raises:
        OutputError: the maps do not fit the tasks and the grid, or the heat map or a box is not finite.
    """
    _check(heatmap, box, tasks, bev)
    found, first = [], 0
    for index, classes in enumerate(tasks):
        scores, values = heatmap[first : first + classes], box[index * BOX_CHANNELS : (index + 1) * BOX_CHANNELS]
        candidates = _candidates(scores, values, bev, decoding, max(decoding.score, threshold))
        candidates = Boxes3D(candidates.box, candidates.label + first, candidates.score)
        found.append(candidates[_suppress(candidates, index, decoding)][: decoding.boxes])
        first += classes
    box9, label, score = (np.concatenate([getattr(part, n) for part in found]) for n in ("box", "label", "score"))
    return Boxes3D(box9, label, score, cameras)[np.argsort(-score, kind="stable")]


def squared_circle_nms(boxes: Boxes3D, radius: float) -> NDArray[np.bool_]:
    """Return which of (M,) boxes, best first, have no better kept one with squared distance <= radius.

    As published, which compares squared metres with a number that was meant in metres.
    """
    offset = boxes.box[:, None, :2] - boxes.box[None, :, :2]
    return suppress((offset**2).sum(-1) <= radius)


def _check(heatmap: Floats, box: Floats, tasks: Sequence[int], bev: BevGrid) -> None:
    plane = bev.shape[::-1]
    want = (sum(tasks), *plane), (len(tasks) * BOX_CHANNELS, *plane)
    if (heatmap.shape, box.shape) != want:
        raise OutputError(
            f"heat map {heatmap.shape} and box map {box.shape} of {len(tasks)} tasks; want {want[0]} and {want[1]}"
            " (a package of an earlier version must be exported again)"
        )
    if not np.isfinite(heatmap).all():
        raise OutputError("the heat map holds values that are not finite")


def _candidates(logits: Floats, box: Floats, bev: BevGrid, decoding: TaskDecoding, score: float) -> Boxes3D:
    """Return the best cells of (K, Y, X), best first, with their boxes (10, Y, X); neighbours are not compared."""
    flat = logits.reshape(-1)
    best = _largest(flat, decoding.candidates)
    probability = 1 / (1 + np.exp(-flat[best].astype(np.float64)))
    best, probability = best[probability > score], probability[probability > score]
    label, cell = np.divmod(best, bev.size)
    row, column = np.divmod(cell, bev.shape[0])
    values = box.reshape(BOX_CHANNELS, -1)[:, cell].T.astype(np.float64)  # (M, 10)
    centre = bev.metres(np.stack([column, row], -1) + values[:, :2])
    size = np.exp(np.minimum(values[:, 3:6], np.log(LARGEST_SIZE)))
    yaw = np.arctan2(values[:, 6], values[:, 7])[:, None]
    boxes = np.concatenate([centre, values[:, 2:3], size, yaw, values[:, 8:10]], 1)
    if not np.isfinite(boxes).all():
        raise OutputError("the box map holds values that are not finite")
    near = (np.abs(boxes[:, :3]) <= decoding.reach).all(1)
    return Boxes3D(boxes[near].astype(np.float32), label[near], probability[near].astype(np.float32))


def _largest(values: Floats, count: int) -> NDArray[np.intp]:
    """Return where the largest values are, largest first; of equal ones the first first."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        chosen = np.flatnonzero(values >= least)
    else:
        chosen = np.arange(len(values))
    return chosen[np.argsort(-values[chosen], kind="stable")][:count]


def _suppress(boxes: Boxes3D, task: int, decoding: TaskDecoding) -> NDArray[np.bool_]:
    if _of(decoding.nms, task) == "circle":
        return squared_circle_nms(boxes, decoding.radii[task])
    enlarged = boxes.box.copy()
    enlarged[:, 3:6] *= np.array(decoding.factors, np.float32)[boxes.label, None]
    rivals = Boxes3D(enlarged, np.zeros_like(boxes.label), boxes.score)  # all classes of a task compete
    return rotated_nms(rivals, _of(decoding.overlap, task))


def _of(values: tuple[T, ...], task: int) -> T:
    return values[0] if len(values) == 1 else values[task]
