"""Reduced networks of the BEVDet family as ONNX: equal to torch, plain operators, any number of cameras."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
from occbev.config import DepthConfig, ModelConfig, load_config, save_config  # noqa: E402
from occbev.grid import BevGrid, VoxelGrid  # noqa: E402
from occbev.inference.pipeline import Pipeline  # noqa: E402
from occbev.model_package import ModelPackage  # noqa: E402
from occbev.postprocess import BoxDecoding  # noqa: E402
from occbev.results import CameraFrame, FrameSet  # noqa: E402
from occbev_training.cli import main  # noqa: E402
from occbev_training.export import (  # noqa: E402
    ExportError,
    require_plain_operators,
    ring_rig,
)
from occbev_training.export_bevdet import (  # noqa: E402
    BevDetGraph,
    example_inputs,
    export_bevdet_onnx,
)
from occbev_training.models.bevdet import BevDetNetwork, Frame, build_bevdet  # noqa: E402
from occbev_training.models.centre_head import merge_tasks  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.models.lift_splat import batch_geometry  # noqa: E402
from occbev_training.models.temporal import warp_grid  # noqa: E402


def reduced(repository: Path, name: str, **parts: object) -> tuple[ModelConfig, BevDetNetwork]:
    config = load_config(repository / "config" / "models" / f"{name}.yaml", ModelConfig)
    config = replace(
        config,
        image=replace(config.image, width=64, height=32),
        lift=replace(config.lift, depth=DepthConfig(1.0, 25.0, 4.0), max_points=1024, channels=8),
        bev=BevGrid((-16.0, -16.0), (2.0, 2.0), (16, 16)),
        bev_encoder=replace(config.bev_encoder, channels=(8, 16, 32), out_channels=16),
        grid=VoxelGrid((-16.0, -16.0, -1.0), (2.0, 2.0, 0.8), (16, 16, 8)),
        bevdet=replace(
            config.bevdet, depth=18, neck_channels=32, bev_hidden=16, occupancy_hidden=16
        ),
    )
    if config.lift.height_bins > 1:
        config = replace(config, lift=replace(config.lift, height_bins=8))
    torch.manual_seed(0)
    network = build_bevdet(config, "finetune").eval()
    for module in network.modules():  # random norms, or a deep random ResNet says nearly nothing
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return config, network


@pytest.mark.parametrize("name", ["bevdepth4d_r50", "bevdepth_r50_megvii", "flashocc_r50_m0"])
def test_graphs_equal_torch_for_rigs_of_any_size(
    repository: Path, tmp_path: Path, name: str
) -> None:
    config, network = reduced(repository, name)
    path = tmp_path / f"{name}.onnx"
    differences = export_bevdet_onnx(network, config, path, cameras=(3, 2))
    want = {"occupancy_logits"} if name.startswith("flash") else {"heatmap", "box"}
    want |= {"state_out_bev"} if "4d" in name else set()
    assert set(differences) == want
    assert max(differences.values()) <= 1e-4
    assert "Gather" in require_plain_operators(path)


def test_a_package_made_by_the_command_runs_in_the_pipeline(
    repository: Path, tmp_path: Path
) -> None:
    config, network = reduced(repository, "bevdet_r50", tasks=(1, 2, 2, 1, 2, 2))
    save_config(tmp_path / "model.yaml", config)
    save_weights(tmp_path / "weights.safetensors", network.state_dict(), {})
    arguments = [str(tmp_path / n) for n in ("weights.safetensors", "package")]
    assert main(["export", *arguments, "--model", str(tmp_path / "model.yaml")]) == 0
    package = ModelPackage.load(tmp_path / "package")
    assert set(package.files) == {"weights.safetensors", "model.onnx", "README.md"}
    assert {"Conv", "Gather"} <= set(package.provenance["operators"].split())
    rig = ring_rig(config, 2)
    line = Pipeline(package, rig, "onnxruntime", 1, BoxDecoding(threshold=0.01))
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 64, 3), np.uint8)
    frames = {
        c.name: CameraFrame(c.name, 7, image, np.eye(4))
        for c, image in zip(rig.cameras, images, strict=True)
    }
    result = line.run(FrameSet(7, frames))
    line.close()
    assert len(result.boxes) > 0
    assert np.isfinite(result.boxes.box).all()
    assert not result.occupancy.state.any()  # it has no occupancy head


def test_each_cell_keeps_the_box_of_its_best_task() -> None:
    heatmap = torch.tensor([1.0, 0, 3, 2, 0, 0]).view(1, 3, 1, 2)  # classes 0 | 1, 2 in two cells
    box = torch.cat([torch.zeros(1, 10, 1, 2), torch.ones(1, 10, 1, 2)], 1)
    merged = merge_tasks(heatmap, box, (1, 2))
    assert merged[0, 0, 0].tolist() == [1, 1]
    heatmap[0, 0] = 5
    assert merge_tasks(heatmap, box, (1, 2))[0, :, 0].unique().tolist() == [0]
    assert merge_tasks(heatmap[:, :1], box[:, :10], (1,)) is not None


def test_the_streaming_graph_says_what_the_network_says_of_two_frames(repository: Path) -> None:
    config, network = reduced(repository, "bevdet4d_r50")
    graph = BevDetGraph(network)
    first, second = (example_inputs(graph, config, 2, seed) for seed in (0, 1))
    rig = ring_rig(config, 2)
    points = batch_geometry(
        np.stack([[c.intrinsic for c in rig.cameras]]),
        np.stack([[c.cam2ego for c in rig.cameras]]),
        config,
    )
    key2past = torch.eye(4)[None].clone()
    key2past[0, :2, 3] = torch.tensor([1.5, -0.2])
    as_tensors = [{k: torch.from_numpy(v) for k, v in f.items()} for f in (first, second)]
    with torch.no_grad():
        state = graph(**as_tensors[0])[graph.outputs.index("state_out_bev")]
        got = graph(**{**as_tensors[1], "state_in_bev": state})
        past = Frame(
            as_tensors[0]["images"], torch.ones(1, 2), points,
            warp=warp_grid(key2past, config.bev, config.lift.reference_quirks),
        )  # fmt: skip
        want = network(as_tensors[1]["images"], torch.ones(1, 2), points, [past])
    torch.testing.assert_close(got[0], want.heatmap, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want.box, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bevdepth4d_r50_megvii", "bevdet_occ_r50_4d_stereo"])
def test_what_has_no_plain_form_is_refused_by_name(repository: Path, name: str) -> None:
    config = load_config(repository / "config" / "models" / f"{name}.yaml", ModelConfig)
    with torch.device("meta"):
        network = build_bevdet(config, "finetune")
    with pytest.raises(ExportError, match="not exported"):
        BevDetGraph(network)
