"""Rehearsal during adaptation: simulated streets with boxes and classes, half of them through the user's cameras."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from occbev.config import ModelConfig
from occbev.rig import CameraRig
from occbev_training.data.cache import CacheError, open_cache
from occbev_training.data.label_frame import in_base_link
from occbev_training.data.samples import JoinedSamples
from occbev_training.occupancy.prepare import PrepareConfig, prepare_drives
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.sources.recording import Recording

FIRST_SEED = 500
"""Seed of the first rehearsed drive, among those for training."""

SCORED_DRIVES = 2
"""Further drives through the simulator's own rig that show what is forgotten."""

KEY_RATE = 0.5
"""Key frames a second: far apart, so that few frames show much."""


@dataclass(frozen=True)
class Rehearse:
    """Makes one simulated drive; picklable."""

    seed: int
    config: DriveConfig

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits over what is simulated and through which cameras."""
        return hashlib.sha256(json.dumps([self.seed, self.config.as_record()], default=str).encode()).hexdigest()[:12]

    def __call__(self) -> Recording:
        """Build the world."""
        return SimulatedDrive(self.seed, self.config)


def make_rehearsal(
    folder: Path,
    model: ModelConfig,
    rig: CameraRig,
    drives: int,
    keys: int,
    workers: int = 1,
    finished: Callable[[str, int], None] = lambda name, count: None,
) -> tuple[JoinedSamples, JoinedSamples]:
    """Render the drives that are not there yet; returns samples to rehearse, and others to see what is forgotten.

    rig: the user's cameras at network size. Half of the drives, rounded up, are seen through it; those that show what
    is forgotten are seen through the simulator's own.
    """
    image, grid = model.image, in_base_link(model).grid
    config = PrepareConfig(image, grid, None)
    size = image.width, min(image.height, image.width * 9 // 16)
    parts = {"this_rig": (drives + 1) // 2, "own_rig": drives // 2}
    learned, held_out = [], []
    for part, count in parts.items():
        scored = SCORED_DRIVES if part == "own_rig" else 0
        through = rig if part == "this_rig" else None
        first = FIRST_SEED if part == "this_rig" else FIRST_SEED + parts["this_rig"]
        drive = DriveConfig(keys=keys, key_rate=KEY_RATE, image=size, rig=through, grid=grid)
        jobs = {f"sim-{s:06d}": Rehearse(s, drive) for s in range(first, first + count + scored)}
        for report in prepare_drives(jobs, folder / part, config, workers):
            if report.problem:
                raise CacheError(f"drive {report.name}: {report.problem}")
            finished(f"{part}/{report.name}", report.samples)
        names = sorted(jobs)
        if count:
            learned.append(open_cache(folder / part, names[:count]))
        if scored:
            held_out.append(open_cache(folder / part, names[count:]))
    return JoinedSamples(tuple(learned)), JoinedSamples(tuple(held_out))
