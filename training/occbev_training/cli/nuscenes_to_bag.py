"""Turn a nuScenes data root into ROS 2 bags, one per scene.

Every ego pose of the tables goes onto /odometry and /tf at its own stamp, so that the pose of each
camera's own exposure can be looked up. Images and sweeps whose files are not there are left out
and counted.

    occbev-train nuscenes-to-bag data/nuscenes --out out/bags --scene scene-0103
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from occbev.files import file_name
from occbev_training.cli.inputs import choose_output
from occbev_training.sources.bag_writer import BagSummary, write_bag
from occbev_training.sources.nuscenes import NuscenesRecording, open_nuscenes
from occbev_training.sources.recording import RecordingError
from occbev_training.sources.truth import write_truth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("root", type=Path, help="nuScenes data root (holds v1.0-*, samples, sweeps)")
    parser.add_argument("position", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder that gets one bag per scene, named after it")
    parser.add_argument("--scene", action="append", help="only this scene; may be given again")
    parser.add_argument("--version", help="folder of the tables, where the root holds several")
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap", help="bag storage")
    parser.add_argument("--truth", action="store_true", help="write boxes and labels to SCENE.truth too")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


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
