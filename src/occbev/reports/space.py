"""Voxels and boxes packed for a page that shows them in 3D, which can be turned; `page/space.js` draws them.

Plain WebGL 2 in little code: cubes and lines are all that is drawn, and a page of one file stays small.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import (
    FREE,
    OCCUPANCY_CLASSES,
    OCCUPANCY_COLOURS,
    OCCUPANCY_OF_DETECTION,
    OCCUPIED_STATE,
    height_colours,
)
from occbev.results import Boxes3D, Occupancy

SCRIPT = Path(__file__).parent / "page/space.js"

KNOWN = 0x80
"""Bit of a packed label: the truth of that voxel is known."""

MOST_CELLS = 65_536
"""Most voxels along an axis."""


@dataclass(frozen=True)
class Panel:
    """One of the scenes that stand side by side: voxels and boxes in base_link.

    known: (X, Y, Z) bool, where truth is known; None where nothing is said of it.
    """

    title: str
    occupancy: Occupancy | None = None
    boxes: Boxes3D | None = None
    known: NDArray[np.bool_] | None = None


def pack_voxels(occupancy: Occupancy, known: NDArray[np.bool_] | None = None) -> str:
    """Pack occupied voxels as base64 of a zlib stream: all x, all y, all z, then all labels, in the order of x, y, z.

    Coordinates are uint8, or little-endian uint16 where an axis has more than 256 voxels; labels are uint8, with the
    bit `KNOWN` where `known` is true.

    Raises:
        ValueError: an axis has more than 65536 voxels.
    """
    if max(occupancy.grid.shape) > MOST_CELLS:
        raise ValueError(f"a grid of {occupancy.grid.shape} voxels; at most {MOST_CELLS} along an axis are packed")
    index = np.argwhere(occupancy.state == OCCUPIED_STATE)
    labels = occupancy.label[tuple(index.T)].astype(np.uint8)
    if known is not None:
        labels = labels | np.where(known[tuple(index.T)], KNOWN, 0).astype(np.uint8)
    planes = index.T.astype(_coordinate_type(occupancy.grid.shape)).tobytes()
    return base64.b64encode(zlib.compress(planes + labels.tobytes(), 9)).decode()


def unpack_voxels(
    text: str, shape: tuple[int, int, int]
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    """Invert `pack_voxels` for a grid of `shape`: voxels (M, 3), labels (M,), and whether truth is known there (M,)."""
    data = zlib.decompress(base64.b64decode(text))
    kind = _coordinate_type(shape)
    count = len(data) // (3 * kind.itemsize + 1)
    index = np.frombuffer(data, kind, 3 * count).reshape(3, count).T.astype(np.int64)
    labels = np.frombuffer(data, np.uint8, count, 3 * count * kind.itemsize)
    return index, labels & ~np.uint8(KNOWN), (labels & KNOWN) != 0


def panel_record(panel: Panel) -> dict[str, Any]:
    """Return a panel as plain values, for the page."""
    boxes = _box_records(panel.boxes)
    present = {OCCUPANCY_OF_DETECTION[int(row[7])] for row in boxes}
    record: dict[str, Any] = {"title": panel.title, "boxes": boxes}
    if panel.occupancy is not None:
        grid = panel.occupancy.grid
        present |= set(panel.occupancy.label[panel.occupancy.state == OCCUPIED_STATE].tolist())
        record |= {
            "grid": {"lo": grid.lo, "pitch": grid.pitch, "shape": grid.shape},
            "voxels": pack_voxels(panel.occupancy, panel.known),
            "hasKnown": panel.known is not None,
            "heights": None if panel.occupancy.has_classes else height_colours(grid.shape[2]).tolist(),
        }
    return record | {"present": sorted(present)}


def classes_record() -> dict[str, Any]:
    """Return names and colours of the classes, for the page."""
    return {
        "classes": [name.replace("_", " ") for name in OCCUPANCY_CLASSES[:FREE]],
        "colours": OCCUPANCY_COLOURS[:FREE].tolist(),
        "boxLabels": list(OCCUPANCY_OF_DETECTION),
    }


def script_json(value: Any) -> str:
    """Return JSON that may stand inside a <script> element, whatever texts it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def space_element(moments: Sequence[Sequence[Panel]]) -> str:
    """Return HTML of a scene to be turned, one list of panels for each moment; `space.js` must follow once."""
    return space_of_records([[panel_record(panel) for panel in panels] for panels in moments])


def space_of_records(moments: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return the same of packed panels."""
    data = script_json(classes_record() | {"moments": moments})
    return f'<div class=space><script type="application/json">{data}</script></div>'


def space_script() -> str:
    """Return the script that draws every scene of a page."""
    return SCRIPT.read_text(encoding="utf-8")


def _coordinate_type(shape: tuple[int, int, int]) -> np.dtype[Any]:
    return np.dtype(np.uint8 if max(shape) <= 256 else "<u2")


def _box_records(boxes: Boxes3D | None) -> list[list[float]]:
    """x, y, z, l, w, h, yaw, label, score of each box with finite numbers."""
    if boxes is None:
        return []
    table = np.column_stack([boxes.box[:, :7], boxes.label, boxes.score]).astype(np.float64)
    rows: list[list[float]] = table[np.isfinite(table).all(1)].round(3).tolist()
    return rows
