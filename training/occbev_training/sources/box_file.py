"""Labelled boxes beside a recording, as one JSON file: only scores use them.

    {"frames": [{"stamp_ns": 123, "boxes": [{"class": "car", "xyz": [..], "lwh": [..], "yaw": 0.1, "lidar_points": 9}]}]}

Centres, sizes and headings are in base_link at the frame's stamp; a missing `lidar_points` counts as many.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.results import Boxes3D
from occbev_training.sources.recording import Annotations, RecordingError

MANY = 1000


@dataclass(frozen=True)
class BoxFile:
    """Boxes by stamp, in time order. Boxes of classes that are not detected are left out."""

    stamp_ns: NDArray[np.int64]
    frames: tuple[Annotations, ...]

    def at(self, stamp_ns: int, tolerance: float = 0.06) -> Annotations | None:
        """Return the boxes nearest to a stamp, None where none lie within `tolerance` seconds."""
        away = np.abs(self.stamp_ns - stamp_ns)
        nearest = int(away.argmin())
        return self.frames[nearest] if away[nearest] <= tolerance * 1e9 else None


def read_box_file(path: Path) -> BoxFile:
    """Read a file of boxes; raises RecordingError naming it and what is wrong."""
    try:
        frames = sorted(json.loads(path.read_text())["frames"], key=lambda frame: int(frame["stamp_ns"]))
        if not frames:
            raise ValueError("holds no frame")
        stamps = np.array([frame["stamp_ns"] for frame in frames], np.int64)
        return BoxFile(stamps, tuple(_annotations(frame["boxes"]) for frame in frames))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordingError(f"{path}: no file of boxes: {error!r}") from error


def _annotations(records: list[dict[str, Any]]) -> Annotations:
    known = [record for record in records if record["class"] in DETECTION_CLASSES]
    rows = [[*record["xyz"], *record["lwh"], record["yaw"], np.nan, np.nan] for record in known]
    label = np.array([DETECTION_CLASSES.index(record["class"]) for record in known], np.int64)
    points = np.array([record.get("lidar_points", MANY) for record in known], np.int64)
    boxes = Boxes3D(np.array(rows, np.float32).reshape(-1, 9), label, np.ones(len(known), np.float32))
    return Annotations(boxes, ("",) * len(known), points)
