"""The one interface of every runtime, and the choice between them.

A runtime is imported only when it is chosen; each backend is `occbev.inference.<module>` with a class `Runtime`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from occbev.inference.model_package import ModelPackage
from occbev.inference.tables import FORMS

Arrays = Mapping[str, NDArray[Any]]


PER_CAMERA = {
    "images": 1,
    "camera_valid": 1,
    "table_ray": 1,
    "table_projection": 1,
    "table_query": 0,
    "table_points": 0,
    "table_matching": 0,
    "table_camera": 0,
    "state_in_match": 0,
}
"""Input of a graph -> which of its axes is the number of cameras."""

FACTORS = ("occupied", "class_id", "class_probability")
"""Outputs that take the place of `occupancy_logits`, see `occbev.inference.postprocess.decode_factors`."""

LOGITS = "occupancy_logits"
"""Output that nobody needs where a graph gives the factors."""

FORMER_OUTPUTS = {"kind": "class_id", "kind_share": "class_probability"}
"""Outputs of graphs of earlier versions -> their names now; read for one version more."""


class BackendError(ValueError):
    """A runtime that cannot be used with this package on this machine, saying what would be needed."""


class Backend(Protocol):
    """A loaded network.

    name: the runtime's name. form: the kind of geometry tables its graph takes, a key of `occbev.inference.tables.FORMS`.
    device: what it runs on, in words, for reports.
    kept_outputs: how many runs in a row keep their outputs, each until so many later ones began.
    at_once: how many runs may be under way at a time; more than one only of a `ParallelBackend`.
    """

    name: str
    form: str
    device: str
    kept_outputs: int
    at_once: int

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once on `images (1, N, 3, h, w)`, `camera_valid (1, N)`, `table_*` and, with a memory, `state_*`.

        Inputs that the graph does not take are left out.

        Returns: the graph's outputs by name. They may be views of the runtime's own buffers, see `kept_outputs`.
        """
        ...


class ParallelBackend(Backend, Protocol):
    """A network that can run on one frame set beside another."""

    def start(self, inputs: Arrays) -> Callable[[], dict[str, NDArray[Any]]]:
        """Begin a run, see `run`; return what waits for its outputs."""
        ...


PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")
"""Execution providers of ONNX Runtime that can be asked for; auto is CUDA where its GPU build is installed, else the CPU."""


@dataclass(frozen=True)
class RunSettings:
    """How a network is run, see `load_backend`."""

    threads: int | None = None
    precision: str = "auto"
    at_once: int = 1
    device: int = 0
    provider: str = "auto"

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise BackendError(f"provider {self.provider!r}: must be one of {', '.join(PROVIDERS)}")
        if self.device < 0:
            raise BackendError(f"device {self.device}: GPUs are counted from 0")
        if self.precision not in ("auto", "f32"):
            raise BackendError(f"precision {self.precision!r}: must be auto or f32")
        if self.at_once not in (1, 2):
            raise BackendError(f"{self.at_once} frame sets at once: must be 1 or 2")


@dataclass(frozen=True)
class Runtime:
    """Where a runtime is found: our module, the imports it needs, the graphs it reads, how it is installed."""

    module: str
    needs: tuple[str, ...]
    graphs: tuple[str, ...]
    install: str

    @property
    def absent(self) -> list[str]:
        """The imports it needs that cannot be found; nothing is imported for that."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def reads(self, package: ModelPackage) -> bool:
        """Whether the package holds a graph in its form."""
        return any(package.has(name) for name in self.graphs)


RUNTIMES: dict[str, Runtime] = {
    "openvino": Runtime(
        "openvino_backend",
        ("openvino",),
        ("model_int8.xml", "model.xml", "model.onnx"),
        "pip install openvino",
    ),
    "onnxruntime": Runtime("onnx_backend", ("onnxruntime",), ("model.onnx",), "pip install onnxruntime"),
    "tensorrt": Runtime(
        "tensorrt_backend",
        ("tensorrt", "cuda"),
        ("model_fp16.onnx", "model.onnx"),
        "pip install 'occbev[tensorrt]'",
    ),
    "torch": Runtime(
        "torch_backend",
        ("torch", "occbev_training"),
        ("weights.safetensors",),
        "pip install ./training",
    ),
}
"""Runtimes by name, in the order in which "auto" tries them."""

AUTO = ("openvino", "onnxruntime", "torch")
"""What "auto" tries; TensorRT builds an engine for minutes, so it is only used when it is asked for."""


def choose_backend(name: str, package: ModelPackage) -> str:
    """Return the name of the runtime to use: `name` itself, or for "auto" the first that is installed and fits.

    Raises:
        BackendError: the name is unknown, or the runtime is absent, or the package has no graph for it.
    """
    if name != "auto":
        problem = _problem(name, package)
        if problem:
            raise BackendError(problem)
        return name
    problems = {candidate: _problem(candidate, package) for candidate in AUTO}
    fitting = [candidate for candidate, problem in problems.items() if problem is None]
    if not fitting:
        raise BackendError("no runtime can run this package: " + "; ".join(str(p) for p in problems.values()))
    return fitting[0]


def load_backend(
    package: ModelPackage, cameras: int, name: str = "auto", settings: RunSettings | None = None
) -> Backend:
    """Load the network of a package for a rig of `cameras` cameras.

    name: a key of RUNTIMES, or "auto". settings: CPU threads, None for the runtime's own choice;
        precision "auto" to let the runtime use the hardware's fast types (int8, bf16, fp16), "f32" to forbid them;
        frame sets at once, which only OpenVINO heeds: 2 share the threads, so that each takes longer, but both
        together less than one after the other; the CUDA index of the GPU; the provider of ONNX Runtime.
    Raises:
        BackendError: the network cannot take so many cameras, or the runtime is unknown, absent, or cannot load
            this graph.
    """
    most = package.model.max_cameras
    if cameras > most:
        raise BackendError(f"{package.model.name} takes at most {most} cameras, the rig has {cameras}")
    chosen = choose_backend(name, package)
    module = importlib.import_module(f"occbev.inference.{RUNTIMES[chosen].module}")
    backend: Backend = module.load(package, cameras, settings or RunSettings())
    return backend


def start(backend: Backend, inputs: Arrays) -> Callable[[], dict[str, NDArray[Any]]]:
    """Begin a run and return what waits for its outputs; a backend that has one at a time has run by then."""
    if backend.at_once > 1:
        return cast(ParallelBackend, backend).start(inputs)
    outputs = backend.run(inputs)
    return lambda: outputs


def table_form(input_names: Iterable[str]) -> str:
    """Tell from a graph's inputs which form of geometry tables it takes.

    Raises:
        BackendError: the graph takes none.
    """
    names = set(input_names)
    for form, marker in FORMS.items():
        if marker in names:
            return form
    raise BackendError(
        f"the graph's inputs {sorted(names)} hold none of {', '.join(FORMS.values())}: not a graph of this package format"
    )


def _problem(name: str, package: ModelPackage) -> str | None:
    if name not in RUNTIMES:
        return f"backend {name!r} is unknown: must be auto or one of {sorted(RUNTIMES)}"
    runtime = RUNTIMES[name]
    if runtime.absent:
        return f"backend {name}: {', '.join(runtime.absent)} is not installed ({runtime.install})"
    if not runtime.reads(package):
        return f"backend {name}: {package.folder} holds none of {runtime.graphs}; it has {sorted(package.files)}"
    return None
