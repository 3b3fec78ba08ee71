"""Report every network in config/models: parameters, published keys that convert, parity of its ONNX graph.

    occbev-train families --golden GOLDEN                 # the README's table, at reduced sizes
    occbev-train families bevformer_tiny --full-size      # exported as published: minutes, and gigabytes

GOLDEN holds the key tables `<name>_state_dict.json`. Weights are random: this compares code, not scores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from occbev.share import share_path
from occbev_training.cli.convert import load_family
from occbev_training.export.package import ExportError
from occbev_training.export.zoo import HEADER, PUBLISHED, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("names", nargs="*", help="configurations in config/models; all by default")
    parser.add_argument("--golden", type=Path, help="folder of the published key tables")
    parser.add_argument("--full-size", action="store_true", help="export at the published size, not reduced")
    parser.add_argument("--no-export", dest="export", action="store_false", help="count and map weights alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object per network")


def run(args: argparse.Namespace) -> int:
    """Print one line per network; 1 if one of its keys has no place, or its graph does not do what it does."""
    console, complete = Console(stderr=True), True
    if not args.json:
        print("| " + " | ".join(HEADER) + " |")
        print("|" + "---|" * len(HEADER))
    for name in args.names or known():
        try:
            with console.status(name):
                row = measure(name, load_family(name), args.golden, args.full_size, args.export)
        except ExportError as error:
            console.print(f"{name}: {error}", highlight=False)
            complete = False
            continue
        complete &= row.keys is None or row.keys[0] == row.keys[1]
        if args.json:
            print(json.dumps(vars(row)), flush=True)
        else:
            print("| " + " | ".join(row.cells()) + " |", flush=True)
    return 0 if complete else 1


def known() -> list[str]:
    """Return every configuration, in the order of `PUBLISHED`, then those that stand in no table."""
    names = {path.stem for path in share_path("config/models").glob("*.yaml")}
    return [n for n in PUBLISHED if n in names] + sorted(names - set(PUBLISHED))
