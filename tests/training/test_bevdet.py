"""The BEVDet family runs: shapes, missing cameras, past frames, stereo, and what pre-training hands on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from occbev.config import (  # noqa: E402
    ConfigError,
    LiftConfig,
    ModelConfig,
)
from occbev.geometry import make_transform, rotation_from_yaw  # noqa: E402
from occbev.grid import BevGrid  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.families.bevdet import BevDetConfig, BevDetModel  # noqa: E402
from occbev.inference.reference_points import warp_table  # noqa: E402
from occbev.inference.tables import image_to_past  # noqa: E402
from occbev_training.data.datasets import TrainingBatch  # noqa: E402
from occbev_training.export.zoo import randomise_zero_init  # noqa: E402
from occbev_training.losses.config import LossConfig  # noqa: E402
from occbev_training.losses.objectives import FinetuneObjective, PretrainObjective  # noqa: E402
from occbev_training.models.checkpoints import transfer  # noqa: E402
from occbev_training.models.encoders.image_necks import PyramidNeck, ResNetImageEncoder  # noqa: E402
from occbev_training.models.encoders.resnet import ResNet  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402
from occbev_training.models.lift_splat.bevdet import build_bevdet  # noqa: E402
from occbev_training.models.lift_splat.depth_net import matching_cost  # noqa: E402
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, batch_geometry  # noqa: E402
from occbev_training.models.lift_splat.stereo import Matching  # noqa: E402
from occbev_training.models.lift_splat.temporal import TemporalFusion, warp_bev  # noqa: E402
from occbev_training.models.network import Frame  # noqa: E402

CAMERAS = 2
SIZE, BINS = (64, 96), 6
"""Height and width of the images of reduced networks, and their depth bins."""
FAMILIES = (
    "bevdet_r50",
    "bevdet4d_r50",
    "bevdepth4d_r50",
    "bevdepth_r50_first",
    "bevdepth_r50_megvii",
    "bevdepth4d_r50_megvii",
    "bevdet_occ_r50",
    "bevdet_occ_r50_4d_stereo",
    "flashocc_r50_m0",
)


def reduced_of(repository: Path, name: str) -> ModelConfig:
    return reduced(load_model(repository / "config" / "models" / f"{name}.yaml"))


def geometry(config: ModelConfig) -> BatchedPoints:
    intrinsic = np.tile(np.array([[40.0, 0, 32], [0, 40, 8], [0, 0, 1]]), (1, CAMERAS, 1, 1))
    forward = np.array([[0.0, 0, 1, 1], [-1, 0, 0, 0.2], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    backward = np.diag([-1.0, -1, 1, 1]) @ forward
    return batch_geometry(intrinsic, np.stack([forward, backward])[None], config)


def random_images(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, CAMERAS, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


VALID = torch.ones(1, CAMERAS)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_of_the_family_runs(repository: Path, name: str) -> None:
    config = reduced_of(repository, name)
    torch.manual_seed(0)
    network, points = build_bevdet(config, "finetune").eval(), geometry(config)
    frames = config.bevdet.frames
    past = [Frame(random_images(i + 1), VALID, points) for i in range(frames - 1)]
    matching = None
    if config.bevdet.stereo:
        matching = Matching(torch.ones(1), torch.eye(3, 4).expand(1, CAMERAS, 3, 4))
        past = [replace(p, matching=matching) for p in past] + [Frame(random_images(9), VALID, None)]
    with torch.no_grad():
        output = network(random_images(), VALID, points, past, matching)
    assert output.depth_logits.shape == (1, CAMERAS, BINS, SIZE[0] // 16, SIZE[1] // 16)
    if config.bevdet.tasks:
        assert output.answers["heatmap"].shape == (1, 10, 16, 16)
        assert output.answers["box"].shape == (1, 10 * len(config.bevdet.tasks), 16, 16)
    if config.bevdet.occupancy != "none":
        assert output.answers["occupancy_logits"].shape == (1, 18, 8, 16, 16)
    assert output.answers
    assert all(torch.isfinite(value).all() for value in output.answers.values())


@pytest.fixture(scope="module")
def bevdet4d(repository: Path) -> tuple[ModelConfig, torch.nn.Module, BatchedPoints]:
    config = reduced_of(repository, "bevdet4d_r50")
    torch.manual_seed(0)
    return config, build_bevdet(config, "finetune").eval(), geometry(config)


def test_a_missing_camera_says_nothing(bevdet4d) -> None:
    _, network, points = bevdet4d
    one, images = torch.tensor([[1.0, 0.0]]), random_images()
    other = images.clone()
    other[:, 1] = 7.0
    with torch.no_grad():
        a, b = (network.frame_bev(Frame(i, one, points))[0] for i in (images, other))
        c = network.frame_bev(Frame(other, VALID, points))[0]
    torch.testing.assert_close(a, b)
    assert not torch.allclose(b, c)


def test_the_past_is_seen_but_takes_no_gradient(bevdet4d) -> None:
    _, network, points = bevdet4d
    joined: list[torch.Tensor] = []
    hook = network.bev_encoder.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0]))
    past = random_images(1).requires_grad_()
    output = network(random_images(), VALID, points, [Frame(past, VALID, points)])
    hook.remove()
    with torch.no_grad():
        frames = [Frame(random_images(seed), VALID, points) for seed in (0, 1)]
        each = [network.frame_bev(frame)[0] for frame in frames]
    torch.testing.assert_close(joined[0], torch.cat(each, 1))
    assert not torch.equal(*each)
    output.answers["heatmap"].sum().backward()
    assert past.grad is None
    assert network.image_encoder.neck.smooth.weight.grad.abs().sum() > 0
    assert network.view_transform.depth_net.predict.weight.grad.abs().sum() > 0


def test_frames_are_joined_in_the_published_order() -> None:
    key, newer, older = (torch.full((1, 1, 2, 2), float(v)) for v in (1, 2, 3))
    first = TemporalFusion(None, 3, newest_first=True)
    assert first(key, [newer, older])[0, :, 0, 0].tolist() == [1, 2, 3]
    assert first(key, [newer])[0, :, 0, 0].tolist() == [1, 2, 1]  # the key frame stands in
    last = TemporalFusion(None, 3, newest_first=False)
    assert last(key, [newer, older])[0, :, 0, 0].tolist() == [3, 2, 1]


def warped(past: torch.Tensor, key2past: np.ndarray, bev: BevGrid, quirks: bool) -> torch.Tensor:
    return warp_bev(past, torch.from_numpy(warp_table(key2past, bev, quirks))[None])


@pytest.mark.parametrize("quirks", [False, True])
def test_warping_follows_the_ego_motion(quirks: bool) -> None:
    bev = BevGrid((-8.0, -4.0), (1.0, 1.0), (16, 8))
    past = torch.randn(1, 3, 8, 16)
    key2past = np.eye(4)
    torch.testing.assert_close(warped(past, key2past, bev, quirks), past)
    key2past[0, 3] = 2.0  # ego drove two metres: what was at x + 2 is now at x
    moved = warped(past, key2past, bev, quirks)
    torch.testing.assert_close(moved[..., :-2], past[..., 2:], rtol=1e-4, atol=1e-4)
    assert moved[..., -2:].abs().max() < 1e-4


def test_turning_about_the_ego_needs_cell_centres() -> None:
    bev = BevGrid((-4.0, -4.0), (1.0, 1.0), (8, 8))
    past = torch.randn(1, 2, 8, 8)
    half_turn = np.diag([-1.0, -1, 1, 1])
    torch.testing.assert_close(warped(past, half_turn, bev, False), past.flip(2, 3), rtol=1e-4, atol=1e-4)
    quirk = warped(past, half_turn, bev, True)
    torch.testing.assert_close(quirk[..., 1:, 1:], past.flip(2, 3)[..., :-1, :-1], rtol=1e-4, atol=1e-4)


def test_matching_prefers_the_hypothesis_that_fits() -> None:
    torch.manual_seed(0)
    past = torch.randn(1, 8, 6, 10)
    key = past.roll(-2, 3)  # what is at column c was at c + 2
    y, x = torch.meshgrid(torch.linspace(-1, 1, 6), torch.arange(10.0), indexing="ij")
    grids = [torch.stack([(x + shift) / 9 * 2 - 1, y], -1) for shift in (0.0, 1.0, 2.0, 30.0)]
    cost = matching_cost(key, past, torch.stack(grids)[None])
    assert cost.shape == (1, 4, 6, 10)
    torch.testing.assert_close(cost.sum(1), torch.ones(1, 6, 10))
    assert (cost[..., :8].argmax(1) == 2).all()


def test_pretraining_hands_its_parts_on(repository: Path) -> None:
    config = reduced_of(repository, "flashocc_r50_m0")
    torch.manual_seed(0)
    pretrained, target = build_bevdet(config, "pretrain"), build_bevdet(config, "finetune")
    with torch.no_grad():
        output = pretrained.eval()(random_images(), VALID, geometry(config))
    assert output.answers["reconstruction_logits"].shape == (1, 2, 8, 16, 16)
    report = transfer(pretrained.state_dict(), target)
    assert not report.mismatched
    assert {n.split(".")[0] for n in report.new} == {"occupancy_head"}
    carried = {"image_encoder", "view_transform", "bev_encoder"}
    assert {n.split(".")[0] for n in report.carried} == carried
    for name in report.carried:
        torch.testing.assert_close(target.state_dict()[name], pretrained.state_dict()[name])


def a_batch(config: ModelConfig, boxes: int) -> TrainingBatch:
    volume = (1, *config.grid.shape[::-1])
    rng = torch.Generator().manual_seed(0)
    row = torch.tensor([[3.0, -2, 0.5, 4, 2, 1.5, 0.2, float("nan"), float("nan")]])
    return TrainingBatch(
        names=("a",),
        images=torch.randint(0, 255, (1, CAMERAS, 3, *SIZE), generator=rng).byte(),
        camera_valid=VALID,
        geometry=geometry(config),
        depth_bin=torch.randint(-1, BINS, (1, CAMERAS, SIZE[0] // 16, SIZE[1] // 16), generator=rng),
        state=torch.randint(0, 3, volume, generator=rng),
        visible=torch.ones(volume, dtype=torch.bool),
        evidence=torch.ones(volume),
        boxes=(row.repeat(boxes, 1),),
        labels=(torch.arange(boxes),),
        semantics=torch.randint(0, 18, volume, generator=rng),
        semantics_mask=torch.ones(volume, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("bevdepth_r50_megvii", {"heatmap", "box", "depth"}),
        ("flashocc_r50_m0", {"semantics", "occupied", "depth"}),
    ],
)
def test_both_stages_train_the_family(repository: Path, name: str, want: set[str]) -> None:
    config = reduced_of(repository, name)
    torch.manual_seed(0)
    objectives = {
        "pretrain": PretrainObjective(config, LossConfig()),
        "finetune": FinetuneObjective(config, LossConfig(), torch.ones(18)),
    }
    for stage, objective in objectives.items():
        network = build_bevdet(config, stage).train()
        for norm in (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.eval()  # one value per channel at this size cannot be normalised by a batch
        terms = objective(network, a_batch(config, 2))
        assert set(terms) == ({"reconstruction", "depth"} if stage == "pretrain" else want)
        total = sum(terms.values())
        total.backward()
        assert torch.isfinite(total)
        gradient = network.image_encoder.backbone.layer1[0].conv1.weight.grad
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


def plain_cost(key: np.ndarray, past: np.ndarray, img2past: np.ndarray, size: tuple[int, int], lift: LiftConfig):
    """The cost volume of one camera by loops: key, past (F, h, w); returns (D, h, w)."""
    channels, rows, columns = key.shape
    depths = lift.depth.lo + np.arange(lift.depth.bins) * lift.depth.step
    cost = np.zeros((len(depths), rows, columns))
    for d, i, j in np.ndindex(cost.shape):
        u, v = j * (size[0] - 1) / (columns - 1), i * (size[1] - 1) / (rows - 1)
        x, y, z = img2past @ (u * depths[d], v * depths[d], depths[d], 1.0)
        read = np.zeros(channels)
        if z >= 1e-3:
            # From network pixels to the map: first on first and last on last.
            column, row = x / z * (columns - 1) / (size[0] - 1), y / z * (rows - 1) / (size[1] - 1)
            for r, c in (
                (math.floor(row), math.floor(column)),
                (math.floor(row), math.floor(column) + 1),
                (math.floor(row) + 1, math.floor(column)),
                (math.floor(row) + 1, math.floor(column) + 1),
            ):
                if 0 <= r < rows and 0 <= c < columns:
                    read += past[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
        cost[d, i, j] = np.abs(key[:, i, j] - read).sum() + 5.0 * (read[-4] == 0)
    weight = np.exp(-cost - (-cost).max(0))
    return weight / weight.sum(0)


def test_the_cost_volume_is_the_plain_one(repository: Path) -> None:
    """Two cameras that turned and moved, against loops over every depth, row and column."""
    config = reduced_of(repository, "bevdet_occ_r50_4d_stereo")
    network = build_bevdet(config, "finetune")
    rng, size = np.random.default_rng(0), (config.image.width, config.image.height)
    shape = (CAMERAS, 8, size[1] // 4, size[0] // 4)
    key, past = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    optics = np.array([[70.0, 0, 47], [0, 65, 30], [0, 0, 1]])
    moved = make_transform(rotation_from_yaw(0.1), (0.3, -0.1, -1.2))
    poses = np.stack([np.eye(4), moved @ moved])
    img2past = image_to_past(np.stack([optics] * 2), poses @ moved, np.stack([optics * [[1.1], [1], [1]]] * 2), poses)
    got = network.matching_cost(*(torch.from_numpy(a) for a in (key, past, img2past)), torch.tensor([1.0, 0.0]))
    want = plain_cost(key[0], past[0], img2past[0].astype(np.float64), size, config.lift)
    np.testing.assert_allclose(got[0].numpy(), want, atol=2e-5)
    assert (want.max(0) > 0.5).any()  # it prefers something
    assert not got[1].any()  # of a camera that was not there before nothing is said


def test_a_pixel_is_found_where_it_was() -> None:
    """A still point, projected by both cameras; `image_to_past` brings its first pixel to its earlier one."""
    optics = np.array([[70.0, 0, 47], [0, 65, 30], [0, 0, 1]])
    cam2global = make_transform(rotation_from_yaw(0.3), (5.0, 1.0, 2.0))
    before = make_transform(rotation_from_yaw(0.2), (4.0, 1.5, 2.0))
    point = cam2global @ (0.4, -0.2, 6.0, 1.0)

    def seen(pose: np.ndarray) -> np.ndarray:
        return optics @ (np.linalg.inv(pose) @ point)[:3]

    now, then = seen(cam2global), seen(before)
    (img2past,) = image_to_past(optics[None], cam2global[None], optics[None], before[None])
    np.testing.assert_allclose(img2past @ (*now, 1.0), then, rtol=1e-5)


def test_stereo_learns_from_its_past(repository: Path) -> None:
    """Fine-tuning runs on batches with a past, and what the frame before shows changes depth."""
    config = reduced_of(repository, "bevdet_occ_r50_4d_stereo")
    torch.manual_seed(0)
    network = randomise_zero_init(build_bevdet(config, "finetune")).eval()
    points, still = geometry(config), torch.eye(3, 4).expand(1, CAMERAS, 3, 4)
    past = [
        Frame(random_images(1), VALID, points, Matching(torch.ones(1), still)),
        Frame(random_images(2), VALID, None),
    ]

    def depth(known: float, other: int = 1) -> torch.Tensor:
        frames = [replace(past[0], images=random_images(other)), past[1]]
        with torch.no_grad():
            return network(random_images(), VALID, points, frames, Matching(torch.tensor([known]), still)).depth_logits

    assert torch.equal(depth(0.0), depth(0.0, other=5))  # nothing is known of before
    assert not torch.allclose(depth(1.0), depth(1.0, other=5))


@pytest.mark.parametrize("name", ["bevdepth4d_r50_megvii", "bevdet_occ_r50_4d_stereo"])
def test_a_missing_camera_is_silent_in_every_network(repository: Path, name: str) -> None:
    """Refining a lifted volume has biases, and stereo a state: neither lets a missing camera speak."""
    config = reduced_of(repository, name)
    torch.manual_seed(0)
    network, points = randomise_zero_init(build_bevdet(config, "finetune")).eval(), geometry(config)
    one, images = torch.tensor([[1.0, 0.0]]), random_images()
    other = images.clone()
    other[:, 1] = 7.0
    with torch.no_grad():
        a, b = (network.frame_bev(Frame(i, one, points))[0] for i in (images, other))
        maps = [network.matching_map(Frame(i, one, None)) for i in (images, other)]
    torch.testing.assert_close(a, b)
    if maps[0] is not None:
        torch.testing.assert_close(maps[0], maps[1])
        assert not maps[0][1].any()


def test_imagenet_weights_are_torchvisions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = ResNet(50, (3, 4))
    encoder = ResNetImageEncoder(backbone, PyramidNeck(backbone.widths, 8))
    state = {name: value + 1 for name, value in backbone.state_dict().items()}
    torch.save({**state, "fc.weight": torch.zeros(2)}, tmp_path / "resnet50.pth")
    assert encoder.load_imagenet(tmp_path / "resnet50.pth") == ("fc.weight",)
    torch.testing.assert_close(backbone.conv1.weight, state["conv1.weight"])
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*conv1\.weight"):
        encoder.load_imagenet(tmp_path / "other.pth")


def test_config_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="depth_net 'deep'"):
        BevDetConfig(depth_net="deep")
    with pytest.raises(ConfigError, match=r"bevdet\.frames 0"):
        BevDetConfig(frames=0)
    with pytest.raises(ConfigError, match=r"bev\.shape \(100, 96\): must be multiples of 8"):
        BevDetModel(bev=BevGrid((-50.0, -48.0), (1.0, 1.0), (100, 96)), bevdet=BevDetConfig(bev_encoder="trunk"))
