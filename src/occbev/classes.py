"""Class tables of detection (nuScenes order of the BEVDet family) and occupancy (Occ3D), with their colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DETECTION_CLASSES: tuple[str, ...] = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)

OCCUPANCY_CLASSES: tuple[str, ...] = (
    "others",
    "barrier",
    "bicycle",
    "bus",
    "car",
    "construction_vehicle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "trailer",
    "truck",
    "driveable_surface",
    "other_flat",
    "sidewalk",
    "terrain",
    "manmade",
    "vegetation",
    "free",
)

FREE = OCCUPANCY_CLASSES.index("free")
"""Occupancy label of empty space (17)."""

GROUND_CLASSES = ("driveable_surface", "other_flat", "sidewalk", "terrain")
"""Occupied voxels of these classes are ground, which blocks no vehicle."""

UNOBSERVED_STATE, FREE_STATE, OCCUPIED_STATE = 0, 1, 2
"""Three-state labels; zero means that nothing is known, so an untouched buffer is harmless."""

OCCUPANCY_COLOURS: NDArray[np.uint8] = np.array(
    [
        [0, 0, 0],
        [112, 128, 144],
        [220, 20, 60],
        [255, 127, 80],
        [255, 158, 0],
        [233, 150, 70],
        [255, 61, 99],
        [0, 0, 230],
        [47, 79, 79],
        [255, 140, 0],
        [255, 99, 71],
        [0, 207, 191],
        [175, 0, 75],
        [75, 0, 75],
        [112, 180, 60],
        [222, 184, 135],
        [0, 175, 0],
        [255, 255, 255],
    ],
    np.uint8,
)
"""RGB of each occupancy class (18, 3), the usual nuScenes palette."""

_LOW, _HIGH = np.array([52.0, 94.0, 170.0]), np.array([250.0, 220.0, 90.0])


def height_colours(layers: int) -> NDArray[np.uint8]:
    """Return RGB (layers, 3) of voxels without a class, from low to high."""
    share = np.linspace(0, 1, layers)[:, None]
    return np.round(_LOW + share * (_HIGH - _LOW)).astype(np.uint8)


OCCUPANCY_OF_DETECTION: tuple[int, ...] = tuple(OCCUPANCY_CLASSES.index(name) for name in DETECTION_CLASSES)
"""Occupancy label of each detection class."""

DETECTION_COLOURS: NDArray[np.uint8] = OCCUPANCY_COLOURS[list(OCCUPANCY_OF_DETECTION)]
"""RGB of each detection class (10, 3)."""
