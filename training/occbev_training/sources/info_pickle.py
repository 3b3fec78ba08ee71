"""Turn mmdet3d's info .pkl files into JSON without trusting them: nothing that a pickle names is ever called.

A pickle is a program. This reader scans it first without running it, then runs it in a child process
with limits, where every name stands for a wrapper of ours that can only make plain arrays and numbers.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import pickletools
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from occbev_training.sources.recording import RecordingError


@dataclass(frozen=True)
class PickleLimits:
    """Limits on reading one file."""

    file_bytes: int = 4 * 1024**3
    """Largest file."""
    opcodes: int = 500_000_000
    """Largest number of opcodes."""
    memory_bytes: int = 2 * 1024**3
    """Address space of the child process."""
    cpu_seconds: int = 60
    """Processor time of the child process."""

    @classmethod
    def of_file(cls, size: int) -> PickleLimits:
        """Return limits of memory and time that grow with the size in bytes, from 2 GB and 60 s on."""
        memory_bytes = min(16 * 1024**3, cls.memory_bytes + 60 * size)
        return cls(memory_bytes=memory_bytes, cpu_seconds=min(3600, cls.cpu_seconds + 3 * size // 2**20))


class UnsafePickleError(ValueError):
    """A pickle that does more than hold numbers, text and arrays, or is too large."""


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = {
    **{(module, name): name for module in _MULTIARRAY for name in ("scalar", "_reconstruct")},
    ("numpy", "dtype"): "dtype",
    ("numpy", "ndarray"): "ndarray",
    ("_codecs", "encode"): "encode",
}
"""Every global that an info file may name -> which wrapper it becomes."""

_FORBIDDEN = {
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "EXT1",
    "EXT2",
    "EXT4",
    "PERSID",
    "BINPERSID",
    "POP",
    "POP_MARK",
    "DUP",
    "NEXT_BUFFER",
    "READONLY_BUFFER",
}
"""Opcodes that make objects in other ways, or hide from the scan what STACK_GLOBAL will find."""

_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_STORE = {"PUT", "BINPUT", "LONG_BINPUT"}
_FETCH = {"GET", "BINGET", "LONG_BINGET"}
_NOT_PUSHING = {"PROTO", "FRAME", "STOP", "MEMOIZE", *_STORE}


def read_infos(path: Path, limits: PickleLimits | None = None) -> dict[str, Any]:
    """Read an info .pkl as plain values: dicts, lists, text, numbers, None for NaN.

    Raises:
        RecordingError: naming the file and what was refused.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from error
    limits = limits or PickleLimits.of_file(size)
    if size > limits.file_bytes:
        raise RecordingError(f"{path}: {size} bytes, at most {limits.file_bytes} are read")
    text, fault = _in_child(path, limits)
    if fault is not None:
        raise RecordingError(f"{path}: refused: {fault}")
    record = json.loads(text)
    if not isinstance(record, dict):
        raise RecordingError(f"{path}: holds a {type(record).__name__}, an info file holds a dict")
    return record


def scan_pickle(data: bytes, limits: PickleLimits | None = None) -> int:
    """Look at every opcode without running any; returns their number.

    Raises:
        UnsafePickleError: naming the opcode or global that is not allowed.
    """
    limits = limits or PickleLimits()
    memo: dict[int, str | None] = {}
    pushed: list[str | None] = [None, None]
    count = 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            count += 1
            name = opcode.name
            if count > limits.opcodes:
                raise UnsafePickleError(f"more than {limits.opcodes} opcodes")
            if name in _FORBIDDEN:
                raise UnsafePickleError(f"opcode {name} at byte {position}")
            if name == "GLOBAL":
                _check_global(*str(argument).split(" ", 1))
            elif name == "STACK_GLOBAL":
                _check_global(*pushed[-2:])
            elif name == "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            elif name in _STORE:
                memo[int(str(argument))] = pushed[-1]
            if name not in _NOT_PUSHING:
                text = memo.get(int(str(argument))) if name in _FETCH else None
                pushed = [pushed[-1], str(argument) if name in _TEXT else text]
    except UnsafePickleError:
        raise
    except Exception as error:  # genops raises several kinds at damaged bytes
        raise UnsafePickleError(f"no readable pickle: {error}") from error
    return count


def _check_global(module: str | None = None, name: str | None = None) -> None:
    if module is None or name is None:
        raise UnsafePickleError("a global whose name is computed")
    if (module, name) not in _ALLOWED:
        known = sorted({".".join(pair) for pair in _ALLOWED})
        raise UnsafePickleError(f"global {module}.{name}; allowed are {', '.join(known)}")


class _Dtype:
    """Stands for numpy.dtype: plain numbers and text of fixed length, nothing with objects or fields."""

    def __init__(self, text: str) -> None:
        self.dtype = np.dtype(text)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(v is not None for v in state[2:5]):
            raise UnsafePickleError(f"a dtype with fields or a shape: {state!r:.100}")
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise UnsafePickleError(f"a dtype of byte order {order!r:.20}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for an array until its state is known."""

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype)):
            raise UnsafePickleError(f"an array of unknown form: {state!r:.100}")
        _, shape, dtype, fortran, raw = state
        whole = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
        if not whole or not isinstance(raw, bytes):
            raise UnsafePickleError(f"an array of shape {shape!r:.100} without raw bytes")
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise UnsafePickleError(f"{len(raw)} bytes for an array {shape} of {dtype.dtype}, {math.prod(shape)} items")
        values = np.frombuffer(raw, dtype.dtype)
        self.values = values.reshape(shape, order="F" if fortran else "C")


class _Ndarray:
    """Stands for the type numpy.ndarray, which is only ever named, not called."""


_NDARRAY = _Ndarray()


def _make_dtype(text: object = "", *flags: object) -> _Dtype:
    if not isinstance(text, str) or not re.fullmatch(r"[biufSU][0-9]{1,4}", text):
        raise UnsafePickleError(f"dtype {text!r:.40}; booleans, numbers and text are read")
    if any(flag not in (0, 1) for flag in flags):
        raise UnsafePickleError(f"dtype arguments {flags!r:.60}")
    return _Dtype(text)


def _make_scalar(dtype: object = None, raw: object = None) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
        raise UnsafePickleError("a scalar without dtype and bytes")
    if len(raw) != dtype.dtype.itemsize or not raw:
        raise UnsafePickleError(f"{len(raw)} bytes for a scalar of {dtype.dtype}")
    return np.frombuffer(raw, dtype.dtype)[0].item()


def _make_array(kind: object = None, shape: object = None, code: object = None) -> _Array:
    if kind is not _NDARRAY or shape != (0,) or code not in (b"b", "b"):
        raise UnsafePickleError(f"_reconstruct of {(kind, shape, code)!r:.100}")
    return _Array()


def _encode(text: object = None, coding: object = None) -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"encode of {type(text).__name__} as {coding!r:.20}")
    return text.encode("latin1")


_WRAPPERS = {
    "dtype": _make_dtype,
    "scalar": _make_scalar,
    "_reconstruct": _make_array,
    "encode": _encode,
    "ndarray": _NDARRAY,
}


class _InfoUnpickler(pickle.Unpickler):
    """Knows our wrappers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the wrapper that stands for a global."""
        _check_global(module, name)
        return _WRAPPERS[_ALLOWED[module, name]]

    def persistent_load(self, pid: object) -> NoReturn:
        """No object is stored elsewhere."""
        raise UnsafePickleError("a persistent object")


def parse_infos(data: bytes, limits: PickleLimits | None = None) -> Any:
    """Scan a pickle, run it with our wrappers and return plain values; call it in a child process.

    Raises:
        UnsafePickleError: naming what is not allowed.
    """
    scan_pickle(data, limits)
    try:
        loaded = _InfoUnpickler(io.BytesIO(data), encoding="latin1").load()
    except UnsafePickleError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise UnsafePickleError(f"{type(error).__name__}: {error}") from error
    return _plain(loaded)


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold; NaN and infinity become None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) for key in value):
            raise UnsafePickleError("a dict whose keys are neither text nor numbers")
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, _Array):
        return _plain(value.values.tolist())
    raise UnsafePickleError(f"a value of {type(value).__name__}")


def _in_child(path: Path, limits: PickleLimits) -> tuple[str, str | None]:
    """Parse a file in a process of its own; returns its JSON, or what went wrong."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(path, limits, sender), daemon=True)
    child.start()
    sender.close()
    try:
        ok, text = receiver.recv_bytes()[:1], b""
        text = receiver.recv_bytes()
    except EOFError:
        child.join()
        limit = f"{limits.memory_bytes / 1e9:.1f} GB of memory or {limits.cpu_seconds} s"
        return "", f"the reading process ended with {child.exitcode}: it needs more than {limit}"
    finally:
        receiver.close()
    child.join()
    return (text.decode(), None) if ok == b"+" else ("", text.decode())


def _child(path: Path, limits: PickleLimits, sender: Connection) -> None:
    """Limit this process, parse, and send back bytes: a sign and JSON or a reason."""
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        text = json.dumps(parse_infos(path.read_bytes(), limits), allow_nan=False)
        sign = b"+"
    except (UnsafePickleError, OSError) as error:
        sign, text = b"-", str(error)
    except MemoryError:
        sign, text = b"-", f"it needs more than {limits.memory_bytes} bytes of memory"
    except RecursionError:
        sign, text = b"-", "it is nested too deeply"
    sender.send_bytes(sign)
    sender.send_bytes(text.encode())
    sender.close()
    os._exit(0)
