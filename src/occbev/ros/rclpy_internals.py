"""The only module that reaches private parts of rclpy; each function says why there is no public way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.exceptions import InvalidHandle
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.parameter import Parameter
from rclpy.parameter_service import ParameterService


def parameter_overrides(node: Any) -> dict[str, Parameter[Any]]:
    """Return the parameters that were given to a node, by name; changes to the dictionary hold for later declarations.

    rclpy has no public list of the given parameters, and declares a value of a wrong type without naming it.
    """
    overrides: dict[str, Parameter[Any]] = node._parameter_overrides
    return overrides


def destroy_lifecycle_parts(node: Any) -> None:
    """Destroy the services of a lifecycle node; rclpy leaves them to garbage collection, perhaps after its context."""
    for name in [n for n in vars(node) if n.startswith(("_service_", "_state_machine"))]:
        delattr(node, name)


class CheckedParameterService(ParameterService):
    """Answers requests to set parameters; rclpy's own raises on a value of an unknown type, which ends the node."""

    def _set_parameters_callback(self, request: Any, response: Any) -> Any:
        response.results = [result for given in request.parameters for result in self._set([given])]
        return response

    def _set_parameters_atomically_callback(self, request: Any, response: Any) -> Any:
        response.result = self._set(request.parameters)[0]
        return response

    def _set(self, given: Sequence[Any]) -> list[SetParametersResult]:
        """Set all parameters or none; the answer is a list of one."""
        try:
            parameters = [Parameter.from_parameter_msg(message) for message in given]
            return [self._get_node().set_parameters_atomically(parameters)]
        except Exception as error:
            names = ", ".join(message.name for message in given)
            return [SetParametersResult(successful=False, reason=f"{names}: {type(error).__name__}: {error}")]


def wait_for_messages(context: Any, nodes: Sequence[Any], timeout_s: float) -> list[Any]:
    """Return the subscriptions of nodes that have messages: when there is one, a timer is due, or after `timeout_s`.

    rclpy has no public wait set, and its executors ask all events of quality of service in every turn.
    """
    subscriptions = [subscription for node in nodes for subscription in node.subscriptions]
    timers = [timer for node in nodes for timer in node.timers]
    if not subscriptions and not timers:  # rcl refuses to wait for nothing
        time.sleep(timeout_s)
        return []
    with context.handle, _Held() as held:
        wait_set: Any = rclpy_implementation.WaitSet(len(subscriptions), 0, len(timers), 0, 0, 0, context.handle)
        wait_set.clear_entities()
        held.take([subscription.handle for subscription in subscriptions], wait_set.add_subscription)
        held.take([timer.handle for timer in timers], wait_set.add_timer)
        if not held.handles:
            time.sleep(timeout_s)
            return []
        wait_set.wait(round(timeout_s * 1e9))
        ready = wait_set.get_ready_entities("subscription")
        found = {id(handle) for handle in held.handles if handle.pointer in ready} if ready else ()
        return [subscription for subscription in subscriptions if id(subscription.handle) in found] if found else []


def find_requests(context: Any, nodes: Sequence[Any]) -> bool:
    """Whether a service or client of nodes has something to do."""
    services = [service for node in nodes for service in node.services]
    clients = [client for node in nodes for client in node.clients]
    with context.handle, _Held() as held:
        wait_set: Any = rclpy_implementation.WaitSet(0, 0, 0, len(clients), len(services), 0, context.handle)
        wait_set.clear_entities()
        for add, entities in ((wait_set.add_service, services), (wait_set.add_client, clients)):
            held.take([entity.handle for entity in entities], add)
        if not held.handles:
            return False
        wait_set.wait(0)
        return bool(wait_set.get_ready_entities("service") or wait_set.get_ready_entities("client"))


class _Held:
    """Handles that nobody destroys before the end of a context, where they have not been destroyed already."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.__exit__(None, None, None)

    def take(self, handles: Iterable[Any], add: Callable[[Any], object]) -> None:
        """Hold handles and add them to a wait set, but those that are destroyed."""
        for handle in handles:
            try:
                handle.__enter__()
            except InvalidHandle:
                continue
            self.handles.append(handle)
            add(handle)
