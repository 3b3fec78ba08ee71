"""Every runtime gives what torch gives, on rigs of any size, from one exported package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from occbev.config import (  # noqa: E402
    BevEncoderConfig,
    DepthConfig,
    DetectionHeadConfig,
    ImageConfig,
    LiftConfig,
    OccupancyHeadConfig,
)
from occbev.frame_job import FrameJob  # noqa: E402
from occbev.geometry import make_transform, rotation_from_yaw  # noqa: E402
from occbev.grid import BevGrid, VoxelGrid  # noqa: E402
from occbev.inference.backend import FACTORS, Backend, RunSettings, load_backend  # noqa: E402
from occbev.inference.families.lift_splat import LiftSplatModel  # noqa: E402
from occbev.inference.model_package import ModelPackage, write_package  # noqa: E402
from occbev.inference.pipeline import Pipeline, motion_to_key  # noqa: E402
from occbev.inference.table_cache import TableCache  # noqa: E402
from occbev.inference.tables import TableCapacityError  # noqa: E402
from occbev.results import CameraFrame, FrameSet  # noqa: E402
from occbev.rig import Camera, CameraRig  # noqa: E402
from occbev_training.export.package import write_ir, write_onnx  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.models.families import make_graph  # noqa: E402
from occbev_training.models.heads.occupancy_head import interleave  # noqa: E402

MODEL = replace(
    LiftSplatModel(),
    name="probe",
    image=ImageConfig(width=96, height=64),
    lift=LiftConfig(channels=16, depth=DepthConfig(1.0, 13.0, 1.0), max_points=4096),
    bev=BevGrid((-12.8, -12.8), (0.8, 0.8), (32, 32)),
    bev_encoder=BevEncoderConfig(channels=(16, 16, 16), blocks=(1, 1, 1), out_channels=16),
    grid=VoxelGrid((-8.0, -8.0, -1.0), (0.4, 0.4, 0.4), (40, 40, 16)),
    occupancy=OccupancyHeadConfig(channels=16, height_channels=4),
    detection=DetectionHeadConfig(channels=16),
)
ONE, F32 = RunSettings(threads=1), RunSettings(threads=1, precision="f32")
FORWARD = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
RUNTIMES = {"openvino": 0.02, "onnxruntime": 1e-4}
"""Runtime -> largest difference from torch as a share of an output's largest value; the IR rounds weights to fp16."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a probe this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    torch.manual_seed(0)
    network, folder = build_model(MODEL, "finetune").eval(), tmp_path_factory.mktemp("probe")
    save_weights(folder / "weights.safetensors", network.state_dict(), {})
    write_onnx(make_graph(network), MODEL, folder / "model.onnx")
    write_ir(network, MODEL, folder / "model.xml", compress=True)
    return write_package(folder, MODEL, {"data": "nothing"}, {})


def rig(cameras: int) -> CameraRig:
    optics = [[160, 0, 120], [0, 160, 90], [0, 0, 1]]
    poses = [
        make_transform(rotation_from_yaw(2 * np.pi * i / cameras) @ FORWARD, [0.5, 0, 1.5]) for i in range(cameras)
    ]
    return CameraRig(tuple(Camera(f"camera{i}", 240, 180, np.array(optics), pose) for i, pose in enumerate(poses)))


def frames(cameras: CameraRig, missing: str | None = None, seed: int = 0) -> FrameSet:
    generator = np.random.default_rng([len(cameras), seed])
    pose = make_transform(np.eye(3), [3.0, 1.0, 0])
    images = {c.name: generator.integers(0, 255, (c.height, c.width, 3), np.uint8) for c in cameras.cameras}
    present = {name: None if name == missing else CameraFrame(name, 1, image, pose) for name, image in images.items()}
    return FrameSet(1, present, {missing: "silent"} if missing else {})


def outputs(backend: Backend, cameras: CameraRig, missing: str | None = None) -> dict[str, np.ndarray]:
    line = Pipeline(ModelPackage(Path(), MODEL), cameras, backend)
    images, valid, network_rig = line.preprocessor.prepare(frames(cameras, missing), cameras)
    tables = TableCache(MODEL, backend.form).tables(network_rig)
    inputs = {
        "images": images[None],
        "camera_valid": valid[None],
        **tables,
    }
    return {name: array.copy() for name, array in backend.run(inputs).items()}


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("cameras", [1, 5, 7])
def test_every_runtime_equals_torch_on_any_rig(package: ModelPackage, name: str, cameras: int) -> None:
    expected = outputs(load_backend(package, cameras, "torch", ONE), rig(cameras))
    found = outputs(load_backend(package, cameras, name, F32), rig(cameras))
    assert set(expected) == {"occupancy_logits", "heatmap", "box"}
    if set(FACTORS) <= set(found):
        occupied, _, class_probability = (torch.from_numpy(found.pop(key)) for key in FACTORS)
        share = torch.from_numpy(expected.pop("occupancy_logits")).softmax(1)
        occupied = interleave(occupied.flatten(1, 2))
        torch.testing.assert_close(occupied, 1 - share[:, -1:], atol=0.02, rtol=0)
        likeliest = (share[:, :-1].amax(1) / occupied[:, 0])[..., ::2, ::2]
        torch.testing.assert_close(class_probability, likeliest, atol=0.02, rtol=0)
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert found[key].shape == array.shape
        assert np.abs(found[key] - array).max() <= RUNTIMES[name] * np.abs(array).max(), key


@pytest.mark.parametrize("name", ["torch", *RUNTIMES])
def test_a_missing_camera_changes_outputs_alike(package: ModelPackage, name: str) -> None:
    backend = load_backend(package, 6, name, F32)
    whole, part = outputs(backend, rig(6)), outputs(backend, rig(6), missing="camera2")
    assert np.abs(whole["heatmap"] - part["heatmap"]).max() > 1e-3
    expected = outputs(load_backend(package, 6, "torch", ONE), rig(6), missing="camera2")
    np.testing.assert_allclose(part["heatmap"], expected["heatmap"], atol=0.02 * np.abs(expected["heatmap"]).max())


def test_the_pipeline_agrees_between_runtimes_and_reloads_for_another_rig(
    package: ModelPackage,
) -> None:
    lines = {name: Pipeline(package, rig(6), name, F32) for name in ("torch", "onnxruntime")}
    for cameras in (rig(6), rig(4)):
        results = []
        for line in lines.values():
            line.set_rig(cameras)
            line.warm_up()
            results.append(line.run(frames(cameras), motion_to_key(frames(cameras), np.eye(4))))
        a, b = results
        assert (a.occupancy.label == b.occupancy.label).mean() > 0.999
        assert len(a.boxes) == len(b.boxes)
        assert a.boxes.cameras == cameras.names


def test_a_rig_beyond_the_capacity_is_an_error_with_both_numbers(package: ModelPackage) -> None:
    with pytest.raises(TableCapacityError, match=r"needs \d+ .*holds 4096"):
        outputs(load_backend(package, 32, "torch", ONE), rig(32))


def test_outputs_are_kept_for_as_many_runs_as_a_runtime_says(package: ModelPackage) -> None:
    for name in RUNTIMES:
        backend, cameras = load_backend(package, 2, name, ONE), rig(2)
        line = Pipeline(package, cameras, backend)
        images, _, network_rig = line.preprocessor.prepare(frames(cameras), cameras)
        tables = TableCache(MODEL, backend.form).tables(network_rig)
        inputs = {"images": images[None], "camera_valid": np.ones((1, 2), np.float32), **tables}
        first = backend.run(inputs)
        before = {key: array.copy() for key, array in first.items()}
        for _ in range(backend.kept_outputs - 1):
            backend.run({**inputs, "images": -inputs["images"]})
        for key, array in before.items():
            np.testing.assert_array_equal(first[key], array)


def test_two_sets_in_flight_give_what_one_after_the_other_gives(package: ModelPackage) -> None:
    cameras = rig(3)
    sets = [frames(cameras, seed=seed) for seed in range(4)]
    one = Pipeline(package, cameras, "openvino", RunSettings(2, "f32"))
    two = Pipeline(package, cameras, "openvino", RunSettings(2, "f32", at_once=2))
    assert "2 frame sets at once" in two.backend.device
    expected = [one.run(frame_set).occupancy.evidence.obstacle for frame_set in sets]
    jobs = [FrameJob(frame_set.stamp_ns, frame_set=frame_set) for frame_set in sets]
    found = []
    for job, before in zip(jobs, [None, *jobs], strict=False):
        two.prepare(job)
        two.infer(job)
        if before is not None:
            found.append(two.decode(before))
    found.append(two.decode(jobs[-1]))
    assert all(result.timings.stage_ns["inference"] > 0 for result in found)
    occupied = np.stack([result.occupancy.evidence.obstacle for result in found])
    np.testing.assert_allclose(occupied, expected, atol=1e-6)
    assert np.ptp(occupied, axis=0).max() > 1e-5, "the sets differ"


def test_logits_are_left_out_where_a_graph_has_factors(package: ModelPackage) -> None:
    found = outputs(load_backend(package, 2, "openvino", ONE), rig(2))
    assert set(found) == {*FACTORS, "heatmap", "box"}
