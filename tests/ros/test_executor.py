"""The sparing executor takes every message, answers services soon and ends with its context."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

import rclpy
from rcl_interfaces.srv import GetParameters
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.service import Service
from rclpy.subscription import Subscription
from rclpy.timer import Timer
from rclpy.waitable import Waitable
from std_msgs.msg import Int32

from occbev.ros.executor import (
    BURST,
    LONGEST_WAIT_S,
    RARELY_S,
    SparingExecutor,
    call_if_due,
    waiting_messages,
)


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


def test_services_and_events_are_asked_rarely_and_messages_never() -> None:
    context, asked, looks = rclpy.Context(), [], []
    rclpy.init(context=context)
    node = rclpy.create_node("spared", context=context)
    node.create_subscription(Int32, "numbers", lambda message: None, 10)
    node.create_timer(10.0, lambda: None)
    executor = SparingExecutor(context=context)
    real, look = executor.can_execute, executor._look_at_the_rest
    executor.can_execute = lambda entity: [
        real(entity),
        asked.append((type(entity), real(entity))),
    ][0]
    executor._look_at_the_rest = lambda: [look(), looks.append(1)]
    executor.add_node(node)
    began = time.monotonic()
    for _ in range(20):
        executor.spin_once()
    assert 1 <= len(looks) <= 2 + (time.monotonic() - began) / RARELY_S
    assert any(issubclass(kind, (Service, Waitable)) and may for kind, may in asked)
    assert not any(may for kind, may in asked if issubclass(kind, (Subscription, Timer)))
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_a_subscription_gives_so_many_messages_at_a_time_that_others_are_heard() -> None:
    context, taken = rclpy.Context(), []
    rclpy.init(context=context)
    node, other = (rclpy.create_node(name, context=context) for name in ("spared", "other"))
    executor, publishers = SparingExecutor(context=context), []
    for topic in ("first", "second"):
        heard = partial(lambda topic, message: taken.append((topic, message.data)), topic)
        node.create_subscription(Int32, topic, heard, 100)
        publishers.append(other.create_publisher(Int32, topic, 100))
    executor.add_node(node)
    while not all(publisher.get_subscription_count() for publisher in publishers):
        time.sleep(0.01)
    time.sleep(0.5)
    for publisher in publishers:
        for number in range(60):
            publisher.publish(Int32(data=number))
    time.sleep(0.5)
    executor.spin_once()
    assert taken == [(t, n) for t in ("first", "second") for n in range(BURST)]
    executor.spin_once()
    assert taken[2 * BURST :] == [(t, n) for t in ("first", "second") for n in range(BURST, 60)]
    for end in (node, other):
        end.destroy_node()
    rclpy.shutdown(context=context)


def test_timers_tick_until_they_are_cancelled() -> None:
    context, ticks = rclpy.Context(), []
    rclpy.init(context=context)
    node = rclpy.create_node("spared", context=context)
    executor = SparingExecutor(context=context)
    executor.add_node(node)
    timer = node.create_timer(0.03, lambda: ticks.append(time.monotonic()))
    began = time.monotonic()
    while len(ticks) < 5 and time.monotonic() < began + 10:
        executor.spin_once()
    assert len(ticks) == 5
    assert ticks[-1] - began > 4 * 0.03
    timer.cancel()
    for _ in range(8):
        executor.spin_once()
    assert len(ticks) == 5
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_errors_of_callbacks_come_out_and_what_is_destroyed_is_passed_over() -> None:
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("spared", context=context)
    executor = SparingExecutor(context=context)
    executor.add_node(node)
    subscription = node.create_subscription(Int32, "numbers", lambda message: None, 10)
    timer = node.create_timer(0.0, lambda: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        executor.spin_once()
    for entity in (timer, subscription):
        entity.handle.destroy_when_not_in_use()
    call_if_due(timer)
    assert list(waiting_messages(subscription)) == []
    node.destroy_node()
    rclpy.shutdown(context=context)
    with pytest.raises(ExternalShutdownException):
        executor.spin_once()


def test_a_node_without_subscriptions_is_waited_for_without_a_busy_loop() -> None:
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("spared", context=context, enable_rosout=False, start_parameter_services=False)
    executor = SparingExecutor(context=context)
    executor.add_node(node)
    began = time.monotonic()
    for _ in range(4):
        executor.spin_once(timeout_sec=0.02)
    assert time.monotonic() - began >= 4 * 0.02
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_a_message_is_taken_at_once_and_a_wait_ends_at_its_limit() -> None:
    context, taken = rclpy.Context(), []
    rclpy.init(context=context)
    node, other = (rclpy.create_node(name, context=context) for name in ("spared", "other"))
    node.create_subscription(Int32, "numbers", lambda message: taken.append(time.monotonic()), 10)
    publisher = other.create_publisher(Int32, "numbers", 10)
    executor = SparingExecutor(context=context)
    executor.add_node(node)
    while not publisher.get_subscription_count():
        time.sleep(0.01)
    time.sleep(0.5)
    executor.spin_once()
    sent: list[float] = []

    def send() -> None:
        time.sleep(0.01)
        sent.append(time.monotonic())
        publisher.publish(Int32(data=1))

    thread = threading.Thread(target=send)
    thread.start()
    while not taken:
        executor.spin_once(timeout_sec=10.0)
    thread.join()
    assert taken[0] - sent[0] < LONGEST_WAIT_S, "by the message, not by the end of the wait"
    for end in (node, other):
        end.destroy_node()
    rclpy.shutdown(context=context)
