"""Open the network of a model package in PyTorch: to run it, to look inside it, to use its parts elsewhere."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from occbev.inference.model_package import ModelPackage, find_package
from occbev_training.models.build import build_for_weights
from occbev_training.models.checkpoints import load_strictly, read_weights


def load_network(package: ModelPackage | Path | str) -> nn.Module:
    """Return the network of a package with its weights, on the CPU and in evaluation mode.

    package: loaded, or its folder, or the name of a shipped one. The parts are `image_encoder`, `view_transform`,
    `bev_encoder` and the heads, as far as the family has them. `image_encoder` takes (M, 3, height, width) images,
    normalised as the package's configuration states.
    Raises:
        PackageError: no such package, or a file differs from its hash. CheckpointError: weights do not fit.
    """
    loaded = package if isinstance(package, ModelPackage) else ModelPackage.load(find_package(package))
    path = loaded.path("weights.safetensors")
    state, _ = read_weights(path)
    network = build_for_weights(loaded.model, state)
    load_strictly(network, state, str(path))
    return network.eval()
