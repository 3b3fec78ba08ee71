"""Replay over real DDS into a node with a stub network, and offline: same sets, every frame accounted for."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("rosbags", reason="reads and writes bags")

from occbev.cli import main
from occbev.inference.preprocess import decode_image
from occbev.messages.bags import BagError, BagMessage, BagReader, BagWriter, type_store
from occbev.reports.summaries import LOST, UNANSWERED, frames_of, summarise
from occbev.streams.frame_log import read_frame_log
from occbev.streams.parameters import PerceptionParameters, parameters_from_record

pytestmark = pytest.mark.ros

CAMERAS = ("CAM_FRONT", "CAM_LEFT", "CAM_RIGHT")
START = 1_700_000_000_000_000_000
PERIOD = 100_000_000


class BagDrive:
    """Writes a small drive with moving odometry as a bag."""

    def __init__(self, path: Path) -> None:
        self.types = type_store().types
        self.path, self.queue = path, []

    def header(self, stamp: int, frame: str) -> Any:
        time = self.types["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9))
        return self.types["std_msgs/msg/Header"](time, frame)

    def add(self, log_ns: int, topic: str, kind: str, *fields: Any) -> None:
        message = self.types[kind](*fields)
        self.queue.append(BagMessage(topic, kind, log_ns, bytes(type_store().serialize_cdr(message, kind))))

    def camera(self, name: str, stamp: int, data: bytes) -> None:
        frame = name.lower()
        region = self.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
        k = np.array([50.0, 0, 32, 0, 50, 24, 0, 0, 1])
        p = np.array([50.0, 0, 32, 0, 0, 50, 24, 0, 0, 0, 1, 0])
        self.add(
            stamp,
            f"/{frame}/camera_info",
            "sensor_msgs/msg/CameraInfo",
            self.header(stamp, frame),
            48,
            64,
            "plumb_bob",
            np.zeros(0),
            k,
            np.eye(3).reshape(-1),
            p,
            0,
            0,
            region,
        )
        self.add(
            stamp + 1,
            f"/{frame}/image/compressed",
            "sensor_msgs/msg/CompressedImage",
            self.header(stamp, frame),
            "jpeg",
            np.frombuffer(data, np.uint8),
        )

    def transforms(self) -> None:
        g = "geometry_msgs/msg/"
        turn = self.types[g + "Quaternion"](-0.5, 0.5, -0.5, 0.5)
        transform = self.types[g + "Transform"](self.types[g + "Vector3"](1.0, 0.0, 1.5), turn)
        stamped = [
            self.types[g + "TransformStamped"](self.header(START, "base_link"), name.lower(), transform)
            for name in CAMERAS
        ]
        self.add(START - PERIOD, "/tf_static", "tf2_msgs/msg/TFMessage", stamped)

    def odometry(self, stamp: int, x: float) -> None:
        g = "geometry_msgs/msg/"
        pose = self.types[g + "Pose"](
            self.types[g + "Point"](x, 0.0, 0.0), self.types[g + "Quaternion"](0.0, 0.0, 0.0, 1.0)
        )
        zero = self.types[g + "Vector3"](0.0, 0.0, 0.0)
        twist = self.types[g + "TwistWithCovariance"](self.types[g + "Twist"](zero, zero), np.zeros(36))
        self.add(
            stamp,
            "/odometry",
            "nav_msgs/msg/Odometry",
            self.header(stamp, "odom"),
            "base_link",
            self.types[g + "PoseWithCovariance"](pose, np.zeros(36)),
            twist,
        )

    def write(self, sets: int, bad: dict[int, bytes] | None = None, latched: Collection[str] = ("/tf_static",)) -> Path:
        """Write `sets` sets at 10 Hz, cameras 10 ms apart; `bad` replaces CAM_LEFT's images by number."""
        pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
        self.transforms()
        for i in range(sets * 5 + 20):
            stamp = START - PERIOD // 2 + i * 20_000_000
            self.odometry(stamp, x=10.0 * (stamp - START) / 1e9)
        for i in range(sets):
            for index, name in enumerate(CAMERAS):
                data = (bad or {}).get(i, jpeg) if name == "CAM_LEFT" else jpeg
                self.camera(name, START + i * PERIOD + index * 10_000_000, data)
        with BagWriter(self.path, latched) as writer:
            for message in sorted(self.queue, key=lambda m: m.log_ns):
                writer.write(message)
        return self.path


def record() -> dict[str, Any]:
    """Parameters for the topics of such a bag."""
    cameras = {
        name: {
            "topic": f"/{name.lower()}/image/compressed",
            "info_topic": f"/{name.lower()}/camera_info",
        }
        for name in CAMERAS
    }
    return {
        "cameras": {"names": list(CAMERAS), **cameras},
        "ego_motion": {"odometry_topic": "/odometry"},
    }


def overrides() -> dict[str, Any]:
    """The same as keyword arguments of `make_bench`."""
    values = {"ego_motion.odometry_topic": "/odometry"}
    for name, entry in record()["cameras"].items():
        if name != "names":
            values |= {f"cameras.{name}.{key}": value for key, value in entry.items()}
    return values


@pytest.fixture
def parameters() -> PerceptionParameters:
    return parameters_from_record(record())


def play(bench: Any, bag: BagReader, parameters: PerceptionParameters, passes: int = 1, **options: Any) -> Any:
    """Play a bag to a bench's node; return the player's log."""
    from occbev.ros import player_node

    player = player_node.PlayerNode(
        bag, player_node.plan(bag, parameters), parameters, context=bench.node.context, **options
    )
    shares: list[float] = []
    try:
        with player_node.Spinner(player):
            player.wait_for_perception(60)
            player.play(shares.append, passes=passes)
            bench.wait(lambda: sum(bench.node.frame_log.outcomes.values()) >= len(player.log.anchors))
            counts = player.log.received
            bench.wait(lambda: all(len(m) >= bench.node.frame_log.outcomes["processed"] for m in counts.values()))
    finally:
        player.destroy_node()
    assert shares[-1] == 1.0
    return player.log


def test_a_bag_goes_through_the_node_and_its_answers_into_a_bag(
    make_bench: Callable[..., Any], parameters: PerceptionParameters, tmp_path: Path
) -> None:
    path = BagDrive(tmp_path / "bag").write(12)
    bench = make_bench(wait=False, **overrides())
    with BagReader(path) as bag, BagWriter(tmp_path / "out") as writer:
        book = play(bench, bag, parameters, writer=writer)
    lines = read_frame_log(tmp_path / "frame_log.jsonl")
    frames = frames_of(book.anchors, book.sent, lines, "CAM_FRONT")
    summary = summarise(frames, {t: len(m) for t, m in book.received.items()})
    assert (summary["frames_in"], summary["frames_processed"], summary["drops"]) == (12, 12, {})
    assert set(summary["published"].values()) == {12}
    assert summary["latency_ms"]["total"]["p50"] > 0
    assert all(f["stages_ms"]["total"] < 10_000 for f in frames)
    assert summary["rate_hz"] > 0
    with BagReader(tmp_path / "out") as out:
        objects = list(out.messages(["/perception/output/objects"]))
        assert out.topics["/perception/output/objects"] == "vision_msgs/msg/Detection3DArray"
    message = type_store().deserialize_cdr(objects[0].data, objects[0].type)
    assert message.detections[0].results[0].hypothesis.class_id == "car"
    stamps = [[s for s, _ in messages] for messages in book.received.values()]
    assert all(s == book.anchors for s in stamps)


def test_offline_refuses_a_bag_without_the_topics(tmp_path: Path, stub_pipeline: Any) -> None:
    from occbev.streams.offline import OfflineReplay

    wanted = parameters_from_record({"cameras": {"names": ["REAR"], "REAR": {"topic": "/rear"}}})
    path = BagDrive(tmp_path / "bag").write(1)
    with (
        BagReader(path) as bag,
        pytest.raises(BagError, match=r"Configured: /rear\. In the bag: /cam_front"),
    ):
        OfflineReplay(wanted, stub_pipeline(wanted)).feed.topics(bag)


def test_offline_sees_the_same_sets_and_motion_as_the_node(
    make_bench: Callable[..., Any], parameters: PerceptionParameters, tmp_path: Path
) -> None:
    from occbev.streams.offline import OfflineReplay

    path = BagDrive(tmp_path / "bag").write(8, bad={3: b"\xff\xd8\xffbroken"})
    bench = make_bench(wait=False, ego_motion__wait_s=1.0, **overrides())
    live = bench.pipeline
    offline = type(live)(parameters)
    with BagReader(path) as bag:
        play(bench, bag, parameters)
        replay = OfflineReplay(parameters, offline)
        results = list(replay.results(bag))
    assert len(results) == len(live.seen) == 8
    for ours, theirs, a, b in zip(offline.seen, live.seen, offline.motions, live.motions, strict=True):
        assert (ours.stamp_ns, ours.cameras) == (theirs.stamp_ns, theirs.cameras)
        assert set(ours.missing) == set(theirs.missing)
        for name in ours.cameras:
            assert np.array_equal(pixels(ours.frames[name]), pixels(theirs.frames[name]))
            np.testing.assert_allclose(a[name], b[name], atol=1e-9)
    assert offline.rigs[-1].hash == live.rigs[-1].hash
    assert "CAM_LEFT" in offline.seen[3].missing
    # 10 m/s and 10 ms between cameras.
    assert offline.motions[0]["CAM_RIGHT"][0, 3] == pytest.approx(0.2, abs=1e-6)


def test_offline_says_that_ego_motion_is_missing(
    tmp_path: Path, stub_pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from occbev.streams.offline import OfflineReplay

    motion = {"source": "odometry", "odometry_topic": "/nowhere"}
    parameters = parameters_from_record({**record(), "ego_motion": motion})
    with BagReader(BagDrive(tmp_path / "bag").write(2)) as bag:
        results = list(OfflineReplay(parameters, stub_pipeline(parameters)).results(bag))
    assert len(results) == 2
    (line,) = [r.message for r in caplog.records if "not compensated" in r.message]
    assert line.endswith("no odometry was received on /nowhere")


def pixels(frame: Any) -> np.ndarray:
    """Return a frame's pixels; what came before its calibration is still encoded."""
    image = frame.image
    return decode_image(image, frame.camera) if isinstance(image, bytes) else image


def test_a_looped_bag_is_accounted_for_pass_by_pass(
    make_bench: Callable[..., Any], parameters: PerceptionParameters, tmp_path: Path
) -> None:
    path = BagDrive(tmp_path / "bag").write(25)
    bench = make_bench(wait=False, **overrides())
    with BagReader(path) as bag:
        book = play(bench, bag, parameters, passes=2)
    assert len(book.anchors) == 50
    frames = frames_of(book.anchors, book.sent, read_frame_log(tmp_path / "frame_log.jsonl"), "CAM_FRONT")
    outcomes = [frame["outcome"] for frame in frames]
    # What is on its way when time goes back may be dropped, on a busy machine more of it; all of it is counted.
    assert set(outcomes) <= {"processed", "late", "previous_pass", "duplicate"}
    assert outcomes[:20] == ["processed"] * 20
    assert outcomes[-10:] == ["processed"] * 10
    done = [frame["published_ns"] for frame in frames if frame["outcome"] == "processed"]
    assert done == sorted(done)
    assert all(0 < f["stages_ms"]["total"] < 60_000 for f in frames if "stages_ms" in f)


def test_passes_and_twins_are_told_apart() -> None:
    def line(at: int, outcome: str = "processed") -> dict[str, Any]:
        return {
            "stamp_ns": 5,
            "outcome": outcome,
            "at_ns": at,
            "published_ns": at,
            "images": {"A": 5},
            "cameras": ["A"],
            "missing": {},
            "boxes": 0,
            "stages_ms": {},
        }

    second = 10**9
    sent = {"A": {5: [0, 10 * second, 10 * second + 1, 20 * second]}}
    node = [line(10 * second + 3, "duplicate"), line(10 * second + 9), line(20 * second + 7)]
    frames = frames_of([5, 5, 5, 5], sent, node, "A")
    assert [f["outcome"] for f in frames] == ["lost_before_the_node", "processed", "duplicate", "processed"]
    assert frames[1]["stages_ms"]["total"] == 8e-6
    assert frames[3]["stages_ms"]["total"] == 7e-6


def test_an_image_without_a_line_has_the_outcome_that_can_be_known() -> None:
    sent = {"CAM_FRONT": {5: [1]}}
    for outcome in (LOST, UNANSWERED):
        (frame,) = frames_of([5], sent, [], "CAM_FRONT", outcome)
        assert frame["outcome"] == outcome


@pytest.mark.parametrize("options", [["--offline"], ["--record", "x"]])
def test_loops_and_what_needs_unique_stamps_exclude_each_other(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(tmp_path), "--loop", "2", *options]) == 2
    assert "--loop 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--offline", "--rate", "2", "--no-node"], "--rate, --no-node cannot be used with --offline"),
        (["--offline", "--node-log", "x", "--namespace", "y"], "--namespace, --node-log cannot be used with --offline"),
        (["--boxes", "x"], "--boxes needs --offline"),
        (["--offline", "--set", "sync.min_camera:=2"], "sync.min_camera"),
        (["--offline", "--set", "threads"], "want NAME:=VALUE"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(tmp_path), *options]) == 2
    assert text in capsys.readouterr().err


def test_offline_takes_parameters_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from occbev.streams import offline

    seen = []
    summary = {"frames_in": 0, "frames_processed": 0, "drops": {}, "rate_hz": 0.0, "latency_ms": {}}
    monkeypatch.setattr(offline, "replay_offline", lambda bag, p, *_, **__: seen.append(p) or {"summary": summary})
    file = parameter_file(tmp_path)
    changes = ["--set", "sync.timeout_s:=1", "--set", "ego_motion.source:=none", "--backend", "torch"]
    main(["replay", "bag", "--offline", "--params-file", file, *changes])
    assert (seen[0].sync.timeout_s, seen[0].ego_motion.source, seen[0].backend) == (1.0, "none", "torch")
    assert seen[0].ego_motion.odometry_topic == "/odometry"


def test_a_slower_rate_takes_longer(
    make_bench: Callable[..., Any], parameters: PerceptionParameters, tmp_path: Path
) -> None:
    path = BagDrive(tmp_path / "bag").write(5)
    bench = make_bench(wait=False, **overrides())
    with BagReader(path) as bag:
        book = play(bench, bag, parameters, rate=0.5)
    sent = sorted(t for times in book.sent["CAM_FRONT"].values() for t in times)
    assert (sent[-1] - sent[0]) / 1e9 >= 0.5  # 0.4 s of bag at half speed, less how late the first was


def parameter_file(tmp_path: Path) -> str:
    path = tmp_path / "perception.yaml"
    path.write_text(json.dumps({"/**": {"ros__parameters": record()}}))
    return str(path)


def test_a_bag_with_none_of_the_topics_is_refused_with_both_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BagDrive(tmp_path / "bag").write(1)
    other = tmp_path / "other.yaml"
    other.write_text(
        json.dumps({"/**": {"ros__parameters": {"cameras": {"names": ["REAR"], "REAR": {"topic": "/rear"}}}}})
    )
    assert main(["replay", str(path), "--params-file", str(other)]) == 2
    text = capsys.readouterr().err
    assert "none of the configured image topics" in text
    assert "/rear" in text
    assert "/cam_front/image/compressed" in text


def test_topics_given_on_the_command_line_are_those_that_are_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BagDrive(tmp_path / "bag").write(sets=1)
    given = [f"--set=cameras.{name}.topic:=/moved/{name.lower()}" for name in CAMERAS]
    assert main(["replay", str(path), "--params-file", parameter_file(tmp_path), *given]) == 2
    assert "Configured: /moved/cam_front, " in capsys.readouterr().err


def test_a_node_that_cannot_start_ends_the_replay_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BagDrive(tmp_path / "bag").write(1)
    log = tmp_path / "node.log"
    status = main(
        [
            "replay",
            str(path),
            "--params-file",
            parameter_file(tmp_path),
            "--model",
            str(tmp_path / "no_such_model"),
            "--node-log",
            str(log),
        ]
    )
    assert status == 2
    assert "ended before it was ready" in capsys.readouterr().err
    assert "no_such_model" in log.read_text()


def test_a_damaged_bag_is_refused_at_its_end(
    parameters: PerceptionParameters, tmp_path: Path, stub_pipeline: Any
) -> None:
    from occbev.streams.offline import OfflineReplay

    path = BagDrive(tmp_path / "bag").write(3)
    metadata = (path / "metadata.yaml").read_text()
    (path / "metadata.yaml").write_text(metadata.replace("message_count: 3", "message_count: 5", 1))
    with (
        BagReader(path) as bag,
        pytest.raises(BagError, match="promises .* messages but .* were read"),
    ):
        list(OfflineReplay(parameters, stub_pipeline(parameters)).results(bag))


def test_waiting_for_a_node_that_never_comes_names_the_topics(parameters: PerceptionParameters, tmp_path: Path) -> None:
    from occbev.ros import player_node

    context = player_node.start_context()
    with BagReader(BagDrive(tmp_path / "bag").write(1)) as bag, contextlib.ExitStack() as stack:
        stack.callback(context.try_shutdown)
        player = player_node.PlayerNode(bag, player_node.plan(bag, parameters), parameters, context=context)
        stack.callback(player.destroy_node)
        with pytest.raises(TimeoutError, match="/cam_front/image/compressed"):
            player.wait_for_perception(0.2)
        stopper = threading.Timer(0.1, player.stop)
        stopper.start()
        player.play(lambda _: None)
        stopper.join()


def test_what_was_recorded_for_late_comers_is_played_for_them(parameters: PerceptionParameters, tmp_path: Path) -> None:
    from rclpy.qos import DurabilityPolicy

    from occbev.ros import player_node

    lasting = {"/tf_static", "/cam_left/camera_info"}
    context = player_node.start_context()
    path = BagDrive(tmp_path / "bag").write(1, latched=lasting)
    with BagReader(path) as bag, contextlib.ExitStack() as stack:
        stack.callback(context.try_shutdown)
        player = player_node.PlayerNode(bag, player_node.plan(bag, parameters), parameters, context=context)
        stack.callback(player.destroy_node)
        offered = {t: player.get_publishers_info_by_topic(t)[0].qos_profile.durability for t in bag.topics}
    assert {t for t, kind in offered.items() if kind == DurabilityPolicy.TRANSIENT_LOCAL} == lasting


def test_a_bag_is_read_in_python_as_it_is_replayed(
    parameters: PerceptionParameters, stub_pipeline: Any, tmp_path: Path
) -> None:
    from occbev import load_bag
    from occbev.streams.offline import OfflineReplay

    path = BagDrive(tmp_path / "bag").write(4)
    file = tmp_path / "perception.yaml"
    file.write_text(yaml.safe_dump({"/**": {"ros__parameters": record()}}))
    pipeline = stub_pipeline(parameters)
    with BagReader(path) as bag:
        list(OfflineReplay(parameters, pipeline).results(bag))
    frames = load_bag(path, file)
    read = list(frames)
    assert [frame_set.stamp_ns for frame_set, _ in read] == [frame_set.stamp_ns for frame_set in pipeline.seen]
    assert frames.rig.hash == pipeline.rigs[-1].hash
    assert read[0][0].frames["CAM_LEFT"].image.shape == (48, 64, 3)
    np.testing.assert_allclose(read[0][1]["CAM_RIGHT"], pipeline.motions[0]["CAM_RIGHT"])
