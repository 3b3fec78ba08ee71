"""The real node as a process of its own over real DDS: what it publishes equals what offline replay computes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("vision_msgs", reason="built by occbev.nodes.build_interfaces")

from occbev.bags import BagMessage, BagReader, BagWriter, type_store
from occbev.cli import main
from occbev.geometry import make_transform, rotation_from_rpy, xyzw_from_rotation
from occbev.graph import CAMERAS
from occbev.model_package import find_package

pytestmark = [pytest.mark.ros, pytest.mark.slow]

START, PERIOD = 1_700_000_000_000_000_000, 400_000_000
WIDTH, HEIGHT = 176, 99
TYPES = type_store().types


@pytest.fixture(scope="module")
def model() -> str:
    """The shipped package, or the one that OCCBEV_TEST_MODEL names."""
    name = os.environ.get("OCCBEV_TEST_MODEL", "occbev-tiny")
    try:
        return str(find_package(name))
    except (ValueError, LookupError, OSError) as error:
        pytest.skip(f"no model package: {error}")


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cameras all around, 5 sets, odometry at 8 m/s."""
    path = tmp_path_factory.mktemp("drive") / "bag"
    messages = [static_transforms(), *odometry()]
    for number in range(5):
        for index, camera in enumerate(CAMERAS):
            messages += exposure(
                camera, START + number * PERIOD + index * 5_000_000, number * 6 + index
            )
    with BagWriter(path) as writer:
        for message in sorted(messages, key=lambda m: m.log_ns):
            writer.write(message)
    return path


def recorded(log_ns: int, topic: str, kind: str, *fields: Any) -> BagMessage:
    return BagMessage(
        topic, kind, log_ns, bytes(type_store().serialize_cdr(TYPES[kind](*fields), kind))
    )


def header(stamp: int, frame: str) -> Any:
    return TYPES["std_msgs/msg/Header"](
        TYPES["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9)), frame
    )


def exposure(camera: str, stamp: int, seed: int) -> list[BagMessage]:
    frame = camera.lower()
    blocks = np.random.default_rng(seed).integers(0, 255, (9, 16, 3), np.uint8)
    image = cv2.resize(blocks, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    jpeg = np.frombuffer(cv2.imencode(".jpg", image)[1].tobytes(), np.uint8)
    k = np.array([139.0, 0, WIDTH / 2, 0, 139, HEIGHT / 2, 0, 0, 1])
    p = np.array([*k[:3], 0, *k[3:6], 0, *k[6:], 0])
    region = TYPES["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    return [
        recorded(stamp, f"/{frame}/camera_info", "sensor_msgs/msg/CameraInfo", header(stamp, frame), HEIGHT,
                 WIDTH, "plumb_bob", np.zeros(0), k, np.eye(3).reshape(-1), p, 0, 0, region),
        recorded(stamp + 1, f"/{frame}/image/compressed", "sensor_msgs/msg/CompressedImage",
                 header(stamp, frame), "jpeg", jpeg),
    ]  # fmt: skip


def static_transforms() -> BagMessage:
    transforms = []
    for camera, yaw in zip(CAMERAS, np.radians([55, 0, -55, 110, 180, -110]), strict=True):
        cam2ego = make_transform(
            rotation_from_rpy(-np.pi / 2, 0, yaw - np.pi / 2), (np.cos(yaw), np.sin(yaw), 1.5)
        )
        place = TYPES["geometry_msgs/msg/Vector3"](*map(float, cam2ego[:3, 3]))
        turn = TYPES["geometry_msgs/msg/Quaternion"](
            *map(float, xyzw_from_rotation(cam2ego[:3, :3]))
        )
        transform = TYPES["geometry_msgs/msg/Transform"](place, turn)
        transforms.append(
            TYPES["geometry_msgs/msg/TransformStamped"](
                header(START, "base_link"), camera.lower(), transform
            )
        )
    return recorded(START - PERIOD, "/tf_static", "tf2_msgs/msg/TFMessage", transforms)


def odometry() -> list[BagMessage]:
    g, messages = "geometry_msgs/msg/", []
    zero = TYPES[g + "Vector3"](0.0, 0.0, 0.0)
    twist = TYPES[g + "TwistWithCovariance"](TYPES[g + "Twist"](zero, zero), np.zeros(36))
    turn = TYPES[g + "Quaternion"](0.0, 0.0, 0.0, 1.0)
    for i in range(-10, 120):
        stamp = START + i * 20_000_000
        pose = TYPES[g + "Pose"](TYPES[g + "Point"](0.16 * i, 0.0, 0.0), turn)
        messages.append(
            recorded(stamp, "/odometry", "nav_msgs/msg/Odometry", header(stamp, "odom"), "base_link",
                     TYPES[g + "PoseWithCovariance"](pose, np.zeros(36)), twist)
        )  # fmt: skip
    return messages


def published_boxes(folder: Path) -> dict[int, np.ndarray]:
    """Read stamp -> (M, 7) x, y, z, l, w, h, score of the recorded detections."""
    result = {}
    with BagReader(folder) as bag:
        for message in bag.messages(["/perception/output/objects"]):
            array = type_store().deserialize_cdr(message.data, message.type)
            rows = [
                [d.bbox.center.position.x, d.bbox.center.position.y, d.bbox.center.position.z,
                 d.bbox.size.x, d.bbox.size.y, d.bbox.size.z, d.results[0].hypothesis.score]
                for d in array.detections
            ]  # fmt: skip
            stamp = array.header.stamp.sec * 10**9 + array.header.stamp.nanosec
            result[stamp] = np.array(rows, float).reshape(-1, 7)
    return result


def test_the_node_publishes_what_offline_replay_computes(
    bag: Path, model: str, tmp_path: Path
) -> None:
    common = [str(bag), "--model", model, "--json"]
    lax = ["--set", "waiting_sets:=10", "--set", "sync.timeout_s:=2.0"]
    assert main(["replay", *common, str(tmp_path / "live.json"), "--record", str(tmp_path / "live"),
                 "--node-log", str(tmp_path / "node.log"), *lax]) == 0  # fmt: skip
    assert (
        main(
            [
                "replay",
                *common,
                str(tmp_path / "offline.json"),
                "--offline",
                "--boxes",
                str(tmp_path / "boxes"),
            ]
        )
        == 0
    )
    live, offline = (
        json.loads((tmp_path / f"{n}.json").read_text())["summary"] for n in ("live", "offline")
    )
    assert (live["frames_in"], live["frames_processed"], live["drops"]) == (5, 5, {})
    assert (offline["frames_in"], offline["frames_processed"], offline["partial"]) == (5, 5, 0)
    assert {"sync", "decode", "inference", "publish", "total"} <= set(live["latency_ms"])
    boxes, voxels = published_boxes(tmp_path / "live"), published_voxels(tmp_path / "live")
    lines = [json.loads(line) for line in (tmp_path / "boxes").read_text().splitlines()]
    assert [line["stamp_ns"] for line in lines] == sorted(boxes) == sorted(voxels)
    for line in lines:
        ours = np.array(
            [[*b[:6], s] for b, s in zip(line["box"], line["score"], strict=True)]
        ).reshape(-1, 7)
        for first, second in ((ours, boxes[line["stamp_ns"]]), (boxes[line["stamp_ns"]], ours)):
            assert_found(first, second)
        assert voxels[line["stamp_ns"]] == pytest.approx(line["occupied"], rel=0.002, abs=20)


def assert_found(boxes: np.ndarray, among: np.ndarray) -> None:
    """Every clear box must be among the others; runtimes may round near-ties at the threshold differently."""
    for box in boxes[boxes[:, 6] > 0.15]:
        assert np.abs(among - box).max(axis=1).min() < 0.05


def published_voxels(folder: Path) -> dict[int, int]:
    """Read stamp -> number of recorded voxels."""
    with BagReader(folder) as bag:
        clouds = [type_store().deserialize_cdr(m.data, m.type)
                  for m in bag.messages(["/perception/output/occupancy/points"])]  # fmt: skip
    return {c.header.stamp.sec * 10**9 + c.header.stamp.nanosec: int(c.width) for c in clouds}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_node_ends_cleanly_on_a_signal(model: str, number: signal.Signals) -> None:
    process = start_node(f"model:={model}")
    wait_for_line(process, "listening to")
    process.send_signal(number)
    assert process.wait(30) == 0
    assert process.stdout is not None
    assert "Traceback" not in process.stdout.read()


def test_a_node_with_a_wrong_parameter_says_which(model: str) -> None:
    process = start_node(f"model:={model}", "occupancy.publish:=everything")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "publish 'everything': must be occupied or observed" in text


def test_an_unknown_parameter_is_reported_with_the_nearest_name(model: str) -> None:
    process = start_node(f"model:={model}", "detection.score_treshold:=0.4")
    wait_for_line(process, "did you mean detection.score_threshold?")
    process.terminate()
    process.communicate(timeout=30)


def start_node(*assignments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "occbev", "run", *assignments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": source_path()},
    )  # fmt: skip


def source_path() -> str:
    import occbev

    return os.pathsep.join(
        [str(Path(occbev.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    deadline, seen = time.monotonic() + 60, []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
        assert time.monotonic() < deadline
    pytest.fail(f"{text!r} never came; the node said {''.join(seen)}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses prctl and /proc")
def test_the_node_does_not_outlive_a_killed_player(bag: Path, model: str, tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    command = [
        sys.executable,
        "-m",
        "occbev",
        "replay",
        str(bag),
        "--model",
        model,
        "--node-log",
        str(log),
    ]
    player = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": source_path()}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while "listening to" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{player.pid}/task/{player.pid}/children").read_text().split()
    player.kill()
    player.wait()
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert children


def is_running(process_id: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return " Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
