"""The straight line without ROS: one frame set in, boxes and voxels out.

The node, bag replay, evaluation and the benchmark all call this, so that live and offline results are equal.
Networks of every family run here; what one remembers of the frame before is kept here as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.config import ModelConfig
from occbev.geometry import frame2ego, invert_transform
from occbev.inference.backend import (
    FACTORS,
    Arrays,
    Backend,
    RunSettings,
    load_backend,
    start,
)
from occbev.inference.memory import Memory
from occbev.inference.model_package import ModelPackage, find_package
from occbev.inference.postprocess import (
    BoxDecoding,
    OutputError,
    decode_boxes,
    decode_factors,
    decode_occupancy,
    move_boxes,
    unobserved,
    voxels_in_view,
)
from occbev.inference.preprocess import PreparedImages, Preprocessor
from occbev.inference.query_boxes import QueryDecoding, decode_queries
from occbev.inference.tables import TableCache
from occbev.results import Boxes3D, FrameSet, Occupancy, Perception, Timings
from occbev.rig import CameraRig

STAGES = ("decode", "preprocess", "tables", "inference", "postprocess")
"""Names of the timed stages, in order."""

OUTPUTS = ("occupancy_logits", "heatmap", "box", "class_logits", "box_codes")
"""Outputs of a graph that are decoded: voxels, and boxes as centre maps or as answers of queries."""

Motion = Mapping[str, ArrayLike]
"""Camera name -> (4, 4): ego at that camera's exposure -> ego at the key time."""


class Pipeline:
    """A loaded network, the rig that it looks through, and the caches that belong to both.

    Not thread-safe, but that one set may be finished while the next has begun.
    """

    def __init__(
        self,
        package: ModelPackage | Path | str,
        rig: CameraRig,
        backend: str | Backend = "auto",
        settings: RunSettings | None = None,
        decoding: BoxDecoding | None = None,
    ) -> None:
        """Load a network for a rig.

        package: loaded, or its folder, or the name of a shipped one. rig: cameras at the size they deliver.
        backend: a runtime's name (see `load_backend`) or a loaded backend. settings: for the former.
            A network with a memory runs on one set at a time, whatever they say. decoding: None for the defaults.
        """
        self.package = package if isinstance(package, ModelPackage) else ModelPackage.load(find_package(package))
        self.decoding = decoding or BoxDecoding()
        self._wanted, self._settings = backend, settings or RunSettings()
        if self.package.model.past_frames:
            self._settings = replace(self._settings, at_once=1)
        self._preprocessor = Preprocessor(self.package.model.image)
        self._pool = ThreadPoolExecutor(min(4, self._settings.threads or os.cpu_count() or 1), "decode")
        self._memory = Memory(self.package.model)
        self._loaded_for = 0
        self.set_rig(rig)

    @property
    def preprocessor(self) -> Preprocessor:
        """The stage that decodes and scales, for callers who decode frames as they arrive."""
        return self._preprocessor

    def set_rig(self, rig: CameraRig) -> None:
        """Look through another rig from now on; the network is reloaded only if the number of cameras changes."""
        if len(rig) != self._loaded_for:
            self.backend = self._load(len(rig))
            self._tables = TableCache(self.package.model, self.backend.form)
            self._loaded_for = len(rig)
        self.rig = rig
        self._view: _View | None = None

    @property
    def remembers(self) -> bool:
        """Whether the next frame set will build on the one before."""
        return self._memory.filled

    def forget(self) -> None:
        """Begin anew: the next frame set builds on none before it."""
        self._memory.forget()

    def run(self, frame_set: FrameSet, motion: Motion | None = None) -> Perception:
        """Perceive one frame set; frames may be encoded or arrays.

        motion: how far ego moved from each exposure to the key time; None treats all as taken at the key time.
        A network with a memory builds on the set before, if frames hold their ego poses and no more than
        `occbev.inference.memory.MAX_GAP_S` lies between; a step back in time or a jump begins anew.
        Raises:
            ImageError: an image cannot be used. LookupError: `motion` lacks a camera. OutputError: not finite.
        """
        return self.begin(frame_set, motion)()

    def begin(self, frame_set: FrameSet, motion: Motion | None = None) -> Callable[[], Perception]:
        """Run the network on one frame set as `run` does; return what decodes its outputs, to be called once.

        That may happen in another thread while the next set has begun, but must end before the one after is begun.
        With two frame sets at once the network only has begun, and what is returned waits for it.
        """
        if not frame_set.cameras:
            raise ValueError(f"frame set at {frame_set.stamp_ns} ns holds no image: {dict(frame_set.missing)}")
        clock = [time.perf_counter_ns()]
        decoded = self._preprocessor.decode_all(frame_set, self.rig, self._pool)
        clock.append(time.perf_counter_ns())
        prepared = self._preprocessor.prepare(decoded, self.rig, self._pool)
        clock.append(time.perf_counter_ns())
        moved = self._move_rig(prepared, frame_set, motion)
        tables = self._tables.tables(moved, prepared.camera_valid)
        pose = key_pose(frame_set, motion) if self._memory.active else None
        past = self._memory.inputs(frame_set.stamp_ns, pose)
        clock.append(time.perf_counter_ns())
        images, valid = prepared.images[None], prepared.camera_valid[None]
        wait = start(self.backend, {"images": images, "camera_valid": valid, **tables, **past})
        has_run = self.backend.at_once == 1
        if has_run:
            clock.append(time.perf_counter_ns())

        def finish() -> Perception:
            outputs = wait()
            if not has_run:
                clock.append(time.perf_counter_ns())
            return self._finish(outputs, prepared, frame_set, clock)

        if self.backend.kept_outputs > 1 and not self._memory.active:
            return finish
        try:
            perception = finish()
        except OutputError:
            self._memory.forget()  # what cannot be decoded is nothing to build on
            raise
        self._memory.keep(wait(), frame_set.stamp_ns, pose)
        return lambda: perception

    def _finish(self, outputs: Arrays, prepared: PreparedImages, frame_set: FrameSet, clock: list[int]) -> Perception:
        """Decode what the network said of one frame set. clock: when each stage before began, and the last ended."""
        begin_ns = time.perf_counter_ns()
        boxes, occupancy = self._decode(outputs, prepared, frame_set.cameras)
        stage_ns = [*np.diff(clock).tolist(), time.perf_counter_ns() - begin_ns]
        timings = Timings(dict(zip(STAGES, stage_ns, strict=True)))
        return Perception(frame_set.stamp_ns, boxes, occupancy, timings, dict(frame_set.missing))

    def warm_up(self) -> None:
        """Run on nothing, once for each run that keeps its outputs, so that no real frame pays for first times."""
        shape = (len(self.rig), self.package.model.image.height, self.package.model.image.width, 3)
        black = np.zeros(shape, np.uint8)
        prepared = self._preprocessor.prepare(FrameSet(0, {}), self.rig)
        images = np.stack([self._preprocessor.normalise(image) for image in black])
        inputs = {
            "images": images[None],
            "camera_valid": np.ones((1, len(self.rig)), np.float32),
            **self._tables.tables(prepared.rig, prepared.camera_valid),
            **Memory(self.package.model).inputs(0, None),
        }
        runs = [start(self.backend, inputs) for _ in range(self.backend.kept_outputs)]
        with suppress(OutputError):  # if it is the network's fault, real frames will say so
            for wait in runs:
                self._decode(wait(), prepared, self.rig.names)

    def close(self) -> None:
        """End the decoding threads."""
        self._pool.shutdown()

    def _load(self, cameras: int) -> Backend:
        if isinstance(self._wanted, str):
            return load_backend(self.package, cameras, self._wanted, self._settings)
        return self._wanted

    def _move_rig(self, prepared: PreparedImages, frame_set: FrameSet, motion: Motion | None) -> CameraRig:
        if motion is None:
            return prepared.rig
        absent = sorted(set(frame_set.cameras) - set(motion))
        if absent:
            raise LookupError(f"motion to the key time is not given for cameras {absent}; it is for {sorted(motion)}")
        return prepared.rig.moved(motion.get(name, np.eye(4)) for name in prepared.rig.names)

    def _decode(self, outputs: Arrays, prepared: PreparedImages, cameras: tuple[str, ...]) -> tuple[Boxes3D, Occupancy]:
        """Decode what the network says; boxes that it does not predict are none, voxels are unobserved."""
        model = self.package.model
        boxes = boxes_of(outputs, model, self.decoding, cameras)
        if not predicts_voxels(outputs):
            if boxes is None:
                absent = [name for name in OUTPUTS if name not in outputs]
                raise OutputError(f"the graph of {model.name} lacks the outputs {absent}; it has {sorted(outputs)}")
            return boxes, unobserved(model.grid, cameras)
        observed = self._find_observed(prepared.rig, prepared.camera_valid)
        min_free = model.occupancy.min_free
        occupancy = voxels_of(outputs, model, min_free, cameras, observed, self._pool)
        return Boxes3D.empty(cameras) if boxes is None else boxes, occupancy

    def _find_observed(self, rig: CameraRig, camera_valid: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The voxels that some valid camera sees, kept for the last rig: projecting a grid takes longer than a network."""
        view = self._view  # the other thread may take another rig
        if view is None or view.rig_hash != rig.hash:
            view = self._view = _View(rig.hash, voxels_in_view(rig, self.package.model.grid))
        return view.observed(camera_valid > 0)


@dataclass
class _View:
    """What the cameras of a rig see; in_view: (N, X, Y, Z)."""

    rig_hash: str
    in_view: NDArray[np.bool_]
    _last: tuple[bytes, NDArray[np.bool_]] | None = None

    def observed(self, valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The voxels (X, Y, Z) that one of the valid (N,) cameras sees."""
        if self._last is None or self._last[0] != valid.tobytes():
            self._last = valid.tobytes(), np.any(self.in_view[valid], axis=0)
        return self._last[1]


def predicts_voxels(outputs: Collection[str]) -> bool:
    """Whether a graph with these outputs says something of voxels."""
    return "occupancy_logits" in outputs or set(FACTORS) <= set(outputs)


def voxels_of(
    outputs: Arrays,
    model: ModelConfig,
    min_free: float,
    cameras: tuple[str, ...] = (),
    observed: NDArray[np.bool_] | None = None,
    pool: Executor | None = None,
) -> Occupancy:
    """Decode occupancy in base_link from a graph's outputs for one frame: factors or logits.

    min_free: least probability of free for a voxel to be free. observed, pool: see `decode_occupancy`.
    """
    if set(FACTORS) <= set(outputs):
        occupied, kind, kind_share = (outputs[name][0] for name in FACTORS)
        free = len(model.occupancy_classes) - 1
        return decode_factors(occupied, kind, kind_share, free, model.grid, cameras, observed, min_free)
    logits = outputs["occupancy_logits"][0]
    return decode_occupancy(logits, model.grid, cameras, observed, min_free, pool)


def boxes_of(
    outputs: Arrays, model: ModelConfig, decoding: BoxDecoding, cameras: tuple[str, ...] = ()
) -> Boxes3D | None:
    """Decode boxes of a network of any family into base_link, best first; None if it predicts none.

    outputs: a graph's, for one frame: `heatmap` and `box`, or `class_logits` and `box_codes`.
    """
    frame = frame2ego(model.bev.frame)
    if {"heatmap", "box"} <= set(outputs):
        maps = outputs["heatmap"][0], outputs["box"][0]
        boxes = decode_boxes(*maps, model.bev, decoding, cameras, model.detection_classes)
        return move_boxes(boxes, frame)
    if {"class_logits", "box_codes"} <= set(outputs):
        answers = outputs["class_logits"][0], outputs["box_codes"][0]
        queries = QueryDecoding(decoding.threshold, decoding.max_boxes)
        return decode_queries(*answers, frame, queries, cameras)
    return None


def key_pose(frame_set: FrameSet, motion: Motion | None) -> NDArray[np.float64] | None:
    """Return ego2global (4, 4) at the key time from a frame's pose and its motion since; None if no pose is known.

    motion: as of `Pipeline.run`; None takes the first frame's pose for that at the key time.
    """
    for name in frame_set.cameras:
        frame = frame_set.frames[name]
        if frame is None or frame.ego2global is None:
            continue
        if motion is None:
            return np.asarray(frame.ego2global, np.float64)
        if name in motion:
            return np.asarray(frame.ego2global, np.float64) @ invert_transform(motion[name])
    return None


def motion_to_key(frame_set: FrameSet, ego2global: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """Return, for each camera present, ego at its exposure -> ego at the key time.

    ego2global: (4, 4) at the key time.
    Raises:
        LookupError: a frame's own pose is not known.
    """
    global2ego, motion = invert_transform(ego2global), {}
    for name in frame_set.cameras:
        frame = frame_set.frames[name]
        if frame is None or frame.ego2global is None:
            raise LookupError(f"camera {name}: no ego pose is known at its exposure")
        motion[name] = global2ego @ frame.ego2global
    return motion
