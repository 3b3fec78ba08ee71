"""TensorRT without a GPU: every name that we use exists in three releases, and every byte goes where it must.

No engine was ever built by these tests: `tests/strict_tensorrt.py` computes by ONNX Runtime.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from tests.small_network import SMALL  # noqa: E402
from tests.strict_tensorrt import RELEASES, TABLE, Gpu, check_arguments, installed  # noqa: E402

from occbev.inference.backend import FACTORS, BackendError, RunSettings, load_backend  # noqa: E402
from occbev.inference.example_inputs import example_inputs  # noqa: E402
from occbev.inference.model_package import ModelPackage, write_package  # noqa: E402
from occbev_training.export.half import write_fp16  # noqa: E402
from occbev_training.export.package import write_onnx  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.families import make_graph  # noqa: E402

F32 = RunSettings(threads=1, precision="f32")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("engine")
    write_onnx(make_graph(build_model(SMALL, "finetune").eval()), SMALL, folder / "model.onnx")
    write_fp16(folder / "model.onnx", folder / "model_fp16.onnx")
    return write_package(folder, SMALL, {"data": "nothing"}, {})


@pytest.fixture(params=RELEASES)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    gpu = Gpu()
    with installed(gpu, request.param):
        yield gpu


@pytest.fixture
def backend(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("occbev.inference.tensorrt_backend")
    monkeypatch.setattr(module, "CACHE", tmp_path / "engines")
    return module


def test_an_engine_gives_what_its_graph_gives_and_frees_all_it_took(
    gpu: Gpu, backend: ModuleType, package: ModelPackage
) -> None:
    engine = backend.load(package, 5, F32)
    assert engine.device == "Probe GPU, f32"
    inputs = [example_inputs(SMALL, engine.form, 5, seed) for seed in (0, 3)]
    reference = load_backend(package, 5, "onnxruntime", F32)
    for arrays in inputs:
        found, wanted = engine.run(arrays), reference.run(arrays)
        assert set(found) == set(wanted) == {*FACTORS, "heatmap", "box"}
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    assert gpu.runs == 2
    assert len(gpu.memory) == 2 * len(engine._buffers)
    assert engine.about()["gpu_memory_mb"] == "2048 of 8192"
    engine.close()
    assert not gpu.memory
    assert not gpu.streams
    other = backend.load(package, 5, F32)
    del other, engine
    gc.collect()
    assert not gpu.memory


def test_an_engine_is_kept_by_graph_cameras_gpu_release_and_precision(
    gpu: Gpu, backend: ModuleType, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.load(package, 5, F32)
    backend.load(package, 5, F32)
    assert gpu.builds == 1
    backend.load(package, 4, F32)
    assert gpu.builds == 2
    engine = backend.load(package, 5, RunSettings())
    assert engine.device == "Probe GPU, fp16"
    assert gpu.builds == 3
    device = backend.Device(0, "Probe GPU", "sm87")
    paths = {
        backend.engine_path(digest, cameras, replace(device, **gpu_of), precision)
        for digest in ("a" * 64, "b" * 64)
        for cameras in (5, 6)
        for gpu_of in ({}, {"name": "Other"}, {"capability": "sm90"})
        for precision in ("auto", "f32")
    }
    assert len(paths) == 24
    monkeypatch.setattr(backend.tensorrt, "__version__", "99.0")
    assert backend.engine_path("a" * 64, 5, device, "auto") not in paths
    kept = sorted(backend.CACHE.iterdir())
    assert len(kept) == 3
    monkeypatch.undo()


def test_an_engine_that_cannot_be_read_is_built_anew(gpu: Gpu, backend: ModuleType, package: ModelPackage) -> None:
    backend.load(package, 5, F32)
    (kept,) = backend.CACHE.iterdir()
    kept.write_bytes(b"cut")
    backend.load(package, 5, F32)
    assert gpu.builds == 2


def test_what_cannot_run_is_named(gpu: Gpu, backend: ModuleType, package: ModelPackage, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="device 2 is not there; CUDA finds 1"):
        backend.load(package, 5, replace(F32, device=2))
    (tmp_path / "model.onnx").write_bytes(b"broken")
    with pytest.raises(BackendError, match=r"model\.onnx: TensorRT .* cannot parse it: node 3 is not known"):
        backend.build_engine(tmp_path / "model.onnx", 5, exact=False)


def test_the_fake_refuses_what_a_release_does_not_have(gpu: Gpu, backend: ModuleType) -> None:
    config = backend.tensorrt.Builder(backend.tensorrt.Logger(2)).create_builder_config()
    with pytest.raises(AttributeError, match="has no max_workspace_size"):
        _ = config.max_workspace_size
    with pytest.raises(TypeError, match="create_network"):
        backend.tensorrt.Builder(backend.tensorrt.Logger(2)).create_network(1, 2)
    with pytest.raises(TypeError):
        check_arguments("f", "a, b=None | c", (1, 2, 3), {})


@pytest.mark.parametrize("version", RELEASES)
def test_every_name_of_the_bindings_that_the_source_uses_exists(version: str) -> None:
    """Read from the syntax, so that lines which no test runs count as well."""
    spec = importlib.util.find_spec("occbev.inference.tensorrt_backend")
    assert spec is not None
    assert spec.origin is not None
    release, cuda = TABLE["tensorrt"][version], TABLE["cuda"]
    known = {name for names in release["attributes"].values() for name in names.split()}
    known |= {member for members in release["enums"].values() for member in members.split()}
    known |= {*release["attributes"], *release["enums"], *release["functions"], "__version__", "WARNING"}
    runtime = {*cuda["functions"], *cuda["enums"], *(m for members in cuda["enums"].values() for m in members)}
    objects = {"builder", "network", "parser", "config", "profile", "entry", "tensor", "engine", "runtime", "_engine"}
    objects |= {"_context"}
    used = {"tensorrt": set(), "cuda": set(), "objects": set()}
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if name in objects:
            used["objects"].add(node.attr)
        elif name in used:
            used[name].add(node.attr)
    assert len(used["objects"]) > 20
    assert used["objects"] <= known
    assert used["tensorrt"] <= known
    assert used["cuda"] <= runtime
