"""Read back from a bag what the node published: boxes and voxels by stamp, as a subscriber receives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from occbev.classes import DETECTION_CLASSES, FREE, FREE_STATE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.geometry import rotation_from_xyzw
from occbev.graph import OUTPUT_TOPICS
from occbev.grid import BevGrid, VoxelGrid
from occbev.messages.bags import BagReader
from occbev.messages.readers import MessageError, cloud_from_message, stamp_to_ns
from occbev.reports.moments import GroundMap
from occbev.results import Boxes3D, Occupancy

OBSTACLES = OUTPUT_TOPICS["obstacles"].name.removeprefix("~")
"""How the topic of the obstacle cloud ends, whose voxels are among those of the other cloud."""

OUTPUTS = "/output/"
"""Part of the names of output topics that no remapping has changed."""

DETECTIONS, CLOUD = "vision_msgs/msg/Detection3DArray", "sensor_msgs/msg/PointCloud2"
MARKERS, GROUND = "visualization_msgs/msg/MarkerArray", "nav_msgs/msg/OccupancyGrid"
KINDS = (DETECTIONS, CLOUD, MARKERS, GROUND)
"""Types of the outputs that are read."""

VELOCITY_MARKERS = "velocity"
"""Namespace of the arrows that carry a box's velocity, which vision_msgs has no field for."""


OPEN_STAMPS = 8
"""Key times whose messages may still come while later ones have begun."""


@dataclass(frozen=True)
class Published:
    """The results of one key time; None where that output was not published."""

    stamp_ns: int
    boxes: Boxes3D | None = None
    occupancy: Occupancy | None = None
    ground: GroundMap | None = None


def read_recorded(bag: Path, grid: VoxelGrid) -> dict[int, Published]:
    """Read every result of a recorded run, by stamp in nanoseconds.

    grid: the voxel grid of the model that published.

    Raises:
        MessageError: a voxel lies outside the grid, or a class name is unknown.
    """
    return {result.stamp_ns: result for result in sorted(iterate_recorded(bag, grid), key=lambda r: r.stamp_ns)}


def iterate_recorded(bag: Path, grid: VoxelGrid) -> Iterator[Published]:
    """Yield the results of a recorded run as they were published, holding few at a time; raises as `read_recorded`."""
    collector = ResultCollector(grid)
    with BagReader(bag) as reader:
        kinds = {t: kind for t, kind in reader.topics.items() if kind in KINDS and not t.endswith(OBSTACLES)}
        chosen = [t for t in kinds if OUTPUTS in t] or list(kinds)  # a LiDAR may lie beside them
        for entry in reader.messages(chosen):
            collector.add(entry.type, reader.decode(entry))
            while len(collector) > OPEN_STAMPS:
                yield collector.take()
        while len(collector):
            yield collector.take()


LATE_NS = 1_000_000_000
"""A message this much older than results that were taken is of a clock that went back, and no late one."""


class ResultCollector:
    """Joins output messages of one stamp; `take` gives the oldest stamp with all that has come of it."""

    def __init__(self, grid: VoxelGrid) -> None:
        self._grid = grid
        self._results: dict[int, Published] = {}
        self._velocities: dict[int, dict[int, tuple[float, float]]] = {}
        self._taken_ns = -LATE_NS

    def __len__(self) -> int:
        return len(self._results)

    def add(self, kind: str, message: Any) -> None:
        """Take a message of one of the `KINDS`; one of a result that was taken already is left out.

        Raises:
            MessageError: it does not fit the grid, or names an unknown class.
        """
        if kind == MARKERS:
            if message.markers:
                stamp_ns = stamp_to_ns(message.markers[0].header.stamp)
                self._velocities[stamp_ns] = velocities_from_message(message)
            return
        stamp_ns = stamp_to_ns(message.header.stamp)
        if self._taken_ns - LATE_NS < stamp_ns <= self._taken_ns:
            return
        values: dict[str, Any]
        if kind == DETECTIONS:
            values = {"boxes": boxes_from_message(message)}
        elif kind == CLOUD:
            values = {"occupancy": occupancy_from_message(message, self._grid)}
        else:
            values = {"ground": ground_from_message(message)}
        self._results[stamp_ns] = replace(self._results.get(stamp_ns, Published(stamp_ns)), **values)

    def take(self) -> Published:
        """Return the oldest stamp's results and forget them."""
        stamp_ns = self._taken_ns = min(self._results)
        for old in [stamp for stamp in self._velocities if stamp < stamp_ns]:
            del self._velocities[old]
        return _with_velocities(self._results.pop(stamp_ns), self._velocities.pop(stamp_ns, {}))


def boxes_from_message(message: Any) -> Boxes3D:
    """Read a vision_msgs/Detection3DArray; velocities are zero."""
    rows, labels, scores = [], [], []
    for detection in message.detections:
        best = max(detection.results, key=lambda result: result.hypothesis.score).hypothesis
        if best.class_id not in DETECTION_CLASSES:
            raise MessageError(f"class {best.class_id!r} is none of {', '.join(DETECTION_CLASSES)}")
        rows.append(_box(detection.bbox))
        labels.append(DETECTION_CLASSES.index(best.class_id))
        scores.append(best.score)
    box, ids = np.array(rows, np.float32).reshape(-1, 9), [detection.id for detection in message.detections]
    track = np.array(ids, np.int64) if ids and all(text.isdigit() for text in ids) else None
    return Boxes3D(box, np.array(labels, np.int64), np.array(scores, np.float32), track=track)


def velocities_from_message(message: Any) -> dict[int, tuple[float, float]]:
    """Read box index -> (vx, vy) from the arrows of a MarkerArray: each is one second of motion."""
    found = {}
    for marker in message.markers:
        if marker.ns == VELOCITY_MARKERS and len(marker.points) == 2:
            start, end = marker.points
            found[int(marker.id)] = (end.x - start.x, end.y - start.y)
    return found


def occupancy_from_message(message: Any, grid: VoxelGrid) -> Occupancy:
    """Read voxels from a PointCloud2; what was not published is free and unobserved."""
    points = cloud_from_message(message)
    centres = np.stack([points[axis] for axis in "xyz"], axis=-1)
    voxels, inside = grid.indices(centres)
    if not inside.all():
        raise MessageError(f"voxel at {centres[~inside][0].tolist()} is outside the grid {grid.as_record()}")
    at = tuple(voxels.T)
    label = np.full(grid.shape, FREE, np.uint8)
    confidence = np.zeros(grid.shape, np.float32)
    state = np.full(grid.shape, UNOBSERVED_STATE, np.uint8)
    label[at], confidence[at] = points["label"], points["confidence"]
    state[at] = np.where(points["label"] == FREE, FREE_STATE, OCCUPIED_STATE)
    return Occupancy(label, confidence, state, grid)


def ground_from_message(message: Any) -> GroundMap:
    """Read a nav_msgs/OccupancyGrid of base_link."""
    info = message.info
    cells = np.asarray(message.data, np.int8).reshape(info.height, info.width)
    corner = (info.origin.position.x, info.origin.position.y)
    return GroundMap(cells, BevGrid(corner, (info.resolution,) * 2, (info.width, info.height)))


def _box(bbox: Any) -> tuple[float, ...]:
    centre, turn, size = bbox.center.position, bbox.center.orientation, bbox.size
    rotation = rotation_from_xyzw((turn.x, turn.y, turn.z, turn.w))
    yaw = float(np.arctan2(rotation[1, 0], rotation[0, 0]))
    return (centre.x, centre.y, centre.z, size.x, size.y, size.z, yaw, 0.0, 0.0)


def _with_velocities(result: Published, velocities: dict[int, tuple[float, float]]) -> Published:
    if result.boxes is None or not velocities:
        return result
    box = result.boxes.box.copy()
    for index, velocity in velocities.items():
        if index < len(box):
            box[index, 7:9] = velocity
    return replace(result, boxes=replace(result.boxes, box=box))
