"""The ROS-free line: order, timings, motion, missing cameras and failures, around a backend that answers known maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from occbev.config import ImageConfig, LiftConfig
from occbev.frame_job import FrameJob
from occbev.geometry import make_transform, rotation_from_yaw
from occbev.grid import BevGrid, VoxelGrid
from occbev.inference.backend import BackendError
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.model_package import ModelPackage
from occbev.inference.pipeline import PIPELINE_STAGES, Pipeline, motion_to_key
from occbev.inference.postprocess import BoxDecoding, OutputError
from occbev.inference.preprocess import ImageError
from occbev.inference.tables import bag_tables, lift_points
from occbev.results import CameraFrame, FrameSet
from occbev.rig import Camera, CameraRig

FORWARD = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
MODEL = replace(
    LiftSplatModel(),
    image=ImageConfig(width=64, height=32),
    lift=LiftConfig(max_points=2048),
    bev=BevGrid((-8.0, -8.0), (1.0, 1.0), (16, 16)),
    grid=VoxelGrid((-4.0, -4.0, -1.0), (0.5, 0.5, 1.0), (16, 16, 2)),
)


class KnownBackend:
    """Answers fixed maps and keeps what it was asked."""

    name, form, device, kept_outputs, at_once = "known", "bag", "none", 1, 1

    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.heatmap = np.full((1, 10, 16, 16), -9.0, np.float32)
        self.heatmap[0, 0, 8, 11] = 3.0
        self.logits = np.zeros((1, 18, 2, 16, 16), np.float32)
        self.logits[:, 17] = 6.0
        self.logits[0, 4, 1, 8, 15] = 10.0

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        self.inputs = {name: array.copy() for name, array in inputs.items()}
        return {
            "occupancy_logits": self.logits,
            "heatmap": self.heatmap,
            "box": np.zeros((1, 10, 16, 16), np.float32),
        }


def rig(names: tuple[str, ...] = ("left", "front", "right")) -> CameraRig:
    turn = {"left": 1.0, "front": 0.0, "right": -1.0, "back": np.pi}
    optics = [[60, 0, 64], [0, 60, 40], [0, 0, 1]]
    pose = {name: make_transform(rotation_from_yaw(turn[name]) @ FORWARD, [1, 0, 1.5]) for name in names}
    return CameraRig(tuple(Camera(name, 128, 72, optics, pose[name]) for name in names))


def encoded(value: int) -> bytes:
    return cv2.imencode(".png", np.full((72, 128, 3), value, np.uint8))[1].tobytes()


def frame_set(*names: str, missing: str | None = None, stamp_ns: int = 100) -> FrameSet:
    frames = {name: CameraFrame(name, 90 + i, encoded(40 * i)) for i, name in enumerate(names)}
    slots: dict[str, CameraFrame | None] = dict(frames)
    if missing:
        slots[missing] = None
    return FrameSet(stamp_ns, slots, {missing: "silent"} if missing else {})


def job_of(frames: FrameSet) -> FrameJob:
    return FrameJob(frames.stamp_ns, missing=frames.missing, frame_set=frames)


@pytest.fixture
def backend() -> KnownBackend:
    return KnownBackend()


def pipeline(backend: KnownBackend, cameras: CameraRig | None = None, **options: Any) -> Pipeline:
    return Pipeline(ModelPackage(folder=None, model=MODEL), cameras or rig(), backend, **options)  # type: ignore[arg-type]


def test_one_frame_set_becomes_boxes_and_voxels(backend: KnownBackend) -> None:
    result = pipeline(backend).run(frame_set("left", "front", "right"))
    assert result.stamp_ns == 100
    np.testing.assert_allclose(result.boxes.box[:, :2], [[3, 0]])
    assert result.boxes.cameras == result.occupancy.cameras == ("left", "front", "right")
    assert result.occupancy.label[15, 8, 1] == 4
    assert result.occupancy.state[15, 8, 1] == 2
    assert result.occupancy.state[0, 8, 1] == 0, "nothing looks back"
    assert tuple(result.timings.stage_ns) == PIPELINE_STAGES
    assert all(duration >= 0 for duration in result.timings.stage_ns.values())


def test_inputs_follow_the_rig_not_the_frame_order(backend: KnownBackend) -> None:
    pipeline(backend).run(frame_set("right", "left", "front"))
    means = backend.inputs["images"][0].mean(axis=(1, 2, 3))
    assert means[2] < means[0] < means[1]
    assert backend.inputs["images"].shape == (1, 3, 3, 32, 64)
    np.testing.assert_array_equal(backend.inputs["camera_valid"], [[1, 1, 1]])


def test_a_missing_camera_is_a_fact(backend: KnownBackend) -> None:
    whole = pipeline(backend).run(frame_set("left", "front", "right"))
    result = pipeline(backend).run(frame_set("left", "front", missing="right"))
    np.testing.assert_array_equal(backend.inputs["camera_valid"], [[1, 1, 0]])
    assert not backend.inputs["images"][0, 2].any()
    assert result.missing == {"right": "silent"}
    assert result.boxes.cameras == ("left", "front")
    assert (result.occupancy.state == 0).sum() > (whole.occupancy.state == 0).sum()


def test_tables_follow_each_cameras_own_motion(backend: KnownBackend) -> None:
    line, cameras = pipeline(backend), rig()
    moved = {name: make_transform(np.eye(3), [0.4 * i, 0, 0]) for i, name in enumerate(cameras.names)}
    line.run(frame_set(*cameras.names), moved)
    network = cameras.move_cameras(moved[name] for name in cameras.names)
    network_size = [c.resize(0.5, 0.5, (0, 4), (64, 32)) for c in network.cameras]
    points = lift_points(
        [c.intrinsic for c in network_size],
        [c.cam2ego for c in network_size],
        (64, 32),
        MODEL.lift,
        MODEL.bev,
    )
    for name, table in bag_tables(points, MODEL.bev, MODEL.lift.max_points).items():
        np.testing.assert_array_equal(backend.inputs[name], table)
    still = dict(backend.inputs)
    line.run(frame_set(*cameras.names))
    assert not np.array_equal(still["table_pixel"], backend.inputs["table_pixel"])


def test_the_ground_grid_is_made_where_it_is_wanted(backend: KnownBackend) -> None:
    line, made = pipeline(backend), []
    for wants_ground in (True, False):
        job = job_of(frame_set("left", "front", "right"))
        job.wants_ground = wants_ground
        line.prepare(job)
        line.infer(job)
        made.append(line.decode(job))
    assert made[0].ground is not None
    assert made[1].ground is None
    np.testing.assert_array_equal(made[0].occupancy.state, made[1].occupancy.state)


def test_motion_must_name_every_camera_that_is_present(backend: KnownBackend) -> None:
    with pytest.raises(LookupError, match="right"):
        pipeline(backend).run(frame_set("left", "front", "right"), {"left": np.eye(4), "front": np.eye(4)})
    pipeline(backend).run(frame_set("left", "front", missing="right"), {"left": np.eye(4), "front": np.eye(4)})


def test_motion_to_key_carries_a_standing_point() -> None:
    at_capture = make_transform(rotation_from_yaw(0.3), [10, 5, 0])
    at_key = make_transform(rotation_from_yaw(0.35), [10.5, 5.2, 0])
    frames = FrameSet(2, {"front": CameraFrame("front", 1, b"", at_capture), "left": None}, {"left": "silent"})
    motion = motion_to_key(frames, at_key)
    point_global = np.array([20.0, 7.0, 1.0, 1.0])
    at_key_ego = motion["front"] @ np.linalg.inv(at_capture) @ point_global
    np.testing.assert_allclose(at_key_ego, np.linalg.inv(at_key) @ point_global, atol=1e-9)
    with pytest.raises(LookupError, match="front"):
        motion_to_key(FrameSet(2, {"front": CameraFrame("front", 1, b"")}), at_key)


def test_another_rig_replaces_tables_and_view(backend: KnownBackend) -> None:
    line = pipeline(backend)
    line.warm_up()
    line.run(frame_set("left", "front", "right"))
    line.set_rig(rig(("front", "back")))
    result = line.run(frame_set("front", "back"))
    assert backend.inputs["images"].shape[1] == 2
    assert result.occupancy.state[0, 8, 1] == 1, "now something looks back"


def test_a_rig_that_cannot_be_loaded_leaves_the_one_before(
    backend: KnownBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = pipeline(backend)
    before = line.rig

    def refuse(cameras: int) -> None:
        raise BackendError(f"{cameras} cameras are too many")

    monkeypatch.setattr(line, "_load", refuse)
    with pytest.raises(BackendError, match="4 cameras"):
        line.set_rig(rig(("left", "front", "right", "back")))
    assert line.rig is before


def test_failures_name_their_cause(backend: KnownBackend) -> None:
    line = pipeline(backend, decoding=BoxDecoding(threshold=0.3))
    with pytest.raises(ValueError, match="holds no image"):
        line.run(FrameSet(7, {"left": None, "front": None, "right": None}, {"left": "silent"}))
    cut = frame_set("left", "front", "right")
    frames = dict(cut.frames) | {"front": CameraFrame("front", 1, encoded(3)[:50])}
    with pytest.raises(ImageError, match="camera front"):
        line.run(replace(cut, frames=frames))
    backend.heatmap[0, 0, 0, 0] = np.nan
    with pytest.raises(OutputError, match="not finite"):
        line.run(cut)
    backend.run = lambda inputs: {"heatmap": backend.heatmap}  # type: ignore[method-assign]
    with pytest.raises(OutputError, match=r"lacks the outputs .*'occupancy_logits'.*'box'"):
        line.run(cut)


def test_a_network_may_say_only_boxes_or_only_voxels(backend: KnownBackend) -> None:
    everything = pipeline(backend).run(frame_set("left", "front", "right"))
    run = backend.run
    backend.run = lambda inputs: {  # type: ignore[method-assign]
        k: v for k, v in run(inputs).items() if k != "occupancy_logits"
    }
    boxes_only = pipeline(backend).run(frame_set("left", "front", "right"))
    np.testing.assert_array_equal(boxes_only.boxes.box, everything.boxes.box)
    assert not boxes_only.occupancy.state.any()
    assert not boxes_only.occupancy.confidence.any()
    backend.run = lambda inputs: {  # type: ignore[method-assign]
        "occupancy_logits": run(inputs)["occupancy_logits"]
    }
    voxels_only = pipeline(backend).run(frame_set("left", "front", "right"))
    assert len(voxels_only.boxes) == 0
    np.testing.assert_array_equal(voxels_only.occupancy.label, everything.occupancy.label)


@pytest.mark.parametrize("kept", [1, 2])
def test_a_set_may_be_finished_while_the_next_has_begun(backend: KnownBackend, kept: int) -> None:
    backend.kept_outputs = kept
    line = pipeline(backend)
    first = job_of(frame_set("left", "front", "right", stamp_ns=100))
    second = job_of(frame_set("left", "front", missing="right", stamp_ns=200))
    line.prepare(first)
    line.infer(first)
    weaker, backend.heatmap = backend.heatmap, backend.heatmap - 1.0
    line.prepare(second)
    line.infer(second)
    results = [line.decode(first), line.decode(second)]
    assert [r.stamp_ns for r in results] == [100, 200]
    assert results[0].boxes.score[0] > results[1].boxes.score[0]
    assert results[1].boxes.cameras == ("left", "front")
    assert [list(r.timings.stage_ns) for r in results] == [list(PIPELINE_STAGES)] * 2
    backend.heatmap = weaker
    again = line.run(frame_set("left", "front", "right", stamp_ns=100))
    np.testing.assert_array_equal(again.boxes.box, results[0].boxes.box)
