"""Tiny bags of a vehicle with cameras, odometry and transforms, in as many forms as drivers write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from occbev.geometry import make_transform, rotation_from_rpy, xyzw_from_rotation
from occbev.messages.bags import BagMessage, BagWriter, type_store

START, PERIOD = 1_700_000_000_000_000_000, 100_000_000
WIDTH, HEIGHT = 32, 24
FORWARD = make_transform(rotation_from_rpy(-np.pi / 2, 0, -np.pi / 2), (1.5, 0.2, 1.6))
K = np.array([[20.0, 0, 15.5], [0, 21.0, 11.5], [0, 0, 1]])


def make(kind: str, *values: Any) -> Any:
    return type_store().types[kind](*values)


def header(stamp_ns: int, frame: str) -> Any:
    return make("std_msgs/msg/Header", make("builtin_interfaces/msg/Time", *divmod(int(stamp_ns), 10**9)), frame)


def transform(stamp_ns: int, parent: str, child: str, child2parent: np.ndarray) -> Any:
    g = "geometry_msgs/msg/"
    turn = make(g + "Quaternion", *xyzw_from_rotation(child2parent[:3, :3]).tolist())
    moved = make(g + "Transform", make(g + "Vector3", *child2parent[:3, 3].tolist()), turn)
    return make(g + "TransformStamped", header(stamp_ns, parent), child, moved)


def odometry(stamp_ns: int, child: str, child2odom: np.ndarray) -> Any:
    g = "geometry_msgs/msg/"
    turn = make(g + "Quaternion", *xyzw_from_rotation(child2odom[:3, :3]).tolist())
    pose = make(g + "Pose", make(g + "Point", *child2odom[:3, 3].tolist()), turn)
    linear, angular = make(g + "Vector3", 5.0, 0.0, 0.0), make(g + "Vector3", 0.0, 0.0, 0.1)
    twist = make(g + "TwistWithCovariance", make(g + "Twist", linear, angular), np.zeros(36))
    return make(
        "nav_msgs/msg/Odometry",
        header(stamp_ns, "odom"),
        child,
        make(g + "PoseWithCovariance", pose, np.zeros(36)),
        twist,
    )


def info(
    stamp_ns: int,
    frame: str,
    model: str = "plumb_bob",
    d: Sequence[float] = (),
    k: np.ndarray = K,
    p: np.ndarray | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    binning: int = 0,
    roi: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Any:
    """roi: x, y, width, height."""
    projection = np.zeros((3, 4))
    projection[:, :3] = k if p is None else p
    x, y, width, height = roi
    region = make("sensor_msgs/msg/RegionOfInterest", x, y, height, width, False)
    return make(
        "sensor_msgs/msg/CameraInfo",
        header(stamp_ns, frame),
        size[1],
        size[0],
        model,
        np.array(d, np.float64),
        k.reshape(-1),
        np.eye(3).reshape(-1),
        projection.reshape(-1),
        binning,
        binning,
        region,
    )


def pixels(seed: int, size: tuple[int, int] = (WIDTH, HEIGHT), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], channels), np.uint8)


def compressed(stamp_ns: int, frame: str, seed: int, kind: str = "jpg", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Any:
    data = cv2.imencode(f".{kind}", pixels(seed, size))[1].reshape(-1)
    return make("sensor_msgs/msg/CompressedImage", header(stamp_ns, frame), kind, data)


def raw(stamp_ns: int, frame: str, seed: int, encoding: str) -> Any:
    per_pixel = {"rgb8": 3, "bgr8": 3, "8UC3": 3, "rgba8": 4, "bgra8": 4, "16UC1": 2}.get(encoding, 0)
    if not per_pixel:
        per_pixel = 2 if encoding.startswith(("yuv", "uyvy")) else 1
    rows = HEIGHT * 3 // 2 if encoding == "nv12" else HEIGHT
    data = np.random.default_rng(seed).integers(0, 255, rows * WIDTH * per_pixel, np.uint8)
    return make("sensor_msgs/msg/Image", header(stamp_ns, frame), HEIGHT, WIDTH, encoding, 0, WIDTH * per_pixel, data)


def base2odom(t: float) -> np.ndarray:
    return make_transform(rotation_from_rpy(0, 0, 0.3 * t), (8.0 * t, 0.5 * t, 0.0))


@dataclass(frozen=True)
class Camera:
    """One camera's topics and messages: image and info are made of (stamp, frame[, seed])."""

    image: Callable[[int, str, int], Any] = compressed
    info: Callable[[int, str], Any] = info
    topic: str = "image_raw/compressed"
    delay_ns: int = 0


@dataclass(frozen=True)
class Drive:
    """What is driven and how its transforms hang.

    static, moving: (parent, child, child2parent) on /tf_static and, each 20 ms, on /tf. Cameras have frames
    NAME_optical. odometry: child frame of its poses, "" for none. static_late: /tf_static comes last.
    """

    cameras: Mapping[str, Camera] = field(default_factory=lambda: {"front": Camera()})
    static: Sequence[tuple[str, str, np.ndarray]] = (("base_link", "front_optical", FORWARD),)
    moving: Sequence[tuple[str, str, np.ndarray]] = ()
    pose_child: str = ""
    odometry: str = "base_link"
    base2child: np.ndarray = field(default_factory=lambda: np.eye(4))
    static_late: bool = False
    sets: int = 4

    def messages(self) -> list[BagMessage]:
        found: list[BagMessage] = []

        def add(topic: str, log_ns: int, message: Any) -> None:
            data = bytes(type_store().serialize_cdr(message, message.__msgtype__))
            found.append(BagMessage(topic, message.__msgtype__, log_ns, data))

        end = START + (self.sets + 2) * PERIOD
        tree = [transform(START, *entry) for entry in self.static]
        add("/tf_static", end if self.static_late else START - PERIOD, make("tf2_msgs/msg/TFMessage", tree))
        for stamp in range(START - PERIOD, end, 20_000_000):
            child2odom = base2odom((stamp - START) / 1e9) @ np.linalg.inv(self.base2child)
            if self.odometry:
                add("/odom", stamp, odometry(stamp, self.odometry, child2odom))
            hung = [transform(stamp, *entry) for entry in self.moving]
            if self.pose_child:
                hung.append(transform(stamp, "odom", self.pose_child, child2odom))
            if hung:
                add("/tf", stamp, make("tf2_msgs/msg/TFMessage", hung))
        for number in range(self.sets):
            for seed, (name, camera) in enumerate(self.cameras.items()):
                stamp, frame = START + number * PERIOD + camera.delay_ns, f"{name}_optical"
                add(f"/{name}/camera_info", stamp + 1_000_000, camera.info(stamp, frame))
                add(f"/{name}/{camera.topic}", stamp + 2_000_000, camera.image(stamp, frame, 100 * number + seed))
        return sorted(found, key=lambda message: message.log_ns)

    def write(self, path: Path) -> Path:
        with BagWriter(path) as writer:
            for message in self.messages():
                writer.write(message)
        return path
