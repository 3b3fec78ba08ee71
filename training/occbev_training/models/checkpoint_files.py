"""Checkpoints of other frameworks, read without running any of their code: tensors are read, all else is inert.

A checkpoint is a pickle, which may name any function of any package to be called. Here every name but those that
make tensors stands for `Inert`, which takes whatever is done to it and does nothing.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, _utils
from torch.serialization import SourceChangeWarning

from occbev_training.models.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "ema_state_dict", "ema", "model_state_dict", "model_state", "model", "network")
"""Keys under which a checkpoint may hold its weights."""


_OLD_OFFSETS = re.compile(r"(conv\d)_offset\.(?=weight$|bias$)")
"""How old checkpoints name the offsets of deformable convolutions."""


class Inert:
    """Stands for a class, function or object that is not known here."""

    dump_patches = False
    """torch asks it of the classes of networks in old files, to write what changed of their source."""

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        """Take any arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __call__(self, *args: Any, **options: Any) -> Inert:
        """Give nothing but another one."""
        return Inert()

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...


def _rebuild_subclass(make: Callable[..., Any], kind: object, arguments: tuple[Any, ...], state: object) -> Any:
    """Make the tensor of a subclass or of one with attributes, as a plain one."""
    return make(*arguments)


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): _utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
}
"""Every name that is not inert: they make tensors and keep them in order."""


class _InertUnpickler(pickle.Unpickler):
    """Knows what makes tensors; torch adds the storages."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for."""
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        logger.debug("inert: %s.%s", module, name)
        return Inert


def _load_inert(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


_INERT_PICKLE = SimpleNamespace(Unpickler=_InertUnpickler, load=_load_inert, __name__="inert pickle")
"""What `torch.load` takes for the module pickle."""


def read_recorded(path: Path) -> dict[str, Tensor]:
    """Read the weights of a published checkpoint without running any of its code.

    Raises:
        CheckpointError: naming the file and what it holds in place of weights.
    """
    content = _load(path)
    weights = _find_weights(content)
    if not weights:
        raise CheckpointError(f"{path}: holds no weights, want a state dict; it holds {_describe(content)}")
    prefix = "module."  # of distributed training
    if all(name.startswith(prefix) for name in weights):
        weights = {name[len(prefix) :]: value for name, value in weights.items()}
    return {_OLD_OFFSETS.sub(r"\1.conv_offset.", name): value for name, value in weights.items()}


def _load(path: Path) -> Any:
    """Read plain content as torch does; where it holds other objects, read these as inert."""
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path}: a TorchScript program, want a state dict: torch.save(network.state_dict(), ...)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is no plain checkpoint
        logger.debug("%s: read as inert: %s", path, error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SourceChangeWarning)
            return torch.load(path, map_location="cpu", pickle_module=_INERT_PICKLE, weights_only=False)
    except Exception as error:  # damaged files and hostile ones raise nearly anything
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a checkpoint of weights: {type(error).__name__}: {text}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _find_weights(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, alone, in a known wrapper, or in the only entry that has tensors."""
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    weights = _tensors(content)
    if weights or not isinstance(content, dict):
        return weights
    inner = [found for value in content.values() if (found := _tensors(value))]
    return inner[0] if len(inner) == 1 else {}


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _describe(content: Any) -> str:
    if isinstance(content, Inert):
        return "an object of a class that is not known here, such as a whole network: save network.state_dict()"
    if isinstance(content, dict):
        kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in list(content.items())[:8])
        return f"a dict with {kinds}" if kinds else "an empty dict"
    return f"a {type(content).__name__}"
