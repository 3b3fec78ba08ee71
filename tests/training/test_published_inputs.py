"""Geometry, pooling and depth labels of the BEVDet family, against arrays of the published implementations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
from occbev.config import DepthConfig, ImageConfig, LiftConfig  # noqa: E402
from occbev.geometry import make_transform, rotation_from_wxyz  # noqa: E402
from occbev.grid import BevGrid  # noqa: E402
from occbev.inference.families.lift_splat import LiftSplatModel  # noqa: E402
from occbev.inference.tables import (  # noqa: E402
    LiftPoints,
    bin_depths,
    camera_parameters,
    feature_pixels,
    frustum_points,
    place_points,
)
from occbev_training.data import published_inputs as inputs  # noqa: E402
from occbev_training.losses.voxels_and_centres import depth_bce  # noqa: E402
from occbev_training.models.lift_splat.lift_splat import batch_points, splat  # noqa: E402

SIZE = (176, 64)
SOURCE = (1600, 900)
Arrays = dict[str, NDArray[np.float32]]


def golden(golden_folder: Path, name: str) -> Arrays:
    with np.load(golden_folder / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def geometry(golden_folder: Path) -> Arrays:
    return golden(golden_folder, "lss_geometry")


@pytest.fixture(scope="module")
def pool(golden_folder: Path) -> Arrays:
    return golden(golden_folder, "lss_bev_pool")


@pytest.fixture(scope="module")
def depth_gt(golden_folder: Path) -> Arrays:
    return golden(golden_folder, "bevdepth_gt")


def close(got: object, want: object) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def draw_of(row: NDArray[np.float64]) -> inputs.ImageDraw:
    size = (int(row[5] - row[3]), int(row[6] - row[4]))
    return inputs.ImageDraw(row[0], (int(row[3]), int(row[4])), size, bool(row[7]), row[8])


def lift_of(lo: float, hi: float, step: float, **changes: object) -> LiftConfig:
    return replace(LiftConfig(), depth=DepthConfig(lo, hi, step), reference_quirks=True, **changes)


def homogeneous(rotation: NDArray[np.float32], translation: NDArray[np.float32]) -> NDArray[np.float64]:
    matrix = rotation.astype(np.float64)
    matrix[..., :2, 2] = translation[..., :2]
    return matrix


def test_image_matrices(geometry: Arrays) -> None:
    got = np.stack([inputs.image_matrix(draw_of(row)) for row in geometry["aug_params"]])
    close(got, homogeneous(geometry["post_rots"], geometry["post_trans"]))
    draw = inputs.draw_image(SOURCE, SIZE)
    assert draw == draw_of(geometry["test_aug"])
    close(inputs.image_matrix(draw)[:2, :2], geometry["test_post_rot"])
    close(inputs.image_matrix(draw)[:2, 2], geometry["test_post_tran"])


def test_bev_matrices_and_boxes(geometry: Arrays) -> None:
    rows = zip(geometry["bda_params"], geometry["bda_mats"], geometry["boxes_bda"], strict=True)
    for (angle, scale, flip_x, flip_y), matrix, boxes in rows:
        draw = inputs.BevDraw(angle, scale, bool(flip_x), bool(flip_y))
        close(inputs.bev_matrix(draw), matrix)
        close(inputs.augment_boxes(geometry["boxes_in"], draw), boxes)


def test_the_key_ego_frame_is_that_of_camera_0(geometry: Arrays) -> None:
    got = inputs.cam2key_ego(geometry["sensor2ego"], geometry["ego2global"])
    close(got, geometry["sensor2keyego"])


def test_frustum_points(geometry: Arrays) -> None:
    src2img = homogeneous(geometry["post_rots"], geometry["post_trans"])
    intrinsic = src2img @ geometry["intrins"].astype(np.float64)
    cam2ego = geometry["bda4"].astype(np.float64) @ geometry["sensor2ego"]
    got = frustum_points(intrinsic, cam2ego, SIZE, lift_of(1, 60, 4))
    np.testing.assert_allclose(got, geometry["coor"], rtol=1e-4, atol=1e-4)  # up to 60 m in float32


def test_frustum_axes(geometry: Arrays) -> None:
    lift = lift_of(1, 60, 1)
    pixels = feature_pixels((704, 256), lift).reshape(16, 44, 3)
    close(pixels[0, :, 0], geometry["frustum_full_u"])
    close(pixels[:, 0, 1], geometry["frustum_full_v"])
    close(bin_depths(lift), geometry["frustum_full_d"])
    close(bin_depths(lift_of(1, 45, 0.5)), geometry["frustum_occ_d"])
    log = replace(lift, depth=DepthConfig(1, 60, 1, "log"))
    close(bin_depths(log), geometry["frustum_sid_d"])


def grid_of(arrays: Arrays, prefix: str = "") -> tuple[BevGrid, LiftConfig]:
    lo, pitch, size = (arrays[f"{prefix}grid_{k}"] for k in ("lower", "interval", "size"))
    lo, pitch = (np.round(v.astype(np.float64), 4) for v in (lo, pitch))
    count = np.round(size).astype(int)
    top = float(lo[2] + pitch[2] * count[2])
    lift = replace(LiftConfig(), z_range=(float(lo[2]), top), height_bins=int(count[2]))
    bev = BevGrid(tuple(lo[:2]), tuple(pitch[:2]), tuple(count[:2]))
    return bev, replace(lift, reference_quirks=True)


def test_points_fall_into_the_published_cells(pool: Arrays) -> None:
    bev, lift = grid_of(pool)
    points = place_points(pool["coor"][0], lift, bev)
    np.testing.assert_array_equal(points.cell, pool["ranks_bev"])
    for name, got in (("depth", points.depth), ("feat", points.pixel)):
        order = np.lexsort((pool[f"ranks_{name}"], pool["ranks_bev"]))
        mine = np.lexsort((got, points.cell))
        np.testing.assert_array_equal(got[mine], pool[f"ranks_{name}"][order])
    cells, starts, lengths = np.unique(points.cell, return_index=True, return_counts=True)
    assert len(cells) == 695
    np.testing.assert_array_equal(starts, pool["interval_starts"])
    np.testing.assert_array_equal(lengths, pool["interval_lengths"])


def test_the_lower_border_truncates_and_floor_does_not(pool: Arrays) -> None:
    bev, lift = grid_of(pool)
    edge = pool["edge_points"][None, :, None, None, :]  # ten depth bins of one pixel
    points = place_points(edge, lift, bev)
    order = np.lexsort((pool["edge_ranks_depth"], pool["edge_ranks_bev"]))
    mine = np.lexsort((points.depth, points.cell))
    np.testing.assert_array_equal(points.depth[mine], pool["edge_ranks_depth"][order])
    np.testing.assert_array_equal(points.cell[mine], pool["edge_ranks_bev"][order])
    floored = place_points(edge, replace(lift, reference_quirks=False), bev)
    assert sorted(floored.depth) == [0, 4, 8] or set(floored.depth) < set(points.depth)


def pooled(
    points: list[LiftPoints],
    depth: torch.Tensor,
    feat: torch.Tensor,
    bev: BevGrid,
    lift: LiftConfig,
    by_pixel: bool = True,
) -> torch.Tensor:
    """Pool (B, N, D, h, w) depth and (B, N, C, h, w) features to (B, Z, Y, X, C)."""
    batch, cameras, bins, rows, columns = depth.shape
    stride, image = 32, ImageConfig(32 * columns, 32 * rows)
    lift = replace(lift, stride=stride, depth=DepthConfig(1.0, 1.0 + bins, 1.0))
    model = LiftSplatModel(image=image, lift=lift, bev=bev)
    rays = np.zeros((batch, cameras, 1, 1, 1), np.float32)
    tables = batch_points(points, rays, model)
    if not by_pixel:
        tables = replace(tables, by_pixel=None)
    context = feat.permute(0, 1, 3, 4, 2).reshape(-1, feat.shape[2])
    cells = splat(context, depth.flatten(), tables)
    return cells.view(batch, lift.height_bins, *bev.shape[::-1], -1)


def test_pooling_and_its_gradients(pool: Arrays) -> None:
    bev, lift = grid_of(pool)
    points = [place_points(pool["coor"][0], lift, bev)]
    depth = torch.from_numpy(pool["depth"]).requires_grad_()
    feat = torch.from_numpy(pool["feat"]).requires_grad_()
    got = pooled(points, depth, feat, bev, lift)[:, 0].permute(0, 3, 1, 2)
    close(got.detach(), pool["bev"])
    got.backward(torch.from_numpy(pool["grad_out"]))
    close(depth.grad, pool["grad_depth"])
    close(feat.grad, pool["grad_feat"])


def test_pooling_a_volume_for_a_batch(pool: Arrays) -> None:
    bev, lift = grid_of(pool, "z_")
    points = [place_points(coor, lift, bev) for coor in pool["z_coor"]]
    depth, feat = (torch.from_numpy(pool[f"z_{name}"]) for name in ("depth", "feat"))
    got = pooled(points, depth, feat, bev, lift)  # (B, Z, Y, X, C)
    close(got.permute(0, 4, 1, 2, 3), pool["z_bev"])
    collapsed = got.permute(0, 1, 4, 2, 3).flatten(1, 2)
    close(collapsed, pool["z_bev_collapsed"])


def test_no_point_at_all_gives_an_empty_map_with_gradients(pool: Arrays) -> None:
    bev, lift = grid_of(pool)
    points = [place_points(pool["coor"][0] + 1e4, lift, bev)]
    depth = torch.from_numpy(pool["depth"]).requires_grad_()
    got = pooled(points, depth, torch.from_numpy(pool["feat"]), bev, lift)
    got.sum().backward()
    assert not got.any()
    assert depth.grad is None or not depth.grad.any()


def poses(arrays: Arrays, name: str) -> NDArray[np.float64]:
    rotation, translation = arrays[f"{name}_rot"], arrays[f"{name}_tran"]
    if rotation.ndim == 1:
        return make_transform(rotation_from_wxyz(rotation), translation)
    rows = zip(rotation, translation, strict=True)
    return np.stack([make_transform(rotation_from_wxyz(r), t) for r, t in rows])


def test_depth_images(depth_gt: Arrays) -> None:
    src2img = homogeneous(depth_gt["post_rots"], depth_gt["post_trans"])
    lidar2ego, ego2global = poses(depth_gt, "lidar2ego"), poses(depth_gt, "lidar_ego2global")
    cam2ego, cam_ego2global = poses(depth_gt, "cam2ego"), poses(depth_gt, "cam_ego2global")
    points, images = depth_gt["lidar_points"], []
    for camera in range(6):
        cam = inputs.lidar_to_cam(points, lidar2ego, ego2global, cam2ego[camera], cam_ego2global[camera])
        pixels = inputs.points_to_image(cam, depth_gt["intrins"][camera], src2img[camera])
        images.append(inputs.depth_image(pixels, SIZE, DepthConfig(1, 60, 0.5)))
    want = depth_gt["gt_depth"]
    differs = np.abs(np.stack(images) - want) > 1e-3
    assert (want > 0).sum() > 1000
    assert differs.sum() <= 0.005 * (want > 0).sum()


@pytest.mark.parametrize(
    ("prefix", "depth"),
    [("", DepthConfig(1, 60, 0.5)), ("megvii_", DepthConfig(2, 58, 0.5))],
    ids=["bevdet", "megvii"],
)
def test_depth_bins_and_their_loss(depth_gt: Arrays, prefix: str, depth: DepthConfig) -> None:
    bins = inputs.depth_bins(depth_gt["gt_depth"], 16, depth)
    np.testing.assert_array_equal(bins, depth_gt[f"{prefix}bins_index"])
    prediction = torch.from_numpy(depth_gt[f"{prefix}depth_pred"]).requires_grad_()
    rows = prediction.permute(0, 2, 3, 1).flatten(0, 2)
    loss = 3.0 * depth_bce(rows, torch.from_numpy(bins).flatten())
    close(loss.item(), depth_gt[f"{prefix}loss_depth"])
    if not prefix:
        loss.backward()
        close(prediction.grad, depth_gt["grad_depth_pred"])


def test_depth_bins_at_their_borders(depth_gt: Arrays) -> None:
    got = inputs.depth_to_bin(depth_gt["edge_depths"], DepthConfig(1, 60, 0.5))
    np.testing.assert_array_equal(got, depth_gt["edge_bins"])


def test_the_truncating_depth_image(depth_gt: Arrays) -> None:
    for row, want in zip(depth_gt["megvii_aug_params"], depth_gt["megvii_depth_maps"], strict=True):
        draw = draw_of(row)
        uvd = depth_gt["megvii_uvd"].astype(np.float64)
        ones = np.column_stack([uvd[:, :2], np.ones(len(uvd))])
        pixels = (ones @ inputs.image_matrix(draw).T)[:, :2]
        got = inputs.truncated_depth_image(np.column_stack([pixels, uvd[:, 2]]), SIZE)
        assert (np.abs(got - want) > 1e-3).sum() <= 0.005 * (want > 0).sum()


def test_camera_parameters_are_in_the_published_order() -> None:
    intrinsic = np.array([[[10.0, 0, 30], [0, 20, 40], [0, 0, 1]]])
    src2img = np.array([[1.0, 2, 3], [4, 5, 6], [0, 0, 1]])
    cam2ego = np.arange(16.0).reshape(1, 4, 4) + 100
    got = camera_parameters(intrinsic, cam2ego, src2img, np.arange(9.0).reshape(3, 3) + 50)
    want = [10, 20, 30, 40, 1, 2, 3, 4, 5, 6, 50, 51, 53, 54, 58, *range(100, 112)]
    np.testing.assert_array_equal(got, [want])


def test_augmentation_keeps_pixels_and_boxes_where_they_belong() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        draw = inputs.draw_image(SOURCE, (704, 256), rng)
        matrix = inputs.image_matrix(draw)
        scale = np.sqrt(np.linalg.det(matrix[:2, :2]) * (-1 if draw.flip else 1))
        assert np.isclose(scale, draw.scale)
        assert 0.38 <= draw.scale <= 0.55
        bev = inputs.draw_bev(rng)
        box = np.array([[10.0, 4, 1, 4, 2, 1.5, 0.3, 3 * np.cos(0.3), 3 * np.sin(0.3)]])
        moved = inputs.augment_boxes(box, bev)[0]
        heading = np.array([np.cos(moved[6]), np.sin(moved[6])])
        np.testing.assert_allclose(moved[7:9], 3 * bev.scale * heading, atol=1e-9)


def test_voxels_flip_as_boxes_do() -> None:
    volume = np.arange(24).reshape(4, 3, 2)
    flipped = inputs.flip_voxels(volume, inputs.BevDraw(flip_x=True, flip_y=True))
    np.testing.assert_array_equal(flipped, volume[::-1, ::-1])


def test_sorting_points_by_pixel_changes_no_gradient(pool: Arrays) -> None:
    bev, lift = grid_of(pool, "z_")
    points = [place_points(coor, lift, bev) for coor in pool["z_coor"]]
    gradients = []
    for sort in (True, False):
        depth, feat = (torch.from_numpy(pool[f"z_{name}"]).clone().requires_grad_() for name in ("depth", "feat"))
        got = pooled(points, depth, feat, bev, lift, by_pixel=sort)
        (got * torch.arange(got.numel()).view_as(got).cos()).sum().backward()
        gradients.append((depth.grad, feat.grad))
    for fast, plain in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(fast, plain)
