"""`occbev verify-engine` on runtimes that this machine has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.small_network import SMALL  # noqa: E402

from occbev.cli import main  # noqa: E402
from occbev.inference.backend import BackendError, RunSettings, load_backend  # noqa: E402
from occbev.inference.example_inputs import relative_difference  # noqa: E402
from occbev.inference.model_package import ModelPackage, write_package  # noqa: E402
from occbev.inference.onnx_backend import PROVIDERS, choose_provider, provider_options  # noqa: E402
from occbev.inference.verify import Verification  # noqa: E402
from occbev_training.export.package import write_onnx  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.families import make_graph  # noqa: E402


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    torch.manual_seed(0)
    network, folder = build_model(SMALL, "finetune").eval(), tmp_path_factory.mktemp("verified")
    write_onnx(make_graph(network), SMALL, folder / "model.onnx")
    return write_package(folder, SMALL, {"data": "nothing"}, {})


def test_a_runtime_is_compared_timed_and_written_down(
    package: ModelPackage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    arguments = ["verify-engine", str(package.folder), "--backend", "openvino", "--cameras", "4", "--rounds", "3"]
    assert main([*arguments, "--json", "--markdown", str(page)]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert set(values["difference"]) == {"occupied", "class_id", "class_probability", "heatmap", "box"}
    assert 0 < values["difference"]["heatmap"] < 0.2  # another runtime: not the same, and not far
    assert 0 < values["latency_ms"] <= values["p95_ms"]
    assert values["cameras"] == 4
    assert "verify-engine probe openvino auto" in page.read_text()
    assert "CPU" in page.read_text()


def test_the_reference_itself_differs_by_nothing(package: ModelPackage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-engine", str(package.folder), "--backend", "onnxruntime", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "probe on CPU, model, 6 cameras"
    assert "heatmap: differs by 0.0e+00 of its largest value" in lines


def test_outputs_that_are_too_far_off_are_named() -> None:
    found = Verification("GPU", 6, {"a": 0.1, "b": 0.3, "c": float("nan")}, 1.0, 1.0, 1)
    assert [line.split()[0] for line in found.problems(0.2)] == ["b", "c"]
    assert relative_difference(np.float32([1, -4]), np.float32([1, -3])) == 0.25
    assert relative_difference(np.uint8([1, 2, 3, 4]), np.uint8([1, 2, 3, 9])) == 0.25


def test_a_provider_that_is_not_built_in_is_named(package: ModelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"provider cuda is not in this build, which has cpu.*onnxruntime-gpu"):
        load_backend(package, 4, "onnxruntime", RunSettings(provider="cuda"))
    with pytest.raises(BackendError, match="provider 'dml': must be one of auto, cpu"):
        RunSettings(provider="dml")
    with pytest.raises(BackendError, match="device -1"):
        RunSettings(device=-1)
    assert choose_provider("auto") == "cpu"


def test_providers_fall_back_in_order_on_the_device_that_is_asked_for() -> None:
    chain = provider_options("tensorrt", 1)
    assert [name for name, _ in chain] == [PROVIDERS[name] for name in ("tensorrt", "cuda", "cpu")]
    assert [options.get("device_id") for _, options in chain] == [1, 1, None]
    assert chain[0][1]["trt_engine_cache_enable"]
    assert provider_options("cpu", 1) == [(PROVIDERS["cpu"], {})]
