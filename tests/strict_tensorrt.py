"""TensorRT's and CUDA's Python bindings for machines without a GPU: strict in what exists, and computing by ONNX Runtime.

`bindings.json` holds the names and arguments of three releases, read from their wheels by introspection (no GPU is
needed to import them). What a release does not have is refused here as there. Device memory is memory of the host, and
an engine runs its ONNX graph, so that every copy and address has its consequence.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

TABLE = json.loads((Path(__file__).parent / "bindings.json").read_text())
RELEASES = tuple(TABLE["tensorrt"])
TYPES = {1: "FLOAT", 2: "UINT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}  # of ONNX
NUMPY = {"FLOAT": "f4", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?", "HALF": "f2"}


def check_arguments(what: str, overloads: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TypeError unless the arguments fit one of the overloads, "a, b=None | c"."""
    for arguments in overloads.split(" | "):
        words = [word.strip() for word in arguments.split(",") if word.strip()]
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        parameters = [
            inspect.Parameter(name, kind, default=None if "=" in word else empty)
            for word, name in ((word, word.split("=")[0]) for word in words)
        ]
        try:
            inspect.Signature(parameters).bind(*args, **kwargs)
        except TypeError:
            continue
        return
    raise TypeError(f"{what} takes ({overloads}), got {args} {kwargs}")


class Strict:
    """An object of the bindings: it has the attributes that the release has, as far as the fake computes them."""

    def __init__(self, release: dict[str, Any], kind: str, **behaviour: Any) -> None:
        self.__dict__.update(_release=release, _kind=kind, _behaviour=behaviour)

    def __getattr__(self, name: str) -> Any:
        kind, release = self._kind, self._release
        if name not in release["attributes"][kind].split():
            raise AttributeError(f"{kind} of this release has no {name}")
        if name not in self._behaviour:
            raise NotImplementedError(f"the fake does not compute {kind}.{name}")
        found = self._behaviour[name]
        arguments = release["methods"].get(f"{kind}.{name}")
        if arguments is None:
            return found() if callable(found) else found

        def call(*args: Any, **kwargs: Any) -> Any:
            check_arguments(f"{kind}.{name}", arguments, args, kwargs)
            return found(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the fake does not set {self._kind}.{name}")


class Gpu:
    """What the fakes share: allocations that live, copies and runs that were made, and where the next run is ordered."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.streams: set[int] = set()
        self.current, self.builds, self.runs = 0, 0, 0
        self.pending: list[Callable[[], None]] = []

    def allocate(self, size: int, pinned: bool = False) -> int:
        block = (ctypes.c_byte * size)()
        pointer = ctypes.addressof(block)
        self.memory[pointer] = block
        if pinned:
            self.pinned.add(pointer)
        return pointer


def cuda_runtime(gpu: Gpu) -> ModuleType:
    """The module `cuda.bindings.runtime`, with one GPU; what is copied or run waits for the stream."""
    table, ok = TABLE["cuda"], IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorInvalidValue": 1})
    kinds = IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})

    def free(pointer: int) -> tuple[Any]:
        gpu.pinned.discard(pointer)  # the next block may lie there
        return (ok.cudaSuccess if gpu.memory.pop(pointer, None) is not None else ok.cudaErrorInvalidValue,)

    def copy(target: int, source: int, size: int, kind: Any, stream: Any) -> tuple[Any]:
        assert stream in gpu.streams
        host, device = (source, target) if kind == kinds.cudaMemcpyHostToDevice else (target, source)
        assert host in gpu.pinned
        assert device in gpu.memory
        assert size <= min(len(gpu.memory[host]), len(gpu.memory[device]))
        gpu.pending.append(lambda: ctypes.memmove(target, source, size) and None)
        return (ok.cudaSuccess,)

    def synchronise(stream: Any) -> tuple[Any]:
        assert stream in gpu.streams
        for step in gpu.pending:
            step()
        gpu.pending.clear()
        return (ok.cudaSuccess,)

    def open_stream() -> tuple[Any, int]:
        gpu.streams.add(77)
        return ok.cudaSuccess, 77

    def close_stream(stream: int) -> tuple[Any]:
        gpu.streams.remove(stream)
        return (ok.cudaSuccess,)

    def set_device(index: int) -> tuple[Any]:
        gpu.current = index
        return (ok.cudaSuccess,)

    functions = {
        "cudaMalloc": lambda size: (ok.cudaSuccess, gpu.allocate(size)),
        "cudaMallocHost": lambda size: (ok.cudaSuccess, gpu.allocate(size, pinned=True)),
        "cudaFree": free,
        "cudaFreeHost": free,
        "cudaStreamCreate": open_stream,
        "cudaStreamDestroy": close_stream,
        "cudaStreamSynchronize": synchronise,
        "cudaMemcpyAsync": copy,
        "cudaSetDevice": set_device,
        "cudaGetDeviceCount": lambda: (ok.cudaSuccess, 1),
        "cudaGetDeviceProperties": lambda device: (
            ok.cudaSuccess,
            SimpleNamespace(name=b"Probe GPU\0\0", major=8, minor=7),
        ),
        "cudaMemGetInfo": lambda: (ok.cudaSuccess, 6 << 30, 8 << 30),
        "cudaGetErrorString": lambda error: (ok.cudaSuccess, str(error).encode()),
    }
    module = ModuleType("cuda.bindings.runtime")
    for name, function in functions.items():
        setattr(module, name, _checked(name, table["functions"][name].strip("()"), function))
    module.cudaError_t, module.cudaMemcpyKind = ok, kinds  # type: ignore[attr-defined]
    return module


def tensorrt_module(gpu: Gpu, version: str) -> ModuleType:
    """The module `tensorrt` of a release."""
    release = TABLE["tensorrt"][version]
    module = ModuleType("tensorrt")
    for name, members in release["enums"].items():
        setattr(module, name, IntEnum(name, {member: i for i, member in enumerate(members.split())}))
    types = module.DataType  # type: ignore[attr-defined]

    def logger(min_severity: Any = None) -> Strict:
        return Strict(release, "Logger")

    def builder(logger: Strict) -> Strict:
        return Strict(
            release,
            "Builder",
            create_network=lambda flags=0: _network(release, module, flags),
            create_builder_config=lambda: _config(release),
            create_optimization_profile=lambda: _profile(release),
            build_serialized_network=lambda network, config: _build(gpu, network, config),
        )

    def parser(network: Strict, logger: Strict) -> Strict:
        def parse(model: str) -> bool:
            network._behaviour["model"] = model
            return Path(model).read_bytes()[:6] != b"broken"

        error = Strict(release, "ParserError", desc=lambda: "node 3 is not known")
        return Strict(release, "OnnxParser", parse_from_file=parse, num_errors=1, get_error=lambda index: error)

    def runtime(logger: Strict) -> Strict:
        def deserialise(serialized_engine: bytes) -> Strict | None:
            if not serialized_engine.startswith(b"{"):
                return None
            return _engine(gpu, release, module, json.loads(serialized_engine))

        return Strict(release, "Runtime", deserialize_cuda_engine=deserialise)

    for name, make in {"Logger": logger, "Builder": builder, "OnnxParser": parser, "Runtime": runtime}.items():
        setattr(module, name, _checked(name, release["methods"][f"{name}.__init__"], make))
    module.Logger.WARNING = 2  # type: ignore[attr-defined]
    module.nptype = lambda trt_type: np.dtype(NUMPY[types(trt_type).name]).type  # type: ignore[attr-defined]
    module.__version__ = version  # type: ignore[attr-defined]
    return module


def _checked(name: str, arguments: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        check_arguments(name, arguments, args, kwargs)
        return function(*args, **kwargs)

    return call


def _tensors(release: dict[str, Any], ports: Any) -> list[Strict]:
    found = []
    for port in ports:
        dims = port.type.tensor_type.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        found.append(Strict(release, "ITensor", name=port.name, shape=shape))
    return found


def _network(release: dict[str, Any], module: Any, flags: int) -> Strict:
    assert flags == 1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = Strict(release, "INetworkDefinition")
    dropped: list[str] = []

    def graph() -> Any:
        return onnx.load(network._behaviour["model"]).graph

    def outputs() -> list[Strict]:
        return [tensor for tensor in _tensors(release, graph().output) if tensor.name not in dropped]

    network._behaviour.update(
        num_inputs=lambda: len(graph().input),
        num_outputs=lambda: len(outputs()),
        get_input=lambda index: _tensors(release, graph().input)[index],
        get_output=lambda index: outputs()[index],
        unmark_output=lambda tensor: dropped.append(tensor.name),
        dropped=dropped,
    )
    return network


def _config(release: dict[str, Any]) -> Strict:
    config = Strict(release, "IBuilderConfig", cleared=[])

    def add(profile: Strict) -> int:
        config._behaviour["shapes"] = profile._behaviour["shapes"]
        return 0

    config._behaviour.update(add_optimization_profile=add, clear_flag=config._behaviour["cleared"].append)
    return config


def _profile(release: dict[str, Any]) -> Strict:
    shapes: dict[str, tuple[int, ...]] = {}

    def set_shape(name: str, least: tuple[int, ...], usual: tuple[int, ...], most: tuple[int, ...]) -> None:
        assert least == usual == most
        assert all(size > 0 for size in usual), f"{name} {usual}"
        shapes[name] = usual

    return Strict(release, "IOptimizationProfile", set_shape=set_shape, shapes=shapes)


def _build(gpu: Gpu, network: Strict, config: Strict) -> bytes:
    gpu.builds += 1
    kept = network._behaviour
    record = {"model": kept["model"], "dropped": kept["dropped"], "shapes": config._behaviour["shapes"]}
    return json.dumps(record | {"cleared": [flag.name for flag in config._behaviour["cleared"]]}).encode()


def _engine(gpu: Gpu, release: dict[str, Any], module: Any, record: dict[str, Any]) -> Strict:
    graph = onnx.load(record["model"]).graph
    inputs = {port.name: port for port in graph.input}
    outputs = {port.name: port for port in graph.output if port.name not in record["dropped"]}
    ports, mode = {**inputs, **outputs}, module.TensorIOMode
    names = list(ports)
    return Strict(
        release,
        "ICudaEngine",
        num_io_tensors=len(names),
        get_tensor_name=lambda index: names[index],
        get_tensor_mode=lambda name: mode.INPUT if name in inputs else mode.OUTPUT,
        get_tensor_dtype=lambda name: module.DataType[TYPES[ports[name].type.tensor_type.elem_type]],
        get_tensor_profile_shape=lambda name, profile_index: [record["shapes"][name]] * 3,
        create_execution_context=lambda strategy=None: _context(gpu, release, record, ports, inputs, outputs),
    )


def _context(
    gpu: Gpu, release: dict[str, Any], record: dict[str, Any], ports: Any, inputs: Any, outputs: Any
) -> Strict:
    session = onnxruntime.InferenceSession(record["model"], providers=["CPUExecutionProvider"])
    shapes: dict[str, tuple[int, ...]] = {}
    addresses: dict[str, int] = {}

    def array(name: str) -> Any:
        dtype = np.dtype(NUMPY[TYPES[ports[name].type.tensor_type.elem_type]])
        block = gpu.memory[addresses[name]]  # a KeyError is a use of freed memory
        return np.frombuffer(block, dtype, int(np.prod(shape_of(name)))).reshape(shape_of(name))

    def shape_of(name: str) -> tuple[int, ...]:
        if name in inputs:
            return shapes[name]
        assert set(shapes) == set(inputs), "the shapes of outputs follow from those of all inputs"
        return _tensors(release, [outputs[name]])[0].shape

    def set_shape(name: str, shape: tuple[int, ...]) -> bool:
        shapes[name] = shape
        return list(shape) == list(record["shapes"][name])

    def set_address(name: str, memory: int) -> bool:
        addresses[name] = memory
        return memory in gpu.memory and memory not in gpu.pinned

    def execute(stream_handle: int) -> bool:
        assert stream_handle in gpu.streams
        assert set(addresses) == set(ports)

        def compute() -> None:
            found = session.run(list(outputs), {name: array(name) for name in inputs})
            for name, value in zip(outputs, found, strict=True):
                array(name)[...] = value
            gpu.runs += 1

        gpu.pending.append(compute)
        return True

    return Strict(
        release,
        "IExecutionContext",
        set_input_shape=set_shape,
        get_tensor_shape=shape_of,
        set_tensor_address=set_address,
        execute_async_v3=execute,
    )


@contextmanager
def installed(gpu: Gpu, version: str) -> Iterator[None]:
    """Let `import tensorrt` and `cuda.bindings.runtime` find the fakes."""
    cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = cuda_runtime(gpu)  # type: ignore[attr-defined]
    fakes = {
        "tensorrt": tensorrt_module(gpu, version),
        "cuda": cuda,
        "cuda.bindings": bindings,
        "cuda.bindings.runtime": bindings.runtime,
    }
    ours = "occbev.inference.tensorrt_backend"
    before = {name: sys.modules.get(name) for name in (*fakes, ours)}
    sys.modules.update(fakes)
    sys.modules.pop(ours, None)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
