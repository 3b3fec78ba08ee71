"""TensorRT 10 and 11 on an NVIDIA GPU: builds an engine from an ONNX graph once and keeps it.

Networks are strongly typed: the graph says which tensors are fp32 and which fp16, and TensorRT follows it. An engine fits
one graph, number of cameras, GPU model and TensorRT version, so that all of them are in its file's name.
"""

from __future__ import annotations

import ctypes
import logging
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt
from cuda.bindings import runtime as cuda
from numpy.typing import NDArray

from occbev.files import replace_file
from occbev.inference.backend import FACTORS, LOGITS, PER_CAMERA, Arrays, BackendError, RunSettings, table_form
from occbev.inference.engine_cache import CACHE
from occbev.inference.model_package import ModelPackage

LOGGER = logging.getLogger(__name__)

GRAPHS = {"model_fp16.onnx": "fp16", "model.onnx": "tf32"}
"""Graphs that are read, the first that a package holds, and what each computes in."""

EXACT = {"model.onnx": "f32"}
"""The graph where precision f32 is asked for."""


@dataclass(frozen=True)
class Device:
    """A GPU: its CUDA index, name and compute capability, as in "sm87"."""

    index: int
    name: str
    capability: str


@dataclass(frozen=True)
class Buffer:
    """Memory of one input or output: an array in pinned host memory, and a pointer to as many bytes on the device."""

    host: NDArray[Any]
    device: int


class TensorRtBackend:
    """An engine with one pair of buffers for each input and output, which are freed with it.

    One run at a time; runs may come from different threads.
    """

    name, kept_outputs, at_once = "tensorrt", 1, 1

    def __init__(self, engine: Any, device: Device, precision: str, path: Path) -> None:
        """engine: deserialised on `device`; precision: in words, for reports. path: where it is kept."""
        self.device, self._index, self._path = f"{device.name}, {precision}", device.index, path
        self._engine, self._context = engine, engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self.form = table_form(self._inputs)
        for name in self._inputs:  # the only shape that its one profile allows
            shape = engine.get_tensor_profile_shape(name, 0)[1]
            _require(self._context.set_input_shape(name, tuple(shape)), f"the shape {tuple(shape)} of {name}")
        freed: list[Callable[[], Any]] = []  # grows; freed as well if what follows fails half way
        self._finalizer = weakref.finalize(self, _free, freed)
        self._stream = _own(cuda.cudaStreamCreate(), cuda.cudaStreamDestroy, freed)
        self._buffers: dict[str, Buffer] = {}
        for name in names:
            self._buffers[name] = self._allocate(name, freed)
            _require(self._context.set_tensor_address(name, self._buffers[name].device), f"a buffer of {name}")

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; the outputs are buffers that the next run overwrites."""
        _check(cuda.cudaSetDevice(self._index))  # of this thread
        for name in self._inputs:
            np.copyto(self._buffers[name].host, inputs[name], casting="same_kind")
            self._copy(name, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
        _require(self._context.execute_async_v3(int(self._stream)), "the run; its log says why")
        outputs = [name for name in self._buffers if name not in self._inputs]
        for name in outputs:
            self._copy(name, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        _check(cuda.cudaStreamSynchronize(self._stream))
        return {name: self._buffers[name].host for name in outputs}

    def about(self) -> dict[str, str]:
        """Return the engine's file and the memory of the device, for diagnostics."""
        error, free, total = cuda.cudaMemGetInfo()
        used = f"{(total - free) >> 20} of {total >> 20}" if error == cuda.cudaError_t.cudaSuccess else "unknown"
        return {"engine": str(self._path), "gpu_memory_mb": used}

    def close(self) -> None:
        """Free buffers and stream; the network cannot run afterwards."""
        self._finalizer()

    def _allocate(self, name: str, freed: list[Callable[[], Any]]) -> Buffer:
        """Allocate the buffers of a tensor; what frees them goes into the list."""
        shape = tuple(self._context.get_tensor_shape(name))
        dtype = np.dtype(tensorrt.nptype(self._engine.get_tensor_dtype(name)))
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        host = _own(cuda.cudaMallocHost(size), cuda.cudaFreeHost, freed)
        device = _own(cuda.cudaMalloc(size), cuda.cudaFree, freed)
        memory = (ctypes.c_byte * size).from_address(int(host))
        return Buffer(np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape), int(device))

    def _copy(self, name: str, kind: Any) -> None:
        """Copy a tensor between host and device, on the stream."""
        buffer = self._buffers[name]
        pointers = (buffer.device, buffer.host.ctypes.data)
        to_device = kind == cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        target, source = pointers if to_device else pointers[::-1]
        _check(cuda.cudaMemcpyAsync(target, source, buffer.host.nbytes, kind, self._stream))


def load(package: ModelPackage, cameras: int, settings: RunSettings) -> TensorRtBackend:
    """Take the engine from the cache or build it, which takes minutes; see `load_backend`.

    Raises: BackendError if there is no such GPU, or TensorRT cannot build the engine.
    """
    device = find_device(settings.device)
    graphs = EXACT if settings.precision == "f32" else GRAPHS
    graph = next((name for name in graphs if package.has(name)), "model.onnx")
    path = engine_path(package.files[graph], cameras, device, settings.precision)
    runtime = tensorrt.Runtime(_logger())
    engine = runtime.deserialize_cuda_engine(path.read_bytes()) if path.is_file() else None
    if engine is None:
        LOGGER.warning(
            "building a TensorRT engine of %s for %s; this takes minutes and happens once", graph, device.name
        )
        built = build_engine(package.path(graph), cameras, settings.precision == "f32")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary:  # another process may be reading the cache
            temporary.write_bytes(built)
        engine = runtime.deserialize_cuda_engine(built)
    if engine is None:
        raise BackendError(f"{path}: TensorRT {tensorrt.__version__} cannot read the engine that it built")
    return TensorRtBackend(engine, device, graphs[graph], path)


def find_device(index: int) -> Device:
    """Choose a GPU by its CUDA index, also for what this thread does next; raises BackendError if it is not there."""
    error, count = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess:
        raise BackendError(f"backend tensorrt: no GPU can be used: {_describe(error)}")
    if index >= count:
        raise BackendError(f"backend tensorrt: device {index} is not there; CUDA finds {count}, counted from 0")
    _check(cuda.cudaSetDevice(index))
    properties = _check(cuda.cudaGetDeviceProperties(index))
    name = properties.name.split(b"\0")[0].decode()
    return Device(index, name, f"sm{properties.major}{properties.minor}")


def engine_path(graph_hash: str, cameras: int, device: Device, precision: str) -> Path:
    """Return where the engine of a graph is kept; graph_hash: SHA-256 of the ONNX file."""
    exact = "-f32" if precision == "f32" else ""
    key = f"{graph_hash[:32]}-{cameras}-{device.name}-{device.capability}-{tensorrt.__version__}{exact}"
    return CACHE / (re.sub(r"[^A-Za-z0-9.]+", "-", key) + ".engine")


def build_engine(path: Path, cameras: int, exact: bool) -> bytes:
    """Build the engine of an ONNX graph for a number of cameras; exact: without TF32.

    Raises: BackendError if TensorRT cannot parse or build it.
    """
    builder = tensorrt.Builder(_logger())
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, _logger())
    if not parser.parse_from_file(str(path)):
        problems = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BackendError(f"{path}: TensorRT {tensorrt.__version__} cannot parse it: {problems}")
    _leave_out_logits(network)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        shape = list(entry.shape)
        if entry.name in PER_CAMERA:
            shape[PER_CAMERA[entry.name]] = cameras
        profile.set_shape(entry.name, tuple(shape), tuple(shape), tuple(shape))
    config.add_optimization_profile(profile)
    if exact:
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(f"{path}: TensorRT {tensorrt.__version__} could not build an engine; its log says why")
    return bytes(engine)


def _leave_out_logits(network: Any) -> None:
    """Do not give the logits of voxels where the graph gives their probabilities as factors: they are 46 MB a set."""
    outputs = {tensor.name: tensor for tensor in map(network.get_output, range(network.num_outputs))}
    if set(FACTORS) <= set(outputs) and LOGITS in outputs:
        network.unmark_output(outputs[LOGITS])


def _logger() -> Any:
    return tensorrt.Logger(tensorrt.Logger.WARNING)


def _own(answer: tuple[Any, ...], free: Callable[[Any], Any], freed: list[Callable[[], Any]]) -> Any:
    """Unwrap what CUDA allocated; what frees it goes into the list."""
    owned = _check(answer)
    freed.append(lambda: free(owned))
    return owned


def _free(freed: list[Callable[[], Any]]) -> None:
    for release in reversed(freed):  # buffers before the stream
        release()


def _require(done: bool, what: str) -> None:
    if not done:
        raise RuntimeError(f"TensorRT {tensorrt.__version__} refused {what}")


def _check(answer: tuple[Any, ...]) -> Any:
    """Unwrap cuda-python's (error, value...) tuples."""
    error, *values = answer
    if error != cuda.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA: {_describe(error)}")
    return values[0] if values else None


def _describe(error: Any) -> str:
    return str(cuda.cudaGetErrorString(error)[1].decode())
