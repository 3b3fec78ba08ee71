"""The report page of a replay of your own bag: cameras, voxels and boxes in 3D, latency; its truth is not known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from occbev.inference.model_package import ModelPackage, find_package
from occbev.reports.report import About, FrameLatency, write_report
from occbev.reports.scenes import compose_scene
from occbev.reports.summaries import PROCESSED
from occbev.streams.parameters import PerceptionParameters
from occbev.streams.recorded_moments import recorded_moments
from occbev.versions import machine, versions

SCENES = 40
"""Most moments that the page shows."""


def write_run_report(
    path: Path, bag: Path, outputs: Path, parameters: PerceptionParameters, result: Mapping[str, Any]
) -> None:
    """Write the page. outputs: the bag that the replay recorded. result: what the replay returned."""
    package = ModelPackage.load(find_package(parameters.model))
    frames, summary = result["frames"], result["summary"]
    begin_ns = min((frame["stamp_ns"] for frame in frames), default=0)
    processed = sorted({frame["stamp_ns"] for frame in frames if frame["outcome"] == PROCESSED})
    last = len(processed) - 1
    chosen = {processed[i] for i in np.linspace(0, last, min(SCENES, last + 1)).round().astype(int)}
    scenes = [
        compose_scene(moment, (moment.stamp_ns - begin_ns) / 1e9)
        for moment in recorded_moments(bag, outputs, parameters, package.model.grid)
        if moment.stamp_ns in chosen
    ]
    facts = {
        "drive": {"bag": str(bag), "seconds": round((processed[-1] - begin_ns) / 1e9, 1) if processed else 0},
        "model": {"name": package.model.name, "hash": package.hash, "trained on": package.trained_on},
        "machine": machine(),
        "versions": versions(),
    }
    latencies = [
        FrameLatency((frame["stamp_ns"] - begin_ns) / 1e9, frame.get("stages_ms", {}).get("total")) for frame in frames
    ]
    how = "without ROS, as fast as possible" if result["offline"] else "by the perception node, over DDS"
    about = About(f"occbev replay {bag.name}", f"Boxes and voxels of a recorded bag, processed {how}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, {**summary, **facts}, scenes, latencies, about)
