"""Start the perception node, as the launch file does but without `launch`.

    occbev run params_file:=vehicle/perception.yaml
    occbev run model:=occbev-tiny backend:=openvino detection.score_threshold:=0.3

Arguments are those of perception.launch.py, given as name:=value; any other name is a parameter of the node.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from occbev import graph
from occbev.share import here_or_shipped
from occbev.streams.parameters import find_leaf, fit_value, parse_value

GRACE_S = 8.0
"""How long a child may take to end before it is killed."""

PARENT_VARIABLE = "OCCBEV_PARENT"
"""Environment variable with the process that the node shall end with."""

PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("assignments", nargs="*", metavar="NAME:=VALUE", help=argument_help())
    parser.add_argument("--params-file", type=here_or_shipped, help="ROS parameter file, as params_file:=")


def run(args: argparse.Namespace) -> int:
    """Start the node in this process, and a player beside it where a bag is given."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent and not end_with(int(parent)):
        return 0
    values, extra = split_assignments(args.assignments)
    if args.params_file:
        values["params_file"] = str(args.params_file)
    graph.check_arguments(values)
    parameters = write_values(extra)
    rviz = _existing(graph.rviz_command(values)) if graph.is_true(values["rviz"]) else []
    from occbev.ros.perception_node import main

    with contextlib.ExitStack() as stack:
        if values["bag"]:
            stack.enter_context(child(graph.player_command(values, extra)))
        if rviz:
            stack.enter_context(child(rviz))
        return main(graph.node_arguments(values, parameters))


def end_with(parent: int) -> bool:
    """Ask the kernel to end this process when its parent dies (Linux only); returns False if the parent is dead already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
    return os.getppid() == parent


@contextlib.contextmanager
def child(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a group of its own beside the node; at the end interrupt it, and kill it if it does not end."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield process
    finally:
        end_group(process)


def _existing(command: list[str]) -> list[str]:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(
            f"there is no {command[0]} here; it comes with a ROS 2 distribution: apt install ros-$ROS_DISTRO-{command[0]}"
        )
    return command


def end_group(process: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """Interrupt a process; kill its group if it does not end in time."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def split_assignments(assignments: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the launch arguments (all of them, with defaults) and the node parameters among name:=value texts.

    Raises:
        ValueError: a text is no assignment.
    """
    values = {argument.name: argument.default for argument in graph.ARGUMENTS}
    extra = {}
    for text in assignments:
        name, separator, value = text.partition(":=")
        if not separator or not name:
            raise ValueError(f"{text!r} is not name:=value; launch arguments are {sorted(values)}")
        if name in values:
            values[name] = value
        else:
            extra[name] = value
    return values, extra


def write_values(given: Mapping[str, str]) -> dict[str, str]:
    """Write each value in the type of its parameter: rcl ignores an integer `1` for a double of the parameter file.

    Names that are unknown are left to the node, which names the nearest known one.
    Raises:
        ConfigError: a value of a wrong type or out of range.
    """
    return {name: _write_value(name, text) for name, text in given.items()}


def _write_value(name: str, text: str) -> str:
    leaf = find_leaf(name)
    if leaf is None:
        return text
    value = fit_value(leaf, parse_value(name, text))
    return repr(value) if isinstance(value, float) else text


def argument_help() -> str:
    """Describe the launch arguments in one line."""
    return "; ".join(f"{a.name}: {a.text}{_describe_choices(a)}" for a in graph.ARGUMENTS)


def _describe_choices(argument: graph.Argument) -> str:
    return f" ({', '.join(filter(None, argument.choices))})" if argument.choices else ""
