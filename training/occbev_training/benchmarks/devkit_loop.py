"""The evaluation loop of nuscenes-devkit over boxes in a file: a script for the devkit's own environment.

    .venv/devkit/bin/python devkit_loop.py boxes.npz

Prints one JSON object: the processor time of `DetectionEval.evaluate` alone, and its scores.
"""

from __future__ import annotations

import json
import math
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np


def main(path: str) -> None:
    """Build the devkit's boxes, time its evaluation, print."""
    from nuscenes.eval.detection.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    with np.load(path, allow_pickle=False) as arrays:
        case = {name: arrays[name] for name in arrays}
    sides = {side: boxes_of(case, side) for side in ("pred", "gt")}
    evaluation = SimpleNamespace(
        cfg=config_factory("detection_cvpr_2019"), pred_boxes=sides["pred"], gt_boxes=sides["gt"], verbose=False
    )
    start = time.process_time()
    metrics, _ = DetectionEval.evaluate(evaluation)
    milliseconds = 1e3 * (time.process_time() - start)
    print(json.dumps({"cpu_ms": milliseconds, "scores": metrics.serialize()}))


def boxes_of(case: dict[str, np.ndarray[Any, Any]], side: str) -> Any:
    """Return one side's boxes as `EvalBoxes`, every sample in it."""
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.data_classes import DetectionBox

    found = EvalBoxes()
    rows: dict[int, list[Any]] = {sample: [] for sample in range(int(case["samples"]))}
    columns = ("sample", "xy", "size", "yaw", "velocity", "label", "score", "attribute")
    for sample, xy, size, yaw, velocity, label, score, attribute in zip(
        *(case[f"{side}_{name}"] for name in columns), strict=True
    ):
        length, width, height = size.tolist()
        rows[int(sample)].append(
            DetectionBox(
                sample_token=str(sample),
                translation=(*xy.tolist(), 0.0),
                size=(width, length, height),
                rotation=(math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)),
                velocity=tuple(velocity.tolist()),
                num_pts=1,
                detection_name=str(case["classes"][label]),
                detection_score=float(score),
                attribute_name=str(case["attributes"][attribute]) if attribute >= 0 else "",
            )
        )
    for sample, boxes in rows.items():
        found.add_boxes(str(sample), boxes)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
