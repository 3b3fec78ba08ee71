"""Listens to a running perception node and to what it reads, and joins both to moments for a viewer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy

from occbev.frame_job import FrameJob
from occbev.graph import CAMERA_INFO, COMPRESSED, DIAGNOSTICS, FRAME_INPUTS, OUTPUT_TOPICS, SENSOR, Quality, resolve
from occbev.grid import VoxelGrid
from occbev.messages.readers import MessageError
from occbev.reports.moments import Moment
from occbev.reports.recorded_outputs import KINDS, OBSTACLES, Published, ResultCollector
from occbev.ros.executor import SparingExecutor
from occbev.ros.perception_node import message_class, qos_profile
from occbev.ros.transport import use_large_image_profile
from occbev.streams.intake import Intake
from occbev.streams.parameters import PerceptionParameters
from occbev.streams.recorded_moments import Fate, leave_encoded, moment_of

POLL_S = 0.05

PATIENCE_S = 3.0
"""A frame set whose result has not come for so long is shown without one."""

WAITING = 4
"""Moments that may wait for the viewer; older ones are left out."""


class ViewNode(Node):
    """Joins frame sets and results by their stamps and hands moments to `show`, in the thread that spins it."""

    def __init__(
        self,
        parameters: PerceptionParameters,
        grid: VoxelGrid,
        show: Callable[[Moment], None],
        namespace: str = "",
        **options: Any,
    ) -> None:
        """Subscribe; spin to receive. grid: of the model that the node runs."""
        super().__init__("occbev_view", **options)
        # Sets are gathered when their result has come; nothing may wait in the thread that receives.
        motion = replace(parameters.ego_motion, wait_s=0.0)
        self._settings = replace(parameters, ego_motion=motion)
        self._intake = Intake(self._settings, leave_encoded)
        self._results, self._show = ResultCollector(grid), show
        self._jobs: dict[int, tuple[FrameJob, float]] = {}
        self._fate = Fate()
        self._latched: set[str] = set()
        self._subscribe(namespace)
        self.create_timer(POLL_S, self._on_poll)
        self.create_timer(1.0, partial(self._listen_to_latched, namespace))

    def destroy_node(self) -> None:
        """Stop decoding, too."""
        self._intake.close()
        super().destroy_node()

    def _subscribe(self, namespace: str) -> None:
        images = Quality(SENSOR.reliability, depth=self._settings.queue_depth)
        for camera in self._settings.names:
            for name, kind in self._settings.image_topics(camera).items():
                self._listen(kind, resolve(name, namespace), images, partial(self._on_image, camera, kind))
            info = resolve(self._settings.info_topic(camera), namespace)
            self._listen(CAMERA_INFO, info, images, partial(self._intake.add_info, camera))
        motion = self._settings.ego_motion
        odometry = resolve(motion.odometry_topic, namespace)
        self._listen(motion.odometry_type, odometry, Quality("best_effort", depth=50), self._on_odometry)
        names = self._settings.tf_topic, self._settings.tf_static_topic
        for topic, name in zip(FRAME_INPUTS, names, strict=True):
            static = topic.name.endswith("static")
            self._listen(topic.type, name, topic.quality, partial(self._on_transforms, static))
        for topic in OUTPUT_TOPICS.values():
            if topic.type in KINDS and not topic.name.endswith(OBSTACLES):
                full = resolve(topic.name, namespace)
                self._listen(topic.type, full, topic.quality, partial(self._on_result, topic.type))
        node = resolve("~/", namespace).rstrip("/")
        take = partial(self._on_diagnostics, node)
        self.create_subscription(DiagnosticArray, DIAGNOSTICS.name, take, qos_profile(DIAGNOSTICS.quality))

    def _listen_to_latched(self, namespace: str) -> None:
        """Subscribe to each CameraInfo that is kept for late comers as one of them: it was sent before a viewer starts."""
        for camera in set(self._settings.names) - self._latched:
            topic = resolve(self._settings.info_topic(camera), namespace)
            infos = self.get_publishers_info_by_topic(topic)
            if any(info.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for info in infos):
                self._latched.add(camera)
                quality = Quality("reliable", "transient_local", 1)
                self._listen(CAMERA_INFO, topic, quality, partial(self._intake.add_info, camera))

    def _listen(self, kind: str, name: str, quality: Quality, take: Callable[[Any], None]) -> None:
        try:
            self.create_subscription(message_class(kind), name, take, qos_profile(quality))
        except ImportError as error:
            self.get_logger().warning(f"{name} is not shown: {error}")

    def _on_image(self, camera: str, kind: str, message: Any) -> None:
        self._wait_for(self._intake.add_image(camera, message, kind == COMPRESSED, time.monotonic_ns()))

    def _on_odometry(self, message: Any) -> None:
        try:
            self._intake.add_odometry(message)
        except MessageError as error:
            self.get_logger().warning(f"odometry: {error}", throttle_duration_sec=5.0)

    def _on_transforms(self, static: bool, message: Any) -> None:
        self._intake.add_transforms(message, static, time.monotonic_ns())

    def _on_result(self, kind: str, message: Any) -> None:
        try:
            self._results.add(kind, message)
        except MessageError as error:
            self.get_logger().warning(f"{error}: is --model the one that the node runs?", throttle_duration_sec=5.0)

    def _on_diagnostics(self, node: str, message: Any) -> None:
        for status in message.status:
            values = {entry.key: entry.value for entry in status.values}
            if status.hardware_id != node:
                continue
            if status.name == "occbev: perception":
                lost = {k.removeprefix("dropped."): int(v) for k, v in values.items() if k.startswith("dropped.")}
                self._fate = replace(self._fate, dropped=lost)
            elif status.name == "occbev: latency":
                medians = {k.removesuffix(".p50_ms"): float(v) for k, v in values.items() if k.endswith(".p50_ms")}
                self._fate = replace(self._fate, latency_ms=medians)

    def _wait_for(self, jobs: list[FrameJob]) -> None:
        for job in jobs:
            self._jobs[job.stamp_ns] = (job, time.monotonic())

    def _on_poll(self) -> None:
        self._wait_for(self._intake.poll(time.monotonic_ns()))
        while len(self._results) > 1:  # a result is whole when the next one has begun
            self._hand_over(self._results.take())
        now = time.monotonic()
        for stamp_ns in sorted(s for s, (_, came) in self._jobs.items() if now - came > PATIENCE_S):
            self._show_moment(self._jobs.pop(stamp_ns)[0], None)

    def _hand_over(self, result: Published) -> None:
        for stamp_ns in sorted(stamp for stamp in self._jobs if stamp < result.stamp_ns):
            self._show_moment(self._jobs.pop(stamp_ns)[0], None)
        job, _ = self._jobs.pop(result.stamp_ns, (None, 0.0))
        self._show_moment(job, result)

    def _show_moment(self, job: FrameJob | None, result: Published | None) -> None:
        if job is not None:
            self._intake.gather(job)
        self._show(moment_of(job, result, self._fate, {}))


def watch(parameters: PerceptionParameters, grid: VoxelGrid, namespace: str = "") -> Iterator[Moment]:
    """Yield the moments of a running node until it is interrupted; a slow viewer misses some, never falls behind."""
    use_large_image_profile()
    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    moments: deque[Moment] = deque(maxlen=WAITING)
    node = ViewNode(parameters, grid, moments.append, namespace, context=context)
    executor = SparingExecutor(context=context)
    executor.add_node(node)
    try:
        while context.ok():
            executor.spin_once(timeout_sec=0.1)
            while moments:
                yield moments.popleft()
    except ExternalShutdownException:
        return
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()
