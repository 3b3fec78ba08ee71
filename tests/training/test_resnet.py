"""Residual networks: published weight names, caffe style, deformable stages, what stays frozen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
from torchvision.models import resnet50  # noqa: E402

from occbev.inference.families.queries import ResNetConfig  # noqa: E402
from occbev_training.engine.stages import begin_from  # noqa: E402
from occbev_training.models.encoders.deformable_conv import DeformableConv2d, plain_operators  # noqa: E402
from occbev_training.models.encoders.resnet import ResNet  # noqa: E402
from occbev_training.models.queries.query_networks import NECK_NAMES, PyramidEncoder  # noqa: E402
from occbev_training.models.renaming import reference_names  # noqa: E402


def test_it_takes_torchvision_weights_and_says_the_same() -> None:
    torch.manual_seed(0)
    theirs, ours = resnet50(weights=None).eval(), ResNet(50, (4,)).eval()
    report = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not report.missing_keys
    assert set(report.unexpected_keys) == {"fc.weight", "fc.bias"}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pooled = ours(images)[0].mean((2, 3))
        torch.testing.assert_close(theirs.fc(pooled), theirs(images))


def test_maps_come_finest_first_with_their_widths() -> None:
    with torch.device("meta"):
        network = ResNet(50, (1, 3, 4))
        maps = network(torch.zeros(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 256, 16, 24), (2, 1024, 4, 6), (2, 2048, 2, 3)]
    assert network.widths == (256, 1024, 2048)


def test_caffe_style_strides_in_the_first_convolution() -> None:
    with torch.device("meta"):
        block = ResNet(50, caffe_style=True).layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))


@pytest.mark.parametrize("name", ["bevformer_base", "detr3d_r101"])
def test_deformable_names_are_the_published_ones(golden_folder: Path, name: str) -> None:
    table = json.loads((golden_folder / f"{name}_state_dict.json").read_text())
    want = {k[len("img_backbone.") :]: v for k, v in table.items() if k.startswith("img_backbone.")}
    with torch.device("meta"):
        network = ResNet(101, (2, 3, 4), caffe_style=True, deformable_stages=(3, 4))
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == want


def test_a_deformable_convolution_begins_as_a_plain_one() -> None:
    torch.manual_seed(0)
    plain = DeformableConv2d(4, 6, groups=2, modulated=False, bias=True)
    x = torch.randn(2, 4, 7, 5)
    want = torch.nn.functional.conv2d(x, plain.weight, plain.bias, padding=1, groups=2)
    torch.testing.assert_close(plain(x), want)
    modulated = DeformableConv2d(4, 6, stride=2)
    want = torch.nn.functional.conv2d(x, modulated.weight, None, 2, 1) / 2  # sigmoid(0) per tap
    torch.testing.assert_close(modulated(x), want)


def test_offsets_are_y_then_x_of_each_tap() -> None:
    conv = DeformableConv2d(1, 1, modulated=False)
    x = torch.arange(25.0).view(1, 1, 5, 5)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 1, 1] = 1  # the centre tap alone
        conv.conv_offset.bias[8] = 1  # its y offset
    torch.testing.assert_close(conv(x)[0, 0, :4], x[0, 0, 1:])


@pytest.mark.parametrize(("stride", "groups", "modulated"), [(1, 1, True), (2, 2, False)])
def test_plain_operators_say_the_same(stride: int, groups: int, modulated: bool) -> None:
    torch.manual_seed(0)
    conv = DeformableConv2d(4, 6, stride, groups, modulated, bias=True)
    torch.nn.init.normal_(conv.conv_offset.weight, std=0.3)  # offsets of pixels, some out of the image
    x = torch.randn(2, 4, 7, 9)
    want = conv(x)
    with plain_operators(torch.nn.Sequential(conv)):
        got = conv(x)
    assert not conv.plain
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_frozen_stages_and_norms_do_not_move() -> None:
    network = ResNet(50, (3,), frozen_stages=2, frozen_norms=True).train()
    assert not any(p.requires_grad for p in network.layer1.parameters())
    assert network.layer2[0].conv1.weight.requires_grad
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(m.training or m.weight.requires_grad for m in norms)


def test_files_that_count_no_batches_are_taken(tmp_path: Path) -> None:
    """As older torchvision files and those of caffe networks are."""
    torch.manual_seed(0)
    state = {n: v for n, v in resnet50(weights=None).state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet50.pth")
    network = ResNet(50, deformable_stages=(3, 4))
    assert network.load_imagenet(tmp_path / "resnet50.pth") == ("fc.bias", "fc.weight")
    torch.testing.assert_close(network.layer3[0].conv2.weight, state["layer3.0.conv2.weight"])
    assert not network.layer3[0].conv2.conv_offset.weight.any()


def fcos3d(encoder: PyramidEncoder, offset: str = "conv2.conv_offset") -> dict[str, torch.Tensor]:
    """A checkpoint of a detector with the same backbone and pyramid, all of its values 7."""
    names = reference_names(encoder.neck.state_dict(), NECK_NAMES)
    state = {f"backbone.{n.replace('conv2.conv_offset', offset)}": v for n, v in encoder.backbone.state_dict().items()}
    state |= {f"neck.{names[n]}": v for n, v in encoder.neck.state_dict().items()}
    return {n: torch.full_like(v, 7) for n, v in state.items()}


@pytest.mark.parametrize("offset", ["conv2.conv_offset", "conv2_offset"])
def test_training_begins_from_a_detector(tmp_path: Path, offset: str) -> None:
    """FCOS3D, from which the published BEVFormers and DETR3D begin; of its pyramid what has the same shape."""
    config = ResNetConfig(depth=14, stages=(2, 3, 4), levels=4, channels=8, caffe_style=True, deformable_stages=(3, 4))
    begun = PyramidEncoder(config)
    state = fcos3d(begun, offset)
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(8, 2048, 1, 1)
    unused = {"neck.fpn_convs.4.conv.weight": torch.zeros(1), "bbox_head.cls_convs.0.conv.weight": torch.zeros(1)}
    torch.save({"state_dict": state | unused, "meta": {}}, tmp_path / "fcos3d.pth")
    record = begin_from(SimpleNamespace(image_encoder=begun), tmp_path / "fcos3d.pth")
    assert record["transfer"]["unused"] == sorted([*unused, "neck.lateral_convs.0.conv.weight"])
    kept = begun.neck.lateral[0].weight
    assert all(bool((v == 7).all()) for v in begun.state_dict().values() if not torch.equal(v, kept))
    assert not (kept == 7).any()


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="depth 34"):
        ResNet(34)
