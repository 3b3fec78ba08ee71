"""One moment of a run for the report: the cameras as a picture, prediction and truth side by side in 3D."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.grid import VoxelGrid
from occbev.reports.moments import Moment
from occbev.reports.rendering import GROUND_TRUTH, camera_mosaic, draw_boxes, occupancy_in_3d
from occbev.reports.report import Scene
from occbev.reports.space import Panel
from occbev.results import Boxes3D, Occupancy

Image = NDArray[np.uint8]

SHOWN_SCORE = 0.3
"""Boxes below this score are scored but not drawn."""

MOSAIC_WIDTH, VIEW_SIZE = 1440, (720, 420)


def compose_scene(moment: Moment, time: float) -> Scene:
    """Draw the cameras of one moment and lay prediction and truth side by side; time: seconds since the drive began."""
    caption = "Cameras: published boxes" + (", truth dashed" if moment.true_boxes is not None else "")
    rows = (((caption, _cameras(moment)),),) if moment.images else ()
    known = None if moment.true_occupancy is None else moment.true_occupancy.state != UNOBSERVED_STATE
    panels = [Panel("Prediction", moment.occupancy, _sure(moment.boxes), known)]
    if moment.true_occupancy is not None or moment.true_boxes is not None:
        panels.append(Panel("Truth", moment.true_occupancy, moment.true_boxes, known))
    return Scene(time, rows, tuple(panels))


def cover_picture(moment: Moment) -> Image:
    """Draw what the cameras saw above what was made of it and, where it is known, the truth."""
    volumes = [(moment.occupancy, _sure(moment.boxes)), (moment.true_occupancy, moment.true_boxes)]
    known = [(occupancy, boxes) for occupancy, boxes in volumes if occupancy is not None]
    if len(known) == 2:
        known[0] = (_mask_alike(*(occupancy for occupancy, _ in known)), known[0][1])
    width, height = VIEW_SIZE
    views = [occupancy_in_3d(occupancy, width, height, boxes=boxes) for occupancy, boxes in known]
    rows = [_cameras(moment), np.hstack(views)] if views else [_cameras(moment)]
    width = min(row.shape[1] for row in rows)
    return np.vstack([row[:, :width] for row in rows])


def occupancy_of_truth(semantics: NDArray[np.uint8], visible: NDArray[np.bool_], grid: VoxelGrid) -> Occupancy:
    """Make the `Occupancy` of dense labels (X, Y, Z): certain where `visible`, unobserved elsewhere."""
    state = np.where(semantics == FREE, FREE_STATE, OCCUPIED_STATE).astype(np.uint8)
    state[~visible] = UNOBSERVED_STATE
    label = np.where(visible, semantics, FREE).astype(np.uint8)
    return Occupancy(label, visible.astype(np.float32), state, grid)


def _sure(boxes: Boxes3D | None) -> Boxes3D | None:
    return None if boxes is None else boxes[boxes.score >= SHOWN_SCORE]


def _cameras(moment: Moment) -> Image:
    drawn, sure = {}, _sure(moment.boxes)
    for name, image in moment.pictures.items():
        camera = None if moment.rig is None else moment.rig[name]
        if camera is not None and moment.true_boxes is not None:
            image = draw_boxes(image, camera, moment.true_boxes, GROUND_TRUTH)
        if camera is not None and sure is not None:
            image = draw_boxes(image, camera, sure)
        drawn[name] = image
    return camera_mosaic(drawn, MOSAIC_WIDTH)


def _mask_alike(occupancy: Occupancy, truth: Occupancy) -> Occupancy:
    """Show a prediction where the truth is known, so that the two pictures compare the same voxels."""
    hidden = truth.state == UNOBSERVED_STATE
    state, label = occupancy.state.copy(), occupancy.label.copy()
    state[~hidden & (state == UNOBSERVED_STATE)] = FREE_STATE
    state[hidden], label[hidden] = UNOBSERVED_STATE, FREE
    return replace(occupancy, state=state, label=label)
