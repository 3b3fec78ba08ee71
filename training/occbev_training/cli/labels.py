"""What `occbev-train labels` does; its arguments and its help are in arguments/labels.py."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from occbev.classes import DETECTION_CLASSES
from occbev.cli.console import make_console
from occbev.files import file_name
from occbev.inference.pipeline import motion_to_key
from occbev.inference.preprocess import decode_image
from occbev.reports.rendering import (
    BoxStyle,
    Picture,
    beside,
    bev_picture,
    camera_mosaic,
    draw_boxes,
    stack_pictures,
    write_picture,
)
from occbev_training.cli.inputs import class_map, describe_problems, find_inputs
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.box_labels import BASE_FRAME, LabelFrame, read_labels, write_plain
from occbev_training.sources.box_topics import BOX_TYPES, BagFrames, box_topics, read_box_topic
from occbev_training.sources.categories import class_of, describe_classless
from occbev_training.sources.discovery import OpenBag, Opener
from occbev_training.sources.labelled import Frame2Base, LabelledRecording, bring_to_base
from occbev_training.sources.recording import Recording, RecordingError, leave_out


@dataclass
class LabelCounts:
    """What became of the boxes of one drive. left_out, frames_left_out: reason -> count."""

    source: str
    frames: int
    boxes: int
    key_frames: int = 0
    unlabelled: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    without_points: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    frames_left_out: Mapping[str, int] = field(default_factory=dict)
    classless: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The counts as lines of text."""
        classes = ", ".join(f"{name} {count}" for name, count in self.classes.most_common())
        keys = f"{self.key_frames} key frames get labels, {self.unlabelled} have none near enough and are left out"
        points = f"{self.without_points} of them without a LiDAR return, which training leaves out"
        text = [f"{self.boxes} boxes in {self.frames} frames of {self.source}; {keys}", f"boxes: {classes}; {points}"]
        text += [f"left out: {count} boxes {reason}" for reason, count in self.left_out.items()]
        text += [f"left out: {count} frames: {reason}" for reason, count in list(self.frames_left_out.items())[:3]]
        return [*text, f"left out: {describe_classless(self.classless)}"] if self.classless else text


def run(args: argparse.Namespace) -> int:
    """Write the labels of every drive; 1 if one has none."""
    console = make_console(stderr=args.json)
    found = find_inputs(args, args.inputs, args.out / "infos", args.key_interval)
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    for opener in found.openers:
        with leave_out(found.problems, opener.name):
            counts = _label(opener, args, len(found.openers) > 1)
            record[opener.name] = vars(counts)
            for line in counts.lines():
                console.print(f"{opener.name}: {line}", highlight=False, markup=False, soft_wrap=True)
    for line in describe_problems(found.problems):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if args.json:
        print(json.dumps({"drives": record, "problems": found.problems}))
    return 1 if found.problems or not record else 0


def _label(opener: Opener, args: argparse.Namespace, several: bool) -> LabelCounts:
    """Write the labels of one drive and a picture of them."""
    recording = opener()
    frames, counts = _read_frames(opener, args, several)
    frames, counts.frames_left_out = bring_to_base(frames, _finder(opener, recording, args.base_frame))
    if not frames:
        raise RecordingError(f"{counts.source}: no frame of boxes has a transform: {dict(counts.frames_left_out)}")
    frames = [_above_score(frame, args.min_score, counts) for frame in frames]
    labelled = LabelledRecording(recording, frames, class_map(args), args.max_gap)
    _write(labelled, args, counts)
    if not counts.classes:
        raise RecordingError(f"{counts.source}: no box is left: {'; '.join(counts.lines())}")
    picture = label_picture(labelled, int(np.argmax([len(labelled.boxes_at(k)) for k in range(counts.key_frames)])))
    write_picture(str(args.out / f"{file_name(opener.name, 'drive name')}.jpg"), picture)
    return counts


def _read_frames(opener: Opener, args: argparse.Namespace, several: bool) -> tuple[list[LabelFrame], LabelCounts]:
    if args.boxes is not None:
        own = args.boxes / f"{file_name(opener.name, 'drive name')}.json"
        if several and not own.is_file():
            raise RecordingError(f"{own}: no such file; of several drives each has its own in --boxes FOLDER")
        path = own if own.is_file() else args.boxes
        frames, left_out = read_labels(path, args.frame, args.times), dict[str, int]()
    elif isinstance(opener, OpenBag):
        topic = args.topic or _only_topic(opener.path)
        path = Path(topic)
        frames, left_out = read_box_topic(opener.path, topic)
    else:
        raise RecordingError(f"{opener.name}: is no bag with topics; give --boxes")
    return frames, LabelCounts(str(path), len(frames), sum(len(f.boxes) for f in frames), left_out=Counter(left_out))


def _only_topic(bag: Path) -> str:
    topics = box_topics(bag)
    if len(topics) != 1:
        raise RecordingError(
            f"{bag}: {'several topics hold' if topics else 'no topic holds'} boxes{f': {sorted(topics)}' if topics else ''};"
            f" give --topic of a type of {', '.join(BOX_TYPES)}, or --boxes FILE"
        )
    return next(iter(topics))


def _finder(opener: Opener, recording: Recording, base_frame: str) -> Frame2Base:
    """Return how frames are found: the vehicle, a camera, the LiDAR, or whatever the bag's transforms know."""
    fixed = {BASE_FRAME: np.eye(4), base_frame: np.eye(4)} | {c.name: c.cam2ego for c in recording.rig.cameras}
    bag: BagFrames | None = None

    def frame2base(frame: str, stamp_ns: int) -> Any:
        nonlocal bag
        if frame in fixed:
            return fixed[frame]
        if not isinstance(opener, OpenBag) or not isinstance(recording, BagRecording):
            raise RecordingError(f"{opener.name}: no frame {frame!r}; frames are {sorted(fixed)}")
        if bag is None:
            bag = BagFrames(opener.path, base_frame, recording.trajectory, recording.topics)
        return bag.frame2base(frame, stamp_ns)

    return frame2base


def _above_score(frame: LabelFrame, min_score: float, counts: LabelCounts) -> LabelFrame:
    boxes = tuple(box for box in frame.boxes if box.score >= min_score)
    if len(boxes) < len(frame.boxes):
        counts.left_out[f"below --min-score {min_score:g}"] += len(frame.boxes) - len(boxes)
    return replace(frame, boxes=boxes)


def _write(labelled: LabelledRecording, args: argparse.Namespace, counts: LabelCounts) -> None:
    """Write every key frame's boxes under the names of their classes, and count them."""
    own, made, points = class_map(args), [], {}
    for key, stamp in enumerate(labelled.key_stamp_ns):
        boxes = tuple(replace(b, category=str(class_of(b.category, own))) for b in labelled.boxes_at(key))
        returns = labelled.annotations(key).lidar_points
        counts.classes.update(box.category for box in boxes)
        counts.without_points += int(np.count_nonzero(returns == 0))
        made.append(LabelFrame(int(stamp), BASE_FRAME, boxes))
        points[int(stamp)] = returns.tolist()
    counts.key_frames, counts.unlabelled, counts.classless = len(made), labelled.unlabelled, labelled.classless
    write_plain(args.out / f"{file_name(labelled.name, 'drive name')}.json", made, points)


def label_picture(recording: LabelledRecording, key: int) -> Picture:
    """Draw the boxes of one key frame over its images, each at its own exposure, and from above."""
    frame_set, boxes = recording.frame_set(key), recording.annotations(key).boxes
    motion = motion_to_key(frame_set, recording.trajectory.at(int(recording.key_stamp_ns[key])))
    pictures = {}
    for name in frame_set.cameras:
        frame, camera = frame_set.frames[name], recording.rig[name]
        assert frame is not None
        image = frame.image if isinstance(frame.image, np.ndarray) else decode_image(frame.image, name)
        at_key = replace(camera, cam2ego=motion[name] @ camera.cam2ego)
        pictures[name] = draw_boxes(image, at_key, boxes, BoxStyle(thickness=max(1, image.shape[1] // 400)))
    classes = Counter(DETECTION_CLASSES[int(label)] for label in boxes.label)
    title = f"{recording.name}, key frame {key}: " + ", ".join(f"{n} {c}" for n, c in classes.most_common())
    above = beside({title: bev_picture(boxes)})
    return stack_pictures([camera_mosaic(pictures), above]) if pictures else above
