"""Test whether occupancy pre-training pays, by a registered plan on simulated streets.

    occbev-train experiment config/experiment/mechanism.yaml --register
    occbev-train experiment config/experiment/mechanism.yaml --out out/mechanism --jobs 2
    occbev-train experiment config/experiment/mechanism.yaml --docs docs/results.md
    occbev-train experiment config/experiment/mechanism.yaml --out out/mechanism --found docs/results
    occbev-train experiment --smoke

Checks come first, then all arms seed by seed. Test drives are scored only for a plan whose registration is committed.
Give the command again to resume it. OUT/report.html is the page; the status is 1 while a run is missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.share import here_or_shipped

SMOKE = Path("config/experiment/smoke.yaml")
"""Plan of --smoke."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("plan", type=here_or_shipped, nargs="?", help="plan (YAML)")
    parser.add_argument(
        "--out", type=Path, help="folder for drives, runs, rows and the report; what is finished in it is not repeated"
    )
    parser.add_argument("--jobs", type=int, default=2, help="tasks at a time, of one thread each (default 2)")
    parser.add_argument("--smoke", action="store_true", help=f"the plan {SMOKE}: all of it, tiny, in a minute or two")
    parser.add_argument(
        "--register", action="store_true", help="write the plan's registration beside it, to be committed"
    )
    parser.add_argument(
        "--rows", type=Path, help="report on these rows instead of running; with --docs results/NAME.jsonl"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="PAGE",
        help="write this page of the documentation from the rows in PAGE/../results",
    )
    parser.add_argument(
        "--found",
        type=Path,
        metavar="FOLDER",
        help="after the runs: write which objects are found only with pre-training, and pictures of some, into this folder",
    )
    parser.add_argument(
        "--recording", type=Path, help="the real drive of a plan that has one: an MCAP bag with boxes.json beside it"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="ROWS", help="begin with the rows of this file, and copy all rows here at the end"
    )
