"""Outgoing messages: every field that a subscriber relies on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="output messages are rclpy's")

from rclpy.serialization import deserialize_message, serialize_message

from occbev.classes import DETECTION_CLASSES, FREE, OCCUPANCY_CLASSES, OCCUPANCY_COLOURS
from occbev.grid import GRIDS, VoxelGrid
from occbev.inference.factors import Factors, decode_factors
from occbev.inference.ground_grid import GroundGridConfig
from occbev.messages.detections import detections_bytes
from occbev.messages.readers import cloud_from_message
from occbev.results import Boxes3D, GroundGrid, Occupancy, VoxelEvidence
from occbev.ros import outputs
from occbev.ros.compat import capabilities, require

HEADER = outputs.header_at(1_600_000_000_123_456_789, "base_link")


def boxes() -> Boxes3D:
    box = np.array([[10, 2, 0.9, 4.5, 1.9, 1.6, math.pi / 2, 0.0, 8.0], [5, -3, 1, 0.7, 0.6, 1.7, 0, 0.1, 0]])
    return Boxes3D(box.astype(np.float32), np.array([0, 8]), np.array([0.9, 0.4], np.float32))


def volume(grid: VoxelGrid | None = None, share: float = 0.05) -> Occupancy:
    grid = grid or GRIDS["tiny"]
    rng = np.random.default_rng(0)
    occupied = rng.random(grid.shape) < share
    label = np.where(occupied, rng.integers(0, FREE, grid.shape), FREE).astype(np.uint8)
    state = np.where(occupied, 2, rng.integers(0, 2, grid.shape)).astype(np.uint8)
    return Occupancy(label, rng.random(grid.shape).astype(np.float32), state, grid)


def test_stamps_keep_their_nanoseconds() -> None:
    assert (HEADER.stamp.sec, HEADER.stamp.nanosec) == (1_600_000_000, 123_456_789)


def detections(some: Boxes3D, header: Any) -> Any:
    """The same boxes as a message object, filled field by field."""
    msg = pytest.importorskip("vision_msgs.msg", reason="built by occbev.ros.build_interfaces")
    made = msg.Detection3DArray(header=header)
    for index, (box, label, score) in enumerate(zip(some.box, some.label, some.score, strict=True)):
        detection = msg.Detection3D(header=header, results=[msg.ObjectHypothesisWithPose()])
        detection.id = "" if some.track is None else str(some.track[index])
        hypothesis = detection.results[0].hypothesis
        hypothesis.class_id, hypothesis.score = DETECTION_CLASSES[label], float(score)
        for pose in (detection.bbox.center, detection.results[0].pose.pose):
            pose.position.x, pose.position.y, pose.position.z = map(float, box[:3])
            yaw = float(box[6])
            pose.orientation.z, pose.orientation.w = math.sin(yaw / 2), math.cos(yaw / 2)
        size = detection.bbox.size
        size.x, size.y, size.z = map(float, box[3:6])
        made.detections.append(detection)
    return made


@pytest.mark.parametrize("frame", ["", "b", "base", "base_link", "vehicle/base_link"])
def test_the_bytes_of_boxes_are_those_of_their_message(frame: str) -> None:
    header = outputs.header_at(1_600_000_000_123_456_789, frame)
    ten = boxes()[np.array([0, 1] * 5)]
    ten = replace(ten, label=np.arange(10), track=10 ** np.arange(10, dtype=np.int64))
    for some in (ten, ten[::-1], replace(ten, track=None), ten[:1], ten[:0]):
        data = detections_bytes(some, 1_600_000_000_123_456_789, frame)
        message = detections(some, header)
        assert deserialize_message(data, type(message)) == message
        assert len(data) == len(serialize_message(message))  # whose padding is left to chance


def test_markers_delete_the_last_ones_first_and_expire() -> None:
    message = outputs.MarkerWriter().message(boxes(), HEADER, lifetime_s=0.4)
    actions = [m.action for m in message.markers]
    assert actions == [outputs.Marker.DELETEALL, 0, 0, 0]
    assert message.markers[0].ns == "", "with a namespace, markers of the others stay"
    kinds = [m.type for m in message.markers[1:]]
    assert sorted(kinds) == [outputs.Marker.ARROW, outputs.Marker.CUBE, outputs.Marker.CUBE]
    assert all(m.lifetime.nanosec == 400_000_000 for m in message.markers[1:])
    arrow = next(m for m in message.markers if m.type == outputs.Marker.ARROW and m.action == 0)
    assert arrow.points[1].y - arrow.points[0].y == pytest.approx(8.0)
    keys = {(m.ns, m.id) for m in message.markers[1:]}
    assert len(keys) == 3


def test_markers_that_are_filled_again_hold_nothing_of_the_last_ones() -> None:
    both, used = boxes(), outputs.MarkerWriter()
    later = outputs.header_at(1_700_000_000_000_000_000, "base_link")
    for few, header in ((both, HEADER), (both[::-1], later), (both[1:], HEADER), (both, later)):
        assert used.message(few, header) == outputs.MarkerWriter().message(few, header)


def as_networks_give_it(occupancy: Occupancy) -> Occupancy:
    """The same voxels with x fastest in memory."""
    arrays = (occupancy.label, occupancy.confidence, occupancy.state)
    return Occupancy(*(np.asfortranarray(array) for array in arrays), occupancy.grid)


def test_clouds_do_not_depend_on_the_memory_of_a_volume() -> None:
    occupancy, writer = volume(), outputs.CloudWriter(True)
    other = as_networks_give_it(occupancy)
    clouds = [cloud_from_message(writer.message(o, HEADER)) for o in (occupancy, other)]
    np.testing.assert_array_equal(*clouds)


@pytest.mark.parametrize("observed", [False, True])
def test_clouds_read_back_what_the_volume_holds(observed: bool) -> None:
    writer = outputs.CloudWriter(observed)
    for grid in (GRIDS["tiny"], VoxelGrid((0, 0, 0), (1, 1, 1), (4, 5, 6)), GRIDS["tiny"]):
        occupancy = volume(grid)
        message = writer.message(occupancy, HEADER)
        shown = occupancy.state > 0 if observed else occupancy.state == 2
        chosen = np.argwhere(shown.T)[:, ::-1]  # x fastest
        points = cloud_from_message(message)
        assert message.width == len(chosen) == len(points)
        centres = np.stack([points["x"], points["y"], points["z"]], -1)
        np.testing.assert_allclose(centres, grid.centres(chosen), atol=1e-5)
        labels = occupancy.label[tuple(chosen.T)]
        np.testing.assert_array_equal(points["label"], labels)
        np.testing.assert_array_equal(points["confidence"], occupancy.confidence[tuple(chosen.T)])
        r, g, b = OCCUPANCY_COLOURS[labels].astype(np.uint32).T
        np.testing.assert_array_equal(points["rgb"], (r << 16) | (g << 8) | b)


def test_an_empty_volume_is_an_empty_cloud() -> None:
    message = outputs.CloudWriter().message(volume(share=0.0), HEADER)
    assert (message.width, len(message.data), message.height) == (0, 0, 1)


def test_upstream_reads_our_clouds() -> None:
    point_cloud2 = pytest.importorskip("sensor_msgs_py.point_cloud2", reason="not on PyPI")
    occupancy = volume()
    message = outputs.CloudWriter().message(occupancy, HEADER)
    theirs = point_cloud2.read_points(message)
    np.testing.assert_array_equal(theirs["label"], cloud_from_message(message)["label"])


def test_the_ground_grid_is_row_major_from_the_lower_left_corner() -> None:
    grid = VoxelGrid((-2, -1, 0), (0.5, 0.5, 0.5), (8, 4, 3))
    ground = GroundGrid.unknown(grid)
    ground.cells[1, 6], ground.cells[0, 2] = 100, 0
    message = outputs.grid_message(ground, HEADER)
    cells = np.array(message.data, np.int8).reshape(message.info.height, message.info.width)
    assert cells.shape == (4, 8)
    np.testing.assert_array_equal(cells, ground.cells)
    assert (message.info.origin.position.x, message.info.origin.position.y) == (-2.0, -1.0)
    assert message.info.resolution == pytest.approx(0.5)


def test_oblong_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="square cells"):
        outputs.grid_message(GroundGrid.unknown(VoxelGrid((0, 0, 0), (1, 2, 1), (3, 3, 3))), HEADER)


def test_the_obstacle_cloud_holds_what_blocks_the_grid() -> None:
    grid, occupancy = GRIDS["tiny"], volume(share=0.0)
    obstacle = np.zeros((1, 1, *grid.shape[::-1]), np.float32)
    obstacle[0, 0, 3, 7, 20], obstacle[0, 0, 2, 9, 21] = 0.9, 0.3  # [z, y, x]
    occupancy.label[20, 7, 3], occupancy.state[20, 7, 3] = OCCUPANCY_CLASSES.index("car"), 2
    occupancy = replace(occupancy, evidence=VoxelEvidence(obstacle))
    ground = GroundGrid.unknown(grid)
    ground.ground[:] = 1
    ground.cells[7, 20], ground.cells[9, 21] = 100, 100
    ground.probability[7, 20], ground.probability[9, 21] = 0.95, 0.4
    for given in (occupancy, replace(as_networks_give_it(occupancy), evidence=occupancy.evidence)):
        points = cloud_from_message(outputs.CloudWriter().obstacles(given, ground, GroundGridConfig(), HEADER))
        by_label = {int(p["label"]): p for p in points}
        assert set(by_label) == {0, OCCUPANCY_CLASSES.index("car")}, "the doubtful one has no class"
        car, other = by_label[OCCUPANCY_CLASSES.index("car")], by_label[0]
        np.testing.assert_allclose([car["x"], car["y"], car["z"]], grid.centres([20, 7, 3]), atol=1e-5)
        np.testing.assert_allclose([other["x"], other["y"], other["z"]], grid.centres([21, 9, 2]), atol=1e-5)
        assert (car["confidence"], other["confidence"]) == (np.float32(0.95), np.float32(0.4))


@pytest.mark.parametrize("blocked", [0, 1])
def test_the_obstacle_cloud_of_factors_may_hold_no_free_voxel_and_none_at_all(blocked: int) -> None:
    grid, car = GRIDS["tiny"], OCCUPANCY_CLASSES.index("car")
    occupied = np.full((1, 1, *grid.shape[::-1]), 0.01, np.float32)
    cells = occupied.shape[2:]
    occupied[0, 0, 3, 7, 20] = 0.9  # [z, y, x]
    factors = Factors(occupied, np.full(cells, car, np.uint8), np.ones(cells, np.float32), FREE, 0.5)
    ground = GroundGrid.unknown(grid)
    ground.cells[7, 20] = 100 * blocked
    cloud = outputs.CloudWriter().obstacles(decode_factors(factors, grid), ground, GroundGridConfig(), HEADER)
    assert cloud_from_message(cloud)["label"].tolist() == [car] * blocked


def test_diagnostics_carry_levels_and_values() -> None:
    message = outputs.diagnostics_message([outputs.Status("occbev: sync", 1, "late", {"drops": 3})], 5, "rig")
    (status,) = message.status
    assert (status.level, status.name, status.hardware_id) == (b"\x01", "occbev: sync", "rig")
    assert (status.values[0].key, status.values[0].value) == ("drops", "3")


def test_capabilities_name_what_installs_them() -> None:
    absent = [c for c in capabilities() if not c.present]
    assert all("install" in c.remedy for c in absent)
    for capability in absent:
        with pytest.raises(ImportError, match=f"{capability.name} is needed for"):
            require(capability.name)
