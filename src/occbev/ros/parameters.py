"""The parameters of `occbev.streams.parameters` on a ROS node: declared with description, range and type, and read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidTopicNameException
from rclpy.expand_topic_name import expand_topic_name
from rclpy.parameter import Parameter
from rclpy.validate_full_topic_name import validate_full_topic_name
from rclpy.validate_topic_name import validate_topic_name

from occbev.config import ConfigError
from occbev.files import read_yaml
from occbev.ros.rclpy_internals import parameter_overrides
from occbev.streams.parameters import (
    CAMERA_NAMES,
    OLD_NAMES,
    CameraParameters,
    Leaf,
    PerceptionParameters,
    fit_value,
    is_ours,
    leaves,
    nest_names,
    parameters_from_record,
    read_topic_values,
    rename_old,
)


def declare_parameters(node: Any) -> PerceptionParameters:
    """Declare every parameter on a node and return their values; old names hold with a warning.

    Raises:
        ConfigError: a value cannot be used.
    """
    _take_old_names(node)
    for leaf in leaves(PerceptionParameters):
        _declare(node, leaf)
    file = node.get_parameter("topics").value
    named = read_topic_values(file) if file else {}
    _declare(node, replace(CAMERA_NAMES, default=named.get("cameras.names", CAMERA_NAMES.default)))
    for camera in node.get_parameter("cameras.names").value:
        for leaf in leaves(CameraParameters, f"cameras.{camera}."):
            _declare(node, replace(leaf, default=named.get(leaf.name, leaf.default)))
    parameters = read_node_parameters(node)
    _check_topics(node, parameters)
    return parameters


def _check_topics(node: Any, parameters: PerceptionParameters) -> None:
    """Refuse what is no name of a topic, before a model is loaded; other commands read bags with any names."""
    topics = {
        "tf_topic": parameters.tf_topic,
        "tf_static_topic": parameters.tf_static_topic,
        "ego_motion.odometry_topic": parameters.ego_motion.odometry_topic,
    }
    for camera in parameters.names:
        topics[f"cameras.{camera}.topic"] = next(iter(parameters.image_topics(camera)))
        topics[f"cameras.{camera}.info_topic"] = parameters.info_topic(camera)
    for parameter, topic in topics.items():
        try:
            validate_topic_name(topic)
            validate_full_topic_name(expand_topic_name(topic, node.get_name(), node.get_namespace()))
        except InvalidTopicNameException as error:
            reason = str(error).splitlines()[0].removeprefix("Invalid topic name: ").rstrip(":")
            raise ConfigError(f"{parameter} {topic!r}: {reason}") from error


def describe_unused_files(files: Sequence[str], full_name: str) -> str:
    """Say that parameter files have no section for a node, "" where one has or no file is given."""
    try:
        sections = [section for file in files for section in _sections(read_yaml(Path(file)))]
    except (OSError, ValueError):
        return ""  # rcl has read it, and reads more of YAML than we do
    if not files or any(_section_pattern(section).fullmatch(full_name) for section in sections):
        return ""
    found = f"its sections are {', '.join(sections)}" if sections else "it has no section"
    return f"{', '.join(files)}: no section for {full_name}, so defaults hold; {found}: name it /**"


def _sections(document: Any, parent: str = "") -> Iterator[str]:
    """Yield the nodes that a parameter file names, which may be patterns."""
    for key, value in document.items() if isinstance(document, Mapping) else ():
        name = f"{parent}/{str(key).strip('/')}"
        if isinstance(value, Mapping) and "ros__parameters" in value:
            yield name
        elif isinstance(value, Mapping):
            yield from _sections(value, name)


def _section_pattern(section: str) -> re.Pattern[str]:
    """Return what a section matches: `*` is one part of a full name, `**` any number of them."""
    wild = {"*": "/[^/]+", "**": "(/[^/]+)*"}
    return re.compile("".join(wild.get(part, f"/{re.escape(part)}") for part in section.strip("/").split("/")))


def read_node_parameters(node: Any, changed: Sequence[Any] = ()) -> PerceptionParameters:
    """Return the declared parameters' values, with `changed` rclpy parameters laid over them."""
    values = {name: parameter.value for name, parameter in node.get_parameters_by_prefix("").items()}
    values.update({parameter.name: parameter.value for parameter in changed})
    return parameters_from_record(nest_names({n: v for n, v in values.items() if is_ours(n)}))


def find_unknown(node: Any, prefix: str = "") -> dict[str, str]:
    """Return given but undeclared parameters -> the nearest declared name, "" where none is near.

    prefix: QOS_PREFIX for those of the topics, which are declared as topics are made; else all of ours.
    """
    declared = list(node.get_parameters_by_prefix(""))
    chosen = is_ours if not prefix else lambda name: name.startswith(prefix)
    given = [name for name in parameter_overrides(node) if name not in declared and chosen(name)]
    return {name: next(iter(difflib.get_close_matches(name, declared, 1)), "") for name in given}


def _take_old_names(node: Any) -> None:
    overrides = parameter_overrides(node)
    concerned = {*OLD_NAMES, *OLD_NAMES.values()} & set(overrides)
    values = {name: overrides.pop(name).value for name in sorted(concerned)}
    for warning in rename_old(values):
        node.get_logger().warning(warning)
    overrides.update({name: Parameter(name, value=value) for name, value in values.items()})


def _declare(node: Any, leaf: Leaf) -> None:
    """Declare one parameter; a given value of a wrong type or out of range is named before rclpy sees it."""
    overrides = parameter_overrides(node)
    given = overrides.get(leaf.name)
    if given is not None and given.value is None:
        del overrides[leaf.name]  # an empty list in a file, as `ros2 param dump` writes it
    elif given is not None:
        overrides[leaf.name] = Parameter(leaf.name, value=fit_value(leaf, given.value))
    default = list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
    node.declare_parameter(leaf.name, default, _descriptor(leaf))


def _descriptor(leaf: Leaf) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(
        name=leaf.name, description=leaf.text, read_only=not (leaf.live or leaf.unconfigured)
    )
    if isinstance(leaf.default, tuple):
        descriptor.dynamic_typing = True  # an empty list in YAML has no type
    if leaf.range and isinstance(leaf.default, float):
        low, high = map(float, leaf.range)
        descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
    elif leaf.range:
        low, high = map(int, leaf.range)
        descriptor.integer_range = [IntegerRange(from_value=low, to_value=high)]
    return descriptor
