"""A camera that moves in base_link, as on a pan-tilt head, or changes its calibration, without ROS."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from occbev.streams.frame_log import FrameLog
from occbev.streams.health import OK, WARN, health
from occbev.streams.intake import Intake
from occbev.streams.parameters import parameters_from_record

S = 10**9
PARAMETERS = parameters_from_record({"cameras": {"names": ["A"]}, "ego_motion": {"wait_s": 1.0}})


def header(frame: str, stamp_ns: int = 0) -> Any:
    return SimpleNamespace(frame_id=frame, stamp=SimpleNamespace(sec=stamp_ns // S, nanosec=stamp_ns % S))


def send_head(intake: Intake, stamp_ns: int, height: float) -> None:
    """Publish where the camera's mount is: so high above base_link."""
    pose = SimpleNamespace(
        translation=SimpleNamespace(x=0.0, y=0.0, z=height), rotation=SimpleNamespace(x=-0.5, y=0.5, z=-0.5, w=0.5)
    )
    transform = SimpleNamespace(header=header("base_link", stamp_ns), child_frame_id="a", transform=pose)
    intake.add_transforms(SimpleNamespace(transforms=[transform]), False, stamp_ns)


def send_info(intake: Intake, focal: float = 50.0) -> None:
    k = [focal, 0.0, 32.0, 0.0, focal, 24.0, 0.0, 0.0, 1.0]
    p, region = [*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0], SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0)
    info = {"width": 64, "height": 48, "k": k, "p": p, "d": [], "distortion_model": "plumb_bob", "roi": region}
    intake.add_info("A", SimpleNamespace(header=header("a"), binning_x=0, binning_y=0, **info))


@pytest.fixture
def intake() -> Any:
    made = Intake(PARAMETERS, lambda frame, camera: frame)
    send_info(made)
    yield made
    made.close()


def heights(intake: Intake, *stamps_ns: int) -> list[float]:
    return [float(intake.read_calibration({"A": stamp}).rig["A"].cam2ego[2, 3]) for stamp in stamps_ns]


def describe(intake: Intake) -> tuple[int, str]:
    intake.watch["A"].arrivals.append(S)
    status = next(s for s in health(intake, FrameLog(), {}, {}, S) if s.name == "occbev: A")
    return status.level, status.text


def test_a_camera_that_moves_is_placed_where_it_was_at_its_exposure(intake: Intake) -> None:
    for tenth in range(11):
        send_head(intake, S + tenth * S // 10, 1.0 + tenth / 10)
    assert heights(intake, S + S // 4, S + S // 2) == pytest.approx([1.25, 1.5])
    assert describe(intake) == (OK, "good")
    assert heights(intake, S // 2, 2 * S + S // 2) == pytest.approx([1.0, 2.0]), "the nearest that is known"
    level, text = describe(intake)
    assert (level, text) == (WARN, "frame 'a' moves, but its newest transform is 0.50 s older than the image")


def test_the_transform_of_a_camera_that_moves_is_waited_for(intake: Intake) -> None:
    send_head(intake, S, 1.0)
    send_head(intake, S + S // 10, 1.1)
    late = threading.Timer(0.1, send_head, (intake, S + 2 * S // 10, 1.2))
    late.start()
    intake.calibration.wait_until({"A": S + 2 * S // 10}, 10.0)
    assert heights(intake, S + 2 * S // 10) == pytest.approx([1.2])
    late.join()


def test_a_camera_that_stands_still_on_tf_is_not_waited_for_and_stays_the_same(intake: Intake) -> None:
    for second in range(1, 4):
        send_head(intake, second * S, 1.1)
    begin = time.monotonic()
    intake.calibration.wait_until({"A": 3 * S + S // 2}, 10.0)
    assert time.monotonic() - begin < 5.0
    rigs = {id(intake.read_calibration({"A": stamp}).rig) for stamp in range(S, 4 * S, S // 7)}
    assert len(rigs) == 1
    assert describe(intake) == (OK, "good")


def test_a_leading_slash_of_a_frame_means_nothing(intake: Intake) -> None:
    send_head(intake, S, 1.1)
    intake.calibration.note_image_frame("A", "/a")
    assert describe(intake) == (OK, "good")


def test_a_calibration_that_changes_back_and_forth_is_named(intake: Intake) -> None:
    send_head(intake, S, 1.1)
    for focal in (50.0, 55.0, 55.0, 60.0):
        send_info(intake, focal)
    assert describe(intake) == (OK, "good"), "a camera that is calibrated again"
    send_info(intake, 55.0)
    text = "its CameraInfo changes back and forth: do two publishers send ~/input/a/camera_info?"
    assert describe(intake) == (WARN, text)
