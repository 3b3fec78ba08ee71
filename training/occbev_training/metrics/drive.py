"""Score what was published during a drive against its truth, key frame by key frame; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, UNOBSERVED_STATE
from occbev.geometry import rotation_from_yaw, transform_points, wrap_angle, yaw_from_rotation
from occbev.results import Boxes3D, Occupancy
from occbev_training.metrics.detection import evaluate_detection
from occbev_training.metrics.occupancy import (
    binary_counts,
    binary_iou,
    confusion,
    mean_iou,
)
from occbev_training.sources.recording import Annotations, OccupancyTruth
from occbev_training.sources.truth import Truth

REACHES = {"AP_30m": 30.0, "AP_50m": 50.0}
"""Scores of well-measured truths -> metres within which they are taken."""

MEASURED_POINTS = 5
"""LiDAR returns that a well-measured truth has."""


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
    """Join complete results with the key frames nearest to them; those near no key frame are left out."""
    joined: dict[int, KeyResult] = {}
    for result in results:
        key = truth.nearest_key(result.stamp_ns)
        if key is not None and result.boxes is not None and result.occupancy is not None:
            motion = truth.trajectory.relative(result.stamp_ns, int(truth.key_stamp_ns[key]))
            boxes = move_boxes(result.boxes, motion)
            joined[key] = KeyResult(key, boxes, move_occupancy(result.occupancy, motion))
    return [joined[key] for key in sorted(joined)]


def move_boxes(boxes: Boxes3D, a2b: NDArray[np.float64]) -> Boxes3D:
    """Carry boxes from one ego frame into another; (4, 4) `a2b` is nearly level."""
    yaw = yaw_from_rotation(a2b[:3, :3])
    box = boxes.box.astype(np.float64)
    box[:, :3] = transform_points(a2b, box[:, :3])
    box[:, 6] = wrap_angle(box[:, 6] + yaw)
    box[:, 7:9] = box[:, 7:9] @ rotation_from_yaw(yaw)[:2, :2].T
    return replace(boxes, box=box.astype(np.float32))


def move_occupancy(occupancy: Occupancy, a2b: NDArray[np.float64]) -> Occupancy:
    """Carry a volume from one ego frame into another: each voxel takes what its centre lay in."""
    grid = occupancy.grid
    centres = grid.centres().reshape(-1, 3)
    back = np.linalg.inv(a2b)
    source, inside = grid.indices(transform_points(back, centres))
    at = tuple(source.T)

    def moved(values: NDArray[Any], outside: int) -> NDArray[Any]:
        return np.where(inside, values[at], values.dtype.type(outside)).reshape(grid.shape)

    return replace(
        occupancy,
        label=moved(occupancy.label, FREE),
        confidence=moved(occupancy.confidence, 0),
        state=moved(occupancy.state, UNOBSERVED_STATE),
    )


def score_detection(results: Iterable[KeyResult], truth: Truth) -> dict[str, Any]:
    """Score boxes by the nuScenes rules: {mAP, NDS, AP, AP_30m, AP_50m, ...}.

    AP_30m and AP_50m: truths within 30 or 50 m that have at least 5 LiDAR returns; a prediction that
    matches a truth left out by this counts neither way.
    """
    pairs = [(result.boxes, _annotations(truth, result.key)) for result in results]
    boxes, truths = [boxes for boxes, _ in pairs], [annotations for _, annotations in pairs]
    return detection_scores(boxes, truths)


def detection_scores(boxes: list[Boxes3D], truths: list[Annotations]) -> dict[str, Any]:
    """Score boxes of some key frames against their annotations; see `score_detection`."""
    full = evaluate_detection(boxes, truths).as_record()
    kept = ("mAP", "NDS", "AP", "tp_errors", "truths", "predictions", "classes_without_truth")
    measured = {name: measured_ap(boxes, truths, reach) for name, reach in REACHES.items()}
    return {**{name: full[name] for name in kept}, **measured}


def measured_ap(
    boxes: list[Boxes3D], truths: list[Annotations], reach: float
) -> dict[str, dict[str, float]]:
    """Return class -> threshold -> AP of well-measured truths within `reach` metres."""
    scores = evaluate_detection(
        boxes, truths, max_range=reach, min_points=MEASURED_POINTS, ignore_excluded=True
    )
    ap: dict[str, dict[str, float]] = scores.as_record()["AP"]
    return ap


def score_occupancy(results: Iterable[KeyResult], truth: Truth) -> dict[str, float]:
    """Score voxels over what the cameras could see: {iou, mIoU}; what was not published is free."""
    binary, classes = np.zeros(3, np.int64), None
    for result in results:
        wanted = occupancy_truth(truth, result.key)
        label, mask = result.occupancy.label, wanted.mask_camera
        binary += binary_counts(wanted.semantics != FREE, label != FREE, mask)
        counts = confusion(wanted.semantics, label, mask)
        classes = counts if classes is None else classes + counts
    if classes is None:
        return {"iou": float("nan"), "mIoU": float("nan")}
    return {"iou": binary_iou(binary), "mIoU": mean_iou(classes)}


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
