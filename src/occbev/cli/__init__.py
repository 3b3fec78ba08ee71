"""The `occbev` console command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

COMMANDS: Mapping[str, str] = {
    "demo": "simulate a drive, run the real nodes on it, score them, write a report",
    "run": "start the perception node with a parameter file",
    "replay": "publish a recorded bag through the node, or through the pipeline with --offline",
    "soak": "run the node for long on a looped bag and hold that nothing grows",
    "bench": "latency by stage, side by side with named baselines",
    "rig": "write a file of topics, a rig and parameters for the node from a bag",
    "overlay": "draw LiDAR, boxes and voxels over the images to prove a calibration",
    "monitor": "a terminal dashboard of the running node",
    "info": "versions, devices, runtimes, ROS capabilities",
}
"""Sub-command -> one line of help. Each is `occbev.cli.<name>` with `add_arguments(parser)` and `run(args)`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `occbev COMMAND ...`; returns the exit status."""
    return dispatch("occbev", "occbev.cli", COMMANDS, sys.argv[1:] if arguments is None else arguments)


def dispatch(program: str, package: str, commands: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Choose the sub-command that `arguments` name, import its module and run it.

    A module has `add_arguments(parser)` and `run(args) -> exit status`, and may raise
    ValueError, LookupError or OSError for bad input: its text is printed, status 2.
    One that declares the default `more` gets the arguments that the parser does not know.
    Options may stand between positions: `pairs BAG --workers 2 BAG`.
    """
    chosen = arguments[0] if arguments and arguments[0] in commands else None
    parser = argparse.ArgumentParser(prog=program, description=(sys.modules[package].__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    own = {name: subparsers.add_parser(name, help=text, description=text) for name, text in commands.items()}
    if chosen is None:
        parser.parse_args(arguments)  # prints help, or what is wrong, and ends
        parser.error(f"name a command first: one of {', '.join(commands)}")
    module = importlib.import_module(f"{package}.{chosen.replace('-', '_')}")
    own[chosen].description = module.__doc__
    own[chosen].formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(own[chosen])
    args = _parse(own[chosen], arguments[1:])
    try:
        return int(module.run(args))
    except KeyboardInterrupt:
        return 130
    except (ValueError, LookupError, OSError) as error:
        print(f"{program} {chosen}: {error}", file=sys.stderr)
        return 2


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command's arguments, with options before, between and after the positions.

    Where unknown options are passed on as `more`, their values look like positions, so that the order is strict.
    """
    if parser.get_default("more") is None:
        return parser.parse_intermixed_args(arguments)
    args, more = parser.parse_known_args(arguments)
    args.more = more
    return args
