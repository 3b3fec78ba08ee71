"""A moment's picture shows boxes where they are; prediction and truth stand side by side over the same voxels."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from occbev.classes import FREE, FREE_STATE, OCCUPANCY_CLASSES, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.geometry import make_transform
from occbev.grid import GRIDS
from occbev.reports.moments import Moment
from occbev.reports.report import Scene
from occbev.reports.scenes import compose_scene, cover_picture, occupancy_of_truth
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
    return Moment(1_500_000_000, {"CAM_FRONT": black}, rig, boxes(score), Boxes3D.empty(), predicted, truth)


def cameras_of(scene: Scene) -> np.ndarray:
    ((_, picture),) = scene.rows[0]
    return picture


def test_a_scene_has_cameras_and_both_volumes() -> None:
    scene = compose_scene(moment(), 1.5)
    assert scene.time == 1.5
    assert cameras_of(scene).dtype == np.uint8
    assert [panel.title for panel in scene.panels] == ["Prediction", "Truth"]
    assert scene.panels[0].occupancy is not scene.panels[1].occupancy
    for panel in scene.panels:
        np.testing.assert_array_equal(panel.known, moment().true_occupancy.state != UNOBSERVED_STATE)


def test_without_truth_the_prediction_stands_alone() -> None:
    bare = replace(moment(), true_boxes=None, true_occupancy=None)
    (panel,) = compose_scene(bare, 0.0).panels
    assert panel.known is None
    assert cover_picture(bare).shape[0] > cameras_of(compose_scene(bare, 0.0)).shape[0]


def test_a_moment_without_rig_or_images_is_shown_as_far_as_it_is_known() -> None:
    assert compose_scene(replace(moment(), images={}), 0.0).rows == ()
    assert not cameras_of(compose_scene(replace(moment(), rig=None), 0.0))[60:170, 100:400].any()


def test_encoded_images_are_drawn_like_arrays() -> None:
    png = cv2.imencode(".png", moment().images["CAM_FRONT"])[1].tobytes()
    encoded = replace(moment(), images={"CAM_FRONT": png})
    np.testing.assert_array_equal(cameras_of(compose_scene(encoded, 0.0)), cameras_of(compose_scene(moment(), 0.0)))


def test_the_cover_has_the_cameras_above_the_voxels() -> None:
    cover, cameras = cover_picture(moment()), cameras_of(compose_scene(moment(), 1.5))
    np.testing.assert_array_equal(cover[: len(cameras)], cameras)
    assert cover.shape == (len(cameras) + 420, cameras.shape[1], 3)


def test_the_cover_shows_a_prediction_only_where_the_truth_is_known() -> None:
    known = cover_picture(moment())
    dense = cover_picture(replace(moment(), true_occupancy=None, true_boxes=None))
    amount = [(np.abs(cover[-420:, :720].astype(int) - 250).sum(-1) > 60).sum() for cover in (known, dense)]
    assert amount[0] < 0.8 * amount[1]


def test_a_sure_box_is_drawn_and_a_doubtful_one_is_not() -> None:
    sure, doubtful = (cameras_of(compose_scene(moment(score), 0.0)).astype(int) for score in (0.9, 0.1))
    changed = np.argwhere(np.abs(sure - doubtful).sum(-1) > 60)
    assert len(changed) > 50
    middle = changed.mean(0) / sure.shape[:2]
    assert abs(middle[1] - 0.5 / 3) < 0.05, "the box stands in the middle of the first of three columns"


def test_truth_is_known_only_where_it_is_visible() -> None:
    truth = moment().true_occupancy
    assert (truth.state[:20] == UNOBSERVED_STATE).all()
    assert truth.state[32, 20, 2] == OCCUPIED_STATE
    assert truth.state[25, 5, 5] == FREE_STATE
