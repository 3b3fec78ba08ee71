"""Whoever wants the pre-trained image encoder in own code opens a package by one call."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the training environment")

from occbev_training import load_network  # noqa: E402


def test_the_image_encoder_of_a_package_runs_in_ones_own_code() -> None:
    network = load_network("occbev-tiny")
    features = network.image_encoder(torch.zeros(2, 3, 128, 352))
    assert features.shape == (2, 128, 8, 22)
    assert not network.training
    weights = [parameter.abs().sum() for parameter in network.image_encoder.parameters()]
    assert all(torch.isfinite(weight) for weight in weights)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="occbev-none"):
        load_network("occbev-none")
