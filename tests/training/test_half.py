"""Graphs for GPUs: near to the graph they come from, places in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from tests.small_network import SMALL  # noqa: E402

from occbev.inference.families import load_model  # noqa: E402
from occbev.share import share_path  # noqa: E402
from occbev_training.export.half import find_places, to_fp16, write_fp16  # noqa: E402
from occbev_training.export.package import (  # noqa: E402
    check_factors,
    example_inputs,
    relative_differences,
    run_onnx,
    write_onnx,
)
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.families import make_graph, reduced  # noqa: E402

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def test_half_of_our_own_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = make_graph(build_model(SMALL, "finetune").eval())
    write_onnx(graph, SMALL, tmp_path / "model.onnx")
    write_fp16(tmp_path / "model.onnx", tmp_path / "model_fp16.onnx")
    inputs = example_inputs(SMALL, graph, 5)
    want, got = (run_onnx(tmp_path / name, inputs) for name in ("model.onnx", "model_fp16.onnx"))
    check_factors(want)
    differences = relative_differences({n: a for n, a in want.items() if a.dtype == np.float32}, got)
    assert 1e-6 < max(differences.values()) < 0.02
    assert {array.dtype for array in got.values()} == {np.dtype(np.float32), np.dtype(np.uint8)}
    assert (want["class_id"] == got["class_id"]).mean() > 0.98
    half = onnx.load(tmp_path / "model_fp16.onnx")
    weights = {weight.name: weight.data_type for weight in half.graph.initializer}
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    assert {weights[node.input[1]] for node in convolutions if node.input[1] in weights} == {TensorProto.FLOAT16}
    size = (tmp_path / "model_fp16.onnx").stat().st_size
    assert size < 0.6 * (tmp_path / "model.onnx").stat().st_size


@pytest.mark.slow
def test_half_of_a_bevformer_reads_images_where_the_whole_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = reduced(load_model(share_path("config/models") / "bevformer_tiny.yaml"))
    graph = make_graph(build_model(model, "finetune").eval())
    write_onnx(graph, model, tmp_path / "model.onnx")
    write_fp16(tmp_path / "model.onnx", tmp_path / "model_fp16.onnx")
    inputs = example_inputs(model, graph, 5, seed=1)
    want, got = (run_onnx(tmp_path / name, inputs) for name in ("model.onnx", "model_fp16.onnx"))
    assert 1e-6 < max(relative_differences(want, got).values()) < 0.02
    half = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model_fp16.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in half.graph.value_info}
    samples = [node for node in half.graph.node if node.op_type == "GridSample"]
    assert samples
    assert {types[node.input[1]] for node in samples} == {TensorProto.FLOAT}


def test_places_are_followed_back_to_the_layers_that_say_them() -> None:
    def node(kind: str, name: str, *inputs: str) -> object:
        return helper.make_node(kind, list(inputs), [f"{name}_out"], name)

    nodes = [
        node("MatMul", "layer", "features", "weight"),
        node("MatMul", "project", "matrix", "points"),  # of two inputs: geometry, not a layer
        node("Add", "move", "layer_out", "project_out"),
        node("GridSample", "read", "features", "move_out"),
        node("Relu", "after", "read_out"),
    ]
    weight = numpy_helper.from_array(np.zeros((2, 2), np.float32), "weight")
    graph = helper.make_graph(nodes, "probe", [], [], [weight])
    assert sorted(find_places(graph)) == ["move", "project"]


def test_a_graph_keeps_the_types_of_its_ports() -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in ("x", "y")]
    weight = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")], "probe", ports[:1], ports[1:], [weight]
    )
    half = to_fp16(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    assert {port.type.tensor_type.elem_type for port in (*half.graph.input, *half.graph.output)} == {TensorProto.FLOAT}
