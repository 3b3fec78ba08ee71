"""A recorded run read back for viewers: images with their results, LiDAR in base_link, latency and losses by key time."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="makes output messages with ROS 2")
pytest.importorskip("vision_msgs", reason="needs vision_msgs, which the set-up builds")

from tests import small_bags
from tests.small_bags import FORWARD, PERIOD, START, Camera, Drive, base2odom

from occbev.classes import FREE, OCCUPIED_STATE
from occbev.cli import main
from occbev.geometry import make_transform, rotation_from_rpy, transform_points
from occbev.grid import GRIDS
from occbev.inference.model_package import ModelPackage
from occbev.messages.bags import BagMessage, BagReader, BagWriter, serialise
from occbev.reports import rerun_log
from occbev.reports.moments import Moment
from occbev.reports.space import unpack_voxels
from occbev.reports.summaries import summarise
from occbev.results import Boxes3D, Occupancy, Perception, Timings
from occbev.ros.outputs import encoder
from occbev.streams.kept_inputs import keep_inputs
from occbev.streams.parameters import parameters_from_record
from occbev.streams.recorded_moments import recorded_moments
from occbev.streams.run_report import write_run_report

GRID = GRIDS["tiny"]
SETS = 4
LIDAR2BASE = make_transform(rotation_from_rpy(0, 0, 0.5), (1.0, 0.0, 2.0))
RETURNS = np.array([[5.0, 0, 0], [0, 7, -1], [-9, 2, 0.5]], np.float32)
CLOUD_DELAY = 20_000_000
CAMERAS: dict[str, Any] = {
    "names": ["front", "rear"],
    **{n: {"topic": f"/{n}/image_raw/compressed", "info_topic": f"/{n}/camera_info"} for n in ("front", "rear")},
}
RECORD = {"anchor": "front", "cameras": CAMERAS, "ego_motion": {"odometry_topic": "/odom"}, "model": "occbev-tiny"}


def lidar(stamp_ns: int) -> BagMessage:
    fields = [small_bags.make("sensor_msgs/msg/PointField", axis, 4 * i, 7, 1) for i, axis in enumerate("xyz")]
    data = np.frombuffer(RETURNS.tobytes(), np.uint8)
    header = small_bags.header(stamp_ns, "lidar")
    message = serialise("sensor_msgs/msg/PointCloud2", header, 1, 3, fields, False, 12, 36, data, True)
    return BagMessage("/lidar/points", "sensor_msgs/msg/PointCloud2", stamp_ns + 1, message)


def perception(number: int) -> Perception:
    stamp_ns = START + number * PERIOD
    label, state = np.full(GRID.shape, FREE, np.uint8), np.ones(GRID.shape, np.uint8)
    label[20 + number, 3, 2], state[20 + number, 3, 2] = 4, OCCUPIED_STATE
    boxes = Boxes3D(
        np.array([[8, number, 0.8, 4.5, 1.9, 1.6, 0.2, 3, 1]], np.float32), np.array([0]), np.ones(1, np.float32)
    )
    occupancy = Occupancy(label, np.ones(GRID.shape, np.float32), state, GRID)
    return Perception(stamp_ns, boxes, occupancy, Timings({}))


@pytest.fixture
def bags(tmp_path: Path) -> tuple[Path, Path]:
    """The drive with its LiDAR, and the recorded run, in which the second key time was lost."""
    static = [("base_link", f"{n}_optical", FORWARD) for n in ("front", "rear")] + [("base_link", "lidar", LIDAR2BASE)]
    messages = Drive({"front": Camera(), "rear": Camera(delay_ns=5_000_000)}, static=static, sets=SETS).messages()
    messages += [lidar(START + number * PERIOD + CLOUD_DELAY) for number in range(SETS)]
    with BagWriter(tmp_path / "drive") as writer:
        for message in sorted(messages, key=lambda m: m.log_ns):
            writer.write(message)
    parameters, frames = parameters_from_record(RECORD), []
    with BagReader(tmp_path / "drive") as bag, BagWriter(tmp_path / "run") as writer:
        for number in range(SETS):
            fate: dict[str, Any] = {"outcome": "too_late"}
            if number != 1:
                fate = {"outcome": "processed", "stages_ms": {"total": 100.0 + number}, "missing": {}}
                for message in encoder(parameters)(perception(number)):
                    writer.write(message)
            frames.append({"stamp_ns": START + number * PERIOD, **fate})
        keep_inputs(writer, bag, parameters, frames)
    return tmp_path / "drive", tmp_path / "run"


@pytest.fixture
def moments(bags: tuple[Path, Path]) -> list[Moment]:
    return list(recorded_moments(*bags, parameters_from_record(RECORD), GRID))


def test_every_key_time_has_its_images_and_the_results_that_there_were(moments: list[Moment]) -> None:
    assert [m.stamp_ns for m in moments] == [START + n * PERIOD for n in range(SETS)]
    assert all(set(m.images) == {"front", "rear"} for m in moments)
    assert [m.boxes is None for m in moments] == [False, True, False, False]
    for number in (0, 2, 3):
        wanted, found = perception(number), moments[number]
        np.testing.assert_allclose(found.boxes.box, wanted.boxes.box, atol=1e-5)  # type: ignore[union-attr]
        np.testing.assert_array_equal(found.occupancy.label, wanted.occupancy.label)  # type: ignore[union-attr]
        assert found.ground is not None


def test_latency_and_losses_stand_at_their_key_time(moments: list[Moment]) -> None:
    assert [dict(m.latency_ms) for m in moments] == [{"total": 100.0}, {}, {"total": 102.0}, {"total": 103.0}]
    assert [dict(m.dropped) for m in moments] == [{}, *[{"too_late": 1}] * 3]


def test_lidar_is_carried_to_the_key_time(moments: list[Moment]) -> None:
    number = 2
    at_key, at_cloud = base2odom(number * PERIOD / 1e9), base2odom((number * PERIOD + CLOUD_DELAY) / 1e9)
    wanted = transform_points(np.linalg.inv(at_key) @ at_cloud @ LIDAR2BASE, RETURNS)
    np.testing.assert_allclose(moments[number].clouds["lidar_points"], wanted, atol=2e-2)
    assert np.abs(wanted - transform_points(LIDAR2BASE, RETURNS)).max() > 0.1, "the vehicle moves in between"


def test_a_rear_camera_that_fires_later_stands_where_it_was_then(moments: list[Moment]) -> None:
    rig = moments[2].rig
    assert rig is not None
    np.testing.assert_allclose(rig["front"].cam2ego, FORWARD, atol=1e-6)
    assert rig["rear"].cam2ego[0, 3] - FORWARD[0, 3] == pytest.approx(0.04, abs=5e-3)  # 8 m/s, 5 ms


def test_the_recorded_run_alone_is_enough(bags: tuple[Path, Path], moments: list[Moment]) -> None:
    alone = list(recorded_moments(bags[1], bags[1], parameters_from_record(RECORD), GRID))
    assert [m.stamp_ns for m in alone] == [m.stamp_ns for m in moments]
    assert [m.boxes is None for m in alone] == [m.boxes is None for m in moments]
    assert not alone[0].clouds
    assert alone[0].images == moments[0].images


def test_results_that_belong_to_no_image_are_shown_alone(bags: tuple[Path, Path], tmp_path: Path) -> None:
    parameters = parameters_from_record(RECORD)
    with BagWriter(tmp_path / "more") as writer:
        for message in encoder(parameters)(perception(-3)):
            writer.write(message)
    found = list(recorded_moments(bags[0], tmp_path / "more", parameters, GRID))
    assert found[0].stamp_ns == START - 3 * PERIOD
    assert found[0].boxes is not None
    assert not found[0].images
    assert len(found) == 1 + SETS


def test_the_command_writes_a_file_for_the_viewer(
    bags: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rerun", reason="needs the extra view")
    monkeypatch.setattr("occbev.cli.view._grid", lambda parameters: GRID)
    file = tmp_path / "node.yaml"
    file.write_text(yaml.safe_dump({"/**": {"ros__parameters": RECORD}}))
    out = tmp_path / "new/run.rrd"
    assert main(["view", *map(str, bags), "--params-file", str(file), "--save", str(out)]) == 0
    data = out.read_bytes()
    assert data.startswith(b"RRF")
    for path in (b"world/prediction/voxels", b"world/cameras/front/boxes", b"world/lidar", b"plots/latency/total"):
        assert path in data, path
    one = tmp_path / "one.rrd"
    assert main(["view", str(bags[1]), "--params-file", str(file), "--save", str(one), "--frames", "1"]) == 0
    assert b"plots/lost/too_late" not in one.read_bytes()


def test_a_replay_has_a_report_without_truth(
    bags: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = SimpleNamespace(model=SimpleNamespace(grid=GRID, name="stub"), hash="0", trained_on="<nothing>")
    monkeypatch.setattr(ModelPackage, "load", lambda folder: stub)
    done = [{"stamp_ns": START + n * PERIOD, "outcome": "processed", "stages_ms": {"total": 90.0}} for n in (0, 2, 3)]
    lost = {"stamp_ns": START + PERIOD, "outcome": "too_late"}
    summary = summarise([*({**f, "missing": {}, "published_ns": f["stamp_ns"]} for f in done), lost], {"/x": 3})
    page = tmp_path / "new/report.html"
    result = {"frames": [*done, lost], "summary": summary, "offline": True}
    write_run_report(page, *bags, parameters_from_record(RECORD), result)
    text = page.read_text()
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script', text, re.DOTALL)[1])  # type: ignore[index]
    assert [len(panels) for panels in data["moments"]] == [1, 1, 1], "no truth, and none for the lost key time"
    index, label, _ = unpack_voxels(data["moments"][1][0]["voxels"], GRID.shape)
    assert (index.tolist(), label.tolist()) == ([[22, 3, 2]], [4])
    assert "3 of 4" in text
    assert "1 too_late" in text
    assert "truth of this drive is not known" in text
    assert text.count("<img") == 3
    assert "&lt;nothing&gt;" in text


def test_without_the_viewer_one_line_says_how_to_install_it(
    bags: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert main(["view", str(bags[1])]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("occbev view: the viewer is not installed here: ")
    assert error.endswith(f"-m pip install '{rerun_log.REQUIREMENT}'")


def test_wrong_sources_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rerun", reason="needs the extra view")
    assert main(["view", str(tmp_path / "nothing")]) == 2
    assert "nothing: no such bag" in capsys.readouterr().err
    assert main(["view", "a", "b", "c"]) == 2
    assert "3 sources" in capsys.readouterr().err
