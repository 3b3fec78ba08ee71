"""Turn a published checkpoint into a model package; every weight is accounted for.

    occbev-train convert bevformer_tiny.pth --family bevformer_tiny --out out/bevformer_tiny

The family is a configuration in config/models. A checkpoint that does not fit completely is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", type=Path, help="published weights (.pth); no code in it is run")
    parser.add_argument("--family", required=True, help="name of a configuration in config/models")
    parser.add_argument("--out", type=Path, required=True, help="folder of the package, new or empty")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
