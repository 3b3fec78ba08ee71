"""occbev: multi-camera 3D boxes and occupancy voxels for ROS 2, from one Occ-BEV pre-trained network."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

# OpenVINO sends statistics whenever it is imported; without this package it takes a stand-in of its own.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

_PLACES = {
    "Camera": "occbev.rig",
    "CameraFrame": "occbev.results",
    "CameraRig": "occbev.rig",
    "FrameSet": "occbev.results",
    "Pipeline": "occbev.inference.pipeline",
    "load_bag": "occbev.streams.bag_jobs",
}
"""What the package offers -> the module that holds it, which is imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
