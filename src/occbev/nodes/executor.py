"""The executor of the node: rclpy's, spared most of what it does for every message.

rclpy asks each entity of a node anew before it takes a message. With six cameras that is ninety entities and
milliseconds of a processor, more than a core at 250 messages a second, while few of them ever have anything to say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.service import Service
from rclpy.waitable import Waitable

GATHER_S = 0.010
"""Pause before messages are asked for, so that one question brings several; far below what a camera waits for."""

RARELY_S = 0.05
"""How often services and events of quality of service are looked at."""

BURST = 50
"""Messages that one subscription gives at a time at most, so that none keeps the others from being heard."""


def waiting_messages(subscription: Any) -> Iterator[Any]:
    """Yield what else waits for a subscription, whose callback gets but one message each time all are asked."""
    for _ in range(BURST):
        with subscription.handle:
            taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
        if taken is None:
            return
        yield taken[0]


class SparingExecutor(SingleThreadedExecutor):
    """Looks at subscriptions and timers all the time, at services and events every `RARELY_S`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._looks_at_all, self._next_look = True, 0.0

    def spin(self) -> None:
        """Spin until the context is shut down."""
        while rclpy.ok(context=self.context):
            try:
                self.spin_once(timeout_sec=RARELY_S)
            except (ExternalShutdownException, RuntimeError):
                # It may end at any moment of a turn; what rclpy raises then depends on the moment.
                if rclpy.ok(context=self.context):
                    raise

    def can_execute(self, entity: Any) -> bool:
        """Whether an entity is asked this time."""
        if not self._looks_at_all and isinstance(entity, (Service, Waitable)):
            return False
        return bool(super().can_execute(entity))

    def _wait_for_ready_callbacks(self, *args: Any, **options: Any) -> Any:
        time.sleep(GATHER_S)
        now = time.monotonic()
        self._looks_at_all = now >= self._next_look
        if self._looks_at_all:
            self._next_look = now + RARELY_S
        yield from super()._wait_for_ready_callbacks(*args, **options)
