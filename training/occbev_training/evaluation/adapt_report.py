"""One page on an adaptation: occupancy, depth and boxes before and after, against the mean grid, with pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.grid import VoxelGrid
from occbev.reports.rendering import Picture, beside, occupancy_from_above, occupancy_in_3d, stack_pictures
from occbev.results import Occupancy
from occbev_training.data.cache import CachedSample

ROWS = (
    ("iou", "occupancy IoU", "higher is better"),
    ("RayIoU", "RayIoU of occupied voxels", "higher is better"),
    ("obstacle_depth_error", "depth error of obstacles (median, relative)", "lower is better"),
    ("depth_error", "depth error of all returns (median, relative)", "lower is better"),
    ("car_AP_2m_30m", "car AP at 2 m within 30 m", "higher is better"),
    ("simulated_car_AP_2m_30m", "simulated streets: car AP at 2 m within 30 m", "higher is better"),
    ("simulated_occupancy_iou", "simulated streets: occupancy IoU", "higher is better"),
)
"""Key of a score, what it is called, and which way is better."""


@dataclass(frozen=True)
class Look:
    """One held-out frame. before, after: (X, Y, Z) bool, what the network calls occupied."""

    name: str
    sample: CachedSample
    before: NDArray[np.bool_]
    after: NDArray[np.bool_]


def write_report(
    path: Path, title: str, facts: Mapping[str, str], record: Mapping[str, Any], looks: Sequence[Look]
) -> None:
    """Write the page. record: `before` and `after`, of the keys of ROWS; looks: frames to draw."""
    grid = record["grid"]
    pictures = "\n".join(_figure(look, grid) for look in looks)
    lines = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    body = f"<h1>{html.escape(title)}</h1><table>{lines}</table>{_scores(record)}{_groups(record)}{pictures}"
    path.write_text(_PAGE.format(title=html.escape(title), body=body), encoding="utf-8")


def draw_look(look: Look, grid: VoxelGrid, width: int = 1500) -> Picture:
    """Draw a frame's label and the network's voxels before and after, from above and in 3D; unseen voxels are left out."""
    sample = look.sample
    observed = sample.state != UNOBSERVED_STATE
    seen = observed & (sample.camera_visible != 0)
    volumes = {
        "LiDAR label (only what it observed)": (sample.state == OCCUPIED_STATE, observed),
        "before, where the label observed": (look.before, seen),
        "after, where the label observed": (look.after, seen),
    }
    size = width // 3 - 16
    above = {name: occupancy_from_above(geometric(*v, grid), size) for name, v in volumes.items()}
    whole = {
        "LiDAR label": geometric(*volumes["LiDAR label (only what it observed)"], grid),
        "before, whole prediction": geometric(look.before, np.ones(grid.shape, bool), grid),
        "after, whole prediction": geometric(look.after, np.ones(grid.shape, bool), grid),
    }
    across = {name: occupancy_in_3d(occupancy, size, size * 2 // 3) for name, occupancy in whole.items()}
    return stack_pictures([beside(above), beside(across)])


def geometric(occupied: NDArray[np.bool_], observed: NDArray[np.bool_], grid: VoxelGrid) -> Occupancy:
    """Return voxels without classes; what was not observed is unknown."""
    state = np.where(observed, np.where(occupied, OCCUPIED_STATE, FREE_STATE), UNOBSERVED_STATE).astype(np.uint8)
    label = np.where(occupied, 0, FREE).astype(np.uint8)
    return Occupancy(label, observed.astype(np.float32), state, grid, has_classes=False)


def _figure(look: Look, grid: VoxelGrid) -> str:
    done, data = cv2.imencode(".png", draw_look(look, grid)[..., ::-1])
    if not done:
        raise ValueError("a picture could not be encoded as PNG")
    source = base64.b64encode(data.tobytes()).decode()
    return f'<h2>{html.escape(look.name)}</h2><img src="data:image/png;base64,{source}" alt="{html.escape(look.name)}">'


def _scores(record: Mapping[str, Any]) -> str:
    before, after = record["before"], record["after"]
    rows = [
        f"<tr><th>{name}</th><td>{before[key]:.3f}</td><td><b>{after[key]:.3f}</b></td><td>{way}</td></tr>"
        for key, name, way in ROWS
        if key in before and key in after
    ]
    if "mean_grid_iou" in before:
        mean = f"<td colspan=2>{before['mean_grid_iou']:.3f}</td><td>the same grid for every frame</td>"
        rows.insert(1, f"<tr><th>occupancy IoU of the mean grid</th>{mean}</tr>")
    head = "<tr><th>held-out part of the drives</th><th>before</th><th>after</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _groups(record: Mapping[str, Any]) -> str:
    """Return the tables of IoU by range and by height."""
    tables = []
    for key, title in (("iou_by_range", "IoU by range"), ("iou_by_height", "IoU by height")):
        before, after = record["before"].get(key, {}), record["after"].get(key, {})
        rows = "".join(
            f"<tr><th>{n}</th><td>{before.get(n, 0):.3f}</td><td>{v:.3f}</td></tr>" for n, v in after.items()
        )
        tables.append(f"<table><tr><th>{title}</th><th>before</th><th>after</th></tr>{rows}</table>")
    return f'<div class="pair">{"".join(tables)}</div>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1540px; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 2rem 1rem 0; }} th, td {{ text-align: left; padding: .25rem .9rem .25rem 0;
border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; vertical-align: top; }} th {{ font-weight: 600; }}
img {{ max-width: 100%; }} .pair {{ display: flex; flex-wrap: wrap; }}
</style></head><body>{body}</body></html>
"""
