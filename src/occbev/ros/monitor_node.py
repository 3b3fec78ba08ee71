"""Listens to the diagnostics of the running perception nodes and keeps the newest of each part."""

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
    """nodes: full name of a perception node -> its parts, name -> newest state, in the order in which it reports them."""

    def __init__(self, **options: Any) -> None:
        """Subscribe; spin to receive."""
        super().__init__("occbev_monitor", **options)
        self.nodes: dict[str, dict[str, Part]] = {}
        self.create_subscription(DiagnosticArray, DIAGNOSTICS.name, self._take, qos_profile(DIAGNOSTICS.quality))

    def _take(self, message: Any) -> None:
        for status in message.status:
            if status.name.startswith(PREFIX):
                name = status.name.removeprefix(PREFIX)
                values = {entry.key: entry.value for entry in status.values}
                part = Part(name, status.level[0], status.message, values, time.monotonic())
                self.nodes.setdefault(status.hardware_id, {})[name] = part


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

    def listen(self, seconds: float) -> dict[str, dict[str, Part]]:
        """Wait for one message, at most this long; return each node's parts that were heard lately."""
        self._executor.spin_once(timeout_sec=seconds)
        since_s = time.monotonic() - GONE_S
        for node, parts in list(self._node.nodes.items()):
            recent = {name: part for name, part in parts.items() if part.heard_s >= since_s}
            if recent:
                self._node.nodes[node] = recent
            else:
                del self._node.nodes[node]
        return self._node.nodes
