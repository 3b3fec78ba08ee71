"""Diagnostics and memory of the intake, without ROS."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from occbev.frame_job import FrameJob
from occbev.streams.frame_log import FrameLog
from occbev.streams.health import ERROR, WARN, health
from occbev.streams.intake import Intake
from occbev.streams.parameters import parameters_from_record

S = 10**9
PARAMETERS = parameters_from_record({"cameras": {"names": ["A", "B"]}, "frozen_after": 3})


def image(data: bytes, stamp_ns: int) -> Any:
    stamp = SimpleNamespace(sec=stamp_ns // S, nanosec=stamp_ns % S)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp, frame_id="a"), format="jpeg", data=data)


@pytest.mark.parametrize("hz", [0.5, 1.0, 2.0])
def test_a_slow_camera_does_not_flap(hz: float) -> None:
    intake, log, levels = Intake(PARAMETERS, lambda frame, camera: frame), FrameLog(), set()
    for number in range(6):
        arrival_ns = int(number * S / hz)
        for camera in ("A", "B"):
            intake.watch[camera].arrivals.append(arrival_ns)
        for share in (0.1, 0.9):
            if number > 1:
                now_ns = arrival_ns + int(share * S / hz)
                levels |= {s.level for s in health(intake, log, {}, {}, now_ns) if s.name.startswith("occbev: A")}
    assert ERROR not in levels
    text = next(s.text for s in health(intake, log, {}, {}, now_ns + int(4 * S / hz)) if s.name == "occbev: A")
    assert "silent for" in text
    intake.close()


def test_a_frame_log_that_is_not_written_any_more_is_named() -> None:
    intake, log = Intake(PARAMETERS, lambda frame, camera: frame), FrameLog("/dev/full")
    log.record(1, "processed")
    (whole,) = [s for s in health(intake, log, {}, {}, S) if s.name == "occbev: perception"]
    assert whole.level >= WARN
    assert "frame log /dev/full is not written any more" in whole.text
    intake.close()
    log.close()


@pytest.mark.parametrize("bad", ["frozen", "broken", "black"])
def test_a_bad_camera_holds_no_memory_until_the_garbage_collector_runs(bad: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    good = [cv2.imencode(".jpg", np.roll(pixels, i, 0))[1].tobytes() for i in range(8)]
    black = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    worst = {"frozen": good[0], "broken": good[0][:200], "black": black}[bad]

    def decode(frame: Any, camera: Any) -> Any:
        from dataclasses import replace

        from occbev.inference.preprocess import decode_image

        return replace(frame, image=decode_image(frame.image, frame.camera))

    intake = Intake(PARAMETERS, decode)
    intake.calibration.camera = lambda name: name  # type: ignore[method-assign,assignment,return-value]
    jobs: list[FrameJob] = []
    gc.disable()
    try:
        for number in range(8):
            stamp_ns = S + number * S // 10
            jobs += intake.add_image("A", image(good[number], stamp_ns), True, stamp_ns)
            jobs += intake.add_image("B", image(worst, stamp_ns), True, stamp_ns)
        jobs += intake.flush(2 * S)
        assert len(jobs) == 8
        for job in jobs:
            intake.gather(job)
        assert "B" in jobs[-1].missing
        assert "it is frozen" in jobs[-1].missing["B"], "the same image came eight times"
        alive = [weakref.ref(job) for job in jobs]
        jobs.clear()
        del job
        assert not any(ref() for ref in alive)
    finally:
        gc.enable()
        intake.close()
