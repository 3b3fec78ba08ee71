"""What `occbev-train families` does; its arguments and its help are in arguments/families.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from occbev.cli.progress import status
from occbev.files import one_line
from occbev.share import share_path
from occbev_training.cli.convert import load_family
from occbev_training.export.package import ExportError
from occbev_training.export.zoo import HEADER, REFERENCE_NETWORKS, measure

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
"""Marks of the table in a page."""


class FamiliesError(ValueError):
    """A page without a table to replace."""


def run(args: argparse.Namespace) -> int:
    """Print one line per network; 1 if one of its keys has no place, or its graph does not do what it does."""
    console, complete = Console(stderr=True), True
    table = format_row(HEADER) + "|" + "---|" * len(HEADER) + "\n"
    if args.markdown is not None:
        replace_table(args.markdown, table, dry_run=True)
    if not args.json:
        print(table, end="")
    for name in args.names or known():
        try:
            with status(console, name):
                row = measure(name, load_family(name), args.golden, args.full_size, args.export)
        except ExportError as error:
            console.print(f"{name}: {error}", highlight=False)
            complete = False
            continue
        complete &= row.keys is None or row.keys[0] == row.keys[1]
        line = format_row(row.cells())
        table += line
        print(json.dumps(vars(row)) if args.json else line.rstrip(), flush=True)
    if args.markdown is not None:
        if not complete:
            console.print(f"{args.markdown}: left as it was, since not every network converts and exports")
            return 1
        replace_table(args.markdown, table)
    return 0 if complete else 1


def format_row(cells: Sequence[str]) -> str:
    """Return one line of a table in Markdown."""
    return "| " + " | ".join(cells) + " |\n"


def replace_table(page: Path, table: str, dry_run: bool = False) -> None:
    """Put the table in place of what stands between the page's marks; raises FamiliesError if it lacks them.

    dry_run: look for the marks alone.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise FamiliesError(f"{page}: {one_line(error)}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FamiliesError(f"{page}: no table to replace; it needs the lines {BEGIN} and {END}")
    if not dry_run:
        page.write_text(f"{before}{BEGIN}\n{table}{END}{after}")


def known() -> list[str]:
    """Return every configuration, in the order of `REFERENCE_NETWORKS`, then those that stand in no table."""
    names = {path.stem for path in share_path("config/models").glob("*.yaml")}
    return [n for n in REFERENCE_NETWORKS if n in names] + sorted(names - set(REFERENCE_NETWORKS))
