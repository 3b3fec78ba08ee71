"""A recording with your own boxes: each is brought to base_link at the nearest key frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.files import file_hash
from occbev.geometry import Array, points_in_box
from occbev.messages.tf import TransformException
from occbev.results import Boxes3D, FrameSet, Sweep
from occbev.trajectory import PoseError
from occbev_training.sources.box_labels import BASE_FRAME, LabelBox, LabelFrame, read_labels
from occbev_training.sources.categories import ClassMap, class_of, describe_classless, is_dropped_on_purpose
from occbev_training.sources.deskew import RayLimits, deskew_rays
from occbev_training.sources.discovery import Opener
from occbev_training.sources.recording import Annotations, OccupancyTruth, Recording, RecordingError

MAX_GAP = 0.15
"""Largest time in seconds between a key frame and the labels that are moved to it."""

MAX_TRACK_GAP = 1.5
"""Largest time in seconds between two boxes of a track that give a velocity."""

MAX_SWEEP_GAP = 0.15
"""Largest time in seconds between a key frame and the sweep whose returns are counted in its boxes."""

FAR = RayLimits(max_range=300.0)
"""Returns up to 300 m are counted in boxes."""

Frame2Base = Callable[[str, int], Array]
"""(frame, stamp in ns) -> frame2base (4, 4); raises TransformException or PoseError."""


def bring_to_base(frames: Sequence[LabelFrame], frame2base: Frame2Base) -> tuple[list[LabelFrame], dict[str, int]]:
    """Move every frame of boxes to base_link at its own time.

    Returns: the moved frames, and reason -> number of frames that were left out.
    """
    brought, left_out = [], Counter[str]()
    for frame in frames:
        try:
            a2b = frame2base(frame.frame, frame.stamp_ns)
        except (TransformException, PoseError) as error:
            left_out[f"no transform from {frame.frame!r}: {error}"] += 1
            continue
        brought.append(LabelFrame(frame.stamp_ns, BASE_FRAME, tuple(box.move(a2b) for box in frame.boxes)))
    return brought, dict(left_out)


class LabelledRecording:
    """A `Recording` whose key frames are those with labels; the labels are its annotations.

    unlabelled: number of key frames without labels near them, which are left out. classless: category -> number of
    boxes without a class.
    """

    def __init__(
        self, recording: Recording, frames: Sequence[LabelFrame], classes: ClassMap = (), max_gap: float = MAX_GAP
    ) -> None:
        """frames: in base_link, each at its own time. Raises RecordingError where no key frame has labels."""
        self._recording, self._frames, self._classes = recording, list(frames), classes
        self.name, self.rig, self.lidar2ego = recording.name, recording.rig, recording.lidar2ego
        self.trajectory, self.sweep_stamp_ns = recording.trajectory, recording.sweep_stamp_ns
        self._keys = self._match(max_gap)
        self.unlabelled = len(recording.key_stamp_ns) - len(self._keys)
        if not self._keys:
            raise RecordingError(self._describe_no_match(max_gap))
        self.key_stamp_ns: NDArray[np.int64] = recording.key_stamp_ns[[key for key, _ in self._keys]]
        used = [box for _, number in self._keys for box in self._frames[number].boxes]
        without = [b.category for b in used if class_of(b.category, classes) is None]
        self.classless = Counter(name for name in without if not is_dropped_on_purpose(name, classes))
        if used and len(without) == len(used):
            raise RecordingError(f"{self.name}: {describe_classless(self.classless) or 'every box is left out'}")

    def sweep(self, index: int) -> Sweep:
        """Read one LiDAR rotation."""
        return self._recording.sweep(index)

    def frame_set(self, key: int) -> FrameSet:
        """Read the encoded images of one key frame."""
        return self._recording.frame_set(self._keys[key][0])

    def occupancy_truth(self, key: int) -> OccupancyTruth | None:
        """Return the dense labels of one key frame, or None where the recording has none."""
        return self._recording.occupancy_truth(self._keys[key][0])

    def annotations(self, key: int) -> Annotations:
        """Return the boxes of one key frame, with the LiDAR returns of its sweep in each."""
        boxes = self.boxes_at(key)
        rows = [box.as_row() for box in boxes]
        box = np.array(rows, np.float32).reshape(-1, 9)
        label = np.array([DETECTION_CLASSES.index(str(class_of(b.category, self._classes))) for b in boxes], np.int64)
        score = np.array([b.score for b in boxes], np.float32)
        return Annotations(Boxes3D(box, label, score), tuple(b.track for b in boxes), self._count_returns(key, box))

    def boxes_at(self, key: int) -> tuple[LabelBox, ...]:
        """Return the boxes of one key frame that have a class, in base_link at its time."""
        key_ns, number = int(self.key_stamp_ns[key]), self._keys[key][1]
        frame = self._frames[number]
        base2key = self.trajectory.relative(frame.stamp_ns, key_ns)
        seconds = (key_ns - frame.stamp_ns) / 1e9
        known = [box for box in frame.boxes if class_of(box.category, self._classes) is not None]
        return tuple(self._with_velocity(box, number).carried(seconds).move(base2key) for box in known)

    def _with_velocity(self, box: LabelBox, number: int) -> LabelBox:
        """Fill in a velocity from the neighbours of a box on its track."""
        if box.velocity is not None or not box.track:
            return box
        here = self._frames[number].stamp_ns
        near = [self._place(box.track, n) for n in (number - 1, number, number + 1)]
        found = [place for place in near if place is not None]
        (first_ns, first), (last_ns, last) = found[0], found[-1]
        seconds = (last_ns - first_ns) / 1e9
        if not 0 < seconds <= (len(found) - 1) * MAX_TRACK_GAP:
            return box
        moved = (last - first) / seconds  # in the frame of the poses
        return replace(box, velocity=self.trajectory.at(here)[:3, :3].T @ moved)

    def _place(self, track: str, number: int) -> tuple[int, Array] | None:
        """Return stamp and place of a track in one frame, in the frame of the poses."""
        place = self._tracks[number].get(track) if 0 <= number < len(self._frames) else None
        if place is None:
            return None
        stamp_ns = self._frames[number].stamp_ns
        try:
            ego2global = self.trajectory.at(stamp_ns)
        except PoseError:
            return None
        return stamp_ns, ego2global[:3, :3] @ place + ego2global[:3, 3]

    @cached_property
    def _tracks(self) -> list[dict[str, Array]]:
        return [{box.track: box.box2frame[:3, 3] for box in frame.boxes if box.track} for frame in self._frames]

    def _match(self, max_gap: float) -> list[tuple[int, int]]:
        """Return (key frame, nearest frame of labels) where both have poses and are near enough."""
        if not self._frames:
            return []
        stamps = np.array([frame.stamp_ns for frame in self._frames], np.int64)
        matched = []
        for key, key_ns in enumerate(self._recording.key_stamp_ns):
            number = int(np.argmin(np.abs(stamps - key_ns)))
            if abs(int(stamps[number] - key_ns)) <= max_gap * 1e9 and self._has_poses(int(stamps[number]), int(key_ns)):
                matched.append((key, number))
        return matched

    def _has_poses(self, *stamps: int) -> bool:
        try:
            self.trajectory.at_many(np.array(stamps, np.int64))
        except PoseError:
            return False
        return True

    def _describe_no_match(self, max_gap: float) -> str:
        keys = self._recording.key_stamp_ns
        span = f"{self._frames[0].stamp_ns} to {self._frames[-1].stamp_ns} ns" if self._frames else "no time at all"
        return (
            f"{self.name}: none of its {len(keys)} key frames has labels within {max_gap} s: labels cover {span}, "
            f"key frames {keys[0]} to {keys[-1]} ns; --max-gap allows more"
        )

    def _count_returns(self, key: int, boxes: NDArray[np.float32]) -> NDArray[np.int64]:
        """Count the returns of the nearest sweep in each box (M,), brought to the key time."""
        key_ns = int(self.key_stamp_ns[key])
        if not len(self.sweep_stamp_ns):
            return np.zeros(len(boxes), np.int64)
        nearest = int(np.argmin(np.abs(self.sweep_stamp_ns - key_ns)))
        if abs(int(self.sweep_stamp_ns[nearest]) - key_ns) > MAX_SWEEP_GAP * 1e9:
            return np.zeros(len(boxes), np.int64)
        rays = deskew_rays(self.sweep(nearest), self.trajectory, key_ns, limits=FAR)
        points = rays.end[rays.hit]
        return np.array([np.count_nonzero(points_in_box(points, box)) for box in boxes], np.int64)


@dataclass(frozen=True)
class OpenLabelled:
    """Opens a recording together with plain labels in base_link."""

    opener: Opener
    labels: Path
    classes: ClassMap = ()
    max_gap: float = MAX_GAP

    @property
    def name(self) -> str:
        """The recording's name."""
        return self.opener.name

    @property
    def fingerprint(self) -> str:
        """That of the recording, and of the labels."""
        return f"{self.opener.fingerprint}-{file_hash(self.labels)[:12]}"

    def keys(self) -> int:
        """Number of key frames that have labels."""
        return len(self().key_stamp_ns)

    def __call__(self) -> Recording:
        """Open the recording and its labels."""
        frames = read_labels(self.labels)
        other = next((frame.frame for frame in frames if frame.frame != BASE_FRAME), None)
        if other is not None:
            raise RecordingError(
                f"{self.labels}: boxes in {other!r}; 'occbev-train labels' brings them to {BASE_FRAME!r}"
            )
        return LabelledRecording(self.opener(), frames, self.classes, self.max_gap)
