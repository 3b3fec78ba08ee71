"""One network of each view transform runs a simulated drive in `occbev replay --offline`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("embreex")

from occbev.cli import main  # noqa: E402
from occbev.config import to_record  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.model_package import write_package  # noqa: E402
from occbev_training.export.package import write_onnx  # noqa: E402
from occbev_training.export.zoo import randomise_zero_init  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.models.families import make_graph, reduced  # noqa: E402
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
        ("bevformer_tiny", "onnxruntime", False),
        ("bevformer_base_occ", "torch", True),
        ("detr3d_r101", "onnxruntime", False),
    ],
)
def test_a_drive_goes_through_the_network(
    repository: Path, bag: Path, tmp_path: Path, name: str, backend: str, voxels: bool
) -> None:
    folder = package(repository, tmp_path / "package", name, backend)
    out = {n: tmp_path / n for n in ("summary.json", "boxes.jsonl")}
    arguments = ["replay", str(bag), "--offline", "--model", str(folder), "--backend", backend]
    arguments += ["--params-file", str(parameters(repository, tmp_path))]
    assert main([*arguments, "--json", str(out["summary.json"]), "--boxes", str(out["boxes.jsonl"])]) == 0
    summary = json.loads(out["summary.json"].read_text())["summary"]
    assert (summary["frames_in"], summary["frames_processed"], summary["partial"]) == (
        KEYS,
        KEYS,
        0,
    )
    lines = [json.loads(line) for line in out["boxes.jsonl"].read_text().splitlines()]
    assert len(lines) == KEYS
    assert all((line["occupied"] > 0) == voxels for line in lines)
    if name != "bevformer_base_occ":
        boxes = np.array([row for line in lines for row in line["box"]])
        assert len(boxes) > 0
        assert np.isfinite(boxes).all()
        assert np.abs(boxes[:, :2]).max() < 62  # metres in base_link
        assert lines[0]["score"] != lines[1]["score"]  # it looks at the images
