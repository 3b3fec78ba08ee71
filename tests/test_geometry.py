"""Laws of transforms, quaternions, projection and boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from occbev.geometry import (
    box_corners,
    invert_transform,
    make_transform,
    points_in_box,
    project_points,
    rotation_from_rpy,
    rotation_from_wxyz,
    rotation_from_xyzw,
    rotation_from_yaw,
    transform_points,
    wrap_angle,
    wxyz_from_rotation,
    xyzw_from_rotation,
    yaw_from_rotation,
)

quaternions = arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1)


@given(quaternions)
def test_quaternion_and_rotation_are_inverse_of_each_other(q: np.ndarray) -> None:
    rotation = rotation_from_wxyz(q / np.linalg.norm(q))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(rotation_from_wxyz(wxyz_from_rotation(rotation)), rotation, atol=1e-12)
    np.testing.assert_allclose(rotation_from_xyzw(xyzw_from_rotation(rotation)), rotation, atol=1e-12)


def test_quaternion_orders_are_what_their_names_say() -> None:
    half = np.sqrt(0.5)  # a quarter turn about +z carries x to y
    for rotation in (
        rotation_from_wxyz([half, 0, 0, half]),
        rotation_from_xyzw([0, 0, half, half]),
    ):
        np.testing.assert_allclose(rotation @ [1, 0, 0], [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize("bad", [[0, 0, 0, 0], [np.nan, 0, 0, 1], [2, 0, 0, 0]])
def test_quaternion_that_is_no_rotation_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="not a unit quaternion"):
        rotation_from_wxyz(bad)


def test_inverse_undoes_a_transform_and_stacks() -> None:
    a2b = make_transform(rotation_from_rpy(0.1, -0.2, 0.3), [1, 2, 3])
    points = np.random.default_rng(0).normal(size=(5, 3))
    back = transform_points(invert_transform(a2b), transform_points(a2b, points))
    np.testing.assert_allclose(back, points, atol=1e-12)
    stacked = invert_transform(np.stack([a2b, np.eye(4)]))
    np.testing.assert_allclose(stacked[0] @ a2b, np.eye(4), atol=1e-12)


@given(st.floats(-50, 50))
def test_wrapped_angle_keeps_the_direction_and_the_half_open_range(angle: float) -> None:
    wrapped = float(wrap_angle(angle))
    assert -np.pi < wrapped <= np.pi
    assert np.cos(wrapped) == pytest.approx(np.cos(angle), abs=1e-9)
    assert np.sin(wrapped) == pytest.approx(np.sin(angle), abs=1e-9)


def test_yaw_of_a_yaw_rotation() -> None:
    assert yaw_from_rotation(rotation_from_yaw(2.5)) == pytest.approx(2.5)
    assert yaw_from_rotation(rotation_from_rpy(0.0, 0.1, -1.0)) == pytest.approx(-1.0)


def test_point_on_the_optical_axis_lands_on_the_principal_point() -> None:
    intrinsic = np.array([[500.0, 0, 320], [0, 500, 180], [0, 0, 1]])
    pixels, depth = project_points([[0, 0, 7], [1, -1, 10]], intrinsic)
    np.testing.assert_allclose(pixels, [[320, 180], [370, 130]])
    np.testing.assert_allclose(depth, [7, 10])


def test_points_at_zero_depth_stay_finite() -> None:
    pixels, _ = project_points([[1.0, 1.0, 0.0]], np.eye(3))
    assert np.isfinite(pixels).all()


@settings(max_examples=30)
@given(st.floats(-3.1, 3.1))
def test_box_corners_are_the_extremes_of_the_box(yaw: float) -> None:
    box = np.array([1.0, 2.0, 0.5, 4.0, 2.0, 1.5, yaw])
    corners = box_corners(box[None])[0]
    np.testing.assert_allclose(corners.mean(0), box[:3], atol=1e-9)
    inner = box[:3] + 0.999 * (corners - box[:3])
    outer = box[:3] + 1.001 * (corners - box[:3])
    assert points_in_box(inner, box).all()
    assert not points_in_box(outer, box).any()
    front = corners[:4].mean(0) - box[:3]  # the front face lies along the heading
    assert np.arctan2(front[1], front[0]) == pytest.approx(yaw, abs=1e-9)


def test_no_boxes_have_no_corners() -> None:
    assert box_corners(np.zeros((0, 9))).shape == (0, 8, 3)
