"""Model packages: sealed once, verified on load, and refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from occbev.config import ImageConfig
from occbev.inference.families.lift_splat import LiftSplatModel
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
