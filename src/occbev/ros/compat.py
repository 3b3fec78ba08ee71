"""The optional ROS packages: which are here, and what installs those that are not.

All other modules import what they need directly; only this one handles packages that may be missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

BUILD = "python -m occbev.ros.build_interfaces (gcc, g++ and the Python headers), or apt install ros-$ROS_DISTRO-{}"
APT = "only from a ROS 2 distribution: apt install ros-$ROS_DISTRO-{}"


@dataclass(frozen=True)
class Capability:
    """One optional package: the module that is imported, what it is used for and what installs it."""

    name: str
    use: str
    remedy: str

    @property
    def present(self) -> bool:
        """Whether the module can be found."""
        return importlib.util.find_spec(self.name) is not None


CAPABILITIES: tuple[Capability, ...] = (
    Capability("rclpy", "the nodes", "pip install ros-rclpy ros-common-interfaces ros-rmw-fastrtps-cpp"),
    Capability("vision_msgs", "publishing boxes as Detection3DArray", BUILD.format("vision-msgs")),
    Capability("tf2_msgs", "/tf and /tf_static", BUILD.format("tf2-msgs")),
    Capability(
        "autoware_perception_msgs", "publishing boxes for Autoware, optional", APT.format("autoware-perception-msgs")
    ),
    Capability("tf2_ros", "comparing our transform buffer with tf2's", APT.format("tf2-ros-py")),
    Capability("sensor_msgs_py", "comparing our point clouds with upstream's reader", APT.format("sensor-msgs-py")),
    Capability("tf_transformations", "nothing of ours", APT.format("tf-transformations")),
    Capability("message_filters", "comparing our synchroniser with upstream's", APT.format("message-filters")),
    Capability("launch_ros", "ros2 launch; `occbev run` does without", APT.format("launch-ros")),
)


class MissingCapability(ImportError):
    """A package that this use needs is absent; the text names what installs it."""


def capabilities() -> tuple[Capability, ...]:
    """All optional packages, for `occbev info`."""
    return CAPABILITIES


def require(name: str) -> ModuleType:
    """Import an optional package, or a module of it such as "vision_msgs.msg".

    Raises:
        MissingCapability: it is absent; says what it is for and what installs it.
    """
    package = name.split(".")[0]
    capability = next(c for c in CAPABILITIES if c.name == package)
    if not capability.present:
        raise MissingCapability(f"{package} is needed for {capability.use}: {capability.remedy}")
    return importlib.import_module(name)


def is_installed(kind: str) -> bool:
    """Whether the package of a message type such as "sensor_msgs/msg/Image" is installed."""
    return importlib.util.find_spec(kind.split("/")[0]) is not None


def subscription_events() -> Any:
    """Return rclpy's SubscriptionEventCallbacks, which Humble keeps in another module."""
    return _events().SubscriptionEventCallbacks


def publisher_events() -> Any:
    """Return rclpy's PublisherEventCallbacks."""
    return _events().PublisherEventCallbacks


def _events() -> ModuleType:
    newer = importlib.util.find_spec("rclpy.event_handler") is not None
    return importlib.import_module("rclpy.event_handler" if newer else "rclpy.qos_event")
