"""Export of BEVFormer and DETR3D: parity, standard operators, geometry and state as inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from occbev.config import (  # noqa: E402
    BevFormerConfig,
    ImageConfig,
    ModelConfig,
    QueryHeadConfig,
    ResNetConfig,
)
from occbev.grid import BevGrid, VoxelGrid  # noqa: E402
from occbev_training import export_query  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402

BEVFORMER = ModelConfig(
    name="small",
    family="bevformer",
    image=ImageConfig(width=96, height=64),
    resnet=ResNetConfig(depth=18, stages=(3, 4), levels=2, channels=32),
    bevformer=BevFormerConfig(
        channels=32,
        heads=4,
        hidden=32,
        layers=2,
        heights=2,
        camera_points=4,
        occupancy=True,
        max_rows=128,
    ),
    query_head=QueryHeadConfig(queries=7, layers=2, heads=4, hidden=32),
    bev=BevGrid((-8.0, -6.0), (1.0, 1.0), (16, 12)),
    grid=VoxelGrid((-8.0, -6.0, -1.0), (1.0, 1.0, 1.0), (16, 12, 4)),
)
DETR3D = replace(BEVFORMER, family="detr3d", bevformer=None)


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Let every offset and weight matter, as after training."""
    for name, weight in network.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return network.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[torch.nn.Module, Path, dict[str, float]]:
    torch.manual_seed(0)
    network, path = (
        awake(build_model(BEVFORMER, "finetune")),
        tmp_path_factory.mktemp("onnx") / "m.onnx",
    )
    return network, path, export_query.export_query_onnx(network, BEVFORMER, path, cameras=3)


def test_bevformer_says_the_same_in_onnx_runtime(exported) -> None:
    _, path, worst = exported
    assert set(worst) == {"occupancy_logits", "class_logits", "box_codes", "state_out_bev"}
    assert max(worst.values()) <= 1e-4
    assert "GridSample" in export_query.operators_of(path)


def test_another_rig_needs_no_other_graph(exported) -> None:
    network, path, _ = exported
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph = export_query.make_graph(network).eval()
    inputs = export_query.example_inputs(BEVFORMER, 3)
    other = export_query.camera_tables(BEVFORMER, np.tile([[60.0, 0, 40], [0, 60, 30], [0, 0, 1]], (3, 1, 1)),
                                       _poses(3))  # fmt: skip
    outputs = []
    for tables in ({}, other):
        changed = inputs | tables
        with torch.no_grad():
            want = graph(**{name: torch.from_numpy(array) for name, array in changed.items()})
        got = session.run(list(graph.outputs), changed)
        for a, b in zip(want, got, strict=True):
            np.testing.assert_allclose(b, a.numpy(), atol=2e-4 * float(a.abs().max()))
        outputs.append(got)
    assert np.abs(outputs[0][-1] - outputs[1][-1]).max() > 1e-2


def _poses(count: int) -> np.ndarray:
    poses = np.tile(np.eye(4), (count, 1, 1))
    for pose, yaw in zip(poses, (0.3, 2.0, 4.4), strict=True):
        pose[:3, 0], pose[:3, 1] = (np.sin(yaw), -np.cos(yaw), 0), (0, 0, -1)
        pose[:3, 2], pose[:3, 3] = (np.cos(yaw), np.sin(yaw), 0), (0.5, 0, 2.0)
    return poses


def test_detr3d_says_the_same_in_onnx_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = awake(build_model(DETR3D, "finetune"))
    worst = export_query.export_query_onnx(network, DETR3D, tmp_path / "m.onnx", cameras=3)
    assert set(worst) == {"class_logits", "box_codes"}
    assert max(worst.values()) <= 1e-4


def test_a_network_of_another_family_is_refused() -> None:
    with pytest.raises(export_query.ExportError, match="Linear"):
        export_query.make_graph(torch.nn.Linear(1, 1))
