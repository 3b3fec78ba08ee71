"""The model package: one folder with a network's graph, weights and everything that its training fixed.

`config.yaml` holds the model configuration, provenance, metrics and the SHA-256 of every other file;
nothing in a package is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from occbev.config import ConfigError, ModelConfig, brief, to_record
from occbev.files import YamlError, file_hash, read_yaml
from occbev.inference.families import read_model
from occbev.share import share_path

CONFIG_NAME = "config.yaml"
SUFFIXES = (".safetensors", ".onnx", ".xml", ".bin", ".npz", ".md", ".png")
"""Kinds of files that a package may hold: tensors, graphs, text and pictures, none of which can run code."""


MAX_IMAGE, MAX_CELLS, MAX_VOXELS = 2**24, 2**22, 2**25
"""Most pixels of a network's input, cells of its BEV and voxels of its grid."""


class PackageError(ValueError):
    """A model package that cannot be used, saying which file and what would be right."""


@dataclass(frozen=True)
class ModelPackage:
    """A verified model package.

    provenance: data, steps, seeds and versions of the training. metrics: its held-out scores.
    files: file name -> SHA-256, for every file but `config.yaml`. config_hash: SHA-256 of that one.
    """

    folder: Path
    model: ModelConfig
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    config_hash: str = ""

    @classmethod
    def load(cls, folder: Path | str, verify: bool = True) -> ModelPackage:
        """Read a package folder; with `verify`, every file is hashed and compared.

        Raises:
            PackageError: naming the folder, the file or key, and what is there instead.
        """
        folder = Path(folder)
        record = _read_record(folder)
        model = _read_model(folder, record)
        _check_sizes(folder, model)
        _check_names(folder, record["files"])
        for name, digest in record["files"].items():
            _check_file(folder, name, digest, verify)
        notes = (record.get("provenance") or {}, record.get("metrics") or {})
        return cls(folder, model, *notes, record["files"], file_hash(folder / CONFIG_NAME))

    @property
    def hash(self) -> str:
        """Sixteen hex digits over all files, the configuration included: names this package in caches and reports."""
        lines = [f"{name} {digest}" for name, digest in sorted({**self.files, CONFIG_NAME: self.config_hash}.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def trained_on(self) -> str:
        """What the weights were trained on (`provenance.data`); shown wherever results are shown."""
        return str(self.provenance.get("data", "data that its provenance does not name"))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Outputs of the graph as checked at its export; empty if unknown."""
        checked = self.metrics.get("export_difference") or {}
        return tuple((checked.get("onnxruntime") or {}).keys())

    @property
    def predicts(self) -> str:
        """What the network predicts and what it does not, as text; "" if unknown."""
        return describe_outputs(self.outputs)

    def has(self, name: str) -> bool:
        """Whether the package holds a file of this name."""
        return name in self.files

    def path(self, *names: str) -> Path:
        """Return the first of these files that the package holds.

        Raises:
            PackageError: listing the files that are there.
        """
        for name in names:
            if name in self.files:
                return self.folder / name
        raise PackageError(f"{self.folder}: holds no {' or '.join(names)}; it has {sorted(self.files)}")


def describe_outputs(outputs: Collection[str]) -> str:
    """Say in words what a graph with these outputs predicts, and what it does not; "" for no outputs."""
    if not outputs:
        return ""
    boxes = {"box", "box_codes"} & set(outputs)
    if "occupancy_logits" in outputs:
        return "boxes and voxels with classes" if boxes else "voxels with classes; no boxes"
    if "reconstruction_logits" in outputs:
        voxels = "geometric voxels: free, occupied or unknown, without classes"
        return f"boxes and {voxels}" if boxes else f"{voxels}; neither classes nor boxes"
    return "boxes; no voxels"


def find_package(name_or_folder: str | Path) -> Path:
    """Return the folder of a package given by path, or by the name of one shipped in config/models.

    Raises:
        PackageError: neither is there; names the shipped ones.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    shipped = _find_shipped()
    if shipped is not None and folder.name == str(name_or_folder) and (shipped / folder).is_dir():
        return shipped / folder
    names = sorted(path.parent.name for path in shipped.glob(f"*/{CONFIG_NAME}")) if shipped else []
    raise PackageError(f"no model package {str(name_or_folder)!r}: no such folder, and the shipped ones are {names}")


def write_package(
    folder: Path, model: ModelConfig, provenance: Mapping[str, Any], metrics: Mapping[str, Any]
) -> ModelPackage:
    """Seal a folder whose graphs and weights are already in it: hash them and write `config.yaml` last.

    Raises:
        PackageError: the folder holds nothing, or a kind of file that a package may not hold.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != CONFIG_NAME)
    strangers = [name for name in names if Path(name).suffix not in SUFFIXES or not (folder / name).is_file()]
    if strangers or not names:
        raise PackageError(f"{folder}: holds {strangers or 'nothing'}; a package holds files of {SUFFIXES}")
    files = {name: file_hash(folder / name) for name in names}
    record = {
        "model": to_record(model),
        "provenance": to_record(provenance),
        "metrics": to_record(metrics),
        "files": files,
    }
    partial = folder / f".{CONFIG_NAME}.partial"
    partial.write_text(yaml.safe_dump(record, sort_keys=False))
    os.replace(partial, folder / CONFIG_NAME)
    return ModelPackage.load(folder)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if (folder / "run.json").is_file():
        raise PackageError(
            f"{folder}: is the folder of a training run, not a model package; 'occbev-train export' makes one of it"
        )
    if not path.is_file():
        absent = "a file, not a folder" if folder.is_file() else "no such folder"
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else absent
        raise PackageError(f"{folder}: a model package needs {CONFIG_NAME}; found {found}")
    try:
        record = read_yaml(path)
    except (OSError, YamlError) as error:
        raise PackageError(f"{path}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("model"), dict):
        raise PackageError(f"{path}: key 'model' is missing; a package has model, provenance, metrics, files")
    if not isinstance(record.get("files"), dict) or not record["files"]:
        raise PackageError(f"{path}: key 'files' must map every file to its SHA-256")
    for key in ("provenance", "metrics"):
        if not isinstance(record.get(key) or {}, dict):
            raise PackageError(f"{path}: {key} must hold keys and values, got {brief(record[key])}")
    return record


def _check_sizes(folder: Path, model: ModelConfig) -> None:
    """Refuse sizes that do not fit a robot's memory, before anything is allocated."""
    sizes = {
        "image": (model.image.width * model.image.height, MAX_IMAGE),
        "bev": (model.bev.size, MAX_CELLS),
        "grid": (math.prod(model.grid.shape), MAX_VOXELS),
    }
    for key, (size, most) in sizes.items():
        if size > most:
            raise PackageError(f"{folder / CONFIG_NAME}: model.{key} has {size:.3g} cells, at most {most}")


def _check_names(folder: Path, files: Mapping[Any, Any]) -> None:
    """Refuse names that lead elsewhere, and files that are there without being listed: a graph could read them."""
    for name, digest in files.items():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise PackageError(
                f"{folder / CONFIG_NAME}: files.{brief(name)}: want a plain name ending in one of {SUFFIXES}"
            )
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise PackageError(f"{folder / CONFIG_NAME}: files.{name}: want 64 hex digits, got {brief(digest)}")
    strangers = sorted({path.name for path in folder.iterdir()} - set(files) - {CONFIG_NAME})
    if strangers:
        raise PackageError(f"{folder}: holds {strangers[:5]}, which {CONFIG_NAME} does not list: remove them")


def _read_model(folder: Path, record: dict[str, Any]) -> ModelConfig:
    try:
        return read_model(record["model"], "model")
    except ConfigError as error:
        raise PackageError(f"{folder / CONFIG_NAME}: {error}") from error


def _check_file(folder: Path, name: str, digest: str, verify: bool) -> None:
    path = folder / name
    if not path.is_file():
        raise PackageError(
            f"{folder}: {name} is listed in {CONFIG_NAME} but absent; found {sorted(p.name for p in folder.iterdir())}"
        )
    if verify and file_hash(path) != digest:
        raise PackageError(
            f"{path}: its SHA-256 is {file_hash(path)}, {CONFIG_NAME} says {digest}: the file was changed or "
            "its download is incomplete"
        )


def _find_shipped() -> Path | None:
    try:
        return share_path("config/models")
    except FileNotFoundError:
        return None
