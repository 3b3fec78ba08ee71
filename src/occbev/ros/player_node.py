"""Plays a bag over real DDS in real time, with /clock, and logs when each image was published.

It also receives the node's results, so that one process measures both ends of a latency on one clock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rosgraph_msgs.msg import Clock

from occbev.graph import ACCOUNT, CLOCK, OPTIONAL_OUTPUTS, OUTPUT_TOPICS, TF_STATIC, Quality, resolve
from occbev.messages.bags import BagError, BagMessage, BagWriter, latched_topics
from occbev.messages.readers import header_stamp
from occbev.ros.executor import SparingExecutor
from occbev.ros.outputs import time_from_ns
from occbev.ros.perception_node import message_class, qos_profile
from occbev.ros.transport import SETTLE_S
from occbev.streams.kept_inputs import latched_outputs
from occbev.streams.parameters import PerceptionParameters

CLOCK_STEP_NS = 25_000_000
"""Bag time between two messages on /clock."""

PLAYED = Quality("reliable", depth=20)
"""Quality of service of played topics, unless they were recorded for late comers as /tf_static is."""


@dataclass
class PlayerLog:
    """What was published and what was received, on the steady clock.

    sent: camera -> image stamp -> when it was published, once for each pass. anchors: stamps of the anchor's
    images, in order.
    received: topic -> (stamp, when it was heard). lag_ns: furthest that playing fell behind the bag.
    """

    sent: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    anchors: list[int] = field(default_factory=list)
    received: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    lag_ns: int = 0
    published: dict[str, int] = field(default_factory=dict)


class Playable(Protocol):
    """What is played: a `BagReader`, or what looks like one."""

    path: Path

    @property
    def topics(self) -> Mapping[str, str]: ...

    @property
    def encodings(self) -> Mapping[str, str]: ...

    @property
    def span_ns(self) -> tuple[int, int]: ...

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]: ...


@dataclass(frozen=True)
class Plan:
    """What of a bag is played.

    topics: topic -> type, all that can be published. cameras: image topic -> camera.
    needed: topics that the perception node must have subscribed to before the start.
    """

    topics: dict[str, str]
    cameras: dict[str, str]
    needed: tuple[str, ...]
    skipped: dict[str, str]


def plan(bag: Playable, parameters: PerceptionParameters, namespace: str = "") -> Plan:
    """Match the configured topics with those of a bag.

    Raises:
        BagError: the bag has none of the configured image topics, or has one with another type.
    """
    wanted = {
        resolve(topic, namespace): (camera, kind)
        for camera in parameters.names
        for topic, kind in parameters.image_topics(camera).items()
    }
    for topic, (camera, kind) in wanted.items():
        if bag.topics.get(topic, kind) != kind:
            raise BagError(f"{bag.path}: {topic} is {bag.topics[topic]}, but cameras.{camera}.topic asks for {kind}")
    cameras = {topic: camera for topic, (camera, _) in wanted.items() if topic in bag.topics}
    if not cameras:
        raise BagError(
            f"{bag.path}: none of the configured image topics is in this bag. Configured: "
            f"{', '.join(sorted(wanted))}. In the bag: {', '.join(sorted(bag.topics)) or 'nothing'}. "
            f"Give a parameter file with its topics (`occbev rig {bag.path} --out vehicle` writes one)"
        )
    topics, skipped = _publishable(bag, namespace)
    infos = {resolve(parameters.info_topic(c), namespace) for c in cameras.values()}
    odometry = {resolve(parameters.ego_motion.odometry_topic, namespace)}
    needed = (set(cameras) | infos | odometry | {parameters.tf_topic, parameters.tf_static_topic}) & set(topics)
    return Plan(topics, cameras, tuple(sorted(needed)), skipped)


def _publishable(bag: Playable, namespace: str) -> tuple[dict[str, str], dict[str, str]]:
    """Split a bag's topics into those that can be played, and topic -> why not."""
    outputs = {resolve(topic.name, namespace) for topic in (OUTPUT_TOPICS | OPTIONAL_OUTPUTS).values()}
    topics, skipped = {}, {}
    for topic, kind in bag.topics.items():
        if topic == CLOCK.name or topic in outputs or topic.startswith(resolve(ACCOUNT, namespace)):
            skipped[topic] = "it would speak for the nodes that run now"
            continue
        if bag.encodings[topic] != "cdr":
            skipped[topic] = f"its messages are written as {bag.encodings[topic]}, not as ROS 2 sends them"
            continue
        try:
            message_class(kind)
        except (ImportError, AttributeError, ValueError) as error:
            skipped[topic] = f"its type {kind} is not installed: {error}"
            continue
        topics[topic] = kind
    return topics, skipped


class PlayerNode(Node):
    """Publishes a planned bag, subscribes to the perception node's outputs, logs both."""

    def __init__(
        self,
        bag: Playable,
        planned: Plan,
        parameters: PerceptionParameters,
        *,
        rate: float = 1.0,
        namespace: str = "",
        writer: BagWriter | None = None,
        **options: Any,
    ) -> None:
        """Create publishers and subscriptions; nothing is played yet."""
        super().__init__("bag_player", **options)
        self.log = PlayerLog(sent={name: {} for name in parameters.names})
        self._bag, self._plan, self._rate, self._writer = bag, planned, rate, writer
        self._anchor = parameters.anchor_camera
        self._latched = {parameters.tf_static_topic} | latched_topics(bag.path)
        self._now_ns = bag.span_ns[0]
        self._stopping = threading.Event()
        self._publishers_of = {topic: self._publisher(topic, kind) for topic, kind in planned.topics.items()}
        self._clock_publisher = self.create_publisher(Clock, CLOCK.name, 10)
        self._outputs = {
            resolve(topic.name, namespace): topic.type
            for topic in (OUTPUT_TOPICS | OPTIONAL_OUTPUTS).values()
            if _importable(topic.type)
        }
        for topic, kind in self._outputs.items():
            self._record(topic, kind)

    def find_unmatched(self) -> list[str]:
        """Return what must still be discovered before nothing can be lost."""
        deaf = [t for t in self._plan.needed if self._publishers_of[t].get_subscription_count() == 0]
        return deaf + [topic for topic in self._outputs if self.count_publishers(topic) == 0]

    def wait_for_perception(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Wait until the perception node listens and can be heard.

        Raises:
            TimeoutError: naming the topics nobody has subscribed to. ChildProcessError: `alive` turned false.
        """
        deadline = time.monotonic() + seconds
        while missing := self.find_unmatched():
            if not alive():
                raise ChildProcessError("the perception node ended before it was ready; see its messages above")
            if time.monotonic() > deadline:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise TimeoutError(
                    f"the perception node is not ready after {seconds:.0f} s: nobody listens to or publishes "
                    f"{', '.join(missing[:3])}{more}; its messages say why, a slow machine needs a longer --wait"
                )
            time.sleep(0.02)
        # A reader may learn of its writer after the writer did of it; what is published between is lost to it.
        time.sleep(SETTLE_S)

    def play(
        self,
        progress: Callable[[float], None],
        alive: Callable[[], bool] = lambda: True,
        passes: int = 1,
    ) -> None:
        """Publish all messages at the bag's pace; `progress` gets the share that is done.

        passes: how often the bag is played, its stamps and /clock going back each time.
        Raises:
            BagError: the bag is damaged. ChildProcessError: the perception node died.
        """
        for number in range(passes):

            def so_far(share: float, before: int = number) -> None:
                progress((before + share) / passes)

            if not self._play_once(so_far, alive):
                return
        progress(1.0)

    def _play_once(self, progress: Callable[[float], None], alive: Callable[[], bool]) -> bool:
        """Play one pass; False when stopped."""
        first_ns, last_ns = self._bag.span_ns
        start_ns, clock_ns = time.monotonic_ns(), -1
        for message in self._bag.messages(self._plan.topics):
            if message.log_ns >= clock_ns + CLOCK_STEP_NS:
                clock_ns = message.log_ns
                if not alive():
                    raise ChildProcessError("the perception node died while the bag played")
                progress((clock_ns - first_ns) / max(1, last_ns - first_ns))
            if not self._wait_until(start_ns, first_ns, message.log_ns):
                return False
            if message.log_ns == clock_ns:
                self._clock_publisher.publish(Clock(clock=time_from_ns(clock_ns)))
            self._send(message)
        return True

    def stop(self) -> None:
        """Make `play` return."""
        self._stopping.set()

    def _wait_until(self, start_ns: int, first_ns: int, log_ns: int) -> bool:
        """Sleep until a message is due, keeping /clock going in gaps; False when stopped."""
        due_ns = start_ns + int((log_ns - first_ns) / self._rate)
        self.log.lag_ns = max(self.log.lag_ns, time.monotonic_ns() - due_ns)
        while (left_ns := due_ns - time.monotonic_ns()) > 0:
            if self._stopping.wait(min(left_ns, CLOCK_STEP_NS) / 1e9):
                return False
            if left_ns > 2 * CLOCK_STEP_NS:
                bag_ns = log_ns - int(left_ns * self._rate)
                self._clock_publisher.publish(Clock(clock=time_from_ns(bag_ns)))
        return not self._stopping.is_set()

    def _send(self, message: BagMessage) -> None:
        self._now_ns = message.log_ns
        camera = self._plan.cameras.get(message.topic)
        if camera is not None:
            stamp_ns = header_stamp(message.data)
            if camera == self._anchor:
                self.log.anchors.append(stamp_ns)
            self.log.sent[camera].setdefault(stamp_ns, []).append(time.monotonic_ns())
        self._publishers_of[message.topic].publish(message.data)
        self.log.published[message.topic] = self.log.published.get(message.topic, 0) + 1

    def _publisher(self, topic: str, kind: str) -> Any:
        quality = TF_STATIC if topic in self._latched else PLAYED
        return self.create_publisher(message_class(kind), topic, qos_profile(quality))

    def _record(self, topic: str, kind: str) -> None:
        received = self.log.received.setdefault(topic, [])
        kept = Quality("reliable", depth=50)

        def take(data: bytes) -> None:
            received.append((output_stamp(kind, data), time.monotonic_ns()))
            if self._writer is not None:
                self._writer.write(BagMessage(topic, kind, self._now_ns, data))

        self.create_subscription(message_class(kind), topic, take, qos_profile(kept), raw=True)


class Spinner:
    """Spins a node in a thread of its own, as a context."""

    def __init__(self, node: Node) -> None:
        self._executor = SparingExecutor(context=node.context)
        self._executor.add_node(node)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="player", daemon=True)

    def __enter__(self) -> Spinner:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._executor.shutdown()

    def _spin(self) -> None:
        # Not executor.spin(): what it waits for may be destroyed under it while it is being shut down.
        with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
            while not self._done.is_set():
                self._executor.spin_once(timeout_sec=0.1)


def output_stamp(kind: str, data: bytes) -> int:
    """Read the stamp of a serialised output; a MarkerArray carries it in its first marker."""
    if kind.endswith("MarkerArray"):
        return header_stamp(data, 8) if len(data) >= 16 else 0
    return header_stamp(data)


def _importable(kind: str) -> bool:
    try:
        message_class(kind)
    except ImportError:
        return False
    return True


def start_context() -> rclpy.Context:
    """Make a context that leaves SIGINT to Python."""
    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    return context


def open_writer(path: Path | None, namespace: str = "") -> BagWriter | None:
    """Open the recording, if one is wanted."""
    return BagWriter(path, latched_outputs(namespace)) if path else None
