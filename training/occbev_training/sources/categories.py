"""Which of the ten detection classes a category of another taxonomy is; what has none is counted, never guessed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from occbev.classes import DETECTION_CLASSES
from occbev_training.sources.recording import RecordingError

CLASS_OF_CATEGORY: dict[str, str] = {
    "movable_object.barrier": "barrier",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}
"""Detection class of each raw nuScenes category that has one."""

_PEOPLE = dict.fromkeys(("adult", "child", "construction_worker", "police_officer"), "pedestrian")

ClassMap = tuple[tuple[str, str], ...]
"""The user's (category, class) pairs in the order of the file; class "" leaves a category out."""


def class_of(category: str, own: ClassMap = ()) -> str | None:
    """Return the detection class of a category, or None.

    own: what the user says of categories, which comes first. Then a category is looked up as nuScenes has it,
    then as the name of a class, alone or as the last part ("car", "Car", "vehicle.bus"), in any case, with
    spaces for underscores.
    """
    said = dict(own)
    if category in said:
        return said[category] or None
    name = re.sub(r"[\s-]+", "_", category.strip().lower())
    last = name.rpartition(".")[2]
    if name in CLASS_OF_CATEGORY:
        return CLASS_OF_CATEGORY[name]
    return last if last in DETECTION_CLASSES else _PEOPLE.get(last)


def read_class_map(path: Path) -> ClassMap:
    """Read `category: class` lines of a YAML file; class null leaves a category out without a word.

    Raises:
        RecordingError: naming the file and the entry that is no class.
    """
    try:
        record: Any = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecordingError(f"{path}: no readable YAML: {error}") from error
    if not isinstance(record, Mapping) or not record:
        raise RecordingError(f'{path}: want lines such as "forklift: construction_vehicle"')
    for category, name in record.items():
        if name is not None and name not in DETECTION_CLASSES:
            raise RecordingError(f"{path}: {category}: {name!r} is no class; classes are {list(DETECTION_CLASSES)}")
    return tuple((str(category), str(name or "")) for category, name in record.items())


def is_dropped_on_purpose(category: str, own: ClassMap) -> bool:
    """Whether the user's map leaves a category out."""
    return dict(own).get(category) == ""


def describe_classless(counts: Mapping[str, int]) -> str:
    """Return one line about boxes whose category has no class, "" where there are none."""
    if not counts:
        return ""
    listed = ", ".join(f"{name} {count}" for name, count in Counter(counts).most_common(12))
    more = f" and {len(counts) - 12} more" if len(counts) > 12 else ""
    first = next(iter(Counter(counts).most_common(1)))[0]
    return (
        f"{sum(counts.values())} boxes are of categories without a class: {listed}{more}; "
        f'--classes FILE.yaml with lines such as "{first}: car" gives them one'
    )
