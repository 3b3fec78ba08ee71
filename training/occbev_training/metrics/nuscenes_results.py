"""The nuScenes detection result format, read, written and scored against the tables of a data root."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.geometry import (
    Array,
    make_transform,
    rotation_from_wxyz,
    rotation_from_yaw,
    transform_points,
    wxyz_from_rotation,
)
from occbev.results import Boxes3D
from occbev_training.metrics.detection import (
    CLASS_RANGE,
    BoxTable,
    DetectionOutcome,
    DetectionScores,
    check_box_counts,
    match_boxes,
)
from occbev_training.sources.categories import describe_classless
from occbev_training.sources.nuscenes import NuscenesRoot, Row
from occbev_training.sources.nuscenes_writer import ATTRIBUTES, usual_attribute

META = {
    "use_camera": True,
    "use_lidar": False,
    "use_radar": False,
    "use_map": False,
    "use_external": False,
}
BIKE_RACK = "static_object.bicycle_rack"

Results = Mapping[str, Sequence[Row]]
"""Sample token -> result boxes in global coordinates."""


class ResultsError(ValueError):
    """A result file that cannot be scored, saying which sample or field."""


def read_results(path: Path) -> Results:
    """Read a nuScenes detection result file; raises ResultsError naming the file, the sample and the field."""
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_repeats)
        meta, results = content["meta"], content["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: no nuScenes result file: {type(error).__name__}: {error}") from error
    if not isinstance(meta, dict) or not isinstance(results, dict):
        kinds = f"'meta' is a {type(meta).__name__}, 'results' a {type(results).__name__}"
        raise ResultsError(f"{path}: {kinds}; want two objects, of results sample token -> boxes")
    try:
        check_results(results)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from error
    return results


def _no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, which must not hold a key twice: one of them would be lost."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return made


def check_results(results: Mapping[str, Any]) -> None:
    """Hold every box to what the official kit asserts, and to finite values, which it asks for.

    Raises:
        ResultsError: naming the sample, the number of the box, the field, its value and what would be right.
    """
    for sample, rows in results.items():
        if not isinstance(rows, list):
            raise ResultsError(f"sample {sample}: holds {_shorten(rows)}; want a list of boxes, empty where none is")
        for number, row in enumerate(rows):
            fault = _find_fault(sample, row)
            if fault is not None:
                raise ResultsError(f"sample {sample}, box {number}: {fault}")


def _find_fault(sample: str, row: Any) -> str | None:
    """Return what is wrong with one result box, in words, or None."""
    if not isinstance(row, dict):
        return f"is {_shorten(row)}; want an object"
    for name, (is_right, wanted) in _FIELDS.items():
        if name not in row:
            return f"has no {name}; want {wanted}"
        if not is_right(row[name]):
            return f"{name} is {_shorten(row[name])}; want {wanted}"
    return (
        None if row["sample_token"] == sample else f"sample_token is {_shorten(row['sample_token'])}; want its sample's"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_vector(length: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == length and all(map(_is_number, value))


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "sample_token": (lambda value: isinstance(value, str), "a text"),
    "translation": (_is_vector(3), "three finite numbers"),
    "size": (lambda value: _is_vector(3)(value) and min(value) > 0, "three finite numbers above 0"),
    "rotation": (lambda value: _is_vector(4)(value) and any(value), "four finite numbers, not all 0"),
    "velocity": (_is_vector(2), "two finite numbers, 0 where it is not known"),
    "detection_name": (lambda value: value in DETECTION_CLASSES, f"one of {', '.join(DETECTION_CLASSES)}"),
    "detection_score": (lambda value: isinstance(value, float) and math.isfinite(value), "a finite float such as 0.5"),
    "attribute_name": (lambda value: value == "" or value in ATTRIBUTES, f'"" or one of {", ".join(ATTRIBUTES)}'),
}
"""Field of a result box -> whether a value is right, and what is."""


def _shorten(value: Any) -> str:
    """Return a value as JSON, cut."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_results(path: Path, results: Results, meta: Mapping[str, bool] | None = None) -> None:
    """Write a result file that the official server accepts."""
    path.write_text(json.dumps({"meta": dict(meta or META), "results": results}))


def result_boxes(sample: str, boxes: Boxes3D, ego2global: Array) -> list[Row]:
    """Turn boxes of the ego frame into the result rows of one sample (global frame, w l h, w x y z).

    Velocities are rotated, not translated; an unknown one becomes 0, which the format demands.
    """
    rows = []
    for box, label, score in zip(boxes.box.astype(np.float64), boxes.label, boxes.score, strict=True):
        box2global = ego2global @ make_transform(rotation_from_yaw(box[6]), box[:3])
        velocity = ego2global[:3, :3] @ np.array([*np.nan_to_num(box[7:9]), 0.0])
        name = DETECTION_CLASSES[int(label)]
        rows.append(
            {
                "sample_token": sample,
                "translation": box2global[:3, 3].tolist(),
                "size": [box[4], box[3], box[5]],
                "rotation": wxyz_from_rotation(box2global[:3, :3]).tolist(),
                "velocity": velocity[:2].tolist(),
                "detection_name": name,
                "detection_score": float(score),
                "attribute_name": usual_attribute(name, float(np.hypot(*velocity[:2]))),
            }
        )
    return rows


def ego_boxes(rows: Sequence[Row], global2ego: Array) -> Boxes3D:
    """Turn the result rows of one sample back into boxes of the ego frame, in the order of the rows.

    Raises:
        ResultsError: a row lacks a field, or its class is unknown.
    """
    try:
        label = [DETECTION_CLASSES.index(row["detection_name"]) for row in rows]
        centre = np.array([row["translation"] for row in rows], np.float64).reshape(-1, 3)
        size = np.array([row["size"] for row in rows], np.float64).reshape(-1, 3)[:, [1, 0, 2]]
        rotation = rotation_from_wxyz(np.array([row["rotation"] for row in rows]).reshape(-1, 4))
        velocity = np.array([row["velocity"][:2] for row in rows], np.float64).reshape(-1, 2)
        score = np.array([row["detection_score"] for row in rows], np.float32)
    except (KeyError, ValueError, IndexError) as error:
        raise ResultsError(f"a result box lacks or does not know {error}") from error
    turned = global2ego[:3, :3] @ rotation
    yaw = np.arctan2(turned[:, 1, 0], turned[:, 0, 0])[:, None]
    planar = np.concatenate([velocity, np.zeros((len(rows), 1))], 1) @ global2ego[:3, :3].T
    box = np.concatenate([transform_points(global2ego, centre), size, yaw, planar[:, :2]], 1)
    return Boxes3D(box.astype(np.float32), np.array(label, np.int64), score)


def evaluate_results(results: Results, root: NuscenesRoot, samples: Sequence[str] | None = None) -> DetectionScores:
    """Score results exactly as the official detection evaluation does; see `match_results`."""
    return match_results(results, root, samples).scores()


def match_results(results: Results, root: NuscenesRoot, samples: Sequence[str] | None = None) -> DetectionOutcome:
    """Filter and match results exactly as the official detection evaluation does.

    samples: tokens of the split; every sample of the root if None. The outcome numbers them in this order.

    Raises:
        ResultsError: a sample of the split is missing, one is unknown, or a box is malformed.
    """
    samples = list(root.tables["sample"]) if samples is None else list(samples)
    if set(results) != set(samples):
        absent, extra = sorted(set(samples) - set(results)), sorted(set(results) - set(samples))
        raise ResultsError(
            f"the results must hold exactly the {len(samples)} samples of the split; "
            f"missing {absent[:3]} ({len(absent)}), unknown {extra[:3]} ({len(extra)})"
        )
    number = {token: i for i, token in enumerate(samples)}
    ego = np.array([_ego_position(root, token) for token in samples]).reshape(-1, 3)
    racks = [_bike_racks(root, token) for token in samples]
    # The official kit breaks ties of equal scores by position in the file: keep its order.
    rows = [row for rows in results.values() for row in rows]
    predicted, heights = _result_table(rows, number, ego)
    check_box_counts(predicted, samples)
    predicted = predicted[_select(predicted, heights, racks)]
    truth, heights, points = _truth_table(root, samples, ego)
    in_range = _select(truth, heights, racks)
    _require_truth(root, samples, in_range, points)
    return replace(match_boxes(predicted, truth[in_range & (points > 0)]), samples=len(samples))


def _require_truth(
    root: NuscenesRoot, samples: Sequence[str], in_range: NDArray[np.bool_], points: NDArray[np.int64]
) -> None:
    """Refuse to score against nothing: the filters would leave no box of annotations that are there."""
    total = sum(len(root.annotations_of(sample)) for sample in samples)
    if not total or np.any(in_range & (points > 0)):
        return
    if not len(points):
        raise ResultsError(f"{root.folder}: {describe_classless(root.count_classless(samples))}")
    raise ResultsError(
        f"{root.folder}: of {total} annotations {len(points)} have a class, {np.count_nonzero(in_range)} of these are "
        f"within the official ranges, and none of them has a LiDAR or radar return (num_lidar_pts, num_radar_pts); "
        "the official rules score only those that have"
    )


def _result_table(rows: Sequence[Row], number: Mapping[str, int], ego: Array) -> tuple[BoxTable, Array]:
    label_of = {name: i for i, name in enumerate(DETECTION_CLASSES)}
    try:
        sample = [number[row["sample_token"]] for row in rows]
        label = [label_of[row["detection_name"]] for row in rows]
        attribute = [_attribute_number(row["attribute_name"]) for row in rows]
        score = np.array([row["detection_score"] for row in rows], np.float64)
        velocity = np.array([row["velocity"][:2] for row in rows], np.float64).reshape(-1, 2)
        return _make_table(rows, sample, label, velocity, attribute, score, ego)
    except KeyError as error:
        raise ResultsError(f"a result box lacks or does not know {error}") from error


def _truth_table(root: NuscenesRoot, samples: Sequence[str], ego: Array) -> tuple[BoxTable, Array, NDArray[np.int64]]:
    """Return all annotated boxes of detection classes, their heights and LiDAR + radar returns."""
    label_of = {name: i for i, name in enumerate(DETECTION_CLASSES)}
    rows: list[Row] = []
    sample: list[int] = []
    label: list[int] = []
    for number, token in enumerate(samples):
        for row in root.annotations_of(token):
            name = root.class_of(row)
            if name is not None:
                rows.append(row)
                sample.append(number)
                label.append(label_of[name])
    velocity = np.array([root.velocity(row)[:2] for row in rows], np.float64).reshape(-1, 2)
    attribute = [_true_attribute_number(root.attribute(row)) for row in rows]
    score = -np.ones(len(rows))
    table, height = _make_table(rows, sample, label, velocity, attribute, score, ego)
    points = np.array([row["num_lidar_pts"] + row["num_radar_pts"] for row in rows], np.int64)
    return table, height, points


def _make_table(
    rows: Sequence[Row],
    sample: Sequence[int],
    label: Sequence[int],
    velocity: Array,
    attribute: Sequence[int],
    score: Array,
    ego: Array,
) -> tuple[BoxTable, Array]:
    """Return global boxes and the heights of their centres. ego: (S, 3) where the vehicle was in each sample."""
    number = np.array(sample, np.int64)
    centre = np.array([row["translation"] for row in rows], np.float64).reshape(-1, 3)
    size = np.array([row["size"] for row in rows], np.float64).reshape(-1, 3)[:, [1, 0, 2]]
    rotation = rotation_from_wxyz(np.array([row["rotation"] for row in rows]).reshape(-1, 4))
    yaw = np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])
    distance = np.sqrt(np.sum((centre[:, :2] - ego[number, :2]) ** 2, axis=1))
    table = BoxTable(
        number,
        np.array(label, np.int64),
        centre[:, :2],
        size,
        yaw,
        velocity,
        np.array(attribute, np.int64),
        score,
        distance,
        np.zeros(len(rows), bool),
    )
    return table, centre[:, 2]


def _attribute_number(name: str) -> int:
    if name and name not in ATTRIBUTES:
        raise ResultsError(f"attribute {name!r} is unknown; known are {ATTRIBUTES} and ''")
    return ATTRIBUTES.index(name) if name else -1


def _true_attribute_number(name: str) -> int:
    """As `_attribute_number`; attributes of other taxonomies are not known here, as if there were none."""
    return _attribute_number(name) if name in ATTRIBUTES else -1


def _ego_position(root: NuscenesRoot, sample: str) -> Any:
    data = root.key_data(sample, root.lidar_channel)
    if data is None:
        raise ResultsError(f"sample {sample} has no {root.lidar_channel} key frame, ranges are measured from it")
    return root.row("ego_pose", data["ego_pose_token"])["translation"]


def _bike_racks(root: NuscenesRoot, sample: str) -> list[tuple[Array, Array]]:
    """Return (rack2global, size l w h) of each bicycle rack of a sample."""
    rows = [row for row in root.annotations_of(sample) if root.category(row) == BIKE_RACK]
    return [
        (make_transform(rotation_from_wxyz(row["rotation"]), row["translation"]), np.array(row["size"])[[1, 0, 2]])
        for row in rows
    ]


def _select(table: BoxTable, height: Array, racks: Sequence[Sequence[tuple[Array, Array]]]) -> NDArray[np.bool_]:
    """Apply the official filters: class range from the ego vehicle, cycles in bicycle racks."""
    limit = np.array([CLASS_RANGE[name] for name in DETECTION_CLASSES])
    kept = table.distance < limit[table.label]
    cycles = [DETECTION_CLASSES.index(name) for name in ("bicycle", "motorcycle")]
    for index in np.flatnonzero(kept & np.isin(table.label, cycles)):
        centre = np.array([*table.xy[index], height[index]])
        kept[index] = not any(_inside(centre, *rack) for rack in racks[table.sample[index]])
    return kept


def _inside(point: Array, box2global: Array, size: Array) -> bool:
    local = box2global[:3, :3].T @ (point - box2global[:3, 3])
    return bool(np.all(np.abs(local) <= size / 2))
