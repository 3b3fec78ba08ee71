"""What `occbev-train view` does; its arguments and its help are in arguments/view.py."""

from __future__ import annotations

import argparse

from rich.console import Console

from occbev.cli.view import pair_moments, show
from occbev.reports.rendering import write_picture
from occbev_training.data.shards import ShardReader
from occbev_training.occupancy.pictures import interactive_page, pair_picture


def run(args: argparse.Namespace) -> int:
    """List the keys, write the picture and the page, or show pairs in the viewer."""
    console = Console()
    one = args.shards.name if args.shards.is_file() else None
    reader = ShardReader(args.shards.parent if one else args.shards)
    key = args.key
    if key is not None and key.isdigit() and int(key) < len(reader):
        key = reader.rows[int(key)]["key"]
    if args.save or args.serve:
        return show(pair_moments(args.shards, key), args.shards.name, args)
    if key is None:
        for number, row in enumerate(reader.rows):
            if one not in (None, row["shard"]):
                continue
            console.print(f"{number:5d}  {row['key']}  {row['split']}  {row['flags']}", highlight=False)
        return 0
    sample = reader.sample(key)
    write_picture(str(args.out), pair_picture(sample, args.width))
    page = args.out.with_suffix(".html")
    page.write_text(interactive_page(sample))
    for name in (args.out, page):
        console.print(f"wrote {name}", highlight=False)
    return 0
