"""Networks see through any central lens by its own rays, and the crop keeps the horizon."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from occbev.config import ConfigError, ImageConfig, LiftConfig
from occbev.geometry import make_transform, rotation_from_rpy, transform_points
from occbev.grid import BevGrid, VoxelGrid
from occbev.inference.families import family_of
from occbev.inference.families.bevformer import BevFormerModel
from occbev.inference.families.detr3d import Detr3dModel
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.postprocess import voxels_in_view
from occbev.inference.preprocess import Fit, Preprocessor, SeenRows, horizon_row, network_camera, seen_rows
from occbev.inference.reference_points import see_points
from occbev.inference.tables import frustum_points, lift_points, ray_table
from occbev.lens import MATRIX_COLUMNS, Lens
from occbev.results import CameraFrame
from occbev.rig import Camera, CameraRig

OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
KEEP = ImageConfig(width=352, height=128, lens="keep")
LENSES = {
    "fisheye of 190 degrees": ("equidistant", (0.02, -0.005, 0.001, 0.0), 100.0),
    "Kannala-Brandt": ("equidistant", (0.1, -0.02, 0.003, -0.0002), 100.0),
    "rational": ("rational_polynomial", (0.3, 0.05, 0.0, 0.0, 0.002, 0.6, 0.1, 0.01), 180.0),
    "none": ("none", (), 180.0),
}


def camera(
    lens: str = "none", pitch_deg: float = 0.0, yaw_deg: float = 30.0, size: tuple[int, int] = (480, 360)
) -> Camera:
    model, coefficients, focal = LENSES[lens]
    turn = rotation_from_rpy(0, np.deg2rad(pitch_deg), np.deg2rad(yaw_deg)) @ OPTICAL
    optics = [[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1]]
    return Camera("eye", *size, np.array(optics), make_transform(turn, [1.0, 0.2, 1.2]), model, coefficients)


@pytest.mark.parametrize("lens", LENSES)
def test_a_lens_survives_as_a_matrix_and_under_an_image_warp(lens: str) -> None:
    own = camera(lens).lens
    matrix = own.as_matrix()
    assert matrix.shape == (3, MATRIX_COLUMNS)
    warp = np.array([[-0.7, 0.05, 300], [0.02, 0.8, -20], [0, 0, 1]])  # mirrored, scaled, turned a little
    points = np.random.default_rng(0).normal(size=(50, 3)) + [0, 0, 2]
    pixels, seen = own.project(points)
    again, seen_again = Lens.from_matrix(warp @ matrix).project(points)
    np.testing.assert_array_equal(seen, seen_again)
    np.testing.assert_allclose(again[seen], pixels[seen] @ warp[:2, :2].T + warp[:2, 2], atol=1e-6)


def rolled(upright: Camera, quarters: int) -> Camera:
    """Return a camera whose images must be turned clockwise by so many quarters to be those of `upright`."""
    return upright.turn(-quarters % 4)


TANGENTIAL = {
    "plumb_bob": (-0.2, 0.05, 0.01, -0.02, 0.003),
    "rational_polynomial": (0.3, 0.05, 0.01, -0.02, 0.002, 0.6, 0.1, 0.01, 0.004, 0.002, -0.006, 0.001),
    "equidistant": (0.02, -0.005, 0.001, 0.0),
    "none": (),
}


@pytest.mark.parametrize("quarters", [1, 2, 3])
@pytest.mark.parametrize("model", TANGENTIAL)
def test_the_camera_of_a_turned_image_sees_points_where_they_are_turned_to(model: str, quarters: int) -> None:
    optics = np.array([[180.0, 0, 250], [0, 170, 150], [0, 0, 1]])
    source = replace(camera(), intrinsic=optics, distortion_model=model, distortion=TANGENTIAL[model])
    points = np.random.default_rng(0).uniform(-10, 10, (500, 3))
    (pixels, away, inside), turned = source.project(points), source.turn(quarters)
    found, away_turned, inside_turned = turned.project(points)
    np.testing.assert_array_equal(inside, inside_turned)
    for _ in range(quarters):
        pixels = np.column_stack([-pixels[:, 1], pixels[:, 0]])
    corner = {1: (source.height, 0), 2: (source.width, source.height), 3: (0, source.width)}[quarters]
    np.testing.assert_allclose(found[inside], pixels[inside] + corner, atol=1e-9)
    np.testing.assert_allclose(away, away_turned)


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("config", [ImageConfig(), KEEP], ids=["rectify", "keep"])
@pytest.mark.parametrize("lens", LENSES)
def test_images_of_a_rolled_camera_are_turned_upright(lens: str, config: ImageConfig, quarters: int) -> None:
    """A camera mounted on its head or on its side gives the network what it would give on its feet."""
    upright = camera(lens, pitch_deg=8)
    image = np.random.default_rng(1).integers(0, 255, (upright.height, upright.width, 3), np.uint8)
    mounted = rolled(upright, quarters)
    assert mounted.quarter_turns == quarters
    wanted, network = Preprocessor(config).network_image(image, upright)
    pixels, found = Preprocessor(config).network_image(np.ascontiguousarray(np.rot90(image, quarters)), mounted)
    np.testing.assert_array_equal(pixels, wanted)
    for got in (found, network_camera(mounted, config)):
        np.testing.assert_allclose(got.cam2ego, network.cam2ego, atol=1e-12)
        np.testing.assert_allclose(got.intrinsic, network.intrinsic, atol=1e-9)
    rows, known = SeenRows.of(mounted, config), SeenRows.of(upright, config)
    assert replace(rows, turned=0, horizon=None) == replace(known, horizon=None)
    assert rows.turned == 90 * quarters
    assert ("turned by" in str(rows)) == bool(quarters)


def test_a_camera_that_looks_down_or_is_tilted_is_not_turned() -> None:
    assert camera(pitch_deg=80).turn(2).quarter_turns == 0, "nothing tells which side is up"
    tilted = replace(
        camera().turn(2),
        distortion_model="rational_polynomial",
        distortion=(*TANGENTIAL["rational_polynomial"], 0.1, 0),
    )
    assert tilted.quarter_turns == 0, "its coefficients cannot be turned"


def test_images_on_their_side_are_decoded_no_smaller_than_the_network_needs() -> None:
    mounted = rolled(camera(size=(1600, 1200)), 1)
    data = cv2.imencode(".jpg", np.zeros((mounted.height, mounted.width, 3), np.uint8))[1].tobytes()
    decoded = Preprocessor(ImageConfig()).decode(CameraFrame("eye", 0, data, None), mounted)
    assert np.shape(decoded.image) == (800, 600, 3)


@pytest.mark.parametrize("lens", LENSES)
def test_frusta_lie_on_the_rays_that_a_lens_sees_them_by(lens: str) -> None:
    source = camera(lens, pitch_deg=10)
    network = network_camera(source, KEEP)
    assert network.distortion_model == source.distortion_model
    lift, size = LiftConfig(), (KEEP.width, KEEP.height)
    rig = CameraRig((network,))
    points = frustum_points(rig.lens_matrices, rig.cam2egos, size, lift)[0]  # (D, h, w, 3)
    known = np.isfinite(points).all(-1)
    assert known.mean() > 0.6, "the rest lies outside the circle that the lens shows"
    columns, rows = np.meshgrid(np.arange(22) * 16 + 8, np.arange(8) * 16 + 8)
    wanted = np.broadcast_to(np.stack([columns, rows], -1), points.shape[:3] + (2,))
    pixels, _, _ = network.project(points[known])
    np.testing.assert_allclose(pixels, wanted[known], atol=0.02)
    away = network.lens.see(transform_points(network.ego2cam, points[known]))[1]
    centre = np.broadcast_to((np.arange(lift.depth.bins) + 1.5)[:, None, None], points.shape[:3])
    np.testing.assert_allclose(away, centre[known], rtol=1e-6)


def test_a_fisheye_of_190_degrees_lifts_behind_its_own_image_plane() -> None:
    fisheye = camera("fisheye of 190 degrees", yaw_deg=0)
    rig = CameraRig((network_camera(fisheye, replace(KEEP, width=448)),))
    bev = BevGrid((-51.2, -51.2), (1.024, 1.024), (100, 100))
    points = lift_points(rig.lens_matrices, rig.cam2egos, (448, 128), LiftConfig(), bev)
    x = bev.lo[0] + (points.cell % 100 + 0.5) * bev.pitch[0]
    assert (x < 0).any(), "five degrees behind, from 10 m on"
    table = ray_table(rig.lens_matrices, rig.cam2egos, (448, 128), LiftConfig())
    assert np.isfinite(table).all()
    assert np.pi / 2 < np.abs(table[0, 0]).max() < 2, "an angle, which is finite where a slope is not"


def test_a_rig_of_pinholes_is_what_it_was() -> None:
    rig = CameraRig((network_camera(camera(), ImageConfig()),))
    assert rig.lens_matrices.shape == (1, 3, 3)
    size, lift = (352, 128), LiftConfig()
    by_lens = np.stack([c.lens.as_matrix() for c in rig.cameras])
    np.testing.assert_allclose(
        frustum_points(by_lens, rig.cam2egos, size, lift), frustum_points(rig.intrinsics, rig.cam2egos, size, lift)
    )


def test_pillars_and_voxels_are_seen_where_the_lens_shows_them() -> None:
    network = network_camera(camera("fisheye of 190 degrees"), KEEP)
    rig, grid = CameraRig((network,)), VoxelGrid((-8, -8, -1), (1, 1, 1), (16, 16, 4))
    points = grid.centres().reshape(-1, 3)
    places, visible = see_points(points, rig.lens_matrices, rig.cam2egos, (352, 128), "base_link")
    pixels, _, inside = network.project(points)
    np.testing.assert_array_equal(visible[0], inside)
    np.testing.assert_allclose(places[0][inside] * (352, 128), pixels[inside], atol=1e-3)
    np.testing.assert_array_equal(voxels_in_view(rig, grid)[0].reshape(-1), inside)


def test_every_family_takes_a_fisheye_but_those_that_project_in_their_graph() -> None:
    size = (KEEP.width, KEEP.height)
    rig = CameraRig((network_camera(camera("Kannala-Brandt"), KEEP),))
    alive = np.ones(1, bool)
    assert size == (rig["eye"].width, rig["eye"].height)
    for model in (LiftSplatModel(image=KEEP), BevFormerModel(image=KEEP)):
        form = "bag" if isinstance(model, LiftSplatModel) else "slots"
        tables = family_of(model).tables(model, rig, alive, form)
        assert all(np.isfinite(table).all() for table in tables.values())
    with pytest.raises(ValueError, match=r"image\.lens rectify"):
        family_of(Detr3dModel(image=KEEP)).tables(Detr3dModel(image=KEEP), rig, alive, "projection")
    with pytest.raises(ConfigError, match="rectify or keep"):
        ImageConfig(lens="bend")


def test_images_of_a_kept_lens_are_scaled_and_cut_but_not_bent() -> None:
    fisheye, rng = camera("fisheye of 190 degrees", size=(352, 264)), np.random.default_rng(0)
    image = rng.integers(0, 255, (264, 352, 3), np.uint8)
    pixels, seen_by = Preprocessor(KEEP).network_image(image, fisheye)
    top = Fit.of(fisheye, KEEP).crop[1]
    np.testing.assert_array_equal(pixels, image[top : top + 128])
    assert seen_by.distortion == fisheye.distortion


@pytest.mark.parametrize(("size", "pitch"), [((640, 480), 0), ((480, 480), 0), ((640, 480), 12), ((1600, 900), 0)])
def test_the_crop_keeps_the_horizon_of_tall_images(size: tuple[int, int], pitch: float) -> None:
    eye = replace(
        camera(pitch_deg=pitch, size=size),
        intrinsic=[[size[0] * 0.8, 0, size[0] / 2], [0, size[0] * 0.8, size[1] / 2], [0, 0, 1]],
    )
    config = ImageConfig()
    rows = SeenRows.of(eye, config)
    assert not rows.cuts_horizon
    network = network_camera(eye, config)
    far = eye.cam2ego[:3, 3] + 1e6 * np.array([np.cos(np.deg2rad(30)), np.sin(np.deg2rad(30)), 0])
    pixels, _, inside = network.project(far[None])
    assert inside[0]
    assert 0.1 * 128 <= pixels[0, 1] <= 0.4 * 128
    if size == (1600, 900):
        assert Fit.of(eye, config) == Fit((352, 198), (0, 70)), "16:9 images are cut as before"


def test_what_is_shown_of_each_camera_is_said_in_its_own_pixels() -> None:
    tall = camera(size=(640, 480))
    rows = seen_rows(CameraRig((tall,)), ImageConfig())[0]
    assert rows.last - rows.first == pytest.approx(128 / 352 * 640, abs=2)
    assert rows.horizon == pytest.approx(240, abs=1e-6)
    assert f"rows {rows.first} to {rows.last} of 480" in str(rows)
    up = camera(pitch_deg=-60)
    cut = SeenRows.of(up, ImageConfig())
    assert cut.cuts_horizon
    assert "is cut" in str(cut)
    assert horizon_row(camera(pitch_deg=88), ImageConfig()) is None


def test_canonical_depth_grows_with_the_focal_length() -> None:
    """A camera with twice the focal length sees the same thing at twice the distance as large: it is in one bin."""
    lift = LiftConfig(canonical_focal=200.0)
    usual = np.array([[200.0, 0, 176], [0, 200, 64], [0, 0, 1]])
    longer = np.diag([2.0, 2, 1]) @ usual
    poses = np.tile(np.eye(4), (2, 1, 1))
    points = frustum_points(np.stack([usual, longer]), poses, (352, 128), lift)
    np.testing.assert_allclose(points[1, ..., 2], 2 * points[0, ..., 2])
    metric = frustum_points(np.stack([usual, longer]), poses, (352, 128), LiftConfig())
    np.testing.assert_allclose(metric[0], points[0])
    np.testing.assert_allclose(metric[1, ..., 2], metric[0, ..., 2])
