"""List every network in config/models: parameters, converted keys, parity of its ONNX graph.

    occbev-train families --golden GOLDEN                 # the table of docs/model-zoo.md, at reduced sizes
    occbev-train families --golden GOLDEN --markdown docs/model-zoo.md    # writes the table into the page
    occbev-train families bevformer_tiny --full-size      # exports at the published size: minutes, and gigabytes

GOLDEN holds the key tables `<name>_state_dict.json`. Weights are random: this compares code, not scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("names", nargs="*", help="configurations in config/models; all by default")
    parser.add_argument("--golden", type=Path, help="folder of the published key tables")
    parser.add_argument("--full-size", action="store_true", help="export at the published size, not reduced")
    parser.add_argument(
        "--no-export", dest="export", action="store_false", help="count and convert weights, export nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per network")
    parser.add_argument(
        "--markdown", type=Path, metavar="PAGE", help="write the table into this page, between its marker lines"
    )
