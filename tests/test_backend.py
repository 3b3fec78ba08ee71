"""The choice of a runtime: what is installed and what the package holds decide, and errors say what is lacking."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from occbev.inference import backend
from occbev.inference.backend import (
    BackendError,
    RunSettings,
    Runtime,
    choose_backend,
    load_backend,
    table_form,
)
from occbev.inference.families.detr3d import Detr3dModel
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.model_package import ModelPackage


def package(*files: str) -> ModelPackage:
    return ModelPackage(Path("probe"), LiftSplatModel(), files=dict.fromkeys(files, "00"))


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runtimes of which the second is not installed."""
    known = {
        "openvino": Runtime("openvino_backend", ("json",), ("model.xml", "model.onnx"), "-"),
        "onnxruntime": Runtime("onnx_backend", ("no_such_module",), ("model.onnx",), "pip install it"),
        "torch": Runtime("torch_backend", ("json",), ("weights.safetensors",), "-"),
    }
    monkeypatch.setattr(backend, "RUNTIMES", known)


def test_openvino_sends_no_statistics() -> None:
    pytest.importorskip("openvino")
    program = "import occbev, sys, openvino; sys.exit('openvino_telemetry.main' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.usefixtures("runtimes")
def test_auto_takes_the_first_that_is_installed_and_fits() -> None:
    assert choose_backend("auto", package("model.onnx", "weights.safetensors")) == "openvino"
    assert choose_backend("auto", package("weights.safetensors")) == "torch"
    with pytest.raises(BackendError, match=r"openvino.*README\.md.*onnxruntime.*pip install it.*torch"):
        choose_backend("auto", package("README.md"))


@pytest.mark.usefixtures("runtimes")
def test_a_named_runtime_is_used_or_refused_never_replaced() -> None:
    assert choose_backend("torch", package("weights.safetensors")) == "torch"
    with pytest.raises(BackendError, match=r"no_such_module is not installed \(pip install it\)"):
        choose_backend("onnxruntime", package("model.onnx"))
    with pytest.raises(BackendError, match=r"holds none of \('weights\.safetensors',\); it has \['model\.xml'\]"):
        choose_backend("torch", package("model.xml"))
    with pytest.raises(BackendError, match="'caffe' is unknown.*openvino"):
        choose_backend("caffe", package("model.onnx"))


def test_settings_are_checked() -> None:
    with pytest.raises(BackendError, match="precision 'int4'"):
        RunSettings(precision="int4")
    with pytest.raises(BackendError, match="3 frame sets at once"):
        RunSettings(at_once=3)


def test_more_cameras_than_a_network_has_weights_for_are_refused() -> None:
    query = Detr3dModel(name="queries")
    crowd = ModelPackage(Path("probe"), query, files={"model.onnx": "00"})
    with pytest.raises(BackendError, match="queries takes at most 6 cameras, the rig has 7"):
        load_backend(crowd, 7)


def test_the_form_is_told_by_the_inputs() -> None:
    assert table_form(["images", "table_offset", "table_pixel"]) == "bag"
    assert table_form(["images", "table_cell", "table_pixel"]) == "gather"
    with pytest.raises(BackendError, match=r"\['images', 'ranks'\]"):
        table_form(["images", "ranks"])


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_broken_graph_is_named(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    broken = ModelPackage(tmp_path, LiftSplatModel(), files={"model.onnx": "00"})
    with pytest.raises(BackendError, match=r"model\.onnx: .* cannot load it"):
        load_backend(broken, 6, name)
