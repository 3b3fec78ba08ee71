"""The tables of docs/topics-and-parameters.md, made from the code, so that the page cannot differ from the node.

    python -m occbev.streams.reference docs/topics-and-parameters.md

replaces what stands between `<!-- NAME -->` and `<!-- end -->` for every table below.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from occbev import graph
from occbev.streams.parameters import CameraParameters, Leaf, PerceptionParameters, leaves

OUTPUTS = (*graph.OUTPUT_TOPICS.values(), *graph.OPTIONAL_OUTPUTS.values(), graph.DIAGNOSTICS)
INPUTS = (*graph.FRAME_INPUTS, graph.ODOMETRY)


def topics_table(topics: Iterable[graph.Topic]) -> str:
    """Return a Markdown table of topics with their types and quality of service."""
    rows = [
        (f"`{t.name}`", f"`{t.type.replace('/msg', '')}`", f"{t.quality.reliability}, {t.quality.durability}", t.text)
        for t in topics
    ]
    return markdown_table(("topic", "type", "quality of service", "content"), rows)


def parameters_table(parameters: Iterable[Leaf]) -> str:
    """Return a Markdown table of parameters; "live" marks those that may change while the node runs."""
    return markdown_table(("parameter", "default", "meaning", "range", "live"), map(_parameter_row, parameters))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _parameter_row(leaf: Leaf) -> tuple[str, ...]:
    default = str(leaf.default).lower() if isinstance(leaf.default, bool) else str(leaf.default)
    default = "" if leaf.default in ("", ()) else f"`{default}`"
    limits = "" if leaf.range is None else f"{leaf.range[0]:g} to {leaf.range[1]:g}"
    return (
        f"`{leaf.name}`",
        default,
        leaf.text,
        limits,
        "yes" if leaf.live else "while unconfigured" if leaf.unconfigured else "",
    )


def tables() -> dict[str, str]:
    """Return the name of each table in the page -> its Markdown."""
    return {
        "inputs": topics_table(INPUTS),
        "outputs": topics_table(OUTPUTS),
        "parameters": parameters_table(leaves(PerceptionParameters)),
        "camera parameters": parameters_table(leaves(CameraParameters, "cameras.<name>.")),
    }


def fill(page: str) -> str:
    """Return the page with every table replaced by its current form.

    Raises:
        ValueError: the page has no place for a table.
    """
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, found = re.subn(pattern, partial(_fill_place, table), page, flags=re.S)
        if not found:
            raise ValueError(f"the page has no place for the table {name!r}: want <!-- {name} --> and <!-- end -->")
    return page


def _fill_place(table: str, place: re.Match[str]) -> str:
    return f"{place[1]}{table}\n{place[2]}"


def main(arguments: Sequence[str]) -> None:
    """Rewrite the tables of one page."""
    path = Path(arguments[0])
    path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
