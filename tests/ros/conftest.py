"""A perception node with a stub in place of the network, and a vehicle that feeds it over real DDS."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from occbev.frame_job import FrameJob
from occbev.geometry import make_transform, rotation_from_rpy, xyzw_from_rotation
from occbev.grid import GRIDS
from occbev.inference.preprocess import match_size
from occbev.results import Boxes3D, CameraFrame, FrameSet, Occupancy, Perception, Timings
from occbev.rig import Camera, CameraRig

CAMERAS = ("CAM_FRONT", "CAM_LEFT", "CAM_RIGHT")
WIDTH, HEIGHT = 64, 48


class StubPipeline:
    """Sees what the node hands to a pipeline and answers with one box and one voxel."""

    def __init__(self, parameters: Any, delay_s: float = 0.0) -> None:
        self.rig: Any = None
        self.grid = GRIDS["tiny"]
        self.rigs: list[CameraRig] = []
        self.seen: list[FrameSet] = []
        self.motions: list[Any] = []
        self.forgotten: list[int] = []
        self.wants_ground: list[bool] = []
        self.seen_rows: list[Any] = []
        self.delay_s, self.closed = delay_s, False

    def decode_frame(self, frame: CameraFrame, camera: Camera) -> CameraFrame:
        from occbev.inference.preprocess import decode_image

        if not isinstance(frame.image, bytes):
            return frame
        return CameraFrame(frame.camera, frame.stamp_ns, decode_image(frame.image, frame.camera))

    def set_rig(self, rig: CameraRig) -> None:
        self.rig = rig
        self.rigs.append(rig)

    def prepare(self, job: FrameJob) -> None:
        if job.fresh:
            self.forgotten.append(len(self.seen))
        if job.rig is not self.rig:
            self.set_rig(job.rig)
        for frame in job.frame_set.frames.values():
            if frame is not None and not isinstance(frame.image, bytes):
                match_size(self.rig[frame.camera], frame.image)

    def infer(self, job: FrameJob) -> None:
        self.wants_ground.append(job.wants_ground)
        job.perception = self.run(job.frame_set, job.motion)
        job.stage_ns["inference"] = 1_000_000

    def decode(self, job: FrameJob) -> Perception:
        return job.perception

    def run(self, frame_set: FrameSet, motion: Any = None) -> Perception:
        time.sleep(self.delay_s)
        self.seen.append(frame_set)
        self.motions.append(motion)
        grid = self.grid
        state = np.ones(grid.shape, np.uint8)
        state[1, 2, 3] = 2
        label = np.full(grid.shape, 4, np.uint8)
        box = np.array([[10, 0, 1, 4, 2, 1.5, 0, 3, 0]], np.float32)
        boxes = Boxes3D(box, np.array([0]), np.array([0.8], np.float32), frame_set.cameras)
        occupancy = Occupancy(label, np.ones(grid.shape, np.float32), state, grid, frame_set.cameras)
        timings = Timings({"inference": 1_000_000})
        return Perception(frame_set.stamp_ns, boxes, occupancy, timings, dict(frame_set.missing))

    def about(self) -> dict[str, str]:
        return {"model": "stub"}

    def close(self) -> None:
        self.closed = True


@dataclass
class Bench:
    """The node under test, its vehicle, and what subscribers of its outputs got."""

    node: Any
    vehicle: Vehicle
    received: dict[str, list[Any]] = field(default_factory=dict)
    logged: list[str] = field(default_factory=list)
    stop: Callable[[], None] = lambda: None
    """Ends the node, as when its process dies; the vehicle drives on."""

    @property
    def pipeline(self) -> Any:
        return self.node._pipeline

    def wait(self, condition: Callable[[], Any], seconds: float = 120.0) -> None:
        """Wait until a condition holds; fails with the frame log's outcomes otherwise."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"outcomes {dict(self.node.frame_log.outcomes)}"
            time.sleep(0.01)

    def ready(self) -> Bench:
        """Calibrate, and again every five seconds until the node has it all: what comes before a match is lost."""
        attempts = itertools.count()

        def calibrated() -> bool:
            if next(attempts) % 500 == 0:
                self.vehicle.calibrate()
            return not self.node._intake.read_calibration().problems

        self.wait(calibrated)
        return self

    def transition(self, name: str) -> str:
        """Change the node's state, in the thread that spins it as its services do; return how that went."""
        change = self.node.executor.create_task(getattr(self.node, f"trigger_{name}"))
        self.wait(change.done)
        return str(change.result().name)

    def finished(self, keys: int) -> None:
        """Wait until this many key times have their outcome."""
        self.wait(lambda: sum(self.node.frame_log.outcomes.values()) >= keys)

    def connected(self) -> bool:
        publishers = [p for ps in self.vehicle.publishers.values() for p in ps]
        fed = {p.topic_name for p in publishers}
        hearing = [s for s in self.node._inputs if s.topic_name in fed]
        matched = [p.get_subscription_count() for p in (*publishers, *self.node._out.values())]
        # From both sides: a publisher still counts a subscription that was made anew since.
        heard = {s.topic_name for s in hearing if s.get_publisher_count()}
        return all(matched) and heard == {s.topic_name for s in hearing}

    def statuses(self) -> dict[str, Any]:
        """Return the newest diagnostics as name -> (level, text, values)."""
        if not self.received.get("diagnostics"):
            return {}
        return {
            s.name.removeprefix("occbev: "): SimpleNamespace(
                level=s.level[0], text=s.message, values={v.key: v.value for v in s.values}
            )
            for s in self.received["diagnostics"][-1].status
        }


class Vehicle:
    """Publishes images, calibration, transforms and odometry like the drivers of a vehicle."""

    def __init__(self, node: Any, raw: bool = False) -> None:
        from nav_msgs.msg import Odometry
        from sensor_msgs.msg import CameraInfo, CompressedImage, Image
        from tf2_msgs.msg import TFMessage

        from occbev.graph import TF, TF_STATIC
        from occbev.ros.perception_node import qos_profile

        self.node, self.raw = node, raw
        kind, suffix = (Image, "image") if raw else (CompressedImage, "image/compressed")
        self.publishers = {
            c: [
                node.create_publisher(kind, f"/perception/input/{c.lower()}/{suffix}", 10),
                node.create_publisher(CameraInfo, f"/perception/input/{c.lower()}/camera_info", 10),
            ]
            for c in CAMERAS
        }
        self.publishers["vehicle"] = [
            node.create_publisher(TFMessage, "/tf", qos_profile(TF)),
            node.create_publisher(TFMessage, "/tf_static", qos_profile(TF_STATIC)),
            node.create_publisher(Odometry, "/perception/input/odometry", 50),
        ]
        pixels = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        self.jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
        self.rgb = pixels

    def kill(self, camera: str) -> None:
        """End a camera's driver: its publishers go away, in the thread that waits for their events."""
        for publisher in self.publishers.pop(camera):
            ended = self.node.executor.create_task(self.node.destroy_publisher, publisher)
            while not ended.done():
                time.sleep(0.01)

    def revive(self, camera: str) -> None:
        """Start a killed camera's driver again."""
        from sensor_msgs.msg import CameraInfo, CompressedImage

        base = f"/perception/input/{camera.lower()}"
        self.publishers[camera] = [
            self.node.create_publisher(CompressedImage, f"{base}/image/compressed", 10),
            self.node.create_publisher(CameraInfo, f"{base}/camera_info", 10),
        ]

    def calibrate(self, cameras: tuple[str, ...] = CAMERAS, stamp_ns: int = 1) -> None:
        """Publish CameraInfo and static transforms."""
        from geometry_msgs.msg import TransformStamped
        from tf2_msgs.msg import TFMessage

        for index, camera in enumerate(cameras):
            self.info(camera, stamp_ns)
            message = TransformStamped()
            message.header.frame_id, message.child_frame_id = "base_link", camera.lower()
            cam2ego = make_transform(rotation_from_rpy(-np.pi / 2, 0, index - np.pi / 2), (1, 0, 1.5))
            t, r = message.transform.translation, message.transform.rotation
            t.x, t.y, t.z = map(float, cam2ego[:3, 3])
            r.x, r.y, r.z, r.w = map(float, xyzw_from_rotation(cam2ego[:3, :3]))
            self.publishers["vehicle"][1].publish(TFMessage(transforms=[message]))

    def info(self, camera: str, stamp_ns: int, focal: float = 50.0) -> None:
        from sensor_msgs.msg import CameraInfo

        k = [focal, 0.0, WIDTH / 2, 0.0, focal, HEIGHT / 2, 0.0, 0.0, 1.0 if focal else 0.0]
        p = [*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0]
        message = CameraInfo(width=WIDTH, height=HEIGHT, k=k, p=p, distortion_model="plumb_bob")
        message.header.frame_id = camera.lower()
        self.publishers[camera][1].publish(_stamped(message, stamp_ns))

    def image(self, camera: str, stamp_ns: int, data: bytes | None = None, **fields: Any) -> None:
        from sensor_msgs.msg import CompressedImage, Image

        if self.raw:
            message: Any = Image(height=HEIGHT, width=WIDTH, step=3 * WIDTH, encoding="rgb8")
            payload = self.rgb.tobytes() if data is None else data
        else:
            message = CompressedImage(format="jpeg")
            payload = self.jpeg if data is None else data
        message.data = array("B", payload)
        for name, value in fields.items():
            setattr(message, name, value)
        message.header.frame_id = camera.lower()
        self.publishers[camera][0].publish(_stamped(message, stamp_ns))

    def odometry(self, stamp_ns: int, x: float) -> None:
        from nav_msgs.msg import Odometry

        message = Odometry(child_frame_id="base_link")
        message.header.frame_id = "odom"
        message.pose.pose.position.x = x
        message.pose.pose.orientation.w = 1.0
        self.publishers["vehicle"][2].publish(_stamped(message, stamp_ns))

    def play(self, images: list[Shot]) -> None:
        """Publish images when they are due."""
        begin = time.monotonic()
        for shot in sorted(images, key=lambda s: s.at_s):
            time.sleep(max(0.0, begin + shot.at_s - time.monotonic()))
            self.image(shot.camera, shot.stamp_ns, shot.data)

    def drive(
        self,
        sets: int,
        start_ns: int = 10**9,
        period_s: float = 0.05,
        cameras: tuple[str, ...] = CAMERAS,
        spread_ns: int = 0,
    ) -> list[int]:
        """Publish `sets` sets at a steady pace; return their key stamps."""
        stamps = [start_ns + int(i * period_s * 1e9) for i in range(sets)]
        for stamp in stamps:
            for index, camera in enumerate(cameras):
                self.image(camera, stamp + index * spread_ns)
            time.sleep(period_s)
        return stamps


@dataclass(frozen=True)
class Shot:
    """One image of a simulated drive: published `at_s` after the start."""

    at_s: float
    camera: str
    stamp_ns: int
    data: bytes | None = None


def shots(
    sets: int, start_ns: int = 10**9, at_s: float = 0.0, period_s: float = 0.05, spread_s: float = 0.005
) -> list[Shot]:
    """Every camera once per period, one after the other."""
    return [
        Shot(at_s + i * period_s + index * spread_s, camera, start_ns + round((i * period_s + index * spread_s) * 1e9))
        for i in range(sets)
        for index, camera in enumerate(CAMERAS)
    ]


@pytest.fixture
def drive_of() -> Callable[..., list[Shot]]:
    """Return the function that lists the images of a faultless drive."""
    return shots


def _stamped(message: Any, stamp_ns: int) -> Any:
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    return message


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Fail a test that leaves a thread or a part of DDS behind: a later fork in this process would trip over it."""
    before = set(threading.enumerate())
    yield
    _assert_ended(before)


@pytest.fixture
def assert_nothing_runs() -> Callable[[], None]:
    """Return a function that holds that threads and DDS are as they were before the test."""
    return partial(_assert_ended, set(threading.enumerate()))


def _assert_ended(before: set[threading.Thread]) -> None:
    deadline = time.monotonic() + 10
    while left := _threads_beside(before):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)


def _threads_beside(before: set[threading.Thread]) -> list[str]:
    """Python's threads that are new, and Fast DDS's, but for the one watchdog that it keeps."""
    names = [thread.name for thread in threading.enumerate() if thread not in before]
    for task in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            name = task.read_text().strip()
            if name.startswith("dds.") and name != "dds.shm.wdog":
                names.append(name)
    return names


@pytest.fixture
def stub_pipeline() -> type[StubPipeline]:
    """The stub's class."""
    return StubPipeline


@pytest.fixture
def make_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """Return a function that starts a node with given parameters; everything ends with the test."""
    rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
    pytest.importorskip("tf2_msgs", reason="built by occbev.ros.build_interfaces")
    from rclpy.executors import ExternalShutdownException
    from rclpy.parameter import Parameter

    from occbev.ros.executor import make_executor
    from occbev.ros.perception_node import PerceptionNode
    from occbev.streams import intake

    monkeypatch.setattr(intake, "WAITING_DECODES", 100)
    context, stops, benches = rclpy.Context(), [], []
    rclpy.init(context=context)

    def spin(executor: Any, done: threading.Event) -> None:
        # Not executor.spin(): what it waits for may be destroyed under it while it is being shut down.
        with contextlib.suppress(ExternalShutdownException):
            while not done.is_set():
                executor.spin_once(timeout_sec=0.1)

    def end(entry: Any) -> None:
        executor, thread, done, member = entry
        stops.remove(entry)
        done.set()
        thread.join(60)
        assert not thread.is_alive(), "a node is still spinning: what it uses cannot be destroyed"
        executor.shutdown()
        if hasattr(member, "close"):
            member.close()
        member.destroy_node()

    def start(
        raw: bool = False,
        delay_s: float = 0.0,
        active: bool = True,
        wait: bool = True,
        **values: Any,
    ) -> Bench:
        values = {
            "cameras.names": list(CAMERAS),
            "max_waiting_sets": 50,
            # A busy machine must not lose what a test has sent, nor take an image that is late for one that is lost.
            "queue_depth": 100,
            "sync.timeout_s": 2.0,
            "frozen_after": 0,  # the vehicle always sends the same picture
            "frame_log_path": str(tmp_path / "frame_log.jsonl"),
            **{name.replace("__", "."): value for name, value in values.items()},
        }
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        node = PerceptionNode(lambda p: StubPipeline(p, delay_s), context=context, parameter_overrides=overrides)
        driver = rclpy.create_node("vehicle", context=context)
        bench = Bench(node, Vehicle(driver, raw))
        benches.append(bench)
        warn = node._warn

        def note(about: str, text: Any) -> None:
            bench.logged.append(text() if callable(text) else text)
            warn(about, text)

        node._warn = note
        for member in (node, driver):
            executor = make_executor(node.parameters.executor, context=context)
            executor.add_node(member)
            done = threading.Event()
            thread = threading.Thread(target=spin, args=(executor, done), daemon=True)
            stops.append((executor, thread, done, member))
            if member is node:
                bench.stop = partial(end, stops[-1])
            if member is driver:
                _subscribe(driver, bench.received)
                thread.start()
        if active:
            assert node.start()
        stops[-2][1].start()
        if active and wait:
            bench.wait(bench.connected)
        return bench

    yield start
    while stops:
        end(stops[0])
    rclpy.shutdown(context=context)


def _subscribe(node: Any, received: dict[str, list[Any]]) -> None:
    from occbev.graph import DIAGNOSTICS, OUTPUT_TOPICS, resolve
    from occbev.ros.perception_node import message_class, qos_profile

    for key, topic in {**OUTPUT_TOPICS, "diagnostics": DIAGNOSTICS}.items():
        got = received.setdefault(key, [])
        patient = replace(topic.quality, depth=1000)  # a busy test must not lose what it got
        node.create_subscription(message_class(topic.type), resolve(topic.name), got.append, qos_profile(patient))


@pytest.fixture
def other(make_bench: Callable[..., Any]) -> Any:
    """Return a function that makes a further node beside a bench's own."""
    from rclpy.node import Node

    nodes = []

    def make(bench: Any) -> Any:
        nodes.append(Node("other", context=bench.node.context))
        return nodes[-1]

    yield make
    for node in nodes:
        node.destroy_node()
