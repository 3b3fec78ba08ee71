"""From a bag of a rig that nobody knows to a package that runs: four cameras of two sizes, with topics of their own."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from tests.small_bags import Drive  # noqa: E402
from tests.small_network import SMALL  # noqa: E402

from occbev.cli import main as occbev  # noqa: E402
from occbev.geometry import make_transform, rotation_from_rpy  # noqa: E402
from occbev.grid import BevGrid  # noqa: E402
from occbev.inference.model_package import ModelPackage, write_package  # noqa: E402
from occbev.rig import Camera, CameraRig  # noqa: E402
from occbev_training.cli import main  # noqa: E402
from occbev_training.cli.learn import next_command  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive  # noqa: E402
from occbev_training.sources import bag_writer  # noqa: E402

MODEL = replace(SMALL, lift=replace(SMALL.lift, max_points=6144), bev=BevGrid((-16, -16), (1, 1), (32, 32)))

YAWS = {"nose": 0.0, "port": 90.0, "tail": 180.0, "starboard": -90.0}
OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def a_rig() -> CameraRig:
    cameras = []
    for name, yaw in YAWS.items():
        width, height = (160, 120) if name in ("nose", "tail") else (96, 72)
        intrinsic = np.array([[0.55 * width, 0, width / 2], [0, 0.55 * width, height / 2], [0, 0, 1]])
        rotation = rotation_from_rpy(0, 0, np.deg2rad(yaw)) @ OPTICAL
        place = [0.8 + 0.6 * np.cos(np.deg2rad(yaw)), 0.5 * np.sin(np.deg2rad(yaw)), 1.5]
        cameras.append(Camera(name, width, height, intrinsic, make_transform(rotation, place)))
    return CameraRig(tuple(cameras))


@pytest.mark.parametrize("topics", [None, "topics.yaml"])
def test_the_next_command_takes_the_rig_that_was_given(tmp_path: Path, topics: str | None) -> None:
    args = argparse.Namespace(out=tmp_path, topics=topics and Path(topics), rig=Path("rig.yaml"))
    command = shlex.split(next_command(args, [Path("my bag")]))
    assert command[:3] == ["occbev", "replay", "my bag"]
    if topics is None:
        assert command[3:] == ["--model", str(tmp_path / "package"), "--set", "rig:=rig.yaml"]
    else:
        written = yaml.safe_load(Path(command[-1]).read_text())["/**"]["ros__parameters"]
        assert written["rig"] == str(Path("rig.yaml").resolve())


def test_nothing_is_planned_without_a_drive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_transforms = Drive(static=()).write(tmp_path / "bad")
    assert main(["learn", str(without_transforms), "--out", str(tmp_path / "out"), "--plan"]) == 2
    assert "no drive can be used: " in (text := capsys.readouterr().err)
    assert "front_optical" in text


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A simulated drive as a bag, and the file that names its topics."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bag_writer, "image_topic", lambda camera: f"/rig/{camera}/jpeg")
        patch.setattr(bag_writer, "info_topic", lambda camera: f"/rig/{camera}/calibration")
        config = DriveConfig(keys=12, key_rate=5.0, supersample=1.0, rig=a_rig(), grid=MODEL.grid)
        bag_writer.write_bag(SimulatedDrive(41, config), folder / "monday")
    names = {name: {"image": f"/rig/{name}/jpeg", "info": f"/rig/{name}/calibration"} for name in YAWS}
    topics = folder / "topics.yaml"
    found = {"lidar": bag_writer.LIDAR_TOPIC, "odometry": bag_writer.ODOMETRY_TOPIC}
    topics.write_text(yaml.safe_dump({"cameras": names, **found}))
    return folder / "monday", topics


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    torch.manual_seed(0)
    save_weights(folder / "weights.safetensors", build_model(MODEL, "finetune").state_dict(), {})
    write_package(folder, MODEL, {"data": "nothing yet"}, {})
    return folder


@pytest.mark.slow
def test_a_bag_of_an_unknown_rig_becomes_a_package_that_runs(
    bag: tuple[Path, Path], package: Path, tmp_path: Path
) -> None:
    drive, topics = bag
    out = tmp_path / "mine"
    way = ["learn", str(drive), "--out", str(out), "--package", str(package), "--topics", str(topics)]
    assert main([*way, "--steps", "2", "--rehearsal-drives", "1", "--workers", "1"]) == 0
    made = ModelPackage.load(out / "package")
    assert made.provenance["adapted"]["drives"] == ["monday"]
    assert "adapted without labels" in made.trained_on
    scores = made.metrics["held_out_part_of_the_drives"]
    assert {"iou", "RayIoU", "obstacle_depth_error"} <= set(scores["before"])
    assert scores["before"]["frames"] == made.provenance["adapted"]["held_out_pairs"] > 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") >= 1
    assert "car AP" in page, "rehearsed streets have boxes"
    summary = tmp_path / "replay.json"
    play = ["replay", str(drive), "--params-file", str(out / "perception.yaml"), "--offline", "--json", str(summary)]
    assert occbev(play) == 0
    assert json.loads(summary.read_text())["summary"]["frames_processed"] >= 10
