"""Options of every command that shows moments in the viewer."""

from __future__ import annotations

import argparse
from pathlib import Path

PORT = 9090


def add_viewer_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `occbev.cli.view.show` reads."""
    parser.add_argument("--save", type=Path, metavar="FILE.rrd", help="write a file, which `rerun FILE.rrd` opens")
    parser.add_argument("--serve", action="store_true", help="show it in a browser instead of the desktop viewer")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of --serve; the next one carries data ({PORT})")
    parser.add_argument("--frames", type=int, help="most key times that are shown")
