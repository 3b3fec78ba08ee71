"""The console of commands that print tables and sentences."""

from __future__ import annotations

import os

from rich.console import Console

LOG_WIDTH = 140
"""Columns in a file or pipe, where there is no terminal to ask."""


def make_console(stderr: bool = False) -> Console:
    """Return a console that is wide enough for tables in files and pipes, too; COLUMNS sets another width."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LOG_WIDTH
    return console
