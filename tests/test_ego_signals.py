"""What a vehicle says of its own motion: twists of odometry, by hand-computed drives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from occbev.ego_signals import GRAVITY, EgoSignals, TwistAxes, TwistHistory
from occbev.geometry import make_transform, rotation_from_rpy, rotation_from_yaw
from occbev.inference.families.bevformer import BevFormerModel
from occbev.inference.memory import Memory
from occbev.inference.reference_points import EgoMotion, can_bus
from occbev.messages.readers import MessageError, base_twist, pose_from_message
from occbev.messages.tf import Buffer
from occbev.rig import CameraRig
from occbev.streams.calibration import fallback_camera
from occbev.streams.ego_motion import EgoPoses
from occbev.streams.frame_log import FrameLog
from occbev.streams.health import health
from occbev.streams.intake import Intake
from occbev.streams.parameters import EgoMotionParameters, parameters_from_record

STEP_NS = 20_000_000
LEVEL = make_transform(rotation_from_yaw(0.7), (3.0, 4.0, 0.0))


def drive(speeds: list[float], yaw_rate: float = 0.0) -> TwistHistory:
    """A vehicle that says these speeds, 50 times a second from a stamp of 1 s on."""
    history = TwistHistory()
    for number, speed in enumerate(speeds):
        twist = np.array([speed, 0.0, 0.0]), np.array([0.0, 0.0, yaw_rate])
        history.add(1_000_000_000 + number * STEP_NS, *twist)
    return history


def test_a_turn_at_constant_speed_pushes_to_the_inside() -> None:
    signals = drive([5.0] * 50, yaw_rate=0.2).at(1_990_000_000, LEVEL)
    assert signals is not None
    np.testing.assert_allclose(signals.acceleration, [0, 5.0 * 0.2, GRAVITY], atol=1e-9)
    np.testing.assert_allclose(signals.velocity, [5, 0, 0])
    np.testing.assert_allclose(signals.rotation_rate, [0, 0, 0.2])


def test_braking_is_felt_backwards_beside_what_a_hill_does() -> None:
    uphill = make_transform(rotation_from_rpy(0, -0.1, 0), (0, 0, 0))
    signals = drive([10 - 0.05 * n for n in range(50)]).at(1_980_000_000, uphill)
    assert signals is not None
    want = [-2.5 + GRAVITY * math.sin(0.1), 0, GRAVITY * math.cos(0.1)]
    np.testing.assert_allclose(signals.acceleration, want, atol=1e-9)


def test_only_what_is_known_is_said() -> None:
    assert TwistHistory().at(0, LEVEL) is None
    assert drive([0.0] * 50).at(1_980_000_000, LEVEL) is None, "a publisher of poses leaves twists empty"
    history = drive([5.0] * 5)
    assert history.at(900_000_000, LEVEL) is None, "before the first"
    assert history.at(1_080_000_000 + 160_000_000, LEVEL) is None, "too old"
    young = history.at(1_080_000_000, LEVEL)
    assert young is not None
    np.testing.assert_allclose(young.acceleration, [0, 0, GRAVITY], err_msg="too young to tell a change of speed")
    history.add(500_000_000, np.array([1.0, 0, 0]), np.zeros(3))
    back = history.at(1_080_000_000, LEVEL)
    assert back is None, "after a step back what was before is forgotten"


def test_a_vehicle_that_stops_says_so() -> None:
    signals = drive([5.0] * 20 + [0.0] * 20).at(1_780_000_000, LEVEL)
    assert signals is not None
    assert not signals.velocity.any()


def test_a_mirror_turns_the_other_way() -> None:
    signals = EgoSignals.of([1, 2, 9.81, 0.1, 0.2, 0.3, 5, 1, 0])
    mirrored = signals.move(np.diag([1.0, -1, 1]) * 1.1)
    np.testing.assert_allclose(mirrored.acceleration, [1, -2, 9.81])
    np.testing.assert_allclose(mirrored.rotation_rate, [-0.1, 0.2, -0.3])
    np.testing.assert_allclose(mirrored.velocity, [5.5, -1.1, 0])
    assert EgoSignals.of(signals.values).values == signals.values


def odometry(child: str, linear: tuple[float, ...], angular: tuple[float, ...]) -> SimpleNamespace:
    """An Odometry at the origin; fields as messages have them."""

    def xyz(values: tuple[float, ...]) -> SimpleNamespace:
        return SimpleNamespace(**dict(zip("xyz", values, strict=True)))

    pose = SimpleNamespace(position=xyz((0, 0, 0)), orientation=SimpleNamespace(x=0.0, y=0.0, z=0.0, w=1.0))
    twist = SimpleNamespace(linear=xyz(linear), angular=xyz(angular))
    header = SimpleNamespace(frame_id="odom", stamp=SimpleNamespace(sec=1, nanosec=0))
    return SimpleNamespace(
        header=header,
        child_frame_id=child,
        pose=SimpleNamespace(pose=pose),
        twist=SimpleNamespace(twist=twist),
    )


def test_a_twist_of_another_frame_is_carried_to_the_base() -> None:
    """An IMU 2 m ahead that looks to the left: it moves sideways where the vehicle turns about its rear axle."""
    mount = rotation_from_yaw(math.pi / 2)
    q = (0.0, 0.0, math.sin(math.pi / 4), math.cos(math.pi / 4))
    transform = SimpleNamespace(
        header=SimpleNamespace(frame_id="base_link", stamp=SimpleNamespace(sec=0, nanosec=0)),
        child_frame_id="imu",
        transform=SimpleNamespace(
            translation=SimpleNamespace(x=2.0, y=0.0, z=0.0),
            rotation=SimpleNamespace(**dict(zip("xyzw", q, strict=True))),
        ),
    )
    buffer = Buffer()
    assert not buffer.add_message(SimpleNamespace(transforms=[transform]), True)
    in_base = np.array([4.0, 0.3 * 2.0, 0.0])  # of the place of the IMU
    pose = pose_from_message(odometry("imu", tuple(mount.T @ in_base), (0.0, 0.0, 0.3)))
    found = base_twist(pose, "base_link", buffer)
    assert found is not None
    np.testing.assert_allclose(found[0], [4, 0, 0], atol=1e-9)
    np.testing.assert_allclose(found[1], [0, 0, 0.3], atol=1e-9)
    with pytest.raises(MessageError, match="no transform joins"):
        base_twist(pose, "rear_axle", buffer)
    assert base_twist(pose_from_message(odometry("", (math.nan, 0, 0), (0, 0, 0))), "base_link", buffer) is None


def test_twists_count_where_poses_come_from_odometry() -> None:
    for source, known in (("odometry", True), ("auto", True), ("tf", False), ("none", False)):
        poses = EgoPoses(EgoMotionParameters(source=source), Buffer(), "base_link")
        for number in range(3):
            twist = np.array([3.0, 0, 0]), np.zeros(3)
            assert poses.add(10 + number * STEP_NS, make_transform(np.eye(3), (0.06 * number, 0, 0)), twist) == ""
        assert (poses.signals(10 + 2 * STEP_NS, np.eye(4)) is not None) == known
        poses.clear()
        assert poses.signals(10 + 2 * STEP_NS, np.eye(4)) is None


def test_a_bevformer_reads_what_is_said_and_derives_the_rest() -> None:
    """Numbers 7 to 15 are what the vehicle says; displacement, heading and turn stay those of the poses."""
    memory, rig = Memory(BevFormerModel()), CameraRig((fallback_camera("CAM_FRONT"),))
    said = EgoSignals.of([0.5, -0.4, 9.7, 0.01, 0.02, 0.03, 8.2, 0.1, 0.0])
    there, here = make_transform(rotation_from_yaw(0.2), (1, 2, 0)), make_transform(rotation_from_yaw(0.3), (4, 2, 0))
    first = memory.inputs(10, there, rig, said)["can_bus"][0]
    np.testing.assert_allclose(first[7:16], said.values, rtol=1e-6)
    derived = can_bus(here, EgoMotion.between(there, here, 0.5))
    given = can_bus(here, EgoMotion.between(there, here, 0.5), said)
    np.testing.assert_allclose(given[7:16], said.values, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(given, slice(7, 16)), np.delete(derived, slice(7, 16)))


def circle(velocity_in: str) -> Iterator[SimpleNamespace]:
    """Odometry of 6 s on a circle at 3 m/s, its velocity in the axes of base_link or of odom."""
    for number in range(300):
        seconds = number * STEP_NS / 1e9
        yaw = 1.0 + 0.3 * seconds
        turn = rotation_from_yaw(yaw)
        velocity = np.array([3.0, 0, 0]) if velocity_in == "base_link" else turn @ [3.0, 0, 0]
        message = odometry("base_link", tuple(velocity), (0.0, 0.0, 0.3))
        place = message.pose.pose.position
        place.x, place.y = 10 * math.sin(yaw), -10 * math.cos(yaw)
        message.pose.pose.orientation.z, message.pose.pose.orientation.w = math.sin(yaw / 2), math.cos(yaw / 2)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(10**9 + number * STEP_NS, 10**9)
        yield message


@pytest.mark.parametrize(("frame", "warnings"), [("base_link", 0), ("odom", 1)])
def test_a_twist_in_the_axes_of_the_parent_frame_is_named_once(frame: str, warnings: int) -> None:
    intake, problems = Intake(parameters_from_record({}), lambda image, camera: image), []
    for message in circle(frame):
        try:
            intake.add_odometry(message)
        except MessageError as error:
            problems.append(str(error))
    assert len(problems) == warnings
    (status,) = [s for s in health(intake, FrameLog(), {}, {}, 10**9) if s.name == "occbev: ego motion"]
    assert ("twist" in status.values) == bool(warnings)
    if warnings:
        assert "0 % if read in 'odom'; nav_msgs/Odometry has it in child_frame_id" in problems[0]
        assert "ego_motion.source: tf" in problems[0]
    assert len(intake.ego.poses([10**9 + STEP_NS]) or ()) == 1, "the poses themselves are taken"
    intake.close()


def test_axes_are_judged_only_where_the_two_readings_differ() -> None:
    """Straight along the parent's x axis both say the same; a scale that is off is of neither."""
    for yaw, scale, verdict in ((0.0, 1.0, ""), (1.5, 1.0, "child"), (1.5, 0.5, "neither"), (1.5, 0.0, "")):
        axes, turn = TwistAxes(), rotation_from_yaw(yaw)
        for number in range(300):
            place = turn @ [0.06 * number, 0, 0]
            axes.add(number * STEP_NS, make_transform(turn, place), np.array([3.0 * scale, 0, 0]))
        assert axes.verdict == verdict, (yaw, scale)
