"""What `occbev-train nuscenes-to-bag` does; its arguments and its help are in arguments/nuscenes_to_bag.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from occbev.cli.progress import Progress
from occbev.files import file_name
from occbev_training.cli.inputs import choose_output
from occbev_training.sources.bag_writer import BagSummary, write_bag
from occbev_training.sources.nuscenes import NuscenesRecording, open_nuscenes
from occbev_training.sources.recording import RecordingError
from occbev_training.sources.truth import write_truth


def run(args: argparse.Namespace) -> int:
    """Write the bags; prints what each got and what was missing."""
    console = Console(stderr=args.json)
    args.out = choose_output(args.out, args.position, "the folder of bags")
    root = open_nuscenes(args.root, args.version)
    scenes = args.scene or list(root.scenes)
    unknown = sorted(set(scenes) - set(root.scenes))
    if unknown:
        raise RecordingError(f"{args.root}: no scene {unknown}; scenes are {list(root.scenes)}")
    report = {}
    for scene in scenes:
        recording = root.recording(scene)
        path = args.out / file_name(scene, f"{args.root}: scene name")
        summary = _write(recording, path, args.storage, console)
        if args.truth:
            write_truth(recording, args.out / f"{scene}.truth")
        report[scene] = _record(recording, path, summary)
        _print(console, report[scene])
    if args.json:
        print(json.dumps(report))
    return 0


def _write(recording: NuscenesRecording, path: Path, storage: str, console: Console) -> BagSummary:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(recording.name)
        return write_bag(
            recording, path, storage, lambda done, total: progress.update(task, completed=done, total=total)
        )


def _record(recording: NuscenesRecording, path: Path, summary: BagSummary) -> dict[str, Any]:
    with_images = sum(bool(recording.available(key)) for key in range(len(recording.key_stamp_ns)))
    return {
        "bag": str(path),
        "messages": dict(summary.messages),
        "key_frames": len(recording.key_stamp_ns),
        "key_frames_with_images": with_images,
        "missing_images": dict(summary.missing),
        "absent_files": dict(recording.absent),
    }


def _print(console: Console, record: dict[str, Any]) -> None:
    console.print(
        f"[bold]{record['bag']}[/]: {sum(record['messages'].values())} messages, "
        f"{record['key_frames_with_images']} of {record['key_frames']} key frames have images"
    )
    for topic, count in record["messages"].items():
        console.print(f"  {topic:<34} {count:>7}")
    for channel, count in record["absent_files"].items():
        console.print(f"  [yellow]{channel}: {count} files that the tables name are not there[/]")
