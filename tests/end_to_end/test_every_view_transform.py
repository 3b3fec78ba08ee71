"""Networks of each view transform run a simulated drive in `occbev replay --offline`.

Three of them begin as published checkpoints: convert, export, replay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("embreex")

from occbev.cli import main  # noqa: E402
from occbev.config import save_config, to_record  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.model_package import write_package  # noqa: E402
from occbev_training.cli import convert  # noqa: E402
from occbev_training.cli import main as train  # noqa: E402
from occbev_training.export.package import write_onnx  # noqa: E402
from occbev_training.export.zoo import randomise_zero_init  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.models.families import make_graph, reduced  # noqa: E402
from occbev_training.models.renaming import to_reference  # noqa: E402
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive  # noqa: E402
from occbev_training.sources.bag_writer import write_bag  # noqa: E402

KEYS = 3


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated drive of three key frames with small pictures, as a bag."""
    path = tmp_path_factory.mktemp("drive") / "bag"
    config = DriveConfig(keys=KEYS, key_rate=5.0, image=(192, 108), supersample=1.0)
    write_bag(SimulatedDrive(20_001, config), path)
    return path


def package(repository: Path, folder: Path, name: str, backend: str) -> Path:
    """The reduced network of a configuration with random weights, as a package for one runtime."""
    model = reduced(load_model(repository / "config/models" / f"{name}.yaml"))
    torch.manual_seed(0)
    network = randomise_zero_init(build_model(model, "finetune")).eval()
    folder.mkdir()
    if backend == "torch":
        record = {"model": to_record(model)}
        save_weights(folder / "weights.safetensors", network.state_dict(), record)
    else:
        write_onnx(make_graph(network), model, folder / "model.onnx")
    write_package(folder, model, {"data": "nothing: its weights are random"}, {})
    return folder


def parameters(repository: Path, folder: Path) -> Path:
    """The shipped parameters, but for boxes that are as weak as those of random weights."""
    text = (repository / "config/perception.yaml").read_text()
    for old, new in (
        ("score_threshold: 0.1", "score_threshold: 0.0001"),
        ("threads: 0", "threads: 1"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "perception.yaml").write_text(text)
    return folder / "perception.yaml"


@pytest.mark.parametrize(
    ("name", "backend", "voxels"),
    [
        ("occbev-small", "torch", True),
        ("bevformer_base_occ", "torch", True),
        ("detr3d_r101", "onnxruntime", False),
    ],
)
def test_a_drive_goes_through_the_network(
    repository: Path, bag: Path, tmp_path: Path, name: str, backend: str, voxels: bool
) -> None:
    folder = package(repository, tmp_path / "package", name, backend)
    lines = replay(repository, bag, tmp_path, folder, backend)
    assert all((line["occupied"] > 0) == voxels for line in lines)
    if name != "bevformer_base_occ":
        require_boxes(lines)
        assert lines[0]["score"] != lines[1]["score"]  # it looks at the images


def replay(repository: Path, bag: Path, folder: Path, package: Path, backend: str) -> list[dict[str, Any]]:
    """Replay the drive and return a line of boxes for every key frame; none is dropped."""
    out = {n: folder / n for n in ("summary.json", "boxes.jsonl")}
    arguments = ["replay", str(bag), "--offline", "--model", str(package), "--backend", backend]
    arguments += ["--params-file", str(parameters(repository, folder))]
    assert main([*arguments, "--json", str(out["summary.json"]), "--boxes", str(out["boxes.jsonl"])]) == 0
    summary = json.loads(out["summary.json"].read_text())["summary"]
    assert (summary["frames_in"], summary["frames_processed"], summary["partial"]) == (KEYS, KEYS, 0)
    lines = [json.loads(line) for line in out["boxes.jsonl"].read_text().splitlines()]
    assert len(lines) == KEYS
    return lines


def require_boxes(lines: list[dict[str, Any]]) -> None:
    """Boxes are there, finite and within reach."""
    boxes = np.array([row for line in lines for row in line["box"]])
    assert len(boxes) > 0
    assert np.isfinite(boxes).all()
    assert np.abs(boxes[:, :2]).max() < 62  # metres in base_link


@pytest.mark.parametrize(
    ("name", "voxels"), [("bevformer_tiny", False), ("bevdet_r50", False), ("flashocc_r50_m0", True)]
)
def test_a_published_checkpoint_goes_the_whole_way(
    repository: Path, bag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, voxels: bool
) -> None:
    model = reduced(load_model(repository / "config/models" / f"{name}.yaml"))
    (tmp_path / "models").mkdir()
    save_config(tmp_path / "models" / f"{name}.yaml", model)
    monkeypatch.setattr(convert, "share_path", lambda relative: tmp_path / "models")
    torch.manual_seed(0)
    network = randomise_zero_init(build_model(model, "finetune"))
    state = to_reference(network.state_dict(), network.reference_names)
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    converted, exported = tmp_path / "converted", tmp_path / "exported"
    arguments = ["convert", str(tmp_path / "published.pth"), "--family", name, "--out", str(converted)]
    assert train(arguments) == 0
    assert train(["export", str(converted), "--out", str(exported), "--cameras", "6"]) == 0
    lines = replay(repository, bag, tmp_path, exported, "onnxruntime")
    assert all((line["occupied"] > 0) == voxels for line in lines)
    if not voxels:
        require_boxes(lines)
    if name == "bevformer_tiny":  # a random heat map of BEVDet hardly depends on the images
        assert lines[0]["score"] != lines[1]["score"]
