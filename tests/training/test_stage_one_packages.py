"""Stage 1 ships: packages of pre-trained networks say what is free, occupied and unknown, and no more than that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from occbev.classes import FREE, OCCUPIED_STATE, UNOBSERVED_STATE  # noqa: E402
from occbev.config import ModelConfig  # noqa: E402
from occbev.inference.example_inputs import ring_rig  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.model_package import ModelPackage  # noqa: E402
from occbev.inference.pipeline import Pipeline  # noqa: E402
from occbev.results import CameraFrame, FrameSet  # noqa: E402
from occbev_training.engine.stages import keep_trainable_heads  # noqa: E402
from occbev_training.export.package import export_package  # noqa: E402
from occbev_training.models.build import build_for_weights, build_model, with_geometry  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402
from occbev_training.models.heads.record import heads_of  # noqa: E402

CAMERAS = 3


def model_of(repository: Path, name: str) -> ModelConfig:
    return reduced(load_model(repository / "config/models" / f"{name}.yaml"))


def perceive(package: ModelPackage, backend: str):
    rig = ring_rig(package.model, CAMERAS)
    pixels = np.random.default_rng(0).integers(0, 255, (package.model.image.height, package.model.image.width, 3))
    frames = {name: CameraFrame(name, 0, pixels.astype(np.uint8), np.eye(4)) for name in rig.names}
    return Pipeline(package, rig, backend).run(FrameSet(0, frames))


@pytest.mark.parametrize(
    ("name", "seed"),  # a seed whose random network sees occupied and free voxels
    [("occbev-tiny", 0), ("bevdet_r50", 0), ("bevformer_base", 0), ("detr3d_r101", 19), ("occ_bev_sweep2", 0)],
)
def test_a_pretrained_network_of_every_family_runs_as_a_package(
    repository: Path, tmp_path: Path, name: str, seed: int
) -> None:
    model = model_of(repository, name)
    torch.manual_seed(seed)
    network = build_model(model, "pretrain")
    package = export_package(network, model, tmp_path / name, {}, {}, cameras=(CAMERAS,))
    assert "neither classes nor boxes" in package.predicts
    assert "no boxes" in (package.folder / "README.md").read_text()
    both = [perceive(package, backend) for backend in ("onnxruntime", "torch")]
    for perception in both:
        voxels = perception.occupancy
        assert len(perception.boxes) == 0
        assert not voxels.has_classes
        assert {*np.unique(voxels.label)} <= {0, FREE}
        assert (voxels.state == OCCUPIED_STATE).any()
        assert (voxels.state == UNOBSERVED_STATE).any()
        np.testing.assert_array_equal(
            voxels.label[voxels.state == OCCUPIED_STATE], 0, "an occupied voxel without a class"
        )
    np.testing.assert_array_equal(*(perception.occupancy.label for perception in both))


def test_weights_say_which_heads_a_network_has(repository: Path) -> None:
    model = model_of(repository, "occbev-tiny")
    states = [build_model(model, stage).state_dict() for stage in ("pretrain", "finetune")]
    states.append(with_geometry(build_model(model, "finetune"), model).state_dict())
    for state in states:
        assert set(build_for_weights(model, state).state_dict()) == set(state)
    heads = [{name.split(".")[0] for name in state} & {"occupancy_head", "detection_head"} for state in states]
    assert heads == [set(), {"occupancy_head", "detection_head"}, {"detection_head"}]


class Labelled:
    """Two samples without dense truth, with or without three-state labels."""

    root = Path("cache")

    def __init__(self, state: int) -> None:
        self._state = np.full((2, 2, 2), state, np.uint8)

    def __len__(self) -> int:
        return 2

    def read(self, index: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        nothing = np.zeros((2, 2, 2), bool)
        arrays = {"state": self._state, "mask_camera": nothing, "semantics": nothing.astype(np.uint8)}
        return {name: arrays[name] for name in names}


@pytest.mark.parametrize(("state", "head"), [(OCCUPIED_STATE, "occupancy_decoder"), (UNOBSERVED_STATE, None)])
def test_a_semantic_head_without_truth_is_not_trained(repository: Path, state: int, head: str | None) -> None:
    model = model_of(repository, "occbev-tiny")
    network = keep_trainable_heads(build_model(model, "finetune"), model, Labelled(state))
    heads = {head.part for head in heads_of(network)}
    assert heads == {"detection_head"} | ({head} if head else set())
    assert set(build_for_weights(model, network.state_dict()).state_dict()) == set(network.state_dict())
