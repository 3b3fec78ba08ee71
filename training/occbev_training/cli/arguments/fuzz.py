"""Try thousands of damaged images, rigs, result files, packages and bags: each must be read, or refused in one line.

occbev-train fuzz                         # 10,000 images, rigs and results, 1,000 packages and bags: some minutes
occbev-train fuzz bags --count 200 --seed 3
"""

from __future__ import annotations

import argparse

from occbev_training.cli.arguments.shared import FUZZED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(FUZZED)} (default: all)")
    parser.add_argument("--count", type=int, help="inputs of each kind (default: 10,000, of packages and bags 1,000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other inputs (default: 0)")
