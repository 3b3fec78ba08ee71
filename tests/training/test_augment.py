"""Augmentation moves pixels, calibration, boxes and voxels together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occbev.geometry import box_corners, project_points, rotation_from_rpy, transform_points
from occbev_training.data.augment import (
    NO_AUGMENTATION,
    AugmentConfig,
    augment_boxes,
    augment_cam2ego,
    augment_images,
    augment_intrinsic,
    augment_pixels,
    augment_voxels,
    draw_augmentation,
    live_bits,
)

SIZE = (96, 64)
GEOMETRY_ONLY = AugmentConfig(
    image_flip=0.5, scale=(0.9, 1.2), rotate=5.0, shift=1.0, brightness=0, contrast=0, saturation=0,
    hue=0, gamma=0, grey=0, noise=0, blur=0, camera_drop=0,
)  # fmt: skip
seeds = st.integers(0, 2**62)


def _rig() -> tuple[np.ndarray, np.ndarray]:
    """Two cameras that look along +x and -x, with some pitch and roll."""
    optical = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0.0]])
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[0, :3, :3] = rotation_from_rpy(0.02, 0.05, 0.1) @ optical
    poses[1, :3, :3] = rotation_from_rpy(-0.03, 0.01, np.pi - 0.2) @ optical
    poses[:, :3, 3] = [[1.5, 0.1, 1.6], [-0.5, 0, 1.5]]
    return np.tile([[60.0, 0, 47], [0, 62, 30], [0, 0, 1]], (2, 1, 1)), poses


def _project(
    points: np.ndarray, intrinsic: np.ndarray, cam2ego: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
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
    boxes = np.concatenate([rng.uniform(-40, 40, (5, 3)), rng.uniform(0.5, 8, (5, 3)), rng.uniform(-3.1, 3.1, (5, 1)),
                            rng.uniform(-9, 9, (5, 2))], 1)  # fmt: skip
    out = augment_boxes(boxes, draw)
    wanted = np.sort(
        transform_points(draw.ego2ego, box_corners(boxes).reshape(-1, 3)).reshape(5, 8, 3), axis=1
    )
    np.testing.assert_allclose(np.sort(box_corners(out), axis=1), wanted, atol=1e-9)
    heading = np.stack([np.cos(out[:, 6]), np.sin(out[:, 6])], 1)
    np.testing.assert_allclose(
        heading, np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) * draw.bev_sign, atol=1e-12
    )
    np.testing.assert_allclose(out[:, 7:9], boxes[:, 7:9] * draw.bev_sign)
    assert (np.abs(out[:, 6]) <= np.pi).all()


@pytest.mark.parametrize("sign", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_voxels_flip_bit_for_bit_with_their_centres(sign: tuple[int, int]) -> None:
    """Where a voxel's centre goes, its value goes."""
    draw = next(
        d
        for d in (draw_augmentation(s, 1, SIZE, GEOMETRY_ONLY) for s in range(100))
        if d.bev_sign == sign
    )
    volume = np.random.default_rng(0).integers(0, 255, (6, 4, 3)).astype(np.uint8)
    lo, pitch = np.array([-3.0, -2.0, 0.0]), np.ones(3)
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1).reshape(-1, 3)
    centres = transform_points(draw.ego2ego, lo + (index + 0.5) * pitch)
    target = np.floor((centres - lo) / pitch).astype(int)
    out = augment_voxels(volume, draw)
    np.testing.assert_array_equal(out[tuple(target.T)], volume[tuple(index.T)])
    np.testing.assert_array_equal(augment_voxels(out, draw), volume)


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
    once, again, other = (
        augment_images(images, draw_augmentation(s, 2, SIZE, config)) for s in (5, 5, 6)
    )
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
