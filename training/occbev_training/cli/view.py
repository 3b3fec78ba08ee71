"""What `occbev-train view` does; its arguments and its help are in arguments/view.py."""

from __future__ import annotations

import argparse

from rich.console import Console

from occbev.reports.rendering import write_picture
from occbev_training.data.shards import ShardReader
from occbev_training.occupancy.pictures import interactive_page, pair_picture


def run(args: argparse.Namespace) -> int:
    """Write the picture and the page."""
    console = Console()
    one = args.shards.name if args.shards.is_file() else None
    reader = ShardReader(args.shards.parent if one else args.shards)
    if args.key is None:
        for number, row in enumerate(reader.rows):
            if one not in (None, row["shard"]):
                continue
            console.print(f"{number:5d}  {row['key']}  {row['split']}  {row['flags']}", highlight=False)
        return 0
    key = args.key
    if key.isdigit() and int(key) < len(reader):
        key = reader.rows[int(key)]["key"]
    sample = reader.sample(key)
    write_picture(str(args.out), pair_picture(sample, args.width))
    page = args.out.with_suffix(".html")
    page.write_text(interactive_page(sample))
    for name in (args.out, page):
        console.print(f"wrote {name}", highlight=False)
    return 0
