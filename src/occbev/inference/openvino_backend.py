"""OpenVINO on a CPU: the default runtime. It reads the package's own IR, or else its ONNX graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import openvino
from numpy.typing import NDArray

from occbev.config import ModelConfig
from occbev.files import one_line
from occbev.inference.backend import (
    FACTORS,
    FORMER_OUTPUTS,
    LOGITS,
    PER_CAMERA,
    Arrays,
    BackendError,
    RunSettings,
    table_form,
)
from occbev.inference.graph_checks import Shape, require_finite, require_fit, require_small
from occbev.inference.model_package import ModelPackage

INT8_GRAPH, GRAPHS = "model_int8.xml", ("model.xml", "model.onnx")
"""Files that are read: where bytes are multiplied fast the first, or else the first of the others that is there."""

BYTE_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}
"""Flags of a CPU that multiplies bytes and adds them up without overflow."""


class OpenVinoBackend:
    """A graph compiled for this CPU and this number of cameras."""

    name, kept_outputs = "openvino", 2

    def __init__(self, compiled: openvino.CompiledModel, int8: bool = False, at_once: int = 1) -> None:
        self.at_once = at_once
        self._requests = cycle([compiled.create_infer_request() for _ in range(self.kept_outputs)])
        self._outputs = [port.get_any_name() for port in compiled.outputs]
        self._inputs = {port.get_any_name() for port in compiled.inputs}
        self.form = table_form(self._inputs)
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.device = f"CPU, {threads} threads, {'int8 and ' if int8 else ''}{precision}"
        self.device += f", {at_once} frame sets at once" if at_once > 1 else ""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; the outputs are views that the run after the next overwrites."""
        return self.start(inputs)()

    def start(self, inputs: Arrays) -> Callable[[], dict[str, NDArray[Any]]]:
        """Begin a run; return what waits for its outputs, views that the run after the next overwrites."""
        feed = {name: array for name, array in inputs.items() if name in self._inputs}
        request = next(self._requests)
        request.start_async(feed, share_inputs=True)

        def wait() -> dict[str, NDArray[Any]]:
            request.wait()
            feed.clear()  # until here the runtime reads its arrays
            tensors = map(request.get_output_tensor, range(len(self._outputs)))
            return {name: tensor.data for name, tensor in zip(self._outputs, tensors, strict=True)}

        return wait


@cache
def shared_core() -> openvino.Core:
    """Return the one Core of this process, for every graph that is read or compiled in it.

    Each Core gives its thread a stack for signals. When two overlap and the older ends first, that stack is the freed
    one of the older, and the next signal with a handler (Ctrl-C, a child's end) ends the process by a fault.
    """
    return openvino.Core()


def load(package: ModelPackage, cameras: int, settings: RunSettings) -> OpenVinoBackend:
    """Read, reshape to the rig and compile; see `load_backend`."""
    core = shared_core()
    options: dict[str, Any] = (
        {"PERFORMANCE_HINT": "LATENCY"} if settings.at_once == 1 else {"NUM_STREAMS": settings.at_once}
    )
    if settings.threads is not None:
        options["INFERENCE_NUM_THREADS"] = settings.threads
    if settings.precision == "f32":
        options["INFERENCE_PRECISION_HINT"] = "f32"
    int8 = settings.precision == "auto" and package.has(INT8_GRAPH) and multiplies_bytes()
    path = package.path(INT8_GRAPH) if int8 else package.path(*GRAPHS)
    try:
        graph = core.read_model(path)
        _rename_outputs(graph)
        graph.reshape(_shapes(graph, cameras))
        _check_graph(path, graph, package.model)
        _leave_out_logits(graph)
        return OpenVinoBackend(core.compile_model(graph, "CPU", options), int8, settings.at_once)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second where its message quotes bytes of the file
        raise BackendError(
            f"{path}: OpenVINO {openvino.__version__} cannot load it for {cameras} cameras: {one_line(error)}"
        ) from error


def _rename_outputs(graph: openvino.Model) -> None:
    """Give outputs of graphs of earlier versions the names that they have now."""
    for port in graph.outputs:
        if port.get_any_name() in FORMER_OUTPUTS:
            port.get_tensor().set_names({FORMER_OUTPUTS[port.get_any_name()]})


def _check_graph(path: Path, graph: openvino.Model, model: ModelConfig) -> None:
    """Compare a graph with the configuration beside it; raises GraphError."""
    ops = graph.get_ordered_ops()
    require_small(path, ((op.get_friendly_name(), _sizes(port)) for op in ops for port in op.outputs()))
    require_fit(path, model, {port.get_any_name(): _sizes(port) for port in (*graph.inputs, *graph.outputs)})
    require_finite(path, ((op.get_friendly_name(), op.data) for op in ops if op.get_type_name() == "Constant"))


def _sizes(port: Any) -> Shape:
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic:
        return ()
    return tuple(axis.get_length() if axis.is_static else None for axis in shape)


@cache
def multiplies_bytes() -> bool:
    """Whether this CPU has instructions for products of bytes; without them an int8 graph is slow and overflows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not BYTE_PRODUCTS.isdisjoint(flags.split())


def _leave_out_logits(graph: openvino.Model) -> None:
    """Do not compute the logits of voxels where the graph gives their probabilities as factors: only those are decoded."""
    results = {port.get_any_name(): port.get_node() for port in graph.outputs}
    if set(FACTORS) <= set(results) and LOGITS in results:
        graph.remove_result(results[LOGITS])


def _shapes(graph: openvino.Model, cameras: int) -> dict[str, openvino.PartialShape]:
    """The inputs' shapes with the camera axis of every per-camera input set to the rig's size."""
    shapes = {port.get_any_name(): port.get_partial_shape() for port in graph.inputs}
    for name, axis in PER_CAMERA.items():
        if name in shapes:
            shapes[name][axis] = cameras
    return shapes
