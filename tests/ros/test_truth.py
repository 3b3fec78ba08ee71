"""Diagnostics tell the truth, over real DDS: clocks, second publishers, frames, odometry, calibration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from occbev.streams.health import health

pytestmark = pytest.mark.ros

S = 10**9


def wait_for_status(bench: Any, name: str, text: str, level: int = 1) -> None:
    bench.wait(lambda: name in bench.statuses() and text in bench.statuses()[name].text)
    assert bench.statuses()[name].level == level


def transform(child: str, stamp_ns: int, x: float = 0.0) -> Any:
    from geometry_msgs.msg import TransformStamped

    message = TransformStamped(child_frame_id=child)
    message.header.frame_id = "odom"
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, S)
    message.transform.translation.x, message.transform.rotation.w = x, 1.0
    return message


def test_a_camera_ahead_of_the_nodes_clock_is_refused_and_named(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(sync__timeout_s=0.1).ready()
    for _ in range(15):
        stamp_ns = time.time_ns()
        for camera, ahead_ns in (("CAM_FRONT", 0), ("CAM_RIGHT", 0), ("CAM_LEFT", 500_000_000)):
            bench.vehicle.image(camera, stamp_ns + ahead_ns)
        time.sleep(0.05)
    bench.finished(15)
    assert all(set(s.cameras) <= {"CAM_FRONT", "CAM_RIGHT"} for s in bench.pipeline.seen[2:])
    assert any("camera CAM_LEFT is missing" in line and "ahead of" in line for line in bench.logged)
    wait_for_status(bench, "CAM_LEFT", "ahead of")


def test_a_player_that_was_forgotten_resets_nothing(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(sync__timeout_s=0.2).ready()
    for number in range(20):
        now_ns = time.time_ns()
        for camera in ("CAM_FRONT", "CAM_LEFT", "CAM_RIGHT"):
            bench.vehicle.image(camera, now_ns)
            bench.vehicle.image(camera, 10**9 + number * 50_000_000)
        time.sleep(0.05)
    bench.finished(35)
    assert bench.node._intake.sync.epoch == 0
    assert bench.node.frame_log.outcomes["processed"] >= 18
    assert min(s.stamp_ns for s in bench.pipeline.seen[1:]) > 10**18


def test_a_second_publisher_of_a_camera_is_named(make_bench: Callable[..., Any], other: Callable[[Any], Node]) -> None:
    from sensor_msgs.msg import CompressedImage

    bench = make_bench().ready()
    other(bench).create_publisher(CompressedImage, "/perception/input/cam_left/image/compressed", 1)
    bench.wait(lambda: any("CAM_LEFT: 2 publishers send" in line for line in bench.logged))
    bench.vehicle.drive(30)
    wait_for_status(bench, "CAM_LEFT", "one of them is too many")


def test_an_old_transform_clears_no_other_frame_and_a_second_one_its_own(make_bench: Callable[..., Any]) -> None:
    from tf2_msgs.msg import TFMessage

    bench = make_bench()
    tf, buffer = bench.vehicle.publishers["vehicle"][0], bench.node._intake.buffer
    tf.publish(TFMessage(transforms=[transform("base_link", 100 * S), transform("wheel", 100 * S)]))
    tf.publish(TFMessage(transforms=[transform("wheel", 50 * S)]))
    bench.wait(lambda: any("'wheel': its stamp steps back by 50.00 s" in line for line in bench.logged))
    assert (buffer.newest_ns("base_link"), buffer.newest_ns("wheel")) == (100 * S, 100 * S)
    tf.publish(TFMessage(transforms=[transform("wheel", 50 * S + 1)]))
    bench.wait(lambda: buffer.newest_ns("wheel") == 50 * S + 1)
    assert buffer.newest_ns("base_link") == 100 * S


def test_a_conflict_of_static_frames_stays_named(make_bench: Callable[..., Any], monkeypatch: Any) -> None:
    from tf2_msgs.msg import TFMessage

    from occbev.streams import health

    monkeypatch.setattr(health, "REMEMBERED_NS", 0)
    bench = make_bench().ready()
    bench.vehicle.publishers["vehicle"][1].publish(TFMessage(transforms=[transform("cam_left", 0, x=7.0)]))
    wait_for_status(bench, "transforms", "do two publishers send it?")


def test_latched_calibration_is_received(make_bench: Callable[..., Any], other: Callable[[Any], Node]) -> None:
    from sensor_msgs.msg import CameraInfo

    latched = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    bench = make_bench(active=False)
    publisher = other(bench).create_publisher(CameraInfo, "/perception/input/cam_left/camera_info", latched)
    publisher.publish(CameraInfo(width=64, height=48))
    assert bench.transition("configure") == bench.transition("activate") == "SUCCESS"
    bench.wait(lambda: "CAM_LEFT" in bench.node._intake.calibration._infos)
    assert not any("quality of service" in line for line in bench.logged)


def test_what_is_wrong_with_a_drive_is_said(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    wait_for_status(bench, "ego motion", "neither odometry on ~/input/odometry nor TF odom -> base_link comes")
    bench.vehicle.odometry(S, 0.0)
    bench.vehicle.odometry(S + 20_000_000, 500.0)
    wait_for_status(bench, "ego motion", "jumps by 500.0 m in 0.020 s")
    bench.vehicle.image("CAM_LEFT", 0)
    wait_for_status(bench, "CAM_LEFT", "no stamp")


def test_calibration_of_another_aspect_and_frame_is_said(make_bench: Callable[..., Any]) -> None:
    from sensor_msgs.msg import CameraInfo

    bench = make_bench().ready()
    k = [50.0, 0.0, 40.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0]
    wide = CameraInfo(
        width=80, height=48, k=k, p=[*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0], distortion_model="plumb_bob"
    )
    wide.header.frame_id = "cam_left"
    bench.vehicle.publishers["CAM_LEFT"][1].publish(wide)
    bench.vehicle.info("CAM_RIGHT", 1)
    bench.wait(lambda: bench.node._intake.read_calibration().rig["CAM_LEFT"].width == 80)
    bench.vehicle.drive(3)
    bench.finished(3)
    intake = bench.node._intake
    assert "another aspect" in intake.watch["CAM_LEFT"].problem
    intake.calibration.note_image_frame("CAM_RIGHT", "elsewhere")
    now_ns = time.monotonic_ns()
    statuses = {s.name: s for s in health(intake, bench.node.frame_log, {}, {}, now_ns)}
    assert (statuses["occbev: CAM_LEFT"].level, statuses["occbev: CAM_RIGHT"].level) == (1, 1)
    assert "another aspect" in statuses["occbev: CAM_LEFT"].text
    assert "frame 'elsewhere', its CameraInfo 'cam_right'" in statuses["occbev: CAM_RIGHT"].text
