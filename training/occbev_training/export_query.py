"""Networks of the BEVFormer and DETR3D families as ONNX, checked against torch.

Reference points and ego motion stay outside the graph: they are inputs, as is the BEV of the frame before.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from occbev.config import ModelConfig
from occbev.inference.reference_points import EgoMotion, camera_tables, can_bus, motion_tables
from occbev_training.export import (
    FORBIDDEN_OPERATORS,
    ONNX_TOLERANCE,
    OPSET,
    ExportError,
    ring_rig,
)
from occbev_training.models.bevformer import CameraSlots, Motion
from occbev_training.models.deformable_conv import plain_operators
from occbev_training.models.query_networks import BevFormerNetwork, Detr3dNetwork, QueryOutput

Arrays = dict[str, NDArray[Any]]


class BevFormerGraph(nn.Module):
    """A BEVFormer with its tables and its state as separate inputs; a batch of one."""

    def __init__(self, network: BevFormerNetwork) -> None:
        super().__init__()
        self.network = network
        self.outputs = _names(network, "state_out_bev")

    def forward(
        self,
        images: Tensor,
        camera_valid: Tensor,
        table_query: Tensor,
        table_points: Tensor,
        table_slot: Tensor,
        can_bus: Tensor,
        state_in_bev: Tensor,
        state_known: Tensor,
        table_align: Tensor,
        table_shift: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the outputs that the network has, in the order of `outputs`."""
        hits = CameraSlots(table_query, table_points, camera_valid[0], table_slot)
        motion = Motion(state_in_bev, state_known, table_align, table_shift)
        return _select(self.network(images, hits, can_bus, motion), self.outputs)


class Detr3dGraph(nn.Module):
    """A DETR3D with its projection matrices as input; a batch of one."""

    def __init__(self, network: Detr3dNetwork) -> None:
        super().__init__()
        self.network = network
        self.outputs = _names(network)

    def forward(
        self, images: Tensor, camera_valid: Tensor, table_projection: Tensor
    ) -> tuple[Tensor, ...]:
        """Return class_logits and box_codes."""
        output = self.network(images, table_projection, camera_valid)
        return _select(output, self.outputs)


def make_graph(network: nn.Module) -> BevFormerGraph | Detr3dGraph:
    """Wrap a network for export."""
    if isinstance(network, BevFormerNetwork):
        return BevFormerGraph(network)
    if isinstance(network, Detr3dNetwork):
        return Detr3dGraph(network)
    raise ExportError(
        f"a {type(network).__name__} is no network of the families bevformer and detr3d"
    )


def export_query_onnx(
    network: nn.Module, model: ModelConfig, path: Path, cameras: int = 6
) -> dict[str, float]:
    """Write ONNX for a fixed number of cameras and run it beside torch on two frames of a drive.

    Returns: the largest difference of every output, relative to its largest value.
    Raises: ExportError naming operators that a graph must not hold, or an output that differs.
    """
    graph = make_graph(network).eval()
    frames = [example_inputs(model, cameras, seed) for seed in (0, 1)]
    inputs = {name: torch.from_numpy(array) for name, array in frames[1].items()}
    with warnings.catch_warnings(), torch.no_grad(), plain_operators(network):
        warnings.simplefilter("ignore")  # the exporter's notes on its own deprecations
        program = torch.onnx.export(
            graph, kwargs=inputs, dynamo=True, opset_version=OPSET, input_names=list(inputs),
            output_names=list(graph.outputs), external_data=False, verbose=False, optimize=True,
        )  # fmt: skip
    assert program is not None
    program.save(str(path), external_data=False)
    operators = operators_of(path)
    found = set(operators) & FORBIDDEN_OPERATORS
    if found:
        raise ExportError(f"{path}: holds {sorted(found)}")
    return _parity(graph, path, frames)


def operators_of(path: Path) -> Mapping[str, int]:
    """Check a graph and count its operators; raises ExportError for custom ones."""
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    if graph.functions or {d.domain for d in graph.opset_import} - {"", "ai.onnx"}:
        raise ExportError(f"{path}: holds functions or custom operators")
    return Counter(node.op_type for node in graph.graph.node)


def example_inputs(model: ModelConfig, cameras: int, seed: int = 0) -> Arrays:
    """Return a graph's inputs for a ring of cameras with random images; seed 0 is a first frame."""
    image, generator = model.image, np.random.default_rng(seed)
    pixels = generator.standard_normal((1, cameras, 3, image.height, image.width))
    rig = ring_rig(model, cameras)
    intrinsic = np.stack([camera.intrinsic for camera in rig.cameras])
    cam2ego = np.stack([camera.cam2ego for camera in rig.cameras])
    arrays: Arrays = {
        "images": pixels.astype(np.float32),
        "camera_valid": np.ones((1, cameras), np.float32),
        **camera_tables(model, intrinsic, cam2ego),
    }
    if model.bevformer is None or model.family == "detr3d":
        return arrays
    former, (columns, rows) = model.bevformer, model.bev.shape
    motion = EgoMotion(np.array([1.5, 0.4, 0.0]), 0.3, 0.1) if seed else None
    quirks = former.reference_quirks
    state = generator.standard_normal((1, former.channels, rows, columns)).astype(np.float32)
    tables = motion_tables(motion, model.bev, former.turn_centre, quirks)
    return {
        **arrays,
        "can_bus": can_bus(np.eye(4), motion)[None],
        "state_in_bev": state,
        **{name: tables[name] for name in ("state_known", "table_align", "table_shift")},
    }


def _parity(
    graph: BevFormerGraph | Detr3dGraph, path: Path, frames: list[Arrays]
) -> dict[str, float]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = dict.fromkeys(graph.outputs, 0.0)
    for frame in frames:
        with torch.no_grad():
            wants = graph(**{name: torch.from_numpy(array) for name, array in frame.items()})
        gots = session.run(list(graph.outputs), dict(frame))
        for name, want, got in zip(graph.outputs, wants, gots, strict=True):
            difference = np.abs(got - want.numpy()).max() / np.abs(want.numpy()).max()
            worst[name] = max(worst[name], float(difference))
    for name, difference in worst.items():
        if not difference <= ONNX_TOLERANCE:
            raise ExportError(f"ONNX Runtime: {name} differs from torch by {difference:.1e} of its largest"
                              f" value, tolerance {ONNX_TOLERANCE:.0e}")  # fmt: skip
    return worst


def _names(network: nn.Module, *state: str) -> tuple[str, ...]:
    heads = {
        "reconstruction_logits": getattr(network, "occupancy_decoder", None),
        "occupancy_logits": getattr(network, "occupancy_head", None),
        "class_logits": network.detection_head,
        "box_codes": network.detection_head,
    }
    return tuple(name for name, head in heads.items() if head is not None) + state


def _select(output: QueryOutput, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    selected = []
    for name in names:
        value = output.bev if name == "state_out_bev" else getattr(output, name)
        # Only the last decoder layer answers; the others are there for training.
        selected.append(value[-1] if name in ("class_logits", "box_codes") else value)
    return tuple(selected)
