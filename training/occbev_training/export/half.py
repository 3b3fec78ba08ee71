"""ONNX graphs for GPUs: precision is written into the graph, since TensorRT's networks are strongly typed.

Layers compute in fp16; what computes places, indices and long sums stays in fp32. There is no int8 graph: one
with symmetric scales, the only kind that TensorRT takes, agreed too little with occbev-tiny.
"""

from __future__ import annotations

from pathlib import Path

import onnx

FP16_GRAPH = "model_fp16.onnx"

FLOAT_OPERATORS = ("ReduceSum", "GridSample", "Range", "TopK", "Resize", "LayerNormalization", "Softmax", "LogSoftmax")
"""Operators that stay in fp32: sums over many terms, and places in images and maps."""

LINEAR = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def write_fp16(source: Path, target: Path) -> None:
    """Write an ONNX graph in fp16; its inputs and outputs keep their types."""
    onnx.save(to_fp16(onnx.load(source)), target)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph in fp16 but for `FLOAT_OPERATORS` and what computes the places that they read."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT_OPERATORS],
        node_block_list=find_places(model.graph),
    )
    OnnxModel(half).topological_sort()  # casts of inputs stand at the end
    del half.graph.value_info[:]  # still of the types before
    onnx.checker.check_model(half, full_check=True)
    return half


def find_places(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the nodes that compute where a grid sample reads, back to the layers that say so."""
    makers = {name: node for node in graph.node for name in node.output}
    weights = {weight.name for weight in graph.initializer}
    wanted = [node.input[1] for node in graph.node if node.op_type == "GridSample"]
    found: dict[str, None] = {}
    while wanted:
        node = makers.get(wanted.pop())
        if node is None or node.name in found or (node.op_type in LINEAR and weights.intersection(node.input)):
            continue
        found[node.name] = None
        wanted += node.input
    return list(found)
