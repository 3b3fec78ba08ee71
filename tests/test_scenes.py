"""A moment's pictures show boxes where they are, prediction and truth over the same voxels."""

from __future__ import annotations

import numpy as np

from occbev.classes import FREE, FREE_STATE, OCCUPANCY_CLASSES, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.geometry import make_transform
from occbev.grid import GRIDS
from occbev.reports.report import Scene
from occbev.reports.scenes import Moment, compose_scene, cover_picture, occupancy_of_truth
from occbev.results import Boxes3D, Occupancy
from occbev.rig import Camera, CameraRig

GRID = GRIDS["tiny"]
FORWARD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
CAR = OCCUPANCY_CLASSES.index("car")


def camera() -> Camera:
    intrinsic = np.array([[160.0, 0, 160], [0, 160.0, 90], [0, 0, 1]])
    return Camera("CAM_FRONT", 320, 180, intrinsic, make_transform(FORWARD, [0.0, 0, 1.5]))


def boxes(score: float) -> Boxes3D:
    box = np.array([[10, 0, 0.8, 4.5, 1.9, 1.6, 0, 0, 0]], np.float32)
    return Boxes3D(box, np.zeros(1, np.int64), np.full(1, score, np.float32))


def moment(score: float = 0.9) -> Moment:
    semantics = np.full(GRID.shape, FREE, np.uint8)
    semantics[30:34, 18:22, 1:3] = CAR
    visible = np.zeros(GRID.shape, bool)
    visible[20:] = True
    truth = occupancy_of_truth(semantics, visible, GRID)
    predicted = Occupancy(
        np.full(GRID.shape, CAR, np.uint8),
        np.ones(GRID.shape, np.float32),
        np.full(GRID.shape, OCCUPIED_STATE, np.uint8),
        GRID,
    )
    black = np.zeros((180, 320, 3), np.uint8)
    rig = CameraRig((camera(),))
    return Moment(1.5, {"CAM_FRONT": black}, rig, boxes(score), Boxes3D.empty(), predicted, truth)


def pictures(scene: Scene) -> dict[str, np.ndarray]:
    return {caption: picture for row in scene.rows for caption, picture in row}


def test_a_scene_has_cameras_plane_and_both_volumes() -> None:
    scene = compose_scene(moment())
    assert scene.time == 1.5
    assert [len(row) for row in scene.rows] == [1, 3, 2]
    assert all(p.dtype == np.uint8 and p.shape[2] == 3 for p in pictures(scene).values())


def test_the_cover_has_the_cameras_above_the_voxels() -> None:
    scene = compose_scene(moment())
    cover = cover_picture(scene)
    cameras = scene.rows[0][0][1]
    np.testing.assert_array_equal(cover[: len(cameras)], cameras)
    assert cover.shape == (len(cameras) + len(scene.rows[-1][0][1]), cameras.shape[1], 3)


def test_a_sure_box_is_drawn_and_a_doubtful_one_is_not() -> None:
    sure, doubtful = (next(iter(pictures(compose_scene(moment(score))).values())).astype(int) for score in (0.9, 0.1))
    changed = np.argwhere(np.abs(sure - doubtful).sum(-1) > 60)
    assert len(changed) > 50
    middle = changed.mean(0) / sure.shape[:2]
    assert abs(middle[1] - 0.5 / 3) < 0.05, "the box stands in the middle of the first of three columns"


def test_truth_is_known_only_where_it_is_visible() -> None:
    truth = moment().true_occupancy
    assert (truth.state[:20] == UNOBSERVED_STATE).all()
    assert truth.state[32, 20, 2] == OCCUPIED_STATE
    assert truth.state[25, 5, 5] == FREE_STATE


def test_a_prediction_is_shown_only_where_the_truth_is_known() -> None:
    shown = pictures(compose_scene(moment()))["Published voxels from above"]
    behind, ahead = (
        shown[-100:, :200],
        shown[:100, :200],
    )  # x is up: what lies behind was not visible
    assert np.abs(behind.astype(int).mean((0, 1)) - ahead.astype(int).mean((0, 1))).sum() > 60
