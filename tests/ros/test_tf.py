"""The transform buffer, by laws and by the semantics that tf2 documents; needs no ROS."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occbev.geometry import invert_transform, make_transform, rotation_from_rpy, xyzw_from_rotation
from occbev.messages import tf


def stamped(parent: str, child: str, matrix: np.ndarray, stamp_ns: int = 0) -> SimpleNamespace:
    """Make something shaped like geometry_msgs/TransformStamped."""
    x, y, z, w = xyzw_from_rotation(matrix[:3, :3])
    return SimpleNamespace(
        header=SimpleNamespace(frame_id=parent, stamp=SimpleNamespace(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)),
        child_frame_id=child,
        transform=SimpleNamespace(
            translation=SimpleNamespace(x=matrix[0, 3], y=matrix[1, 3], z=matrix[2, 3]),
            rotation=SimpleNamespace(x=x, y=y, z=z, w=w),
        ),
    )


def pose(x: float = 0.0, y: float = 0.0, z: float = 0.0, yaw: float = 0.0, pitch: float = 0.0) -> np.ndarray:
    return make_transform(rotation_from_rpy(0.0, pitch, yaw), (x, y, z))


@pytest.fixture
def drive() -> tf.Buffer:
    """odom -> base_link moving along x at 1 m/s for 5 s, a camera on it, a map above."""
    buffer = tf.Buffer()
    for i in range(51):
        buffer.set_transform(stamped("odom", "base_link", pose(i * 0.1, yaw=0.02 * i), i * 100_000_000 + 1))
    buffer.set_transform_static(stamped("base_link", "cam_front", pose(1.5, z=1.6, yaw=0.3)))
    buffer.set_transform_static(stamped("map", "odom", pose(100, 50, yaw=1.0)))
    return buffer


def test_chain_equals_the_product(drive: tf.Buffer) -> None:
    stamp = 2_050_000_001
    expected = pose(100, 50, yaw=1.0) @ pose(2.05, yaw=0.41) @ pose(1.5, z=1.6, yaw=0.3)
    np.testing.assert_allclose(drive.lookup_matrix("map", "cam_front", stamp), expected, atol=1e-9)
    np.testing.assert_allclose(drive.lookup_matrix("cam_front", "map", stamp), invert_transform(expected), atol=1e-9)


def test_time_zero_is_the_latest_common_time(drive: tf.Buffer) -> None:
    drive.set_transform(stamped("base_link", "turret", pose(yaw=1.0), 3_000_000_001))
    drive.set_transform(stamped("base_link", "turret", pose(yaw=1.1), 4_000_000_001))
    expected = pose(4.0, yaw=0.8) @ pose(yaw=1.1)
    np.testing.assert_allclose(drive.lookup_matrix("odom", "turret"), expected, atol=1e-9)
    # The chain between turret and camera does not pass odom.
    np.testing.assert_allclose(
        drive.lookup_matrix("cam_front", "turret"),
        invert_transform(pose(1.5, z=1.6, yaw=0.3)) @ pose(yaw=1.1),
        atol=1e-9,
    )


def test_static_chain_needs_no_time(drive: tf.Buffer) -> None:
    for stamp in (0, 1, 10**18):
        np.testing.assert_allclose(
            drive.lookup_matrix("base_link", "cam_front", stamp),
            pose(1.5, z=1.6, yaw=0.3),
            atol=1e-12,
        )


def test_errors_say_what_is_there(drive: tf.Buffer) -> None:
    with pytest.raises(tf.LookupException, match=r"'cam_rear' does not exist; known frames: base_link, cam_front"):
        drive.lookup_matrix("base_link", "cam_rear")
    drive.set_transform_static(stamped("world", "crane", pose()))
    with pytest.raises(tf.ConnectivityException, match="'crane' from 'world'"):
        drive.lookup_matrix("base_link", "crane")
    with pytest.raises(
        tf.ExtrapolationException,
        match=r"into the future.*requested 6000000000 ns.*latest 5000000001",
    ):
        drive.lookup_matrix("odom", "base_link", 6_000_000_000)
    with pytest.raises(tf.ExtrapolationException, match="into the past"):
        drive.lookup_matrix("odom", "base_link", -5)


def test_bad_transforms_are_refused(drive: tf.Buffer) -> None:
    loop = stamped("base_link", "base_link", pose())
    with pytest.raises(tf.InvalidArgumentException, match="own parent"):
        drive.set_transform(loop)
    unnormalised = stamped("base_link", "a", pose())
    unnormalised.transform.rotation.w = 2.0
    with pytest.raises(tf.InvalidArgumentException, match=r"norm 2\.0"):
        drive.set_transform(unnormalised)
    broken = stamped("base_link", "a", pose(float("nan")))
    with pytest.raises(tf.InvalidArgumentException, match="NaN"):
        drive.set_transform(broken)
    with pytest.raises(tf.InvalidArgumentException, match="no name"):
        drive.set_transform(stamped("", "a", pose()))


def test_a_loop_of_frames_is_named() -> None:
    buffer = tf.Buffer()
    buffer.set_transform_static(stamped("a", "b", pose()))
    buffer.set_transform_static(stamped("b", "a", pose()))
    buffer.set_transform_static(stamped("x", "c", pose()))
    with pytest.raises(tf.LookupException, match="loop"):
        buffer.lookup_matrix("c", "a")


def test_static_beats_dynamic_and_counts_its_changes(drive: tf.Buffer) -> None:
    version = drive.static_version
    drive.set_transform_static(stamped("base_link", "cam_front", pose(1.5, z=1.6, yaw=0.3)))
    assert drive.static_version == version
    drive.set_transform(stamped("base_link", "cam_front", pose(9), 5))
    assert drive.lookup_matrix("base_link", "cam_front")[0, 3] == 1.5
    drive.set_transform_static(stamped("base_link", "cam_front", pose(2)))
    assert drive.static_version == version + 1
    assert drive.lookup_matrix("base_link", "cam_front")[0, 3] == 2


def test_frames_that_are_at_two_places_are_named(drive: tf.Buffer) -> None:
    assert drive.take_conflicts() == {}
    drive.set_transform_static(stamped("base_link", "cam_front", pose(1.5, z=1.6, yaw=0.3)))
    drive.set_transform(stamped("odom", "base_link", pose(9), 6_000_000_000))
    assert drive.take_conflicts() == {}
    drive.set_transform_static(stamped("base_link", "cam_front", pose(2)))
    drive.set_transform(stamped("map", "base_link", pose(9), 7_000_000_000))
    drive.set_transform(stamped("map", "cam_front", pose(9), 7_000_000_000))
    one, two = sorted(drive.take_conflicts().values())
    assert "frame 'base_link' was a child of 'odom', then of 'map'" in one
    assert "frame 'cam_front' was a child of 'base_link', then of 'map'" in two
    assert "the static one holds" in two
    assert drive.take_conflicts() == {}


def test_static_chains_are_told_from_moving_ones(drive: tf.Buffer) -> None:
    assert drive.is_static("base_link", "cam_front")
    assert not drive.is_static("odom", "cam_front")
    assert not drive.is_static("base_link", "nowhere")


def test_names_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf, "MAX_FRAMES", 3)
    buffer = tf.Buffer()
    for name in "abc":
        buffer.set_transform(stamped("odom", name, pose(), 5))
    with pytest.raises(tf.InvalidArgumentException, match="3 frames are known already"):
        buffer.set_transform(stamped("odom", "d", pose(), 5))
    buffer.set_transform(stamped("odom", "a", pose(), 6))
    for number, name in enumerate("pq"):
        buffer.set_transform(stamped(name, "a", pose(), 7 + number))
    with pytest.raises(tf.InvalidArgumentException, match="3 frames are known already"):
        buffer.set_transform(stamped("r", "a", pose(), 9))
    assert set(buffer.frames()) == {"odom", *"abcpq"}


def test_a_transform_that_is_not_kept_adds_no_frame(drive: tf.Buffer) -> None:
    before = drive.frames()
    drive.set_transform(stamped("elsewhere", "cam_front", pose(), 5))
    assert drive.frames() == before


def test_history_is_bounded_and_cleared_without_statics(drive: tf.Buffer) -> None:
    buffer = tf.Buffer(cache_s=1.0)
    for i in range(31):
        buffer.set_transform(stamped("odom", "base_link", pose(i), i * 100_000_000))
    with pytest.raises(tf.ExtrapolationException):
        buffer.lookup_matrix("odom", "base_link", 1_900_000_000)
    assert buffer.lookup_matrix("odom", "base_link", 2_000_000_000)[0, 3] == 20
    drive.clear()
    assert not drive.can_transform("odom", "base_link")
    assert drive.can_transform("base_link", "cam_front")


def test_late_and_repeated_data_keep_their_order() -> None:
    buffer = tf.Buffer()
    for stamp, x in ((10, 1.0), (30, 3.0), (20, 2.0), (20, 9.0)):
        buffer.set_transform(stamped("odom", "base_link", pose(x), stamp))
    assert buffer.lookup_matrix("odom", "base_link", 20)[0, 3] == 2.0
    assert buffer.lookup_matrix("odom", "base_link", 15)[0, 3] == pytest.approx(1.5)


def test_reparenting_follows_time() -> None:
    buffer = tf.Buffer()
    buffer.set_transform(stamped("a", "c", pose(1), 10))
    buffer.set_transform(stamped("b", "c", pose(2), 20))
    assert buffer.lookup_matrix("a", "c", 15)[0, 3] == 1
    assert buffer.lookup_matrix("b", "c", 20)[0, 3] == 2


def test_leading_slashes_are_stripped(drive: tf.Buffer) -> None:
    drive.set_transform_static(stamped("/base_link", "/cam_rear", pose(-1)))
    assert drive.lookup_matrix("base_link", "cam_rear")[0, 3] == -1
    assert drive.can_transform("/odom", "/cam_rear")


def test_a_waiting_lookup_wakes_up() -> None:
    buffer = tf.Buffer()
    timer = threading.Timer(0.05, lambda: buffer.set_transform_static(stamped("a", "b", pose(4))))
    timer.start()
    assert buffer.lookup_matrix("a", "b", 0, timeout=5_000_000_000)[0, 3] == 4
    timer.join()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6), st.floats(0, 1))
def test_interpolation_agrees_with_the_trajectory(values: list[float], share: float) -> None:
    from occbev.trajectory import Trajectory

    first, last = pose(*values[:3], yaw=values[3], pitch=0.2), pose(*values[2:5], yaw=values[5])
    stamp = 1_000_000_000 + int(share * 100_000_000)
    buffer = tf.Buffer()
    buffer.set_transform(stamped("odom", "base_link", first, 1_000_000_000))
    buffer.set_transform(stamped("odom", "base_link", last, 1_100_000_000))
    trajectory = Trajectory(np.array([1_000_000_000, 1_100_000_000]), np.stack([first, last]))
    np.testing.assert_allclose(buffer.lookup_matrix("odom", "base_link", stamp), trajectory.at(stamp), atol=1e-6)


def test_equals_tf2_where_it_is_installed(drive: tf.Buffer) -> None:
    tf2_ros = pytest.importorskip("tf2_ros", reason="tf2_ros is not on PyPI")
    time = pytest.importorskip("rclpy.time")
    other = tf2_ros.Buffer()
    for i in range(51):
        message = tf._transform_message("odom", "base_link", pose(i * 0.1, yaw=0.02 * i), i * 100_000_000 + 1)
        other.set_transform(message, "test")
    theirs = other.lookup_transform("odom", "base_link", time.Time(nanoseconds=2_050_000_001))
    t = theirs.transform.translation
    np.testing.assert_allclose(
        (t.x, t.y, t.z), drive.lookup_matrix("odom", "base_link", 2_050_000_001)[:3, 3], atol=1e-9
    )
