"""Check a calibration: draw LiDAR, boxes and voxels over the images of a recording.

    occbev overlay my_bag --out overlay
    occbev overlay my_bag --topics vehicle/topics.yaml --out overlay
    occbev overlay nuscenes-root --scene scene-0061 --out overlay --model occbev-tiny

Points that lie on the edges of what they hit show that intrinsics, extrinsics, clocks and ego motion agree. Each point
is moved by the ego motion between its sweep and the camera's own exposure. Status 1: images contradict the calibration.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from occbev.files import file_name
from occbev.geometry import invert_transform, transform_points
from occbev.inference.pipeline import Pipeline, motion_to_key
from occbev.inference.preprocess import decode_image
from occbev.messages.topics import load_topics
from occbev.reports.rendering import (
    GROUND_TRUTH,
    BoxStyle,
    Picture,
    beside,
    bev_picture,
    camera_mosaic,
    draw_boxes,
    draw_points,
    draw_voxels,
    occupancy_from_above,
    occupancy_in_3d,
    stack_pictures,
    write_picture,
)
from occbev.results import Boxes3D, CameraFrame, FrameSet, Perception, Sweep
from occbev.rig import Camera, CameraRig

if TYPE_CHECKING:
    from occbev_training.sources.recording import Recording

LEAST_DEPTH = 1.0
"""Metres; nearer points are the vehicle itself."""

NOTHING = Boxes3D.empty()


@dataclass(frozen=True)
class Coverage:
    """How many LiDAR points fall into an image, and the median of their depths in metres (None without points)."""

    points: int
    median_depth: float | None


@dataclass(frozen=True)
class FrameReport:
    """What was found in one key frame. sweep_ms: the sweep's time minus the key's. missing: camera -> reason."""

    recording: str
    key: int
    stamp_ns: int
    sweep_ms: float
    cameras: dict[str, Coverage]
    missing: dict[str, str]
    pictures: list[str]


@dataclass(frozen=True)
class CalibrationReport:
    """What the images of a recording say of its rig: camera -> verdict, and one line for each fault."""

    recording: str
    cameras: dict[str, str]
    faults: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", type=Path, help="ROS 2 bag (folder, .mcap, .db3) or nuScenes data root")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--model", help="model package: draw its boxes and voxels as well")
    parser.add_argument("--backend", default="auto", help="runtime of the model (default: auto)")
    parser.add_argument("--topics", type=Path, help="YAML file that names a bag's topics; `occbev rig` writes one")
    parser.add_argument("--rig", type=Path, help="rig file, in place of a bag's camera_info")
    parser.add_argument("--base-frame", default="base_link", help="frame of the vehicle in a bag (default: base_link)")
    parser.add_argument("--scene", help="only this scene of a nuScenes root")
    parser.add_argument("--version", help="folder of the tables, if a nuScenes root has several")
    parser.add_argument(
        "--frames", type=int, default=10, help="largest number of key frames of a recording (default: 10)"
    )
    parser.add_argument(
        "--max-gap",
        type=float,
        default=0.1,
        help="largest time in seconds between key frame and sweep (default: 0.1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Write pictures, print points and median depth of every camera; 1 where images contradict the calibration."""
    if args.frames < 1 or args.max_gap < 0:
        raise ValueError(f"--frames {args.frames}, --max-gap {args.max_gap}: at least 1 and at least 0")
    args.out.mkdir(parents=True, exist_ok=True)
    reports: list[FrameReport] = []
    calibration: list[CalibrationReport] = []
    why = ""
    for recording in _recordings(args):
        found = list(_overlay(recording, args))
        why = why or ("" if found else _why_nothing(recording))
        reports += found
        if found:
            calibration.append(_judge(recording))
    if not reports:
        raise LookupError(f"{args.source}: no key frame has both an image and a sweep within {args.max_gap} s{why}")
    if args.json:
        record = {"frames": [asdict(report) for report in reports], "calibration": [asdict(c) for c in calibration]}
        print(json.dumps({"source": str(args.source)} | record, indent=2))
    else:
        _print(reports, args.out)
        _print_calibration(calibration)
    return 1 if any(report.faults for report in calibration) else 0


def lidar_in_camera(
    sweep: Sweep, lidar_ego2global: NDArray[np.float64], frame: CameraFrame, camera: Camera
) -> tuple[NDArray[np.float64], Coverage]:
    """Move a compensated sweep into a camera through both ego poses.

    Returns: the points (M, 3) deeper than 1 m and inside the image, in ego at the camera's exposure; and how many.
    """
    assert frame.ego2global is not None, "frames without a pose are left out before"
    lidar2ego = invert_transform(frame.ego2global) @ lidar_ego2global @ sweep.lidar2ego
    points = transform_points(lidar2ego, sweep.points)
    _, depth, inside = camera.project(points)
    inside &= depth > LEAST_DEPTH
    median = float(np.median(depth[inside])) if inside.any() else None
    return points[inside], Coverage(int(inside.sum()), median)


def nearest_sweep(recording: Recording, stamp_ns: int, max_gap: float) -> int | None:
    """Return the sweep nearest to a stamp, or None where none is within `max_gap` seconds."""
    if len(recording.sweep_stamp_ns) == 0:
        return None
    gap = np.abs(recording.sweep_stamp_ns - stamp_ns)
    index = int(np.argmin(gap))
    return index if gap[index] <= max_gap * 1e9 else None


def _recordings(args: argparse.Namespace) -> Iterator[Recording]:
    """Open a folder with nuScenes tables as a data root, anything else as a bag."""
    try:
        from occbev_training.sources.bag_index import BagOptions
        from occbev_training.sources.bags import BagRecording
        from occbev_training.sources.nuscenes import find_tables, open_nuscenes
    except ImportError as error:
        raise LookupError(
            f"reading recordings needs the offline package ({error}): pip install --no-deps ./training"
        ) from error
    if not args.source.exists():
        raise FileNotFoundError(f"{args.source}: no such bag or nuScenes data root")
    if args.source.is_dir() and find_tables(args.source):
        scenes = [args.scene] if args.scene else None
        yield from open_nuscenes(args.source, args.version).recordings(scenes, available_only=True)
    else:
        topics = None if args.topics is None else load_topics(args.topics)
        rig = None if args.rig is None else CameraRig.load(args.rig)
        yield BagRecording(args.source, BagOptions(topics, base_frame=args.base_frame, rig=rig))


def _overlay(recording: Recording, args: argparse.Namespace) -> Iterator[FrameReport]:
    pipeline = Pipeline(args.model, recording.rig, args.backend) if args.model else None
    for rows in pipeline.seen_rows if pipeline else []:
        Console(stderr=True).print(str(rows), style="yellow" if rows.cuts_horizon else None, markup=False)
    written = 0
    for key, stamp_ns in enumerate(recording.key_stamp_ns.tolist()):
        sweep_index = nearest_sweep(recording, stamp_ns, args.max_gap)
        if sweep_index is None or written >= args.frames:
            continue
        frame_set = _set_pose(recording.frame_set(key))
        if frame_set.cameras:
            yield _overlay_frame(recording, key, sweep_index, frame_set, pipeline, args.out)
            written += 1


def _why_nothing(recording: Recording) -> str:
    """Return what the first key frame lacks, as the end of a sentence."""
    if not len(recording.sweep_stamp_ns):
        return ": there is no LiDAR sweep"
    if not len(recording.key_stamp_ns):
        return ": there is no key frame"
    missing = _set_pose(recording.frame_set(0)).missing
    return "".join(f"; {name}: {reason}" for name, reason in missing.items())


def _judge(recording: Recording) -> CalibrationReport:
    """Compare the calibration with the images over several key frames."""
    from occbev_training.occupancy.extrinsics import judge_rig

    verdict = judge_rig(recording)
    return CalibrationReport(recording.name, {v.camera: v.text for v in verdict.cameras}, verdict.faults)


def _set_pose(frame_set: FrameSet) -> FrameSet:
    """Count cameras without an ego pose as missing: nothing can be moved to them."""
    unposed = {
        name: "no ego pose at its exposure"
        for name in frame_set.cameras
        if (frame := frame_set.frames[name]) is not None and frame.ego2global is None
    }
    frames = {name: None if name in unposed else frame for name, frame in frame_set.frames.items()}
    return replace(frame_set, frames=frames, missing={**frame_set.missing, **unposed})


def _overlay_frame(
    recording: Recording, key: int, sweep_index: int, frame_set: FrameSet, pipeline: Pipeline | None, out: Path
) -> FrameReport:
    from occbev_training.sources.deskew import compensated

    sweep = compensated(recording.sweep(sweep_index), recording.trajectory)
    motion = motion_to_key(frame_set, recording.trajectory.at(frame_set.stamp_ns))
    annotations = recording.annotations(key)
    truth = annotations.boxes if annotations else NOTHING
    images, lidar, coverage, at_key = {}, {}, {}, {}
    for name in frame_set.cameras:
        frame, camera = frame_set.frames[name], recording.rig[name]
        assert frame is not None
        image = frame.image if isinstance(frame.image, np.ndarray) else decode_image(frame.image, name)
        points, coverage[name] = lidar_in_camera(sweep, recording.trajectory.at(sweep.stamp_ns), frame, camera)
        lidar[name] = draw_points(image, camera, points, radius=max(1, camera.width // 500))
        images[name], at_key[name] = image, replace(camera, cam2ego=motion[name] @ camera.cam2ego)
    pictures = {"lidar": camera_mosaic(lidar)}
    if pipeline:
        perception, model = pipeline.run(frame_set, motion), pipeline.package
        note = f"voxels in 3D, {model.model.name} trained on {model.trained_on}"
        pictures |= _result_pictures(images, at_key, truth, perception, note)
    elif len(truth):
        pictures["boxes"] = _label_picture(images, at_key, truth)
    names = _write(pictures, out, f"{file_name(recording.name, 'drive name')}_{key:04d}")
    sweep_ms = (sweep.stamp_ns - frame_set.stamp_ns) / 1e6
    return FrameReport(recording.name, key, frame_set.stamp_ns, sweep_ms, coverage, dict(frame_set.missing), names)


def _label_picture(images: dict[str, Picture], cameras: dict[str, Camera], truth: Boxes3D) -> Picture:
    """Labels over the images and from above, in their class colours."""
    drawn = {
        name: draw_boxes(image, cameras[name], truth, BoxStyle(thickness=_line(image)))
        for name, image in images.items()
    }
    return stack_pictures([camera_mosaic(drawn), beside({"labels from above": bev_picture(truth)})])


def _result_pictures(
    images: dict[str, Picture], cameras: dict[str, Camera], truth: Boxes3D, perception: Perception, note: str
) -> dict[str, Picture]:
    """Predicted boxes beside dashed labels, and predicted voxels; over the images, from above and in 3D."""
    boxes, voxels, occupancy = {}, {}, perception.occupancy
    for name, image in images.items():
        labelled = draw_boxes(image, cameras[name], truth, replace(GROUND_TRUTH, thickness=_line(image)))
        boxes[name] = draw_boxes(labelled, cameras[name], perception.boxes, BoxStyle(thickness=_line(image)))
        voxels[name] = draw_voxels(image, cameras[name], occupancy)
    views = {
        "boxes (dashed: labels)": bev_picture(perception.boxes, truth, size=600),
        "voxels from above": occupancy_from_above(occupancy, 600),
    }
    space = beside({note: occupancy_in_3d(occupancy, boxes=perception.boxes)})
    return {
        "boxes": stack_pictures([camera_mosaic(boxes), beside(views)]),
        "voxels": stack_pictures([camera_mosaic(voxels), space]),
    }


def _line(image: Picture) -> int:
    """Line thickness that survives the mosaic's scaling."""
    return max(1, image.shape[1] // 400)


def _write(pictures: dict[str, Picture], out: Path, stem: str) -> list[str]:
    names = [f"{stem}_{kind}.jpg" for kind in pictures]
    for name, picture in zip(names, pictures.values(), strict=True):
        write_picture(str(out / name), picture)
    return names


def _print(reports: list[FrameReport], out: Path) -> None:
    console = Console()
    for report in reports:
        title = f"{report.recording}, key frame {report.key}, sweep {report.sweep_ms:+.1f} ms"
        table = Table("camera", "points", "median depth (m)", title=escape(title), title_justify="left")
        for name, found in report.cameras.items():
            table.add_row(
                escape(name),
                str(found.points),
                "-" if found.median_depth is None else f"{found.median_depth:.3f}",
            )
        for name, reason in report.missing.items():
            table.add_row(escape(name), "-", escape(reason))
        console.print(table)
    count: Any = sum(len(report.pictures) for report in reports)
    console.print(f"{count} pictures in {escape(str(out))}")


def _print_calibration(reports: list[CalibrationReport]) -> None:
    console = Console()
    for report in reports:
        for name, text in report.cameras.items():
            console.print(f"{report.recording}: {name}: {text}", highlight=False, markup=False, soft_wrap=True)
        for fault in report.faults:
            console.print(
                f"{report.recording}: calibration contradicts the images: {fault}",
                style="red",
                markup=False,
                soft_wrap=True,
            )
