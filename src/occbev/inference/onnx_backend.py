"""ONNX Runtime: the portable runtime, on CUDA where its GPU build is installed, else on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from occbev.files import one_line
from occbev.inference.backend import Arrays, BackendError, RunSettings, table_form
from occbev.inference.graph_checks import Shape, require_fit
from occbev.inference.model_package import ModelPackage

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class OnnxBackend:
    """One ONNX Runtime session."""

    name, kept_outputs, at_once = "onnxruntime", 1, 1

    def __init__(self, session: onnxruntime.InferenceSession, cameras: int) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        inputs = {entry.name: entry for entry in session.get_inputs()}
        self._inputs = set(inputs)
        self.form = table_form(inputs)
        self.device = session.get_providers()[0].removesuffix("ExecutionProvider")
        held = inputs["images"].shape[1]
        if isinstance(held, int) and held != cameras:
            raise BackendError(
                f"the ONNX graph is fixed to {held} cameras, the rig has {cameras}: export it with a free camera axis"
            )

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; the outputs are fresh arrays."""
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items() if name in self._inputs}
        return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))


def load(package: ModelPackage, cameras: int, settings: RunSettings) -> OnnxBackend:
    """Open a session; see `load_backend`. ONNX Runtime computes in the graph's own precision."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    path = package.path("model.onnx")
    providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exception types share no public base
        raise BackendError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {one_line(error)}"
        ) from error
    ports = (*session.get_inputs(), *session.get_outputs())
    require_fit(path, package.model, {port.name: _sizes(port.shape) for port in ports})
    return OnnxBackend(session, cameras)


def _sizes(shape: Sequence[int | str | None]) -> Shape:
    return tuple(size if isinstance(size, int) else None for size in shape)
