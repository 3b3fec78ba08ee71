"""Parts that no published array pins, each against a second writing of its description in plain NumPy.

The oracles share no operator with the networks: convolutions, norms and interpolation are written out here for one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from occbev.geometry import make_transform, rotation_from_yaw  # noqa: E402
from occbev.grid import BevGrid  # noqa: E402
from occbev.inference.reference_points import warp_table  # noqa: E402
from occbev_training.models.encoders.fpn import FeaturePyramid  # noqa: E402
from occbev_training.models.encoders.image_necks import DeconvolutionNeck, PyramidNeck  # noqa: E402
from occbev_training.models.heads.reference_occupancy import PlaneOccupancy, VolumeOccupancy  # noqa: E402
from occbev_training.models.lift_splat.bev_residual_encoder import TrunkEncoder  # noqa: E402
from occbev_training.models.lift_splat.depth_net import GATE_PARAMETERS, GatedDepth  # noqa: E402
from occbev_training.models.lift_splat.temporal import warp_bev  # noqa: E402

Array = NDArray[np.float64]


# --- operators, written out for one image (C, ...) -------------------------------------------


def conv(x: Array, layer: torch.nn.Module, stride: int = 1, padding: int = 0) -> Array:
    """Slide a kernel over a map or a volume: one product for each of its taps."""
    weight = layer.weight.detach().numpy()  # (O, C, *kernel)
    kernel = weight.shape[2:]
    padded = np.pad(x, [(0, 0), *[(padding, padding)] * len(kernel)])
    size = [(n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[1:], kernel, strict=True)]
    total = np.zeros((len(weight), *size))
    for tap in np.ndindex(*kernel):
        part = padded[(slice(None), *(slice(t, t + stride * n, stride) for t, n in zip(tap, size, strict=True)))]
        part = part[(slice(None), *(slice(n) for n in size))]
        total += np.tensordot(weight[(slice(None), slice(None), *tap)], part, 1)
    if layer.bias is not None:
        total += layer.bias.detach().numpy().reshape(-1, *[1] * len(kernel))
    return total


def spread(x: Array, weight: Array) -> Array:
    """Turn every pixel into a patch of its own (a transposed convolution whose stride is its kernel)."""
    _, outputs, side, _ = weight.shape
    total = np.zeros((outputs, x.shape[1] * side, x.shape[2] * side))
    for row, column in np.ndindex(*x.shape[1:]):
        patch = np.einsum("c,coij->oij", x[:, row, column], weight)
        total[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = patch
    return total


def norm(x: Array, layer: torch.nn.Module) -> Array:
    """Normalise every channel by what training has seen of it."""
    mean, variance, weight, bias = (
        part.detach().numpy().reshape(-1, *[1] * (x.ndim - 1))
        for part in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / np.sqrt(variance + layer.eps) * weight + bias


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def linear(x: Array, layer: torch.nn.Module) -> Array:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def read_between(x: Array, row: float, column: float) -> Array:
    """Interpolate a map (C, H, W) between its four nearest pixels; what lies outside is zero."""
    total = np.zeros(len(x))
    for r in (int(np.floor(row)), int(np.floor(row)) + 1):
        for c in (int(np.floor(column)), int(np.floor(column)) + 1):
            if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                total += (1 - abs(row - r)) * (1 - abs(column - c)) * x[:, r, c]
    return total


def enlarge(x: Array, size: Sequence[int]) -> Array:
    """Repeat pixels (C, H, W) up to a larger size."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, x.shape[1:], strict=True))
    return x[:, rows][:, :, columns]


def plane_block(x: Array, block: torch.nn.Module, skip: int) -> Array:
    """Two 3x3 convolutions beside a skip; skip: 0 the input itself, else the kernel of a convolution."""
    inner = relu(norm(conv(x, block.conv1, padding=1), block.bn1))
    inner = norm(conv(inner, block.conv2, padding=1), block.bn2)
    return relu(inner + (conv(x, block.downsample, padding=skip // 2) if skip else x))


def basic_block(x: Array, block: torch.nn.Module, stride: int) -> Array:
    """ResNet's basic block; where it strides the skip is a 1x1 convolution with a norm."""
    inner = relu(norm(conv(x, block.conv1, stride, 1), block.bn1))
    inner = norm(conv(inner, block.conv2, padding=1), block.bn2)
    skip = norm(conv(x, block.downsample[0], stride), block.downsample[1]) if stride > 1 else x
    return relu(inner + skip)


# --- networks with weights and norms that all have their say ---------------------------------


def ready(module: torch.nn.Module) -> torch.nn.Module:
    """Give every weight, bias and norm a random value; double precision."""
    generator = torch.Generator().manual_seed(1)
    module = module.double().eval()
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for name, value in module.named_buffers():
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return module


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def run(module: torch.nn.Module, *inputs: object) -> object:
    """Run a module on one image: every array gets a batch of one, which is taken off again."""

    def one(value: object) -> object:
        return [one(v) for v in value] if isinstance(value, list) else torch.from_numpy(value)[None]

    def off(value: object) -> object:
        return [off(v) for v in value] if isinstance(value, (list, tuple)) else value[0].numpy()

    with torch.no_grad():
        return off(module(*map(one, inputs)))


def assert_same(got: object, want: object) -> None:
    """Equal in double precision, and neither constant nor zero: such an answer would prove nothing."""
    assert np.std(want) > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


# --- image necks -----------------------------------------------------------------------------


def test_feature_pyramid() -> None:
    """Lin et al. 2017: laterals, coarse added to fine, 3x3 outputs; further levels stride from the last output."""
    pyramid = ready(FeaturePyramid((3, 4, 5), 6, 4))
    maps = [draw(3, 12, 10), draw(4, 6, 5), draw(5, 3, 3)]
    third = conv(maps[2], pyramid.lateral[2])
    second = conv(maps[1], pyramid.lateral[1]) + enlarge(third, (6, 5))
    first = conv(maps[0], pyramid.lateral[0]) + enlarge(second, (12, 10))
    want = [conv(x, layer, padding=1) for x, layer in zip((first, second, third), pyramid.output, strict=False)]
    want.append(conv(want[2], pyramid.output[3], stride=2, padding=1))
    for got, level in zip(run(pyramid, maps), want, strict=True):
        assert_same(got, level)


def test_pyramid_neck() -> None:
    """BEVDet: stride 32 added to stride 16, then one 3x3 convolution of the sum."""
    neck = ready(PyramidNeck((4, 5), 6))
    maps = [draw(4, 6, 8), draw(5, 3, 4)]
    joined = conv(maps[0], neck.lateral[0]) + enlarge(conv(maps[1], neck.lateral[1]), (6, 8))
    assert_same(run(neck, maps), conv(joined, neck.smooth, padding=1))


def test_deconvolution_neck() -> None:
    """SECOND's neck: every level to one size by a kernel as large as its stride, norm (eps 1e-3), ReLU, side by side."""
    neck = ready(DeconvolutionNeck((3, 4, 5), 6, (0.5, 1, 2)))
    maps = [draw(3, 8, 12), draw(4, 4, 6), draw(5, 2, 3)]
    assert all(level[1].eps == 1e-3 for level in neck.levels)
    weights = [level[0].weight.detach().numpy() for level in neck.levels]
    levels = [conv(maps[0], neck.levels[0][0], stride=2), spread(maps[1], weights[1]), spread(maps[2], weights[2])]
    want = np.concatenate([relu(norm(x, level[1])) for x, level in zip(levels, neck.levels, strict=True)])
    assert want.shape == (18, 4, 6)
    assert_same(run(neck, maps), want)


# --- depth -----------------------------------------------------------------------------------


def test_gated_depth() -> None:
    """BEVDet's first BEVDepth: a gate of the camera's parameters, three blocks, a modulated deformable convolution."""
    net = ready(GatedDepth(5, 4, 3, hidden=6))
    features, camera = draw(5, 4, 5), draw(GATE_PARAMETERS, seed=2)
    gate = sigmoid(linear(norm(camera, net.gate[0]), net.gate[1]))
    x = conv(features, net.reduce) * gate[:, None, None]
    for block, skip in zip(net.blocks, (3, 0, 0), strict=True):
        x = plane_block(x, block, skip)
    x = norm(deform(x, net.deform[0]), net.deform[1])
    depth, context = run(net, features, camera)
    assert_same(depth, conv(x, net.predict))
    assert_same(context, conv(features, net.context))


def deform(x: Array, layer: torch.nn.Module) -> Array:
    """Zhu et al. 2019: each of nine taps moves by (down, across), and is weighed by a sigmoid."""
    predicted = conv(x, layer.conv_offset, padding=1)
    weight = layer.weight.detach().numpy()
    total = np.zeros((len(weight), *x.shape[1:]))
    for row, column in np.ndindex(*x.shape[1:]):
        for tap in range(9):
            down, across = predicted[2 * tap : 2 * tap + 2, row, column]
            read = read_between(x, row + tap // 3 - 1 + down, column + tap % 3 - 1 + across)
            total[:, row, column] += weight[:, :, tap // 3, tap % 3] @ read * sigmoid(predicted[18 + tap, row, column])
    return total + layer.bias.detach().numpy()[:, None, None]


# --- BEV trunk -------------------------------------------------------------------------------


def test_trunk_encoder() -> None:
    """BEVDepth: a ResNet-18 without pooling; the BEV itself and three stages, each brought to its size, side by side."""
    encoder = ready(TrunkEncoder(3, 4, 2))
    bev, trunk = draw(3, 16, 8), encoder.trunk
    x = relu(norm(conv(bev, trunk.conv1, stride=2, padding=3), trunk.bn1))
    maps = [bev]
    for layer, stride in ((trunk.layer1, 1), (trunk.layer2, 2), (trunk.layer3, 2)):
        x = basic_block(basic_block(x, layer[0], stride), layer[1], 1)
        maps.append(x)
    levels = [spread(m, level[0].weight.detach().numpy()) for m, level in zip(maps, encoder.neck.levels, strict=True)]
    want = np.concatenate([relu(norm(x, level[1])) for x, level in zip(levels, encoder.neck.levels, strict=True)])
    assert want.shape == (8, 16, 8)
    assert_same(run(encoder, bev), want)


# --- occupancy heads -------------------------------------------------------------------------


def softplus_perceptron(x: Array, layers: torch.nn.Module) -> Array:
    return linear(np.log1p(np.exp(linear(x, layers[0]))), layers[2])


def test_channels_to_heights() -> None:
    """FlashOcc: a cell's features say the classes of the voxels above it, those of one voxel beside each other."""
    heights, classes = 3, 4
    head = ready(PlaneOccupancy(5, 6, heights, classes))
    bev = draw(5, 4, 6)
    reduced = relu(conv(bev, head.reduce[0], padding=1))
    want = np.zeros((classes, heights, 4, 6))
    for row, column in np.ndindex(4, 6):
        answer = softplus_perceptron(reduced[:, row, column], head.predict)
        for height in range(heights):
            want[:, height, row, column] = answer[height * classes : (height + 1) * classes]
    assert_same(run(head, bev), want)


def test_volume_occupancy() -> None:
    """BEVDet-Occ: a 3D convolution, and the same perceptron for every voxel."""
    head = ready(VolumeOccupancy(4, 6, 5))
    volume = draw(4, 3, 5, 4)
    reduced = relu(conv(volume, head.reduce[0], padding=1))
    want = np.zeros((5, 3, 5, 4))
    for voxel in np.ndindex(3, 5, 4):
        want[(slice(None), *voxel)] = softplus_perceptron(reduced[(slice(None), *voxel)], head.predict)
    assert_same(run(head, volume), want)


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quirks", [False, True])
def test_warp_of_a_past_bev(quirks: bool) -> None:
    """BEVDet4D: each cell of the key frame reads the past BEV where its place was then; zero where that is outside.

    A cell stands for its centre; with the quirks of published weights for its lower corner.
    """
    bev = BevGrid((-6.0, -4.0), (1.0, 2.0), (10, 6))
    key2past = make_transform(rotation_from_yaw(0.4), (1.3, -0.7, 0.2))
    past, corner = draw(3, 6, 10), 0.0 if quirks else 0.5
    want = np.zeros_like(past)
    for row, column in np.ndindex(6, 10):
        place = [-6.0 + (column + corner) * 1.0, -4.0 + (row + corner) * 2.0, 0, 1]
        x, y = (key2past @ place)[:2]
        want[:, row, column] = read_between(past, (y + 4.0) / 2.0 - corner, (x + 6.0) / 1.0 - corner)
    assert (want == 0).all(0).any()  # some of the key frame was not seen before
    grid = torch.from_numpy(warp_table(key2past, bev, quirks)).double()[None]
    got = warp_bev(torch.from_numpy(past)[None], grid)[0].numpy()
    assert np.std(want) > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-5)  # the table is in single precision
    volume = warp_bev(torch.from_numpy(np.stack([past, 2 * past], 1))[None], grid)[0].numpy()  # (C, Z, Y, X)
    np.testing.assert_allclose(volume, np.stack([want, 2 * want], 1), atol=1e-5)
