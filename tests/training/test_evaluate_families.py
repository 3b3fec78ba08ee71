"""A package of every family is scored: on what it predicts, in drive order, with a memory that ends with the drive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
families = pytest.importorskip("occbev_training.export.zoo")

from occbev.config import ModelConfig  # noqa: E402
from occbev.grid import VoxelGrid  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.model_package import ModelPackage, write_package  # noqa: E402
from occbev_training.evaluation.data import RecordingFrames  # noqa: E402
from occbev_training.evaluation.run_package import RunOptions, run_package  # noqa: E402
from occbev_training.evaluation.scores import FrameResult, Scores  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402
from occbev_training.sources.recording import OccupancyTruth  # noqa: E402

MEASURED = {
    "occbev-tiny": ("boxes", "occupancy"),
    "occbev-small": ("boxes", "occupancy"),
    "bevdet_r50": ("boxes",),
    "bevdepth4d_r50": ("boxes",),
    "flashocc_r50_m0": ("occupancy",),
    "bevformer_tiny": ("boxes",),
    "bevformer_small_occ": ("occupancy",),
    "detr3d_r101": ("boxes",),
}
REMEMBER = {"occbev-small", "bevdepth4d_r50", "bevformer_small_occ"}
"""Networks with a memory whose random weights answer something here. Reduced grids have no cubes: no rays."""


def _package(model: ModelConfig, folder: Path) -> ModelPackage:
    torch.manual_seed(0)
    network = families.randomise_zero_init(build_model(model, "finetune")).eval()
    save_weights(folder / "weights.safetensors", network.state_dict(), {})
    return write_package(folder, model, {"data": "nothing"}, {})


def _frames(make_recording: Any, grid: VoxelGrid) -> RecordingFrames:
    """Two drives of two key frames; their dense labels are on the network's grid, a wall all around."""

    class Drive(make_recording):  # type: ignore[misc, valid-type]
        def occupancy_truth(self, key: int) -> OccupancyTruth:
            semantics = np.full(grid.shape, 17, np.uint8)
            semantics[:2] = semantics[-2:] = 15
            everywhere = np.ones(grid.shape, bool)
            return OccupancyTruth(semantics, everywhere, everywhere, grid)

    return RecordingFrames([(drive, key) for drive in (Drive("a", 2), Drive("b", 2, seed=1)) for key in (0, 1)])


def _same(first: FrameResult, second: FrameResult) -> bool:
    if first.boxes is not None and second.boxes is not None:
        pairs = [(first.boxes.box, second.boxes.box), (first.boxes.score, second.boxes.score)]
        if not all(a.shape == b.shape and np.allclose(a, b, atol=1e-4) for a, b in pairs):
            return False
    if first.occupancy is not None and second.occupancy is not None:
        return np.array_equal(first.occupancy.confusion, second.occupancy.confusion)
    return True


@pytest.mark.parametrize("name", MEASURED)
def test_a_package_is_scored_on_what_it_predicts(
    name: str, repository: Path, tmp_path: Path, make_recording: Any
) -> None:
    model = reduced(load_model(repository / "config/models" / f"{name}.yaml"))
    package, frames = _package(model, tmp_path), _frames(make_recording, model.grid)
    options = RunOptions(backend="torch", threads=1)
    in_order = run_package(package, frames, range(4), options).results()
    scores = Scores.of(in_order, model.occupancy_classes)
    assert scores.measured == MEASURED[name]
    assert all(np.isfinite(value) for value in scores.summary().values())
    assert scores.intervals(5).unit == "drive"
    later = run_package(package, frames, [2, 3], options).results()
    assert all(_same(a, b) for a, b in zip(in_order[2:], later, strict=True))  # a drive begins anew
    if name in REMEMBER:
        assert not _same(in_order[1], run_package(package, frames, [1], options).results()[0])
