"""Augmentation moves pixels, calibration, boxes and voxels together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occbev.config import ConfigError
from occbev.geometry import (
    box_corners,
    points_in_box,
    project_points,
    rotation_from_rpy,
    transform_points,
)
from occbev.grid import VoxelGrid
from occbev_training.data import reference_inputs as reference
from occbev_training.data.augment import (
    NO_AUGMENTATION,
    AugmentConfig,
    Draw,
    GridMask,
    ImageDraw,
    Photometric,
    augment_boxes,
    augment_cam2ego,
    augment_ego2global,
    augment_image,
    augment_images,
    augment_intrinsic,
    augment_pixels,
    augment_voxels,
    distort,
    draw_augmentation,
    draw_photometric,
    grid_mask_image,
    live_bits,
)

SIZE = (96, 64)
GEOMETRY_ONLY = AugmentConfig(
    image_flip=0.5,
    scale=(0.9, 1.2),
    rotate=5.0,
    shift=1.0,
    brightness=0,
    contrast=0,
    saturation=0,
    hue=0,
    gamma=0,
    grey=0,
    noise=0,
    blur=0,
    camera_drop=0,
    bev_rotate=180.0,
    bev_scale=(0.95, 1.05),
)
seeds = st.integers(0, 2**62)


def _rig() -> tuple[np.ndarray, np.ndarray]:
    """Two cameras that look along +x and -x, with some pitch and roll."""
    optical = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0.0]])
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[0, :3, :3] = rotation_from_rpy(0.02, 0.05, 0.1) @ optical
    poses[1, :3, :3] = rotation_from_rpy(-0.03, 0.01, np.pi - 0.2) @ optical
    poses[:, :3, 3] = [[1.5, 0.1, 1.6], [-0.5, 0, 1.5]]
    return np.tile([[60.0, 0, 47], [0, 62, 30], [0, 0, 1]], (2, 1, 1)), poses


def _project(points: np.ndarray, intrinsic: np.ndarray, cam2ego: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return project_points(transform_points(np.linalg.inv(cam2ego), points), intrinsic)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_projection_follows_pixels_and_scene(seed: int) -> None:
    """A point of the flipped scene lands, in the augmented camera, where its old pixel was warped to."""
    draw = draw_augmentation(seed, 2, SIZE, GEOMETRY_ONLY)
    intrinsic, cam2ego = _rig()
    points = np.random.default_rng(seed).uniform([-20, -8, -1], [20, 8, 2], (40, 3))
    moved = transform_points(draw.ego2ego, points)
    after_k, after_pose = augment_intrinsic(intrinsic, draw), augment_cam2ego(cam2ego, draw)
    for camera in range(2):
        pixel, depth = _project(points, intrinsic[camera], cam2ego[camera])
        wanted = augment_pixels(np.full(40, camera), pixel, draw)
        got, new_depth = _project(moved, after_k[camera], after_pose[camera])
        front = depth > 0.5
        np.testing.assert_allclose(new_depth, depth, atol=1e-9)
        np.testing.assert_allclose(got[front], wanted[front], atol=1e-6)


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_image_content_lands_where_the_matrix_says(seed: int) -> None:
    draw = draw_augmentation(seed, 1, SIZE, GEOMETRY_ONLY)
    image = np.zeros((1, SIZE[1], SIZE[0], 3), np.uint8)
    column, row = 40, 45
    image[0, row : row + 5, column : column + 5] = 255
    out = augment_images(image, draw)[0, :, :, 0].astype(float)
    rows, columns = np.mgrid[: SIZE[1], : SIZE[0]] + 0.5
    bright = out > 127 if out.max() > 127 else out > 1e9
    black = out * (out > 0)
    background = black - np.median(black)
    weight = np.clip(background, 0, None) * bright
    if weight.sum() < 8 * 255:  # moved out of the image
        return
    centre = np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()
    wanted = augment_pixels(np.zeros(1, int), np.array([[column + 2.5, row + 2.5]]), draw)[0]
    inside = (wanted > 8).all() and (wanted < np.array(SIZE) - 8).all()
    if inside:
        assert np.abs(centre - wanted).max() < 0.35


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_boxes_flip_as_their_corners_and_velocity_do(seed: int) -> None:
    draw = draw_augmentation(seed, 1, SIZE, GEOMETRY_ONLY)
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        [
            rng.uniform(-40, 40, (5, 3)),
            rng.uniform(0.5, 8, (5, 3)),
            rng.uniform(-3.1, 3.1, (5, 1)),
            rng.uniform(-9, 9, (5, 2)),
        ],
        1,
    )
    out = augment_boxes(boxes, draw)
    wanted = np.sort(transform_points(draw.ego2ego, box_corners(boxes).reshape(-1, 3)).reshape(5, 8, 3), axis=1)
    np.testing.assert_allclose(np.sort(box_corners(out), axis=1), wanted, atol=1e-9)
    heading = np.stack([np.cos(out[:, 6]), np.sin(out[:, 6])], 1)
    turn = draw.ego2ego[:2, :2]
    before = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)
    np.testing.assert_allclose(heading, before @ turn.T / draw.bev_scale, atol=1e-12)
    np.testing.assert_allclose(out[:, 7:9], boxes[:, 7:9] @ turn.T)
    assert (np.abs(out[:, 6]) <= np.pi).all()


@pytest.mark.parametrize("sign", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_voxels_flip_bit_for_bit_with_their_centres(sign: tuple[int, int]) -> None:
    """Where a voxel's centre goes, its value goes."""
    draw = still(bev_sign=sign)
    volume = np.random.default_rng(0).integers(0, 255, (6, 4, 3)).astype(np.uint8)
    lo, pitch = np.array([-3.0, -2.0, 0.0]), np.ones(3)
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1).reshape(-1, 3)
    centres = transform_points(draw.ego2ego, lo + (index + 0.5) * pitch)
    target = np.floor((centres - lo) / pitch).astype(int)
    out = augment_voxels(volume, draw)
    np.testing.assert_array_equal(out[tuple(target.T)], volume[tuple(index.T)])
    np.testing.assert_array_equal(augment_voxels(out, draw), volume)


def still(**changes: object) -> Draw:
    """A draw that does nothing but what is named."""
    draw = draw_augmentation(0, 2, SIZE, NO_AUGMENTATION)
    return replace(draw, **changes)


GRID = VoxelGrid((-4.0, -4.0, -1.0), (0.5, 0.5, 0.5), (16, 16, 6))


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
@pytest.mark.parametrize("sign", [(1, 1), (-1, 1), (1, -1)])
def test_quarter_turns_of_voxels_are_exact_to_the_bit(quarters: int, sign: tuple[int, int]) -> None:
    """State, visibility bits and calibration turn as one: what numpy's rot90 and flips say, bit for bit."""
    draw = still(bev_angle=np.pi / 2 * quarters, bev_sign=sign)
    for seed, dtype in ((0, np.uint8), (1, bool)):
        volume = np.random.default_rng(seed).integers(0, 255, GRID.shape).astype(dtype)
        wanted = np.rot90(volume, quarters, (0, 1))[:: sign[0], :: sign[1]]
        np.testing.assert_array_equal(augment_voxels(volume, draw, GRID), wanted)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_one_draw_moves_images_calibration_boxes_voxels_and_visibility_together(seed: int) -> None:
    """A voxel inside a box, seen by a camera at a pixel, is all of that after any draw, too."""
    draw = draw_augmentation(seed, 2, SIZE, replace(GEOMETRY_ONLY, camera_drop=0.5))
    rng = np.random.default_rng(seed)
    intrinsic, cam2ego = _rig()
    box = np.array([[*rng.uniform(-2, 2, 2), 0.5, 1.4, 1.4, 1.4, rng.uniform(-3, 3), 1.0, 0.5]])
    volume = np.zeros(GRID.shape, np.uint8)
    centres = GRID.centres(np.argwhere(np.ones(GRID.shape, bool))).reshape(*GRID.shape, 3)
    inside = points_in_box(centres.reshape(-1, 3), box[0, :7]).reshape(GRID.shape)
    volume[inside] = 0b11
    moved_box = augment_boxes(box, draw)[0]
    moved = augment_voxels(volume, draw, GRID)
    grown = moved_box[:7].copy()
    grown[3:6] += 1.0  # the nearest voxel's centre is at most half a diagonal away
    assert points_in_box(centres[moved > 0], grown).all()
    shrunk = moved_box[:7].copy()
    shrunk[3:6] = np.maximum(shrunk[3:6] - 1.0, 1e-3)
    within = points_in_box(centres.reshape(-1, 3), shrunk).reshape(GRID.shape)
    assert (moved[within] > 0).all()
    pixel, depth = _project(box[:, :3], intrinsic[0], cam2ego[0])
    after, after_depth = _project(
        moved_box[None, :3],
        augment_intrinsic(intrinsic, draw)[0],
        augment_cam2ego(cam2ego, draw)[0],
    )
    np.testing.assert_allclose(after_depth, depth, atol=1e-9)
    if depth[0] > 0.5:
        np.testing.assert_allclose(after, augment_pixels(np.zeros(1, int), pixel, draw), atol=1e-6)
    assert ((moved & live_bits(draw.alive)) != 0).sum() == (moved > 0).sum() * draw.alive.any()


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_motion_between_frames_stays_rigid_and_true(seed: int) -> None:
    """A still point seen from two poses: after the draw it is one point of the changed world, from both."""
    draw = draw_augmentation(seed, 1, SIZE, GEOMETRY_ONLY)
    rng = np.random.default_rng(seed)
    poses = [np.eye(4), np.eye(4)]
    for pose in poses:
        pose[:3, :3] = rotation_from_rpy(*rng.uniform(-0.1, 0.1, 2), rng.uniform(-3, 3))
        pose[:3, 3] = rng.uniform(-50, 50, 3)
    point = rng.uniform(-30, 30, (1, 3))
    seen = [transform_points(np.linalg.inv(pose), point) for pose in poses]
    worlds = [
        transform_points(augment_ego2global(pose, draw), transform_points(draw.ego2ego, p))
        for pose, p in zip(poses, seen, strict=True)
    ]
    np.testing.assert_allclose(worlds[0], worlds[1], atol=1e-8)
    rotation = augment_ego2global(poses[0], draw)[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_the_published_image_draw_reaches_the_recorded_pixels() -> None:
    """Stored matrix, then drawn matrix: together the published chain from a 1600x900 image."""
    config = AugmentConfig(image_recipe="bevdet")
    stored = reference.image_matrix(reference.draw_image((1600, 900), (704, 256)))
    flips = 0
    for seed in range(30):
        for image in draw_augmentation(seed, 2, (704, 256), config).images:
            chain = image.matrix @ stored
            scale = np.sqrt(abs(np.linalg.det(chain[:2, :2])))
            assert 0.38 <= scale <= 0.55
            flips += np.linalg.det(chain[:2, :2]) < 0
            angle = np.rad2deg(np.arctan2(chain[1, 0], chain[1, 1]))
            assert abs(angle) <= 5.4 + 1e-9
    assert 15 < flips < 45


def test_a_turned_volume_needs_its_grid_and_fills_what_comes_from_outside() -> None:
    with pytest.raises(ValueError, match="needs its grid"):
        augment_voxels(np.zeros(GRID.shape, np.uint8), still(bev_angle=0.3))
    out = augment_voxels(np.ones(GRID.shape, np.uint8), still(bev_angle=np.pi / 4), GRID, 7)
    assert (out[0, 0] == 7).all()
    assert (out[8, 8] == 1).all()


@given(st.integers(2, 60), st.integers(0, 2**30))
@settings(max_examples=25, deadline=None)
def test_the_grid_mask_is_the_published_one(period: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    offset = int(rng.integers(period)), int(rng.integers(period))
    width, height = 50, 62
    got = grid_mask_image(GridMask(period, offset), (width, height))
    canvas = np.ones((int(1.5 * height), int(1.5 * width)), int)
    stripe = min(max(int(period * 0.5 + 0.5), 1), period - 1)
    for i in range(canvas.shape[0] // period):
        canvas[period * i + offset[0] : period * i + offset[0] + stripe] = 0
    for i in range(canvas.shape[1] // period):
        canvas[:, period * i + offset[1] : period * i + offset[1] + stripe] = 0
    y, x = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    np.testing.assert_array_equal(got, canvas[y : y + height, x : x + width] == 0)


def test_the_grid_mask_has_its_chance_and_is_one_for_all_cameras() -> None:
    config = AugmentConfig(grid_mask=0.7)
    drawn = [draw_augmentation(s, 3, SIZE, config).grid_mask for s in range(300)]
    assert 0.6 < np.mean([mask is not None for mask in drawn]) < 0.8
    assert all(2 <= mask.period < SIZE[1] for mask in drawn if mask is not None)


def test_the_photometric_distortion_by_hand() -> None:
    image = np.full((2, 2, 3), (100, 50, 50), np.uint8)
    assert distort(image, Photometric())[0, 0].tolist() == [100, 50, 50]
    assert distort(image, Photometric(10, 1.2))[0, 0].tolist() == [132, 72, 72]
    assert distort(image, Photometric(10, 1.2, False))[0, 0].tolist() == [132, 72, 72]
    assert distort(image, Photometric(saturation=0.0))[0, 0].tolist() == [100, 100, 100]
    assert distort(image, Photometric(hue_deg=120))[0, 0].tolist() == [50, 100, 50]
    assert distort(image, Photometric(order=(2, 1, 0)))[0, 0].tolist() == [50, 50, 100]
    assert distort(image, Photometric(32, 1.5))[0, 0, 0] == 198
    draws = [draw_photometric(np.random.default_rng(s)) for s in range(400)]
    for name, neutral in (("brightness", 0.0), ("contrast", 1.0), ("saturation", 1.0), ("hue_deg", 0.0)):
        assert 0.4 < np.mean([getattr(d, name) != neutral for d in draws]) < 0.6


def test_rows_of_padding_keep_the_colour_that_the_network_knows() -> None:
    """They are added after the colours are distorted, in the published order: the mean colour always."""
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    image[16:] = 124, 116, 104
    draw = ImageDraw(np.eye(3), np.eye(3, 4), 1.0, 0.0, 0.0, Photometric(30, 1.4, order=(2, 0, 1)))
    out = augment_image(image, draw, np.random.default_rng(0))
    np.testing.assert_array_equal(out[16:], image[16:])
    np.testing.assert_array_equal(out[:16], distort(image, draw.photometric)[:16])
    assert not np.array_equal(out[:16], image[:16])


def test_augment_configs_are_checked() -> None:
    with pytest.raises(ConfigError, match="image_recipe 'mmdet'"):
        AugmentConfig(image_recipe="mmdet")
    with pytest.raises(ConfigError, match="bev_scale"):
        AugmentConfig(bev_scale=(1.1, 0.9))


def test_a_mirrored_scene_has_mirrored_images() -> None:
    """With `flip_with_bev`, image and scene have one handedness: the intrinsics of a mirrored pose are mirrored too."""
    config = AugmentConfig(image_flip=0.0, rotate=0.0, scale=(1.0, 1.0), camera_drop=0)
    intrinsic, cam2ego = _rig()
    signs = set()
    for seed in range(40):
        draw = draw_augmentation(seed, 2, SIZE, config)
        handed = np.linalg.det(augment_cam2ego(cam2ego, draw)[:, :3, :3])
        assert (np.sign(np.linalg.det(augment_intrinsic(intrinsic, draw))) == np.sign(handed)).all()
        signs.add(draw.bev_sign)
    assert signs == {(1, 1), (1, -1), (-1, 1), (-1, -1)}


def test_no_augmentation_changes_nothing() -> None:
    draw = draw_augmentation(7, 3, SIZE, NO_AUGMENTATION)
    images = np.random.default_rng(0).integers(0, 255, (3, SIZE[1], SIZE[0], 3)).astype(np.uint8)
    np.testing.assert_array_equal(augment_images(images, draw), images)
    np.testing.assert_array_equal(
        augment_intrinsic(_rig()[0], draw_augmentation(7, 2, SIZE, NO_AUGMENTATION)), _rig()[0]
    )
    assert draw.alive.all()
    assert draw.bev_sign == (1, 1)


def test_the_same_seed_gives_the_same_pictures_and_another_does_not() -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, SIZE[1], SIZE[0], 3)).astype(np.uint8)
    config = AugmentConfig(camera_drop=0)
    once, again, other = (augment_images(images, draw_augmentation(s, 2, SIZE, config)) for s in (5, 5, 6))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


def test_a_dropped_camera_is_black_and_loses_its_bit() -> None:
    config = AugmentConfig(camera_drop=1.0)
    images = np.full((3, SIZE[1], SIZE[0], 3), 200, np.uint8)
    dropped = set()
    for seed in range(20):
        draw = draw_augmentation(seed, 3, SIZE, config)
        (missing,) = np.flatnonzero(~draw.alive)
        out = augment_images(images, draw)
        assert not out[missing].any()
        assert all(out[i].any() for i in range(3) if i != missing)
        assert live_bits(draw.alive) == 0b111 & ~(1 << missing)
        dropped.add(int(missing))
    assert dropped == {0, 1, 2}


@pytest.mark.parametrize(("dead", "bits"), [([], 0xFF), ([7], 0xFF), ([9], 0xFF), ([7, 8, 9], 0x7F), ([0, 8], 0xFE)])
def test_the_bit_of_the_cameras_from_the_eighth_on_lives_with_any_of_them(dead: list[int], bits: int) -> None:
    alive = np.ones(10, bool)
    alive[dead] = False
    assert live_bits(alive) == bits
