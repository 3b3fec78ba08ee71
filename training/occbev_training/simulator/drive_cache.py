"""A simulated drive on disk, as a bag with its truth beside it, made once for each content."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import occbev
from occbev_training.simulator.drive import DriveConfig
from occbev_training.simulator.rendered import PicturedDrive, RenderedDrive
from occbev_training.sources.bag_writer import write_bag
from occbev_training.sources.truth import write_truth

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, its parts that are done and its parts in all."""

ROOTS = {"occbev": Path(occbev.__file__).parent, "training": Path(__file__).parents[1]}
MAKERS = (
    ("training", "simulator"),
    ("training", "sources/bag_writer.py"),
    ("training", "sources/truth.py"),
    ("occbev", "geometry.py"),
    ("occbev", "grid.py"),
    ("occbev", "rig.py"),
    ("occbev", "trajectory.py"),
)
"""Sources that decide what a drive looks like on disk."""


@dataclass(frozen=True)
class KeptDrive:
    """Where a drive is. made: whether it was made just now."""

    bag: Path
    truth: Path
    made: bool


def keep_drive(
    folder: Path, seed: int, config: DriveConfig, workers: int = 2, progress: Progress | None = None
) -> KeptDrive:
    """Return the drive of a seed below `folder`, simulating it if this content is not there yet.

    Drives of other contents in `folder` are removed: the simulator has changed or was asked for something else.
    """
    place = folder / f"drive-{content_hash(seed, config)}"
    kept = KeptDrive(place / "bag", place / "truth", made=False)
    if kept.bag.is_dir() and kept.truth.is_dir():
        return kept
    for other in folder.glob("drive-*"):
        shutil.rmtree(other)

    def report(step: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(step, done, total) if progress else None

    drive = RenderedDrive(seed, config, workers, report("simulate"))
    write_bag(drive, kept.bag, progress=report("write the bag"))
    write_truth(drive, kept.truth)  # last: a drive without its truth is not there
    return KeptDrive(kept.bag, kept.truth, made=True)


def keep_pictures(
    folder: Path, seed: int, config: DriveConfig, workers: int = 2, progress: Progress | None = None
) -> Path:
    """Return a bag below `folder` with the cameras and the odometry of a drive, made if this content is not there yet."""
    bag = folder / f"pictures-{content_hash(seed, config)}"
    if not bag.is_dir():

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress("simulate", done, total)

        write_bag(PicturedDrive(seed, config, workers, report), bag)
    return bag


def content_hash(seed: int, config: DriveConfig) -> str:
    """Return twelve hex digits over the seed, the configuration and the sources that make a drive."""
    asked = json.dumps([seed, config.as_record()], sort_keys=True)
    digest = hashlib.sha256(asked.encode())
    for root, name in MAKERS:
        path = ROOTS[root] / name
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:12]
