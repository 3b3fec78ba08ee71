"""Waiting for ego poses: only where one can still come; needs no ROS."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from occbev.geometry import make_transform
from occbev.messages.tf import Buffer
from occbev.streams.ego_motion import EgoPoses
from occbev.streams.parameters import EgoMotionParameters
from occbev.trajectory import PoseError

S = 10**9
LONG_S = 2.0
"""What a wait that should not be would take."""


class Poses:
    """Ego motion of one source, and a way to feed it."""

    def __init__(self, source: str) -> None:
        self.buffer = Buffer()
        parameters = EgoMotionParameters(source=source)
        self.ego = EgoPoses(parameters, self.buffer, "base_link")
        self._source = source

    def add(self, stamp_ns: int, x: float = 1.0) -> None:
        if self._source == "odometry":
            self.ego.add(stamp_ns, make_transform(np.eye(3), (x, 0, 0)))
        else:
            self.buffer.set_transform(_transform(stamp_ns, x))

    def waited_s(self, stamp_ns: int) -> float:
        begin = time.monotonic()
        self.ego.wait_until(stamp_ns, LONG_S)
        return time.monotonic() - begin


def _transform(stamp_ns: int, x: float) -> Any:
    stamp = SimpleNamespace(sec=stamp_ns // S, nanosec=stamp_ns % S)
    return SimpleNamespace(
        header=SimpleNamespace(frame_id="odom", stamp=stamp),
        child_frame_id="base_link",
        transform=SimpleNamespace(
            translation=SimpleNamespace(x=x, y=0.0, z=0.0),
            rotation=SimpleNamespace(x=0.0, y=0.0, z=0.0, w=1.0),
        ),
    )


@pytest.mark.parametrize("source", ["odometry", "tf"])
@pytest.mark.parametrize(
    ("history", "stamp_ns"),
    [([], 50 * S), ([60 * S, 61 * S], 50 * S), ([40 * S, 41 * S], 50 * S), ([49 * S, 50 * S], 50 * S)],
    ids=["nothing ever came", "the stamp is older than all", "poses have stopped", "it is there"],
)
def test_nothing_waits_for_a_pose_that_cannot_come(source: str, history: list[int], stamp_ns: int) -> None:
    poses = Poses(source)
    for known in history:
        poses.add(known)
    assert poses.waited_s(stamp_ns) < LONG_S / 4


@pytest.mark.parametrize("source", ["odometry", "tf"])
def test_a_pose_that_is_a_little_late_is_waited_for(source: str) -> None:
    poses = Poses(source)
    poses.add(49 * S)
    timer = threading.Timer(0.1, poses.add, [50 * S + 1])
    timer.start()
    assert 0.05 < poses.waited_s(49 * S + S // 2) < LONG_S / 4
    timer.join()


def test_a_clock_jump_ends_the_wait() -> None:
    poses = Poses("odometry")
    poses.add(49 * S)
    timer = threading.Timer(0.1, poses.ego.clear)
    timer.start()
    assert poses.waited_s(49 * S + S // 2) < LONG_S / 4
    timer.join()


@pytest.mark.parametrize("source", ["odometry", "tf"])
def test_poses_are_extrapolated_for_a_tenth_of_a_second(source: str) -> None:
    poses = Poses(source)
    for number in range(21):
        poses.add(49 * S + number * S // 20, x=0.5 * number)  # 10 m/s
    found = poses.ego.poses([50 * S - S // 40, 50 * S + 80_000_000])
    assert found is not None
    assert [p[0, 3] for p in found] == pytest.approx([9.75, 10.8])
    assert poses.ego.extrapolated_s == pytest.approx(0.08)
    with pytest.raises(PoseError, match=rf"the newest pose from {source} is 0\.11 s older than the images"):
        poses.ego.poses([50 * S + 110_000_000])
    poses.ego.poses([50 * S])
    assert poses.ego.extrapolated_s == 0


def test_a_pose_that_jumps_is_named_and_begins_anew() -> None:
    poses = Poses("odometry")
    far = np.eye(4)
    far[0, 3] = 300.0
    assert poses.ego.add(S, np.eye(4)) == ""
    assert "jumps by 300.0 m in 0.050 s" in poses.ego.add(S + 50_000_000, far)
    assert poses.ego.add(S + 100_000_000, far) == ""
    with pytest.raises(PoseError):
        poses.ego.poses([S])


@pytest.mark.parametrize("source", ["odometry", "tf"])
def test_late_poses_cost_no_more_than_the_wait_that_is_set(source: str) -> None:
    poses = Poses(source)
    poses.add(49 * S)
    begin = time.monotonic()
    poses.ego.wait_until(49 * S + S // 2, 0.1)
    assert 0.08 < time.monotonic() - begin < 0.5
