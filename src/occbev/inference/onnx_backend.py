"""ONNX Runtime: the portable runtime, on a GPU by its CUDA or TensorRT provider, else on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from occbev.files import one_line
from occbev.inference.backend import FACTORS, LOGITS, Arrays, BackendError, RunSettings, table_form
from occbev.inference.engine_cache import CACHE
from occbev.inference.graph_checks import Shape, require_fit
from occbev.inference.model_package import ModelPackage

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""Name in settings -> ONNX Runtime's name."""

GRAPHS = {
    "cpu": ("model.onnx",),  # where fp16 is emulated
    "cuda": ("model_fp16.onnx", "model.onnx"),
    "tensorrt": ("model_fp16.onnx", "model.onnx"),
}
"""Provider -> graphs that it reads unless f32 is asked for, the first that a package holds."""


class OnnxBackend:
    """One ONNX Runtime session."""

    name, kept_outputs, at_once = "onnxruntime", 1, 1

    def __init__(self, session: onnxruntime.InferenceSession, cameras: int, device: str = "") -> None:
        """device: in words, for reports."""
        self._session = session
        self._outputs = wanted_outputs([output.name for output in session.get_outputs()])
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True  # logits that nobody reads are not computed
        inputs = {entry.name: entry for entry in session.get_inputs()}
        self._inputs = set(inputs)
        self.form = table_form(inputs)
        self.device = device or session.get_providers()[0].removesuffix("ExecutionProvider")
        held = inputs["images"].shape[1]
        if isinstance(held, int) and held != cameras:
            raise BackendError(
                f"the ONNX graph is fixed to {held} cameras, the rig has {cameras}: export it with a free camera axis"
            )

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; the outputs are fresh arrays."""
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items() if name in self._inputs}
        return dict(zip(self._outputs, self._session.run(self._outputs, feed, self._options), strict=True))


def wanted_outputs(names: Sequence[str]) -> list[str]:
    """Leave out the logits of voxels where the graph gives their probabilities as factors."""
    return [name for name in names if name != LOGITS or not set(FACTORS) <= set(names)]


def load(package: ModelPackage, cameras: int, settings: RunSettings) -> OnnxBackend:
    """Open a session; see `load_backend`. ONNX Runtime computes in the graph's own precision.

    Raises: BackendError if this build lacks the provider that is asked for, or it cannot start.
    """
    provider = choose_provider(settings.provider)
    graphs = ("model.onnx",) if settings.precision == "f32" else GRAPHS[provider]
    path = package.path(*graphs)
    session = _open(path, provider, settings)
    active = session.get_providers()[0]
    if active != PROVIDERS[provider]:
        raise BackendError(
            f"backend onnxruntime: provider {provider} could not start, {active} would run instead; its log says why"
        )
    ports = (*session.get_inputs(), *session.get_outputs())
    require_fit(path, package.model, {port.name: _sizes(port.shape) for port in ports})
    where = "CPU" if provider == "cpu" else f"{provider} {settings.device}"
    return OnnxBackend(session, cameras, f"{where}, {path.stem}")


def choose_provider(wanted: str) -> str:
    """Return the provider to use; raises BackendError if this build of ONNX Runtime lacks the one that is wanted."""
    built = [name for name, full in PROVIDERS.items() if full in onnxruntime.get_available_providers()]
    if wanted == "auto":
        return "cuda" if "cuda" in built else "cpu"
    if wanted not in built:
        raise BackendError(
            f"backend onnxruntime: provider {wanted} is not in this build, which has {', '.join(built)};"
            " pip install onnxruntime-gpu has cuda and tensorrt"
        )
    return wanted


def provider_options(provider: str, device: int) -> list[tuple[str, dict[str, Any]]]:
    """Return ONNX Runtime's providers in order: the one that is chosen, and those that take what it cannot run."""
    gpu = {"device_id": device}
    engines = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(CACHE),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(CACHE),
    }
    chain: list[tuple[str, dict[str, Any]]] = []
    if provider == "tensorrt":
        chain.append((PROVIDERS["tensorrt"], {**gpu, **engines}))
    if provider != "cpu":
        chain.append((PROVIDERS["cuda"], gpu))
    return [*chain, (PROVIDERS["cpu"], {})]


def _open(path: Path, provider: str, settings: RunSettings) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=provider_options(provider, settings.device))
    except Exception as error:  # its exception types share no public base
        raise BackendError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {one_line(error)}"
        ) from error


def _sizes(shape: Sequence[int | str | None]) -> Shape:
    return tuple(size if isinstance(size, int) else None for size in shape)
