"""Wrong bytes and headers by the hundred: the intake refuses or takes each, and nothing else ever happens.

OCCBEV_FUZZ_COUNT=10000 pytest tests/ros/test_fuzz.py    runs the long version.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from occbev.inference.preprocess import decode_image
from occbev.messages.readers import ENCODINGS, MessageError
from occbev.results import CameraFrame
from occbev.rig import Camera, CameraRig
from occbev.streams.intake import Intake
from occbev.streams.parameters import parameters_from_record

COUNT = int(os.environ.get("OCCBEV_FUZZ_COUNT", "500"))
CAMERAS = ("A", "B")
SIZES = (0, 1, 7, 48, 64, 65_535, 2**31, 2**32 - 1)
NUMBERS = (0.0, 1.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), 0.5)


def header(rng: random.Random) -> Any:
    stamp = SimpleNamespace(sec=rng.choice((0, 1, rng.randint(2, 10**6), 2**31 - 1)), nanosec=rng.randint(0, 10**9 - 1))
    return SimpleNamespace(stamp=stamp, frame_id=rng.choice(("", "a", "/a", "base_link", "\u00e4" * 50)))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, repeat or replace bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(0, 12)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    if rng.random() < 0.5:
        changed = changed[: rng.randint(0, len(changed))]
    if rng.random() < 0.1:
        changed += os.urandom(rng.randint(0, 200))
    return bytes(changed)


def compressed(rng: random.Random, originals: list[bytes]) -> Any:
    kind = rng.choice(("jpeg", "png", "", "tiff", "rgb8; jpeg compressed bgr8"))
    data = np.frombuffer(mutated(rng.choice(originals), rng), np.uint8)
    return SimpleNamespace(header=header(rng), format=kind, data=data)


def raw(rng: random.Random) -> Any:
    return SimpleNamespace(
        header=header(rng),
        height=rng.choice(SIZES),
        width=rng.choice(SIZES),
        step=rng.choice(SIZES),
        encoding=rng.choice((*ENCODINGS, "mono16", "", "rgb8\x00")),
        is_bigendian=rng.randint(0, 1),
        data=np.zeros(rng.choice((0, 10, 48 * 64, 48 * 64 * 3)), np.uint8),
    )


def info(rng: random.Random) -> Any:
    def numbers(count: int) -> np.ndarray:
        return np.array([rng.choice((*NUMBERS, 50.0, 32.0)) for _ in range(count)])

    roi = SimpleNamespace(x_offset=rng.choice(SIZES), y_offset=0, width=rng.choice(SIZES), height=rng.choice(SIZES))
    return SimpleNamespace(
        header=header(rng),
        height=rng.choice(SIZES),
        width=rng.choice(SIZES),
        k=numbers(9),
        p=numbers(12),
        d=numbers(rng.choice((0, 4, 5, 8, 3))),
        binning_x=rng.choice((0, 1, 2, 2**31)),
        binning_y=rng.choice((0, 1, 4)),
        distortion_model=rng.choice(("", "plumb_bob", "equidistant", "omni", "\n")),
        roi=roi,
    )


def vector(rng: random.Random, names: str) -> Any:
    return SimpleNamespace(**{name: rng.choice(NUMBERS) for name in names})


def transforms(rng: random.Random) -> Any:
    frames = ("", "a", "base_link", "odom", "/b")
    transform = SimpleNamespace(translation=vector(rng, "xyz"), rotation=vector(rng, "xyzw"))
    stamped = SimpleNamespace(header=header(rng), child_frame_id=rng.choice(frames), transform=transform)
    stamped.header.frame_id = rng.choice(frames)
    return SimpleNamespace(transforms=[stamped])


def odometry(rng: random.Random) -> Any:
    pose = SimpleNamespace(position=vector(rng, "xyz"), orientation=vector(rng, "xyzw"))
    child = rng.choice(("", "base_link", "gps"))
    return SimpleNamespace(header=header(rng), child_frame_id=child, pose=SimpleNamespace(pose=pose))


def decode(frame: CameraFrame, camera: Camera) -> CameraFrame:
    if isinstance(frame.image, bytes):
        image = decode_image(frame.image, frame.camera, (camera.width, camera.height))
        return CameraFrame(frame.camera, frame.stamp_ns, image)
    return frame


def originals() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    return [cv2.imencode(suffix, pixels)[1].tobytes() for suffix in (".jpg", ".png")]


@pytest.mark.parametrize("with_rig", [False, True], ids=["calibration is wrong too", "calibrated"])
def test_any_message_is_taken_or_refused(tmp_path: Any, with_rig: bool) -> None:
    record: dict[str, Any] = {
        "cameras": {"names": list(CAMERAS)},
        "max_image_pixels": 10**6,
        "ego_motion": {"wait_s": 0.0},
    }
    if with_rig:
        k = [[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]
        CameraRig(tuple(Camera(name, 64, 48, k, np.eye(4)) for name in CAMERAS)).save(tmp_path / "rig.yaml")
        record["rig"] = str(tmp_path / "rig.yaml")
    intake = Intake(parameters_from_record(record), decode)
    rng, pictures, sets = random.Random(int(with_rig)), originals(), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(COUNT):
        now_ns = step * 20_000_000
        camera = rng.choice(CAMERAS)
        jobs = intake.add_image(camera, compressed(rng, pictures), True, now_ns)
        jobs += intake.add_image(camera, raw(rng), False, now_ns)
        intake.add_info(camera, info(rng))
        intake.add_transforms(transforms(rng), rng.random() < 0.3, now_ns)
        with contextlib.suppress(MessageError):
            intake.add_odometry(odometry(rng))
        for job in jobs + intake.poll(now_ns):
            intake.gather(job)
            assert set(job.frame_set.frames) == set(CAMERAS)
            assert all(reason for reason in job.frame_set.missing.values())
            sets += 1
    statistics = intake.sync.statistics
    for camera in CAMERAS:
        taken = statistics.used[camera] + sum(statistics.dropped[camera].values())
        assert statistics.received[camera] >= taken
    assert sets > COUNT // 50
    assert intake.watch["A"].refused["bad_image"] > COUNT // 20
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 200_000, f"memory grew by {grown_kb} kB"
    intake.close()
