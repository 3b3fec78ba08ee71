"""What the objectives do between network and losses: normalise, gather, and keep to the decoder's rule."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from occbev.config import ImageConfig
from occbev.inference.preprocess import Preprocessor
from occbev_training.losses.objectives import (
    at_voxels,
    keep_large_depthwise_in_float32,
    normalise_images,
    prefer_channels_last,
)


@pytest.mark.parametrize("order", ["rgb", "bgr_swapped"])
def test_training_normalises_as_the_robot_does(order: str) -> None:
    config = ImageConfig(width=64, height=32, channel_order=order)
    pixels = np.random.default_rng(0).integers(0, 255, (1, 2, 32, 64, 3)).astype(np.uint8)
    got = normalise_images(torch.from_numpy(pixels).permute(0, 1, 4, 2, 3), config)
    want = np.stack([Preprocessor(config).normalise(image) for image in pixels[0]])
    np.testing.assert_allclose(got[0].numpy(), want, atol=1e-5)
    if order == "rgb":
        assert got.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_gathered_voxels_keep_logits_and_labels_together() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 4, 6, generator=generator, requires_grad=True)
    semantics = torch.randint(0, 5, (2, 3, 4, 6), generator=generator)
    mask = torch.rand(2, 3, 4, 6, generator=generator) < 0.3
    few, labels = at_voxels({"occupancy_logits": logits}, semantics, mask)
    count = int(mask.sum())
    assert few.shape == (1, 5, 1, 1, count)
    assert labels.shape == (1, 1, 1, count)
    torch.testing.assert_close(few[0, :, 0, 0].T, logits.movedim(1, -1)[mask])
    torch.testing.assert_close(labels.flatten(), semantics[mask])
    few.sum().backward()
    assert ((logits.grad != 0).any(1) == mask).all()


def test_large_depthwise_convolutions_stay_in_float32_and_the_rest_does_not() -> None:
    network = nn.ModuleDict(
        {
            "large": nn.Conv2d(8, 8, 5, padding=2, groups=8),
            "small": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        }
    )
    keep_large_depthwise_in_float32(network)
    x = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    plain = nn.functional.conv2d(x, network["large"].weight, network["large"].bias, padding=2, groups=8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network["large"](x), plain)
        assert network["large"](x.bfloat16()).dtype == torch.bfloat16
        assert network["small"](x).dtype == torch.bfloat16


def test_channels_last_changes_layout_and_no_value() -> None:
    network = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(3, 3))
    before = [weight.detach().clone() for weight in network.parameters()]
    prefer_channels_last(network)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    for weight, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(weight, old)
