"""The only module that reaches private parts of rclpy; each function says why there is no public way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rcl_interfaces.msg import SetParametersResult
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
