"""The straight line without ROS: one frame set in, boxes and voxels out.

The node, bag replay, evaluation and the benchmark all call this, so that live and offline results are equal.
Networks of every family run here; what one remembers of the frame before is held here as well.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.classes import GROUND_CLASSES
from occbev.config import ModelConfig
from occbev.frame_job import Arrays, FrameJob, MotionToKey
from occbev.geometry import invert_transform
from occbev.grid import VoxelGrid
from occbev.inference.backend import (
    FACTORS,
    Backend,
    RunSettings,
    load_backend,
    start,
)
from occbev.inference.factors import Factors, decode_factors
from occbev.inference.families import family_of
from occbev.inference.ground_grid import GroundGridConfig, GroundGridMaker, SightLines
from occbev.inference.memory import Memory
from occbev.inference.model_package import ModelPackage, find_package
from occbev.inference.postprocess import (
    BoxDecoding,
    OutputError,
    decode_geometry,
    decode_occupancy,
    make_unobserved,
    voxels_in_view,
)
from occbev.inference.preprocess import Preprocessor, seen_rows
from occbev.inference.space_calibration import read_calibration
from occbev.inference.table_cache import TableCache
from occbev.results import Boxes3D, CameraFrame, FrameSet, GroundGrid, Occupancy, Perception, Timings
from occbev.rig import Camera, CameraRig
from occbev.threads import name_thread

logger = logging.getLogger(__name__)

PIPELINE_STAGES = ("decode", "preprocess", "tables", "inference", "postprocess")
"""Names of the timed stages, in order."""

GRAPH_OUTPUTS = ("occupancy_logits", "reconstruction_logits", "heatmap", "box", "class_logits", "box_codes")
"""Outputs of a graph that are decoded: voxels with or without classes, boxes as centre maps or as answers of queries."""


class Pipeline:
    """A loaded network, the rig of its cameras, and the caches that belong to both.

    A job goes through `prepare`, `infer` and `decode`; `run` is all three. One job may be decoded in another thread
    while the next one is prepared and inferred, but must be decoded before the one after that is inferred.
    """

    def __init__(
        self,
        package: ModelPackage | Path | str,
        rig: CameraRig,
        backend: str | Backend = "auto",
        settings: RunSettings | None = None,
        decoding: BoxDecoding | None = None,
        ground: GroundGridConfig | None = None,
    ) -> None:
        """Load a network for a rig.

        package: loaded, or its folder, or the name of a shipped one. rig: cameras at the size they deliver.
        backend: a runtime's name (see `load_backend`) or a loaded backend. settings: for the former.
            A network with a memory runs on one set at a time, whatever they say. decoding, ground: None for the
            defaults.
        """
        self.package = package if isinstance(package, ModelPackage) else ModelPackage.load(find_package(package))
        self.decoding, self.ground = decoding or BoxDecoding(), ground or GroundGridConfig()
        self.calibration = read_calibration(self.package)
        self._ground_grids = GroundGridMaker(self.grid, self.calibration)
        self._max_occupied = self.calibration.voxel_limits(self.grid.bev)
        self.preprocessor = Preprocessor(self.package.model.image)
        self._wanted, self._settings = backend, settings or RunSettings()
        if self.package.model.past_frames:
            self._settings = replace(self._settings, at_once=1)
        workers = min(4, self._settings.threads or os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, "prepare", name_thread, ("prepare",))
        self._memory = Memory(self.package.model)
        self._loaded_for = 0
        self.set_rig(rig)

    def prepare(self, job: FrameJob) -> None:
        """Make the graph's input of `job.frame_set`, whose frames may be encoded or arrays.

        A network with a memory builds on the set before, if frames hold their ego poses and no more than
        `occbev.inference.memory.MAX_GAP_S` lies between; a step back in time, a jump or a fresh job begins anew.
        Raises:
            ImageError: an image cannot be used. LookupError: `job.motion` lacks a camera.
        """
        frame_set = job.frame_set
        if frame_set is None or not frame_set.cameras:
            raise ValueError(f"frame set at {job.stamp_ns} ns holds no image: {dict(job.missing)}")
        if job.fresh:
            self.forget()
        if job.rig is not None and job.rig is not self.rig:
            self.set_rig(job.rig)
        job.start_clock()
        decoded = self.preprocessor.decode_all(frame_set, self.rig, self._pool)
        job.end_stage("decode")
        images, valid, network_rig = self.preprocessor.prepare(decoded, self.rig, self._pool)
        job.end_stage("preprocess")
        moved = _move_rig(network_rig, frame_set, job.motion)
        tables = self._tables.tables(moved, valid)
        past = self._memory.inputs(job.stamp_ns, self._key_pose(job), moved, frame_set.signals)
        job.inputs = {"images": images[None], "camera_valid": valid[None], **tables, **past}
        job.network_rig = network_rig
        job.end_stage("tables")

    def infer(self, job: FrameJob) -> None:
        """Run the network; with two frame sets at once it has only begun, and `decode` waits for it.

        Raises:
            OutputError: an output is not finite, of a network whose next run needs or overwrites it.
        """
        job.outputs = start(self.backend, job.inputs)
        if self.backend.at_once == 1:
            job.end_stage("inference")
        if self._memory.active:
            self._remember(job)
        elif self.backend.kept_outputs == 1:
            self.decode(job)
        elif predicts_voxels(self.package.outputs):
            self._find_seen(job)  # beside the network, so that the first set of a rig does not wait for it afterwards

    def decode(self, job: FrameJob) -> Perception:
        """Return the boxes and voxels of a job that was inferred; a second call returns the same.

        Raises:
            OutputError: an output is absent or not finite.
        """
        if job.perception is None:
            assert job.outputs is not None
            outputs = job.outputs()
            if "inference" not in job.stage_ns:
                job.end_stage("inference")
            job.start_clock()
            boxes, occupancy, ground = self._decode_outputs(outputs, job)
            job.end_stage("postprocess")
            timings = Timings({stage: job.stage_ns[stage] for stage in PIPELINE_STAGES})
            job.perception = Perception(job.stamp_ns, boxes, occupancy, timings, dict(job.missing), ground)
        return job.perception

    def run(self, frame_set: FrameSet, motion: MotionToKey | None = None, wants_ground: bool = True) -> Perception:
        """Prepare, infer and decode one frame set; raises what they raise.

        motion: how far ego moved from each exposure to the key time; None treats all as taken at the key time.
        wants_ground: whether the ground grid is made; without it the result's `ground` is None.
        """
        job = FrameJob(
            frame_set.stamp_ns,
            missing=frame_set.missing,
            frame_set=frame_set,
            motion=motion,
            wants_ground=wants_ground,
        )
        self.prepare(job)
        self.infer(job)
        return self.decode(job)

    @property
    def grid(self) -> VoxelGrid:
        """The grid of the voxels."""
        return self.package.model.grid

    def decode_frame(self, frame: CameraFrame, camera: Camera) -> CameraFrame:
        """Decode one image at the size that is needed; safe to call from several threads, as frames arrive."""
        return self.preprocessor.decode(frame, camera)

    def about(self) -> dict[str, str]:
        """Return what runs, for operators: the package and its hash, the runtime and its device."""
        return {
            "model": self.package.model.name,
            "package": str(self.package.folder),
            "hash": self.package.hash,
            "predicts": self.package.predicts or "not recorded: exported by an earlier version",
            "runtime": self.backend.name,
            "device": self.backend.device,
            "calibrated": self.calibration.fitted_on or "no: the ground grid takes the network's probabilities as said",
            **getattr(self.backend, "about", dict)(),
        }

    def set_rig(self, rig: CameraRig) -> None:
        """Use another rig from now on; the network is reloaded only if the number of cameras changes."""
        if len(rig) != self._loaded_for:
            self.backend = self._load(len(rig))
            self._tables = TableCache(self.package.model, self.backend.form)
            self._loaded_for = len(rig)
        self.rig = rig
        if places := family_of(self.package.model).describe_cameras(self.package.model, rig):
            logger.info("%s takes cameras %s", self.package.model.name, places)
        self.seen_rows = seen_rows(rig, self.package.model.image)
        self._view: _View | None = None

    @property
    def remembers(self) -> bool:
        """Whether the next frame set will build on the one before."""
        return self._memory.filled

    def forget(self) -> None:
        """Drop the memory: the next frame set is a first one."""
        self._memory.forget()

    def warm_up(self) -> None:
        """Run on empty images, once per output buffer, so that the first real frame is not slower than the others."""
        size = (self.package.model.image.height, self.package.model.image.width, 3)
        black = self.preprocessor.normalise(np.zeros(size, np.uint8))
        _, _, network_rig = self.preprocessor.prepare(FrameSet(0, {}), self.rig)
        valid = np.ones(len(self.rig), np.float32)
        inputs = {
            "images": np.stack([black] * len(self.rig))[None],
            "camera_valid": valid[None],
            **self._tables.tables(network_rig, np.zeros_like(valid)),
            **Memory(self.package.model).inputs(0, None, network_rig),
        }
        job = FrameJob(0, frame_set=FrameSet(0, dict.fromkeys(self.rig.names)), inputs=inputs, network_rig=network_rig)
        runs = [start(self.backend, inputs) for _ in range(self.backend.kept_outputs)]
        with suppress(OutputError):  # if it is the network's fault, real frames will say so
            for wait in runs:
                self._decode_outputs(wait(), job)

    def close(self) -> None:
        """End the decoding threads."""
        self._pool.shutdown()

    def _load(self, cameras: int) -> Backend:
        if isinstance(self._wanted, str):
            return load_backend(self.package, cameras, self._wanted, self._settings)
        return self._wanted

    def _key_pose(self, job: FrameJob) -> NDArray[np.float64] | None:
        assert job.frame_set is not None
        return key_pose(job.frame_set, job.motion) if self._memory.active else None

    def _remember(self, job: FrameJob) -> None:
        """Keep the state that a job's outputs hold, once they are known to be finite."""
        assert job.outputs is not None
        try:
            self.decode(job)
        except OutputError:
            self._memory.forget()  # what cannot be decoded is nothing to build on
            raise
        assert job.frame_set is not None
        assert job.network_rig is not None
        moved = _move_rig(job.network_rig, job.frame_set, job.motion)
        self._memory.keep(dict(job.outputs()), job.stamp_ns, self._key_pose(job), moved)

    def _decode_outputs(self, outputs: Arrays, job: FrameJob) -> tuple[Boxes3D, Occupancy, GroundGrid | None]:
        """Decode a graph's outputs; boxes that it does not predict are none, voxels are unknown."""
        assert job.frame_set is not None
        model, cameras = self.package.model, job.frame_set.cameras
        boxes = boxes_of(outputs, model, self.decoding, cameras)
        if not predicts_voxels(outputs):
            if boxes is None:
                absent = [name for name in GRAPH_OUTPUTS if name not in outputs]
                raise OutputError(f"the graph of {model.name} lacks the outputs {absent}; it has {sorted(outputs)}")
            return boxes, make_unobserved(model.grid, cameras), None
        seen, min_free = self._find_seen(job), model.occupancy.min_free
        occupancy = voxels_of(outputs, model, min_free, cameras, seen.observed, self._pool, self._max_occupied)
        assert occupancy.evidence is not None
        make = self._ground_grids.make
        ground = make(occupancy.evidence, seen.sight, self.ground) if job.wants_ground else None
        return Boxes3D.empty(cameras) if boxes is None else boxes, occupancy, ground

    def _find_seen(self, job: FrameJob) -> _Seen:
        """What the valid cameras see, kept for the last rig: projecting a grid takes longer than a network."""
        assert job.network_rig is not None
        view = self._view  # the other thread may take another rig
        if view is None or view.rig.hash != job.network_rig.hash:
            in_view = voxels_in_view(job.network_rig, self.grid)
            view = self._view = _View(job.network_rig, self.grid, in_view)
        return view.find_seen(job.inputs["camera_valid"][0] > 0)


def _move_rig(rig: CameraRig, frame_set: FrameSet, motion: MotionToKey | None) -> CameraRig:
    """Return the rig with each camera's pose at its own exposure, in ego at the key time."""
    if motion is None:
        return rig
    absent = sorted(set(frame_set.cameras) - set(motion))
    if absent:
        raise LookupError(f"motion to the key time is not given for cameras {absent}; it is for {sorted(motion)}")
    return rig.move_cameras(motion.get(name, np.eye(4)) for name in rig.names)


@dataclass(frozen=True)
class _Seen:
    """What the valid cameras of a rig see: voxels (X, Y, Z), and along which lines."""

    observed: NDArray[np.bool_]
    sight: SightLines


@dataclass
class _View:
    """Which voxels each camera of a rig sees; in_view: (N, X, Y, Z)."""

    rig: CameraRig
    grid: VoxelGrid
    in_view: NDArray[np.bool_]
    _last: tuple[bytes, _Seen] | None = None

    def find_seen(self, valid: NDArray[np.bool_]) -> _Seen:
        """Return what the valid (N,) cameras see, kept for the last ones."""
        if self._last is None or self._last[0] != valid.tobytes():
            sight = SightLines(self.rig, self.grid, self.in_view, valid)
            self._last = valid.tobytes(), _Seen(np.any(self.in_view[valid], axis=0), sight)
        return self._last[1]


def predicts_voxels(outputs: Collection[str]) -> bool:
    """Whether a graph with these outputs predicts voxels."""
    return bool({"occupancy_logits", "reconstruction_logits"} & set(outputs)) or set(FACTORS) <= set(outputs)


def voxels_of(
    outputs: Arrays,
    model: ModelConfig,
    min_free: float,
    cameras: tuple[str, ...] = (),
    observed: NDArray[np.bool_] | None = None,
    pool: Executor | None = None,
    max_occupied: NDArray[np.float32] | None = None,
) -> Occupancy:
    """Decode occupancy in base_link from a graph's outputs for one frame: factors, logits, or geometry without classes.

    min_free: least probability of free for a voxel to be free. observed, pool, max_occupied: see `decode_occupancy`.
    """
    ground = [label for label, name in enumerate(model.occupancy_classes) if name in GROUND_CLASSES]
    if set(FACTORS) <= set(outputs):
        occupied, class_id, class_probability = (outputs[name][0] for name in FACTORS)
        factors = Factors(occupied, class_id, class_probability, len(model.occupancy_classes) - 1, min_free)
        return decode_factors(factors, model.grid, cameras, observed, ground, max_occupied)
    if "occupancy_logits" not in outputs:
        logits = outputs["reconstruction_logits"][0]
        return decode_geometry(logits, model.grid, cameras, observed, min_free, max_occupied)
    logits = outputs["occupancy_logits"][0]
    return decode_occupancy(logits, model.grid, cameras, observed, min_free, pool, ground, max_occupied)


def boxes_of(
    outputs: Arrays, model: ModelConfig, decoding: BoxDecoding, cameras: tuple[str, ...] = ()
) -> Boxes3D | None:
    """Decode boxes of a network of any family into base_link, best first; None if it predicts none.

    outputs: a graph's, for one frame: `heatmap` and `box`, or `class_logits` and `box_codes`.
    """
    return family_of(model).decode_boxes(model, outputs, decoding, cameras)


def key_pose(frame_set: FrameSet, motion: MotionToKey | None) -> NDArray[np.float64] | None:
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
