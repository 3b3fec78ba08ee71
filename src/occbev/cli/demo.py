"""Simulate a drive, play it as a bag through the real node over real DDS, and score what the node published.

    occbev demo
    occbev demo --key-rate 3 --seconds 10        # fewer images, for a slower machine
    occbev demo --moving-picture demo.webp       # also an animation of some seconds

Writes OUT/report.html, OUT/summary.json and OUT/picture.jpg. The simulated drive stays for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from occbev.cli.progress import Progress
from occbev.geometry import invert_transform
from occbev.graph import LATENCY_STAGES, own_domain
from occbev.inference.model_package import ModelPackage, find_package
from occbev.reports.moments import Moment
from occbev.reports.rendering import write_moving_picture, write_picture
from occbev.reports.report import FrameLatency, Scene, write_report
from occbev.reports.rerun_log import REQUIREMENT
from occbev.reports.scenes import compose_scene, cover_picture, occupancy_of_truth
from occbev.share import pip_install, typed_here
from occbev.versions import machine, versions

if TYPE_CHECKING:
    from occbev_training.metrics.drive import KeyResult
    from occbev_training.simulator.drive import DriveConfig
    from occbev_training.simulator.drive_cache import KeptDrive
    from occbev_training.sources.truth import Truth

CONSOLE = Console(highlight=False)

SEED, WORLD = 20_054, "v1"
"""A drive by day past eight classes. It is of the simulator's test range: no model has seen it. Its world is the one
of most drives that `occbev-tiny` was trained on."""

MOVING_FRAMES, MOVING_WIDTH = 40, 720
"""Successive results of the animation, and its width in pixels."""

SCENES = 40
"""Most moments that the report shows."""

SCORED = (
    "detection.score_threshold:=0.05",
    "detection.marker_threshold:=0.05",
    "max_waiting_sets:=2",
)
"""Parameters of the scored run: weak boxes too, since a ranking is scored, and their velocities; one set more may
wait, so that a short stall of the machine costs latency and no frame."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
    parser.add_argument("--model", default="occbev-tiny", help="model package: a folder or a shipped name")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the drive, 20000 or above")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the drive")
    parser.add_argument("--key-rate", type=float, default=5.0, help="sets of images per second")
    parser.add_argument("--image", default="640x360", help="camera resolution, 800x450 or below")
    parser.add_argument("--workers", type=int, default=2, help="simulator processes")
    parser.add_argument(
        "--moving-picture", type=Path, metavar="FILE", help="also draw successive results as a .webp or .gif"
    )


def run(args: argparse.Namespace) -> int:
    """Run every step; 1 if the node published nothing or lost track of a frame."""
    clock = Clock()
    config = _drive_config(args)
    args.out.mkdir(parents=True, exist_ok=True)
    package = ModelPackage.load(find_package(args.model))
    CONSOLE.print(f"[bold]occbev demo[/]: {package.model.name}, trained on {package.trained_on}", soft_wrap=True)
    with clock("simulate"):
        drive = _simulate(args, config)
    with clock("replay"):
        played = _play(args.out / "run", drive, package)
    with clock("score"):
        results, scores = _score(played, drive, package)
    summary = _summary(args, package, played, scores)
    with clock("report"):
        scenes, cover = _scenes(results, drive)
        write_report(args.out / "report.html", _time(summary, clock), scenes, played.latencies)
        if cover is not None:
            write_picture(str(args.out / "picture.jpg"), cover)
        if args.moving_picture is not None:
            _write_moving(args.moving_picture, results, drive, args.key_rate)
    summary = _time(summary, clock)
    (args.out / "summary.json").write_text(json.dumps(_finite(summary), indent=2) + "\n")
    _print(summary, args.out)
    print_next(drive.bag, played.bag)
    return 0 if results and played.accounted else 1


class Clock:
    """Times the steps of a run and says how long each took."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time one step."""
        begin = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - begin, 1)
        CONSOLE.print(f"  {step}: {self.seconds[step]:.1f} s")


def _drive_config(args: argparse.Namespace) -> DriveConfig:
    """Read the options of the drive; raises ValueError for one that training may have seen."""
    from occbev_training.simulator.drive import DriveConfig, split_of

    if split_of(args.seed) != "test":
        raise ValueError(f"--seed {args.seed} is of the {split_of(args.seed)} drives; use 20000 or above")
    keys = round(args.seconds * args.key_rate)
    return DriveConfig(keys=keys, key_rate=args.key_rate, image=_size(args.image), world=WORLD)


def _simulate(args: argparse.Namespace, config: DriveConfig) -> KeptDrive:
    """Make the drive, or take the one that an earlier run kept."""
    from occbev_training.simulator.drive_cache import keep_drive

    with _bars() as report:
        drive = keep_drive(args.out, args.seed, config, args.workers, report)
    if not drive.made:
        CONSOLE.print(f"  the drive is kept in {drive.bag.parent}")
    return drive


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.split("x"))
    except ValueError as error:
        raise ValueError(f"--image {text!r}: want WIDTHxHEIGHT, such as 640x360") from error
    return width, height


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar for each step that reports."""
    columns = (
        TextColumn("  {task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=CONSOLE, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done)

        yield report


@dataclass(frozen=True)
class Played:
    """What a replay left behind: the recorded outputs, its summary, and the fate of every frame."""

    bag: Path
    summary: Mapping[str, Any]
    frames: Sequence[Mapping[str, Any]]

    @property
    def accounted(self) -> bool:
        """Whether every frame that was sent was processed or dropped with a reason."""
        fates = self.summary["frames_processed"] + sum(self.summary["drops"].values())
        return bool(self.summary["frames_in"] == fates)

    @property
    def latencies(self) -> list[FrameLatency]:
        """Time in the drive and total latency of every frame."""
        return [
            FrameLatency(
                (f["stamp_ns"] - self.frames[0]["stamp_ns"]) / 1e9,
                f.get("stages_ms", {}).get("total"),
            )
            for f in self.frames
        ]


def _play(folder: Path, drive: KeptDrive, package: ModelPackage) -> Played:
    """Start node and player, each a process of its own, and record what the node publishes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bag, account, log = folder / "published", folder / "replay.json", folder / "node.log"
    command = [sys.executable, "-m", "occbev", "replay", str(drive.bag), "--record", str(bag)]
    command += ["--wait", "300", "--model", str(package.folder), "--json", str(account), "--node-log", str(log)]
    command += [argument for value in SCORED for argument in ("--set", value)]
    done = subprocess.run(command, check=False, env={**os.environ, **own_domain()})
    if not account.is_file():
        raise OSError(f"the replay ended with status {done.returncode}; the node's messages are in {log}")
    record = json.loads(account.read_text())
    return Played(bag, record["summary"], record["frames"])


def _score(played: Played, drive: KeptDrive, package: ModelPackage) -> tuple[list[KeyResult], dict[str, Any]]:
    """Score what the node published, and the means of the training set beside it."""
    from occbev.reports.recorded_outputs import read_recorded
    from occbev_training.evaluation.frames import Priors
    from occbev_training.metrics.drive import results_at_keys, score_detection, score_occupancy
    from occbev_training.sources.truth import read_truth

    truth = read_truth(drive.truth)
    priors = Priors.load(package.path("priors.npz")) if package.has("priors.npz") else None
    published = read_recorded(played.bag, package.model.grid)
    results = results_at_keys(published.values(), truth)
    return results, {
        "frames_scored": len(results),
        "detection": score_detection(results, truth, priors.boxes(package.model.bev) if priors else None),
        "occupancy": score_occupancy(results, truth, priors.occupancy() if priors else None),
    }


def _summary(
    args: argparse.Namespace, package: ModelPackage, played: Played, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that summary.json holds but the times."""
    width, height = _size(args.image)
    latency = played.summary["latency_ms"]
    stages = sorted(latency, key=lambda name: (*LATENCY_STAGES, name).index(name))
    return {
        **played.summary,
        "latency_ms": {stage: latency[stage] for stage in stages},
        **scores,
        "drive": {
            "seed": args.seed,
            "world": WORLD,
            "seconds": args.seconds,
            "cameras": f"6 at {width}x{height}",
            "sets of images per second": args.key_rate,
        },
        "model": {"name": package.model.name, "hash": package.hash, "trained on": package.trained_on},
        "machine": machine(),
        "versions": versions(),
    }


def _time(summary: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
    return {**summary, "seconds": {**clock.seconds, "total": round(clock.total, 1)}}


def _finite(value: Any) -> Any:
    """Replace values that JSON cannot hold (NaN, infinity) by null."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _scenes(results: Sequence[KeyResult], drive: KeptDrive) -> tuple[list[Scene], NDArray[np.uint8] | None]:
    """Draw moments evenly spread over the drive, and a picture of the middle one; None without any."""
    from occbev_training.sources.bags import BagRecording
    from occbev_training.sources.truth import read_truth

    truth, recording = read_truth(drive.truth), BagRecording(drive.bag)
    chosen: list[int] = []
    if results:
        chosen = np.unique(np.linspace(0, len(results) - 1, SCENES).round().astype(int)).tolist()
    scenes, cover = [], None
    with _bars() as report:
        for done, index in enumerate(chosen, 1):
            moment = _moment(results[index], truth, recording)
            scenes.append(compose_scene(moment, (moment.stamp_ns - int(truth.key_stamp_ns[0])) / 1e9))
            if done == len(chosen) // 2 + 1:
                cover = cover_picture(moment)
            report("draw", done, len(chosen))
    recording.close()
    return scenes, cover


def _write_moving(path: Path, results: Sequence[KeyResult], drive: KeptDrive, rate: float) -> None:
    """Draw successive results of the middle of the drive as an animation."""
    from occbev_training.sources.bags import BagRecording
    from occbev_training.sources.truth import read_truth

    truth, recording = read_truth(drive.truth), BagRecording(drive.bag)
    first = max(0, (len(results) - MOVING_FRAMES) // 2)
    chosen, pictures = results[first : first + MOVING_FRAMES], []
    with _bars() as report:
        for done, result in enumerate(chosen, 1):
            pictures.append(cover_picture(_moment(result, truth, recording)))
            report("animate", done, len(chosen))
    recording.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_moving_picture(str(path), pictures, rate, MOVING_WIDTH)
    CONSOLE.print(f"  {path}: {len(pictures)} pictures, {path.stat().st_size / 1e6:.1f} MB")


def print_next(bag: Path, results: Path) -> None:
    """Print the commands that a newcomer wants next, as they can be typed here."""
    program = find_program()
    CONSOLE.print("\nNext:")
    viewer = "" if find_spec("rerun") else f" (first: {pip_install(REQUIREMENT)})"
    for text, words in {
        f"the drive and the results in 3D, over time{viewer}": f"view {bag} {results}",
        "the same pipeline without ROS": f"replay {bag} --offline --boxes out/boxes.jsonl",
        "your own bag: topics, rig, parameters": "rig YOUR_BAG --out vehicle",
    }.items():
        CONSOLE.print(f"  {program} {words}   # {text}", highlight=False, markup=False, soft_wrap=True)


def find_program() -> str:
    """Return how `occbev` is called here: by its name where it is on the path, else by the path of this environment."""
    beside = Path(sys.executable).parent / "occbev"
    if shutil.which("occbev") or not beside.is_file():
        return "occbev"
    return str(typed_here(beside))


def _moment(result: KeyResult, truth: Truth, recording: Any) -> Moment:
    """Join a result with its images and its truth, all in base_link at the key stamp."""
    from occbev_training.metrics.drive import occupancy_truth

    stamp = int(truth.key_stamp_ns[result.key])
    frames = recording.frame_set(int(np.argmin(np.abs(recording.key_stamp_ns - stamp)))).frames
    seen = {name: frame for name, frame in frames.items() if frame is not None}
    global2ego = invert_transform(truth.trajectory.at(stamp))
    motions = [global2ego @ truth.trajectory.at(frame.stamp_ns) for frame in seen.values()]
    annotations, labels = truth.annotations(result.key), occupancy_truth(truth, result.key)
    assert annotations is not None
    return Moment(
        stamp,
        images={name: frame.image for name, frame in seen.items()},
        rig=truth.rig.reorder(tuple(seen)).move_cameras(motions),
        boxes=result.boxes,
        true_boxes=annotations.boxes[annotations.lidar_points > 0],
        occupancy=result.occupancy,
        true_occupancy=occupancy_of_truth(labels.semantics, labels.mask_camera, labels.grid),
    )


def _print(summary: Mapping[str, Any], out: Path) -> None:
    """Print the headline numbers, each beside what it must beat."""
    total, occupancy = summary["latency_ms"].get("total", {}), summary["occupancy"]
    detection = summary["detection"]
    car, prior = (_cell(detection, key, "car", "2.0") for key in ("AP_30m", "AP_30m_prior"))
    found, absent = detection["truths"], detection["classes_without_truth"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary["drops"].items() if count)
    rows = {
        "frames processed": f"{summary['frames_processed']} of {summary['frames_in']}, dropped: {dropped or 'none'}",
        "rate": f"{summary['rate_hz']:.2f} Hz",
        "latency": f"{_cell(total, 'p50', digits=0)} ms median, {_cell(total, 'p95', digits=0)} ms p95",
        "car AP at 2 m": f"{car} within 30 m (mean of the training set {prior}); {_cell(detection, 'AP', 'car', '2.0')} within 50 m",
        "mAP": f"{_cell(detection, 'mAP_present')} over the {len(found) - len(absent)} classes of the drive",
        "occupancy IoU": f"{_cell(occupancy, 'iou')} (mean of the training set {_cell(occupancy, 'iou_mean_of_training_set')})",
        "report": str(out / "report.html"),
        "time": f"{summary['seconds']['total']:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    CONSOLE.print(table)
    if (said := too_fast(summary)) is not None:
        CONSOLE.print(f"  {said}", highlight=False)


def too_fast(summary: Mapping[str, Any]) -> str | None:
    """Return a hint if images came faster than this machine processes them, else None."""
    replaced = summary["drops"].get("replaced_by_newer", 0)
    if replaced <= 0.05 * summary["frames_in"] or not summary["frames_processed"]:
        return None
    rate = summary["drive"]["sets of images per second"]
    done = rate * summary["frames_processed"] / summary["frames_in"]
    return (
        f"Images came faster than this machine processes them: {rate:.1f} sets a second, of which it processed "
        f"{done:.1f}; {replaced} were replaced by newer ones. Try --key-rate {0.9 * done:.1f}"
    )


def _cell(values: Mapping[str, Any], *keys: str, digits: int = 3) -> str:
    """Format a nested number; a dash if it is absent."""
    value: Any = values
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "-" if value is None else f"{value:.{digits}f}"
