"""Draw one stored pair: images with returns, label from above and in slices, visibility, evidence.

occbev-train view SHARDS                      # list the keys
occbev-train view SHARDS KEY --out pair.png   # also writes pair.html, to be turned with the mouse
occbev-train view SHARDS KEY --serve          # in the viewer, as `occbev view SHARDS` shows all; --save writes a file
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.cli.viewer_arguments import add_viewer_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("shards", type=Path, help="folder of shards, or one of them")
    parser.add_argument("key", nargs="?", help="DRIVE/STAMP of a pair, or its number; none lists them")
    parser.add_argument("--out", type=Path, default=Path("pair.png"), help="picture to write")
    parser.add_argument("--width", type=int, default=1500, help="its width in pixels")
    add_viewer_arguments(parser)
