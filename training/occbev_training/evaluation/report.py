"""Files that an evaluation writes: metrics.json, plots of the curves, and the worst frames as pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.grid import VoxelGrid
from occbev.inference.preprocess import decode_image
from occbev.reports import rendering
from occbev.results import Boxes3D, Occupancy
from occbev.rig import Camera, CameraRig
from occbev_training.evaluation.data import EvaluationData, EvaluationFrame
from occbev_training.evaluation.run_package import WorstFrame
from occbev_training.metrics.detection import TP_ERRORS

Record = Mapping[str, Any]

ERROR_UNITS = {
    "trans_err": "centre, m",
    "scale_err": "size, 1 - IoU",
    "orient_err": "heading, rad",
    "vel_err": "velocity, m/s",
    "attr_err": "attribute, 1 - accuracy",
}
"""True-positive error -> what it is and its unit."""

LEAST_WIDTH = 500
"""Pixels that an image is drawn on at least."""

SHOWN = 0.3
"""Least score of a box that is drawn."""


def write_json(path: Path, record: Record) -> None:
    """Write plain values; what is not a number is null, since JSON knows no NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(record), indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """Turn arrays, numpy numbers and NaN into what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_plots(record: Record, folder: Path) -> list[Path]:
    """Draw what a record of `Scores.as_record` holds: precision and recall, errors, scores by range."""
    made = []
    if "detection" in record:
        made.append(_precision_recall(record["detection"], folder / "precision_recall.png"))
        made.append(_tp_errors(record["detection"], folder / "tp_errors.png"))
    if "occupancy" in record or "detection_by_range" in record:
        made.append(_by_range(record, folder / "by_range.png"))
    return made


def draw_worst(worst: Sequence[WorstFrame], evaluation_data: EvaluationData, folder: Path) -> list[dict[str, Any]]:
    """Draw frames with what was predicted beside the truth; returns a line about each."""
    lines = []
    for rank, found in enumerate(sorted(worst, reverse=True)):
        frame = evaluation_data.frame(found.index)
        path = folder / f"worst_{found.by}_{rank + 1}.jpg"
        rendering.write_picture(str(path), frame_picture(frame, found.boxes, found.label))
        lines.append({"frame": frame.name, "by": found.by, "quality": -found.badness, "picture": path.name})
    return lines


def frame_picture(frame: EvaluationFrame, boxes: Boxes3D | None, label: NDArray[np.uint8] | None) -> rendering.Picture:
    """Draw one frame: images with boxes, predicted in colour and true dashed; below, both from above."""
    rows = [rendering.camera_mosaic(_images_with_boxes(frame, boxes))]
    above = {}
    if boxes is not None:
        truth = None if frame.annotations is None else frame.annotations.boxes
        shown = boxes[boxes.score >= SHOWN]
        title = f"boxes over {SHOWN:g}; truth dashed"
        above[title] = rendering.bev_picture(shown, truth, size=520)
    if frame.truth is not None and label is not None:
        truth_mask = frame.truth.mask_camera
        said = _occupancy(label, frame.truth.grid, truth_mask)
        true = _occupancy(frame.truth.semantics, frame.truth.grid, truth_mask)
        above["voxels said"] = rendering.occupancy_from_above(said, 520)
        above["voxels true, where a camera looked"] = rendering.occupancy_from_above(true, 520)
    if above:
        rows.append(rendering.beside(above))
    return rendering.stack_pictures(rows)


def _images_with_boxes(frame: EvaluationFrame, boxes: Boxes3D | None) -> dict[str, rendering.Picture]:
    pictures = {}
    for camera in _rig_at_key(frame).cameras:
        taken = frame.frame_set.frames.get(camera.name)
        if taken is None:
            continue
        image = taken.image
        if isinstance(image, bytes):
            image = decode_image(image, camera.name)
        image, camera = _enlarge(image, camera)
        if boxes is not None:
            image = rendering.draw_boxes(image, camera, boxes[boxes.score >= SHOWN])
        if frame.annotations is not None:
            image = rendering.draw_boxes(image, camera, frame.annotations.boxes, rendering.GROUND_TRUTH)
        pictures[camera.name] = image
    return pictures


def _enlarge(image: NDArray[np.uint8], camera: Camera) -> tuple[NDArray[np.uint8], Camera]:
    """Scale a small image up before it is drawn on, so that lines stay thin."""
    times = -(-LEAST_WIDTH // image.shape[1])
    if times == 1:
        return image, camera
    size = (image.shape[1] * times, image.shape[0] * times)
    scale = np.diag([size[0] / camera.width, size[1] / camera.height, 1.0])
    larger = replace(camera, width=size[0], height=size[1], intrinsic=scale @ camera.intrinsic)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_NEAREST), np.uint8), larger


def _rig_at_key(frame: EvaluationFrame) -> CameraRig:
    if frame.motion is None:
        return frame.rig
    return frame.rig.move_cameras(frame.motion.get(name, np.eye(4)) for name in frame.rig.names)


def _occupancy(label: NDArray[np.uint8], grid: VoxelGrid, mask: NDArray[np.bool_]) -> Occupancy:
    state = np.where(label == FREE, np.uint8(FREE_STATE), np.uint8(OCCUPIED_STATE))
    state = np.where(mask, state, np.uint8(UNOBSERVED_STATE))
    return Occupancy(label, np.ones(label.shape, np.float32), state, grid)


def _precision_recall(detection: Record, path: Path) -> Path:
    figure = _figure(13, 6)
    recalls = np.linspace(0, 1, 101)
    for number, (name, curves) in enumerate(detection["precision"].items()):
        axes = figure.add_subplot(2, 5, number + 1)
        for threshold, curve in curves.items():
            axes.plot(recalls, curve, linewidth=1.4, label=f"{threshold} m")
        truths = detection["truths"][name]
        axes.set_title(f"{name.replace('_', ' ')}, {truths} true", fontsize=9)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if number == 0:
            axes.legend(fontsize=7, title="within", title_fontsize=7)
        if number >= 5:
            axes.set_xlabel("recall", fontsize=8)
        if number % 5 == 0:
            axes.set_ylabel("precision", fontsize=8)
    return _save(figure, path)


def _tp_errors(detection: Record, path: Path) -> Path:
    figure = _figure(13, 3.4)
    names = list(detection["class_tp_errors"])
    for number, error in enumerate(TP_ERRORS):
        axes = figure.add_subplot(1, len(TP_ERRORS), number + 1)
        values = [detection["class_tp_errors"][name][error] for name in names]
        axes.barh(range(len(names)), [0 if v is None else v for v in values], color="#4878a8")
        mean = detection["tp_errors"][error]
        axes.axvline(mean, color="#c44e52", linewidth=1.2)
        axes.set_title(f"{ERROR_UNITS[error]}\nmean {mean:.2f}", fontsize=9)
        axes.set_yticks(range(len(names)), [n.replace("_", " ") for n in names] if number == 0 else [""] * len(names))
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
    return _save(figure, path)


def _by_range(record: Record, path: Path) -> Path:
    figure = _figure(9, 3.4)
    bars: list[tuple[str, dict[str, float]]] = []
    if "detection_by_range" in record:
        rings = record["detection_by_range"]
        bars.append(("AP of cars within 2 m", {n: r["AP"]["car"]["2.0"] for n, r in rings.items()}))
    if "occupancy" in record:
        occupancy = record["occupancy"]
        bars.append(("occupied IoU", {n: r["iou"] for n, r in occupancy["iou_by_range"].items()}))
        bars.append(("by who saw the voxel", {n: r["iou"] for n, r in occupancy["iou_by_visibility"].items()}))
    for number, (title, values) in enumerate(bars):
        axes = figure.add_subplot(1, len(bars), number + 1)
        axes.bar(range(len(values)), list(values.values()), color="#4878a8")
        axes.set_xticks(range(len(values)), list(values), rotation=30, ha="right", fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.set_ylim(0, 1)
        axes.grid(axis="y", alpha=0.25)
        axes.tick_params(axis="y", labelsize=7)
    return _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
