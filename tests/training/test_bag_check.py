"""Verdicts on bags: a good one passes, and each fault is named by the verdict that is about it."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="bags are read with rosbags")

from tests.training.conftest import TinyRecording
from tests.training.test_bags import rewrite

from occbev.geometry import make_transform, rotation_from_rpy, transform_points, xyzw_from_rotation
from occbev.messages.readers import pose_from_message
from occbev.results import Sweep
from occbev_training.sources.bag_check import TopicTimes, check_bag, propose_ego_box
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.bag_writer import TYPESTORE, write_bag
from occbev_training.sources.clocks import ClockOffset
from occbev_training.sources.recording import RecordingError


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    from tests.training.conftest import TinyRecording

    path = tmp_path_factory.mktemp("bags") / "good"
    recording = TinyRecording(keys=4)
    write_bag(recording, path)
    return path


def verdicts_by_name(path) -> dict:
    return {verdict.requirement: verdict for verdict in check_bag(path)}


def test_a_good_bag_passes_all_but_the_camera_rate(bag) -> None:
    found = verdicts_by_name(bag)
    failed = [name for name, verdict in found.items() if verdict.must and not verdict.ok]
    assert all(name.startswith("camera ") for name in failed), "key frames come at 2 Hz in the test drive"
    assert "100.0 ms" in found["per-point time"].text or found["per-point time"].ok
    assert found["message counts"].ok
    assert not found["IMU"].ok
    assert not found["IMU"].must


def test_sizes_and_messages_that_were_left_out_have_their_lines(bag, tmp_path) -> None:
    from tests.training.test_bags import rewrite

    found = verdicts_by_name(bag)
    assert found["image size of CAM_FRONT"].ok
    assert found["image size of CAM_FRONT"].text == "images 64x40; calibration 64x40"
    assert found["messages left out"].text == "none"
    number = iter(range(1000))

    def spoil(topic: str, message):
        if topic in ("/cam_back/camera_info", "/cam_front/camera_info"):
            message.width = 128
        if topic == "/cam_front/camera_info":
            message.height = 80
        if topic == "/odometry" and next(number) < 5:
            message.pose.pose.orientation.w = float("nan")
        return message

    found = verdicts_by_name(rewrite(bag, tmp_path / "spoiled", spoil))
    front, back = found["image size of CAM_FRONT"], found["image size of CAM_BACK"]
    assert not front.ok
    assert front.text == "images 64x40; calibration 128x80: it is scaled to the images"
    assert not back.ok
    assert back.text == "images 64x40; calibration 128x40: images that are not 128x40 are missing"
    assert found["messages left out"].text == "/odometry: bad pose 5"


def test_a_bag_without_cameras_says_which_topics_it_has(bag, tmp_path) -> None:
    from occbev.messages.topics import BagTopics
    from occbev_training.sources.bag_index import BagOptions

    with pytest.raises(RecordingError, match="no such bag"):
        check_bag(tmp_path / "absent")
    found = {v.requirement: v for v in check_bag(bag, BagOptions(BagTopics({}, {}, None, None)))}
    assert not found["lidar"].ok
    assert not found["transforms and calibration"].ok


def times(stamps, lag) -> TopicTimes:
    stamps = np.asarray(stamps, np.int64)
    return TopicTimes(stamps, stamps + np.asarray(lag, np.int64))


def test_rate_offset_and_drift_are_measured() -> None:
    stamps = 10**18 + np.arange(200, dtype=np.int64) * 50_000_000
    noise = np.random.default_rng(0).integers(0, 2_000_000, 200)
    steady = times(stamps, 5_000_000 + noise)
    assert steady.rate == pytest.approx(20.0)
    assert abs(steady.drift) < 5e-4
    assert np.median(steady.lag) == pytest.approx(0.006, abs=1e-3)
    drifting = times(stamps, (np.arange(200) * 50_000_000 * 1e-3).astype(np.int64))
    assert drifting.drift == pytest.approx(1e-3, rel=0.05)
    assert times([5], [0]).rate == times([], []).rate == 0.0


def test_clock_faults_are_counted() -> None:
    from occbev_training.sources.bag_check import _clock, _stamps

    stamps = 10**18 + np.arange(100, dtype=np.int64) * 100_000_000
    good = times(stamps, np.full(100, 3_000_000))
    assert _stamps("/t", good).ok
    assert _clock("/t", good).ok
    broken = stamps.copy()
    broken[10], broken[20], broken[30] = 0, broken[19], broken[28]
    verdict = _stamps("/t", times(broken, np.zeros(100)))
    assert not verdict.ok
    assert "1 zero stamps, 2 repeated stamps, 0 jumps back" in verdict.text
    assert not _clock("/t", times(stamps, np.full(100, 2_000_000_000))).ok, "two seconds off"
    jump = np.where(np.arange(100) < 50, 0, 1_500_000_000)
    assert not _clock("/t", times(stamps, jump)).ok, "a jump in the middle"


def test_rates_are_those_of_the_messages_that_are_used() -> None:
    from occbev_training.sources.bag_check import _rate

    stamps = 10**18 + np.arange(100, dtype=np.int64) * 100_000_000
    stamps[10], stamps[20] = 0, stamps[19]
    assert _rate(times(stamps, np.zeros(100))) == pytest.approx(10, rel=0.05)
    stamps[50:] -= 3_600_000_000_000
    assert _rate(times(stamps, np.zeros(100))) == pytest.approx(10, rel=0.05)
    assert _rate(times([], [])) == _rate(times([5], [0])) == 0.0


def test_poses_of_tf_count_by_the_frame_of_the_vehicle(bag, tmp_path) -> None:
    """Other transforms on /tf do not make poses come more often."""
    recording = TinyRecording(keys=4)
    poses = recording.trajectory.ego2global[::5].copy()
    recording.trajectory = dataclasses.replace(
        recording.trajectory, stamp_ns=recording.trajectory.stamp_ns[::5], ego2global=poses
    )
    smooth = tmp_path / "smooth"
    write_bag(recording, smooth)
    verdict = verdicts_by_name(smooth)["odometry"]
    assert verdict.ok, "rare poses do where they can be interpolated"
    assert "10.0 Hz, interpolation leaves" in verdict.text
    poses[::2] = poses[::2] @ make_transform(rotation_from_rpy(0, 0, 0.03), (0, 0, 0))
    slow = tmp_path / "slow"
    write_bag(recording, slow)

    def wheel(topic: str, message):
        if topic == "/tf":
            other = copy.deepcopy(message.transforms[0])
            other.child_frame_id = "wheel"
            message.transforms.insert(0, other)
        return None if topic == "/odometry" else message

    verdict = verdicts_by_name(rewrite(slow, tmp_path / "wheels", wheel))["odometry"]
    assert not verdict.ok
    assert "poses of /tf: 10.0 Hz" in verdict.text


def test_a_frame_with_two_parents_and_poses_that_disagree_are_named(bag, tmp_path) -> None:
    good = verdicts_by_name(bag)
    assert good["parents of frames"].ok
    assert good["odometry against /tf"].ok

    def other(topic: str, message):
        if topic == "/tf":
            base = message.transforms[0]
            base.transform.translation.x *= 1.5
            map2base = copy.deepcopy(base)
            map2base.header.frame_id = "survey"
            message.transforms.append(map2base)
        return message

    found = verdicts_by_name(rewrite(bag, tmp_path / "other", other))
    assert not found["odometry against /tf"].ok
    assert "/odometry and /tf: over a second they differ by up to" in found["odometry against /tf"].text
    assert found["parents of frames"].must
    assert "'survey'" in found["parents of frames"].text


def test_a_twist_in_the_axes_of_the_odometry_frame_is_advice(bag, tmp_path) -> None:
    """The world is turned by 90 degrees, so that the axes of odom and of base_link differ."""
    quarter = make_transform(rotation_from_rpy(0, 0, np.pi / 2), (0, 0, 0))

    def turn(topic: str, message, in_odom: bool):
        if topic == "/odometry":
            pose = pose_from_message(message)
            turned = quarter @ pose.child2parent
            place, q = message.pose.pose.position, message.pose.pose.orientation
            place.x, place.y, place.z = turned[:3, 3].tolist()
            q.x, q.y, q.z, q.w = xyzw_from_rotation(turned[:3, :3]).tolist()
            linear = message.twist.twist.linear
            if in_odom:
                linear.x, linear.y, linear.z = (turned[:3, :3] @ pose.twist[:3]).tolist()
        return None if topic == "/tf" else message

    good = rewrite(bag, tmp_path / "good", partial(turn, in_odom=False))
    verdict = verdicts_by_name(good)["twist of odometry"]
    assert verdict.ok
    assert "0 % of the way if read in 'base_link'" in verdict.text
    verdict = verdicts_by_name(rewrite(bag, tmp_path / "bad", partial(turn, in_odom=True)))["twist of odometry"]
    assert not verdict.ok
    assert not verdict.must
    assert "/odometry: over " in verdict.text
    assert "turn it where it is published" in verdict.text


def test_what_cannot_be_read_does_not_end_the_check(bag, tmp_path) -> None:
    number = iter(range(1000))

    def cut(topic: str, message):
        if topic == "/lidar_top/points" and next(number) % 4 == 1:
            message.data = message.data[:-7]
        if topic == "/cam_back/image/compressed":
            message = TYPESTORE.types["sensor_msgs/msg/Image"](
                message.header, 40, 64, "rgb8", 0, 192, np.zeros(100, np.uint8)
            )
        return message

    found = verdicts_by_name(rewrite(bag, tmp_path / "cut", cut))
    assert "turns seen on /lidar_top/points" in found
    assert "turns seen on /cam_back/image/compressed" in found


def test_an_offset_that_is_not_sure_makes_no_bag_useless(bag, monkeypatch) -> None:
    from occbev_training.sources import bag_check

    for spread, correlation, must in ((0.08, 0.9, False), (0.002, 0.3, False), (0.002, 0.9, True)):
        offset = ClockOffset(0.2, spread, correlation, "+200 ms is more than 150 ms")
        monkeypatch.setattr(bag_check, "measure_clocks", lambda _, offset=offset: {"/t": offset})
        verdict = verdicts_by_name(bag)["turns seen on /t"]
        assert not verdict.ok
        assert verdict.must == must


def test_without_an_ego_box_the_reason_is_told(bag) -> None:
    from occbev_training.cli.bag_check import _ego_box

    box, reason = _ego_box(bag, BagOptions())
    assert box is None
    assert "less than 20 m" in reason


def test_drift_counts_only_where_it_is_sure() -> None:
    """50 ppm over 20 s are 1 ms, which jitter hides; over 10 minutes they show."""
    for seconds, sure in ((20, False), (600, True)):
        stamps = 10**18 + np.arange(seconds * 10, dtype=np.int64) * 100_000_000
        noise = np.random.default_rng(0).normal(0, 2e6, len(stamps))
        drifting = times(stamps, (100e-6 * (stamps - stamps[0]) + noise).astype(np.int64))
        assert drifting.drifts == sure
        assert not times(stamps, noise.astype(np.int64)).drifts


def test_the_ego_box_is_found_from_what_never_moves(make_recording) -> None:
    recording = make_recording(keys=12)
    rng = np.random.default_rng(3)
    low, high = np.array([-1.0, -0.9, 0.3]), np.array([3.0, 0.9, 1.6])
    axes = [np.arange(a, b, 0.1) + 0.05 for a, b in zip(low, high, strict=True)]
    body = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)

    class Bodied(type(recording)):
        def sweep(self, index: int) -> Sweep:
            swept = super().sweep(index)
            other = rng.uniform((-20, -20, -0.5), (20, 20, 4), (2000, 3))
            points = np.vstack([body, other])
            ego2lidar = np.linalg.inv(self.lidar2ego)
            return dataclasses.replace(
                swept,
                points=transform_points(ego2lidar, points).astype(np.float32),
                intensity=None,
                time_offset=None,
            )

    drive = Bodied(keys=12)
    box = propose_ego_box(drive)
    assert np.allclose(box.lo, low, atol=0.11)
    assert np.allclose(box.hi, high, atol=0.11)

    class Broken(Bodied):
        def sweep(self, index: int) -> Sweep:
            if index % 7 == 3:
                raise RecordingError("cut")
            return super().sweep(index)

    broken = Broken(keys=12)
    shorter = slice(0, -10)  # the last sweeps have no pose
    broken.trajectory = dataclasses.replace(
        broken.trajectory,
        stamp_ns=broken.trajectory.stamp_ns[shorter],
        ego2global=broken.trajectory.ego2global[shorter],
    )
    assert propose_ego_box(broken) == box
    still = Bodied(keys=12)
    still.trajectory = dataclasses.replace(
        still.trajectory,
        ego2global=np.repeat(still.trajectory.ego2global[:1], len(still.trajectory.stamp_ns), 0),
    )
    with pytest.raises(RecordingError, match="less than 20 m"):
        propose_ego_box(still)
