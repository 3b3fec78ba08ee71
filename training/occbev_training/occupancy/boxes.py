"""The boxes variant of labels: what annotated boxes hold is carried with them to the key time.

It gives denser movers where annotations exist. Labels made with it are stored as another variant and
nothing that is learned from them may be called label-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import (
    make_transform,
    points_in_box,
    rotation_from_yaw,
    wrap_angle,
    yaw_from_rotation,
)
from occbev_training.sources.deskew import Rays
from occbev_training.sources.recording import Recording, RecordingError

MAX_GAP_NS = 1_500_000_000
"""Between two annotations farther apart than this a box's place is not known."""


@dataclass(frozen=True)
class Track:
    """One annotated object: stamp_ns (T,) increasing, place (T, 4) x, y, z, yaw in the global frame, size (3,)."""

    stamp_ns: NDArray[np.int64]
    place: NDArray[np.float64]
    size: NDArray[np.float64]

    def at(self, stamp_ns: int) -> NDArray[np.float64] | None:
        """Return box2global (4, 4) at a stamp, or None where it is not known."""
        after = int(np.searchsorted(self.stamp_ns, stamp_ns))
        if after < len(self.stamp_ns) and self.stamp_ns[after] == stamp_ns:
            return _matrix(self.place[after])
        if after in (0, len(self.stamp_ns)):
            return None
        gap = int(self.stamp_ns[after] - self.stamp_ns[after - 1])
        if gap > MAX_GAP_NS:
            return None
        share = (stamp_ns - int(self.stamp_ns[after - 1])) / gap
        start, step = self.place[after - 1], self.place[after] - self.place[after - 1]
        step[3] = wrap_angle(step[3])
        return _matrix(start + share * step)


@dataclass(frozen=True)
class BoxReturns:
    """The rays of one sweep (numbers of it) that end in the box of an instance, and box2global then."""

    instance: str
    rays: NDArray[np.int64]
    box2global: NDArray[np.float64]


def read_tracks(recording: Recording) -> dict[str, Track]:
    """Join a recording's boxes into tracks by instance; raises RecordingError where it has none."""
    rows: dict[str, list[tuple[int, NDArray[np.float64], NDArray[np.float64]]]] = {}
    for key, stamp in enumerate(recording.key_stamp_ns):
        annotations = recording.annotations(key)
        if annotations is None:
            continue
        ego2global = recording.trajectory.at(int(stamp))
        for instance, box in zip(annotations.instance, annotations.boxes.box, strict=True):
            at = ego2global @ _matrix(box[[0, 1, 2, 6]].astype(np.float64))
            place = np.array([*at[:3, 3], yaw_from_rotation(at[:3, :3])])
            rows.setdefault(instance, []).append((int(stamp), place, box[3:6].astype(np.float64)))
    if not rows:
        raise RecordingError(f"{recording.name}: no annotated boxes, which the boxes variant of labels needs")
    return {
        instance: Track(
            np.array([stamp for stamp, _, _ in found], np.int64),
            np.stack([place for _, place, _ in found]),
            np.max([size for _, _, size in found], axis=0),
        )
        for instance, found in rows.items()
    }


def returns_in_boxes(
    rays: Rays,
    stamp_ns: int,
    global2ego: NDArray[np.float64],
    tracks: Mapping[str, Track],
    growth: float,
) -> list[BoxReturns]:
    """Find which returns of a sweep, in ego at its stamp, lie in which boxes, grown by a factor."""
    found = []
    taken = ~rays.hit
    for instance, track in tracks.items():
        box2global = track.at(stamp_ns)
        if box2global is None:
            continue
        box2ego = global2ego @ box2global
        size = track.size * growth
        centre = box2ego[:3, 3]
        near = np.flatnonzero((np.abs(rays.end - centre).max(axis=1) < np.linalg.norm(size) / 2 + 0.1) & ~taken)
        box = np.array([*centre, *size, yaw_from_rotation(box2ego[:3, :3])])
        inside = near[points_in_box(rays.end[near], box)]
        inside = inside[rays.end[inside, 2] > centre[2] - track.size[2] / 2 + 0.1]  # not the road
        taken[inside] = True
        if len(inside):
            found.append(BoxReturns(instance, inside, box2global))
    return found


def _matrix(place: NDArray[np.float64]) -> NDArray[np.float64]:
    return make_transform(rotation_from_yaw(float(place[3])), place[:3])
