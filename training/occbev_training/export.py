"""A trained network as a model package: weights, ONNX and OpenVINO graphs, each checked against torch.

Geometry stays outside the graphs: they take the tables of `occbev.inference.tables` as inputs.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from occbev.config import ModelConfig, to_record
from occbev.inference.tables import GATHER_STAGES, TableCache, Tables
from occbev.model_package import ModelPackage, write_package
from occbev.rig import Camera, CameraRig
from occbev_training.models.checkpoints import save_weights
from occbev_training.models.lift_splat import BatchedPoints, splat_by_gather
from occbev_training.models.network import OccBevNetwork

logger = logging.getLogger(__name__)

OUTPUTS = ("occupancy_logits", "heatmap", "box")
"""Outputs of an exported graph, in order."""

OPSET = 18
"""ONNX operator set; every runtime's parser of the last years knows it."""

ONNX_TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime and torch, relative to an output's largest value."""

IR_TOLERANCE = 5e-2
"""The same for OpenVINO, whose weights are rounded to fp16: on random images, where box maps are wildest."""

FORBIDDEN_OPERATORS = frozenset(
    {"Loop", "Scan", "If", "NonZero", "Unique", "ScatterND", "ScatterElements", "SequenceEmpty"}
)
"""Operators that some runtime lacks or runs slowly; a graph that holds one is not written."""

_BAG = ("table_pixel", "table_depth", "table_weight", "table_offset", "table_ray")
_GATHER = (
    "table_pixel", "table_depth", "table_weight",
    *(f"table_stage{stage}" for stage in range(2, GATHER_STAGES + 1)), "table_cell", "table_ray",
)  # fmt: skip


class ExportError(RuntimeError):
    """A graph that does not do what the network does, or uses an operator that it must not."""


class BagGraph(nn.Module):
    """The network with its tables as separate inputs, splatting by an embedding bag."""

    tables = _BAG

    def __init__(self, network: OccBevNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        images: Tensor,
        camera_valid: Tensor,
        table_pixel: Tensor,
        table_depth: Tensor,
        table_weight: Tensor,
        table_offset: Tensor,
        table_ray: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return `OUTPUTS`."""
        points = BatchedPoints(table_pixel, table_depth, table_weight, table_offset, table_ray)
        output = self.network(images, camera_valid, points)
        return tuple(getattr(output, name) for name in OUTPUTS)


class GatherGraph(nn.Module):
    """The network with its tables as separate inputs, splatting by staged gathers."""

    tables = _GATHER

    def __init__(self, network: OccBevNetwork) -> None:
        super().__init__()
        self.network = network

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
    ) -> tuple[Tensor, ...]:
        """Return `OUTPUTS`."""
        network, lift = self.network, self.network.view_transform
        features = network.image_encoder(images.flatten(0, 1))
        logits, context = lift.predict_depth(features, table_ray.flatten(0, 1))
        rows, depth = lift.rows(logits, context, camera_valid.flatten())
        stages = (table_stage2, table_stage3, table_stage4)
        tables = (table_pixel, table_depth, table_weight, *stages, table_cell)
        heads = network.heads(lift.to_bev(splat_by_gather(rows, depth, tables)))
        return tuple(heads[name] for name in OUTPUTS)


@dataclass(frozen=True)
class Parity:
    """Largest difference of each output from torch's, relative to its largest value."""

    onnxruntime: Mapping[str, float]
    openvino: Mapping[str, float]
    openvino_before_rounding: Mapping[str, float]


def export_package(
    network: OccBevNetwork,
    model: ModelConfig,
    folder: Path,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    extra_files: Sequence[Path] = (),
) -> ModelPackage:
    """Write a model package and prove its graphs against the network.

    network: of the fine-tuning stage; it is put in eval mode. extra_files: copied in (priors.npz).
    Raises: ExportError if a graph differs from torch by more than its tolerance.
    """
    if network.occupancy_head is None or network.detection_head is None:
        raise ExportError("a model package needs both heads: build the network for stage finetune")
    network.eval().float().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "weights.safetensors", network.state_dict(), {"model": to_record(model)})
    for path in extra_files:
        shutil.copyfile(path, folder / path.name)
    write_onnx(network, model, folder / "model.onnx")
    unrounded = write_ir(network, model, folder / "model.xml", compress=True)
    parity = check_graphs(network, model, folder, unrounded)
    metrics = {**metrics, "export_difference": _rounded(to_record(parity))}
    provenance = {**provenance, "exported_with": _versions()}
    (folder / "README.md").write_text(model_card(network, model, provenance, metrics))
    return write_package(folder, model, provenance, metrics)


def write_onnx(network: OccBevNetwork, model: ModelConfig, path: Path) -> None:
    """Write the gather form as ONNX with a free number of cameras.

    Raises: ExportError naming operators that a graph must not hold.
    """
    inputs = {n: torch.from_numpy(a) for n, a in example_inputs(model, 6, "gather").items()}
    cameras = torch.export.Dim("cameras", min=1, max=32)
    free = {"images", "camera_valid", "table_ray"}
    shapes = {name: {1: cameras} if name in free else None for name in inputs}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes on its own deprecations
        program = torch.onnx.export(
            GatherGraph(network), kwargs=inputs, dynamo=True, opset_version=OPSET,
            dynamic_shapes=shapes, input_names=list(inputs), output_names=list(OUTPUTS),
            external_data=False, verbose=False, optimize=True,
        )  # fmt: skip
    assert program is not None
    program.save(str(path), external_data=False)
    require_plain_operators(path)


def require_plain_operators(path: Path) -> frozenset[str]:
    """Check an ONNX file and return the operators that it uses.

    Raises: ExportError naming operators that a graph must not hold.
    """
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    used = frozenset(node.op_type for node in graph.graph.node)
    found = used & FORBIDDEN_OPERATORS
    if found or len(graph.functions) or {d.domain for d in graph.opset_import} - {"", "ai.onnx"}:
        raise ExportError(f"{path}: holds {sorted(found) or 'functions or custom operators'}")
    return used


def write_ir(
    network: OccBevNetwork, model: ModelConfig, path: Path, compress: bool
) -> openvino.Model:
    """Write the bag form as OpenVINO IR with a free number of cameras.

    compress: store weights as fp16 (computing stays in the runtime's precision).
    Returns: the graph with its weights still in fp32.
    """
    graph = _convert(network, model)
    openvino.save_model(graph, path, compress_to_fp16=compress)
    return graph


def _convert(network: OccBevNetwork, model: ModelConfig) -> openvino.Model:
    inputs = {n: torch.from_numpy(a) for n, a in example_inputs(model, 6, "bag").items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(BagGraph(network), example_input=inputs)
    shapes: dict[str, list[int]] = {name: list(value.shape) for name, value in inputs.items()}
    for name in ("images", "camera_valid", "table_ray"):
        shapes[name][1] = -1
    graph.reshape(shapes)
    for port, name in zip(graph.outputs, OUTPUTS, strict=True):
        port.get_tensor().set_names({name})
    return graph


def check_graphs(
    network: OccBevNetwork,
    model: ModelConfig,
    folder: Path,
    unrounded: openvino.Model,
    cameras: Sequence[int] = (6, 5, 7),
) -> Parity:
    """Run every graph of a package on random images of rigs of several sizes, beside torch.

    unrounded: the OpenVINO graph before its weights were stored as fp16, run on the first rig.
    Raises: ExportError naming the output that differs.
    """
    onnx_worst, ir_worst, plain_worst = (dict.fromkeys(OUTPUTS, 0.0) for _ in range(3))
    for index, count in enumerate(cameras):
        bag, gather = (example_inputs(model, count, form) for form in ("bag", "gather"))
        want = _run_torch(BagGraph(network), bag)
        _worse(onnx_worst, want, _run_onnx(folder / "model.onnx", gather))
        ir = openvino.Core().read_model(folder / "model.xml")
        _worse(ir_worst, want, _run_openvino(ir, bag))
        if index == 0:
            _worse(plain_worst, want, _run_openvino(unrounded.clone(), bag))
    _require(onnx_worst, ONNX_TOLERANCE, "ONNX Runtime")
    _require(plain_worst, ONNX_TOLERANCE, "OpenVINO before rounding its weights")
    _require(ir_worst, IR_TOLERANCE, "OpenVINO with fp16 weights")
    return Parity(onnx_worst, ir_worst, plain_worst)


def example_inputs(
    model: ModelConfig, cameras: int, form: str, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Return the inputs of a graph for a ring of cameras, with random images.

    form: "bag" or "gather". Every camera is valid.
    """
    image = model.image
    pixels = np.random.default_rng(seed).standard_normal((1, cameras, 3, image.height, image.width))
    tables: Tables = TableCache(model, form).tables(ring_rig(model, cameras))
    names = {"bag": _BAG, "gather": _GATHER}[form]
    return {
        "images": pixels.astype(np.float32),
        "camera_valid": np.ones((1, cameras), np.float32),
        **{name: tables[name] for name in names},
    }


def ring_rig(model: ModelConfig, cameras: int) -> CameraRig:
    """Return network-size cameras that look outwards in equal steps from 1.6 m above ground."""
    width, height = model.image.width, model.image.height
    intrinsic = np.array([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2], [0, 0, 1]])
    ring = []
    for index in range(cameras):
        yaw = 2 * np.pi * index / cameras
        pose = np.eye(4)
        pose[:3, 0] = np.sin(yaw), -np.cos(yaw), 0  # right
        pose[:3, 1] = 0, 0, -1  # down
        pose[:3, 2] = np.cos(yaw), np.sin(yaw), 0  # forward
        pose[:3, 3] = np.cos(yaw), np.sin(yaw), 1.6
        ring.append(Camera(f"CAM_{index}", width, height, intrinsic, pose))
    return CameraRig(tuple(ring))


def model_card(
    network: OccBevNetwork,
    model: ModelConfig,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> str:
    """Return the package's README: what the network is, where it comes from, how good it is."""
    parameters = sum(p.numel() for p in network.parameters())
    image, grid, depth = model.image, model.grid, model.lift.depth
    return "\n".join(
        [
            f"# {model.name}",
            "",
            f"Camera-BEV perception: 3D boxes of {len(model.detection_classes)} classes and semantic",
            f"occupancy of {len(model.occupancy_classes)} classes from surround cameras.",
            "",
            "| | |",
            "|---|---|",
            f"| parameters | {parameters / 1e6:.2f} million |",
            f"| input | any number of cameras, {image.width}x{image.height} pixels each |",
            f"| image encoder | {model.encoder.backbone}, {model.encoder.stages} stages |",
            f"| view transform | Lift-Splat, {depth.bins} depth bins from {depth.lo} to {depth.hi} m |",
            f"| BEV | {_extent(model.bev.lo, model.bev.hi)}, cells of {model.bev.pitch[0]} m |",
            f"| occupancy | {_extent(grid.lo, grid.hi)}, voxels of {grid.pitch[0]} m, frame {grid.frame} |",
            "",
            "`config.yaml` fixes the model and holds the SHA-256 of every file. `model.xml` is the",
            "graph for OpenVINO (weights stored as fp16), `model.onnx` for ONNX Runtime and TensorRT,",
            "`weights.safetensors` for torch. Calibration is an input of the graphs.",
            "",
            "## Where it comes from",
            "",
            *_bullets(provenance),
            "",
            "## How good it is",
            "",
            *_bullets(metrics),
            "",
        ]
    )


def _extent(lo: Sequence[float], hi: Sequence[float]) -> str:
    return " x ".join(f"[{a:g}, {b:g}]" for a, b in zip(lo, hi, strict=True)) + " m"


def _bullets(record: Mapping[str, Any], depth: int = 0) -> list[str]:
    lines = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            lines += [f"{'  ' * depth}- {key}:", *_bullets(value, depth + 1)]
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"{'  ' * depth}- {key}: {text}")
    return lines


def _run_torch(graph: nn.Module, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    with torch.no_grad():
        outputs = graph(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: output.numpy() for name, output in zip(OUTPUTS, outputs, strict=True)}


def _run_onnx(path: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), dict(inputs)), strict=True))


def _run_openvino(
    graph: openvino.Model, inputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    graph.reshape({name: list(array.shape) for name, array in inputs.items()})
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled(dict(inputs))
    return {name: result[name] for name in OUTPUTS}


def _worse(
    worst: dict[str, float], want: Mapping[str, NDArray[Any]], got: Mapping[str, NDArray[Any]]
) -> None:
    for name, expected in want.items():
        difference = np.abs(got[name] - expected).max() / np.abs(expected).max()
        worst[name] = max(worst[name], float(difference))


def _require(worst: Mapping[str, float], tolerance: float, runtime: str) -> None:
    for name, difference in worst.items():
        logger.info(
            "%s: %s differs from torch by %.1e of its largest value", runtime, name, difference
        )
        if not difference <= tolerance:
            raise ExportError(f"{runtime}: {name} differs from torch by {difference:.1e} of its largest"
                              f" value, tolerance {tolerance:.0e}")  # fmt: skip


def _rounded(record: Any) -> Any:
    if isinstance(record, Mapping):
        return {key: _rounded(value) for key, value in record.items()}
    return float(f"{record:.2g}")


def _versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__.split("-")[0],
        "opset": str(OPSET),
    }
