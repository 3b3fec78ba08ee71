"""Checkpoints of other frameworks: their weights are read, their objects are inert, their code never runs."""

from __future__ import annotations

import argparse
import pickle
import sys
from collections import Counter, OrderedDict, defaultdict
from datetime import datetime
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from occbev_training.models.checkpoint_files import read_recorded  # noqa: E402
from occbev_training.models.checkpoints import CheckpointError  # noqa: E402


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "ema", "model_state", "weights_of_ours"])
def test_checkpoints_may_be_wrapped_and_prefixed(tmp_path: Path, wrapper: str | None) -> None:
    prefixed = {f"module.{name}": value for name, value in state().items()}
    path = tmp_path / "epoch_24.pth"
    torch.save({wrapper: prefixed, "epoch": 24} if wrapper else prefixed, path)
    assert same(read_recorded(path), state())


def framework_object() -> object:
    """An object of a class of a training framework that is not installed where the checkpoint is read."""
    module = sys.modules["mmengine_like"] = ModuleType("mmengine_like")
    for name, bases in (("ConfigDict", (dict,)), ("Hub", (object,))):
        setattr(module, name, type(name, bases, {"__module__": "mmengine_like"}))
    config, hub = module.ConfigDict(lr=1e-4), module.Hub()
    hub.log = [1]
    config["nested"] = hub
    return config


METADATA = {
    "numpy scalars": lambda: {"best": np.float64(0.5), "epoch": np.int64(3), "history": np.arange(3)},
    "namespace": lambda: argparse.Namespace(lr=1e-3, out=Path("out")),
    "path": lambda: [Path("/data"), datetime(2024, 1, 1)],
    "collections": lambda: {"counts": Counter("abca"), "groups": defaultdict(list, a=[1])},
    "framework": framework_object,
    "optimiser": lambda: {"state": OrderedDict(a=torch.zeros(2)), "class": nn.Linear},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", METADATA)
def test_whatever_lies_beside_the_weights_they_are_read(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / "latest.pth"
    content = {"meta": METADATA[name](), "state_dict": state(), "hyper_parameters": METADATA["namespace"]()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    sys.modules.pop("mmengine_like", None)
    assert same(read_recorded(path), state())
    assert "mmengine_like" not in sys.modules


class Planted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of a checkpoint ran",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": state(), "meta": Planted()}, tmp_path / "beside.pth")
    assert same(read_recorded(tmp_path / "beside.pth"), state())
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Planted()}))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_recorded(tmp_path / "evil.pth")
    assert "ran" not in capsys.readouterr().out


def test_files_without_weights_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="holds a dict with epoch: int"):
        read_recorded(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"save network\.state_dict"):
        read_recorded(path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_recorded(path)
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(CheckpointError, match=r"other\.pth: not a checkpoint"):
        read_recorded(path)
