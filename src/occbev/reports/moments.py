"""One key time of a run: what the cameras saw, what was made of it and, where it is known, the truth.

Reports and viewers draw moments, whatever they come from: a recorded run, a live node, pairs or a labelled data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from occbev.grid import BevGrid
from occbev.inference.preprocess import decode_image
from occbev.messages.image_headers import encoded_size
from occbev.results import Boxes3D, Occupancy
from occbev.rig import CameraRig

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class GroundMap:
    """A published ground grid in base_link. cells: (Y, X) int8, 100 blocked, 0 free, -1 unknown."""

    cells: NDArray[np.int8]
    bev: BevGrid


@dataclass(frozen=True)
class Moment:
    """Everything that is drawn of one key time, in base_link at that time; None where it is not known.

    images: camera -> (H, W, 3) uint8 RGB, or its encoded bytes (JPEG, PNG). missing: camera -> why it has no image.
    rig: the cameras of `images` at the size of these, moved into the key ego frame; others may be in it.
    true_occupancy: labels of what the cameras could see; the rest is unobserved.
    clouds: name of a LiDAR -> its returns (M, 3). ego2global: (4, 4).
    latency_ms: stage -> milliseconds. dropped: reason -> key times that were lost since the start.
    """

    stamp_ns: int
    images: Mapping[str, Image | bytes] = field(default_factory=dict)
    rig: CameraRig | None = None
    boxes: Boxes3D | None = None
    true_boxes: Boxes3D | None = None
    occupancy: Occupancy | None = None
    true_occupancy: Occupancy | None = None
    ground: GroundMap | None = None
    clouds: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    ego2global: NDArray[np.float64] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def pictures(self) -> dict[str, Image]:
        """Camera -> decoded image; raises ImageError naming a camera whose bytes are none."""
        return {name: decode_image(i, name) if isinstance(i, bytes) else i for name, i in self.images.items()}


def fit_rig(rig: CameraRig, images: Mapping[str, Image | bytes]) -> CameraRig:
    """Return a rig whose cameras have the size of their images, where that has the aspect of the calibration."""
    cameras = []
    for camera in rig.cameras:
        image = images.get(camera.name)
        size = None if image is None else encoded_size(image) if isinstance(image, bytes) else image.shape[1::-1]
        cameras.append(camera if size is None else camera.fit_to(*size))
    return CameraRig(tuple(cameras))
