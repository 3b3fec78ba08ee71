"""The key frames of any recording as moments, with labels and, where a network is given, its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import invert_transform, transform_points
from occbev.inference.pipeline import Pipeline, motion_to_key
from occbev.reports.moments import Moment, fit_rig
from occbev.reports.scenes import occupancy_of_truth
from occbev.results import FrameSet, Occupancy
from occbev_training.sources.deskew import compensated
from occbev_training.sources.recording import OccupancyTruth, Recording

MAX_SWEEP_GAP_NS = 100_000_000
"""A sweep farther than this from a key frame is not shown with it."""


def recording_moments(recording: Recording, pipeline: Pipeline | None = None) -> Iterator[Moment]:
    """Yield every key frame that has an image: labels as truth, the nearest sweep, and the results of a network."""
    for key, stamp_ns in enumerate(recording.key_stamp_ns.tolist()):
        frame_set = _placed(recording.frame_set(key))
        if not frame_set.cameras:
            continue
        ego2global = recording.trajectory.at(stamp_ns)
        motion = motion_to_key(frame_set, ego2global)
        images = {name: frame.image for name, frame in frame_set.frames.items() if frame is not None}
        moved = recording.rig.move_cameras(motion.get(name, np.eye(4)) for name in recording.rig.names)
        annotations, labels = recording.annotations(key), recording.occupancy_truth(key)
        perception = None if pipeline is None else pipeline.run(frame_set, motion)
        yield Moment(
            stamp_ns,
            images=images,
            rig=fit_rig(moved, images),
            boxes=None if perception is None else perception.boxes,
            occupancy=None if perception is None else perception.occupancy,
            true_boxes=None if annotations is None else annotations.boxes,
            true_occupancy=None if labels is None else _seen(labels),
            clouds=_cloud(recording, stamp_ns, ego2global),
            ego2global=ego2global,
            missing=dict(frame_set.missing),
            latency_ms={} if perception is None else _milliseconds(perception.timings.stage_ns),
        )


def _seen(labels: OccupancyTruth) -> Occupancy:
    return occupancy_of_truth(labels.semantics, labels.mask_camera, labels.grid)


def _milliseconds(stage_ns: Mapping[str, int]) -> dict[str, float]:
    return {stage: ns / 1e6 for stage, ns in stage_ns.items()}


def _placed(frame_set: FrameSet) -> FrameSet:
    """Count cameras without an ego pose as missing: their images cannot be moved to the key time."""
    unplaced = {
        name: "no ego pose at its exposure"
        for name, frame in frame_set.frames.items()
        if frame is not None and frame.ego2global is None
    }
    frames = {name: None if name in unplaced else frame for name, frame in frame_set.frames.items()}
    return replace(frame_set, frames=frames, missing={**frame_set.missing, **unplaced})


def _cloud(recording: Recording, stamp_ns: int, ego2global: NDArray[np.float64]) -> dict[str, NDArray[np.float32]]:
    """Return the returns of the sweep nearest to a key frame, in base_link at the key time."""
    if len(recording.sweep_stamp_ns) == 0:
        return {}
    gap = np.abs(recording.sweep_stamp_ns - stamp_ns)
    if gap.min() > MAX_SWEEP_GAP_NS:
        return {}
    sweep = compensated(recording.sweep(int(np.argmin(gap))), recording.trajectory)
    lidar2key = invert_transform(ego2global) @ recording.trajectory.at(sweep.stamp_ns) @ sweep.lidar2ego
    return {"lidar": transform_points(lidar2key, sweep.points).astype(np.float32)}
