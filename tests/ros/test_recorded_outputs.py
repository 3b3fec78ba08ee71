"""What a subscriber records is read back as it was published: boxes with velocities, voxels with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 wheels or a ROS 2 distribution")
pytest.importorskip("vision_msgs", reason="needs vision_msgs, which the set-up builds")

from rclpy.serialization import serialize_message
from rosbags.rosbag2 import StoragePlugin, Writer

from occbev.classes import DETECTION_CLASSES, FREE, OCCUPANCY_CLASSES, OCCUPIED_STATE
from occbev.grid import GRIDS
from occbev.messages.bags import BagMessage, BagWriter, type_store
from occbev.messages.detections import detections_bytes
from occbev.messages.readers import MessageError
from occbev.reports.recorded_outputs import read_recorded
from occbev.results import Boxes3D, Occupancy
from occbev.ros import outputs

GRID = GRIDS["tiny"]
STAMP = 1_700_000_000_123_456_789
CAR = OCCUPANCY_CLASSES.index("car")


def boxes() -> Boxes3D:
    box = [[10, -3, 0.8, 4.5, 1.9, 1.6, 2.9, 5, -2], [-7, 8, 0.9, 0.6, 0.7, 1.8, -1.0, 0, 0]]
    labels = [DETECTION_CLASSES.index(name) for name in ("car", "pedestrian")]
    return Boxes3D(np.array(box, np.float32), np.array(labels), np.array([0.9, 0.4], np.float32))


def occupancy() -> Occupancy:
    label = np.full(GRID.shape, FREE, np.uint8)
    label[30:34, 18:22, 1:3] = CAR
    state = np.where(label == FREE, 1, OCCUPIED_STATE).astype(np.uint8)
    return Occupancy(label, np.full(GRID.shape, 0.75, np.float32), state, GRID)


def record(path: Path, messages: dict[str, Any]) -> Path:
    """Write messages, type name -> message or its bytes, as a recorder writes them."""
    store = type_store()
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for number, (msgtype, message) in enumerate(messages.items()):
            connection = writer.add_connection(f"/perception/output/{number}", msgtype, typestore=store)
            data = message if isinstance(message, bytes) else serialize_message(message)
            writer.write(connection, 1 + number, data)
    return path


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    header = outputs.header_at(STAMP, "base_link")
    return record(
        tmp_path / "run",
        {
            "vision_msgs/msg/Detection3DArray": detections_bytes(boxes(), STAMP, "base_link"),
            "visualization_msgs/msg/MarkerArray": outputs.MarkerWriter().message(boxes(), header),
            "sensor_msgs/msg/PointCloud2": outputs.CloudWriter().message(occupancy(), header),
        },
    )


def test_boxes_come_back_with_class_score_and_velocity(recorded: Path) -> None:
    results = read_recorded(recorded, GRID)
    assert list(results) == [STAMP]
    found = results[STAMP].boxes
    assert found is not None
    np.testing.assert_allclose(found.box, boxes().box, atol=1e-5)
    np.testing.assert_array_equal(found.label, boxes().label)
    np.testing.assert_allclose(found.score, boxes().score)


def test_voxels_come_back_and_the_rest_is_free(recorded: Path) -> None:
    found = read_recorded(recorded, GRID)[STAMP].occupancy
    assert found is not None
    np.testing.assert_array_equal(found.label, occupancy().label)
    np.testing.assert_array_equal(found.state == OCCUPIED_STATE, occupancy().state == OCCUPIED_STATE)
    assert found.confidence[31, 19, 1] == 0.75


def test_a_lidar_beside_the_outputs_is_no_output(tmp_path: Path) -> None:
    header = outputs.header_at(STAMP, "base_link")
    cloud = serialize_message(outputs.CloudWriter().message(occupancy(), header))
    with BagWriter(tmp_path / "run") as writer:
        for topic, stamp in (("/perception/output/occupancy/points", 1), ("/lidar/points", 2)):
            data = cloud if "output" in topic else cloud[:4] + bytes(4) + cloud[8:]  # another stamp
            writer.write(BagMessage(topic, "sensor_msgs/msg/PointCloud2", stamp, bytes(data)))
    assert list(read_recorded(tmp_path / "run", GRID)) == [STAMP]


def test_voxels_of_another_grid_are_refused(recorded: Path) -> None:
    small = GRIDS["tiny"].__class__((0, 0, 0), (0.8, 0.8, 0.8), (5, 5, 5))
    with pytest.raises(MessageError, match="is outside the grid"):
        read_recorded(recorded, small)


def test_an_output_that_was_not_published_is_none(tmp_path: Path) -> None:
    message = detections_bytes(Boxes3D.empty(), STAMP, "base_link")
    bag = record(tmp_path / "run", {"vision_msgs/msg/Detection3DArray": message})
    result = read_recorded(bag, GRID)[STAMP]
    assert result.boxes is not None
    assert len(result.boxes) == 0
    assert result.occupancy is None
