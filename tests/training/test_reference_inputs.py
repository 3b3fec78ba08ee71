"""Geometry, pooling and depth labels of the BEVDet family, against arrays of the published implementations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
from occbev.config import DepthConfig, ImageConfig, LiftConfig  # noqa: E402
from occbev.geometry import (  # noqa: E402
    invert_transform,
    make_transform,
    project_points,
    rotation_from_wxyz,
    transform_points,
    wrap_angle,
)
from occbev.grid import BevGrid  # noqa: E402
from occbev.inference.families import family_of, load_model  # noqa: E402
from occbev.inference.families.lift_splat import LiftSplatModel  # noqa: E402
from occbev.inference.pipeline import motion_to_key  # noqa: E402
from occbev.inference.tables import (  # noqa: E402
    Augmentation,
    LiftPoints,
    bin_depths,
    camera_parameters,
    feature_pixels,
    frustum_points,
    gate_parameters,
    place_points,
    to_bev_frame,
)
from occbev.results import CameraFrame, FrameSet  # noqa: E402
from occbev.rig import Camera, CameraRig  # noqa: E402
from occbev_training.data import reference_inputs as inputs  # noqa: E402
from occbev_training.data.augment import NO_AUGMENTATION, Draw, augment_boxes, draw_augmentation  # noqa: E402
from occbev_training.data.datasets import depth_labels  # noqa: E402
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
    """The draws that training makes move the scene and its boxes as published; only yaws are wrapped."""
    rows = zip(geometry["bda_params"], geometry["bda_mats"], geometry["boxes_bda"], strict=True)
    for (angle, scale, flip_x, flip_y), matrix, want in rows:
        sign = (-1 if flip_x else 1, -1 if flip_y else 1)
        draw = Draw((), sign, np.ones(6, bool), 0, float(np.deg2rad(angle)), float(scale))
        close(draw.ego2ego[:3, :3], matrix)
        boxes = augment_boxes(geometry["boxes_in"].astype(np.float64), draw)
        close(np.delete(boxes, 6, 1), np.delete(want, 6, 1))
        close(wrap_angle(boxes[:, 6] - want[:, 6]), np.zeros(len(boxes)))


def test_cameras_move_into_the_ego_frame_of_the_key_pose(geometry: Arrays) -> None:
    """What node, replay and training run; the published key pose is that of camera 0."""
    poses = geometry["ego2global"].astype(np.float64)
    names = tuple(f"camera_{i}" for i in range(6))
    frames = {n: CameraFrame(n, i, b"", pose) for i, (n, pose) in enumerate(zip(names, poses, strict=True))}
    motion = motion_to_key(FrameSet(0, frames), poses[0])
    optics = geometry["intrins"].astype(np.float64)
    matrices = zip(names, optics, geometry["sensor2ego"].astype(np.float64), strict=True)
    rig = CameraRig(tuple(Camera(n, 1600, 900, k, orthonormal(pose)) for n, k, pose in matrices))
    got = rig.move_cameras(motion[name] for name in names).cam2egos
    np.testing.assert_allclose(got, geometry["sensor2keyego"], rtol=1e-4, atol=1e-3)  # single precision, far away


def orthonormal(pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take the rounding out of a rotation that was stored in single precision."""
    u, _, v = np.linalg.svd(pose[:3, :3])
    return make_transform(u @ v, pose[:3, 3])


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


def test_lidar_points_fall_on_the_published_pixels(depth_gt: Arrays) -> None:
    src2img = homogeneous(depth_gt["post_rots"], depth_gt["post_trans"])
    lidar2global = poses(depth_gt, "lidar_ego2global") @ poses(depth_gt, "lidar2ego")
    cam2global = poses(depth_gt, "cam_ego2global") @ poses(depth_gt, "cam2ego")
    images = np.full((6, SIZE[1], SIZE[0]), np.inf)
    for camera, image in enumerate(images):
        lidar2cam = invert_transform(cam2global[camera]) @ lidar2global
        points = transform_points(lidar2cam, depth_gt["lidar_points"].astype(np.float64))
        pixel, depth = project_points(points, src2img[camera] @ depth_gt["intrins"][camera].astype(np.float64))
        place = np.rint(pixel)
        seen = np.all((place >= 0) & (place < SIZE), 1) & (depth >= 1) & (depth < 60)
        column, row = place[seen].astype(int).T
        np.minimum.at(image, (row, column), depth[seen])
    got, want = np.where(np.isfinite(images), images, 0), depth_gt["gt_depth"]
    assert (want > 0).sum() > 1000
    assert (np.abs(got - want) > 1e-3).sum() <= 0.005 * (want > 0).sum()


def training_bins(images: NDArray[np.float32], depth: DepthConfig) -> NDArray[np.int64]:
    """Depth labels as a training sample gets them, of sparse depth images (6, h, w)."""
    camera, row, column = np.nonzero(images)
    lift = replace(LiftConfig(), depth=depth)
    model = LiftSplatModel(image=ImageConfig(192, 64), lift=lift)  # a column of cells more than the arrays
    sample = SimpleNamespace(
        intrinsic=np.tile(np.eye(3), (len(images), 1, 1)),
        lidar_camera=camera,
        lidar_pixel=np.stack([column, row], 1) + 0.5,
        lidar_depth=images[camera, row, column],
    )
    still = draw_augmentation(0, len(images), SIZE, NO_AUGMENTATION)
    return depth_labels(sample, still, np.ones(len(images), bool), model)[..., : SIZE[0] // 16]


@pytest.mark.parametrize(
    ("prefix", "depth"),
    [("", DepthConfig(1, 60, 0.5)), ("megvii_", DepthConfig(2, 58, 0.5))],
    ids=["bevdet", "megvii"],
)
def test_depth_bins_and_their_loss(depth_gt: Arrays, prefix: str, depth: DepthConfig) -> None:
    bins = training_bins(depth_gt["gt_depth"], depth)
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


@pytest.mark.parametrize("name", ["bevdepth4d_r50", "bevdepth_r50_first"])
def test_camera_parameters_under_augmentation_are_those_of_the_source(
    geometry: Arrays, repository: Path, name: str
) -> None:
    """A training sample holds augmentation folded in; the depth net is told camera and augmentation apart, as published."""
    model = load_model(repository / "config/models" / f"{name}.yaml")
    model = replace(model, image=replace(model.image, width=192, height=64))
    source, cam2ego = geometry["intrins"].astype(np.float64), geometry["sensor2ego"].astype(np.float64)
    src2img = homogeneous(geometry["post_rots"], geometry["post_trans"])
    nominal = inputs.image_matrix(inputs.draw_image(SOURCE, (192, 64)))
    scene = make_transform(geometry["bda_mats"][0].astype(np.float64), (0.0, 0.0, 0.0))
    change = Augmentation(src2img @ np.linalg.inv(nominal), scene)
    cam2frame = to_bev_frame(scene @ cam2ego, model.bev)
    got = family_of(model).calibration(model, src2img @ source, cam2frame, change)[:, :, 0, 0]
    if model.bevdet.depth_net == "gated":
        want = gate_parameters(source, to_bev_frame(cam2ego, model.bev), src2img)
    else:
        want = camera_parameters(source, cam2ego, src2img, scene)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_camera_parameters_are_in_the_published_order() -> None:
    intrinsic = np.array([[[10.0, 0, 30], [0, 20, 40], [0, 0, 1]]])
    src2img = np.array([[1.0, 2, 3], [4, 5, 6], [0, 0, 1]])
    cam2ego = np.arange(16.0).reshape(1, 4, 4) + 100
    got = camera_parameters(intrinsic, cam2ego, src2img, np.arange(9.0).reshape(3, 3) + 50)
    want = [10, 20, 30, 40, 1, 2, 3, 4, 5, 6, 50, 51, 53, 54, 58, *range(100, 112)]
    np.testing.assert_array_equal(got, [want])


def test_draws_stay_in_the_published_range() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        draw = inputs.draw_image(SOURCE, (704, 256), rng)
        matrix = inputs.image_matrix(draw)
        scale = np.sqrt(np.linalg.det(matrix[:2, :2]) * (-1 if draw.flip else 1))
        assert np.isclose(scale, draw.scale)
        assert 0.38 <= draw.scale <= 0.55


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
