"""The only module that reaches private parts of rclpy; each function says why there is no public way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
    kinds = {"subscription": subscriptions, "timer": timers}
    ready = _wait(context, kinds, timeout_s)["subscription"]
    return [entity for entity in subscriptions if entity.handle.pointer in ready] if ready else []


def find_requests(context: Any, nodes: Sequence[Any]) -> bool:
    """Whether a service or client of nodes has something to do."""
    kinds = {
        "service": [service for node in nodes for service in node.services],
        "client": [client for node in nodes for client in node.clients],
    }
    return any(_wait(context, kinds, 0.0).values())


def _wait(context: Any, kinds: Mapping[str, Sequence[Any]], timeout_s: float) -> dict[str, set[int]]:
    """Wait with a new wait set; return kind -> pointers of what is ready. Nothing is destroyed meanwhile."""
    held: list[Any] = []
    counts, adds = dict.fromkeys(("subscription", "timer", "client", "service"), 0), []
    try:
        context.handle.__enter__()
        held.append(context.handle)
        for kind, entities in kinds.items():
            for entity in entities:
                handle = entity.handle
                try:
                    handle.__enter__()
                except InvalidHandle:
                    continue
                held.append(handle)
                adds.append((f"add_{kind}", handle))
                counts[kind] += 1
        if not adds:  # rcl refuses to wait for nothing
            time.sleep(timeout_s)
            return {kind: set() for kind in kinds}
        subscriptions, timers, clients, services = counts.values()
        wait_set: Any = rclpy_implementation.WaitSet(subscriptions, 0, timers, clients, services, 0, context.handle)
        wait_set.clear_entities()
        for add, handle in adds:
            getattr(wait_set, add)(handle)
        wait_set.wait(round(timeout_s * 1e9))
        return {kind: set(wait_set.get_ready_entities(kind)) for kind in kinds}
    finally:
        for handle in held:
            handle.__exit__(None, None, None)
