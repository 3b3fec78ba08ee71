"""Real nuScenes frames as bags: the node publishes for every key frame that has images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("vision_msgs", reason="built by occbev.ros.build_interfaces")

from occbev.cli import main
from occbev.inference.model_package import PackageError, find_package
from occbev_training.cli import main as train_main

OUTPUTS = {"objects", "occupancy/points", "occupancy/grid", "occupancy/obstacles", "markers"}


@pytest.mark.ros
@pytest.mark.slow
@pytest.mark.parametrize(
    ("root", "scene", "keys"),
    [("nuscenes-one", "scene-0061", 1), ("nuscenes-0103", "scene-0103", 2)],
)
def test_every_key_frame_with_images_gives_boxes_and_voxels(
    shared: Path, tmp_path: Path, root: str, scene: str, keys: int
) -> None:
    model = os.environ.get("OCCBEV_TEST_MODEL", "occbev-tiny")
    try:
        find_package(model)
    except PackageError as error:
        pytest.skip(str(error))
    assert train_main(["nuscenes-to-bag", str(shared / "data" / root), str(tmp_path)]) == 0
    report = tmp_path / "replay.json"
    record = tmp_path / "recorded"
    arguments = ["replay", str(tmp_path / scene), "--model", model, "--record", str(record)]
    slow_machine = ["--set", "max_waiting_sets:=4", "--set", "sync.timeout_s:=2.0"]
    assert main([*arguments, "--json", str(report), *slow_machine]) == 0
    summary = json.loads(report.read_text())["summary"]
    assert (summary["frames_in"], summary["frames_processed"]) == (keys, keys)
    assert summary["drops"] == {}
    assert summary["partial"] == 0
    assert summary["published"] == {f"/perception/output/{name}": keys for name in OUTPUTS}
