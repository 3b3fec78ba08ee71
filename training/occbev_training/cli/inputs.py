"""Inputs of the commands that read recordings, and where they write: one boundary around each input."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from occbev.files import file_hash
from occbev_training.cli.bag_arguments import bag_options
from occbev_training.sources.categories import ClassMap, read_class_map
from occbev_training.sources.deskew import EgoBox
from occbev_training.sources.discovery import (
    OpenBag,
    Opener,
    chosen_names,
    holds_recordings,
    read_names,
    search_recordings,
)
from occbev_training.sources.infos import convert_infos
from occbev_training.sources.lidar_files import COLUMNS
from occbev_training.sources.nuscenes import RootOptions
from occbev_training.sources.recording import RecordingError, leave_out


def class_map(args: argparse.Namespace) -> ClassMap:
    """Read the file of --classes."""
    return () if args.classes is None else read_class_map(args.classes)


def root_options(args: argparse.Namespace) -> RootOptions:
    """Turn the arguments of `add_root_arguments`, or of `add_version_arguments`, into options."""
    origin = getattr(args, "lidar_origin", None)
    columns = getattr(args, "lidar_columns", COLUMNS)
    return RootOptions(args.version, class_map(args), columns, None if origin is None else tuple(origin))


def ego_box(args: argparse.Namespace) -> EgoBox:
    """Turn `--ego-box` into a box."""
    return EgoBox() if args.ego_box is None else EgoBox(tuple(args.ego_box[:3]), tuple(args.ego_box[3:]))


def ego_masks(args: argparse.Namespace) -> str:
    """Return the folder of `--ego-masks`, "" without; raises ValueError where it holds no mask."""
    if args.ego_masks and not any(args.ego_masks.glob("*.png")):
        raise ValueError(f"--ego-masks {args.ego_masks}: no CAMERA.png in it")
    return str(args.ego_masks or "")


def split_output(paths: Sequence[Path], out: Path | None, what: str, alone: bool = False) -> tuple[list[Path], Path]:
    """Return inputs and output of `INPUT ... --out OUT`, or of the older `OUT INPUT ...` where that is unambiguous.

    what: name of the output in errors. alone: the first position may be the output without any input.

    Raises:
        ValueError: no output is named.
    """
    if out is not None:
        return list(paths), out
    if not paths or (len(paths) == 1 and not alone) or holds_recordings(paths[0]):
        first = f": {paths[0]} is an input" if paths and holds_recordings(paths[0]) else ""
        raise ValueError(f"name {what} with --out FOLDER{first}")
    return list(paths[1:]), paths[0]


def choose_output(out: Path | None, position: Path | None, what: str) -> Path:
    """Return the output of --out, or the older last position; raises ValueError where both or none are given."""
    if (out is None) == (position is None):
        raise ValueError(f"name {what} with --out FOLDER{'' if out is None else f', not with {position} as well'}")
    return Path(out or position or "")


@dataclass
class FoundInputs:
    """Recordings that can be opened, and inputs that cannot be used -> why."""

    openers: list[Opener] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def count_keys(found: FoundInputs) -> dict[str, int]:
    """Return drive -> number of key frames; a drive that cannot be opened is its line in `found.problems`."""
    keys: dict[str, int] = {}
    for opener in found.openers:
        with leave_out(found.problems, opener.name):
            keys[opener.name] = opener.keys()
    return keys


def describe_problems(problems: Mapping[str, str]) -> list[str]:
    """Return a line for each input that was left out."""
    return [
        f"left out: {reason}" if reason.startswith(name) else f"left out: {name}: {reason}"
        for name, reason in problems.items()
    ]


def find_inputs(
    args: argparse.Namespace,
    paths: Sequence[Path],
    converted: Path,
    key_interval: float,
    more: Sequence[Opener] = (),
    inspect: Callable[[Opener], None] = lambda opener: None,
) -> FoundInputs:
    """Find the recordings of all inputs; whatever one of them raises is its line in `problems`, no more.

    args: of `add_input_arguments`. converted: folder for info files as JSON. more: openers of other origin.
    inspect: called with each recording's opener; what it raises counts as a problem of that recording.

    Raises:
        RecordingError: --scenes names a drive that no input has.
        ValueError: there is no input at all.
    """
    found = FoundInputs()
    wholes = list(more)
    for path in paths:
        with leave_out(found.problems, str(path)):
            openers, unlisted = _search(path, args, converted, key_interval)
            wholes += openers
            found.problems |= unlisted
    if args.scenes:
        names = set(chosen_names([opener.name for opener in wholes], read_names(args.scenes), args.scenes))
        wholes = [opener for opener in wholes if opener.name in names]
    if not wholes and not found.problems:
        raise ValueError("no input: name bags or nuScenes roots, or give --simulate")
    for whole in wholes:
        with leave_out(found.problems, whole.name):
            for part in whole.parts() if isinstance(whole, OpenBag) else [whole]:
                _add(found, part, inspect)
    return found


def _add(found: FoundInputs, part: Opener, inspect: Callable[[Opener], None]) -> None:
    name = part.name
    if name in {opener.name for opener in found.openers}:
        found.problems[f"{name} (again)"] = (
            "an earlier input has this name, which is the key of its samples; rename one"
        )
        return
    with leave_out(found.problems, name):
        part = part.checked() if isinstance(part, OpenBag) else part
        inspect(part)
        found.openers.append(part)


def _search(
    path: Path, args: argparse.Namespace, converted: Path, key_interval: float
) -> tuple[list[Opener], dict[str, str]]:
    clocks = "fix" if args.clock_fix else "ignore" if args.ignore_clocks else "refuse"
    root = args.data_root
    if path.suffix == ".pkl":
        path, root = _convert(path, converted), root or path.parent
    return search_recordings(path, bag_options(args, key_interval), clocks, root, root_options(args))


def _convert(path: Path, folder: Path) -> Path:
    """Turn an info .pkl into JSON in `folder`, once for each content."""
    if not path.is_file():
        raise RecordingError(f"{path}: no such file")
    converted = folder / f"{path.stem}-{file_hash(path)[:12]}.json"
    if not converted.is_file():
        convert_infos(path, converted)
    return converted
