"""Networks of other view transforms adapt to a drive without labels: the loss falls, and the package replays the drive."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("embreex")

from tests.training.test_pretraining_everywhere import inputs  # noqa: E402

from occbev.cli import main as occbev  # noqa: E402
from occbev.config import ModelConfig  # noqa: E402
from occbev.grid import VoxelGrid  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.model_package import ModelPackage, write_package  # noqa: E402
from occbev_training.cli import main  # noqa: E402
from occbev_training.data.label_frame import in_base_link  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402
from occbev_training.occupancy.labels import LabelConfig  # noqa: E402
from occbev_training.occupancy.pairs import PairConfig, Unit, join_units, make_unit  # noqa: E402
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive  # noqa: E402
from occbev_training.sources.bag_writer import write_bag  # noqa: E402

GRID = VoxelGrid((-16.0, -16.0, -1.0), (2.0, 2.0, 0.8), (16, 16, 8))
"""Of every reduced network, centred on the vehicle."""


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A simulated drive of twelve key frames with small pictures: as a bag, and as pairs."""
    folder = tmp_path_factory.mktemp("drive")
    recording = SimulatedDrive(41, DriveConfig(keys=12, key_rate=5.0, image=(192, 108), supersample=1.0, grid=GRID))
    write_bag(recording, folder / "bag")
    config = PairConfig(LabelConfig(window=0.3), GRID, min_support=0.0, min_travel=0.0, gate=False, lidar=True)
    make_unit(recording, Unit(recording.name, 0, 12), folder / "pairs", config)
    join_units(folder / "pairs", {"train": 1.0})
    return folder / "bag", folder / "pairs"


def package(repository: Path, folder: Path, name: str) -> Path:
    """The reduced network of a configuration with random weights."""
    model = in_base_link(reduced(load_model(repository / "config/models" / f"{name}.yaml")))
    model = replace(model, grid=GRID)
    torch.manual_seed(0)
    network = build_model(model, "finetune")
    learn_statistics(network, model)
    folder.mkdir()
    save_weights(folder / "weights.safetensors", network.state_dict(), {})
    write_package(folder, model, {"data": "nothing: its weights are random"}, {})
    return folder


def learn_statistics(network: torch.nn.Module, model: ModelConfig) -> None:
    """Let the norms see noise: with the statistics of a new network, which adapting holds, gradients overflow."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(*inputs(model, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "voxels"),
    [
        ("bevdet_occ_r50", "voxels with classes"),
        ("bevformer_base_occ", "voxels with classes"),
        ("bevdet_r50", "geometric"),
    ],
)
def test_a_network_of_another_family_adapts(
    repository: Path, drive: tuple[Path, Path], tmp_path: Path, name: str, voxels: str
) -> None:
    bag, pairs = drive
    begun, out = package(repository, tmp_path / "begun", name), tmp_path / "mine"
    way = ["adapt", str(begun), str(pairs), "--out", str(out), "--steps", "15", "--rehearsal-drives", "0"]
    assert main([*way, "--workers", "1", "--threads", "1"]) == 0
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = [line["occupancy"] for line in lines if "occupancy" in line]
    assert loss[-1] < 0.8 * loss[0]
    made = ModelPackage.load(out / "package")
    assert made.provenance["adapted"]["steps"] == 15
    assert voxels in made.predicts
    summary = tmp_path / "replay.json"
    play = ["replay", str(bag), "--model", str(out / "package"), "--offline", "--json", str(summary)]
    assert occbev(play) == 0
    assert json.loads(summary.read_text())["summary"]["frames_processed"] >= 10
