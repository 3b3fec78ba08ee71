"""The perception node over real DDS, with a stub in place of the network: stamps, outputs, faults, accounts."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from tests.hostile_images import progressive

from occbev.config import ConfigError, ImageConfig
from occbev.graph import OUTPUT_TOPICS
from occbev.inference.preprocess import Preprocessor
from occbev.rig import CameraRig
from occbev.streams.calibration import fallback_camera
from occbev.streams.frame_log import read_frame_log
from occbev.streams.intake import Intake

pytestmark = pytest.mark.ros

NAMES = {"CAM_FRONT", "CAM_LEFT", "CAM_RIGHT"}


def stamps(messages: list[Any]) -> list[int]:
    return [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in messages]


@pytest.mark.parametrize("raw", [False, True], ids=["jpeg", "raw"])
def test_every_set_is_published_with_its_key_time(make_bench: Callable[..., Any], raw: bool) -> None:
    bench = make_bench(raw).ready()
    keys = bench.vehicle.drive(8)
    bench.finished(8)
    assert bench.node.frame_log.outcomes == {"processed": 8}
    for key in ("objects", "points", "grid"):
        bench.wait(lambda key=key: len(bench.received[key]) == 8)
        assert stamps(bench.received[key]) == keys
        assert {m.header.frame_id for m in bench.received[key]} == {"base_link"}
    bench.wait(lambda: len(bench.received["markers"]) == 8)
    frame_set = bench.pipeline.seen[0]
    assert set(frame_set.cameras) == NAMES
    image = frame_set.frames["CAM_LEFT"].image
    assert image.shape == (48, 64, 3)
    if raw:
        np.testing.assert_array_equal(image, bench.vehicle.rgb)
    assert bench.pipeline.rigs[-1]["CAM_FRONT"].intrinsic[0, 0] == 50


def test_the_frame_log_holds_every_key_time(make_bench: Callable[..., Any], tmp_path: Path) -> None:
    bench = make_bench().ready()
    keys = bench.vehicle.drive(5)
    bench.finished(5)
    lines = read_frame_log(tmp_path / "frame_log.jsonl")
    assert [line["stamp_ns"] for line in lines] == keys
    first = lines[0]
    assert (first["outcome"], set(first["cameras"]), first["boxes"]) == ("processed", NAMES, 1)
    assert set(first["published"]) == set(OUTPUT_TOPICS)
    assert {"sync", "decode", "inference", "publish", "total"} <= set(first["stages_ms"])


def test_the_ground_grid_is_made_only_while_someone_listens(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    bench.vehicle.drive(3)
    bench.finished(3)
    node = bench.vehicle.node
    for subscription in [s for s in node.subscriptions if s.topic_name.endswith(("/grid", "/obstacles"))]:
        node.executor.create_task(node.destroy_subscription, subscription)
    bench.wait(lambda: not any(bench.node._out[key].get_subscription_count() for key in ("grid", "obstacles")))
    bench.vehicle.drive(3, start_ns=2 * 10**9)
    bench.finished(6)
    assert bench.pipeline.wants_ground == [True] * 3 + [False] * 3
    bench.wait(lambda: len(bench.received["points"]) == 6)
    assert (len(bench.received["grid"]), len(bench.received["obstacles"])) == (3, 3)


def test_a_slow_pipeline_drops_old_sets_and_counts_them(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(delay_s=0.15, max_waiting_sets=1).ready()
    keys = bench.vehicle.drive(20, period_s=0.04)
    bench.finished(20)
    outcomes = bench.node.frame_log.outcomes
    assert outcomes["processed"] + outcomes["replaced_by_newer"] == 20
    assert outcomes["replaced_by_newer"] >= 5
    assert bench.pipeline.seen[-1].stamp_ns == keys[-1]


def test_ego_motion_comes_from_odometry(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    for i in range(40):
        bench.vehicle.odometry(900_000_000 + i * 20_000_000, x=0.2 * i)  # 10 m/s
    bench.wait(lambda: bench.node._intake.ego.source == "odometry")
    bench.vehicle.drive(4, spread_ns=10_000_000)
    bench.finished(4)
    motion = bench.pipeline.motions[0]
    forward = {name: m[0, 3] for name, m in motion.items()}
    assert forward == pytest.approx({"CAM_FRONT": 0.0, "CAM_LEFT": 0.1, "CAM_RIGHT": 0.2}, abs=1e-6)


@pytest.mark.parametrize("kind", ["PoseStamped", "PoseWithCovarianceStamped"])
def test_ego_motion_comes_from_stamped_poses(make_bench: Callable[..., Any], kind: str) -> None:
    from geometry_msgs import msg as geometry

    motion = {"ego_motion.odometry_topic": "/pose", "ego_motion.odometry_type": f"geometry_msgs/msg/{kind}"}
    bench = make_bench(wait=False, **motion)
    publisher = bench.vehicle.node.create_publisher(getattr(geometry, kind), "/pose", 50)
    bench.vehicle.publishers["vehicle"][2] = publisher
    bench.wait(bench.connected)
    bench.ready()
    for i in range(40):
        message = getattr(geometry, kind)()
        stamp_ns = 900_000_000 + i * 20_000_000
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        message.header.frame_id = "odom"
        pose = message.pose if kind == "PoseStamped" else message.pose.pose
        pose.position.x, pose.orientation.w = 0.2 * i, 1.0
        publisher.publish(message)
    bench.wait(lambda: bench.node._intake.ego.source == "odometry")
    bench.vehicle.drive(4, spread_ns=10_000_000)
    bench.finished(4)
    forward = {name: m[0, 3] for name, m in bench.pipeline.motions[0].items()}
    assert forward == pytest.approx({"CAM_FRONT": 0.0, "CAM_LEFT": 0.1, "CAM_RIGHT": 0.2}, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"data": b"\xff\xd8\xff" + bytes(200)}, "without a readable image header"),
        ({"data": "half"}, "cut short"),
        ({"data": b"BM" + bytes(100), "format": "bmp"}, "only JPEG and PNG are understood"),
    ],
    ids=["no header", "truncated", "bmp"],
)
def test_a_bad_image_costs_one_camera_not_the_node(
    make_bench: Callable[..., Any], fields: dict[str, Any], text: str
) -> None:
    bench = make_bench().ready()
    if fields["data"] == "half":
        fields = {"data": bench.vehicle.jpeg[: len(bench.vehicle.jpeg) // 2]}
    for i in range(5):
        stamp = 10**9 + i * 50_000_000
        bench.vehicle.image("CAM_FRONT", stamp)
        bench.vehicle.image("CAM_RIGHT", stamp)
        bench.vehicle.image("CAM_LEFT", stamp, **fields)
    bench.finished(5)
    bench.vehicle.drive(3, start_ns=2 * 10**9)
    bench.finished(8)
    assert bench.node.frame_log.outcomes["pipeline_error"] == 0
    reasons = {r for s in bench.pipeline.seen for r in s.missing.values()}
    assert any(text in reason for reason in reasons), reasons
    assert any("camera CAM_LEFT is missing" in line and text in line for line in bench.logged)
    assert set(bench.pipeline.seen[-1].cameras) == NAMES
    assert bench.node._intake.watch["CAM_LEFT"].refused["bad_image"] == 5


def test_a_camera_that_sends_bombs_costs_only_itself(
    make_bench: Callable[..., Any], stub_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessor = Preprocessor(ImageConfig(width=64, height=32))
    monkeypatch.setattr(stub_pipeline, "decode_frame", lambda _, frame, camera: preprocessor.decode(frame, camera))
    bombs = {2: progressive(2000, 1500, 6000), 4: progressive(4000, 2400, 40)}
    bench = make_bench().ready()
    began = time.process_time()
    for i in range(7):
        for camera in sorted(NAMES):
            data = bombs.get(i) if camera == "CAM_LEFT" else None
            bench.vehicle.image(camera, 10**9 + i * 50_000_000, data)
        time.sleep(0.05)
    bench.finished(7)
    assert time.process_time() - began < 4, "decoding the first takes longer"
    assert bench.node.frame_log.outcomes == {"processed": 7}
    assert [set(s.missing) for s in bench.pipeline.seen] == [{"CAM_LEFT"} if i in bombs else set() for i in range(7)]
    assert "a JPEG of 6000 scans" in bench.pipeline.seen[2].missing["CAM_LEFT"]
    assert "4000x2400 but the calibration is for 64x48" in bench.pipeline.seen[4].missing["CAM_LEFT"]


def test_an_unknown_encoding_is_named_with_the_known_ones(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(raw=True).ready()
    for i in range(4):
        for camera in NAMES:
            encoding = "mono16" if camera == "CAM_RIGHT" else "rgb8"
            bench.vehicle.image(camera, 10**9 + i * 50_000_000, encoding=encoding)
    bench.finished(4)
    assert all("CAM_RIGHT" in s.missing for s in bench.pipeline.seen)
    assert any("encoding 'mono16' is not understood; known are rgb8" in line for line in bench.logged)
    bench.wait(lambda: bench.statuses().get("CAM_RIGHT") and bench.statuses()["CAM_RIGHT"].level > 0)
    assert "mono16" in bench.statuses()["CAM_RIGHT"].text


def test_an_image_header_that_claims_gigabytes_is_refused(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(raw=True).ready()
    for i in range(4):
        for camera in NAMES:
            huge = {"height": 60_000, "width": 60_000, "step": 180_000} if camera == "CAM_LEFT" else {}
            bench.vehicle.image(camera, 10**9 + i * 50_000_000, **huge)
    bench.finished(4)
    assert any("exceeds max_image_pixels" in line for line in bench.logged)
    assert bench.node.frame_log.outcomes == {"processed": 4}


def test_missing_camera_info_and_transform_are_named_with_a_remedy(
    make_bench: Callable[..., Any],
) -> None:
    bench = make_bench()
    bench.vehicle.calibrate(cameras=("CAM_FRONT",))
    bench.vehicle.info("CAM_RIGHT", 1)
    bench.wait(
        lambda: (
            set(bench.node._intake.read_calibration().problems) == {"CAM_LEFT", "CAM_RIGHT"}
            and "transform" in bench.node._intake.read_calibration().problems["CAM_RIGHT"]
        )
    )
    bench.vehicle.drive(3)
    bench.finished(3)
    assert all(s.cameras == ("CAM_FRONT",) for s in bench.pipeline.seen)
    missing = bench.pipeline.seen[0].missing
    assert "no CameraInfo on ~/input/cam_left/camera_info" in missing["CAM_LEFT"]
    assert "no transform 'cam_right' -> 'base_link'" in missing["CAM_RIGHT"]
    assert "cameras.CAM_RIGHT.extrinsic" in missing["CAM_RIGHT"]
    bench.vehicle.calibrate()
    bench.wait(lambda: not bench.node._intake.read_calibration().problems)
    bench.vehicle.drive(2, start_ns=2 * 10**9)
    bench.finished(5)
    assert set(bench.pipeline.seen[-1].cameras) == NAMES


def test_a_camera_info_like_the_last_one_is_not_read(
    make_bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    monkeypatch.setattr(Intake, "add_info", lambda _, camera, message: taken.append(message.k[0]))
    bench = make_bench()
    for stamp_ns, focal in enumerate((50.0, 50.0, 60.0, 60.0, 50.0), 1):
        bench.vehicle.info("CAM_LEFT", stamp_ns, focal=focal)
    bench.wait(lambda: len(taken) >= 3)
    assert taken == [50.0, 60.0, 50.0]


def test_an_uncalibrated_camera_is_left_out_until_its_info_changes(
    make_bench: Callable[..., Any],
) -> None:
    bench = make_bench()
    bench.vehicle.calibrate()
    bench.vehicle.info("CAM_LEFT", 2, focal=0.0)
    bench.wait(lambda: "not calibrated" in bench.node._intake.read_calibration().problems.get("CAM_LEFT", ""))
    bench.vehicle.info("CAM_LEFT", 3, focal=70.0)
    bench.wait(lambda: not bench.node._intake.read_calibration().problems)
    bench.vehicle.drive(3)
    bench.finished(3)
    assert bench.pipeline.rigs[-1]["CAM_LEFT"].intrinsic[0, 0] == 70


def test_a_silent_camera_is_named_with_topic_and_publishers(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    bench.vehicle.drive(12, cameras=("CAM_FRONT", "CAM_LEFT"))
    bench.finished(12)
    assert bench.node.frame_log.outcomes == {"processed": 12}
    bench.wait(lambda: "CAM_RIGHT" in bench.statuses())
    status = bench.statuses()["CAM_RIGHT"]
    assert (status.level, status.values["age_s"]) == (2, "never")
    assert "/perception/input/cam_right/image" in status.text
    bench.wait(
        lambda: any("no image of camera CAM_RIGHT" in t or "camera CAM_RIGHT is missing" in t for t in bench.logged)
    )
    line = next(t for t in bench.logged if "CAM_RIGHT" in t)
    assert "1 publishers on /perception/input/cam_right/image/compressed (RELIABLE/VOLATILE)" in line


def test_too_few_cameras_publish_nothing_and_say_so(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(sync__min_cameras=3, sync__timeout_s=0.05).ready()
    bench.vehicle.drive(5, cameras=("CAM_FRONT", "CAM_LEFT"))
    bench.finished(5)
    assert bench.node.frame_log.outcomes == {"too_few_cameras": 5}
    assert bench.received["objects"] == []


def test_a_pipeline_that_raises_is_counted_and_lives_on(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    run = bench.pipeline.run
    bench.pipeline.run = lambda *_: 1 / 0
    bench.vehicle.drive(3)
    bench.finished(3)
    bench.pipeline.run = run
    bench.vehicle.drive(3, start_ns=2 * 10**9)
    bench.finished(6)
    assert bench.node.frame_log.outcomes == {"pipeline_error": 3, "processed": 3}
    assert any("ZeroDivisionError" in line for line in bench.logged)


def test_a_looped_recording_goes_on_in_the_next_pass(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    for second in range(3):
        bench.vehicle.odometry(10**9 * (second + 10), 0.0)
    first = bench.vehicle.drive(10, start_ns=10 * 10**9)
    second_pass = bench.vehicle.drive(10, start_ns=3 * 10**9)
    bench.finished(20)
    assert bench.node.frame_log.outcomes["processed"] >= 18
    seen = [s.stamp_ns for s in bench.pipeline.seen]
    assert set(seen) <= set(first) | set(second_pass)
    assert len(set(seen) & set(second_pass)) >= 9
    assert bench.node._intake.sync.epoch == 1


def test_restart_in_place_keeps_the_model(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    bench.vehicle.drive(3)
    bench.finished(3)
    pipeline = bench.pipeline
    assert bench.transition("deactivate") == "SUCCESS"
    assert bench.transition("activate") == "SUCCESS"
    assert bench.pipeline is pipeline
    bench.wait(bench.connected)
    bench.ready()
    bench.vehicle.drive(3, start_ns=2 * 10**9)
    bench.finished(6)
    assert bench.node.frame_log.outcomes["processed"] == 6


def test_configuring_again_goes_on_with_the_frame_log_and_one_publisher_of_diagnostics(
    make_bench: Callable[..., Any], tmp_path: Path
) -> None:
    bench = make_bench().ready()
    bench.vehicle.drive(2)
    bench.finished(2)
    for transition in ("deactivate", "cleanup", "configure", "activate"):
        assert bench.transition(transition) == "SUCCESS"
    bench.wait(bench.connected)
    bench.ready()
    bench.vehicle.drive(2, start_ns=2 * 10**9)
    bench.finished(4)
    assert len(read_frame_log(tmp_path / "frame_log.jsonl")) == 4
    bench.wait(lambda: bench.vehicle.node.count_publishers("/diagnostics") == 1)


def test_a_warning_that_is_not_logged_is_not_worded(make_bench: Callable[..., Any]) -> None:
    from occbev.ros.perception_node import PerceptionNode

    bench, worded = make_bench(active=False), []
    for _ in range(2):
        PerceptionNode._warn(bench.node, "this", lambda: worded.append(1) or "text")
    assert worded == [1]


def test_a_decoder_that_fails_costs_its_camera_not_the_set(make_bench: Callable[..., Any]) -> None:
    bench = make_bench().ready()
    intake = bench.node._intake
    decode = intake._decode
    intake._decode = lambda f, c: 1 / 0 if f.camera == "CAM_LEFT" else decode(f, c)
    bench.vehicle.drive(3)
    bench.finished(3)
    assert bench.node.frame_log.outcomes == {"processed": 3}
    assert "not decoded: ZeroDivisionError" in bench.pipeline.seen[0].missing["CAM_LEFT"]
    assert intake.watch["CAM_LEFT"].refused["bad_image"] == 3


def test_live_parameters_are_checked_and_taken(make_bench: Callable[..., Any]) -> None:
    from rclpy.parameter import Parameter

    bench = make_bench().ready()
    (bad,) = bench.node.set_parameters([Parameter("occupancy.publish", value="everything")])
    assert (bad.successful, "must be occupied or observed" in bad.reason) == (False, True)
    (good,) = bench.node.set_parameters([Parameter("occupancy.publish", value="observed")])
    assert good.successful
    (fixed,) = bench.node.set_parameters([Parameter("model", value="other")])
    assert not fixed.successful
    bench.vehicle.drive(2)
    bench.finished(2)
    bench.wait(lambda: len(bench.received["points"]) == 2)
    assert bench.received["points"][-1].width == 40 * 40 * 8


def test_thresholds_change_while_the_node_runs(make_bench: Callable[..., Any]) -> None:
    from rclpy.parameter import Parameter

    bench = make_bench(sync__timeout_s=1).ready()  # a whole number where a double is wanted
    assert bench.node.parameters.sync.timeout_s == 1.0
    values = {"detection.score_threshold": 0.6, "sync.min_cameras": 3, "black_below": 0}
    for result in bench.node.set_parameters([Parameter(n, value=v) for n, v in values.items()]):
        assert result.successful, result.reason
    assert bench.pipeline.decoding.threshold == 0.6
    assert bench.node._intake.sync.config.min_cameras == 3
    (refused,) = bench.node.set_parameters([Parameter("sync.min_cameras", value=4)])
    assert "exceeds the 3 cameras" in refused.reason
    bench.vehicle.drive(3, cameras=("CAM_FRONT", "CAM_LEFT"))
    bench.finished(3)
    assert bench.node.frame_log.outcomes == {"too_few_cameras": 3}


def test_old_parameter_names_work_with_a_warning(
    make_bench: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    bench = make_bench(active=False, sets_at_once=2)
    assert bench.node.parameters.max_in_flight == 2
    assert "parameter sets_at_once is now called max_in_flight" in capfd.readouterr().err


def test_the_executor_of_rclpy_may_be_chosen(make_bench: Callable[..., Any]) -> None:
    from occbev.ros.executor import SparingExecutor

    bench = make_bench(executor="rclpy").ready()
    assert not isinstance(bench.node.executor, SparingExecutor)
    bench.vehicle.drive(3)
    bench.finished(3)
    assert bench.node.frame_log.outcomes == {"processed": 3}


def test_a_parameter_request_of_an_unknown_type_is_answered(make_bench: Callable[..., Any]) -> None:
    from rcl_interfaces.msg import Parameter, ParameterValue
    from rcl_interfaces.srv import SetParameters, SetParametersAtomically

    bench = make_bench()
    strange = Parameter(name="black_below", value=ParameterValue(type=99))
    right = Parameter(name="black_below", value=ParameterValue(type=2, integer_value=7))
    driver = bench.vehicle.node
    one = driver.create_client(SetParameters, "/perception/set_parameters")
    all_or_none = driver.create_client(SetParametersAtomically, "/perception/set_parameters_atomically")
    bench.wait(lambda: one.service_is_ready() and all_or_none.service_is_ready())
    answers = [
        one.call_async(SetParameters.Request(parameters=[strange, right])),
        all_or_none.call_async(SetParametersAtomically.Request(parameters=[right, strange])),
    ]
    bench.wait(lambda: all(answer.done() for answer in answers))
    refused, taken = answers[0].result().results
    assert not refused.successful
    assert "black_below" in refused.reason
    assert taken.successful
    assert not answers[1].result().result.successful
    assert bench.node.parameters.black_below == 7


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"executor": "fast"}, "executor 'fast': must be sparing or rclpy"),
        ({"threads": -1}, "threads is -1: must be between 0 and 256"),
        ({"sync__timeout_s": "soon"}, "sync.timeout_s is 'soon': want a number"),
        ({"decode_threads": 2.5}, "decode_threads is 2.5: want a whole number"),
    ],
)
def test_values_that_cannot_be_are_named(make_bench: Callable[..., Any], values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_bench(active=False, **values)


@pytest.mark.parametrize("values", [{}, {"threads": -1}], ids=["whole", "refused"])
def test_a_node_that_is_gone_leaves_no_part_of_dds_to_garbage_collection(
    values: dict[str, Any], stub_pipeline: Any, assert_nothing_runs: Callable[[], None]
) -> None:
    import rclpy
    from rclpy.parameter import Parameter

    from occbev.ros.perception_node import PerceptionNode

    context, kept = rclpy.Context(), []
    rclpy.init(context=context)
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    gc.disable()
    try:
        kept.append(PerceptionNode(stub_pipeline, context=context, parameter_overrides=overrides))
        assert kept[0].start()
        kept[0].close()
        kept[0].destroy_node()
    except ConfigError as error:
        kept.append(error)
    finally:
        rclpy.shutdown(context=context)
        assert_nothing_runs()
        gc.enable()


def run_main(lines: str) -> subprocess.Popen[str]:
    """Run the node's main() in a process of its own, since it sets signal handlers; `lines` come before it."""
    script = f"{textwrap.dedent(lines)}\nsys.exit(p.main([]))"
    imports = "import sys, time, rclpy; from occbev.ros import perception_node as p"
    command = [sys.executable, "-c", f"{imports}\n{script}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.parametrize(("cause", "status"), [("rclpy.shutdown()", 0), ("pass", 1)])
def test_a_signal_before_the_node_exists_is_no_failure(cause: str, status: int) -> None:
    process = run_main(f"""
        def interrupted():
            {cause}
            raise RuntimeError("the given context is not valid")
        p.PerceptionNode = interrupted
    """)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == status, text


def test_a_slow_network_does_not_hold_up_the_end_nor_fail_it() -> None:
    process = run_main("""
        from types import SimpleNamespace
        from occbev.grid import GRIDS
        from occbev.frame_job import FrameJob
        class Busy(p.PerceptionNode):
            def __init__(self):
                network = SimpleNamespace(grid=GRIDS["tiny"], decode_frame=None, about=dict, close=lambda: print("closed"))
                super().__init__(lambda parameters: network)
            def start(self):
                started = super().start()
                self._worker.put(FrameJob(1))
                return started
        def network(*_):
            print("at work", flush=True)
            time.sleep(60)
        p.PerceptionNode, p.PerceptionLine.prepare = Busy, network
    """)
    assert process.stdout is not None
    assert any(line == "at work\n" for line in process.stdout)
    process.terminate()
    begin = time.monotonic()
    text, _ = process.communicate(timeout=50)
    assert process.returncode == 0, text
    assert time.monotonic() - begin < 30
    assert "closed" not in text


def test_hostile_images_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """Eight images wait that are as large as their calibration allows, of as many scans as are decoded."""
    CameraRig((replace(fallback_camera("CAM_FRONT"), width=1600, height=1200),)).save(tmp_path / "rig.yaml")
    (tmp_path / "bomb.jpg").write_bytes(progressive(6400, 4800, 13))
    process = run_main(f"""
        from pathlib import Path
        from types import SimpleNamespace as Fields
        from rclpy.parameter import Parameter
        from occbev.config import ImageConfig
        from occbev.grid import GRIDS
        from occbev.inference.preprocess import Preprocessor
        decode, bomb = Preprocessor(ImageConfig()).decode, Path({str(tmp_path / "bomb.jpg")!r}).read_bytes()
        given = {{"rig": {str(tmp_path / "rig.yaml")!r}, "cameras.names": ["CAM_FRONT"]}}
        def traced(frame, camera):
            print("at work", flush=True)
            return decode(frame, camera)
        class Busy(p.PerceptionNode):
            def __init__(self):
                network = Fields(grid=GRIDS["tiny"], decode_frame=traced, about=dict, close=lambda: None)
                given_now = [Parameter(name, value=value) for name, value in given.items()]
                super().__init__(lambda parameters: network, parameter_overrides=given_now)
            def start(self):
                started = super().start()
                for i in range(1, 9):
                    header = Fields(stamp=Fields(sec=i, nanosec=0), frame_id="cam_front")
                    message = Fields(header=header, format="jpeg", data=bomb + bytes(i))
                    self._intake.add_image("CAM_FRONT", message, True, time.monotonic_ns())
                return started
        p.PerceptionNode = Busy
    """)
    assert process.stdout is not None
    assert any(line == "at work\n" for line in process.stdout)
    process.terminate()
    begin = time.monotonic()
    text, _ = process.communicate(timeout=50)
    assert process.returncode == 0, text
    assert time.monotonic() - begin < 10, "two seconds where nothing else runs"


def test_a_set_that_outlasts_the_end_is_booked_once_and_its_network_is_left_alone(
    make_bench: Callable[..., Any], tmp_path: Path
) -> None:
    bench = make_bench().ready()
    go, pipeline = threading.Event(), bench.pipeline
    run = pipeline.run
    pipeline.run = lambda *values: (go.wait(60), run(*values))[1]
    bench.vehicle.drive(2)
    bench.wait(lambda: bench.node._intake.sync.statistics.complete == 2)
    node = bench.node
    bench.stop()
    outcomes = [line["outcome"] for line in read_frame_log(tmp_path / "frame_log.jsonl")]
    assert outcomes == ["stopped", "stopped"]
    assert (node.is_overrun, pipeline.closed) == (True, False)
    go.set()
    bench.wait(lambda: not node.is_overrun)
    assert (node.frame_log.outcomes, len(pipeline.seen)) == ({"stopped": 2}, 1)


def test_odometry_of_another_frame_is_refused(make_bench: Callable[..., Any]) -> None:
    from nav_msgs.msg import Odometry

    bench = make_bench().ready()
    message = Odometry(child_frame_id="gps")
    message.pose.pose.orientation.w = 1.0
    bench.vehicle.publishers["vehicle"][2].publish(message)
    bench.wait(lambda: any("child_frame_id 'gps'" in line for line in bench.logged))
    assert bench.node._intake.ego.source == "none"


def test_random_bytes_never_stop_the_node(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(sync__timeout_s=0.05).ready()
    rng = np.random.default_rng(0)
    for i in range(40):
        data = bytearray(bench.vehicle.jpeg)
        for place in rng.integers(0, len(data), 6):
            data[place] = rng.integers(0, 256)
        stamp = 10**9 + i * 50_000_000
        bench.vehicle.image("CAM_LEFT", stamp, array("B", bytes(data)).tobytes()[: rng.integers(1, len(data))])
        bench.vehicle.image("CAM_FRONT", stamp)
        bench.vehicle.image("CAM_RIGHT", stamp)
        bench.wait(lambda i=i: sum(bench.node.frame_log.outcomes.values()) >= i - 2)
    bench.finished(40)
    assert set(bench.node.frame_log.outcomes) <= {"processed", "replaced_by_newer"}
