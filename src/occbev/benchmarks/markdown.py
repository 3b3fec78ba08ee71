"""Benchmark reports as sections of a Markdown file: each run replaces its own section and leaves the others."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from occbev.files import replace_file
from occbev.versions import versions


def write_section(
    path: Path, record: Mapping[str, Any], command: str, day: datetime.date | None = None, heading: str = ""
) -> None:
    """Write a report between its markers in a file; a file or section that is not there is made.

    record: `Report.as_record()`. command: the line that measures it again. day: today if None. heading: of the
    section, "" for the benchmark's name.
    """
    text, heading = path.read_text() if path.exists() else "", heading or record["bench"]
    section = _section(record, heading, command, day or datetime.date.today())
    old = re.compile(f"{re.escape(_begin(heading))}.*?{re.escape(_end(heading))}\n", re.S)
    text = old.sub(lambda _: section, text) if old.search(text) else f"{text.rstrip()}\n\n{section}".lstrip()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(text)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested keys as dotted ones, in order."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        rows += flatten(value, f"{dotted}.") if isinstance(value, Mapping) else [(dotted, value)]
    return rows


def _section(record: Mapping[str, Any], heading: str, command: str, day: datetime.date) -> str:
    machine = record["machine"]
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['memory']}, {machine['system'].split()[0]}"
    lines = [
        _begin(heading),
        f"## {heading}",
        "",
        f"`{command}`, {day.isoformat()}, occbev {versions(())['occbev']}. {hardware}.",
        "",
        *_table("measured", record["values"]),
        *_table("baseline over ours: above 1, ours is better", record["ratios"]),
        _end(heading),
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, values: Mapping[str, Any]) -> list[str]:
    if not values:
        return []
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in flatten(values)]
    return [f"| {title} | |", "|---|---|", *rows, ""]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _begin(bench: str) -> str:
    return f"<!-- occbev bench {bench}: begin -->"


def _end(bench: str) -> str:
    return f"<!-- occbev bench {bench}: end -->"
