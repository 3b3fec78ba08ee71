"""Networks of the BEVDet family as ONNX, checked against torch.

The interface is that of `export`: geometry enters as gather tables. Networks with past frames take the
refined BEV of the frame before as state, and a table that warps it into the new ego frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from occbev.config import ModelConfig, to_record
from occbev.inference.tables import GATHER_STAGES, TableCache
from occbev.model_package import ModelPackage, write_package
from occbev_training.export import (
    ONNX_TOLERANCE,
    OPSET,
    ExportError,
    require_plain_operators,
    ring_rig,
)
from occbev_training.models.bevdet import BevDetNetwork
from occbev_training.models.centre_head import merge_tasks
from occbev_training.models.checkpoints import save_weights
from occbev_training.models.deformable_conv import plain_operators
from occbev_training.models.lift_splat import splat_by_gather
from occbev_training.models.temporal import warp_bev, warp_grid

Arrays = dict[str, NDArray[Any]]

HEADS = {
    "reconstruction_logits": "occupancy_decoder", "occupancy_logits": "occupancy_head",
    "heatmap": "detection_head", "box": "detection_head",
}  # fmt: skip
"""Output of a graph -> the part of the network that makes it."""

TABLES = (
    "table_pixel", "table_depth", "table_weight",
    *(f"table_stage{stage}" for stage in range(2, GATHER_STAGES + 1)), "table_cell", "table_ray",
)  # fmt: skip
STATE = ("state_in_bev", "state_known", "table_warp")


class BevDetGraph(nn.Module):
    """A network with its tables as separate inputs, for one frame at a time; a batch of one."""

    def __init__(self, network: BevDetNetwork) -> None:
        """Raises: ExportError for parts that have no form in plain operators."""
        super().__init__()
        if network.view_transform.aggregate is not None:
            raise ExportError("depth aggregation needs the whole lifted volume: it is not exported")
        if network.image_encoder.matching_stage is not None:
            raise ExportError("the stereo cost volume needs two frames' images: it is not exported")
        self.network = network
        self.temporal = network.temporal is not None
        head = network.detection_head
        self.tasks = () if head is None else head.classes
        self.outputs = tuple(n for n, part in HEADS.items() if getattr(network, part) is not None)
        if self.temporal:
            self.outputs += ("state_out_bev",)

    def forward(
        self,
        images: Tensor,
        camera_valid: Tensor,
        table_pixel: Tensor,
        table_depth: Tensor,
        table_weight: Tensor,
        table_stage2: Tensor,
        table_stage3: Tensor,
        table_stage4: Tensor,
        table_cell: Tensor,
        table_ray: Tensor,
        state_in_bev: Tensor | None = None,
        state_known: Tensor | None = None,
        table_warp: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return `outputs`.

        state_in_bev: (1, past frames * C, Y, X), newest first, in the ego frame of the frame before.
        state_known: (1,), 0 where there was none. table_warp: (1, Y, X, 2) of `warp_grid`.
        """
        network, lift = self.network, self.network.view_transform
        features = network.image_encoder(images.flatten(0, 1))
        logits, context = lift.predict_depth(features, table_ray.flatten(0, 1))
        rows, depth = lift.rows(logits, context, camera_valid.flatten())
        stages = (table_stage2, table_stage3, table_stage4)
        tables = (table_pixel, table_depth, table_weight, *stages, table_cell)
        bev = lift.to_bev(splat_by_gather(rows, depth, tables))
        if not self.temporal:
            return self._selected(network.heads(bev))
        assert network.temporal is not None
        assert state_in_bev is not None
        assert state_known is not None
        bev = network.temporal.refine(bev)
        stand_in = bev.repeat(1, network.temporal.frames - 1, 1, 1)
        past = stand_in + state_known * (warp_bev(state_in_bev, table_warp) - stand_in)
        history = past.split(bev.shape[1], 1)
        state = torch.cat([bev, *history[:-1]], 1)
        return self._selected(
            {**network.heads(network.temporal(bev, history)), "state_out_bev": state}
        )

    def _selected(self, results: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        if "box" in self.outputs:
            box = merge_tasks(results["heatmap"], results["box"], self.tasks)
            results = {**results, "box": box}
        return tuple(results[name] for name in self.outputs)


def export_bevdet_package(
    network: BevDetNetwork,
    model: ModelConfig,
    folder: Path,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> ModelPackage:
    """Write a model package with an ONNX graph and prove it against the network.

    network: of the fine-tuning stage; it is put in eval mode.
    Raises: ExportError if the graph differs from torch by more than its tolerance.
    """
    network.eval().float().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "weights.safetensors", network.state_dict(), {"model": to_record(model)})
    differences = export_bevdet_onnx(network, model, folder / "model.onnx")
    rounded = {name: float(f"{value:.2g}") for name, value in differences.items()}
    metrics = {**metrics, "export_difference": {"onnxruntime": rounded}}
    operators = sorted(require_plain_operators(folder / "model.onnx"))
    provenance = {**provenance, "operators": " ".join(operators)}
    (folder / "README.md").write_text(_card(network, model, provenance, metrics))
    return write_package(folder, model, provenance, metrics)


def _card(
    network: BevDetNetwork,
    model: ModelConfig,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> str:
    count = sum(p.numel() for p in network.parameters())
    image = model.image
    return (
        f"# {model.name}\n\nA network of the BEVDet family: {count / 1e6:.2f} million parameters, any number"
        f" of cameras, {image.width}x{image.height} pixels each.\n\n## Where it comes from\n\n"
        f"{_listed(provenance)}\n\n## How good it is\n\n{_listed(metrics)}\n"
    )


def _listed(record: Mapping[str, Any]) -> str:
    return (
        "\n".join(f"- {key}: {value}" for key, value in record.items()) or "- nothing was recorded"
    )


def export_bevdet_onnx(
    network: BevDetNetwork, model: ModelConfig, path: Path, cameras: Sequence[int] = (6, 5)
) -> dict[str, float]:
    """Write ONNX with a free number of cameras and run it beside torch on two frames of each rig.

    Returns: the largest difference of every output, relative to its largest value.
    Raises: ExportError naming operators that a graph must not hold, or an output that differs.
    """
    if model.lift.height_bins > 1 and network.temporal is not None:
        raise ExportError(
            "a volume of past frames cannot be warped in the plane: it is not exported"
        )
    graph = BevDetGraph(network.eval()).eval()
    write_graph(graph, example_inputs(graph, model, cameras[0], 1), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = dict.fromkeys(graph.outputs, 0.0)
    for count in cameras:
        for seed in (0, 1):
            for name, value in _differences(
                graph, session, example_inputs(graph, model, count, seed)
            ):
                worst[name] = max(worst[name], value)
    for name, difference in worst.items():
        if not difference <= ONNX_TOLERANCE:
            raise ExportError(f"ONNX Runtime: {name} differs from torch by {difference:.1e} of its largest"
                              f" value, tolerance {ONNX_TOLERANCE:.0e}")  # fmt: skip
    return worst


def write_graph(graph: BevDetGraph, inputs: Arrays, path: Path) -> None:
    """Write the graph; raises ExportError naming operators that it must not hold."""
    count = torch.export.Dim("cameras", min=1, max=32)
    free = {"images", "camera_valid", "table_ray"}
    shapes = {name: {1: count} if name in free else None for name in inputs}
    with warnings.catch_warnings(), torch.no_grad(), plain_operators(graph):
        warnings.simplefilter("ignore")  # the exporter's notes on its own deprecations
        program = torch.onnx.export(
            graph, kwargs={name: torch.from_numpy(array) for name, array in inputs.items()},
            dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, input_names=list(inputs),
            output_names=list(graph.outputs), external_data=False, verbose=False, optimize=True,
        )  # fmt: skip
    assert program is not None
    program.save(str(path), external_data=False)
    require_plain_operators(path)


def example_inputs(graph: BevDetGraph, model: ModelConfig, cameras: int, seed: int = 0) -> Arrays:
    """Return a graph's inputs for a ring of cameras with random images; seed 0 is a first frame."""
    generator, image = np.random.default_rng(seed), model.image
    pixels = generator.standard_normal((1, cameras, 3, image.height, image.width))
    tables = TableCache(model, "gather").tables(ring_rig(model, cameras))
    inputs: Arrays = {
        "images": pixels.astype(np.float32),
        "camera_valid": np.ones((1, cameras), np.float32),
        **{name: tables[name] for name in TABLES},
    }
    if not graph.temporal:
        return inputs
    columns, rows = model.bev.shape
    channels = model.lift.channels * (graph.network.temporal.frames - 1)
    key2past = torch.eye(4)[None].clone()
    key2past[0, :2, 3] = torch.tensor([1.5, -0.2])
    state = (
        generator.standard_normal((1, channels, rows, columns)).astype(np.float32),
        np.array([float(seed > 0)], np.float32),
        warp_grid(key2past, model.bev, model.lift.reference_quirks).numpy(),
    )
    return {**inputs, **dict(zip(STATE, state, strict=True))}


def _differences(
    graph: BevDetGraph, session: onnxruntime.InferenceSession, inputs: Arrays
) -> list[tuple[str, float]]:
    with torch.no_grad():
        wants = graph(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    taken = {entry.name for entry in session.get_inputs()}  # an input that nothing reads is dropped
    gots = session.run(list(graph.outputs), {n: a for n, a in inputs.items() if n in taken})
    return [
        (name, float(np.abs(got - want.numpy()).max() / np.abs(want.numpy()).max()))
        for name, want, got in zip(graph.outputs, wants, gots, strict=True)
    ]
