"""Your own boxes: frames of labelled boxes in any frame of the vehicle, read from plain JSON or KITTI files.

The plain JSON is what `occbev-train labels` writes, too; docs/prepare-dataset.md has its schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.files import replace_file
from occbev.geometry import Array, make_transform, rotation_from_yaw, yaw_from_rotation
from occbev.results import Boxes3D
from occbev_training.sources.categories import class_of
from occbev_training.sources.recording import Annotations, RecordingError

BASE_FRAME = "base_link"

MANY_POINTS = 1000
"""LiDAR returns that a box counts as having where its file does not say how many."""


@dataclass(frozen=True)
class LabelBox:
    """One labelled box. box2frame: (4, 4), from its own axes (x ahead, z up, origin in its middle) to the frame's.

    lwh: metres along its own x, y, z. velocity: (3,) over ground in the frame's axes, None where it is not known.
    track: name that it has in other frames, too; "" without. points: LiDAR returns in it, None where not counted.
    """

    category: str
    box2frame: Array
    lwh: tuple[float, float, float]
    velocity: Array | None = None
    track: str = ""
    score: float = 1.0
    points: int | None = None

    def carried(self, seconds: float) -> LabelBox:
        """Return the box some time later; one whose velocity is not known stands."""
        if self.velocity is None:
            return self
        pose = self.box2frame.copy()
        pose[:3, 3] += self.velocity * seconds
        return replace(self, box2frame=pose)

    def move(self, a2b: Array) -> LabelBox:
        """Return the box in another frame; a2b: (4, 4)."""
        velocity = None if self.velocity is None else a2b[:3, :3] @ self.velocity
        return replace(self, box2frame=a2b @ self.box2frame, velocity=velocity)

    def as_row(self) -> list[float]:
        """Return x, y, z, l, w, h, yaw, vx, vy, as `Boxes3D` wants them."""
        vx, vy = (np.nan, np.nan) if self.velocity is None else self.velocity[:2]
        return [*self.box2frame[:3, 3], *self.lwh, yaw_from_rotation(self.box2frame[:3, :3]), vx, vy]


@dataclass(frozen=True)
class LabelFrame:
    """The boxes of one time; a frame without boxes says that nothing is there."""

    stamp_ns: int
    frame: str
    boxes: tuple[LabelBox, ...] = field(default_factory=tuple)


def read_labels(path: Path, frame: str | None = None, times: Path | None = None) -> list[LabelFrame]:
    """Read a plain JSON file, or a KITTI file or folder of files, in time order.

    frame: of the boxes, where the file does not say it. times: stamps of KITTI frames by their number.

    Raises:
        RecordingError: naming file, frame and box of what is missing or of the wrong kind.
    """
    if path.suffix == ".json":
        frames = _read_plain(path, frame)
    elif path.suffix == ".txt" or (path.is_dir() and any(path.glob("*.txt"))):
        frames = _read_kitti(path, frame, times)
    else:
        raise RecordingError(f"{path}: no label file: want .json, a KITTI .txt, or a folder of KITTI .txt files")
    frames.sort(key=lambda one: one.stamp_ns)
    twice = next((a for a, b in zip(frames, frames[1:], strict=False) if a.stamp_ns == b.stamp_ns), None)
    if twice is not None:
        raise RecordingError(f"{path}: two frames have the stamp {twice.stamp_ns}")
    if not any(one.boxes for one in frames):
        raise RecordingError(f"{path}: {len(frames)} frames and no box in them")
    return frames


@dataclass(frozen=True)
class TimedBoxes:
    """Labelled boxes in base_link by stamp, in time order; only scores use them."""

    stamp_ns: NDArray[np.int64]
    frames: tuple[Annotations, ...]

    def at(self, stamp_ns: int, tolerance: float = 0.06) -> Annotations | None:
        """Return the boxes nearest to a stamp, None where none lie within `tolerance` seconds."""
        away = np.abs(self.stamp_ns - stamp_ns)
        nearest = int(away.argmin())
        return self.frames[nearest] if away[nearest] <= tolerance * 1e9 else None


def read_timed_boxes(path: Path) -> TimedBoxes:
    """Read a plain JSON file of boxes in base_link; boxes of categories that are not detected are left out.

    Raises:
        RecordingError: the file is no such file, or its boxes are in another frame.
    """
    frames = read_labels(path, BASE_FRAME)
    strange = next((one.frame for one in frames if one.frame != BASE_FRAME), None)
    if strange is not None:
        raise RecordingError(f"{path}: its boxes are in {strange!r}; want {BASE_FRAME!r}")
    stamps = np.array([one.stamp_ns for one in frames], np.int64)
    return TimedBoxes(stamps, tuple(_annotations(one.boxes) for one in frames))


def _annotations(boxes: Sequence[LabelBox]) -> Annotations:
    classes = [class_of(box.category) for box in boxes]
    known = [(box, name) for box, name in zip(boxes, classes, strict=True) if name is not None]
    rows = np.array([box.as_row() for box, _ in known], np.float32).reshape(-1, 9)
    label = np.array([DETECTION_CLASSES.index(name) for _, name in known], np.int64)
    points = np.array([MANY_POINTS if box.points is None else box.points for box, _ in known], np.int64)
    scores = np.array([box.score for box, _ in known], np.float32)
    return Annotations(Boxes3D(rows, label, scores), tuple(box.track for box, _ in known), points)


def write_plain(path: Path, frames: Sequence[LabelFrame], points: Mapping[int, Sequence[int]]) -> None:
    """Write frames of one frame id as plain JSON. points: stamp -> LiDAR returns in each box."""
    record = {
        "frame": frames[0].frame if frames else BASE_FRAME,
        "frames": [
            {
                "stamp_ns": one.stamp_ns,
                "boxes": [_plain_box(*pair) for pair in zip(one.boxes, points[one.stamp_ns], strict=True)],
            }
            for one in frames
        ],
    }
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(record))


def _plain_box(box: LabelBox, points: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "class": box.category,
        "track": box.track,
        "xyz": [round(float(v), 4) for v in box.box2frame[:3, 3]],
        "lwh": [round(float(v), 4) for v in box.lwh],
        "yaw": round(yaw_from_rotation(box.box2frame[:3, :3]), 5),
        "lidar_points": int(points),
    }
    if box.velocity is not None:
        record["velocity"] = [round(float(v), 3) for v in box.velocity[:2]]
    return record


def _read_plain(path: Path, frame: str | None) -> list[LabelFrame]:
    try:
        record = json.loads(path.read_bytes())
        frames, frame = record["frames"], str(record.get("frame") or frame or "")
        if not frame:
            raise RecordingError(f'{path}: names no frame of its boxes; want "frame": "base_link", or give --frame')
        return [_plain_frame(one, frame) for one in frames]
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(
            f'{path}: no plain labels: {type(error).__name__}: {error}; want {{"frame": "base_link", "frames": '
            '[{"stamp_ns": 0, "boxes": [{"class": "car", "xyz": [], "lwh": [], "yaw": 0}]}]}'
        ) from error


def _plain_frame(record: Mapping[str, Any], frame: str) -> LabelFrame:
    stamp_ns = record["stamp_ns"]
    if not isinstance(stamp_ns, int) or isinstance(stamp_ns, bool):
        raise RecordingError(f"stamp_ns is {stamp_ns!r:.40}; want whole nanoseconds")
    boxes = []
    for number, box in enumerate(record["boxes"]):
        try:
            boxes.append(_box_of_plain(box))
        except (KeyError, ValueError, TypeError) as error:
            raise RecordingError(f"frame {stamp_ns}, box {number}: {type(error).__name__}: {error}") from error
    return LabelFrame(stamp_ns, frame, tuple(boxes))


def _box_of_plain(box: Mapping[str, Any]) -> LabelBox:
    velocity = box.get("velocity")
    planar = None if velocity is None else np.array([*_numbers(velocity, "velocity", 2), 0.0])
    (yaw,) = _numbers([box["yaw"]], "yaw", 1)
    rotation = rotation_from_yaw(yaw)
    lwh = _sizes(box["lwh"])
    (score,) = _numbers([box.get("score", 1.0)], "score", 1)
    pose = make_transform(rotation, _numbers(box["xyz"], "xyz", 3))
    points = None if box.get("lidar_points") is None else int(_numbers([box["lidar_points"]], "lidar_points", 1)[0])
    return LabelBox(str(box["class"]), pose, lwh, planar, str(box.get("track") or ""), score, points)


def _numbers(values: Any, name: str, count: int) -> list[float]:
    whole = isinstance(values, (list, tuple)) and len(values) == count
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)] if whole else []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} is {values!r:.60}, want {count} finite numbers")
    return [float(v) for v in numbers]


def _sizes(values: Any) -> tuple[float, float, float]:
    length, width, height = _numbers(values, "lwh", 3)
    if min(length, width, height) <= 0:
        raise ValueError(f"lwh is {values!r:.60}, want three numbers above 0")
    return length, width, height


def _read_kitti(path: Path, frame: str | None, times: Path | None) -> list[LabelFrame]:
    """Read one file for each frame (object labels), or one file for all (tracking labels)."""
    if frame is None:
        raise RecordingError(f"{path}: KITTI boxes are in the frame of a camera; name it, such as --frame CAM_FRONT")
    beside = (path if path.is_dir() else path.parent) / "timestamps.txt"
    times = times or (beside if beside.is_file() else None)
    stamps = None if times is None else read_stamps(times)
    files = [path] if path.is_file() else sorted(file for file in path.glob("*.txt") if file.name != "timestamps.txt")
    found: dict[int, list[LabelBox]] = {}
    for file in files:
        digits = re.search(r"\d+$", file.stem)
        own = None if digits is None or _tracks(file) else int(digits[0])
        if own is not None:
            found.setdefault(_stamp_of(own, stamps, file), [])
        for number, line in _lines(file):
            words = line.split()
            try:
                at = int(words[0]) if own is None else own
                box = _box_of_kitti(*((words[2:], words[1]) if own is None else (words, "")))
            except (ValueError, IndexError) as error:
                raise RecordingError(f"{file}: line {number}: {error}; want KITTI's 15 or 16 columns") from error
            if box is not None:
                found.setdefault(_stamp_of(at, stamps, file), []).append(box)
    return [LabelFrame(stamp, frame, tuple(boxes)) for stamp, boxes in found.items()]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    text = file.read_text(encoding="utf-8-sig")
    return ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _tracks(file: Path) -> bool:
    """Whether a file is of KITTI's tracking labels, whose lines begin with the frame and the track."""
    first = next(_lines(file), (0, ""))[1].split()
    return len(first) >= 17 and first[0].isdecimal()


def _stamp_of(number: int, stamps: Sequence[int] | None, file: Path) -> int:
    """Return the stamp of a frame: by its number in the times, or the number itself where it is nanoseconds."""
    if stamps is None:
        if number < 10**15:
            raise RecordingError(f"{file}: frame {number} has no time; name files by stamp in ns, or give --times FILE")
        return number
    if number >= len(stamps):
        raise RecordingError(f"{file}: frame {number}, but there are {len(stamps)} times")
    return stamps[number]


def read_stamps(path: Path) -> list[int]:
    """Read one stamp a line: nanoseconds, or seconds where there is a point; raises RecordingError."""
    try:
        lines = [line.strip() for _, line in _lines(path)]
        return [_read_seconds(line) if "." in line else int(line) for line in lines]
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path}: want one stamp a line, in ns or as seconds with a point: {error}") from error


def _read_seconds(text: str) -> int:
    """Read decimal seconds without the loss of a float: 19 digits matter."""
    whole, _, part = text.partition(".")
    return int(whole) * 1_000_000_000 + int(part[:9].ljust(9, "0"))


def _box_of_kitti(words: Sequence[str], track: str) -> LabelBox | None:
    """Read a line: class, truncation, occlusion, alpha, image box, h w l, bottom centre x y z, rotation, score."""
    if words[0] == "DontCare":
        return None
    if len(words) not in (15, 16):
        raise ValueError(f"{len(words)} columns")
    height, width, length, x, y, z, turn = map(float, words[8:15])
    lwh = _sizes([length, width, height])
    # The camera's axes are x right, y down, z ahead; at rotation 0 a box looks along x.
    ahead, up = np.array([math.cos(turn), 0.0, -math.sin(turn)]), np.array([0.0, -1.0, 0.0])
    rotation = np.stack([ahead, np.cross(up, ahead), up], 1)
    (*centre, score) = _numbers([x, y - height / 2, z, float(words[15]) if len(words) == 16 else 1.0], "place", 4)
    return LabelBox(words[0], make_transform(rotation, centre), lwh, None, track, score)
