"""Identities of boxes: crossing objects, missed boxes, the vehicle's own motion, and what begins anew."""

from __future__ import annotations

import numpy as np
import pytest

from occbev.classes import DETECTION_CLASSES
from occbev.geometry import invert_transform
from occbev.inference.tracking import GROUP_OF_LABEL, GROUPS, Tracker, position_covariance
from occbev.results import Boxes3D

CAR, TRUCK, PEDESTRIAN = (DETECTION_CLASSES.index(name) for name in ("car", "truck", "pedestrian"))
PERIOD_NS = 200_000_000
STANDING = np.eye(4)


def boxes_at(places: np.ndarray, label: int | list[int] = CAR, velocity: np.ndarray | None = None) -> Boxes3D:
    """Boxes (M, 9) with centres (M, 2)."""
    box = np.zeros((len(places), 9), np.float32)
    box[:, :2], box[:, 3:6] = places, (4.5, 1.9, 1.6)
    if velocity is not None:
        box[:, 7:9] = velocity
    return Boxes3D(box, np.broadcast_to(label, len(places)).astype(np.int64), np.full(len(places), 0.9, np.float32))


def driving(step: int, speed: float = 8.0, turn: float = 0.25) -> np.ndarray:
    """Pose of a vehicle on a circle after so many periods: speed in m/s, turn in rad/s."""
    yaw = turn * step * PERIOD_NS / 1e9
    pose, radius = np.eye(4), speed / turn
    pose[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    pose[:2, 3] = radius * np.sin(yaw), radius * (1 - np.cos(yaw))
    return pose


def seen_from(places: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Places (M, 2) of the fixed frame in base_link."""
    points = np.column_stack([places, np.zeros(len(places)), np.ones(len(places))])
    return (points @ invert_transform(pose).T)[:, :2]


def ids_of(tracker: Tracker, step: int, boxes: Boxes3D, pose: np.ndarray | None = STANDING) -> list[int]:
    track = tracker.update(boxes, 1 + step * PERIOD_NS, pose).track
    assert track is not None
    return track.tolist()


@pytest.mark.parametrize("label", [CAR, PEDESTRIAN])
def test_crossing_objects_keep_their_ids(label: int) -> None:
    """Two that meet at a right angle at the same time, in shuffled order and with noise."""
    random, tracker, found = np.random.default_rng(3), Tracker(), []
    speed = 6.0 if label == CAR else 1.4
    for step in range(21):
        way = speed * (step - 10) * PERIOD_NS / 1e9
        places = np.array([[12 + way, 0.5], [12, way - 0.5]]) + random.normal(0, 0.1, (2, 2))
        order = [0, 1] if step % 2 else [1, 0]
        ids = ids_of(tracker, step, boxes_at(places[order], label))
        found.append((ids[order.index(0)], ids[order.index(1)]))
    assert set(found) == {found[0]}
    assert found[0][0] != found[0][1]


def test_nearest_boxes_alone_would_swap_them() -> None:
    """The two above come nearer to the other's last box than to their own: a filter without velocity would fail."""
    way = 6.0 * PERIOD_NS / 1e9
    before, after = np.array([[12 - way, 0.5], [12, -way - 0.5]]), np.array([[12.0, 0.5], [12.0, -0.5]])
    assert np.linalg.norm(after[0] - before[1]) > np.linalg.norm(after[0] - before[0]) == pytest.approx(way)
    assert np.linalg.norm(after[0] - after[1]) < way


def test_oncoming_traffic_keeps_its_ids() -> None:
    tracker, found = Tracker(), []
    for step in range(16):
        way = 14.0 * step * PERIOD_NS / 1e9
        places = np.array([[40 - way, 1.75], [-5 + way, -1.75]])
        found.append(tuple(ids_of(tracker, step, boxes_at(places))))
    assert set(found[1:]) == {found[-1]}
    assert found[0] == found[-1], "the second box of a track lies 2.8 m from the first"


def test_an_id_survives_missed_boxes_for_a_second_and_not_longer() -> None:
    tracker = Tracker()
    at = [np.array([[10 + 5.0 * step * PERIOD_NS / 1e9, 2.0]]) for step in range(30)]
    first = ids_of(tracker, 0, boxes_at(at[0]))
    assert ids_of(tracker, 1, boxes_at(at[1])) == first
    assert ids_of(tracker, 2, boxes_at(at[2])) == first
    for step in (3, 4, 5):
        assert ids_of(tracker, step, Boxes3D.empty()) == []
    assert ids_of(tracker, 6, boxes_at(at[6])) == first
    for step in range(7, 13):
        ids_of(tracker, step, Boxes3D.empty())
    assert ids_of(tracker, 13, boxes_at(at[13])) != first


def test_the_vehicles_own_motion_moves_no_track() -> None:
    parked = np.array([[15.0, 6.0], [22.0, 5.0], [29.0, 12.0], [18.0, -9.0]])
    with_pose, without, kept = Tracker(), Tracker(), []
    for step in range(12):
        pose = driving(step)
        boxes = boxes_at(seen_from(parked, pose))
        kept.append(tuple(ids_of(with_pose, step, boxes, pose)))
        last = ids_of(without, step, boxes, None)
    assert set(kept) == {(1, 2, 3, 4)}
    velocities = with_pose._tracks.mean[:, 2:]
    np.testing.assert_allclose(velocities, 0, atol=0.2)
    speeds = np.linalg.norm(without._tracks.mean[:, 2:], axis=1)
    assert speeds.min() > 4, f"without poses what stands seems to drive; ids {last}"


def test_the_velocity_of_a_box_turns_with_the_vehicle() -> None:
    pose = driving(20)
    boxes = boxes_at(np.array([[10.0, 0.0]]), velocity=np.array([[7.0, 0.0]]))
    tracker = Tracker()
    ids_of(tracker, 0, boxes, pose)
    np.testing.assert_allclose(tracker._tracks.mean[0, 2:], 7 * pose[:2, 0], atol=1e-5)


def test_a_truck_may_become_a_car_but_not_a_pedestrian() -> None:
    tracker, place = Tracker(), np.array([[12.0, 1.0]])
    first = ids_of(tracker, 0, boxes_at(place, TRUCK))
    assert ids_of(tracker, 1, boxes_at(place, CAR)) == first
    assert ids_of(tracker, 2, boxes_at(place, PEDESTRIAN)) != first
    assert sorted(name for group in GROUPS for name in group) == sorted(DETECTION_CLASSES)
    assert len(GROUP_OF_LABEL) == len(DETECTION_CLASSES)


def test_ids_begin_anew_after_a_step_back_and_are_never_used_again() -> None:
    tracker, place = Tracker(), boxes_at(np.array([[12.0, 1.0]]))
    assert [ids_of(tracker, step, place) for step in (5, 6, 2, 3)] == [[1], [1], [2], [2]]
    tracker.restart()
    assert ids_of(tracker, 4, place) == [3]
    assert ids_of(tracker, 5, place, None) == [4], "poses ended: the frame is another"


def test_many_boxes_each_have_an_id_of_their_own() -> None:
    random, tracker = np.random.default_rng(0), Tracker()
    places = random.uniform(-45, 45, (100, 2))
    for step in range(3):
        ids = ids_of(tracker, step, boxes_at(places + random.normal(0, 0.1, places.shape)))
        assert len(set(ids)) == 100


def test_cameras_err_along_the_line_of_sight() -> None:
    ahead, aside = position_covariance(np.array([[40.0, 0.0, 1.0], [0.0, 40.0, 1.0]]))
    assert ahead[0, 0] > 20 * ahead[1, 1]
    np.testing.assert_allclose(ahead[::-1, ::-1], aside)
    assert np.linalg.eigvalsh(position_covariance(np.zeros((1, 3)))[0]).min() > 0


def test_a_selection_of_boxes_keeps_their_ids() -> None:
    boxes = Tracker().update(boxes_at(np.array([[9.0, 0.0], [20.0, 3.0]])), 1, None)
    assert boxes[boxes.box[:, 0] > 10].track.tolist() == [2]
    assert boxes_at(np.zeros((1, 2)))[:1].track is None
