"""From resolved work to a result: the pipeline of a model package, and what happens to images it refuses.

Shared by the live node and offline replay; it imports no ROS.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from occbev.grid import VoxelGrid
from occbev.inference.backend import RunSettings
from occbev.inference.pipeline import Pipeline
from occbev.inference.postprocess import BoxDecoding
from occbev.inference.preprocess import ImageError
from occbev.results import FrameSet, Perception
from occbev.rig import CameraRig
from occbev.streams.calibration import placeholder
from occbev.streams.intake import Decode, Work
from occbev.streams.parameters import PerceptionParameters

FEW_CORES = 2
"""Up to so many cores two sets at once get more done than one after the other, whose threads wait for each other."""

Complain = Callable[[str, str], None]
"""Called with what a problem is about and with its text."""

Finish = Callable[[], Perception]
"""Decodes what the network said of a set that was begun."""


class PipelineLike(Protocol):
    """What the node needs of a pipeline."""

    @property
    def rig(self) -> Any:
        """The rig it looks through."""
        ...

    @property
    def grid(self) -> VoxelGrid:
        """The grid of its occupancy."""
        ...

    @property
    def decode(self) -> Decode:
        """Decodes one frame for this network; safe to call from several threads."""
        ...

    def set_rig(self, rig: CameraRig) -> None:
        """Look through another rig from now on."""

    def begin(self, frame_set: FrameSet, motion: Any = None) -> Finish:
        """Run the network on one frame set; see `Pipeline.begin`."""
        ...

    def forget(self) -> None:
        """Build the next result on no frame before it."""

    def retune(self, parameters: PerceptionParameters) -> None:
        """Take parameters of which only those have changed that may while the node runs."""

    def about(self) -> dict[str, str]:
        """Return what runs, for operators: model, runtime, device."""
        ...

    def close(self) -> None:
        """Free what it holds."""


class LoadedPipeline:
    """The pipeline of a model package, loaded and warm before the first image comes."""

    def __init__(self, parameters: PerceptionParameters) -> None:
        """Load what the parameters name; calibration comes later by `set_rig`."""
        rig = CameraRig(tuple(placeholder(name) for name in parameters.names))
        self._pipeline = Pipeline(
            parameters.model, rig, parameters.backend, _settings(parameters), _decoding(parameters)
        )
        self._pipeline.warm_up()
        self.grid = self._pipeline.package.model.grid
        self.decode: Decode = self._pipeline.preprocessor.decode
        self.set_rig = self._pipeline.set_rig
        self.begin = self._pipeline.begin
        self.forget = self._pipeline.forget
        self.close = self._pipeline.close

    @property
    def rig(self) -> CameraRig:
        """The rig it looks through."""
        return self._pipeline.rig

    def retune(self, parameters: PerceptionParameters) -> None:
        """Put out boxes by other thresholds from now on."""
        self._pipeline.decoding = _decoding(parameters)

    def about(self) -> dict[str, str]:
        """Return what runs: the package and its hash, the runtime and its device."""
        package, backend = self._pipeline.package, self._pipeline.backend
        return {
            "model": package.model.name,
            "package": str(package.folder),
            "hash": package.hash,
            "runtime": backend.name,
            "device": backend.device,
            **getattr(backend, "about", dict)(),
        }


def _settings(parameters: PerceptionParameters) -> RunSettings:
    at_once = parameters.sets_at_once or (2 if (os.cpu_count() or 1) <= FEW_CORES else 1)
    return RunSettings(parameters.threads or None, at_once=at_once)


def _decoding(parameters: PerceptionParameters) -> BoxDecoding:
    detection = parameters.detection
    return BoxDecoding(threshold=detection.score_threshold, max_boxes=detection.max_boxes)


def perceive(pipeline: PipelineLike, work: Work, fewest: int, complain: Complain) -> Finish | None:
    """Begin a set, leaving out cameras whose image turns out to be unusable; None if under `fewest` are left."""
    if work.fresh:
        pipeline.forget()
    if pipeline.rig is not work.rig:
        pipeline.set_rig(work.rig)
    frame_set = work.frame_set
    while len(frame_set.cameras) >= fewest:
        try:
            return pipeline.begin(frame_set, work.motion)
        except ImageError as error:
            complain(f"camera {error.camera}", f"camera {error.camera} is missing: {error}")
            frame_set = _without(frame_set, error)
    return None


def describe_uncompensated(motion_problem: str) -> str:
    """What to tell an operator of a set whose cameras could not be brought to one instant."""
    return f"ego motion between exposures is not compensated: {motion_problem}"


def _without(frame_set: FrameSet, error: ImageError) -> FrameSet:
    frames = {name: None if name == error.camera else frame for name, frame in frame_set.frames.items()}
    return FrameSet(frame_set.stamp_ns, frames, {**frame_set.missing, error.camera: str(error)})
