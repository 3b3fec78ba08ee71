"""The ROS-free pipeline: latency by stage on each installed runtime, and its own stages against plain numpy and OpenCV."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.allocator import keep_large_blocks
from occbev.benchmarks import Options, Report, Timing, run_interleaved
from occbev.geometry import make_transform, rotation_from_rpy
from occbev.inference.backend import RUNTIMES, BackendError, RunSettings
from occbev.inference.model_package import ModelPackage, find_package
from occbev.inference.pipeline import PIPELINE_STAGES, Pipeline
from occbev.inference.postprocess import decode_occupancy
from occbev.results import CameraFrame, FrameSet, Perception
from occbev.rig import Camera, CameraRig

HEADINGS = {
    "CAM_FRONT_LEFT": 55,
    "CAM_FRONT": 0,
    "CAM_FRONT_RIGHT": -55,
    "CAM_BACK_LEFT": 110,
    "CAM_BACK": 180,
    "CAM_BACK_RIGHT": -110,
}
"""Degrees to the left in which each camera of the benchmark's rig looks."""

SIZE = (1600, 900)
OPTICAL2BODY = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])

CHOICES = {
    "openvino": ("openvino", "auto"),
    "openvino_f32": ("openvino", "f32"),
    "onnxruntime": ("onnxruntime", "f32"),
    "torch": ("torch", "f32"),
}
"""Name in the report -> runtime and precision. TensorRT is left out: building its engine takes minutes."""


def run(options: Options) -> Report:
    """Time whole frames on every runtime that is installed, then single stages against plain ones.

    The ground grid, which the node makes only while someone listens, is timed by `occbev-train bench space`.
    """
    keep_large_blocks()  # as the node does
    package, rig = ModelPackage.load(find_package(options.model)), six_cameras()
    frame_set = encode_frames(rig)
    lines, skipped = _pipelines(package, rig, options.threads)
    stages: dict[str, list[Perception]] = {name: [] for name in lines}
    whole = run_interleaved(
        {name: _record_runs(line, frame_set, stages[name]) for name, line in lines.items()},
        options.rounds,
    )
    parts = run_interleaved(_single_stages(next(iter(lines.values())), frame_set), options.rounds)
    values = {
        "runtimes": {name: _record(lines[name], whole[name], stages[name][1:]) for name in lines},
        "skipped": skipped,
        "stages": {name: round(t.wall_ms, 3) for name, t in parts.items()},
        "images": f"{len(rig)} JPEG of {SIZE[0]}x{SIZE[1]}",
    }
    fastest = min(whole, key=lambda name: whole[name].wall_ms)
    ratios = {
        f"{name}_vs_{fastest}": round(t.wall_ms / whole[fastest].wall_ms, 3)
        for name, t in whole.items()
        if name != fastest
    }
    other = package.model.name if options.model != Options().model else ""
    return Report(
        "pipeline",
        values | ({"model": f"{other}: {package.trained_on}"} if other else {}),
        ratios | _stage_ratios(parts),
        heading=f"pipeline: {other}" if other else "",
        command=f"occbev bench pipeline --model out/{other} --rounds {options.rounds}" if other else "",
    )


def six_cameras() -> CameraRig:
    """Six cameras around a car, of the size and field of view that nuScenes has."""
    return cameras_around(len(HEADINGS))


def cameras_around(count: int, size: tuple[int, int] = SIZE) -> CameraRig:
    """Cameras that look all around a car: six as nuScenes has them, or any other number, evenly turned.

    size: (width, height) of their images.
    """
    width, height = size
    headings = HEADINGS if count == len(HEADINGS) else {f"CAM_{i}": 360 * i / count for i in range(count)}
    cameras = []
    for name, degrees in headings.items():
        focal = (810.0 if name == "CAM_BACK" else 1260.0) * width / SIZE[0]
        turn = rotation_from_rpy(0, 0, np.radians(degrees))
        place = turn @ np.array([0.8, 0, 0]) + np.array([0.8, 0, 1.55])
        intrinsic = np.array([[focal, 0, width / 2], [0, focal, height * 0.54], [0, 0, 1]])
        cameras.append(Camera(name, width, height, intrinsic, make_transform(turn @ OPTICAL2BODY, place)))
    return CameraRig(tuple(cameras))


def encode_frames(rig: CameraRig) -> FrameSet:
    """One frame set of JPEG images with the detail of a street: noise at several scales."""
    generator = np.random.default_rng(0)
    frames = {}
    for camera in rig.cameras:
        image = np.zeros((camera.height, camera.width, 3), np.float32)
        for cell in (2, 8, 32, 128):
            coarse = generator.normal(0, 18, (camera.height // cell + 1, camera.width // cell + 1, 3)).astype(
                np.float32
            )
            image += cv2.resize(coarse, (camera.width, camera.height), interpolation=cv2.INTER_LINEAR)
        pixels = np.clip(image + 110, 0, 255).astype(np.uint8)
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        frames[camera.name] = CameraFrame(camera.name, 0, data)
    return FrameSet(0, frames)


def plain_network_images(
    frame_set: FrameSet, width: int, height: int, mean: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The plain form of the preprocessing: full decode, resize, crop, divide."""
    images = []
    for name in frame_set.cameras:
        frame = frame_set.frames[name]
        assert frame is not None
        assert isinstance(frame.image, bytes)
        image = np.asarray(cv2.imdecode(np.frombuffer(frame.image, np.uint8), cv2.IMREAD_COLOR))[..., ::-1]
        scaled_height = round(image.shape[0] * width / image.shape[1])
        image = np.asarray(cv2.resize(image, (width, scaled_height), interpolation=cv2.INTER_AREA))[-height:]
        images.append(((image - mean) / std).transpose(2, 0, 1))
    return np.stack(images)


def plain_occupancy(logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The plain form of decoding occupancy: softmax over all classes, then arg-max."""
    weights = np.exp(logits - logits.max(0))
    probability = weights / weights.sum(0)
    return probability.argmax(0), probability.max(0)


def _pipelines(
    package: ModelPackage, rig: CameraRig, threads: int | None
) -> tuple[dict[str, Pipeline], dict[str, str]]:
    lines, skipped = {}, {}
    for name, (runtime, precision) in CHOICES.items():
        try:
            lines[name] = Pipeline(package, rig, runtime, RunSettings(threads, precision))
        except BackendError as error:
            skipped[name] = str(error)
    if not lines:
        raise BackendError(f"none of {sorted(RUNTIMES)} can run {package.folder}: {skipped}")
    return lines, skipped


def _record_runs(line: Pipeline, frame_set: FrameSet, results: list[Perception]) -> Callable[[], None]:
    return lambda: results.append(line.run(frame_set, wants_ground=False))


def _record(line: Pipeline, timing: Timing, results: list[Perception]) -> dict[str, object]:
    stages = {
        stage: round(float(np.median([r.timings.stage_ns[stage] for r in results])) / 1e6, 3)
        for stage in PIPELINE_STAGES
    }
    return {
        "device": line.backend.device,
        "total_ms": round(timing.wall_ms, 3),
        "p95_ms": round(timing.p95_ms, 3),
        "cpu_ms": round(timing.cpu_ms, 3),
        "stage_ms": stages,
    }


def _single_stages(line: Pipeline, frame_set: FrameSet) -> dict[str, Callable[[], object]]:
    """Our stages and their plain forms, each alone."""
    model, stage = line.package.model, line.preprocessor
    mean, std = np.array(model.image.mean), np.array(model.image.std)
    shape = (len(model.occupancy_classes), *model.grid.shape[::-1])
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return {
        "images_ms": lambda: stage.prepare(frame_set, line.rig),
        "images_plain_ms": lambda: plain_network_images(frame_set, model.image.width, model.image.height, mean, std),
        "occupancy_ms": lambda: decode_occupancy(logits, model.grid, min_free=model.occupancy.min_free),
        "occupancy_plain_ms": lambda: plain_occupancy(logits),
    }


def _stage_ratios(parts: dict[str, Timing]) -> dict[str, float]:
    return {
        f"{name}_vs_plain": round(parts[f"{name}_plain_ms"].cpu_ms / parts[f"{name}_ms"].cpu_ms, 3)
        for name in ("images", "occupancy")
    }
