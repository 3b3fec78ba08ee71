"""`occbev rig` writes files that training, overlay and the node take, and that lead to the same cameras."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("rosbags", reason="reads and writes bags")

from tests.small_bags import FORWARD, Camera, Drive
from tests.test_one_reader import gather_jobs

from occbev.cli import main, view
from occbev.cli.rig import print_next
from occbev.config import ConfigError
from occbev.messages.bags import BagReader, BagWriter, type_store
from occbev.messages.topics import POSE_TYPES, load_topics
from occbev.reports.moments import Moment
from occbev.rig import CameraRig
from occbev.streams import offline
from occbev.streams.parameters import PerceptionParameters, parameters_from_record, read_parameters
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.bags import BagRecording

NAMES = ("front", "left", "rear")


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    """Cameras whose topics differ in the namespace alone, transforms on topics of their own."""
    cameras = {f"{name}/color": Camera() for name in NAMES}
    drive = Drive(cameras, tuple(("base_link", f"{name}_optical", FORWARD) for name in cameras))
    with BagWriter(tmp_path / "bag") as writer:
        for message in drive.messages():
            topic = f"/robot{message.topic}" if message.topic.startswith("/tf") else message.topic
            writer.write(replace(message, topic=topic))
    return tmp_path / "bag"


def write_topics(path: Path) -> Path:
    names = {
        name: {"image": f"/{name}/color/image_raw/compressed", "info": f"/{name}/color/camera_info"} for name in NAMES
    }
    record = {"cameras": names, "odometry": "/odom", "tf": "/robot/tf", "tf_static": "/robot/tf_static"}
    path.write_text(yaml.safe_dump(record))
    return path


def test_one_file_of_topics_serves_the_node_and_training(bag: Path, tmp_path: Path) -> None:
    given = write_topics(tmp_path / "mine.yaml")
    assert main(["rig", str(bag), "--out", str(tmp_path / "out"), "--topics", str(given)]) == 0
    topics = load_topics(tmp_path / "out" / "topics.yaml")
    recording = BagRecording(bag, BagOptions(topics))
    assert recording.rig.names == NAMES
    by_topics = parameters_from_record({"topics": str(given), "sync": {"min_cameras": 1}})
    by_parameters = read_parameters(tmp_path / "out" / "perception.yaml")
    assert list(yaml.safe_load((tmp_path / "out" / "perception.yaml").read_text())) == ["/**"]  # of any namespace
    assert by_topics.names == by_parameters.names == NAMES
    assert by_topics.anchor_camera == "front"
    for parameters in (by_topics, by_parameters):
        jobs = gather_jobs(bag, parameters)
        assert len(jobs) == len(recording.key_stamp_ns) == 4
        for job in jobs:
            assert job.frame_set is not None
            assert job.rig is not None
            assert job.frame_set.cameras == NAMES, job.missing
            for camera in job.rig.cameras:
                np.testing.assert_allclose(camera.cam2ego, recording.rig[camera.name].cam2ego)
    rig = CameraRig.load(tmp_path / "out" / "rig.yaml")
    np.testing.assert_allclose(rig["left"].intrinsic, recording.rig["left"].intrinsic)
    assert (tmp_path / "out" / "rig.yaml").read_text().startswith("# A camera rig, ")


def replay_parameters(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> PerceptionParameters:
    """Return the parameters with which `occbev replay --offline` runs."""
    seen = []
    summary = {"frames_in": 1, "frames_processed": 1, "drops": {}, "rate_hz": 0.0, "latency_ms": {}}
    monkeypatch.setattr(offline, "replay_offline", lambda bag, p, *_, **__: seen.append(p) or {"summary": summary})
    assert main(["replay", "--offline", *arguments]) == 0
    return seen[0]


def test_replay_finds_the_topics_that_rig_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("front", "left")
    drive = Drive({name: Camera() for name in names}, tuple(("base_link", f"{n}_optical", FORWARD) for n in names))
    own = str(drive.write(tmp_path / "own"))
    found = replay_parameters(monkeypatch, own, "--set", "anchor:=left", "--set", "sync.tolerance_s:=0.01")
    text = capsys.readouterr().err
    assert "cameras front (/front/image_raw/compressed), left (/left/image_raw/compressed); poses /odom. " in text
    assert f"`occbev rig {own} --out vehicle` writes them" in text
    assert (found.anchor_camera, found.sync.tolerance_s) == ("left", 0.01)
    assert main(["rig", own, "--out", str(tmp_path / "vehicle")]) == 0
    written = read_parameters(tmp_path / "vehicle" / "perception.yaml")
    assert (found.names, found.cameras, found.ego_motion) == (written.names, written.cameras, written.ego_motion)
    jobs = gather_jobs(Path(own), found)
    assert [job.frame_set.cameras for job in jobs if job.frame_set] == [names] * 4


def test_replay_looks_for_no_topics_where_they_are_named_or_as_shipped(
    bag: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = read_parameters(repository / "config" / "perception.yaml")
    image = replace(Camera(), topic="image/compressed")
    known = Drive({"cam_front": image}, (("base_link", "cam_front_optical", FORWARD),)).write(tmp_path / "known")
    given = f"topics:={write_topics(tmp_path / 'mine.yaml')}"
    assert replay_parameters(monkeypatch, str(known)) == shipped
    assert replay_parameters(monkeypatch, str(bag), "--set", given).names == NAMES
    file = ("--params-file", str(repository / "config" / "perception.yaml"))
    assert replay_parameters(monkeypatch, str(bag), *file) == shipped
    assert "found in it" not in capsys.readouterr().err


def test_a_bag_without_poses_gives_a_node_without_ego_motion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = str(Drive(odometry="").write(tmp_path / "bag"))
    assert main(["rig", bag, "--out", str(tmp_path / "vehicle")]) == 0
    said = " ".join(capsys.readouterr().out.split())  # lines are broken where the path of the bag is long
    assert "no poses: neither an odometry topic nor a transform" in said
    assert read_parameters(tmp_path / "vehicle" / "perception.yaml").ego_motion.source == "none"
    assert replay_parameters(monkeypatch, bag).ego_motion.source == "none"
    assert "poses none, so ego motion is off. " in capsys.readouterr().err


def test_a_camera_whose_name_has_a_dot_is_refused(
    bag: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write_topics(tmp_path / "mine.yaml")
    given.write_text(given.read_text().replace("front:", "front.wide:"))
    assert main(["rig", str(bag), "--topics", str(given), "--out", str(tmp_path / "vehicle")]) == 2
    assert "cameras.names: 'front.wide' has a dot" in capsys.readouterr().err
    assert not (tmp_path / "vehicle").exists()


def test_replay_refuses_a_bag_whose_topics_are_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = Drive(static=()).write(tmp_path / "bag")
    assert main(["replay", str(bag), "--offline"]) == 2
    reason, error = capsys.readouterr().err.splitlines()[-2:]
    assert reason.startswith("topics were not found automatically: ")
    assert "front" in reason
    assert "none of the configured image topics is in this bag. Configured: /cam_back/" in error


def without_calibration(tmp_path: Path) -> tuple[Path, Path]:
    """Write a bag of two cameras without camera_info and camera frames, and the rig file that has them."""
    names = ("front", "left")
    drive = Drive({name: Camera() for name in names}, tuple(("base_link", f"{n}_optical", FORWARD) for n in names))
    recording = BagRecording(drive.write(tmp_path / "whole"))
    recording.rig.save(tmp_path / "rig.yaml")
    with BagWriter(tmp_path / "bare") as writer:
        for message in replace(drive, static=()).messages():
            if not message.topic.endswith("/camera_info"):
                writer.write(message)
    return tmp_path / "bare", tmp_path / "rig.yaml"


def test_replay_takes_a_rig_file_for_a_bag_without_camera_info(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bag, rig = without_calibration(tmp_path)
    found = replay_parameters(monkeypatch, str(bag), "--set", f"rig:={rig}")
    assert f"`occbev rig {bag} --rig {rig} --out vehicle` writes them" in capsys.readouterr().err
    jobs = gather_jobs(bag, found)
    assert [job.frame_set.cameras for job in jobs if job.frame_set] == [("front", "left")] * 4
    assert not any(job.missing for job in jobs)
    np.testing.assert_allclose(jobs[0].rig["left"].cam2ego, FORWARD, atol=1e-9)


def test_rig_writes_parameters_of_a_bag_without_camera_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag, rig = without_calibration(tmp_path)
    assert main(["rig", str(bag), "--out", str(tmp_path / "out")]) == 2
    assert "a rig file has the calibration: occbev rig BAG --rig RIG.yaml --out vehicle" in capsys.readouterr().err
    assert main(["rig", str(bag), "--rig", str(rig), "--out", str(tmp_path / "out")]) == 0
    assert f"topics.yaml --rig {tmp_path / 'out' / 'rig.yaml'} --out overlay" in capsys.readouterr().out
    parameters = read_parameters(tmp_path / "out" / "perception.yaml")
    assert parameters.rig == str(tmp_path / "out" / "rig.yaml")
    assert CameraRig.load(parameters.rig).hash == CameraRig.load(rig).hash
    assert not any(job.missing for job in gather_jobs(bag, parameters))


def test_printed_commands_can_be_pasted_where_a_path_has_a_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_next(tmp_path / "my bag", Path("vehicle"), Path("a rig.yaml"))
    overlay, replay = capsys.readouterr().out.removeprefix("Next:").splitlines()
    words = ["occbev", "overlay", str(tmp_path / "my bag"), "--topics", "vehicle/topics.yaml"]
    assert shlex.split(overlay, comments=True) == [*words, "--rig", "a rig.yaml", "--out", "overlay"]
    assert shlex.split(replay, comments=True)[:3] == ["occbev", "replay", str(tmp_path / "my bag")]


def test_view_finds_the_topics_that_replay_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("front", "left")
    drive = Drive({name: Camera() for name in names}, tuple(("base_link", f"{n}_optical", FORWARD) for n in names))
    bag, shown = drive.write(tmp_path / "own"), list[Moment]()
    monkeypatch.setattr(view, "import_rerun", lambda: None)
    monkeypatch.setattr(view, "_show", lambda moments, title, args: shown.extend(moments) or 0)
    assert main(["view", str(bag)]) == 0
    assert [tuple(moment.images) for moment in shown] == [names] * 4


@pytest.mark.parametrize("kind", POSE_TYPES[1:])
def test_stamped_poses_place_node_and_training_alike(bag: Path, tmp_path: Path, kind: str) -> None:
    with BagReader(bag) as given, BagWriter(tmp_path / "poses") as writer:
        for message in given.messages():
            if message.topic == "/odom":
                odometry = given.decode(message)
                pose = odometry.pose.pose if kind == POSE_TYPES[1] else odometry.pose
                data = type_store().serialize_cdr(type_store().types[kind](odometry.header, pose), kind)
                message = replace(message, type=kind, data=bytes(data))
            writer.write(message)
    names = write_topics(tmp_path / "mine.yaml")
    assert main(["rig", str(tmp_path / "poses"), "--out", str(tmp_path / "out"), "--topics", str(names)]) == 0
    parameters = read_parameters(tmp_path / "out" / "perception.yaml")
    assert parameters.ego_motion.odometry_type == kind
    recording, plain = (BagRecording(path, BagOptions(load_topics(names))) for path in (tmp_path / "poses", bag))
    np.testing.assert_allclose(recording.trajectory.ego2global, plain.trajectory.ego2global)
    jobs, wanted = (gather_jobs(path, parameters) for path in (tmp_path / "poses", bag))
    assert len(jobs) == len(wanted) == 4
    for job, other in zip(jobs, wanted, strict=True):
        np.testing.assert_allclose(job.motion["left"], other.motion["left"])
    with pytest.raises(ConfigError, match="odometry_type 'Pose': must be nav_msgs/msg/Odometry, "):
        parameters_from_record({"ego_motion": {"odometry_type": "Pose"}})


def test_a_file_of_topics_names_the_cameras_beside_the_shipped_parameters(repository: Path, tmp_path: Path) -> None:
    """`occbev replay BAG --set topics:=mine.yaml` takes the parameter file that is shipped, of six other cameras."""
    shipped, given = repository / "config" / "perception.yaml", write_topics(tmp_path / "mine.yaml")
    parameters = read_parameters(shipped, {"topics": str(given)})
    assert parameters.names == NAMES
    assert parameters.anchor_camera == "front"
    assert parameters.cameras["rear"].topic == "/rear/color/image_raw/compressed"
    with pytest.raises(ConfigError, match=r"anchor 'side' is not one of cameras.names"):
        read_parameters(shipped, {"topics": str(given), "anchor": "side"})


def test_parameters_that_are_set_hold_over_the_file(tmp_path: Path) -> None:
    given = str(write_topics(tmp_path / "mine.yaml"))
    cameras = {"names": ["rear", "front"], "rear": {"topic": "/other"}}
    chosen = parameters_from_record({"topics": given, "cameras": cameras, "tf_topic": "/mine/tf"})
    assert chosen.names == ("rear", "front")
    assert chosen.cameras["rear"].topic == "/other"
    assert chosen.cameras["front"].topic == "/front/color/image_raw/compressed"
    assert (chosen.tf_topic, chosen.tf_static_topic) == ("/mine/tf", "/robot/tf_static")
    with pytest.raises(ConfigError, match=r"topics: .*absent.yaml"):
        parameters_from_record({"topics": str(tmp_path / "absent.yaml")})


def test_files_that_are_there_stay(bag: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = write_topics(tmp_path / "mine.yaml"), tmp_path / "out"
    command = ["rig", str(bag), "--out", str(out), "--topics", str(given)]
    assert main(command) == 0
    assert main(command) == 2
    assert "topics.yaml exists; choose another folder, or give --force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
