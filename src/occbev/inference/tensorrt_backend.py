"""TensorRT on an NVIDIA GPU: builds an engine from the ONNX graph once and keeps it.

Engines only fit one GPU model and one TensorRT version, so that both are in the cache's file names.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt
from cuda.bindings import runtime as cuda
from numpy.typing import NDArray

from occbev.inference.backend import PER_CAMERA, Arrays, BackendError, RunSettings, table_form
from occbev.inference.model_package import ModelPackage

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "occbev" / "tensorrt"
LOGGER = logging.getLogger(__name__)


class TensorRtBackend:
    """An engine with one buffer on the device for each input and output."""

    name, kept_outputs, at_once = "tensorrt", 1, 1

    def __init__(self, engine: Any, device: str, path: Path) -> None:
        self._engine, self.device, self._path = engine, device, path
        self._context = engine.create_execution_context()
        self._stream = _check(cuda.cudaStreamCreate())
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self.form = table_form(self._inputs)
        self._host = {
            name: np.empty(tuple(engine.get_tensor_shape(name)), tensorrt.nptype(engine.get_tensor_dtype(name)))
            for name in names
        }
        self._buffer = {name: _check(cuda.cudaMalloc(array.nbytes)) for name, array in self._host.items()}
        for name, pointer in self._buffer.items():
            self._context.set_tensor_address(name, pointer)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; the outputs are buffers that the next run overwrites."""
        for name in self._inputs:
            np.copyto(self._host[name], inputs[name], casting="same_kind")
            self._copy(
                name,
                self._buffer[name],
                self._host[name].ctypes.data,
                cuda.cudaMemcpyKind.cudaMemcpyHostToDevice,
            )
        if not self._context.execute_async_v3(self._stream):
            raise RuntimeError("TensorRT could not run the engine; its log says why")
        outputs = {name: array for name, array in self._host.items() if name not in self._inputs}
        for name, array in outputs.items():
            self._copy(
                name,
                array.ctypes.data,
                self._buffer[name],
                cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost,
            )
        _check(cuda.cudaStreamSynchronize(self._stream))
        return outputs

    def about(self) -> dict[str, str]:
        """Return the engine's file and the memory of the device, for diagnostics."""
        error, free, total = cuda.cudaMemGetInfo()
        used = f"{(total - free) >> 20} of {total >> 20}" if error == cuda.cudaError_t.cudaSuccess else "unknown"
        return {"engine": str(self._path), "gpu_memory_mb": used}

    def _copy(self, name: str, target: int, source: int, kind: Any) -> None:
        _check(cuda.cudaMemcpyAsync(target, source, self._host[name].nbytes, kind, self._stream))


def load(package: ModelPackage, cameras: int, settings: RunSettings) -> TensorRtBackend:
    """Take the engine from the cache or build it, which takes minutes; see `load_backend`."""
    properties, precision = _check(cuda.cudaGetDeviceProperties(0)), settings.precision
    device = properties.name.split(b"\0")[0].decode()
    key = f"{package.hash}-{cameras}-{device}-sm{properties.major}{properties.minor}-{tensorrt.__version__}-{precision}"
    path = CACHE / (re.sub(r"[^A-Za-z0-9.]+", "-", key) + ".engine")
    if not path.is_file():
        LOGGER.warning("building a TensorRT engine for %s; this takes minutes and happens once", device)
        _keep(path, _build(package.path("model.onnx"), cameras, precision))
    engine = tensorrt.Runtime(_logger()).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise BackendError(
            f"{path}: TensorRT {tensorrt.__version__} cannot read this engine; delete it to build another"
        )
    return TensorRtBackend(engine, f"{device}, {'fp16' if precision == 'auto' else 'f32'}", path)


def _build(path: Path, cameras: int, precision: str) -> bytes:
    builder = tensorrt.Builder(_logger())
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, _logger())
    if not parser.parse_from_file(str(path)):
        problems = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"{path}: TensorRT {tensorrt.__version__} cannot parse it: {problems}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        shape = list(entry.shape)
        if entry.name in PER_CAMERA:
            shape[PER_CAMERA[entry.name]] = cameras
        profile.set_shape(entry.name, tuple(shape), tuple(shape), tuple(shape))
    config.add_optimization_profile(profile)
    if precision == "auto":
        config.set_flag(tensorrt.BuilderFlag.FP16)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(f"{path}: TensorRT {tensorrt.__version__} could not build an engine; its log says why")
    return bytes(engine)


def _keep(path: Path, engine: bytes) -> None:
    """Write whole or not at all: another process may be reading the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(engine)
    os.replace(partial, path)


def _logger() -> Any:
    return tensorrt.Logger(tensorrt.Logger.WARNING)


def _check(answer: tuple[Any, ...]) -> Any:
    """Unwrap cuda-python's (error, value...) tuples."""
    error, *values = answer
    if error != cuda.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA: {cuda.cudaGetErrorString(error)[1].decode()}")
    return values[0] if values else None
