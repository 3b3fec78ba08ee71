"""Faults of the graph around the node: clocks, wrong quality of service, readers that never read, late calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from occbev.frame_job import FrameJob

pytestmark = pytest.mark.ros


def test_a_backward_clock_jump_starts_again_and_keeps_statics(
    make_bench: Callable[..., Any], other: Callable[[Any], Node]
) -> None:
    from rosgraph_msgs.msg import Clock

    from occbev.ros.outputs import time_from_ns

    bench = make_bench(use_sim_time=True).ready()
    clock = other(bench).create_publisher(Clock, "/clock", 10)
    bench.wait(lambda: clock.get_subscription_count() > 0)

    def set_clock(seconds: int) -> None:
        clock.publish(Clock(clock=time_from_ns(seconds * 10**9)))
        bench.wait(lambda: bench.node.get_clock().now().nanoseconds == seconds * 10**9)

    set_clock(100)
    bench.vehicle.odometry(100 * 10**9, 0.0)
    bench.wait(lambda: bench.node._intake.ego.source == "odometry")
    bench.vehicle.drive(4, start_ns=100 * 10**9)
    bench.finished(4)
    set_clock(50)
    bench.wait(lambda: bench.node._intake.sync.statistics.resets["clock_jump"] == 1)
    assert bench.node._intake.ego.source == "none"
    assert not bench.node._intake.read_calibration().problems
    bench.vehicle.drive(4, start_ns=50 * 10**9)
    bench.finished(8)
    assert bench.node.frame_log.outcomes["processed"] == 8
    assert bench.node._intake.sync.epoch == 1
    assert bench.pipeline.forgotten == [0, 4]


def test_simulated_time_that_does_not_come_is_named_and_makes_no_latency(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(use_sim_time=True).ready()
    bench.vehicle.drive(3)
    bench.finished(3)
    bench.wait(lambda: any("no time comes on /clock" in line for line in bench.logged))
    assert bench.node.frame_log.outcomes == {"processed": 3}
    assert list(bench.node.latencies["pipeline_latency"]) == []


def test_a_forward_clock_jump_changes_nothing(make_bench: Callable[..., Any], other: Callable[[Any], Node]) -> None:
    from rosgraph_msgs.msg import Clock

    from occbev.ros.outputs import time_from_ns

    bench = make_bench(use_sim_time=True).ready()
    clock = other(bench).create_publisher(Clock, "/clock", 10)
    bench.wait(lambda: clock.get_subscription_count() > 0)
    for number, seconds in enumerate((100, 5000)):
        clock.publish(Clock(clock=time_from_ns(seconds * 10**9)))
        bench.wait(lambda s=seconds: bench.node.get_clock().now().nanoseconds == s * 10**9)
        bench.vehicle.drive(4, start_ns=seconds * 10**9)
        bench.finished(4 * (number + 1))
    assert bench.node.frame_log.outcomes == {"processed": 8}
    assert (bench.node._intake.sync.epoch, bench.node._intake.sync.statistics.resets) == (0, {})
    assert not bench.pipeline.seen[-1].missing


def test_a_publisher_that_cannot_match_is_named_with_what_it_offers(
    make_bench: Callable[..., Any], other: Callable[[Any], Node]
) -> None:
    from tf2_msgs.msg import TFMessage

    bench = make_bench()
    volatile = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)
    other(bench).create_publisher(TFMessage, "/tf_static", volatile)
    bench.wait(lambda: any("quality of service does not match" in line for line in bench.logged))
    line = next(line for line in bench.logged if "quality of service" in line)
    assert "/tf_static" in line
    assert "RELIABLE/VOLATILE" in line


def test_a_camera_that_offers_less_than_an_override_asks_for_is_named(
    make_bench: Callable[..., Any], other: Callable[[Any], Node]
) -> None:
    from sensor_msgs.msg import CompressedImage

    topic = "/perception/input/cam_left/image/compressed"
    bench = make_bench(**{f"qos_overrides.{topic}.subscription.reliability": "reliable"}, wait=False)
    effort = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
    other(bench).create_publisher(CompressedImage, topic, effort)
    bench.wait(lambda: any("quality of service does not match" in line for line in bench.logged))
    line = next(line for line in bench.logged if "quality of service" in line)
    assert "input/cam_left/image/compressed" in line
    assert "BEST_EFFORT/VOLATILE" in line


def test_a_subscriber_that_cannot_match_is_named_with_what_it_wants(
    make_bench: Callable[..., Any], other: Callable[[Any], Node]
) -> None:
    from sensor_msgs.msg import PointCloud2

    bench = make_bench()
    lasting = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    other(bench).create_subscription(PointCloud2, "/perception/output/occupancy/points", print, lasting)
    bench.wait(lambda: any("a subscriber's quality of service" in line for line in bench.logged))
    line = next(line for line in bench.logged if "a subscriber's" in line)
    assert "occupancy/points" in line
    assert "RELIABLE/TRANSIENT_LOCAL" in line


def test_a_topic_that_carries_another_type_is_named(make_bench: Callable[..., Any]) -> None:
    import rclpy
    from sensor_msgs.msg import CompressedImage

    bench, context = make_bench(), rclpy.Context()
    rclpy.init(context=context)  # one participant of DDS knows a topic by one type
    driver = Node("driver", context=context)
    driver.create_publisher(CompressedImage, "/perception/input/cam_left/image", 5)
    text = "/perception/input/cam_left/image carries sensor_msgs/msg/CompressedImage and is read as"
    try:
        bench.wait(lambda: text in bench.statuses()["CAM_LEFT"].text if bench.statuses() else False)
    finally:
        driver.destroy_node()
        rclpy.shutdown(context=context)
    assert "carries" not in bench.statuses()["CAM_FRONT"].text
    assert any("no image of camera CAM_LEFT" in line for line in bench.logged)


def test_a_set_that_a_signal_cuts_off_has_not_failed(
    make_bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    monkeypatch.setattr(type(bench.node), "context", SimpleNamespace(ok=lambda: False))
    bench.node._on_worker_error(FrameJob(1), RuntimeError("publisher's context is invalid"))
    monkeypatch.undo()
    assert bench.node.frame_log.outcomes == {"stopped": 1}
    assert not any("failed" in line for line in bench.logged)


def test_overrides_of_topics_that_do_not_exist_are_reported(make_bench: Callable[..., Any]) -> None:
    from occbev.ros.parameters import find_unknown
    from occbev.streams.parameters import QOS_PREFIX

    right = "qos_overrides./perception/output/objects.publisher.depth"
    bench = make_bench(**{right: 3, right.replace("objects", "object"): 3})
    assert find_unknown(bench.node, QOS_PREFIX) == {right.replace("objects", "object"): right}


def test_a_best_effort_camera_is_heard(make_bench: Callable[..., Any], other: Callable[[Any], Node]) -> None:
    from array import array

    from sensor_msgs.msg import CompressedImage

    bench = make_bench(sync__timeout_s=0.05).ready()
    effort = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
    topic = "/perception/input/cam_front/image/compressed"
    publisher = other(bench).create_publisher(CompressedImage, topic, effort)
    bench.wait(lambda: publisher.get_subscription_count() > 0)
    message = CompressedImage(format="jpeg", data=array("B", bench.vehicle.jpeg))
    message.header.stamp.sec = 7
    publisher.publish(message)
    bench.finished(1)
    assert bench.pipeline.seen[0].cameras == ("CAM_FRONT",)


def test_a_subscriber_that_never_reads_does_not_hold_the_node_up(
    make_bench: Callable[..., Any], other: Callable[[Any], Node]
) -> None:
    from sensor_msgs.msg import PointCloud2

    bench = make_bench().ready()
    other(bench).create_subscription(PointCloud2, "/perception/output/occupancy/points", print, 1)
    bench.vehicle.drive(15, period_s=0.02)
    bench.finished(15)
    assert bench.node.frame_log.outcomes == {"processed": 15}
    bench.wait(lambda: len(bench.received["points"]) == 15)


def test_calibration_that_comes_late_is_taken_when_it_comes(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(sync__min_cameras=2)
    bench.vehicle.drive(3)
    bench.finished(3)
    assert bench.node.frame_log.outcomes == {"too_few_cameras": 3}
    assert any("nothing is published: fewer than 2 usable cameras" in line for line in bench.logged)
    bench.ready()
    bench.vehicle.drive(3, start_ns=2 * 10**9)
    bench.finished(6)
    assert bench.node.frame_log.outcomes["processed"] == 3


def test_a_moved_camera_changes_the_rig(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    bench.vehicle.drive(2)
    bench.finished(2)
    before = bench.pipeline.rigs[-1].hash
    bench.vehicle.info("CAM_FRONT", 5, focal=55.0)
    bench.wait(lambda: bench.node._intake.read_calibration().rig["CAM_FRONT"].intrinsic[0, 0] == 55)
    bench.vehicle.drive(2, start_ns=2 * 10**9)
    bench.finished(4)
    assert bench.pipeline.rigs[-1].hash != before
    assert len(bench.pipeline.rigs) == 2


def test_a_bad_transform_shows_in_diagnostics(make_bench: Callable[..., Any]) -> None:
    from geometry_msgs.msg import TransformStamped
    from tf2_msgs.msg import TFMessage

    bench = make_bench()
    broken = TransformStamped(child_frame_id="cam_front")
    broken.header.frame_id = "base_link"
    broken.transform.rotation.w = 5.0
    bench.vehicle.publishers["vehicle"][0].publish(TFMessage(transforms=[broken]))
    bench.wait(lambda: bench.statuses().get("transforms") and bench.statuses()["transforms"].level > 0)
    assert "norm 5.0" in bench.statuses()["transforms"].text
    assert any("norm 5.0" in line for line in bench.logged)


def test_a_frame_that_two_publishers_place_is_named_and_the_newest_holds(
    make_bench: Callable[..., Any], other: Callable[[Any], Node]
) -> None:
    from geometry_msgs.msg import TransformStamped
    from tf2_msgs.msg import TFMessage

    from occbev.graph import TF_STATIC
    from occbev.ros.perception_node import qos_profile

    bench = make_bench().ready()
    second = other(bench).create_publisher(TFMessage, "/tf_static", qos_profile(TF_STATIC))
    moved = TransformStamped(child_frame_id="cam_left")
    moved.header.frame_id = "base_link"
    moved.transform.translation.x, moved.transform.rotation.w = 7.0, 1.0
    second.publish(TFMessage(transforms=[moved]))
    bench.wait(lambda: any("frame 'cam_left' was static at" in line for line in bench.logged))
    line = next(line for line in bench.logged if "'cam_left' was static" in line)
    assert "do two publishers send it? the newest holds" in line
    assert "(7.000, 0.000, 0.000)" in line
    assert bench.node._intake.read_calibration().rig["CAM_LEFT"].cam2ego[0, 3] == 7.0
    bench.wait(lambda: "transforms" in bench.statuses() and bench.statuses()["transforms"].level == 1)
    bench.vehicle.drive(3)
    bench.finished(3)
    assert bench.node.frame_log.outcomes == {"processed": 3}


def test_a_transform_that_comes_late_is_waited_for(make_bench: Callable[..., Any]) -> None:
    from geometry_msgs.msg import TransformStamped
    from tf2_msgs.msg import TFMessage

    bench = make_bench(ego_motion__source="tf", ego_motion__wait_s=1.0).ready()

    def at(stamp_ns: int, x: float) -> None:
        message = TransformStamped(child_frame_id="base_link")
        message.header.frame_id = "odom"
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        message.transform.translation.x, message.transform.rotation.w = x, 1.0
        bench.vehicle.publishers["vehicle"][0].publish(TFMessage(transforms=[message]))

    for i in range(20):
        at(10**9 + i * 10_000_000, x=0.1 * i)  # 10 m/s, until 10 ms before the last exposure
    bench.wait(lambda: bench.node._intake.buffer.newest_ns("base_link") == 1_190_000_000)
    bench.vehicle.drive(4, period_s=0.06, spread_ns=10_000_000)
    bench.wait(lambda: len(bench.pipeline.seen) == 3)
    at(1_250_000_000, x=2.5)
    bench.finished(4)
    assert [m["CAM_RIGHT"][0, 3] for m in bench.pipeline.motions] == pytest.approx([0.2] * 4)


def test_latencies_are_published_where_debug_topics_ask_for_it(
    make_bench: Callable[..., Any], other: Callable[[Any], Node]
) -> None:
    from std_msgs.msg import Float32

    from occbev.graph import LATENCIES

    bench = make_bench(debug_topics=True).ready()
    names = ("processing_time/inference_ms", "processing_time/total_ms", "pipeline_latency_ms", "cyclic_time_ms")
    assert set(names) <= set(LATENCIES)
    kinds = set(bench.node.latencies)
    listener, heard = other(bench), {name: [] for name in names}
    executor = SingleThreadedExecutor(context=bench.node.context)
    executor.add_node(listener)
    for name in names:
        listener.create_subscription(
            Float32, f"/perception/debug/{name}", lambda m, n=name: heard[n].append(m.data), 10
        )
    bench.wait(
        lambda: all(
            p.get_subscription_count() for k, p in bench.node._debug.items() if k in {LATENCIES[n] for n in names}
        )
    )
    bench.vehicle.drive(3)
    bench.wait(lambda: executor.spin_once(timeout_sec=0.05) or [len(v) for v in heard.values()] == [3, 3, 3, 2])
    assert heard[names[0]] == [1.0] * 3
    assert all(value > 0 for value in heard["cyclic_time_ms"])
    assert set(bench.node.latencies) == kinds, "diagnostics may have been going through them"
    executor.shutdown()


def test_a_frozen_camera_is_left_out_until_it_moves_again(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(frozen_after=3).ready()
    pictures = [cv2.imencode(".jpg", np.full((48, 64, 3), 40 + i, np.uint8))[1].tobytes() for i in range(16)]
    for i in range(8):
        for camera in ("CAM_FRONT", "CAM_LEFT", "CAM_RIGHT"):
            still = camera == "CAM_LEFT" and i < 6
            bench.vehicle.image(camera, 10**9 + i * 50_000_000, pictures[0 if still else i])
        bench.wait(lambda i=i: bench.node._intake.sync.statistics.received["CAM_RIGHT"] > i)
    bench.finished(8)
    frozen = ["CAM_LEFT" in frame_set.missing for frame_set in bench.pipeline.seen]
    assert frozen == [False, False, True, True, True, True, False, False]
    assert any("it is frozen: the same pixels came 3 times in a row" in line for line in bench.logged)


def test_a_black_camera_is_left_out(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    black = cv2.imencode(".png", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    for i in range(4):
        stamp = 10**9 + i * 50_000_000
        bench.vehicle.image("CAM_FRONT", stamp)
        bench.vehicle.image("CAM_LEFT", stamp, black)
        bench.vehicle.image("CAM_RIGHT", stamp)
    bench.finished(4)
    assert all(set(s.missing) == {"CAM_LEFT"} for s in bench.pipeline.seen)
    assert "it is black" in bench.pipeline.seen[0].missing["CAM_LEFT"]


def test_images_without_a_stamp_are_named(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    bench.vehicle.image("CAM_LEFT", 0)
    bench.wait(lambda: bench.node._intake.watch["CAM_LEFT"].refused["no_stamp"] == 1)
    bench.wait(lambda: "CAM_LEFT" in bench.statuses() and bench.statuses()["CAM_LEFT"].values.get("refused.no_stamp"))


def test_a_rig_file_replaces_camera_info_and_tf(make_bench: Callable[..., Any], tmp_path: Any) -> None:
    from occbev.rig import CameraRig
    from occbev.streams.calibration import fallback_camera

    names = ("CAM_RIGHT", "CAM_FRONT", "CAM_LEFT")
    cameras = (replace(fallback_camera(name), width=64, height=48) for name in names)
    CameraRig(tuple(cameras)).save(tmp_path / "rig.yaml")
    bench = make_bench(rig=str(tmp_path / "rig.yaml"))
    bench.vehicle.drive(3)
    bench.finished(3)
    assert bench.pipeline.rigs[-1].names == ("CAM_FRONT", "CAM_LEFT", "CAM_RIGHT")
    assert bench.node.frame_log.outcomes == {"processed": 3}


def test_an_extrinsic_parameter_stands_in_for_tf(make_bench: Callable[..., Any]) -> None:
    places = {
        f"cameras.{c}.extrinsic": [1.0, 0.5, 1.5, -0.5, 0.5, -0.5, 0.5] for c in ("CAM_FRONT", "CAM_LEFT", "CAM_RIGHT")
    }
    bench = make_bench(**places)
    for camera in ("CAM_FRONT", "CAM_LEFT", "CAM_RIGHT"):
        bench.vehicle.info(camera, 1)
    bench.wait(lambda: not bench.node._intake.read_calibration().problems)
    assert bench.node._intake.read_calibration().rig["CAM_LEFT"].cam2ego[1, 3] == 0.5
