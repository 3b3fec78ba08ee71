"""DETR3D: object queries that read the images where their reference points appear; no BEV, no memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from occbev.inference.capacity import Tables
from occbev.inference.families.queries import REFERENCE_CAMERAS, QueryFamily, QueryHeadConfig, QueryModel
from occbev.inference.reference_points import projection_table
from occbev.rig import CameraRig


@dataclass(frozen=True)
class Detr3dModel(QueryModel):
    """Configuration of a DETR3D."""

    family: str = "detr3d"
    query_head: QueryHeadConfig = field(default_factory=QueryHeadConfig)
    """Detection head."""

    @property
    def max_cameras(self) -> int:
        """Cameras that it has weights for: those that it names."""
        return len(self.cameras.names) or REFERENCE_CAMERAS


class Detr3d(QueryFamily[Detr3dModel]):
    """DETR3D."""

    config = Detr3dModel

    def tables(self, model: Detr3dModel, rig: CameraRig, alive: NDArray[np.bool_], form: str) -> Tables:
        """Return table_projection (1, N, 4, 4), see `projection_table`, and table_camera (N,)."""
        size = (model.image.width, model.image.height)
        projection = projection_table(rig.lens_matrices, rig.cam2egos, size, model.bev.frame)
        return {"table_projection": projection[None], "table_camera": model.cameras.places(rig)}


FAMILY = Detr3d()
