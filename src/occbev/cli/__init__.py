"""The `occbev` console command."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from occbev.allocator import keep_large_blocks

COMMANDS: Mapping[str, str] = {
    "demo": "simulate a drive, run the real node on it, score it, write a report",
    "run": "start the perception node with a parameter file",
    "replay": "play a bag through the node, or through the pipeline without ROS",
    "soak": "run the node for long on a looped bag and check that nothing grows",
    "bench": "measure latency by stage, beside named baselines",
    "verify-engine": "parity and latency of a package on this machine's GPU, or on another runtime",
    "rig": "write a file of topics, a rig and parameters for the node from a bag",
    "overlay": "draw LiDAR, boxes and voxels over the images to check a calibration",
    "view": "show a bag, a running node, pairs or a nuScenes root in 3D (Rerun)",
    "monitor": "show the running nodes in a terminal: cameras, drops, latency",
    "info": "print versions, devices, runtimes and ROS packages",
}
"""Sub-command -> one line of help. Each is `occbev.cli.<name>` with `add_arguments(parser)` and `run(args)`."""

FIRST_STEPS = """\
Try it; it needs no data, no ROS installation and no GPU:
  occbev demo                                            # simulate a drive, run the node on it, write a report

Your robot:
  occbev rig BAG --out vehicle                           # write topics, rig and parameters from a bag
  occbev overlay BAG --topics vehicle/topics.yaml --out overlay     # check the calibration
  occbev replay BAG --params-file vehicle/perception.yaml           # run the node on the bag
  occbev view BAG                                        # look at it in 3D
  occbev run params_file:=vehicle/perception.yaml        # run the node on the robot

When something is wrong:
  occbev monitor                                         # cameras, drops and latency of the running node
  occbev info                                            # what is installed here

All commands: occbev --help. One command with its options: occbev COMMAND --help."""
"""What `occbev` alone prints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `occbev COMMAND ...`; returns the exit status."""
    keep_large_blocks()  # before a library starts threads
    return dispatch("occbev", "occbev.cli", COMMANDS, sys.argv[1:] if arguments is None else arguments, FIRST_STEPS)


def dispatch(
    program: str, package: str, commands: Mapping[str, str], arguments: Sequence[str], first_steps: str = ""
) -> int:
    """Choose the sub-command that `arguments` name, import its module and run it.

    A module has `add_arguments(parser)` and `run(args) -> exit status`, and may raise ValueError, LookupError or
    OSError for bad input: its text is printed, status 2. Where `package` has a package `arguments`, its module of the
    same name has `add_arguments` and the help, so that the slow imports come after the arguments are read.
    A parser that has the default `more` gets the arguments that it does not know.
    Options may stand between positions: `pairs BAG --workers 2 BAG`.

    first_steps: what the program prints when it is called without arguments.
    """
    if not arguments and first_steps:
        print(first_steps)
        return 0
    chosen = arguments[0] if arguments and arguments[0] in commands else None
    parser = argparse.ArgumentParser(prog=program, description=(sys.modules[package].__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    own = {name: subparsers.add_parser(name, help=text, description=text) for name, text in commands.items()}
    if chosen is None:
        parser.parse_args(arguments)  # prints help, or what is wrong, and ends
        parser.error(f"name a command first: one of {', '.join(commands)}")
    args = argparse.Namespace()
    try:
        declared = _declaration(package, chosen)
        own[chosen].description = declared.__doc__
        own[chosen].formatter_class = argparse.RawDescriptionHelpFormatter
        declared.add_arguments(own[chosen])
        args = _parse(own[chosen], arguments[1:])
        return int(importlib.import_module(_module_name(package, chosen)).run(args))
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("occbev.", "occbev_training.")):
            raise
        print(f"{program} {chosen}: {_describe_missing(error.name, program)}", file=sys.stderr)
        return 2
    except (ValueError, LookupError, OSError) as error:
        print(f"{program} {chosen}: {error}{_describe_place(error, args)}", file=sys.stderr)
        return 2


def _describe_place(error: Exception, args: argparse.Namespace) -> str:
    """Say what was being written where an error does not, as that of a full disk."""
    written = [path for name in ("out", "record") if (path := getattr(args, name, None)) is not None]
    nameless = isinstance(error, OSError) and error.errno is not None and error.filename is None
    return f" while writing {written[0]}" if nameless and written else ""


def _declaration(package: str, command: str) -> ModuleType:
    """Import the module that declares the arguments of a command."""
    apart = f"{package}.arguments"
    return importlib.import_module(_module_name(apart if importlib.util.find_spec(apart) else package, command))


def _module_name(package: str, command: str) -> str:
    return f"{package}.{command.replace('-', '_')}"


def _describe_missing(module: str, program: str) -> str:
    """Say which Python package is missing in this environment, and which environment has it."""
    name = module.split(".")[0]
    if name == "occbev_training":
        return "the offline package is missing; in a clone: pip install --no-deps ./training (docs/install.md)"
    environment = "training" if program == "occbev-train" else "robot"
    return (
        f"the Python package {name} is missing in {sys.prefix}. `make .venv/{environment}` builds an environment "
        f"that has it: source .venv/{environment}/bin/activate (docs/install.md)"
    )


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command's arguments, with options before, between and after the positions.

    Where unknown options are passed on as `more`, their values look like positions, so that the order is strict.
    A number that is NaN or infinite is an error: comparisons with it would let it pass as a limit.
    """
    if parser.get_default("more") is None:
        args = parser.parse_intermixed_args(arguments)
    else:
        args, more = parser.parse_known_args(arguments)
        args.more = more
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                parser.error(f"argument --{name.replace('_', '-')}: {number} is no finite number")
    return args
