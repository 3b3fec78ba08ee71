"""A drive as a bag for the real node, and the shipped model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from occbev.geometry import make_transform, rotation_from_rpy, xyzw_from_rotation
from occbev.graph import DEFAULT_CAMERAS
from occbev.inference.model_package import find_package
from occbev.messages.bags import BagMessage, BagWriter, type_store

START = 1_700_000_000_000_000_000
WIDTH, HEIGHT = 176, 99
TYPES = type_store().types


@pytest.fixture(scope="session")
def model() -> str:
    """The shipped package, or the one that OCCBEV_TEST_MODEL names."""
    name = os.environ.get("OCCBEV_TEST_MODEL", "occbev-tiny")
    try:
        return str(find_package(name))
    except (ValueError, LookupError, OSError) as error:
        pytest.skip(f"no model package: {error}")


@pytest.fixture(scope="session")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cameras all around, 5 sets, odometry at 8 m/s."""
    return write_drive(tmp_path_factory.mktemp("drive") / "bag", sets=5, period_ns=400_000_000)


@pytest.fixture(scope="session")
def make_bag() -> Callable[..., Path]:
    """Return the function that writes such a drive."""
    return write_drive


def write_drive(path: Path, sets: int, period_ns: int) -> Path:
    """Write `sets` sets of six cameras, one after the other within 25 ms."""
    messages = [static_transforms(), *odometry(sets * period_ns)]
    for number in range(sets):
        for index, camera in enumerate(DEFAULT_CAMERAS):
            messages += exposure(camera, START + number * period_ns + index * 5_000_000, number * 6 + index)
    with BagWriter(path) as writer:
        for message in sorted(messages, key=lambda m: m.log_ns):
            writer.write(message)
    return path


def recorded(log_ns: int, topic: str, kind: str, *fields: Any) -> BagMessage:
    return BagMessage(topic, kind, log_ns, bytes(type_store().serialize_cdr(TYPES[kind](*fields), kind)))


def header(stamp: int, frame: str) -> Any:
    return TYPES["std_msgs/msg/Header"](TYPES["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9)), frame)


def exposure(camera: str, stamp: int, seed: int) -> list[BagMessage]:
    frame = camera.lower()
    blocks = np.random.default_rng(seed).integers(0, 255, (9, 16, 3), np.uint8)
    image = cv2.resize(blocks, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    jpeg = np.frombuffer(cv2.imencode(".jpg", image)[1].tobytes(), np.uint8)
    k = np.array([139.0, 0, WIDTH / 2, 0, 139, HEIGHT / 2, 0, 0, 1])
    p = np.array([*k[:3], 0, *k[3:6], 0, *k[6:], 0])
    region = TYPES["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    return [
        recorded(
            stamp,
            f"/{frame}/camera_info",
            "sensor_msgs/msg/CameraInfo",
            header(stamp, frame),
            HEIGHT,
            WIDTH,
            "plumb_bob",
            np.zeros(0),
            k,
            np.eye(3).reshape(-1),
            p,
            0,
            0,
            region,
        ),
        recorded(
            stamp + 1,
            f"/{frame}/image/compressed",
            "sensor_msgs/msg/CompressedImage",
            header(stamp, frame),
            "jpeg",
            jpeg,
        ),
    ]


def static_transforms() -> BagMessage:
    transforms = []
    for camera, yaw in zip(DEFAULT_CAMERAS, np.radians([55, 0, -55, 110, 180, -110]), strict=True):
        cam2ego = make_transform(rotation_from_rpy(-np.pi / 2, 0, yaw - np.pi / 2), (np.cos(yaw), np.sin(yaw), 1.5))
        place = TYPES["geometry_msgs/msg/Vector3"](*map(float, cam2ego[:3, 3]))
        turn = TYPES["geometry_msgs/msg/Quaternion"](*map(float, xyzw_from_rotation(cam2ego[:3, :3])))
        transform = TYPES["geometry_msgs/msg/Transform"](place, turn)
        transforms.append(
            TYPES["geometry_msgs/msg/TransformStamped"](header(START, "base_link"), camera.lower(), transform)
        )
    return recorded(START - 400_000_000, "/tf_static", "tf2_msgs/msg/TFMessage", transforms)


def odometry(length_ns: int) -> list[BagMessage]:
    g, messages = "geometry_msgs/msg/", []
    zero = TYPES[g + "Vector3"](0.0, 0.0, 0.0)
    twist = TYPES[g + "TwistWithCovariance"](TYPES[g + "Twist"](zero, zero), np.zeros(36))
    turn = TYPES[g + "Quaternion"](0.0, 0.0, 0.0, 1.0)
    for i in range(-10, length_ns // 20_000_000 + 20):
        stamp = START + i * 20_000_000
        pose = TYPES[g + "Pose"](TYPES[g + "Point"](0.16 * i, 0.0, 0.0), turn)
        messages.append(
            recorded(
                stamp,
                "/odometry",
                "nav_msgs/msg/Odometry",
                header(stamp, "odom"),
                "base_link",
                TYPES[g + "PoseWithCovariance"](pose, np.zeros(36)),
                twist,
            )
        )
    return messages
