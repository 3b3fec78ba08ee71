"""Every family as an exported graph: equal to torch, plain operators, any rig, explicit state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from occbev.config import ModelConfig, save_config  # noqa: E402
from occbev.geometry import make_transform, rotation_from_yaw  # noqa: E402
from occbev.inference.example_inputs import ring_rig  # noqa: E402
from occbev.inference.families import family_of, load_model  # noqa: E402
from occbev.inference.families.record import Moment  # noqa: E402
from occbev.inference.model_package import ModelPackage  # noqa: E402
from occbev.inference.reference_points import warp_table  # noqa: E402
from occbev.rig import Camera, CameraRig  # noqa: E402
from occbev_training.cli import main  # noqa: E402
from occbev_training.export.package import (  # noqa: E402
    ExportError,
    check_graphs,
    example_inputs,
    relative_differences,
    run_onnx,
    run_torch,
    write_onnx,
)
from occbev_training.export.zoo import randomise_zero_init  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.models.families import make_geometry, make_graph, reduced  # noqa: E402
from occbev_training.models.graphs import GraphError  # noqa: E402
from occbev_training.models.heads.record import heads_of, take_last_layers  # noqa: E402
from occbev_training.models.lift_splat.stereo import Matching  # noqa: E402
from occbev_training.models.lift_splat.temporal import warp_bev  # noqa: E402
from occbev_training.models.network import Frame, NetworkOutput  # noqa: E402
from occbev_training.models.queries.bevformer import Motion  # noqa: E402

CLOSE = {"rtol": 2e-4, "atol": 2e-5}
BOXES, ANSWERS, VOXELS, STATE = (
    {"heatmap", "box"},
    {"class_logits", "box_codes"},
    {"occupancy_logits"},
    {"state_out_bev"},
)
EXPORTED = {
    "occbev-small": BOXES | VOXELS | STATE,
    "bevdepth4d_r50": BOXES | STATE,
    "bevdepth_r50_first": BOXES,
    "bevdepth_r50_megvii": BOXES,
    "bevdepth4d_r50_megvii": BOXES | STATE,
    "bevdet_occ_r50": VOXELS,
    "bevdet_occ_r50_4d_stereo": VOXELS | STATE | {"state_out_match"},
    "flashocc_r50_m0": VOXELS,
    "bevformer_tiny": ANSWERS | STATE,
    "bevformer_small_occ": VOXELS | STATE,
    "detr3d_r101": ANSWERS,
}


def model_of(repository: Path, name: str) -> ModelConfig:
    return reduced(load_model(repository / "config/models" / f"{name}.yaml"))


def network_of(model: ModelConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise_zero_init(build_model(model, "finetune")).eval()


def other_rig(model: ModelConfig, cameras: int) -> CameraRig:
    """Cameras with other lenses, places and directions than those of `ring_rig`."""
    changed = []
    for index, camera in enumerate(ring_rig(model, cameras).cameras):
        intrinsic = camera.intrinsic * np.array([[1.3], [1.1], [1]])
        move = make_transform(rotation_from_yaw(0.3 + 0.1 * index), (0.4, -0.2, 0.3))
        changed.append(Camera(camera.name, camera.width, camera.height, intrinsic, move @ camera.cam2ego))
    return CameraRig(tuple(changed))


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request, repository: Path, tmp_path_factory) -> Iterator[tuple[str, ModelConfig, torch.nn.Module, Path]]:
    model = model_of(repository, request.param)
    network, path = network_of(model), tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(make_graph(network), model, path)
    return request.param, model, network, path


def test_graphs_equal_torch_on_rigs_of_any_size(exported) -> None:
    name, model, network, path = exported
    differences = check_graphs(network, model, path.parent, cameras=(3, 2)).onnxruntime
    assert set(differences) == EXPORTED[name]
    assert max(differences.values()) <= 1e-4


def test_a_second_rig_needs_no_other_graph(exported) -> None:
    """The graph that was exported with one rig says of another what the trained network says of it."""
    _, model, network, path = exported
    graph, outputs, errors = make_graph(network), [], []
    for rig in (ring_rig(model, 3), other_rig(model, 3)):
        inputs = example_inputs(model, graph, 3, seed=0, rig=rig)
        got = run_onnx(path, inputs)
        want = trained(network, model, rig, inputs)
        errors.append({k: relative_differences({k: v}, got)[k] for k, v in want.items()})
        outputs.append(got)
    first, second = outputs
    for key in want:
        error = max(each[key] for each in errors)
        assert error <= 1e-4, key
        # Random weights hardly look at the scene, but always more than they err.
        changed = np.abs(first[key] - second[key]).max() / np.abs(first[key]).max()
        assert changed > 5 * error, (key, changed, error)


def trained(
    network: torch.nn.Module, model: ModelConfig, rig: CameraRig, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Outputs of the network as training runs it, with the geometry of training."""
    valid = torch.from_numpy(inputs["camera_valid"])
    geometry = make_geometry(model, [[c.intrinsic for c in rig.cameras]], [[c.cam2ego for c in rig.cameras]], valid)
    if model.family == "bevformer":  # a vehicle that stands where the example does
        geometry = replace(geometry, can_bus=tensor(inputs, "can_bus"))
    with torch.no_grad():
        output: NetworkOutput = network(torch.from_numpy(inputs["images"]), valid, geometry)
    answers = take_last_layers(heads_of(network), output.answers)
    return {name: value.numpy() for name, value in answers.items()}


# --- state -----------------------------------------------------------------------------------


def poses() -> tuple[np.ndarray, np.ndarray]:
    before = make_transform(rotation_from_yaw(0.3), (100.0, 50.0, 0.0))
    return before, before @ make_transform(rotation_from_yaw(0.1), (1.5, -0.2, 0.0))


def test_two_steps_of_a_stereo_graph_are_two_frames_of_the_network(repository: Path) -> None:
    model = model_of(repository, "bevdet_occ_r50_4d_stereo")
    network = network_of(model).double()  # random weights let the match say little: rounding must not hide it
    graph, rig, valid = make_graph(network), ring_rig(model, 2), torch.tensor([[1.0, 0.0]])
    (before, now), family = poses(), family_of(model)
    earlier, later = Moment(0, before, rig), Moment(500_000_000, now, rig)
    first, second = (example_inputs(model, graph, 2, seed) | {"camera_valid": valid.numpy()} for seed in (0, 1))
    first |= family.motion(model, earlier, None)
    second |= family.motion(model, later, earlier)
    first, second = (
        {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in inputs.items()}
        for inputs in (first, second)
    )
    state = run_torch(graph, first)
    carried = {name.replace("out", "in"): state[name] for name in ("state_out_bev", "state_out_match")}
    got = run_torch(graph, {**second, **carried})["occupancy_logits"]
    geometry = make_geometry(model, rig.intrinsics[None], rig.cam2egos[None], valid)
    geometry = replace(geometry, weight=geometry.weight.double(), ray=geometry.ray.double())
    valid = valid.double()
    matching = Matching(torch.ones(1).double(), tensor(second, "table_matching")[None])
    with torch.no_grad():
        past = Frame(tensor(first, "images"), valid, geometry)
        key = Frame(tensor(second, "images"), valid, geometry, matching)
        bev, _ = network.frame_bev(key, network.matching_map(past))
        warp = torch.from_numpy(warp_table(np.linalg.inv(before) @ now, model.bev, model.lift.reference_quirks))
        moved = warp_bev(network.frame_bev(past)[0], warp[None].double())
        want = network.run_heads(network.temporal(bev, [moved]))["occupancy_logits"]
        alone = network.run_heads(network.temporal(network.frame_bev(key)[0], [moved]))["occupancy_logits"]
    error = (torch.from_numpy(got) - want).abs().max()
    assert error < 1e-3 * (alone - want).abs().max()  # it matches with the frame before


@pytest.mark.parametrize("name", ["occbev-small", "bevdet4d_r50", "bevformer_tiny"])
def test_two_steps_of_a_graph_are_two_frames_of_the_network(repository: Path, name: str) -> None:
    model = model_of(repository, name)
    network = network_of(model)
    for head in (m for m in network.detection_head.modules() if getattr(m, "out_channels", 0) == 10):
        torch.nn.init.normal_(head.weight)  # random heads say nearly the same of any BEV
    graph, rig = make_graph(network), ring_rig(model, 2)
    before, now = poses()
    first, second = (example_inputs(model, graph, 2, seed) for seed in (0, 1))
    earlier, later = Moment(0, before, rig), Moment(500_000_000, now, rig)
    first |= family_of(model).motion(model, earlier, None)
    second |= family_of(model).motion(model, later, earlier)
    state = run_torch(graph, first)["state_out_bev"]
    got = run_torch(graph, {**second, "state_in_bev": state})
    valid = torch.ones(1, 2)
    geometry = make_geometry(model, [[c.intrinsic for c in rig.cameras]], [[c.cam2ego for c in rig.cameras]], valid)
    images = [torch.from_numpy(f["images"]) for f in (first, second)]
    with torch.no_grad():
        if model.family == "bevformer":
            bev = network(images[0], valid, replace(geometry, can_bus=tensor(first, "can_bus"))).bev
            motion = Motion(bev, *(tensor(second, n) for n in ("state_known", "table_align", "table_shift")))
            views = replace(geometry, can_bus=tensor(second, "can_bus"), motion=motion)
            want = network(images[1], valid, views)
            pairs = {"class_logits": want.answers["class_logits"][-1], "box_codes": want.answers["box_codes"][-1]}
        else:
            key2past = np.linalg.inv(before) @ now
            warp = torch.from_numpy(warp_table(key2past, model.bev, model.lift.reference_quirks))
            past, key = (network.frame_bev(Frame(i, valid, geometry))[0] for i in images)
            want = network.run_heads(network.temporal(key, [warp_bev(past, warp[None])]))
            pairs = {name: want[name] for name in ("heatmap", "box")}
            alone = network(images[1], valid, geometry).answers["heatmap"]
            error = (torch.from_numpy(got["heatmap"]) - want["heatmap"]).abs().max()
            assert error < 0.05 * (alone - want["heatmap"]).abs().max()  # it is the past it shows
    for key, value in pairs.items():
        torch.testing.assert_close(torch.from_numpy(got[key]), value, **CLOSE)


def tensor(inputs: dict[str, np.ndarray], name: str) -> torch.Tensor:
    return torch.from_numpy(inputs[name])


def test_a_first_frame_ignores_whatever_the_state_holds(repository: Path) -> None:
    for name in ("occbev-small", "bevformer_tiny", "bevdet_occ_r50_4d_stereo"):
        model = model_of(repository, name)
        graph = make_graph(network_of(model))
        inputs = example_inputs(model, graph, 2, seed=0)
        other = {n: array + 3 if n.startswith("state_in") else array for n, array in inputs.items()}
        first, second = (run_torch(graph, i) for i in (inputs, other))
        for key in first:
            np.testing.assert_allclose(first[key], second[key], rtol=1e-4, atol=1e-5)


# --- packages --------------------------------------------------------------------------------


def test_the_command_makes_a_package_of_weights(repository: Path, tmp_path: Path) -> None:
    model = model_of(repository, "bevdet_r50")
    save_config(tmp_path / "model.yaml", model)
    save_weights(tmp_path / "weights.safetensors", network_of(model).state_dict(), {})
    arguments = [str(tmp_path / n) for n in ("weights.safetensors", "package")]
    model_file = ["--model", str(tmp_path / "model.yaml")]
    assert main(["export", *arguments, *model_file, "--cameras", "2"]) == 0
    package = ModelPackage.load(tmp_path / "package")
    assert set(package.files) == {"weights.safetensors", "model.onnx", "README.md"}
    assert {"Conv", "Gather"} <= {o.split(":")[0] for o in package.provenance["operators"].split()}
    difference = package.metrics["export_difference"]
    assert set(difference) == {"torch", "onnxruntime", "openvino"}  # which reads the ONNX graph
    assert set(difference["onnxruntime"]) == set(difference["openvino"]) == BOXES
    (tmp_path / "again").mkdir()
    for name in ("model.xml", "model.bin"):  # of another network, exported there before
        (tmp_path / "again" / name).write_text("stale")
    again = [str(tmp_path / "package"), str(tmp_path / "again"), "--cameras", "2"]
    assert main(["export", *again]) == 0  # a package has its own configuration and origin
    second = ModelPackage.load(tmp_path / "again")
    assert second.model == model
    assert set(second.files) == set(package.files)


def test_what_is_no_network_of_a_family_has_no_graph(repository: Path) -> None:
    with pytest.raises(GraphError, match="Linear"):
        make_graph(torch.nn.Linear(1, 1))
    with pytest.raises(GraphError, match="no 'factored' graph"):
        make_graph(network_of(model_of(repository, "bevdet_r50")), "factored")


def test_a_graph_with_a_loop_is_refused(tmp_path: Path) -> None:
    from occbev_training.export.package import require_plain_operators

    class Uneven(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(0) + math.pi

    program = torch.onnx.export(Uneven(), (torch.ones(3),), dynamo=True, opset_version=18, verbose=False)
    program.save(str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match=r"m\.onnx: holds \['CumSum'\]"):
        require_plain_operators(tmp_path / "m.onnx")
