"""One simulated drive rendered ahead by several processes, for those who wait for a single drive."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import as_completed
from typing import Any

import numpy as np

from occbev.results import FrameSet, Sweep
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.sources.recording import Annotations, OccupancyTruth
from occbev_training.workers import start_workers

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""

_drive: SimulatedDrive | None = None
"""The drive of a worker process."""


class RenderedDrive:
    """A `Recording` that holds every frame of a drive; equal to the `SimulatedDrive` of its seed."""

    def __init__(self, seed: int, config: DriveConfig, workers: int = 2, progress: Progress | None = None) -> None:
        """Render the whole drive; returns when the last process is done."""
        drive = SimulatedDrive(seed, config)
        self.name, self.rig, self.lidar2ego = drive.name, drive.rig, drive.lidar2ego
        self.weather, self.trajectory = drive.weather, drive.trajectory
        self.key_stamp_ns, self.sweep_stamp_ns = drive.key_stamp_ns, drive.sweep_stamp_ns
        self._rendered = _render(seed, config, self._steps(), workers, progress)

    def _steps(self) -> list[tuple[str, int]]:
        keys = [("key", index) for index in range(len(self.key_stamp_ns))]
        return keys + [("sweep", index) for index in range(len(self.sweep_stamp_ns))]

    def sweep(self, index: int) -> Sweep:
        """Return one LiDAR rotation."""
        sweep: Sweep = self._rendered["sweep", index]
        return sweep

    def frame_set(self, key: int) -> FrameSet:
        """Return the pictures of one key frame."""
        frame_set: FrameSet = self._rendered["key", key][0]
        return frame_set

    def annotations(self, key: int) -> Annotations:
        """Return the boxes of one key frame."""
        annotations: Annotations = self._rendered["key", key][1]
        return annotations

    def occupancy_truth(self, key: int) -> OccupancyTruth:
        """Return the dense labels of one key frame."""
        truth: OccupancyTruth = self._rendered["key", key][2]
        return truth


class PicturedDrive:
    """The cameras of a drive alone, as a `Recording` without sweeps and truth: for runs that only need images."""

    def __init__(self, seed: int, config: DriveConfig, workers: int = 2, progress: Progress | None = None) -> None:
        """Render all pictures; returns when the last process is done."""
        drive = SimulatedDrive(seed, config)
        self.name, self.rig, self.lidar2ego = drive.name, drive.rig, drive.lidar2ego
        self.trajectory, self.key_stamp_ns = drive.trajectory, drive.key_stamp_ns
        self.sweep_stamp_ns = np.zeros(0, np.int64)
        steps = [("pictures", index) for index in range(len(self.key_stamp_ns))]
        self._rendered = _render(seed, config, steps, workers, progress)

    def sweep(self, index: int) -> Sweep:
        """There is none: raises IndexError."""
        raise IndexError(f"{self.name}: sweep {index} of a drive of pictures alone")

    def frame_set(self, key: int) -> FrameSet:
        """Return the pictures of one key frame."""
        frame_set: FrameSet = self._rendered["pictures", key]
        return frame_set

    def annotations(self, key: int) -> None:
        """There are none."""

    def occupancy_truth(self, key: int) -> None:
        """There is none."""


def _render(
    seed: int, config: DriveConfig, steps: list[tuple[str, int]], workers: int, progress: Progress | None
) -> dict[tuple[str, int], Any]:
    rendered: dict[tuple[str, int], Any] = {}
    with start_workers(workers, _build, seed, config) as pool:
        futures = {pool.submit(_render_step, *step): step for step in steps}
        for done, future in enumerate(as_completed(futures), 1):
            rendered[futures[future]] = future.result()
            if progress is not None:
                progress(done, len(steps))
    return rendered


def _build(seed: int, config: DriveConfig) -> None:
    global _drive
    _drive = SimulatedDrive(seed, config)


def _render_step(kind: str, index: int) -> Any:
    assert _drive is not None, "the worker was started without a drive"
    if kind == "sweep":
        return _drive.sweep(index)
    if kind == "pictures":
        return _drive.frame_set(index)
    return _drive.frame_set(index), _drive.annotations(index), _drive.occupancy_truth(index)
