"""Objects of test drives that one arm finds and another does not, and pictures of them: what a gain consists of.

Every network keeps as many boxes of a class as there are objects of it, its best-scored ones, so that no arm finds
more only because it predicts more. An object is found where such a box matches it within two metres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.geometry import box_corners
from occbev.reports.rendering import GROUND_TRUTH, BoxStyle, Picture, beside, draw_boxes, stack_pictures
from occbev.results import Boxes3D
from occbev.rig import Camera
from occbev_training.experiment.network import CLASSES, build_slim
from occbev_training.experiment.phases import match, predict_boxes
from occbev_training.experiment.pool import Pool
from occbev_training.experiment.runs import Row, Task, Workplace
from occbev_training.experiment.world import open_drive
from occbev_training.metrics.detection import CLASS_RANGE, THRESHOLDS, TP_THRESHOLD
from occbev_training.models.checkpoints import load_strictly, read_weights

ZOOM = 4
"""How much larger than the network's the pictures are drawn."""

OBJECT, OTHERS, BOX = BoxStyle((60, 235, 90)), GROUND_TRUTH, BoxStyle((255, 150, 0))
"""Styles of the object itself, of all other true boxes, and of predicted boxes."""


@dataclass(frozen=True)
class Targets:
    """The objects to find, sorted by class, then by sample. sample, label: (G,); box: (G, 9) in base_link."""

    sample: NDArray[np.int64]
    label: NDArray[np.int64]
    box: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.sample)


def targets_of(pool: Pool) -> Targets:
    """Return the scored objects: those with a LiDAR return and within the range of their class."""
    samples, labels, boxes = [], [], [np.zeros((0, 9), np.float32)]
    reach = np.array([CLASS_RANGE[name] for name in CLASSES])
    for label in range(len(CLASSES)):
        for index in range(len(pool)):
            sample = pool[index]
            near = np.hypot(*sample.boxes[:, :2].T) < reach[label]
            chosen = (sample.labels == label) & (sample.lidar_points >= 1) & near
            boxes.append(sample.boxes[chosen])
            samples += [index] * int(chosen.sum())
            labels += [label] * int(chosen.sum())
    return Targets(np.array(samples, np.int64), np.array(labels, np.int64), np.concatenate(boxes))


def keep_as_many(boxes: Sequence[Boxes3D], targets: Targets) -> list[Boxes3D]:
    """Keep the best boxes of each class over all samples, as many as there are objects of it."""
    label = np.concatenate([one.label for one in boxes])
    score = np.concatenate([one.score for one in boxes])
    kept = np.zeros(len(label), bool)
    for number in range(len(CLASSES)):
        mine = np.flatnonzero(label == number)
        kept[mine[np.argsort(-score[mine], kind="stable")][: np.count_nonzero(targets.label == number)]] = True
    ends = np.cumsum([len(one) for one in boxes])[:-1]
    return [one[part] for one, part in zip(boxes, np.split(kept, ends), strict=True)]


def found_among(boxes: Sequence[Boxes3D], pool: Pool, targets: Targets) -> NDArray[np.bool_]:
    """Return which objects (G,) are matched within `TP_THRESHOLD` by one of the boxes."""
    outcome = match(list(boxes), pool)
    at, found = THRESHOLDS.index(TP_THRESHOLD), []
    for number, name in enumerate(CLASSES):
        matched = outcome.classes[name].matches.truth[at]
        mine = np.zeros(np.count_nonzero(targets.label == number), bool)
        mine[matched[matched >= 0]] = True
        found.append(mine)
    return np.concatenate(found)


@dataclass(frozen=True)
class Findings:
    """What two arms find. boxes: arm -> seed -> boxes of every sample; found: arm -> (S, G), by seed and object."""

    targets: Targets
    seeds: tuple[int, ...]
    boxes: Mapping[str, Mapping[int, Sequence[Boxes3D]]]
    found: Mapping[str, NDArray[np.bool_]]

    def record(self, first: str, second: str) -> Row:
        """Count objects that both arms of a seed find, one alone and neither: class -> mean over the seeds."""
        a, b = self.found[first], self.found[second]
        counts = {"both": a & b, "first": a & ~b, "second": b & ~a, "neither": ~(a | b)}
        table: dict[str, Any] = {}
        for number, name in enumerate(CLASSES):
            mine = self.targets.label == number
            means = {what: float(flags[:, mine].sum(1).mean()) for what, flags in counts.items()}
            table[name] = {"objects": int(mine.sum()), **means}
        usually = [found.sum(0) > len(self.seeds) / 2 for found in (a, b)]
        return {
            "first": first,
            "second": second,
            "seeds": list(self.seeds),
            "classes": table,
            "usually_first_alone": int((usually[0] & ~usually[1]).sum()),
            "usually_second_alone": int((usually[1] & ~usually[0]).sum()),
        }

    def clearest(self, first: str, second: str, drives: Sequence[str], count: int) -> list[int]:
        """Return the numbers of objects that most networks of `first` and fewest of `second` find, at most one per drive.

        drives: drive of each sample. count: largest number of objects.
        """
        gain = self.found[first].sum(0) - self.found[second].sum(0)
        chosen: dict[str, int] = {}
        for number in np.argsort(-gain, kind="stable"):
            if gain[number] > 0:
                chosen.setdefault(drives[self.targets.sample[number]], int(number))
        return list(chosen.values())[:count]


def seeds_with_weights(place: Workplace, arms: Sequence[str], percent: float) -> list[int]:
    """Return the seeds for which the output folder has the weights of every arm; committed rows come without weights."""
    seeds = range(max(group.seeds for group in place.plan.runs))
    return [seed for seed in seeds if all(_weights(place, arm, percent, seed).exists() for arm in arms)]


def _weights(place: Workplace, arm: str, percent: float, seed: int) -> Path:
    return place.folder(Task("run", arm, percent, seed).key) / "weights.safetensors"


def look_for_objects(place: Workplace, arms: Sequence[str], percent: float, seeds: Sequence[int]) -> Findings:
    """Run the trained networks of some arms on the test drives again."""
    pool = place.scored("test")
    targets = targets_of(pool)
    boxes: dict[str, dict[int, Sequence[Boxes3D]]] = {arm: {} for arm in arms}
    found = {}
    for arm in arms:
        for seed in seeds:
            network = build_slim("finetune", seed)
            path = _weights(place, arm, percent, seed)
            load_strictly(network, read_weights(path)[0], str(path))
            boxes[arm][seed] = keep_as_many(predict_boxes(network.eval(), pool), targets)
        found[arm] = np.stack([found_among(boxes[arm][seed], pool, targets) for seed in seeds])
    return Findings(targets, tuple(seeds), boxes, found)


def draw_findings(place: Workplace, findings: Findings, first: str, second: str, count: int = 5) -> Picture:
    """Draw the clearest objects that `first` finds and `second` does not, each with the boxes of one seed of both."""
    pool = place.scored("test")
    drives = [pool.drive(index) for index in range(len(pool))]
    chosen = findings.clearest(first, second, drives, count)
    if not chosen:
        raise ValueError(f"{first} finds no object that {second} does not find as often: there is nothing to draw")
    return stack_pictures([_draw_object(findings, number, first, second, pool) for number in chosen])


def _draw_object(findings: Findings, number: int, first: str, second: str, pool: Pool) -> Picture:
    """Draw one object: what the network sees of it, then the boxes of both arms in a larger picture."""
    targets = findings.targets
    index, box = int(targets.sample[number]), targets.box[number]
    only = findings.found[first][:, number] & ~findings.found[second][:, number]
    seed = findings.seeds[int(only.argmax())]
    camera, large = _see_object(pool, index, box)
    small = pool[index].images[camera].repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
    view = _camera_of(pool, index, camera)
    truth = pool[index]
    rest = ~np.isclose(truth.boxes[:, :2], box[:2]).all(1)
    others = Boxes3D(truth.boxes[rest], truth.labels[rest], np.ones(int(rest.sum()), np.float32))
    mine = Boxes3D(box[None], targets.label[number : number + 1], np.ones(1, np.float32))
    name, away = CLASSES[int(targets.label[number])].replace("_", " "), float(np.hypot(*box[:2]))
    panels = {f"{name}, {away:.0f} m away, as the network sees it": draw_boxes(small, view, mine, OBJECT)}
    for arm in (second, first):
        picture = draw_boxes(draw_boxes(large, view, others, OTHERS), view, mine, OBJECT)
        times = f"{int(findings.found[arm][:, number].sum())} of {len(findings.seeds)} find it"
        panels[f"{arm}, seed {seed}; {times}"] = draw_boxes(picture, view, findings.boxes[arm][seed][index], BOX)
    return beside(panels)


def _see_object(pool: Pool, index: int, box: NDArray[np.float32]) -> tuple[int, Picture]:
    """Return the camera that sees most of an object, and its picture drawn anew at `ZOOM` times the size."""
    areas = [_area(_camera_of(pool, index, number), box) for number in range(len(pool[index].images))]
    number, key = int(np.argmax(areas)), index % pool.keys
    drive = open_drive(pool.split, pool.numbers[index // pool.keys], pool.world, zoom=ZOOM)
    frame = drive.frame_set(key).frames[drive.rig.names[number]]
    assert frame is not None, "the simulator loses no picture"
    coded = np.frombuffer(bytes(frame.image), np.uint8)
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    assert decoded is not None, "the simulator's pictures are JPEG"
    return number, np.asarray(decoded[..., ::-1], np.uint8)


def _camera_of(pool: Pool, index: int, number: int) -> Camera:
    """Return a camera at the size of the drawn picture, moved to the key time."""
    sample = pool[index]
    height, width = (ZOOM * side for side in sample.images.shape[1:3])
    intrinsic = np.diag([ZOOM, ZOOM, 1.0]) @ sample.intrinsic[number]
    return Camera(f"camera_{number}", width, height, intrinsic, sample.cam2ego[number])


def _area(camera: Camera, box: NDArray[np.float32]) -> float:
    """Return the pixels inside the image that the outline of a box covers; 0 where a corner is behind the camera."""
    pixel, depth, _ = camera.project(box_corners(box[None, :7])[0])
    if (depth < 0.5).any():
        return 0.0
    low, high = np.clip([pixel.min(0), pixel.max(0)], 0, (camera.width, camera.height))
    return float(np.prod(high - low))


def write_findings(path: Path, picture: Picture) -> None:
    """Write a picture as JPEG, small enough for a repository; raises OSError if it cannot."""
    if not cv2.imwrite(str(path), np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 75]):
        raise OSError(f"{path}: cannot write a {picture.shape} picture")
