"""One moment of a scored run as pictures: what the cameras saw, what was published, and the truth beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.grid import VoxelGrid
from occbev.reports.rendering import (
    GROUND_TRUTH,
    bev_picture,
    camera_mosaic,
    draw_boxes,
    occupancy_from_above,
    occupancy_in_3d,
)
from occbev.reports.report import Scene
from occbev.results import Boxes3D, Occupancy
from occbev.rig import CameraRig

Image = NDArray[np.uint8]

SHOWN_SCORE = 0.3
"""Boxes below this score are scored but not drawn."""

MOSAIC_WIDTH, PLANE_SIZE, VIEW_SIZE = 1440, 480, (720, 420)


@dataclass(frozen=True)
class Moment:
    """Everything that is drawn of one key time; boxes and voxels in base_link at that time.

    images: camera -> (H, W, 3) RGB. rig: cameras at that size, moved into the key ego frame.
    true_occupancy: labels of what the cameras could see; the rest is unobserved.
    """

    time: float
    images: Mapping[str, Image]
    rig: CameraRig
    boxes: Boxes3D
    true_boxes: Boxes3D
    occupancy: Occupancy
    true_occupancy: Occupancy


def compose_scene(moment: Moment) -> Scene:
    """Draw one moment: cameras; boxes and voxels from above; voxels in perspective, prediction then truth."""
    shown = moment.boxes[moment.boxes.score >= SHOWN_SCORE]
    predicted = _mask_alike(moment.occupancy, moment.true_occupancy)
    width, height = VIEW_SIZE
    return Scene(
        moment.time,
        (
            (("Six cameras: published boxes, truth dashed", _cameras(moment, shown)),),
            (
                (
                    "Boxes from above: published, truth dashed",
                    bev_picture(shown, moment.true_boxes, moment.occupancy, PLANE_SIZE),
                ),
                ("Published voxels from above", occupancy_from_above(predicted, PLANE_SIZE)),
                ("True voxels from above", occupancy_from_above(moment.true_occupancy, PLANE_SIZE)),
            ),
            (
                ("Published voxels and boxes", occupancy_in_3d(predicted, width, height, boxes=shown)),
                (
                    "True voxels and boxes",
                    occupancy_in_3d(moment.true_occupancy, width, height, boxes=moment.true_boxes),
                ),
            ),
        ),
    )


def cover_picture(scene: Scene) -> Image:
    """Join the first and the last row of a scene: what the cameras saw above what was made of it."""
    rows = [np.hstack([picture for _, picture in row]) for row in (scene.rows[0], scene.rows[-1])]
    width = min(row.shape[1] for row in rows)
    return np.vstack([row[:, :width] for row in rows])


def occupancy_of_truth(semantics: NDArray[np.uint8], visible: NDArray[np.bool_], grid: VoxelGrid) -> Occupancy:
    """Make the `Occupancy` of dense labels (X, Y, Z): certain where `visible`, unobserved elsewhere."""
    state = np.where(semantics == FREE, FREE_STATE, OCCUPIED_STATE).astype(np.uint8)
    state[~visible] = UNOBSERVED_STATE
    label = np.where(visible, semantics, FREE).astype(np.uint8)
    return Occupancy(label, visible.astype(np.float32), state, grid)


def _cameras(moment: Moment, shown: Boxes3D) -> Image:
    drawn = {}
    for name, image in moment.images.items():
        camera = moment.rig[name]
        picture = draw_boxes(image, camera, moment.true_boxes, GROUND_TRUTH)
        drawn[name] = draw_boxes(picture, camera, shown)
    return camera_mosaic(drawn, MOSAIC_WIDTH)


def _mask_alike(occupancy: Occupancy, truth: Occupancy) -> Occupancy:
    """Show a prediction where the truth is known, so that the two pictures compare the same voxels."""
    hidden = truth.state == UNOBSERVED_STATE
    state, label = occupancy.state.copy(), occupancy.label.copy()
    state[~hidden & (state == UNOBSERVED_STATE)] = FREE_STATE
    state[hidden], label[hidden] = UNOBSERVED_STATE, FREE
    return replace(occupancy, state=state, label=label)
