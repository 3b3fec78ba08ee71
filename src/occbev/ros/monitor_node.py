"""Listens to the diagnostics of a running perception node and keeps the newest of each part."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from occbev.graph import DIAGNOSTICS
from occbev.ros.perception_node import qos_profile

PREFIX = "occbev: "

GONE_S = 10.0
"""A part that was not heard for this long is of a node that is gone."""


@dataclass(frozen=True)
class Part:
    """Newest state of one part of the node. level: 0 fine, 1 warning, 2 error. heard_s: steady clock."""

    name: str
    level: int
    text: str
    values: dict[str, str]
    heard_s: float


class MonitorNode(Node):
    """parts: name -> newest state, in the order in which the node reports them."""

    def __init__(self, **options: Any) -> None:
        """Subscribe; spin to receive."""
        super().__init__("occbev_monitor", **options)
        self.parts: dict[str, Part] = {}
        self.create_subscription(DiagnosticArray, DIAGNOSTICS.name, self._take, qos_profile(DIAGNOSTICS.quality))

    def _take(self, message: Any) -> None:
        for status in message.status:
            if status.name.startswith(PREFIX):
                name = status.name.removeprefix(PREFIX)
                values = {entry.key: entry.value for entry in status.values}
                self.parts[name] = Part(name, status.level[0], status.message, values, time.monotonic())


class Listener:
    """A monitor node with its own context and executor, as a context manager."""

    def __enter__(self) -> Listener:
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context)
        self._node = MonitorNode(context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()

    def listen(self, seconds: float) -> dict[str, Part]:
        """Wait for one message, at most this long; return the parts that were heard lately."""
        self._executor.spin_once(timeout_sec=seconds)
        now_s = time.monotonic()
        gone = [name for name, part in self._node.parts.items() if now_s - part.heard_s > GONE_S]
        for name in gone:
            del self._node.parts[name]
        return self._node.parts
