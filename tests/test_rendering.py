"""Pictures by coarse facts: where a thing is drawn and in which colour, never their bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from occbev.classes import DETECTION_CLASSES, DETECTION_COLOURS, FREE, OCCUPANCY_COLOURS
from occbev.geometry import make_transform
from occbev.grid import VoxelGrid
from occbev.reports.rendering import (
    GROUND_TRUTH,
    PAPER,
    UNSEEN,
    BoxStyle,
    View,
    beside,
    bev_picture,
    camera_mosaic,
    depth_colours,
    draw_boxes,
    draw_points,
    draw_voxels,
    legend,
    occupancy_from_above,
    occupancy_in_3d,
    stack_pictures,
    write_moving_picture,
    write_picture,
)
from occbev.results import Boxes3D, Occupancy
from occbev.rig import Camera

FORWARD = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
CAMERA = Camera(
    "front",
    320,
    180,
    [[200, 0, 160], [0, 200, 90], [0, 0, 1]],
    make_transform(FORWARD, [0, 0, 1.5]),
)
GREY = np.full((180, 320, 3), 90, np.uint8)
GRID = VoxelGrid((-8.0, -8.0, -1.0), (0.5, 0.5, 0.5), (32, 32, 6))
CAR, WALKER = DETECTION_CLASSES.index("car"), DETECTION_CLASSES.index("pedestrian")


def boxes(*rows: tuple[float, ...], label: int = CAR) -> Boxes3D:
    return Boxes3D(np.array(rows, np.float32), np.full(len(rows), label), np.full(len(rows), 0.8, np.float32))


def occupancy(*voxels: tuple[int, int, int], label: int = 4) -> Occupancy:
    labels = np.full(GRID.shape, FREE, np.uint8)
    state = np.ones(GRID.shape, np.uint8)
    for voxel in voxels:
        labels[voxel], state[voxel] = label, 2
    return Occupancy(labels, np.ones(GRID.shape, np.float32), state, GRID)


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Middle (column, row) of what differs."""
    rows, columns = np.nonzero((before != after).any(-1))
    assert len(rows), "nothing was drawn"
    return np.array([(columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2])


def test_a_box_is_drawn_where_it_projects_in_its_colour() -> None:
    box = (12.0, 2.0, 1.5, 0.5, 1.0, 1.0, 0.0, 0, 0)
    picture = draw_boxes(GREY, CAMERA, boxes(box))
    np.testing.assert_allclose(changed(GREY, picture), CAMERA.project([box[:3]])[0][0], atol=2)
    assert (picture == DETECTION_COLOURS[CAR]).all(-1).any()
    assert not (GREY != 90).any(), "the image given is left alone"


@pytest.mark.parametrize("style", [BoxStyle(), GROUND_TRUTH, BoxStyle(labels=True)])
def test_boxes_behind_and_around_the_camera_do_no_harm(style: BoxStyle) -> None:
    behind = boxes((-9.0, 0, 1, 4, 2, 1.5, 0, 0, 0))
    np.testing.assert_array_equal(draw_boxes(GREY, CAMERA, behind, style), GREY)
    around = boxes((0.5, 0, 1.5, 30, 2, 1.5, 0.1, 0, 0), (1e6, 0, 1, 4, 2, 1.5, 0, 0, 0))
    assert (draw_boxes(GREY, CAMERA, around, style) != GREY).any()
    np.testing.assert_array_equal(draw_boxes(GREY, CAMERA, Boxes3D.empty(), style), GREY)


def test_dashes_leave_gaps() -> None:
    box = boxes((8.0, 0, 1.5, 4, 2, 2, 0.3, 0, 0))
    solid_style = BoxStyle((255, 255, 255), thickness=1)
    solid, dashed = (
        (draw_boxes(GREY, CAMERA, box, style)[..., 0] > 190).sum() for style in (solid_style, GROUND_TRUTH)
    )
    assert 0.2 * solid < dashed < 0.85 * solid


def test_points_are_drawn_where_they_project_near_ones_red() -> None:
    point = np.array([[10.0, -1.0, 2.0]])
    picture = draw_points(GREY, CAMERA, point)
    np.testing.assert_allclose(changed(GREY, picture), CAMERA.project(point)[0][0], atol=1)
    np.testing.assert_array_equal(draw_points(GREY, CAMERA, -point), GREY)
    near, far = depth_colours([3.0, 40.0], (2.0, 50.0)).astype(int)
    assert near[0] > near[2]
    assert far[2] > far[0]


def test_voxels_are_drawn_where_they_project() -> None:
    voxel = (30, 16, 5)
    picture = draw_voxels(GREY, CAMERA, occupancy(voxel), opacity=1)
    np.testing.assert_allclose(changed(GREY, picture), CAMERA.project([GRID.centres(voxel)])[0][0], atol=1.5)
    assert (picture == OCCUPANCY_COLOURS[4]).all(-1).sum() > 20


def test_a_fisheye_shows_what_is_beside_it_as_small_as_it_is_far() -> None:
    """At 90 degrees from the optical axis the depth is 0: the distance counts, for sizes, colours and order."""
    wide = replace(CAMERA, intrinsic=[[80, 0, 160], [0, 80, 90], [0, 0, 1]], distortion_model="equidistant")
    wide = replace(wide, distortion=(0.0,) * 4)
    beside_it = np.array([0.25, 7.25, 1.75])
    colours = draw_points(GREY, wide, beside_it[None]).astype(int)
    wanted = depth_colours([np.linalg.norm(beside_it - [0, 0, 1.5])], (2.0, 50.0))[0]
    assert np.abs(colours - wanted).sum(-1).min() < 10
    voxel = tuple(GRID.indices(beside_it[None])[0][0].tolist())
    drawn = (draw_voxels(GREY, wide, occupancy(voxel), opacity=1) != GREY).any(-1)
    assert 10 < drawn.sum() < 60, "80 pixels * 0.5 m / 7 m make 6 pixels, squared"


def test_bev_has_x_up_and_y_left() -> None:
    empty = bev_picture(Boxes3D.empty(), size=400, reach=40)
    ahead_left = bev_picture(boxes((20.0, 10.0, 1, 4, 2, 1.5, 0, 0, 0)), size=400, reach=40)
    np.testing.assert_allclose(changed(empty, ahead_left), [150, 100], atol=2)
    moving = bev_picture(boxes((20.0, 10.0, 1, 4, 2, 1.5, 0, 6, 0)), size=400, reach=40)
    assert changed(empty, moving)[1] < 95, "a second of motion ahead of the box"
    with_truth = bev_picture(
        Boxes3D.empty(), boxes((-20.0, -10.0, 1, 4, 2, 1.5, 0, np.nan, np.nan)), size=400, reach=40
    )
    np.testing.assert_allclose(changed(empty, with_truth), [250, 300], atol=2)


def test_bev_over_occupancy_places_the_grid() -> None:
    plain, over = (
        bev_picture(Boxes3D.empty(), occupancy=o, size=400, reach=10) for o in (None, occupancy((31, 31, 1)))
    )
    assert changed(plain, over)[0] < 60
    larger = bev_picture(Boxes3D.empty(), occupancy=occupancy((31, 31, 1)), size=400, reach=4)
    assert larger.shape == (400, 400, 3)


def test_from_above_shows_the_topmost_class_and_the_unseen() -> None:
    volume = occupancy((31, 31, 1))
    volume.label[31, 31, 3], volume.state[31, 31, 3] = 16, 2
    volume.state[0, 0] = 0
    picture = occupancy_from_above(volume, 320)
    ahead_left, behind_right = picture[5, 5].astype(float), picture[-5, -5]
    np.testing.assert_allclose(
        ahead_left / ahead_left.sum(),
        OCCUPANCY_COLOURS[16] / OCCUPANCY_COLOURS[16].sum(),
        atol=0.02,
    )
    np.testing.assert_array_equal(behind_right, UNSEEN)
    np.testing.assert_array_equal(picture[40, 160], PAPER)


def test_3d_draws_voxels_where_the_view_projects_them_and_hides_the_covered() -> None:
    view = View()
    voxel = (20, 4, 3)
    blank = occupancy_in_3d(occupancy(), 320, 200, view)
    picture = occupancy_in_3d(occupancy(voxel), 320, 200, view)
    np.testing.assert_allclose(
        changed(blank, picture),
        view.camera(320, 200).project([GRID.centres(voxel)])[0][0],
        atol=1.5,
    )
    tower = occupancy((20, 4, 3), (20, 4, 4))
    tower.label[20, 4, 4] = 16
    top = occupancy_in_3d(tower, 320, 200, replace(view, eye=(1.9, -6.0, 20.0), target=(2.2, -5.8, 0)))
    assert not (np.abs(top.astype(int) - OCCUPANCY_COLOURS[4]).sum(-1) < 60).any(), "the lower voxel is covered"


def test_compositions_keep_their_parts() -> None:
    red, blue = (
        np.full((90, 160, 3), (200, 0, 0), np.uint8),
        np.full((45, 80, 3), (0, 0, 200), np.uint8),
    )
    mosaic = camera_mosaic({"a": red, "b": blue, "c": red, "d": blue}, width=480)
    assert mosaic.shape == (180, 480, 3)
    assert tuple(mosaic[60, 240]) == (0, 0, 200)
    assert tuple(mosaic[150, 400]) == PAPER
    pair = beside({"left": red, "right": blue})
    assert pair.shape == (124, 160 + 12 + 160, 3)
    column = stack_pictures([pair, red, legend([4, 11, 16], 160)])
    assert column.shape[1] == pair.shape[1]


def test_animations_repeat_at_their_rate_in_rgb(tmp_path: Path) -> None:
    if not hasattr(cv2, "imwriteanimation"):
        pytest.skip("OpenCV before 4.12")
    pictures = [np.full((40, 80, 3), colour, np.uint8) for colour in ((200, 30, 30), (30, 30, 200))]
    path = str(tmp_path / "two.webp")
    write_moving_picture(path, pictures, rate=5, width=64)
    read, animation = cv2.imreadanimation(path)
    assert read
    assert (animation.loop_count, list(animation.durations)) == (0, [200, 200])
    assert [frame.shape[:2] for frame in animation.frames] == [(32, 64)] * 2
    first, second = (frame[16, 32, :3].astype(int) for frame in animation.frames)
    assert first[2] > 150 > first[0]
    assert second[0] > 150 > second[2]
    with pytest.raises(ValueError, match="want at least one, and a .webp"):
        write_moving_picture(str(tmp_path / "two.mp4"), pictures, 5, 64)


def test_written_pictures_are_rgb(tmp_path: Path) -> None:
    import cv2

    picture = np.zeros((4, 4, 3), np.uint8)
    picture[..., 0] = 200
    write_picture(str(tmp_path / "red.png"), picture)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "red.png"))[..., ::-1], picture)
    with pytest.raises(OSError, match="cannot write"):
        write_picture(str(tmp_path / "nowhere" / "red.png"), picture)
