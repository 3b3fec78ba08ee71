"""Convolutions of an OpenVINO graph in bytes: post-training quantisation (NNCF) on prepared frames.

Only convolutions are quantised. Depth distributions, the weights of the view transform's table and the sums that it
makes are not: rounding any of them to 256 levels costs most of the occupancy. Of the convolutions, those of the image
stem and of the first two BEV stages cost the most and stay as they are; a BEV cell sums few or many points, so that its
usual values are a small part of its range.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino._offline_transformations import apply_moc_transformations

from occbev.config import ModelConfig
from occbev.inference.memory import Memory
from occbev.inference.openvino_backend import shared_core
from occbev.inference.preprocess import Preprocessor
from occbev.inference.table_cache import TableCache
from occbev_training.data.cache import CachedSample
from occbev_training.data.samples import Samples
from occbev_training.evaluation.data import read_cached_rig

KEPT = (
    "image_encoder.trunk.conv_stem",
    "image_encoder.trunk.conv1",
    "image_encoder.trunk.blocks.0.",
    "bev_encoder.down.0.",
    "bev_encoder.down.1.",
)
"""Beginnings of the names of modules whose convolutions are not quantised."""

CALIBRATION_FRAMES, COMPARED_FRAMES = 32, 8
"""Frames from which ranges are taken, and other ones on which the result is compared."""

LEAST_AGREEMENT = 0.7
"""Least `agreement` of the quantised graph with the one it came from; the shipped network has 0.95."""

CONVOLUTIONS = ("Convolution", "GroupConvolution")

Arrays = Mapping[str, NDArray[Any]]


class QuantisationError(ValueError):
    """A network that cannot be quantised, or is another one afterwards."""


def quantise(graph: openvino.Model, model: ModelConfig, cache: Samples) -> tuple[openvino.Model, float]:
    """Return a graph with its convolutions in bytes, and its `agreement` with the given one.

    cache: prepared frames of drives that the network was trained on, at its size.
    Raises: QuantisationError if the frames do not do, see `check_frames`, or the graphs agree too little.
    """
    check_frames(model, cache)
    frames = _frames(graph, model, cache)
    quantised = quantise_on(graph, frames[COMPARED_FRAMES:])
    compared = _alike(frames[:COMPARED_FRAMES])
    pairs = zip(_probabilities(graph, compared), _probabilities(quantised, compared), strict=True)
    mean = float(np.mean([agreement(before, after) for before, after in pairs]))
    if mean < LEAST_AGREEMENT:
        raise QuantisationError(
            f"{model.name}: the quantised graph agrees with its origin to {mean:.2f}, want {LEAST_AGREEMENT}"
        )
    return quantised, mean


def quantise_on(graph: openvino.Model, frames: Sequence[Arrays]) -> openvino.Model:
    """Return a graph with its convolutions in bytes, their ranges from the inputs of some frames; nothing is compared."""
    import nncf

    nncf.set_log_level(logging.WARNING)
    folded = graph.clone()
    # Pads become part of the convolutions that read them, which is not done once they are quantised.
    apply_moc_transformations(folded, cf=True)
    return nncf.quantize(
        folded,
        nncf.Dataset(frames),
        preset=nncf.QuantizationPreset.MIXED,  # symmetric weights, asymmetric activations
        subset_size=len(frames),
        ignored_scope=nncf.IgnoredScope(names=find_float_convolutions(folded), types=_other_types(folded)),
    )


def check_frames(model: ModelConfig, cache: Samples) -> None:
    """Raise QuantisationError if a network cannot be quantised on these frames."""
    wanted = CALIBRATION_FRAMES + COMPARED_FRAMES
    if len(cache) < wanted:
        raise QuantisationError(f"{cache.root}: holds {len(cache)} frames, want {wanted} or more")
    if cache.info.image != model.image:
        raise QuantisationError(f"{cache.root}: was prepared for {cache.info.image}, the network takes {model.image}")


def described(cache: Samples) -> str:
    """What was quantised and on what, for the card."""
    drives = len(cache.drives)
    return (
        f"convolutions but those of the image stem and of the first two BEV stages, ranges from {CALIBRATION_FRAMES}"
        f" frames, spread evenly over the {len(cache)} of {drives} training drives"
    )


def find_float_convolutions(graph: openvino.Model) -> list[str]:
    """Return the names of the convolutions that stay as they are."""
    return [
        op.get_friendly_name()
        for op in graph.get_ordered_ops()
        if op.get_type_name() in CONVOLUTIONS and module_of(op).startswith(KEPT)
    ]


def module_of(op: Any) -> str:
    """Return the torch module that an operator was made from, as "bev_encoder.down.0.0.first.0".

    A convolution that a norm was folded into is known by the bias that follows it alone.
    """
    while not op.get_friendly_name().startswith(PREFIX):
        readers = list(op.output(0).get_target_inputs())
        if not readers:
            return ""
        op = readers[0].get_node()
    return str(op.get_friendly_name()).removeprefix(PREFIX).split("/")[0]


PREFIX = "__module.network."
"""What the names of operators begin with: the graph holds the network under this name."""


def agreement(before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]]) -> float:
    """Return the least soft intersection over union of two results' probabilities: sum of minima over sum of maxima."""
    pairs = zip(before, after, strict=True)
    return min(float(np.minimum(a, b).sum() / np.maximum(a, b).sum()) for a, b in pairs)


def _frames(graph: openvino.Model, model: ModelConfig, cache: Samples) -> list[Arrays]:
    """Inputs of the graph for frames at even steps, in random order; a network with a memory remembers nothing."""
    wanted = CALIBRATION_FRAMES + COMPARED_FRAMES
    steps = np.linspace(0, len(cache) - 1, wanted).astype(int)
    order = np.random.default_rng(0).permutation(steps)
    names = {port.get_any_name() for port in graph.inputs}
    tables, preprocessor = TableCache(model, "bag"), Preprocessor(model.image)

    def inputs(sample: CachedSample) -> Arrays:
        images = np.stack([preprocessor.normalise(image) for image in sample.images])
        rig = read_cached_rig(sample, [f"camera {i}" for i in range(len(sample.images))])
        arrays: Arrays = {
            "images": images[None],
            "camera_valid": sample.camera_valid[None].astype(np.float32),
            **tables.tables(rig),
            **Memory(model).inputs(0, None, rig),
        }
        return {name: array for name, array in arrays.items() if name in names}

    return [inputs(cache[int(index)]) for index in order]


def _alike(frames: Sequence[Arrays]) -> list[Arrays]:
    """Return those frames whose arrays have the shapes of the first: rigs may differ, a compiled graph takes one."""
    shapes = {name: array.shape for name, array in frames[0].items()}
    return [frame for frame in frames if {name: array.shape for name, array in frame.items()} == shapes]


def _other_types(graph: openvino.Model) -> list[str]:
    """Types of all operators but convolutions."""
    types = {op.get_type_name() for op in graph.get_ops()}
    return sorted(types - {*CONVOLUTIONS, "Parameter", "Result", "Constant"})


def _probabilities(graph: openvino.Model, frames: Sequence[Arrays]) -> Iterator[list[NDArray[Any]]]:
    """What a graph says of each frame: how likely every voxel is occupied, and every cell an object's centre."""
    graph = graph.clone()
    graph.reshape({name: list(array.shape) for name, array in frames[0].items()})
    compiled = shared_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for arrays in frames:
        results = {port.get_any_name(): array for port, array in compiled(arrays).items()}
        said = []
        if "occupancy_logits" in results:
            logits = results["occupancy_logits"][0]
            shares = np.exp(logits - logits.max(0))
            said.append(1 - shares[-1] / shares.sum(0))
        if "heatmap" in results:
            said.append(1 / (1 + np.exp(-results["heatmap"])))
        yield said
