"""Published results are scored in the ego frame of the key stamp: what is right scores 1, what is off scores less."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from occbev.classes import FREE, FREE_STATE, OCCUPANCY_CLASSES, OCCUPIED_STATE
from occbev.geometry import invert_transform, make_transform, rotation_from_yaw
from occbev.grid import GRIDS
from occbev.inference.postprocess import move_boxes
from occbev.results import Boxes3D, Occupancy
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory
from occbev_training.metrics import drive
from occbev_training.metrics.occupancy import GridError
from occbev_training.sources.recording import Annotations, OccupancyTruth
from occbev_training.sources.truth import Truth

GRID = GRIDS["tiny"]
CAR, ROAD = OCCUPANCY_CLASSES.index("car"), OCCUPANCY_CLASSES.index("driveable_surface")
KEYS = np.array([1_000_000_000, 1_200_000_000], np.int64)
SPEED = 20.0
NOTHING = np.zeros(GRID.shape, bool)


@dataclass(frozen=True)
class Result:
    """A published result."""

    stamp_ns: int
    boxes: Boxes3D | None
    occupancy: Occupancy | None


class KnownTruth(Truth):
    """Truth held in memory: one car ahead, a road below it, the rear half out of sight."""

    def annotations(self, key: int) -> Annotations:
        return Annotations(boxes(), ("a",), np.array([20]))

    def occupancy_truth(self, key: int) -> OccupancyTruth:
        visible = np.zeros(GRID.shape, bool)
        visible[20:] = True
        return OccupancyTruth(semantics(), visible, visible, GRID)


def boxes() -> Boxes3D:
    box = np.array([[10, 1, 0.8, 4.5, 1.9, 1.6, 0.3, 5, 0]], np.float32)
    return Boxes3D(box, np.zeros(1, np.int64), np.full(1, 0.9, np.float32))


def semantics() -> np.ndarray:
    label = np.full(GRID.shape, FREE, np.uint8)
    label[:, 16:24, 0] = ROAD
    label[30:34, 18:22, 1:3] = CAR
    return label


def volume(label: np.ndarray) -> Occupancy:
    state = np.where(label == FREE, FREE_STATE, OCCUPIED_STATE).astype(np.uint8)
    return Occupancy(label, np.ones(GRID.shape, np.float32), state, GRID)


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    """A drive straight ahead at 20 m/s."""
    camera = Camera("CAM_FRONT", 64, 32, np.diag([50.0, 50, 1]), np.eye(4))
    stamps = np.arange(0, 2_000_000_001, 20_000_000, dtype=np.int64)
    poses = np.tile(np.eye(4), (len(stamps), 1, 1))
    poses[:, 0, 3] = stamps / 1e9 * SPEED
    return KnownTruth(tmp_path, "known", CameraRig((camera,)), np.eye(4), Trajectory(stamps, poses), KEYS)


def perfect(offset_ns: int = 0) -> list[Result]:
    """Right results stamped `offset_ns` after each key stamp, in the ego frame of that stamp."""
    back = make_transform(np.eye(3), [-SPEED * offset_ns / 1e9, 0, 0])
    return [Result(int(k) + offset_ns, move_boxes(boxes(), back), volume(semantics())) for k in KEYS]


def test_right_results_score_one(truth: Truth) -> None:
    results = drive.results_at_keys(perfect(), truth)
    detection = drive.score_detection(results, truth, Boxes3D.empty())
    assert detection["AP"]["car"] == pytest.approx(dict.fromkeys(("0.5", "1.0", "2.0", "4.0"), 1.0))
    assert detection["AP_30m"]["car"]["0.5"] == pytest.approx(1.0)
    assert detection["mAP"] == pytest.approx(0.1)  # nine classes have no truth and count as 0
    assert detection["mAP_present"] == pytest.approx(1.0)
    scores = drive.score_occupancy(results, truth, NOTHING)
    assert scores == {"iou": 1.0, "iou_mean_of_training_set": 0.0, "mIoU": 1.0}


def test_the_prior_is_scored_by_the_same_rules(truth: Truth) -> None:
    wrong = [replace(result, boxes=Boxes3D.empty()) for result in perfect()]
    results = drive.results_at_keys(wrong, truth)
    detection = drive.score_detection(results, truth, boxes())
    assert detection["AP_30m"]["car"]["2.0"] == 0.0
    assert detection["AP_30m_prior"]["car"]["2.0"] == pytest.approx(1.0)
    scores = drive.score_occupancy(results, truth, semantics() != FREE)
    assert scores["iou_mean_of_training_set"] == 1.0


def test_results_are_carried_to_the_key_stamp(truth: Truth) -> None:
    late = 40_000_000  # 0.8 m at 20 m/s: too far for the strictest threshold if it were not compensated
    results = drive.results_at_keys(perfect(late), truth)
    np.testing.assert_allclose(results[0].boxes.box, boxes().box, atol=1e-5)
    scores = drive.score_detection(results, truth, Boxes3D.empty())
    assert scores["AP"]["car"]["0.5"] == pytest.approx(1.0)


def test_of_several_results_the_nearest_is_scored(truth: Truth) -> None:
    late = [replace(result, boxes=Boxes3D.empty()) for result in perfect(50_000_000)]
    incomplete = [replace(result, stamp_ns=result.stamp_ns - 1_000_000, boxes=None) for result in perfect()]
    results = drive.results_at_keys([*perfect(10_000_000), *late, *incomplete], truth)
    assert [len(result.boxes) for result in results] == [len(boxes())] * len(KEYS)


def test_a_volume_moves_by_whole_voxels() -> None:
    ahead = make_transform(np.eye(3), [2 * GRID.pitch[0], 0, 0])
    moved = drive.move_occupancy(volume(semantics()), ahead)
    np.testing.assert_array_equal(moved.label[2:], semantics()[:-2])
    assert (moved.label[:2] == FREE).all()


def test_a_volume_stays_under_a_motion_that_takes_no_centre_out_of_its_voxel() -> None:
    little = make_transform(rotation_from_yaw(0.01), [0.2, 0, 0])
    assert drive.move_occupancy(volume(semantics()), little).label is not None
    grid = GRID
    source, inside = grid.indices((grid.centres().reshape(-1, 3) - little[:3, 3]) @ little[:3, :3])
    stayed = drive.move_occupancy(volume(semantics()), little).label.reshape(-1)
    resampled = np.where(inside, semantics()[tuple(source.T)], FREE)
    np.testing.assert_array_equal(stayed, resampled)


def test_boxes_turn_with_the_frame_and_come_back() -> None:
    a2b = make_transform(rotation_from_yaw(2.9), [3.0, -1, 0.2])
    there = move_boxes(boxes(), a2b)
    assert there.box[0, 6] == pytest.approx(0.3 + 2.9 - 2 * np.pi, abs=1e-5)
    np.testing.assert_allclose(there.box[0, 7:9], [5 * np.cos(2.9), 5 * np.sin(2.9)], atol=1e-5)
    np.testing.assert_allclose(move_boxes(there, invert_transform(a2b)).box, boxes().box, atol=1e-5)


def test_only_voxels_in_sight_are_scored(truth: Truth) -> None:
    wrong = semantics()
    wrong[:20] = CAR
    results = drive.results_at_keys([Result(int(KEYS[0]), boxes(), volume(wrong))], truth)
    assert drive.score_occupancy(results, truth, NOTHING)["iou"] == 1.0
    wrong[20:, :, 7] = CAR
    results = drive.results_at_keys([Result(int(KEYS[0]), boxes(), volume(wrong))], truth)
    assert drive.score_occupancy(results, truth, NOTHING)["iou"] < 0.5


def test_voxels_of_another_grid_are_not_scored(truth: Truth) -> None:
    shifted = replace(volume(semantics()), grid=replace(GRID, lo=(-20.0, -16.0, -1.0)))
    results = drive.results_at_keys([Result(int(KEYS[0]), boxes(), shifted)], truth)
    with pytest.raises(GridError, match="predicted on .*-20.0.*true ones are on .*-16.0"):
        drive.score_occupancy(results, truth)


def test_incomplete_and_stray_results_are_left_out(truth: Truth) -> None:
    stray = replace(perfect()[0], stamp_ns=int(KEYS[0]) + 95_000_000)
    incomplete = replace(perfect()[1], occupancy=None)
    assert drive.results_at_keys([stray, incomplete], truth) == []
    assert np.isnan(drive.score_occupancy([], truth, NOTHING)["iou"])
