"""The sparing executor takes every message, answers services soon and ends with its context."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

import rclpy
from rcl_interfaces.srv import GetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.service import Service
from rclpy.waitable import Waitable
from std_msgs.msg import Int32

from occbev.nodes.executor import BURST, RARELY_S, SparingExecutor, waiting_messages


def test_messages_and_services_come_through_and_the_end_of_the_context_ends_it() -> None:
    context, taken = rclpy.Context(), []
    rclpy.init(context=context)
    node, other = (rclpy.create_node(name, context=context) for name in ("spared", "other"))
    node.declare_parameter("answer", 42)
    node.create_subscription(Int32, "numbers", lambda message: taken.append(message.data), 100)
    publisher = other.create_publisher(Int32, "numbers", 100)
    client = other.create_client(GetParameters, "/spared/get_parameters")
    executor, asking = SparingExecutor(context=context), SingleThreadedExecutor(context=context)
    executor.add_node(node)
    asking.add_node(other)

    thread = threading.Thread(target=executor.spin, daemon=True)
    thread.start()
    assert client.wait_for_service(10)
    while not publisher.get_subscription_count():
        time.sleep(0.01)
    time.sleep(0.5)
    for number in range(50):
        publisher.publish(Int32(data=number))
    future = client.call_async(GetParameters.Request(names=["answer"]))
    asking.spin_until_future_complete(future, 10)
    assert future.result().values[0].integer_value == 42
    deadline = time.monotonic() + 10
    while len(taken) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken == list(range(50))
    other.destroy_node()
    context.try_shutdown()
    thread.join(5)
    assert not thread.is_alive()
    node.destroy_node()


def test_services_and_events_are_asked_rarely() -> None:
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("spared", context=context)
    node.create_subscription(Int32, "numbers", lambda message: None, 10)
    executor, asked = SparingExecutor(context=context), []
    real = executor.can_execute
    executor.can_execute = lambda entity: [real(entity), asked.append(type(entity))][0]
    executor.add_node(node)
    began, looks = time.monotonic(), 0
    for _ in range(20):
        executor.spin_once(timeout_sec=0)
        looks += executor._looks_at_all
    assert 1 <= looks <= 2 + (time.monotonic() - began) / RARELY_S
    assert any(issubclass(kind, (Service, Waitable)) for kind in asked)
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_one_callback_takes_all_that_waits() -> None:
    context, taken = rclpy.Context(), []
    rclpy.init(context=context)
    node, other = (rclpy.create_node(name, context=context) for name in ("spared", "other"))

    def take_all(message: Int32) -> None:
        taken.append([message.data, *(waiting.data for waiting in waiting_messages(subscription))])

    subscription = node.create_subscription(Int32, "numbers", take_all, 100)
    publisher = other.create_publisher(Int32, "numbers", 100)
    executor = SparingExecutor(context=context)
    executor.add_node(node)
    while not publisher.get_subscription_count():
        time.sleep(0.01)
    time.sleep(0.5)
    for number in range(60):
        publisher.publish(Int32(data=number))
    time.sleep(0.5)
    deadline = time.monotonic() + 10
    while sum(map(len, taken)) < 60 and time.monotonic() < deadline:
        executor.spin_once(timeout_sec=0.1)
    assert taken == [list(range(BURST + 1)), list(range(BURST + 1, 60))]
    for end in (node, other):
        end.destroy_node()
    rclpy.shutdown(context=context)
