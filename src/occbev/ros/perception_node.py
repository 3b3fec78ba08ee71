"""The perception node: messages in, boxes and voxels out. Thin: intake, pipeline and message writers do the work.

Callbacks only hand messages to the intake; a worker runs the pipeline on the newest set, and publishes what came of it
in a second thread while the next one runs.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import rclpy
from rclpy.clock import Clock, ClockType, JumpThreshold  # type: ignore[attr-defined]
from rclpy.duration import Duration
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from std_msgs.msg import Float32

from occbev.allocator import keep_large_blocks, return_free_memory, settle_objects
from occbev.config import ConfigError
from occbev.frame_job import FrameJob
from occbev.graph import (
    CAMERA_INFO,
    COMPRESSED,
    DIAGNOSTICS,
    FRAME_INPUTS,
    GROUND_OUTPUTS,
    IMAGE,
    LATENCIES,
    NODE_NAME,
    ODOMETRY,
    OPTIONAL_OUTPUTS,
    OUTPUT_TOPICS,
    SENSOR,
    Quality,
    Topic,
)
from occbev.inference.pipeline import Pipeline
from occbev.messages.bags import decode_message, prepare_decoding
from occbev.messages.readers import MessageError
from occbev.results import Perception
from occbev.ros import outputs
from occbev.ros.compat import publisher_events, require, subscription_events
from occbev.ros.executor import make_executor
from occbev.ros.parameters import declare_parameters, describe_unused_files, find_unknown, read_node_parameters
from occbev.ros.rclpy_internals import CheckedParameterService, destroy_lifecycle_parts
from occbev.ros.transport import use_large_image_profile
from occbev.ros.worker import Worker
from occbev.streams.frame_log import PROCESSED, FrameLog, describe_job
from occbev.streams.health import health
from occbev.streams.intake import Intake
from occbev.streams.parameters import QOS_PREFIX, UNCONFIGURED, PerceptionParameters, is_ours
from occbev.streams.runner import PerceptionLine, box_decoding, load_pipeline

OVERRIDABLE = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
"""Parts of a topic's quality of service that parameters may override."""

POLL_S = 0.02
"""How often the timeouts of the synchroniser are checked while a frame set waits for images."""

REPEAT_S = 5.0
"""The same warning is logged at most this often."""

STAMP_END = 12
"""Where the stamp ends in the bytes of a message that begins with a header."""

KEPT_LATENCIES = 200
"""Results over which diagnostics give percentiles."""


class PerceptionNode(LifecycleNode):
    """Lifecycle: configure loads the model, activate subscribes, deactivate keeps the model."""

    def __init__(
        self,
        make_pipeline: Callable[[PerceptionParameters], Pipeline] = load_pipeline,
        **options: Any,
    ) -> None:
        """Declare parameters; nothing is loaded yet. `options` go to rclpy's Node."""
        super().__init__(NODE_NAME, start_parameter_services=False, **options)
        self._parameter_requests = CheckedParameterService(self)
        try:
            self.parameters = declare_parameters(self)
        except ConfigError:
            self.destroy_node()
            raise
        self.frame_log = FrameLog()
        # Complete from the start: the worker writes while diagnostics go through it.
        self.latencies: dict[str, deque[float]] = {what: deque(maxlen=KEPT_LATENCIES) for what in LATENCIES.values()}
        self._make_pipeline = make_pipeline
        self._pipeline: Pipeline | None = None
        self._intake: Intake | None = None
        self._worker: Worker[FrameJob] | None = None
        self._inputs: list[Any] = []
        self._latched: set[str] = set()
        self._last_infos: dict[str, bytes] = {}
        self._jump: Any = None
        self._timers_running: list[Any] = []
        self._poll: Any = None
        self._out: dict[str, Any] = {}
        self._debug: dict[str, Any] = {}
        self._diagnostics: Any = None
        self._writer = outputs.ResultWriter()
        self._warned: dict[str, float] = {}
        self._last_end_ns: int | None = None
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.add_on_set_parameters_callback(self._on_parameters)
        self._report_unknown("")

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and create the publishers."""
        if not self._attempt("configure", self._configure, self._unload):
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe and start to work."""
        if not self._attempt("activate", self._activate, self._stop):
            return TransitionCallbackReturn.FAILURE
        return super().on_activate(state)

    def _attempt(self, transition: str, step: Callable[[], None], undo: Callable[[], None]) -> bool:
        """Do a transition; an error is logged with its cause, the transition is undone and fails."""
        try:
            step()
            return True
        except Exception as error:
            is_plain = isinstance(error, (ValueError, OSError, ImportError))
            cause = str(error) if is_plain else f"{type(error).__name__}: {error}"
            self.get_logger().error(f"cannot {transition}: {cause}")
            undo()
            return False

    def _configure(self) -> None:
        begin = time.monotonic()
        self.parameters = read_node_parameters(self)
        self._pipeline = self._make_pipeline(self.parameters)
        prepare_decoding((IMAGE, COMPRESSED, CAMERA_INFO, ODOMETRY.type, *(topic.type for topic in FRAME_INPUTS)))
        return_free_memory()
        settle_objects()
        self._writer.prepare(self._pipeline.grid, self.parameters.detection.max_boxes)
        self.frame_log.open(self.parameters.frame_log_path)
        self._advertise()
        self.get_logger().info(f"{self.parameters.model} is loaded after {time.monotonic() - begin:.1f} s")

    def _activate(self) -> None:
        assert self._pipeline is not None
        if self.is_overrun:
            raise RuntimeError("the network is still running on the last set")
        self._intake = Intake(self.parameters, self._pipeline.decode_frame)
        self._last_end_ns = None
        self._worker = self._make_worker(
            PerceptionLine(self._intake, self._pipeline, self._warn_about_job, self.get_logger().info)
        )
        self._subscribe(self._intake)
        self._poll = self.create_timer(POLL_S, self._on_poll, clock=self._steady)
        self._poll.cancel()
        self._timers_running = [self._poll, self.create_timer(1.0, self._on_second, clock=self._steady)]
        self._report_unknown(QOS_PREFIX)  # they are known only once the topics are
        self.get_logger().info(f"listening to {', '.join(self.parameters.names)}")

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the model stays loaded."""
        self._stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unload the model."""
        self._unload()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and unload."""
        self.close()
        return super().on_shutdown(state)

    def close(self) -> None:
        """Stop the threads and account for what was still waiting; may be called twice."""
        self._stop()
        self._unload()
        self.frame_log.close()

    def destroy_node(self) -> None:
        """Destroy the node with its lifecycle services."""
        super().destroy_node()
        destroy_lifecycle_parts(self)

    @property
    def is_overrun(self) -> bool:
        """Whether the network still runs on a set that was given up when the node was stopped."""
        return self._intake is None and self._worker is not None and not self._worker.ended

    def start(self) -> bool:
        """Configure and activate from inside, as `autostart` asks; False where that failed."""
        success = TransitionCallbackReturn.SUCCESS
        return self.trigger_configure() == success and self.trigger_activate() == success

    def build(self) -> bool:
        """Load the model, as `build_only` asks, so that what its runtime builds is kept; False where that failed."""
        return self.trigger_configure() == TransitionCallbackReturn.SUCCESS

    def _advertise(self) -> None:
        for key, topic in OUTPUT_TOPICS.items():
            try:
                self._out[key] = self._publisher(topic)
            except ImportError as error:
                self._warn(key, f"{topic.name} is not published: {error}")
        for key, topic in OPTIONAL_OUTPUTS.items():
            with suppress(ImportError):
                self._out[key] = self._publisher(topic)
        self._diagnostics = self._publisher(DIAGNOSTICS)
        if self.parameters.debug_topics:
            for name, what in LATENCIES.items():
                self._debug[what] = self.create_publisher(Float32, f"~/debug/{name}", 5)

    def _publisher(self, topic: Topic) -> Any:
        events = publisher_events()(incompatible_qos=partial(self._on_incompatible_reader, topic.name))
        return self.create_publisher(
            message_class(topic.type),
            topic.name,
            qos_profile(topic.quality),
            event_callbacks=events,
            qos_overriding_options=QoSOverridingOptions(OVERRIDABLE),
        )

    def _subscribe(self, intake: Intake) -> None:
        images = Quality(SENSOR.reliability, depth=self.parameters.queue_depth)
        # Calibration before the images, which are decoded at the size that it asks for.
        for camera in self.parameters.names:
            info = Topic(self.parameters.info_topic(camera), CAMERA_INFO, images, "")
            self._listen(info, partial(intake.add_info, camera))
        motion = self.parameters.ego_motion
        odometry = replace(ODOMETRY, name=motion.odometry_topic, type=motion.odometry_type)
        self._listen(odometry, self._on_odometry)
        names = self.parameters.tf_topic, self.parameters.tf_static_topic
        for topic, name in zip(FRAME_INPUTS, names, strict=True):
            static = topic.name.endswith("static")
            try:
                self._listen(replace(topic, name=name), partial(self._on_transforms, static))
            except ImportError as error:
                self._warn("tf", f"{name} is not read: {error}")
        for camera in self.parameters.names:
            for name, kind in self.parameters.image_topics(camera).items():
                take = partial(self._on_image, camera, kind == COMPRESSED)
                self._listen(Topic(name, kind, images, ""), take)
        # A step back by less than a second is left to the synchroniser, which drops what is late.
        step_back = Duration(seconds=-self.parameters.sync.reset_s)
        threshold = JumpThreshold(min_forward=None, min_backward=step_back, on_clock_change=False)
        self._jump = self.get_clock().create_jump_callback(threshold, post_callback=self._on_clock_jump)

    def _make_worker(self, line: PerceptionLine) -> Worker[FrameJob]:
        """Start the two threads; after a restart an old worker still ends its job on the line that it began it on."""
        worker: Worker[FrameJob]
        worker = Worker(
            lambda job: self._begin(line, worker, job),
            lambda job: self._end(line, worker, job),
            self._on_worker_error,
            self.parameters.max_waiting_sets,
        )
        return worker

    def _listen(self, topic: Topic, take: Callable[[Any], None]) -> None:
        """Subscribe to the bytes of a topic: reading them here takes a fraction of the time that rclpy takes."""
        events = subscription_events()(incompatible_qos=partial(self._on_incompatible, topic.name))
        subscription = self.create_subscription(
            message_class(topic.type),
            topic.name,
            partial(self._read, topic, take),
            qos_profile(topic.quality),
            event_callbacks=events,
            qos_overriding_options=QoSOverridingOptions(OVERRIDABLE),
            raw=True,
        )
        self._inputs.append(subscription)

    def _read(self, topic: Topic, take: Callable[[Any], None], data: bytes) -> None:
        if topic.type == CAMERA_INFO and data[STAMP_END:] == self._last_infos.get(topic.name):
            return  # as the last one, which holds until another comes
        try:
            message = decode_message(data, topic.type)
        except MessageError as error:
            self._warn(f"bytes {topic.name}", f"{topic.name}: {error}")
            return
        if topic.type == CAMERA_INFO:
            self._last_infos[topic.name] = data[STAMP_END:]
        take(message)

    def _listen_to_latched(self, intake: Intake) -> None:
        """Subscribe to each CameraInfo that is kept for late comers as one of them: it may have been sent before."""
        for camera in set(self.parameters.names) - self._latched:
            topic = self.parameters.info_topic(camera)
            infos = self.get_publishers_info_by_topic(self.resolve_topic_name(topic))
            if any(info.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for info in infos):
                self._latched.add(camera)
                quality = qos_profile(Quality("reliable", "transient_local", 1))
                events = subscription_events()(use_default_callbacks=False)
                take = partial(self._read, Topic(topic, CAMERA_INFO, SENSOR, ""), partial(intake.add_info, camera))
                kind = message_class(CAMERA_INFO)
                self._inputs.append(
                    self.create_subscription(kind, topic, take, quality, event_callbacks=events, raw=True)
                )

    def _stop(self) -> None:
        for timer in self._timers_running:
            self.destroy_timer(timer)
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._timers_running, self._inputs, self._latched, self._last_infos = [], [], set(), {}
        if self._worker is not None and self._intake is not None:
            if self._jump is not None:
                self._jump.unregister()
            for job in self._worker.stop() + self._intake.flush(time.monotonic_ns()):
                self.frame_log.record(job.stamp_ns, "stopped")
            self._account_for_drops()
            self._intake.close()
        self._intake = None

    def _unload(self) -> None:
        if self.is_overrun:
            self.get_logger().warning("the network is still running; it ends with the process")
        elif self._pipeline is not None:
            self._pipeline.close()
        self._pipeline = None
        gc.unfreeze()
        for publisher in [*self._out.values(), *self._debug.values(), self._diagnostics]:
            if publisher is not None:
                self.destroy_publisher(publisher)
        self._out, self._debug, self._diagnostics = {}, {}, None

    def _report_unknown(self, prefix: str) -> None:
        for name, near in find_unknown(self, prefix).items():
            hint = f"; did you mean {near}?" if near else ""
            self.get_logger().warning(f"parameter {name} is unknown and has no effect{hint}")

    def _on_image(self, camera: str, compressed: bool, message: Any) -> None:
        if self._intake is not None:
            now_ns, clock_ns = time.monotonic_ns(), self._clock_ns()
            self._dispatch(self._intake.add_image(camera, message, compressed, now_ns, clock_ns))
            self._poll_while_sets_wait(self._intake)

    def _clock_ns(self) -> int | None:
        """The time by which cameras should stamp; None with simulated time, which comes in steps and late."""
        clock: Any = self.get_clock()
        return None if clock.ros_time_is_active else int(clock.now().nanoseconds)

    def _on_transforms(self, static: bool, message: Any) -> None:
        if self._intake is not None:
            now_ns = time.monotonic_ns()
            for problem in self._intake.add_transforms(message, static, now_ns):
                self._warn("transforms", problem)

    def _on_odometry(self, message: Any) -> None:
        try:
            if self._intake is not None:
                self._intake.add_odometry(message)
        except MessageError as error:
            self._warn(
                "odometry",
                f"odometry on {self.parameters.ego_motion.odometry_topic}: {error}",
            )

    def _on_clock_jump(self, jump: Any) -> None:
        if self._intake is not None:
            self.get_logger().warning(f"ROS time jumped by {jump.delta.nanoseconds / 1e9:.2f} s: starting again")
            self._dispatch(self._intake.clock_jumped(time.monotonic_ns()))

    def _on_incompatible(self, topic: str, event: Any) -> None:
        offered = ", ".join(_offers(self, topic)) or "unknown"
        self._warn(
            f"qos {topic}",
            f"{topic}: a publisher's quality of service does not match ours; offered: {offered}",
        )

    def _on_incompatible_reader(self, topic: str, event: Any) -> None:
        wanted = ", ".join(_qualities(self.get_subscriptions_info_by_topic, self, topic))
        self._warn(
            f"qos {topic}",
            f"{topic}: a subscriber's quality of service does not match ours and gets nothing; wanted: {wanted or 'unknown'}",
        )

    def _on_poll(self) -> None:
        if self._intake is not None:
            self._dispatch(self._intake.poll(time.monotonic_ns()))
            self._account_for_drops()
            self._poll_while_sets_wait(self._intake)

    def _poll_while_sets_wait(self, intake: Intake) -> None:
        """Start or stop the timer that checks timeouts, which wakes the node fifty times a second."""
        if intake.has_waiting_sets == self._poll.is_canceled():
            (self._poll.reset if intake.has_waiting_sets else self._poll.cancel)()

    def _dispatch(self, jobs: Sequence[FrameJob]) -> None:
        """Hand sets to the worker, oldest first; the newest stays."""
        for job in jobs:
            replaced = self._worker.put(job) if self._worker is not None else job
            if replaced is not None:
                self.frame_log.record(replaced.stamp_ns, "replaced_by_newer")

    def _account_for_drops(self) -> None:
        if self._intake is not None:
            for stamp_ns, reason in self._intake.take_key_drops():
                self.frame_log.record(stamp_ns, reason)

    def _begin(self, line: PerceptionLine, worker: Worker[FrameJob], job: FrameJob) -> bool:
        """Worker's first thread: one set into the network; False with too few cameras."""
        job.begun_ns = time.monotonic_ns()
        job.wants_ground = any(key in self._find_wanted() for key in GROUND_OUTPUTS)
        if line.prepare(job):
            line.infer(job)
            return True
        if worker.claim(job):
            fewest = self.parameters.sync.min_cameras
            self._warn("too few", f"nothing is published: fewer than {fewest} usable cameras")
            self.frame_log.record(job.stamp_ns, "too_few_cameras")
        return False

    def _end(self, line: PerceptionLine, worker: Worker[FrameJob], job: FrameJob) -> None:
        """Worker's second thread: decode the network's outputs, publish and log them."""
        perception = line.decode(job)
        if not worker.claim(job):
            return
        job.decoded_ns = time.monotonic_ns()
        published = self._publish(perception, job.wants_ground)
        job.published_ns = time.monotonic_ns()
        if self._last_end_ns is None:
            return_free_memory()  # what only the first set of a rig needs
        self._log_processed(job, published)

    def _publish(self, perception: Perception, has_ground: bool) -> list[str]:
        """Publish what someone listens to; return which outputs those were.

        has_ground: False where nobody listened to an output of the ground grid when the set began.
        """
        makers = self._writer.makers(perception, self.parameters)
        wanted = [key for key in self._find_wanted() if has_ground or key not in GROUND_OUTPUTS]
        for key in wanted:
            self._out[key].publish(makers[key]())
        return wanted

    def _find_wanted(self) -> list[str]:
        """Return the outputs that someone listens to."""
        return [key for key, publisher in self._out.items() if publisher.get_subscription_count() > 0]

    def _log_processed(self, job: FrameJob, published: list[str]) -> None:
        """Log a processed set: images, missing cameras, the latency of every stage."""
        stages_ms = latencies_of(job)
        now_ns, rhythm_ms = self.get_clock().now().nanoseconds, {}
        if now_ns:  # simulated time is 0 until it comes
            rhythm_ms["pipeline_latency"] = (now_ns - job.stamp_ns) / 1e6
        if self._last_end_ns is not None:
            rhythm_ms["cyclic_time"] = (job.published_ns - self._last_end_ns) / 1e6
        self._last_end_ns = job.published_ns
        for name, value in {**stages_ms, **rhythm_ms}.items():
            self.latencies[name].append(value)
            if name in self._debug:
                self._debug[name].publish(Float32(data=value))
        details = describe_job(job, {name: round(ms, 3) for name, ms in stages_ms.items()})
        self.frame_log.record(job.stamp_ns, PROCESSED, **details, published=published, begin_ns=job.begun_ns)

    def _on_worker_error(self, job: FrameJob, error: Exception) -> None:
        if not self.context.ok():  # a signal ended the context while the set was on its way
            self.frame_log.record(job.stamp_ns, "stopped")
            return
        self.frame_log.record(job.stamp_ns, "pipeline_error")
        self._warn("pipeline", f"the set at {job.stamp_ns} ns failed: {type(error).__name__}: {error}")

    def _on_second(self) -> None:
        """Publish diagnostics and name cameras that never came."""
        if self._intake is None:
            return
        self._account_for_drops()
        now_ns = time.monotonic_ns()
        about = self._pipeline.about() if self._pipeline is not None else {}
        self._count_publishers(self._intake)
        statuses = health(self._intake, self.frame_log, self.latencies, about, now_ns)
        self._listen_to_latched(self._intake)
        silent = [camera for camera, watch in self._intake.watch.items() if not watch.arrivals]
        if silent:
            texts = [f"no image of camera {camera}{self._offer_hint(camera)}" for camera in silent]
            self._warn("silent cameras", "; ".join(texts))
        now = self.get_clock().now().nanoseconds
        if not now:
            self._warn("clock", "use_sim_time is true, but no time comes on /clock: diagnostics are stamped 0")
        self._diagnostics.publish(outputs.diagnostics_message(statuses, now, self.get_fully_qualified_name()))

    def _count_publishers(self, intake: Intake) -> None:
        """Note how many publishers send each image topic, and warn where one is too many."""
        for camera, watch in intake.watch.items():
            topics = self.parameters.image_topics(camera)
            watch.publishers = {self.resolve_topic_name(name): len(_offers(self, name)) for name in topics}
            watch.wrong_type = "" if watch.arrivals else _describe_types(self, topics)
            for topic, count in watch.publishers.items():
                if count > 1:
                    self._warn(f"publishers {topic}", f"camera {camera}: {count} publishers send {topic}")

    def _warn_about_job(self, about: str, text: str) -> None:
        """Warn of a job; a missing camera's text also says what its publishers offer."""
        camera = about.removeprefix("camera ")
        is_camera = camera in self.parameters.cameras
        self._warn(about, (lambda: text + self._offer_hint(camera)) if is_camera else text)

    def _offer_hint(self, camera: str) -> str:
        """Say how many publishers each image topic of a camera has, and what quality of service they offer."""
        hints, topics = [], self.parameters.image_topics(camera)
        for name in topics:
            offers = _offers(self, name)
            where = self.resolve_topic_name(name)
            hints.append(f"{len(offers)} publishers on {where}" + (f" ({', '.join(offers)})" if offers else ""))
        wrong = _describe_types(self, topics)
        return f" [{'; '.join(hints)}{f'; {wrong}' if wrong else ''}]"

    def _on_parameters(self, changed: Sequence[Any]) -> Any:
        from rcl_interfaces.msg import SetParametersResult

        if not any(is_ours(parameter.name) for parameter in changed):
            return SetParametersResult(successful=True)
        fixed = sorted({parameter.name for parameter in changed} & UNCONFIGURED)
        if fixed and self._pipeline is not None:
            reason = f"{', '.join(fixed)} may change only while the node is unconfigured: clean it up first"
            return SetParametersResult(successful=False, reason=reason)
        try:
            self.parameters = read_node_parameters(self, changed)
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self._intake is not None:
            self._intake.retune(self.parameters)
        if self._pipeline is not None:
            self._pipeline.decoding = box_decoding(self.parameters)
            self._pipeline.ground = self.parameters.ground_grid
        return SetParametersResult(successful=True)

    def _warn(self, about: str, text: str | Callable[[], str]) -> None:
        """Log a warning, the same one at most every few seconds; a costly text is made only then."""
        now = time.monotonic()
        if now - self._warned.get(about, -REPEAT_S) >= REPEAT_S:
            self._warned[about] = now
            self.get_logger().warning(text() if callable(text) else text)


def latencies_of(job: FrameJob) -> dict[str, float]:
    """Return stage -> milliseconds of a published job, from the anchor's arrival on; see `occbev.graph.LATENCY_STAGES`."""
    stages = job.stages_ms
    # What the stages do not account for is waiting, in the mailbox or for the set before.
    stages["queue"] = (job.decoded_ns - job.emitted_ns) / 1e6 - sum(stages.values())
    stages["decode"] = stages.get("decode", 0.0) + job.decode_ns / 1e6
    stages["sync"] = (job.emitted_ns - job.arrival_ns) / 1e6
    stages["publish"] = (job.published_ns - job.decoded_ns) / 1e6
    stages["total"] = (job.published_ns - job.arrival_ns) / 1e6
    return stages


def message_class(name: str) -> Any:
    """Import a message class by its full name, such as "sensor_msgs/msg/Image"."""
    package, _, kind = name.split("/")
    if package in ("vision_msgs", "tf2_msgs", "autoware_perception_msgs"):
        require(package)
    return getattr(importlib.import_module(f"{package}.msg"), kind)


def qos_profile(quality: Quality) -> QoSProfile:
    """Make rclpy's form of a quality of service."""
    reliable, lasting = quality.reliability == "reliable", quality.durability == "transient_local"
    return QoSProfile(
        depth=quality.depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if lasting else DurabilityPolicy.VOLATILE,
    )


def _offers(node: Any, topic: str) -> list[str]:
    """Return the quality of service of each publisher of a topic, in words."""
    return _qualities(node.get_publishers_info_by_topic, node, topic)


def _describe_types(node: Any, topics: Mapping[str, str]) -> str:
    """Say which topics (name -> type that is read) are published with another type, which DDS does not deliver."""
    for name, kind in topics.items():
        full_name = node.resolve_topic_name(name)
        for info in node.get_publishers_info_by_topic(full_name):
            if info.topic_type != kind:
                rule = 'only a topic whose name ends in "compressed" is read as CompressedImage: remap it'
                return f"{full_name} carries {info.topic_type} and is read as {kind}; {rule}"
    return ""


def _qualities(ask: Callable[[str], Any], node: Any, topic: str) -> list[str]:
    profiles = [info.qos_profile for info in ask(node.resolve_topic_name(topic))]
    return [f"{p.reliability.name}/{p.durability.name}" for p in profiles]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; returns the exit status."""
    profile = use_large_image_profile(receives=True)
    kept = keep_large_blocks()
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type] # OpenVINO's converter: 7 MB for nothing
    try:
        given = list(sys.argv if arguments is None else ["occbev", *arguments])
        rclpy.init(args=given)
    except Exception as error:  # rcl's own classes differ between distributions
        print(f"perception: {error}", file=sys.stderr)
        return 2
    try:
        files = [file for flag, file in zip(given, given[1:], strict=False) if flag == "--params-file"]
        return _run(f"Fast DDS profile {profile}; allocator tuned: {kept}", files)
    except (ConfigError, ParameterException) as error:
        print(f"perception: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    except Exception as error:
        if rclpy.ok():
            raise
        # A signal took the context away, most likely while something was being made in it.
        print(
            f"perception: ended by a signal, during {type(error).__name__}: {error}",
            file=sys.stderr,
        )
        return 0
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
        rclpy.try_shutdown()


def _run(settings: str, files: Sequence[str]) -> int:
    """Make the node, start it as its parameters ask and spin; whatever happens, it is closed.

    files: parameter files that were given.

    A network that outlasts the node runs in a thread that nothing may be taken from: Python's end is skipped then.
    """
    node = PerceptionNode()
    node.get_logger().debug(settings)
    if unused := describe_unused_files(files, node.get_fully_qualified_name()):
        node.get_logger().warning(unused)
    try:
        if node.parameters.build_only:
            return 0 if node.build() or not rclpy.ok() else 1
        executor = make_executor(node.parameters.executor)
        executor.add_node(node)
        # A signal during the transitions makes them fail, but it is no failure.
        if node.parameters.autostart and not node.start() and rclpy.ok():
            return 1
        executor.spin()
        return 0
    finally:
        node.close()
        if node.is_overrun:
            atexit.register(_leave)
        node.destroy_node()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
