"""Exported packages: graphs equal torch, hold only plain operators, and take any number of cameras."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from tests.small_network import SMALL  # noqa: E402

from occbev.config import EncoderConfig, save_config  # noqa: E402
from occbev.inference.backend import FACTORS  # noqa: E402
from occbev.inference.model_package import ModelPackage  # noqa: E402
from occbev.inference.openvino_backend import shared_core  # noqa: E402
from occbev_training.cli import main  # noqa: E402
from occbev_training.export import package as export  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.models.network import OccBevNetwork  # noqa: E402

OUTPUTS = {"occupancy_logits", "heatmap", "box"}


def a_network() -> OccBevNetwork:
    torch.manual_seed(0)
    return build_model(SMALL, "finetune").eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package made by the command, from a weights file."""
    out = tmp_path_factory.mktemp("export")
    save_config(out / "probe.yaml", SMALL)
    save_weights(out / "weights.safetensors", a_network().state_dict(), {})
    (out / "provenance.json").write_text(json.dumps({"data": "simulated streets", "seeds": [1, 2]}))
    np.savez(out / "priors.npz", heatmap=np.zeros(3))
    arguments = ["--model", "probe.yaml", "--provenance", "provenance.json", "--add", "priors.npz"]
    arguments = [str(out / a) if a.endswith((".yaml", ".json", ".npz")) else a for a in arguments]
    assert main(["export", str(out / "weights.safetensors"), str(out / "package"), *arguments]) == 0
    return out / "package"


def test_package_holds_everything_and_verifies(folder: Path) -> None:
    package = ModelPackage.load(folder)
    assert set(package.files) == {
        "weights.safetensors",
        "model.onnx",
        "model.xml",
        "model.bin",
        "README.md",
        "priors.npz",
    }
    assert package.model == SMALL
    assert package.provenance["data"] == "simulated streets"
    assert set(package.provenance["exported_with"]) >= {"torch", "onnx", "openvino"}
    card = (folder / "README.md").read_text()
    assert "# probe" in card
    assert "Gather:" in package.provenance["operators"]
    assert "simulated streets" in card


def test_measured_differences_are_recorded_and_small(folder: Path) -> None:
    difference = ModelPackage.load(folder).metrics["export_difference"]
    assert set(difference) == {"torch", "onnxruntime", "openvino", "openvino_before_rounding"}
    for runtime, tolerance in (
        ("onnxruntime", 1e-4),
        ("openvino_before_rounding", 1e-4),
        ("openvino", 3e-2),
    ):
        assert set(difference[runtime]) == OUTPUTS
        assert max(difference[runtime].values()) <= tolerance


def test_onnx_graph_has_the_named_interface_and_plain_operators(folder: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    inputs = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.graph.input}
    assert set(inputs) == {
        "images",
        "camera_valid",
        "table_pixel",
        "table_depth",
        "table_weight",
        "table_stage2",
        "table_stage3",
        "table_stage4",
        "table_cell",
        "table_ray",
    }
    cameras = inputs["images"][1]
    assert isinstance(cameras, str)
    assert inputs["images"] == [1, cameras, 3, 64, 96]
    assert inputs["camera_valid"] == [1, cameras]
    assert {o.name for o in graph.graph.output} == OUTPUTS | set(FACTORS)
    assert graph.opset_import[0].version <= 20
    assert not {n.op_type for n in graph.graph.node} & export.FORBIDDEN_OPERATORS
    assert not any("Scatter" in n.op_type or "Sequence" in n.op_type for n in graph.graph.node)


def test_graphs_tell_nothing_of_the_machine_they_were_made_on(folder: Path) -> None:
    for graph in ("model.onnx", "model.xml"):
        content = (folder / graph).read_bytes()
        for trace in (str(Path(export.__file__).parent), "site-packages", "stack_trace"):
            assert trace.encode() not in content, (graph, trace)


def test_openvino_graph_has_the_named_interface(folder: Path) -> None:
    graph = shared_core().read_model(folder / "model.xml")
    shapes = {p.get_any_name(): p.get_partial_shape() for p in graph.inputs}
    assert set(shapes) == {
        "images",
        "camera_valid",
        "table_pixel",
        "table_depth",
        "table_weight",
        "table_offset",
        "table_ray",
    }
    dynamic = {name for name, shape in shapes.items() if shape.is_dynamic}
    assert dynamic == {"images", "camera_valid", "table_ray"}
    assert {p.get_any_name() for p in graph.outputs} == OUTPUTS | set(FACTORS)
    assert (folder / "model.bin").stat().st_size < 0.6 * (folder / "weights.safetensors").stat().st_size


def test_graph_that_differs_is_not_accepted(folder: Path) -> None:
    other, graph = a_network(), shared_core().read_model(folder / "model.xml")
    with torch.no_grad():
        other.detection_head.box[-1].bias += 1
    with pytest.raises(export.ExportError, match="ONNX Runtime: box differs"):
        export.check_graphs(other, SMALL, folder, graph, cameras=(3,))


def test_factors_must_be_those_of_the_logits() -> None:
    head = a_network().occupancy_head
    cells = torch.rand(1, SMALL.occupancy.cell_channels, 16, 4, 4)
    with torch.no_grad():
        head.kinds.bias[3] = -5.0  # so that no cell has this kind
        occupied, kind, share = (part.numpy() for part in head.factors(cells))
        outputs = {"occupancy_logits": head.logits(cells).numpy()}
    outputs |= {"occupied": occupied, "class_id": kind, "class_probability": share}
    export.check_factors(outputs)
    for wrong in (
        {"occupied": occupied + 0.01},
        {"occupied": occupied.swapaxes(1, 2).copy()},
        {"class_id": np.full_like(kind, 3)},
        {"class_probability": share + 0.01},
    ):
        with pytest.raises(export.ExportError, match="differ from the logits"):
            export.check_factors({**outputs, **wrong})


def test_a_refused_export_leaves_the_package_that_was_there(folder: Path, tmp_path: Path) -> None:
    before, network = ModelPackage.load(shutil.copytree(folder, tmp_path / "package")), a_network()
    with torch.no_grad():
        network.detection_head.box[-1].weight[0, 0] = float("nan")
    with pytest.raises(export.ExportError, match=r"detection_head\.box.*not finite"):
        export.export_package(network, SMALL, before.folder, {}, {}, (), (3,))
    with torch.no_grad():  # finite weights whose answers are not
        network.detection_head.box[0][1].bias.fill_(1e3)
        network.detection_head.box[-1].weight.fill_(3e38)
    with pytest.raises(export.ExportError, match="box holds values that are not finite"):
        export.export_package(network, SMALL, before.folder, {}, {}, (), (3,))
    assert ModelPackage.load(before.folder).files == before.files
    assert {path.name for path in before.folder.iterdir()} == {*before.files, "config.yaml"}


def test_an_export_replaces_no_run_and_goes_on_where_one_was_killed(folder: Path, tmp_path: Path) -> None:
    run, package = tmp_path / "run", shutil.copytree(folder, tmp_path / "package")
    run.mkdir()
    for name in ("config.yaml", "run.json", "weights.safetensors"):
        (run / name).write_text("stage: finetune")
    with pytest.raises(export.ExportError, match=r"run: holds \['config.yaml', 'run.json'\]"):
        export.export_package(a_network(), SMALL, run, {}, {}, (), (3,))
    assert {(path.name, path.read_text()) for path in run.iterdir()} == {
        (name, "stage: finetune") for name in ("config.yaml", "run.json", "weights.safetensors")
    }
    (package / ".partial-x").mkdir()  # killed while it wrote
    (package / "config.yaml").unlink()  # killed while it moved
    export.require_own_folder(package, ["priors.npz"])
    (package / "priors.npz").unlink()
    assert export.export_package(a_network(), SMALL, package, {}, {}, (), (3,)).has("model.onnx")
    assert not (package / ".partial-x").exists()


def test_what_is_not_finite_is_never_close() -> None:
    sound, broken = {"box": np.ones(3)}, {"box": np.array([1.0, np.nan, 1.0])}
    with pytest.raises(export.ExportError, match="box holds values that are not finite"):
        export.relative_differences(sound, broken)
    with pytest.raises(export.ExportError, match="lacks the outputs"):
        export.relative_differences(sound, {})


def test_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(tmp_path / "other.yaml", replace(SMALL, encoder=EncoderConfig(channels=24)))
    save_weights(tmp_path / "w.safetensors", a_network().state_dict(), {})
    arguments = [
        str(tmp_path / "w.safetensors"),
        str(tmp_path / "out"),
        "--model",
        str(tmp_path / "other.yaml"),
    ]
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
    assert main(["export", *arguments]) == 2
    assert "of another shape" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
