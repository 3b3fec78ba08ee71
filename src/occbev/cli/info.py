"""Print versions, devices, runtimes and ROS packages: put this into every bug report.

occbev info
occbev info --json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from occbev.share import share_path
from occbev.versions import machine, versions

Section = Mapping[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print every section; a missing part is shown with the command that installs it, and is not an error."""
    sections = {
        "machine": machine(),
        "versions": versions(),
        "runtimes": _runtimes(),
        "ros": _ros(),
        "models": _models(),
    }
    if args.json:
        print(json.dumps(sections, indent=2))
        return 0
    console = Console()
    for title, section in sections.items():
        console.print(_table(title, section))
    return 0


def _table(title: str, section: Section) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for key, value in section.items():
        table.add_row(escape(key), escape(value))
    return table


def _runtimes() -> dict[str, str]:
    """Each inference runtime with its devices, or the line that installs it."""
    return {
        "openvino": _openvino_devices(),
        "onnxruntime": _onnxruntime_providers(),
        "tensorrt": _importable("tensorrt", "pip install 'occbev[tensorrt]' on a machine with a GPU"),
        "torch": _importable("torch", "pip install ./training, for backend: torch"),
    }


def _openvino_devices() -> str:
    try:
        from occbev.inference.openvino_backend import shared_core
    except ImportError:
        return "absent: pip install openvino"
    return ", ".join(shared_core().available_devices)


def _onnxruntime_providers() -> str:
    try:
        from onnxruntime import get_available_providers
    except ImportError:
        return "absent: pip install onnxruntime"
    return ", ".join(get_available_providers())


def _importable(module: str, remedy: str) -> str:
    return "present" if find_spec(module) else f"absent: {remedy}"


def _ros() -> dict[str, str]:
    """Where ROS 2 comes from and which optional packages are there."""
    names = ("ROS_DISTRO", "ROS_DOMAIN_ID", "RMW_IMPLEMENTATION", "ROS_AUTOMATIC_DISCOVERY_RANGE")
    settings = {name: os.environ[name] for name in names if name in os.environ}
    return {**_capabilities(), **settings}


def _capabilities() -> dict[str, str]:
    from occbev.ros import compat

    return {c.name: "present" if c.present else f"absent: {c.remedy}" for c in compat.capabilities()}


def _models() -> dict[str, str]:
    """Model packages of the share folder."""
    folders = sorted(path.parent for path in share_path("config/models").glob("*/config.yaml"))
    return {folder.name: str(folder) for folder in folders} or {"none": "config/models holds no package"}
