"""Identities for boxes from set to set: nearest neighbours of constant-velocity Kalman filters in the fixed frame.

The boxes themselves stay as the network gave them. State and noise follow the usual model of white acceleration
(Bar-Shalom, Li, Kirubarajan, "Estimation with Applications to Tracking and Navigation", section 6.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.config import bounded
from occbev.results import Boxes3D

Array = NDArray[np.float64]

GROUPS = (
    ("car", "truck", "construction_vehicle", "bus", "trailer"),
    ("motorcycle", "bicycle"),
    ("pedestrian",),
    ("barrier",),
    ("traffic_cone",),
)
"""Groups of classes: a track continues only with boxes of its group; within a group the class may change."""

GROUP_OF_LABEL = np.array([next(i for i, g in enumerate(GROUPS) if name in g) for name in DETECTION_CLASSES])

ACROSS_M, ALONG_SHARE = 0.3, 0.05
"""Assumed standard deviation of a box's centre: across the line of sight in metres, along it as a share of the range."""

ACCELERATION = 3.0
"""Assumed standard deviation of an object's acceleration, m/s2."""

FIRST_SPEED = 5.0
"""Assumed standard deviation of the velocity that a new track begins with, m/s."""

MAX_MISSED_S = 1.0

GATE = 13.8
"""Squared Mahalanobis distance of two dimensions that 99.9 % of an object's own boxes stay below."""


@dataclass(frozen=True)
class TrackingConfig:
    """Identities of boxes over time."""

    enabled: bool = field(default=True, metadata={"live": True})
    """Give the boxes of one object the same id in all results; false leaves ids empty."""
    max_missed_s: float = bounded(MAX_MISSED_S, 0.1, 10.0, live=True)
    """How long an object keeps its id while it is not detected."""


@dataclass
class Tracks:
    """Filters of T objects in the fixed frame. mean: (T, 4) x, y, vx, vy. covariance: (T, 4, 4). seen_ns: last box."""

    id: NDArray[np.int64]
    group: NDArray[np.int64]
    seen_ns: NDArray[np.int64]
    mean: Array
    covariance: Array

    @classmethod
    def none(cls) -> Tracks:
        """No object."""
        whole = np.zeros(0, np.int64)
        return cls(whole, whole, whole, np.zeros((0, 4)), np.zeros((0, 4, 4)))

    def __getitem__(self, index: NDArray[np.bool_]) -> Tracks:
        return Tracks(*(getattr(self, entry.name)[index] for entry in fields(self)))

    def __add__(self, other: Tracks) -> Tracks:
        pairs = ((getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self))
        return Tracks(*(np.concatenate(pair) for pair in pairs))


class Tracker:
    """Gives the boxes of successive sets their ids; ids are counted from 1 and never used again."""

    def __init__(self) -> None:
        self._tracks, self._next_id = Tracks.none(), 1
        self._stamp_ns, self._had_pose = 0, False

    def restart(self) -> None:
        """Forget all objects, as after a clock jump."""
        self._tracks = Tracks.none()

    def update(
        self, boxes: Boxes3D, stamp_ns: int, ego2global: Array | None, max_missed_s: float = MAX_MISSED_S
    ) -> Boxes3D:
        """Return the boxes with their ids.

        boxes: in base_link at `stamp_ns`. ego2global: (4, 4) pose of base_link in a fixed frame at that time, so that
        the vehicle's own motion moves no track; None where it is not known: then a standing vehicle is assumed.
        max_missed_s: how long an object may go without a box and keep its id.
        Tracks begin anew where stamps go back, or where poses begin or end.
        """
        if stamp_ns <= self._stamp_ns or (ego2global is not None) != self._had_pose:
            self.restart()
        seconds = (stamp_ns - self._stamp_ns) / 1e9
        self._stamp_ns, self._had_pose = stamp_ns, ego2global is not None
        pose = np.eye(4) if ego2global is None else np.asarray(ego2global, np.float64)
        self._tracks = self._tracks[self._tracks.seen_ns >= stamp_ns - int(max_missed_s * 1e9)]
        _predict(self._tracks, seconds)
        xyz = boxes.box[:, :3].astype(np.float64)
        place = (xyz @ pose[:3, :3].T + pose[:3, 3])[:, :2]
        noise = _turn(position_covariance(xyz), pose)
        group = GROUP_OF_LABEL[boxes.label]
        track_of = _associate(self._tracks, place, noise, group)
        old = np.flatnonzero(track_of >= 0)
        _correct(self._tracks, track_of[old], place[old], noise[old], stamp_ns)
        ids = np.zeros(len(boxes), np.int64)
        ids[old] = self._tracks.id[track_of[old]]
        new = np.flatnonzero(track_of < 0)
        ids[new] = np.arange(self._next_id, self._next_id + len(new))
        self._next_id += len(new)
        velocity = boxes.box[new, 7:9].astype(np.float64) @ pose[:2, :2].T
        self._tracks += _begin(ids[new], group[new], stamp_ns, place[new], velocity, noise[new])
        return replace(boxes, track=ids)


def position_covariance(xyz: Array) -> Array:
    """Return the assumed covariance (M, 2, 2) of box centres (M, 3) in base_link: cameras err along the line of sight."""
    distance = np.hypot(xyz[:, 0], xyz[:, 1])
    along = xyz[:, :2] / np.maximum(distance, 1e-6)[:, None]
    outer = along[:, :, None] * along[:, None, :]
    across, far = ACROSS_M**2, (ALONG_SHARE * distance) ** 2
    return across * np.eye(2) + far[:, None, None] * outer


def _turn(covariance: Array, pose: Array) -> Array:
    return np.asarray(pose[:2, :2] @ covariance @ pose[:2, :2].T)


def _predict(tracks: Tracks, seconds: float) -> None:
    move = np.eye(4)
    move[0, 2] = move[1, 3] = seconds
    push = np.array([seconds**2 / 2, seconds]) * ACCELERATION
    noise = np.kron(np.outer(push, push), np.eye(2))
    tracks.mean = tracks.mean @ move.T
    tracks.covariance = move @ tracks.covariance @ move.T + noise


def _associate(tracks: Tracks, place: Array, noise: Array, group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of each box's track (M,), -1 for none: the likeliest pair first, each used once."""
    track_of = np.full(len(place), -1)
    if not len(place) or not len(tracks.id):
        return track_of
    x, y = (place[:, axis] - tracks.mean[:, axis, None] for axis in (0, 1))  # (T, M)
    # No variance exceeds the trace, so that pairs further apart need no closer look.
    reach = GATE * (np.trace(tracks.covariance[:, :2, :2], 0, 1, 2)[:, None] + np.trace(noise, 0, 1, 2))
    near = (x * x + y * y < reach) & (tracks.group[:, None] == group)
    track, box = np.nonzero(near)
    spread, x, y = tracks.covariance[track, :2, :2] + noise[box], x[near], y[near]  # (P, 2, 2), (P,), (P,)
    # Inverse and determinant of 2 x 2 matrices, written out: NumPy's take several times as long for so many.
    (xx, xy), (_, yy) = spread.transpose(1, 2, 0)
    area = xx * yy - xy * xy
    distance = (yy * x * x - 2 * xy * x * y + xx * y * y) / area
    order = np.argsort(distance + np.log(area), kind="stable")
    order = order[distance[order] < GATE]
    taken = np.zeros(len(tracks.id), bool)
    for track_index, box_index in zip(track[order].tolist(), box[order].tolist(), strict=True):
        if not taken[track_index] and track_of[box_index] < 0:
            taken[track_index], track_of[box_index] = True, track_index
    return track_of


def _correct(tracks: Tracks, index: NDArray[np.int64], place: Array, noise: Array, stamp_ns: int) -> None:
    """Correct the tracks `index` (K,) with measured positions (K, 2)."""
    mean, covariance = tracks.mean[index], tracks.covariance[index]
    gain = covariance[:, :, :2] @ np.linalg.inv(covariance[:, :2, :2] + noise)
    off = place - mean[:, :2]
    tracks.mean[index] = mean + np.einsum("kij,kj->ki", gain, off)
    tracks.covariance[index] = covariance - gain @ covariance[:, :2]
    tracks.seen_ns[index] = stamp_ns


def _begin(
    ids: NDArray[np.int64], group: NDArray[np.int64], stamp_ns: int, place: Array, velocity: Array, noise: Array
) -> Tracks:
    covariance = np.zeros((len(ids), 4, 4))
    covariance[:, :2, :2] = noise
    covariance[:, 2:, 2:] = FIRST_SPEED**2 * np.eye(2)
    return Tracks(ids, group, np.full(len(ids), stamp_ns), np.concatenate([place, velocity], axis=1), covariance)
