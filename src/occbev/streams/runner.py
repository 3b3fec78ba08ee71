"""The straight line of the live node and of the offline replay: a matched frame set becomes boxes and voxels.

intake.add_image(...)   messages -> a job: the images of one instant
line.prepare(job)       its decoded images, calibration, ego motion -> the network's input
line.infer(job)         the network
line.decode(job)        its outputs -> boxes and voxels
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace

from occbev.frame_job import FrameJob
from occbev.inference.backend import RunSettings
from occbev.inference.pipeline import Pipeline
from occbev.inference.postprocess import BoxDecoding
from occbev.inference.preprocess import ImageError, SeenRows
from occbev.inference.tracking import Tracker
from occbev.results import Perception
from occbev.rig import CameraRig
from occbev.streams.calibration import fallback_camera
from occbev.streams.intake import Intake
from occbev.streams.parameters import PerceptionParameters

FEW_CORES = 2
"""Up to so many cores two sets in flight give more throughput than one after the other, whose threads wait for each other."""

LOG = logging.getLogger(__name__)

Inform = Callable[[str], object]
"""Called with what is good to know."""

Warn = Callable[[str, str], None]
"""Called with what a problem is about, such as "camera CAM_FRONT" or "motion", and with its text."""


class PerceptionLine:
    """The three stages over one job. `decode` may run in another thread while the next job is prepared and inferred."""

    def __init__(self, intake: Intake, pipeline: Pipeline, warn: Warn, inform: Inform = LOG.info) -> None:
        self._intake, self._pipeline, self._warn, self._inform = intake, pipeline, warn, inform
        self._described: dict[str, tuple[SeenRows, bool]] = {}
        self._tracker = Tracker()

    def prepare(self, job: FrameJob) -> bool:
        """Gather images, calibration and motion, and make the network's input.

        Returns: False where fewer than `sync.min_cameras` cameras can be used; then the job ends here.
        """
        self._intake.gather(job)
        for camera, reason in job.missing.items():
            self._warn(f"camera {camera}", f"camera {camera} is missing: {reason}")
        if job.motion_problem:
            self._warn("motion", f"ego motion between exposures is not compensated: {job.motion_problem}")
        while self._has_enough(job):
            try:
                self._pipeline.prepare(job)
                self._describe_view(job)
                return True
            except ImageError as error:
                reason = str(error).removeprefix(f"camera {error.camera}: ")
                leave_out(job, error.camera, reason)
                self._intake.note_problem(error.camera, reason)
                self._warn(f"camera {error.camera}", f"camera {error.camera} is missing: {reason}")
        return False

    def _describe_view(self, job: FrameJob) -> None:
        """Log once what the network is shown of each camera, and warn where a horizon is cut."""
        assert job.frame_set is not None
        for rows in self._pipeline.seen_rows:
            view = replace(rows, horizon=None), rows.cuts_horizon  # the horizon of a camera that moves does so as well
            if rows.camera in job.frame_set.cameras and self._described.get(rows.camera) != view:
                self._described[rows.camera] = view
                if rows.cuts_horizon:
                    self._warn(f"view {rows.camera}", str(rows))
                else:
                    self._inform(str(rows))

    def infer(self, job: FrameJob) -> None:
        """Run the network; see `Pipeline.infer`."""
        self._pipeline.infer(job)

    def decode(self, job: FrameJob) -> Perception:
        """Return the boxes, with their ids where `tracking` asks for them, and voxels."""
        perception, tracking = self._pipeline.decode(job), self._intake.parameters.tracking
        if not tracking.enabled:
            return perception
        if job.fresh:
            self._tracker.restart()
        boxes = self._tracker.update(perception.boxes, job.stamp_ns, job.ego2global, tracking.max_missed_s)
        return replace(perception, boxes=boxes)

    def _has_enough(self, job: FrameJob) -> bool:
        return job.frame_set is not None and len(job.frame_set.cameras) >= self._intake.parameters.sync.min_cameras


def leave_out(job: FrameJob, camera: str, reason: str) -> None:
    """Make a camera of a job missing."""
    assert job.frame_set is not None
    frames = {name: None if name == camera else frame for name, frame in job.frame_set.frames.items()}
    job.missing = {**job.missing, camera: reason}
    job.frame_set = replace(job.frame_set, frames=frames, missing=job.missing)


def load_pipeline(parameters: PerceptionParameters) -> Pipeline:
    """Load the pipeline of a model package and warm it up; calibration comes with the first job."""
    rig = CameraRig(tuple(fallback_camera(name) for name in parameters.names))
    decoding, ground = box_decoding(parameters), parameters.ground_grid
    pipeline = Pipeline(parameters.model, rig, parameters.backend, _settings(parameters), decoding, ground)
    pipeline.warm_up()
    return pipeline


def box_decoding(parameters: PerceptionParameters) -> BoxDecoding:
    """Return how boxes are decoded."""
    detection = parameters.detection
    return BoxDecoding(threshold=detection.score_threshold, max_boxes=detection.max_boxes)


def _settings(parameters: PerceptionParameters) -> RunSettings:
    at_once = parameters.max_in_flight or (2 if (os.cpu_count() or 1) <= FEW_CORES else 1)
    return RunSettings(
        parameters.threads or None, at_once=at_once, device=parameters.device, provider=parameters.provider
    )
