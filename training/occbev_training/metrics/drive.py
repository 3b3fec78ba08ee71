"""Score what was published during a drive against its truth, key frame by key frame; needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, UNOBSERVED_STATE
from occbev.geometry import invert_transform, transform_points
from occbev.inference.postprocess import move_boxes
from occbev.results import Boxes3D, Occupancy
from occbev_training.metrics.detection import evaluate_detection, match_near
from occbev_training.metrics.occupancy import (
    binary_counts,
    binary_iou,
    confusion,
    mean_iou,
    require_grid,
)
from occbev_training.sources.recording import Annotations, OccupancyTruth
from occbev_training.sources.truth import Truth


class Result(Protocol):
    """What was published at one stamp, in base_link at that stamp; None where an output is missing."""

    @property
    def stamp_ns(self) -> int: ...
    @property
    def boxes(self) -> Boxes3D | None: ...
    @property
    def occupancy(self) -> Occupancy | None: ...


@dataclass(frozen=True)
class KeyResult:
    """One complete result, carried into base_link at the key stamp that it is scored at."""

    key: int
    boxes: Boxes3D
    occupancy: Occupancy


def results_at_keys(results: Iterable[Result], truth: Truth) -> list[KeyResult]:
    """Join each key frame with the complete result nearest to it; key frames without one near are left out."""
    joined: dict[int, KeyResult] = {}
    for result in sorted(results, key=lambda result: _away(result, truth), reverse=True):  # the nearest comes last
        key = truth.nearest_key(result.stamp_ns)
        if key is not None and result.boxes is not None and result.occupancy is not None:
            motion = truth.trajectory.relative(result.stamp_ns, int(truth.key_stamp_ns[key]))
            boxes = move_boxes(result.boxes, motion)
            joined[key] = KeyResult(key, boxes, move_occupancy(result.occupancy, motion))
    return [joined[key] for key in sorted(joined)]


def _away(result: Result, truth: Truth) -> int:
    return int(np.abs(truth.key_stamp_ns - result.stamp_ns).min())


def move_occupancy(occupancy: Occupancy, a2b: NDArray[np.float64]) -> Occupancy:
    """Carry a volume from one ego frame into another: each voxel takes what its centre lay in."""
    grid = occupancy.grid
    corners = np.array(list(itertools.product(*zip(grid.lo, grid.hi, strict=True))))
    shift = transform_points(a2b, corners) - corners
    if np.all(np.abs(shift) < np.array(grid.pitch) / 2):
        return occupancy  # motion is affine: no centre leaves its voxel if no corner moves half of one
    centres = grid.centres().reshape(-1, 3)
    source, inside = grid.indices(transform_points(invert_transform(a2b), centres))
    at = tuple(source.T)

    def move(values: NDArray[Any], outside: int) -> NDArray[Any]:
        return np.where(inside, values[at], values.dtype.type(outside)).reshape(grid.shape)

    return replace(
        occupancy,
        label=move(occupancy.label, FREE),
        confidence=move(occupancy.confidence, 0),
        state=move(occupancy.state, UNOBSERVED_STATE),
    )


def score_detection(results: Sequence[KeyResult], truth: Truth, prior: Boxes3D | None = None) -> dict[str, Any]:
    """Score boxes by the nuScenes rules: {mAP, mAP_present, NDS, AP, ..., AP_30m, AP_30m_prior}.

    mAP counts a class without ground truth as 0, mAP_present leaves it out.

    prior: boxes that the training set alone would answer for every frame; None leaves its score out.
    AP_30m: truths within 30 m that have at least 5 LiDAR returns; a prediction that matches a truth
    left out by this counts neither way.
    """
    truths = [_annotations(truth, result.key) for result in results]
    boxes = [result.boxes for result in results]
    outcome = evaluate_detection(boxes, truths)
    full = outcome.as_record()
    kept = ("mAP", "NDS", "AP", "tp_errors", "truths", "predictions", "classes_without_truth")
    scores = {**{name: full[name] for name in kept}, "mAP_present": outcome.mean_ap_of_present}
    scores["AP_30m"] = near_ap(boxes, truths)
    if prior is not None:
        scores["AP_30m_prior"] = near_ap([prior] * len(truths), truths)
    return scores


def near_ap(boxes: Sequence[Boxes3D], truths: Sequence[Annotations]) -> dict[str, dict[str, float]]:
    """Return class -> threshold -> AP of near and well-measured truths."""
    ap: dict[str, dict[str, float]] = match_near(boxes, truths).scores().as_record()["AP"]
    return ap


def score_occupancy(
    results: Sequence[KeyResult], truth: Truth, prior: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """Score voxels over what the cameras could see: {iou, iou_mean_of_training_set, mIoU}.

    prior: (X, Y, Z) voxels that the training set alone would call occupied in every frame; None
    leaves its score out. What was not published is free.
    Raises:
        GridError: something was published on another grid than that of the truth.
    """
    published, mean, classes = np.zeros(3, np.int64), np.zeros(3, np.int64), []
    for result in results:
        wanted = occupancy_truth(truth, result.key)
        require_grid(wanted.grid, result.occupancy.grid)
        occupied, mask = wanted.semantics != FREE, wanted.mask_camera
        published += binary_counts(occupied, result.occupancy.label != FREE, mask)
        if prior is not None:
            mean += binary_counts(occupied, prior, mask)
        classes.append(confusion(wanted.semantics, result.occupancy.label, mask))
    scores = {"iou": binary_iou(published)}
    if prior is not None:
        scores["iou_mean_of_training_set"] = binary_iou(mean)
    return {**scores, "mIoU": mean_iou(np.sum(classes, 0)) if classes else float("nan")}


def occupancy_truth(truth: Truth, key: int) -> OccupancyTruth:
    """Return the dense labels of one key frame; raises LookupError where there are none."""
    labels = truth.occupancy_truth(key)
    if labels is None:
        raise LookupError(f"{truth.folder}: key frame {key} has no dense labels to score against")
    return labels


def _annotations(truth: Truth, key: int) -> Annotations:
    annotations = truth.annotations(key)
    if annotations is None:
        raise LookupError(f"{truth.folder}: key frame {key} has no boxes to score against")
    return annotations
