"""Model packages: sealed once, verified on load, and refused with a reason."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from occbev.config import ImageConfig
from occbev.inference.backend import load_backend
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.graph_checks import GraphError, require_finite, require_small
from occbev.inference.model_package import ModelPackage, PackageError, find_package, write_package

MODEL = replace(LiftSplatModel(), name="probe", image=ImageConfig(width=64, height=32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "probe"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "weights.safetensors").write_bytes(b"weights")
    write_package(folder, MODEL, {"seed": 3}, {"iou": 0.5})
    return folder


def edit(folder: Path, **changes: object) -> None:
    record = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(record | changes))


def test_a_written_package_loads_equal(folder: Path) -> None:
    package = ModelPackage.load(folder)
    assert package.model == MODEL
    assert package.provenance == {"seed": 3}
    assert package.metrics == {"iou": 0.5}
    assert sorted(package.files) == ["model.onnx", "weights.safetensors"]
    assert package.path("model.xml", "model.onnx") == folder / "model.onnx"
    assert package.has("model.onnx")
    assert not package.has("model.xml")


def test_the_hash_follows_the_content(folder: Path) -> None:
    before = ModelPackage.load(folder).hash
    (folder / "model.onnx").write_bytes(b"other")
    assert write_package(folder, MODEL, {}, {}).hash != before


def test_a_changed_file_is_refused_unless_not_verified(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"grapH")
    with pytest.raises(PackageError, match=r"model\.onnx.*SHA-256"):
        ModelPackage.load(folder)
    assert ModelPackage.load(folder, verify=False).model == MODEL


def test_an_absent_file_is_named_with_what_is_there(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(PackageError, match=r"model\.onnx is listed.*weights\.safetensors"):
        ModelPackage.load(folder)


def test_a_missing_graph_lists_the_files(folder: Path) -> None:
    with pytest.raises(PackageError, match=r"no model\.xml; it has \['model\.onnx'"):
        ModelPackage.load(folder).path("model.xml")


def test_a_folder_without_config_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(PackageError, match=r"needs config\.yaml; found \['checkpoint\.pt'\]"):
        ModelPackage.load(tmp_path)
    with pytest.raises(PackageError, match="no such folder"):
        ModelPackage.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../outside.onnx", "weights.pt", "sub/model.onnx"])
def test_unsafe_file_names_are_refused(folder: Path, name: str) -> None:
    edit(folder, files={name: "00"})
    with pytest.raises(PackageError, match="plain name"):
        ModelPackage.load(folder)


def test_a_run_and_a_file_are_told_from_a_package(folder: Path) -> None:
    with pytest.raises(PackageError, match="weights.safetensors: a model package needs config.yaml; found a file, not"):
        ModelPackage.load(folder / "weights.safetensors")
    (folder / "run.json").write_text("{}")
    with pytest.raises(PackageError, match="folder of a training run.*occbev-train export"):
        ModelPackage.load(folder)


def test_pickles_cannot_be_sealed(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(b"")
    with pytest.raises(PackageError, match=r"weights\.pkl"):
        write_package(folder, MODEL, {}, {})


def test_broken_configs_are_named(folder: Path) -> None:
    edit(folder, model={"imagee": {}})
    with pytest.raises(PackageError, match=r"config\.yaml: model\.imagee.*did you mean 'image'"):
        ModelPackage.load(folder)
    edit(folder, files={})
    with pytest.raises(PackageError, match="files"):
        ModelPackage.load(folder)
    (folder / "config.yaml").write_text("model: [")
    with pytest.raises(PackageError, match="not YAML"):
        ModelPackage.load(folder)
    (folder / "config.yaml").write_text("- 1")
    with pytest.raises(PackageError, match="'model' is missing"):
        ModelPackage.load(folder)


def test_find_package_takes_a_path_and_names_the_shipped(folder: Path) -> None:
    assert find_package(folder) == folder
    with pytest.raises(PackageError, match="no model package 'no-such-model'"):
        find_package("no-such-model")


def test_the_hash_covers_the_configuration(folder: Path) -> None:
    before = ModelPackage.load(folder).hash
    edit(folder, model={"name": "probe", "image": {"width": 64, "height": 64}})
    assert ModelPackage.load(folder).hash != before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": {"model.onnx": None}}, r"files\.model\.onnx: want 64 hex digits, got None"),
        ({"files": {1: "0" * 64}}, r"files\.1: want a plain name"),
        ({"provenance": [1]}, "provenance must hold keys and values"),
        (
            {"model": {"grid": {"lo": [0, 0, 0], "pitch": [1, 1, 1], "shape": [10**6, 10**6, 10**6]}}},
            "model.grid has 1e",
        ),
        ({"model": {"bev": {"lo": [0, 0], "pitch": [1, 1], "shape": [10**9, 10**9]}}}, "model.bev has 1e"),
        (
            {"model": {"bev": {"lo": [0, 0], "pitch": [1, float("nan")], "shape": [9, 9]}}},
            r"model\.bev\.pitch\[1\]: nan",
        ),
    ],
)
def test_hostile_configurations_are_refused_at_once(folder: Path, changes: dict[str, object], reason: str) -> None:
    edit(folder, **changes)
    began = time.process_time()
    with pytest.raises(PackageError, match=reason):
        ModelPackage.load(folder)
    assert time.process_time() - began < 1


def test_aliases_that_unfold_are_refused(folder: Path) -> None:
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    (folder / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(PackageError, match=r"config\.yaml: line 2: aliases"):
        ModelPackage.load(folder)


def test_a_file_that_is_not_listed_is_refused(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"weights that no hash covers")
    with pytest.raises(PackageError, match=r"model\.onnx\.data.*does not list"):
        ModelPackage.load(folder)


def test_a_configuration_that_is_not_the_graphs_is_refused(tmp_path: Path) -> None:
    shipped = ModelPackage.load(find_package("occbev-tiny"))
    folder = tmp_path / "odd #%20[1] \u00fc name"
    folder.mkdir()
    for name in shipped.files:
        (folder / name).symlink_to(shipped.folder.resolve() / name)
    record = yaml.safe_load((shipped.folder / "config.yaml").read_text())
    record["model"]["occupancy_classes"] = record["model"]["occupancy_classes"][1:]
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    for backend in ("openvino", "onnxruntime"):
        with pytest.raises(GraphError, match=r"occupancy_logits is 1x18x16x200x200, .* describes 1x17x16x200x200"):
            load_backend(ModelPackage.load(folder), 6, backend)


def test_weights_that_are_not_numbers_are_refused() -> None:
    limit, weights = np.array(np.inf, np.float32), np.ones((2, 2), np.float32)
    require_finite(Path("model.xml"), [("clamp", limit), ("conv", weights)])
    weights[1, 0] = np.inf
    with pytest.raises(GraphError, match=r"model\.xml: the weights conv \(2, 2\) are not finite"):
        require_finite(Path("model.xml"), [("conv", weights)])
    with pytest.raises(GraphError, match=r"the tensor big 1x100000x100000 has 1e\+10 values"):
        require_small(Path("model.xml"), [("big", (1, 100_000, 100_000))])
