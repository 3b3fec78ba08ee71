"""What a vehicle says of its own motion: twists of odometry, by hand-computed drives."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from occbev.ego_signals import GRAVITY, EgoSignals, TwistHistory
from occbev.geometry import make_transform, rotation_from_rpy, rotation_from_yaw
from occbev.inference.families.bevformer import BevFormerModel
from occbev.inference.memory import Memory
from occbev.inference.reference_points import EgoMotion, can_bus
from occbev.messages.readers import MessageError, base_twist, pose_from_message
from occbev.messages.tf import Buffer
from occbev.rig import CameraRig
from occbev.streams.calibration import fallback_camera
from occbev.streams.ego_motion import EgoPoses
from occbev.streams.parameters import EgoMotionParameters

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
