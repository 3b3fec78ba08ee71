"""Score a model package, of any family, on held-out frames: in one process or several, with equal results.

Frames of a drive stay together and in order, since a network may remember the frame before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.inference.backend import Backend, RunSettings, load_backend
from occbev.inference.model_package import ModelPackage
from occbev.inference.pipeline import Pipeline, predicts_voxels, voxels_of
from occbev.inference.postprocess import BoxDecoding
from occbev.results import Boxes3D, Occupancy, Perception
from occbev_training.evaluation.data import EvaluationData, EvaluationFrame, open_evaluation_data
from occbev_training.evaluation.frames import SCORING, Prediction, score_frame
from occbev_training.evaluation.scores import FrameResult, found_share
from occbev_training.metrics.calibration import FreeThreshold
from occbev_training.metrics.occ3d_results import write_occupancy
from occbev_training.sources.nuscenes import RootOptions
from occbev_training.workers import start_workers

WORST = 3
"""Frames of each kind that are kept to be drawn."""


@dataclass(frozen=True)
class RunOptions:
    """How a package is run: as for the node, and what is kept."""

    backend: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    min_free: float | None = None
    """Score with this `occupancy.min_free` instead of the package's."""
    calibrate: bool = False
    """Also count what other thresholds on free would answer."""
    voxels: Path | None = None
    """Folder for the predicted voxels of every frame; None keeps none."""
    worst: int = 0
    """Worst frames that are kept, by boxes and by voxels each."""
    drives: tuple[str, ...] | None = None
    """Only these of the data; None takes all."""
    root: RootOptions = field(default_factory=RootOptions)
    """How data in the nuScenes schema are read."""


@dataclass(frozen=True, order=True)
class WorstFrame:
    """A frame to be looked at. quality: of the worse kind in `by`, boxes or voxels; low is bad."""

    badness: float
    index: int
    by: str
    boxes: Boxes3D | None = field(compare=False, default=None)
    label: NDArray[np.uint8] | None = field(compare=False, default=None)


@dataclass
class PackageRun:
    """What a run over some frames gave; runs over different frames can be joined."""

    frames: dict[int, FrameResult] = field(default_factory=dict)
    calibration: FreeThreshold | None = None
    worst: dict[str, list[WorstFrame]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    device: str = ""

    def results(self) -> list[FrameResult]:
        """The frames by their number."""
        return [self.frames[index] for index in sorted(self.frames)]

    def join(self, other: PackageRun, most: int) -> None:
        """Take over another run's frames."""
        self.frames |= other.frames
        self.outputs, self.device = other.outputs, other.device
        if self.calibration is not None and other.calibration is not None:
            self.calibration.merge(other.calibration)
        elif other.calibration is not None:
            self.calibration = other.calibration
        for by, found in other.worst.items():
            self.worst[by] = heapq.nlargest(most, [*self.worst.get(by, []), *found])


class PackageNetwork:
    """A package's network, frame after frame. Not thread-safe."""

    def __init__(self, package: ModelPackage, options: RunOptions, decoding: BoxDecoding = SCORING) -> None:
        self.package, self.options = package, options
        self._decoding, self._drive = decoding, ""
        self._pipeline: Pipeline | None = None
        self._tap: _Tap | None = None
        self.perception: Perception | None = None
        """The result of the last frame."""

    @property
    def last_outputs(self) -> Mapping[str, NDArray[Any]]:
        """What the graph gave for the last frame, until the next one."""
        return {} if self._tap is None else self._tap.last

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the graph gave for the last frame."""
        return () if self._tap is None else tuple(sorted(self._tap.last))

    @property
    def device(self) -> str:
        """The runtime and what it runs on, in words."""
        return "" if self._tap is None else f"{self._tap.name}, {self._tap.device}"

    def __call__(self, frame: EvaluationFrame) -> Prediction:
        """Predict one frame; a new drive begins without memory of the one before."""
        pipeline = self._pipeline_for(frame)
        found = self.perception = pipeline.run(frame.frame_set, frame.motion)
        assert self._tap is not None
        last = self._tap.last
        detects = "heatmap" in last or "class_logits" in last
        return Prediction(
            boxes=found.boxes if detects else None,
            label=found.occupancy.label if predicts_voxels(last) else None,
            has_classes=found.occupancy.has_classes,
        )

    def voxels(self, min_free: float) -> Occupancy:
        """Decode the voxels of the last frame again, with another threshold on free."""
        assert self._tap is not None
        return voxels_of(self._tap.last, self.package.model, min_free)

    def _pipeline_for(self, frame: EvaluationFrame) -> Pipeline:
        options, known = self.options, self._pipeline
        if self._tap is None or known is None or len(known.rig) != len(frame.rig):
            settings = RunSettings(options.threads, options.precision)
            self._tap = _Tap(load_backend(self.package, len(frame.rig), options.backend, settings))
        elif frame.drive == self._drive:
            if known.rig.hash != frame.rig.hash:
                known.set_rig(frame.rig)
            return known
        if known is not None:
            known.close()
        # What a network remembers is the pipeline's: a drive that begins has a new one.
        self._pipeline = Pipeline(self.package, frame.rig, self._tap, RunSettings(options.threads), self._decoding)
        self._drive = frame.drive
        return self._pipeline


class _Tap:
    """A backend whose last outputs can be looked at."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.form, self.device = backend.name, backend.form, backend.device
        self.kept_outputs, self.at_once = backend.kept_outputs, 1
        self.last: dict[str, NDArray[Any]] = {}

    def run(self, inputs: Any) -> dict[str, NDArray[Any]]:
        self.last = self._backend.run(inputs)
        return self.last


def run_package(
    package: ModelPackage,
    evaluation_data: EvaluationData,
    indices: Sequence[int],
    options: RunOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> PackageRun:
    """Run a package on frames in this process, by number, and compare each with what is true."""
    if options.min_free is not None:
        occupancy = replace(package.model.occupancy, min_free=options.min_free)
        package = replace(package, model=replace(package.model, occupancy=occupancy))
    model, network = package.model, PackageNetwork(package, options)
    run = PackageRun()
    if options.calibrate:
        run.calibration = FreeThreshold(len(model.occupancy_classes))
    for done, index in enumerate(sorted(indices)):
        frame = evaluation_data.frame(index)
        output = network(frame)
        result = score_frame(frame.name, frame.drive, output, model, frame.annotations, frame.truth)
        if run.calibration is not None and frame.truth is not None and output.label is not None:
            run.calibration.add(frame.truth.semantics, network.voxels, frame.truth.mask_camera)
        if options.voxels is not None and output.label is not None:
            write_occupancy(options.voxels, frame.token or frame.name, output.label)
        run.frames[index] = result
        _keep_worst(run, index, result, output, options.worst)
        progress(done + 1)
    run.outputs, run.device = network.outputs, network.device
    return run


def run_in_processes(
    folder: Path,
    data: Path,
    indices: Sequence[int],
    options: RunOptions,
    workers: int,
    progress: Callable[[int], None] = lambda done: None,
) -> PackageRun:
    """Run a package folder on frames of `data` in `workers` processes; whole drives go to each.

    Results are those of one process, since they are put in order before anything is scored.
    """
    evaluation_data = open_evaluation_data(data, options.drives, options.root)
    if workers <= 1:
        return run_package(ModelPackage.load(folder), evaluation_data, indices, options, progress)
    run, done = PackageRun(), 0
    with start_workers(workers) as pool:
        jobs = {
            pool.submit(_run_share, folder, data, share, options): len(share)
            for share in shares(evaluation_data.drives, indices, workers)
        }
        for job in as_completed(jobs):
            run.join(job.result(), options.worst)
            done += jobs[job]
            progress(done)
    return run


def shares(drives: Sequence[str], indices: Sequence[int], workers: int) -> Iterator[list[int]]:
    """Split frames into at most `workers` jobs of whole drives; fewer drives leave workers idle."""
    of_drive: dict[str, list[int]] = {}
    for index in sorted(indices):
        of_drive.setdefault(drives[index], []).append(index)
    groups = list(of_drive.values())
    for first in range(min(workers, len(groups))):
        yield [index for group in groups[first::workers] for index in group]


def _run_share(folder: Path, data: Path, indices: Sequence[int], options: RunOptions) -> PackageRun:
    evaluation_data = open_evaluation_data(data, options.drives, options.root)
    return run_package(ModelPackage.load(folder), evaluation_data, indices, options)


def _keep_worst(run: PackageRun, index: int, result: FrameResult, output: Prediction, most: int) -> None:
    if not most:
        return
    qualities = {}
    if result.boxes is not None and result.annotations is not None:
        qualities["boxes"] = found_share(result.boxes, result.annotations)
    if result.occupancy is not None:
        qualities["voxels"] = result.occupancy.iou
    for by, quality in qualities.items():
        if np.isfinite(quality):
            frame = WorstFrame(-quality, index, by, result.boxes, output.label)
            run.worst[by] = heapq.nlargest(most, [*run.worst.get(by, []), frame])
