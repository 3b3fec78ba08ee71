"""The executor of the nodes: it sleeps until a message or a timer is there, and calls callbacks directly.

For each message rclpy asks every entity of a node anew, events of quality of service among them, makes a task and looks
at the callback's signature. Here one wait set is kept, and the rest of a node is looked at rarely.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import rclpy
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor, TimeoutException
from rclpy.subscription import Subscription
from rclpy.timer import Timer

from occbev.ros.rclpy_internals import find_requests, wait_for_messages

LONGEST_WAIT_S = 0.05
"""After so long without a message it is looked whether the context has ended."""

SERVICES_S = 0.1
"""How often requests to services are looked for."""

RARELY_S = 0.5
"""How often guard conditions and events of quality of service are looked at."""

BURST = 50
"""Messages that one subscription gives at a time at most, so that none keeps the others from being heard."""


class SparingExecutor(SingleThreadedExecutor):
    """Wakes for messages and timers, looks for requests every `SERVICES_S` and at everything else every `RARELY_S`.

    Callbacks of subscriptions and timers are plain functions, called with a message and with nothing.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._next_look = self._next_request = 0.0

    def spin(self) -> None:
        """Spin until the context is shut down."""
        try:
            while rclpy.ok(context=self.context):
                self.spin_once()
        except (ExternalShutdownException, RuntimeError):
            # It may end at any moment of a turn; what rclpy raises then depends on the moment.
            if rclpy.ok(context=self.context):
                raise

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Wait for something to do, `timeout_sec` or `LONGEST_WAIT_S` at most, and do all of it.

        Raises:
            ExternalShutdownException: the context was shut down.
        """
        if not self.context.ok():
            raise ExternalShutdownException()
        longest_s = LONGEST_WAIT_S if timeout_sec is None or timeout_sec < 0 else min(timeout_sec, LONGEST_WAIT_S)
        nodes = self.get_nodes()
        ready = wait_for_messages(self.context, nodes, longest_s)
        for node in nodes:
            for timer in list(node.timers):
                call_if_due(timer)
        for subscription in ready:
            take: Any = subscription.callback
            for message in waiting_messages(subscription):
                take(message)
        now = time.monotonic()
        if now >= self._next_look or (now >= self._next_request and find_requests(self.context, nodes)):
            self._look_at_the_rest()
            self._next_look = time.monotonic() + RARELY_S
        if now >= self._next_request:
            self._next_request = now + SERVICES_S

    def can_execute(self, entity: Any) -> bool:
        """Whether rclpy is to ask an entity."""
        return not isinstance(entity, (Subscription, Timer)) and bool(super().can_execute(entity))

    def _look_at_the_rest(self) -> None:
        while True:
            try:
                task, _, _ = self.wait_for_ready_callbacks(timeout_sec=0)
            except TimeoutException:
                return
            task()
            task.result()  # raises what the callback raised


def make_executor(name: str, **options: Any) -> SingleThreadedExecutor:
    """Make the executor that the parameter `executor` names, "sparing" or "rclpy"; `options` go to rclpy."""
    return SparingExecutor(**options) if name == "sparing" else SingleThreadedExecutor(**options)


def waiting_messages(subscription: Any) -> Iterator[Any]:
    """Yield what waits for a subscription, until it is destroyed."""
    for _ in range(BURST):
        try:
            with subscription.handle:
                taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
        except InvalidHandle:
            return
        if taken is None:
            return
        yield taken[0]


def call_if_due(timer: Any) -> None:
    """Call a timer's callback if its time has come."""
    try:
        with timer.handle:
            if not timer.handle.is_timer_ready():
                return
            timer.handle.call_timer()
    except InvalidHandle:
        return
    timer.callback()
