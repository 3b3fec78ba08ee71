"""Results to ROS messages: boxes, markers, voxels, the ground grid, diagnostics. The only writer of output messages."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from nav_msgs.msg import OccupancyGrid
from numpy.typing import NDArray
from rclpy.serialization import serialize_message
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from occbev.classes import (
    DETECTION_COLOURS,
    FREE,
    OCCUPANCY_CLASSES,
    OCCUPANCY_COLOURS,
    OCCUPIED_STATE,
    UNOBSERVED_STATE,
    height_colours,
)
from occbev.graph import OPTIONAL_OUTPUTS, OUTPUT_TOPICS, resolve
from occbev.grid import VoxelGrid, volume_from_xyz
from occbev.inference.ground_grid import GroundGridConfig, obstacle_voxels
from occbev.messages.bags import BagMessage
from occbev.messages.detections import detections_bytes
from occbev.results import Boxes3D, GroundGrid, Occupancy, Perception
from occbev.ros.autoware import detected_objects
from occbev.ros.compat import is_installed
from occbev.streams.health import Status
from occbev.streams.parameters import PerceptionParameters

POINT_FIELDS = (
    ("x", 0, PointField.FLOAT32),
    ("y", 4, PointField.FLOAT32),
    ("z", 8, PointField.FLOAT32),
    ("rgb", 12, PointField.UINT32),
    ("confidence", 16, PointField.FLOAT32),
    ("label", 20, PointField.UINT8),
)
"""Name, offset and type of each field of a voxel."""

POINT_FIELD_MESSAGES = [PointField(name=n, offset=o, datatype=t, count=1) for n, o, t in POINT_FIELDS]

POINT_STEP = 24
"""Bytes of a voxel; a multiple of eight, so that two fields are written at once."""

OTHERS = OCCUPANCY_CLASSES.index("others")

SLOWEST_ARROW = 0.5
"""Boxes slower than this (m/s) get no velocity arrow."""


def time_from_ns(stamp_ns: int) -> Time:
    """Make a builtin_interfaces Time."""
    seconds, nanoseconds = divmod(int(stamp_ns), 1_000_000_000)
    return Time(sec=seconds, nanosec=nanoseconds)


def header_at(stamp_ns: int, frame: str) -> Header:
    """Make a std_msgs Header."""
    return Header(stamp=time_from_ns(stamp_ns), frame_id=frame)


class MarkerWriter:
    """Writes boxes as cubes and their velocities as arrows; a message is the last one's, filled again."""

    def __init__(self) -> None:
        self._cubes: list[Marker] = []
        self._arrows: list[Marker] = []

    def prepare(self, boxes: int) -> None:
        """Make the objects of so many boxes, so that the first message does not pay for it."""
        while len(self._cubes) < boxes:
            self._cubes.append(_cube(len(self._cubes)))
            self._arrows.append(_arrow(len(self._arrows)))

    def message(self, boxes: Boxes3D, header: Header, lifetime_s: float = 0.5) -> MarkerArray:
        """Make the message, which the next one overwrites, after a marker that deletes the last ones."""
        seconds = int(lifetime_s)
        lifetime = Duration(sec=seconds, nanosec=int((lifetime_s - seconds) * 1e9))
        self.prepare(len(boxes))
        markers = [Marker(header=header, action=Marker.DELETEALL)]
        labels, scores = boxes.label.tolist(), boxes.score.tolist()
        for index, box in enumerate(boxes.box.tolist()):
            cube, arrow = self._cubes[index], self._arrows[index]
            _place(cube.pose, box)
            cube.scale.x, cube.scale.y, cube.scale.z = box[3:6]
            _paint(cube.color, DETECTION_COLOURS[labels[index]], 0.35 + 0.6 * scores[index])
            markers.append(cube)
            if math.hypot(box[7], box[8]) > SLOWEST_ARROW:
                _point(arrow, box)
                arrow.color = cube.color
                markers.append(arrow)
        for marker in markers[1:]:
            marker.header, marker.lifetime = header, lifetime
        return MarkerArray(markers=markers)


class CloudWriter:
    """Writes voxels as PointCloud2; half of each point comes from tables that are made once for a grid.

    observed: also free voxels that were observed, not only occupied ones.
    """

    def __init__(self, observed: bool = False) -> None:
        self.observed = observed
        self._for: tuple[VoxelGrid, bool] | None = None
        self._columns = self._layers = np.zeros(0, np.uint64)

    def message(self, occupancy: Occupancy, header: Header) -> PointCloud2:
        """Make the cloud of one volume; points are voxel centres in the grid's frame, layer by layer, x fastest."""
        return self.message_of(occupancy, *shown_voxels(occupancy, self.observed), header)

    def obstacles(
        self, occupancy: Occupancy, ground: GroundGrid, config: GroundGridConfig, header: Header
    ) -> PointCloud2:
        """Make the cloud of what blocks the ground grid; confidence is the probability of an obstacle in its cell."""
        x, y, layer = obstacle_voxels(occupancy, ground, config).T
        column = y * occupancy.grid.shape[0] + x
        labels, _ = occupancy.look_up(layer, column)
        # Voxels that are free have no class of their own.
        labels = np.where(labels == FREE, np.uint8(OTHERS), labels)
        self.prepare(occupancy.grid)
        return cloud_message(self._points(layer, column, labels, ground.probability[y, x]), header)

    def message_of(
        self, occupancy: Occupancy, layer: NDArray[np.intp], column: NDArray[np.intp], header: Header
    ) -> PointCloud2:
        """Make the cloud of the voxels (M,) that `Occupancy.look_up` looks up."""
        self.prepare(occupancy.grid, occupancy.has_classes)
        return cloud_message(self._points(layer, column, *occupancy.look_up(layer, column)), header)

    def prepare(self, grid: VoxelGrid, has_classes: bool = True) -> None:
        """Make the tables of a grid, so that the first cloud does not pay for it.

        Columns, (Y, X): x and y as the eight bytes they are in a point. Layers and classes: z and rgb.
        """
        if self._for != (grid, has_classes):
            self._for = (grid, has_classes)
            centres = grid.centres().astype(np.float32)
            columns = np.stack([centres[:, :, 0, axis].ravel("F") for axis in (0, 1)], axis=-1)
            self._columns = columns.view(np.uint64)[:, 0]
            colours = _pack_colours(OCCUPANCY_COLOURS)[None]
            layers = np.empty((grid.shape[2], len(OCCUPANCY_COLOURS), 2), np.uint32)
            if not has_classes:
                colours = _pack_colours(height_colours(grid.shape[2]))[:, None]
            layers[..., 0] = centres[0, 0, :, 2].view(np.uint32)[:, None]
            layers[..., 1] = colours
            self._layers = layers.view(np.uint64).ravel()

    def _points(
        self,
        layer: NDArray[np.intp],
        column: NDArray[np.intp],
        labels: NDArray[np.uint8],
        confidence: NDArray[np.float32],
    ) -> array[int]:
        """Pack voxels (M,) as POINT_FIELDS says, eight bytes at a time."""
        data = array("B", bytes(1)) * (POINT_STEP * len(labels))
        points = np.frombuffer(data, np.uint64).reshape(-1, POINT_STEP // 8)
        points[:, 0] = self._columns.take(column)
        points[:, 1] = self._layers.take(layer * len(OCCUPANCY_COLOURS) + labels)
        points.view(np.float32)[:, 4] = confidence
        points.view(np.uint32)[:, 5] = labels  # little-endian: the label byte first, then padding
        return data


def shown_voxels(occupancy: Occupancy, observed: bool = False) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return layer and flat column (Y, X) of each occupied voxel (M,), with `observed` of each that is not unknown."""
    layers = np.ascontiguousarray(volume_from_xyz(occupancy.state)).reshape(occupancy.grid.shape[2], -1)
    # Layer by layer they stay in the cache, in half of the time.
    shown = [np.flatnonzero(state != UNOBSERVED_STATE if observed else state == OCCUPIED_STATE) for state in layers]
    return np.repeat(np.arange(len(shown)), [len(columns) for columns in shown]), np.concatenate(shown)


def cloud_message(data: array[int], header: Header) -> PointCloud2:
    """Wrap packed voxels, laid out as POINT_FIELDS, in a message."""
    count = len(data) // POINT_STEP
    cloud = PointCloud2(header=header, height=1, width=count, is_bigendian=False, is_dense=True)
    cloud.fields = POINT_FIELD_MESSAGES
    cloud.point_step, cloud.row_step = POINT_STEP, len(data)
    cloud.data = data
    return cloud


def grid_message(ground: GroundGrid, header: Header) -> OccupancyGrid:
    """Make a nav_msgs/OccupancyGrid, row-major from the corner with the smallest x and y.

    Raises:
        ValueError: voxels are not square seen from above.
    """
    grid = ground.grid
    if abs(grid.pitch[0] - grid.pitch[1]) > 1e-9:
        raise ValueError(f"an OccupancyGrid needs square cells; the grid's pitch is {grid.pitch}")
    out = OccupancyGrid(header=header)
    out.info.map_load_time = header.stamp
    out.info.resolution = grid.pitch[0]
    out.info.width, out.info.height = grid.shape[0], grid.shape[1]
    out.info.origin.position.x, out.info.origin.position.y = grid.lo[0], grid.lo[1]
    out.info.origin.orientation.w = 1.0
    data = array("b")
    data.frombytes(np.ascontiguousarray(ground.cells).data.cast("B"))
    out.data = data
    return out


class ResultWriter:
    """Makes the output messages of one result, each only when it is called for; the next result's overwrite them."""

    def __init__(self) -> None:
        self._markers, self._cloud = MarkerWriter(), CloudWriter()

    def prepare(self, grid: VoxelGrid, boxes: int) -> None:
        """Make what depends on the grid and the number of boxes alone."""
        self._cloud.prepare(grid)
        self._markers.prepare(boxes)

    def makers(self, perception: Perception, parameters: PerceptionParameters) -> dict[str, Callable[[], Any]]:
        """Return output (a key of graph.OUTPUT_TOPICS or OPTIONAL_OUTPUTS) -> what makes its message, or its bytes."""
        header = header_at(perception.stamp_ns, parameters.base_frame)
        boxes, occupancy = perception.boxes, perception.occupancy
        strong = boxes[boxes.score >= parameters.detection.marker_threshold]
        ground = perception.ground or GroundGrid.unknown(occupancy.grid)
        self._cloud.observed = parameters.occupancy.publish == "observed"
        return {
            "objects": lambda: detections_bytes(boxes, perception.stamp_ns, parameters.base_frame),
            "points": lambda: self._cloud.message(occupancy, header),
            "obstacles": lambda: self._cloud.obstacles(occupancy, ground, parameters.ground_grid, header),
            "grid": lambda: grid_message(ground, header),
            "markers": lambda: self._markers.message(strong, header, parameters.marker_lifetime_s),
            "autoware": lambda: detected_objects(boxes, header),
        }


def encoder(parameters: PerceptionParameters) -> Callable[[Perception], Iterator[BagMessage]]:
    """Return a function that serialises a result as the node would publish it."""
    writer = ResultWriter()
    topics = OUTPUT_TOPICS | {key: topic for key, topic in OPTIONAL_OUTPUTS.items() if is_installed(topic.type)}

    def encode(perception: Perception) -> Iterator[BagMessage]:
        makers = writer.makers(perception, parameters)
        for key, topic in topics.items():
            made = makers[key]()
            data = made if isinstance(made, bytes) else bytes(serialize_message(made))
            yield BagMessage(resolve(topic.name), topic.type, perception.stamp_ns, data)

    return encode


def diagnostics_message(statuses: Iterable[Status], stamp_ns: int, hardware: str = "") -> DiagnosticArray:
    """Make a diagnostic_msgs/DiagnosticArray; hardware tells the nodes apart that share its topic."""
    out = DiagnosticArray(header=header_at(stamp_ns, ""))
    for status in statuses:
        values = [KeyValue(key=str(key), value=str(value)) for key, value in status.values.items()]
        out.status.append(
            DiagnosticStatus(
                level=bytes([status.level]),
                name=status.name,
                message=status.text,
                hardware_id=hardware,
                values=values,
            )
        )
    return out


def _place(pose: Any, box: list[float]) -> None:
    pose.position.x, pose.position.y, pose.position.z = box[0:3]
    pose.orientation.z, pose.orientation.w = math.sin(box[6] / 2), math.cos(box[6] / 2)


def _cube(index: int) -> Marker:
    return Marker(ns="boxes", id=index, type=Marker.CUBE)


def _arrow(index: int) -> Marker:
    return Marker(
        ns="velocity",
        id=index,
        type=Marker.ARROW,
        points=[Point(), Point()],
        scale=Vector3(x=0.15, y=0.35, z=0.5),
        pose=Pose(orientation=Quaternion(w=1.0)),
    )


def _point(arrow: Marker, box: list[float]) -> None:
    """Let an arrow show one second of motion, from the roof of the box."""
    start, end = arrow.points
    start.x, start.y, start.z = box[0], box[1], box[2] + box[5] / 2
    end.x, end.y, end.z = box[0] + box[7], box[1] + box[8], start.z


def _paint(colour: ColorRGBA, rgb: NDArray[np.uint8], alpha: float) -> None:
    colour.r, colour.g, colour.b = (float(v) / 255 for v in rgb)
    colour.a = alpha


def _pack_colours(colours: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """0x00RRGGBB of each colour (M, 3)."""
    r, g, b = colours.astype(np.uint32).T
    return (r << 16) | (g << 8) | b
