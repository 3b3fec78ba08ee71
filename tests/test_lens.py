"""Lenses against OpenCV's own projection, there and back, and their rectification maps."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from occbev.lens import MAX_FISHEYE_ANGLE, Lens, LensError
from occbev.rig import Camera, RigError

K = np.array([[300.0, 0, 320], [0, 310.0, 240], [0, 0, 1]])
BENT = {
    "none": (),
    "plumb_bob": (-0.3, 0.1, 0.001, -0.002, -0.01),
    "rational_polynomial": (0.9, -0.2, 0.0005, -0.0003, 0.05, 1.2, -0.1, 0.02),
    "equidistant": (0.02, -0.01, 0.003, -0.001),
}
TILTED = (0.9, -0.2, 0.0005, -0.0003, 0.05, 1.2, -0.1, 0.02, 0.001, -0.002, 0.001, 0.0005, 0.01, -0.02)


def rays(most_degrees: float, count: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    angle, turn = np.deg2rad(rng.uniform(0, most_degrees, count)), rng.uniform(0, 2 * np.pi, count)
    return np.column_stack([np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn), np.cos(angle)])


@pytest.mark.parametrize(("model", "coefficients"), [*BENT.items(), ("rational_polynomial", TILTED)])
def test_projection_is_opencvs_and_comes_back(model: str, coefficients: tuple[float, ...]) -> None:
    lens, points = Lens(K, model, coefficients), 7.0 * rays(45)
    pixels, valid = lens.project(points)
    theirs = cv2.fisheye.projectPoints if model == "equidistant" else cv2.projectPoints
    zero = np.zeros(3)
    wanted = theirs(points[:, None], zero, zero, K, np.array(coefficients or (0.0,) * 4))[0].reshape(-1, 2)
    assert valid.all()
    np.testing.assert_allclose(pixels, wanted, atol=1e-6)
    np.testing.assert_allclose(lens.unproject(pixels), points / 7.0, atol=1e-6)


def test_a_fisheye_sees_behind_the_image_plane() -> None:
    lens, points = Lens(K, "equidistant", (0.0, 0.0, 0.0, 0.0)), rays(95)
    pixels, valid = lens.project(points)
    assert valid.all()
    angle = np.arctan2(np.hypot(*points[:, :2].T), points[:, 2])
    np.testing.assert_allclose(np.hypot(*((pixels - K[:2, 2]) / np.diag(K)[:2]).T), angle, atol=1e-9)
    np.testing.assert_allclose(lens.unproject(pixels), points, atol=1e-9)
    assert points[:, 2].min() < -0.05, "some rays must go backwards"
    behind = np.array([[np.sin(MAX_FISHEYE_ANGLE + 0.01), 0, np.cos(MAX_FISHEYE_ANGLE + 0.01)], [0, 0, -1.0]])
    assert not lens.project(behind)[1].any()


def test_directions_where_the_distortion_folds_back_are_not_seen() -> None:
    lens = Lens(K, "plumb_bob", (-0.3, 0.0, 0.0, 0.0, 0.0))
    turn = np.arctan(np.sqrt(1 / 0.9))  # where d/dr (r - 0.3 r^3) is zero
    assert lens.max_angle == pytest.approx(turn)
    for degrees, seen in ((np.rad2deg(turn) - 1, True), (np.rad2deg(turn) + 1, False), (120.0, False)):
        ray = np.array([[np.sin(np.deg2rad(degrees)), 0, np.cos(np.deg2rad(degrees))]])
        pixels, valid = lens.project(ray)
        assert valid.tolist() == [seen]
        assert np.isfinite(pixels).all() == seen
    assert np.isnan(lens.unproject([[320 + 300 * 0.8, 240.0]])).all(), "no ray reaches a radius of 0.8"


def test_zero_coefficients_are_a_pinhole_but_for_a_fisheye() -> None:
    assert Lens(K, "plumb_bob", (0.0,) * 5).is_pinhole
    assert Lens(K, "equidistant").is_pinhole
    assert Lens(K, "equidistant", (0.0,) * 4).is_fisheye


@pytest.mark.parametrize("model", ["plumb_bob", "rational_polynomial", "equidistant"])
def test_rectification_maps_show_what_the_projection_says(model: str) -> None:
    lens, target, size = (
        Lens(K, model, BENT[model]),
        np.diag([150.0, 150, 1]) + [[0, 0, 100], [0, 0, 60], [0, 0, 0]],
        (200, 120),
    )
    across, down = np.meshgrid(np.arange(640, dtype=np.float32), np.arange(480, dtype=np.float32))
    outside = -1000.0
    seen = [
        cv2.remap(ramp, *lens.maps(target, size), cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=outside)
        for ramp in (across, down)
    ]
    pixels = np.stack(np.meshgrid(np.arange(200) + 0.5, np.arange(120) + 0.5), -1)
    wanted = lens.project(Lens(target).unproject(pixels))[0].reshape(120, 200, 2) - 0.5
    inside = np.all((wanted > 1) & (wanted < (638, 478)), axis=-1)
    assert inside.mean() > 0.8
    assert max(np.abs(seen[i] - wanted[..., i])[inside].max() for i in (0, 1)) < 0.05


def test_maps_show_nothing_twice() -> None:
    lens = Lens(K, "plumb_bob", (-0.3, 0.0, 0.0, 0.0, 0.0))
    wide = np.array([[30.0, 0, 100], [0, 30, 60], [0, 0, 1]])
    places, _ = lens.maps(wide, (200, 120))
    assert (places[60, 99 - np.array([10, 30])] > 0).all()
    assert (places[60, [0, 199]] < -1000).all(), "the border looks 73 degrees aside, the lens folds back at 46"


@pytest.mark.parametrize(
    ("model", "coefficients", "text"),
    [
        ("omni", (0.1,) * 4, "known are none, plumb_bob, rational_polynomial, equidistant"),
        ("plumb_bob", (0.1,) * 3, "takes 4 or 5 coefficients, got 3"),
        ("equidistant", (float("nan"), 0, 0, 0), "must be finite"),
    ],
)
def test_lenses_that_are_refused(model: str, coefficients: tuple[float, ...], text: str) -> None:
    with pytest.raises(LensError, match=text):
        Lens(K, model, coefficients)
    with pytest.raises(RigError, match=f"camera FRONT: .*{text}"):
        Camera("FRONT", 640, 480, K, np.eye(4), model, coefficients)
