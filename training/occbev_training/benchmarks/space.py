"""Where space is free: shares of cells within 20 m that the ground grid calls blocked, free or unknown, and its price.

Measured on key frames of the demo's drive and of one by night, both of world v1, and of the shared PandaSet drive where it
is there, whose truth is its LiDAR's label.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from occbev.benchmarks import Options, Report, run_interleaved
from occbev.inference.ground_grid import GroundGridConfig, GroundGridMaker
from occbev.inference.model_package import ModelPackage, find_package
from occbev.inference.space_calibration import read_calibration
from occbev_training.evaluation.data import RecordingFrames
from occbev_training.evaluation.space import Frames, SpaceNetwork, dense_frames, lidar_frames, score_space
from occbev_training.metrics.space import SpaceCounts
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive

DRIVES, KEYS = {"demo": 20_054, "night": 20_009}, 100
"""Seeds of the simulated drives: 100 key frames at 5 Hz each."""

EVERY = 5
"""Every so many key frames are scored."""


def run(options: Options) -> Report:
    """Score all drives; `--rounds` is of the timing."""
    package, config = ModelPackage.load(find_package(options.model)), GroundGridConfig()
    values: dict[str, Any] = {
        "model": package.model.name,
        "calibrated_on": read_calibration(package).fitted_on or "nothing",
    }
    for name, seed in DRIVES.items():
        values |= _named(name, score_space(package, simulated_frames(seed, package, config), config))
    shared = Path(os.environ.get("OCCBEV_SHARED", "../shared")) / "data" / "pandaset-002a"
    if shared.is_dir():
        values |= _named("pandaset", score_space(package, recorded_frames(shared, package, config), config))
    return Report("space", {**values, **time_grid(package, config, options.rounds)})


def _named(drive: str, counts: SpaceCounts) -> dict[str, Any]:
    return {f"{drive}_{name}": value for name, value in counts.as_record().items()}


def simulated_frames(seed: int, package: ModelPackage, config: GroundGridConfig) -> Frames:
    """Open a simulated drive, rendering only the key frames that are scored."""
    drive = SimulatedDrive(seed, DriveConfig(keys=KEYS, key_rate=5.0, image=(640, 360), world="v1"))
    frames = RecordingFrames([(drive, key) for key in range(0, KEYS, EVERY)])
    return dense_frames(frames, range(len(frames)), package.model.grid, config)


def recorded_frames(folder: Path, package: ModelPackage, config: GroundGridConfig) -> Frames:
    """Open a bag whose LiDAR's labels are the truth, of half a second on either side."""
    from occbev_training.sources.bags import BagRecording

    recording = BagRecording(next(folder.glob("*.mcap")))
    keys = range(1, len(recording.key_stamp_ns) - 1, EVERY)
    return lidar_frames(recording, keys, package.model.grid, config, window=0.5)


def time_grid(package: ModelPackage, config: GroundGridConfig, rounds: int) -> dict[str, float]:
    """Return what a ground grid costs, in milliseconds."""
    frame = next(SpaceNetwork(package).frames(simulated_frames(DRIVES["demo"], package, config), config))
    maker = GroundGridMaker(package.model.grid, read_calibration(package))
    timing = run_interleaved({"grid": lambda: maker.make(frame.evidence, frame.sight, config)}, max(rounds, 20))["grid"]
    return {"grid_ms": round(timing.wall_ms, 2), "grid_cpu_ms": round(timing.cpu_ms, 2)}
