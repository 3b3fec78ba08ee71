"""BEVFormer: published numbers of its parts, and the laws that the parts must keep."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from occbev.grid import BevGrid, VoxelGrid  # noqa: E402
from occbev.inference import reference_points as geometry  # noqa: E402
from occbev.inference.families.bevformer import BevFormerConfig, BevFormerModel  # noqa: E402
from occbev.inference.families.queries import QueryHeadConfig, ResNetConfig  # noqa: E402
from occbev_training.losses.voxels_and_centres import voxel_focal_loss  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.encoders.fpn import FeaturePyramid  # noqa: E402
from occbev_training.models.heads.voxel_decoder import VoxelDecoder  # noqa: E402
from occbev_training.models.queries import bevformer  # noqa: E402
from occbev_training.models.queries.deformable_attention import Levels  # noqa: E402
from occbev_training.models.queries.query_networks import PastFrame, remember  # noqa: E402

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
BEV = BevGrid((-8.0, -6.0), (1.0, 1.0), (16, 12))
MODEL = BevFormerModel(
    name="small",
    resnet=ResNetConfig(depth=18, stages=(3, 4), levels=3, channels=32, frozen_stages=0),
    bevformer=BevFormerConfig(channels=32, heads=4, hidden=32, layers=2, heights=2, camera_points=4, occupancy=True),
    query_head=QueryHeadConfig(queries=7, layers=2, heads=4, hidden=32),
    bev=BEV,
    grid=VoxelGrid((-8.0, -6.0, -1.0), (1.0, 1.0, 1.0), (16, 12, 4)),
)


def golden(golden_folder: Path, name: str) -> dict[str, torch.Tensor]:
    with np.load(golden_folder / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def weights(arrays: dict[str, torch.Tensor], prefix: str = "w.") -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def cross_attention(arrays: dict[str, torch.Tensor]) -> bevformer.SpatialCrossAttention:
    attention = bevformer.SpatialCrossAttention(32, 8, levels=2, points=8, dropout=0.0)
    attention.load_state_dict(weights(arrays))
    return attention


def seen(arrays: dict[str, torch.Tensor], prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Points and visibility (B, N, Q, D, ..) of the golden rig, by our own projection."""
    lo, hi = arrays["pc_range"][:3].double(), arrays["pc_range"][3:].double()
    metres = arrays["ref_3d"][0].transpose(0, 1).double() * (hi - lo) + lo  # (Q, D, 3)
    height, width = arrays["img_shape"].tolist()
    matrices = arrays[f"{prefix}lidar2img"].reshape(-1, 6, 4, 4)
    pairs = [geometry.project(metres, m, (width, height)) for m in matrices]
    points, visible = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pairs, strict=True))
    return points, visible


@pytest.mark.parametrize("name", ["bevformer_b_sca.npz", "bevformer_b2_projection_ego.npz"])
def test_published_projection(golden_folder: Path, name: str) -> None:
    arrays = golden(golden_folder, name)
    if "ego2lidar" in arrays:  # the BEV is in ego axes
        arrays["lidar2img"] = arrays["lidar2img"] @ arrays["ego2lidar"]
    points, visible = seen(arrays)
    want, mask = arrays["reference_points_cam"][:, 0], arrays["bev_mask"][:, 0]
    assert torch.equal(visible[0], mask)
    torch.testing.assert_close(points[0][mask], want[mask], **CLOSE)
    # Behind a camera pixels are divided by a depth of 1e-5, and float32 rounding with them.
    torch.testing.assert_close(points[0], want, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("name", ["bevformer_b_sca.npz", "bevformer_b2_projection_ego.npz"])
def test_published_pillars(golden_folder: Path, name: str) -> None:
    arrays = golden(golden_folder, name)
    lo, hi = (arrays["pc_range"][i : i + 3].double().numpy() for i in (0, 3))
    rows, columns = arrays["bev_hw"].tolist()
    bev = BevGrid(lo[:2], (hi - lo)[:2] / (columns, rows), (columns, rows))
    points = geometry.pillar_points(bev, (lo[2], hi[2]), arrays["ref_3d"].shape[1])
    want = arrays["ref_3d"][0].transpose(0, 1).numpy() * (hi - lo) + lo
    np.testing.assert_allclose(points, want, atol=1e-4)


def test_published_cross_attention(golden_folder: Path) -> None:
    arrays = golden(golden_folder, "bevformer_b_sca.npz")
    hits = bevformer.pair_cameras(*seen(arrays), torch.ones(1, 6))
    levels = Levels(tuple(map(tuple, arrays["spatial_shapes"].tolist())))
    with torch.no_grad():
        got = cross_attention(arrays)(arrays["query"], arrays["value"][:, :, 0], levels, hits)
    torch.testing.assert_close(got, arrays["output"], **CLOSE)


@pytest.mark.parametrize(("quirks", "want"), [(False, "b2.output_per_sample"), (True, "b2.output_reference")])
def test_published_cross_attention_of_a_batch(golden_folder: Path, quirks: bool, want: str) -> None:
    arrays = golden(golden_folder, "bevformer_b_sca.npz")
    hits = bevformer.pair_cameras(*seen(arrays, "b2."), torch.ones(2, 6), quirks)
    levels = Levels(tuple(map(tuple, arrays["spatial_shapes"].tolist())))
    features = arrays["b2.value"].float().permute(2, 0, 1, 3).flatten(0, 1)
    with torch.no_grad():
        got = cross_attention(arrays)(arrays["b2.query"], features, levels, hits)
    torch.testing.assert_close(got, arrays[want], **CLOSE)


def test_table_form_equals_pair_form(golden_folder: Path) -> None:
    arrays = golden(golden_folder, "bevformer_b_sca.npz")
    points, visible = seen(arrays)
    valid = torch.tensor([1.0, 1, 0, 1, 1, 1])
    pairs = bevformer.pair_cameras(points, visible, valid[None])
    tables = geometry.reference_tables(points[0].numpy(), visible[0].numpy(), 150, 3)
    names = ("table_query", "table_points", "table_slot")
    query, places, slot = (torch.from_numpy(tables[name]) for name in names)
    slots = bevformer.CameraSlots(query, places, valid, slot)
    levels = Levels(tuple(map(tuple, arrays["spatial_shapes"].tolist())))
    attention = cross_attention(arrays)
    with torch.no_grad():
        first, second = (attention(arrays["query"], arrays["value"][:, :, 0], levels, hits) for hits in (pairs, slots))
    torch.testing.assert_close(first, second, **CLOSE)


def temporal(arrays: dict[str, torch.Tensor]) -> tuple[bevformer.TemporalSelfAttention, Levels]:
    attention = bevformer.TemporalSelfAttention(32, 8, points=4, dropout=0.0)
    attention.load_state_dict(weights(arrays))
    return attention, Levels((tuple(arrays["bev_hw"].tolist()),))


@pytest.mark.parametrize(
    ("want", "past", "shifts"),
    [
        ("output_no_prev", False, (0, 0)),
        ("output_prev", True, (1, 0)),
        ("output_prev_pretrain_quirk", True, (1, 1)),
    ],
)
def test_published_temporal_attention(golden_folder: Path, want: str, past: bool, shifts: tuple) -> None:
    arrays = golden(golden_folder, "bevformer_c_tsa.npz")
    attention, levels = temporal(arrays)
    query = arrays["query"]
    slots = (arrays["prev_bev"], arrays["cur_bev_value"]) if past else (query, query)
    shift = arrays["shift_xy"][:, None]
    references = torch.stack([arrays["ref_2d"][:, :, 0] + s * shift for s in shifts], 2)
    with torch.no_grad():
        got = attention(query, arrays["query_pos"][0], *slots, references, levels)
    torch.testing.assert_close(got, arrays[want], **CLOSE)


@pytest.mark.parametrize(("quirks", "want"), [(False, "b2.output_per_sample"), (True, "b2.output_reference")])
def test_published_temporal_attention_of_a_batch(golden_folder: Path, quirks: bool, want: str) -> None:
    arrays = golden(golden_folder, "bevformer_c_tsa.npz")
    attention, levels = temporal(arrays)
    centre = arrays["ref_2d"][:, :, 0].expand(2, -1, -1)
    references = torch.stack([centre + arrays["b2.shift_xy"][:, None], centre], 2)
    inputs = (arrays[f"b2.{name}"] for name in ("query", "prev_bev", "cur_bev_value"))
    query, previous, current = inputs
    with torch.no_grad():
        got = attention(query, arrays["query_pos"][0], previous, current, references, levels, quirks)
    torch.testing.assert_close(got, arrays[want], **CLOSE)


def voxel_decoder(arrays: dict[str, torch.Tensor]) -> VoxelDecoder:
    decoder = VoxelDecoder(64, 16, 2)
    renamed = {
        k.replace("decoder.", "blocks.").replace("predicter.", "predict."): v for k, v in weights(arrays).items()
    }
    decoder.load_state_dict(renamed)
    return decoder


def test_published_voxel_decoder(golden_folder: Path) -> None:
    arrays = golden(golden_folder, "bevformer_f_occ_decoder.npz")
    decoder = voxel_decoder(arrays).eval()
    with torch.no_grad():
        logits = decoder(arrays["bev_embed_bchw"])  # (B, K, Z, Y, X)
    torch.testing.assert_close(logits.permute(0, 4, 3, 2, 1), arrays["occ_logits_eval"], **CLOSE)
    assert torch.equal(logits.argmax(1).permute(0, 3, 2, 1), arrays["occ_argmax"].long())
    occupied, mask = (arrays[n].transpose(1, 3) for n in ("labels_xyz", "mask_camera"))
    torch.testing.assert_close(voxel_focal_loss(logits, occupied == 1), arrays["loss_occ"], **CLOSE)
    masked = voxel_focal_loss(logits, occupied == 1, mask)
    torch.testing.assert_close(masked, arrays["loss_occ_masked"], **CLOSE)


def test_published_voxel_decoder_in_training(golden_folder: Path) -> None:
    arrays = golden(golden_folder, "bevformer_f_occ_decoder.npz")
    decoder = voxel_decoder(arrays).train()
    with torch.no_grad():
        logits = decoder(arrays["bev_embed_bchw"]).permute(0, 4, 3, 2, 1)
    want = arrays["occ_logits_train_bn"].float()
    torch.testing.assert_close(logits, want, atol=5e-3, rtol=2e-3)  # stored as float16
    norm = decoder.blocks[0].bn
    for name in ("running_mean", "running_var"):
        want = arrays[f"bn_after_train.decoder.0.bn.{name}"]
        torch.testing.assert_close(getattr(norm, name), want, **CLOSE)


# --- laws ------------------------------------------------------------------------------------


def network(stage: str = "finetune"):
    torch.manual_seed(0)
    return build_model(MODEL, stage).eval()


def rig(cameras: int = 2, height: float = 1.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and visibility (1, N, Q, D, ..) of cameras that look around."""
    intrinsic = np.array([[30.0, 0, 32], [0, 30.0, 32], [0, 0, 1]])
    poses = []
    for yaw in np.arange(cameras) * 2 * np.pi / cameras:
        pose = np.eye(4)
        pose[:3, 0], pose[:3, 1] = (np.sin(yaw), -np.cos(yaw), 0), (0, 0, -1)
        pose[:3, 2], pose[:3, 3] = (np.cos(yaw), np.sin(yaw), 0), (0, 0, height)
        poses.append(pose)
    pillars = geometry.pillar_points(BEV, (-2.0, 2.0), MODEL.bevformer.heights)
    matrices = geometry.frame_to_images(np.tile(intrinsic, (cameras, 1, 1)), np.stack(poses))
    points, visible = geometry.project(pillars, matrices, (64, 64))
    return torch.from_numpy(points)[None], torch.from_numpy(visible)[None]


def views(points, visible, valid=None, can_bus=None, motion=None) -> bevformer.BevFormerViews:
    """What the network takes as geometry."""
    count = points.shape[:2]
    hits = bevformer.pair_cameras(points, visible, torch.ones(count) if valid is None else valid)
    still = torch.zeros(count[0], 18) if can_bus is None else can_bus
    return bevformer.BevFormerViews(hits, still, torch.arange(count[1]).expand(count), motion)


def test_every_output_has_its_shape_and_takes_gradients() -> None:
    model = network().train()
    output = model(torch.randn(1, 2, 3, 64, 64), torch.ones(1, 2), views(*rig()))
    assert output.bev.shape == (1, 32, 12, 16)
    assert output.answers["occupancy_logits"].shape == (1, 18, 4, 12, 16)
    assert output.answers["class_logits"].shape == (2, 1, 7, 10)
    assert output.answers["box_codes"].shape == (2, 1, 7, 10)
    loss = output.answers["occupancy_logits"].square().mean() + output.answers["class_logits"].square().mean()
    (loss + output.answers["box_codes"].square().mean()).backward()
    silent = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert silent == set()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = network()
    images, can_bus = torch.randn(2, 2, 3, 64, 64), torch.randn(2, 18)
    low, high = rig(height=1.2), rig(height=1.9)
    points, visible = (torch.cat(pair) for pair in zip(low, high, strict=True))
    previous = torch.randn(2, 32, 12, 16)
    align = torch.from_numpy(np.stack([geometry.align_table(a, BEV) for a in (0.1, -0.3)]))
    shift, known = torch.tensor([[0.02, 0.01], [0.05, 0.0]]), torch.tensor([1.0, 0.0])
    motion = bevformer.Motion(previous, known, align, shift)
    with torch.no_grad():
        valid = torch.ones(2, 2)
        both = model(images, valid, views(points, visible, None, can_bus, motion)).bev
        alone = bevformer.Motion(previous[:1], known[:1], align[:1], shift[:1])
        seen_ = views(points[:1], visible[:1], None, can_bus[:1], alone)
        first = model(images[:1], valid[:1], seen_).bev
        seen_ = views(points[1:], visible[1:], None, can_bus[1:])
        second = model(images[1:], valid[1:], seen_).bev  # its past is unknown: the same as none
    torch.testing.assert_close(both[:1], first, **CLOSE)
    torch.testing.assert_close(both[1:], second, **CLOSE)


def test_a_missing_camera_is_as_if_it_saw_nothing() -> None:
    model = network()
    images, (points, visible) = torch.randn(1, 2, 3, 64, 64), rig()
    dark = visible.clone()
    dark[:, 1] = False
    with torch.no_grad():
        gone, all_there = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)
        got = model(images, gone, views(points, visible, gone)).bev
        want = model(images, all_there, views(points, dark)).bev
        other = model(images, all_there, views(points, visible)).bev
    torch.testing.assert_close(got, want)
    assert (got - other).abs().max() > 1e-3


def test_the_past_is_remembered_frame_by_frame_and_teaches_nothing() -> None:
    model = network().train()
    points, visible = rig()
    still, valid = torch.arange(BEV.size)[None], torch.ones(1, 2)
    images, can_bus, known, shift = (
        torch.randn(3, 1, 2, 3, 64, 64),
        torch.randn(3, 1, 18),
        torch.ones(1),
        torch.full((1, 2), 0.02),
    )
    frames = [
        PastFrame(image, views(points, visible, None, bus), known, still, shift)
        for image, bus in zip(images[:2], can_bus[:2], strict=True)
    ]
    past = remember(model, frames)
    assert model.training
    assert not past.requires_grad
    assert remember(model, []) is None
    model.eval()
    with torch.no_grad():
        first = model(images[0], valid, views(points, visible, None, can_bus[0])).bev
        motion = bevformer.Motion(first, known, still, shift)
        second = model(images[1], valid, views(points, visible, None, can_bus[1], motion)).bev
    torch.testing.assert_close(past, second)


def test_the_past_is_turned_about_the_vehicle() -> None:
    # A landmark 5 m ahead and 2 m left, seen before a turn of 90 degrees to the left at the same place.
    bev = BevGrid((-8.0, -8.0), (1.0, 1.0), (16, 16))
    previous = torch.zeros(1, 1, 16, 16)
    previous[0, 0, 8 + 2, 8 + 5] = 1
    align = torch.from_numpy(geometry.align_table(math.pi / 2, bev))[None]
    motion = bevformer.Motion(previous, torch.ones(1), align, torch.zeros(1, 2))
    now = bevformer.aligned(motion).view(16, 16)
    # Its cell centre (5.5, 2.5) becomes (2.5, -5.5): 2 m ahead, and to the right.
    assert now.nonzero().tolist() == [[8 - 6, 8 + 2]]


def test_a_pyramid_adds_coarse_levels_to_fine_ones() -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid((4, 6), 5, 3)
    fine, coarse = torch.randn(1, 4, 8, 12), torch.randn(1, 6, 4, 6)
    maps = pyramid([fine, coarse])
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6), (2, 3)]
    up = pyramid.lateral[1](coarse).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(maps[0], pyramid.output[0](pyramid.lateral[0](fine) + up))
    torch.testing.assert_close(maps[2], pyramid.output[2](maps[1]))  # no activation before it
