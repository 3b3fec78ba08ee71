"""Cameras find the weights that belong to them: by name, or by where they look."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from occbev.config import ConfigError
from occbev.inference.camera_order import CameraOrder
from occbev.inference.families import family_of, load_model
from occbev.rig import Camera, CameraRig

NUSCENES = {"FRONT_LEFT": 55, "FRONT": 0, "FRONT_RIGHT": -55, "BACK_LEFT": 110, "BACK": 180, "BACK_RIGHT": -110}
"""The product's order of the cameras, and where each looks."""


def camera(name: str, yaw_deg: float) -> Camera:
    yaw, pose = np.deg2rad(yaw_deg), np.eye(4)
    pose[:3, 0], pose[:3, 1] = (np.sin(yaw), -np.cos(yaw), 0), (0, 0, -1)
    pose[:3, 2], pose[:3, 3] = (np.cos(yaw), np.sin(yaw), 0), (0, 0, 1.5)
    return Camera(name, 96, 64, np.array([[60.0, 0, 48], [0, 60, 32], [0, 0, 1]]), pose)


@pytest.fixture(scope="module")
def order(repository: Path) -> CameraOrder:
    return load_model(repository / "config/models/bevformer_tiny.yaml").cameras


def test_published_networks_know_the_order_they_were_trained_with(repository: Path, order: CameraOrder) -> None:
    assert order.names == tuple(
        f"CAM_{n}" for n in ("FRONT", "FRONT_RIGHT", "FRONT_LEFT", "BACK", "BACK_LEFT", "BACK_RIGHT")
    )
    for name in ("bevformer_base", "bevformer_small_occ", "occ_bev_sweep2", "detr3d_r101"):
        assert load_model(repository / f"config/models/{name}.yaml").cameras == order


def test_names_decide_and_else_directions(order: CameraOrder) -> None:
    named = CameraRig(tuple(camera(f"CAM_{n}", yaw) for n, yaw in NUSCENES.items()))
    assert order.places(named).tolist() == [2, 0, 1, 4, 3, 5]
    others = CameraRig(tuple(camera(f"left_{i}", yaw + 9) for i, yaw in enumerate(NUSCENES.values())))
    assert order.places(others).tolist() == [2, 0, 1, 4, 3, 5]
    assert order.describe(named).startswith("by name: CAM_FRONT_LEFT as CAM_FRONT_LEFT, ")
    assert order.describe(others).startswith("by viewing direction: left_0 as CAM_FRONT_LEFT, ")


def test_fewer_cameras_take_their_places_and_none_twice(order: CameraOrder) -> None:
    four = CameraRig(tuple(camera(n, yaw) for n, yaw in (("a", 0), ("b", 90), ("c", -90), ("d", 170))))
    assert [order.names[p] for p in order.places(four)] == ["CAM_FRONT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT", "CAM_BACK"]
    alike = CameraRig(tuple(camera(n, yaw) for n, yaw in (("a", 1), ("b", 2), ("c", -2))))
    assert len(set(order.places(alike).tolist())) == 3
    seven = CameraRig(tuple(camera(f"c{i}", 50 * i) for i in range(7)))
    with pytest.raises(ConfigError, match="7 cameras, the network has weights for 6"):
        order.places(seven)


def test_an_order_of_another_rig_says_how_many_cameras_there_are(repository: Path) -> None:
    eight = CameraOrder(tuple(f"c{i}" for i in range(8)), tuple(45.0 * i for i in range(8)))
    models = repository / "config/models"
    assert load_model(models / "detr3d_r101.yaml").max_cameras == 6
    assert replace(load_model(models / "detr3d_r101.yaml"), cameras=eight).max_cameras == 8
    former = load_model(models / "bevformer_tiny.yaml")
    with pytest.raises(ConfigError, match=r"cameras\.names holds 8 cameras, bevformer\.cameras is 6"):
        replace(former, cameras=eight)
    assert replace(former, cameras=eight, bevformer=replace(former.bevformer, cameras=8)).max_cameras == 8


def test_without_an_order_cameras_keep_theirs() -> None:
    some = CameraRig((camera("b", 90), camera("a", 0)))
    assert CameraOrder().places(some).tolist() == [0, 1]
    assert CameraOrder().describe(some) == ""
    with pytest.raises(ConfigError, match="1 names and 2 directions"):
        CameraOrder(("a",), (0.0, 1.0))


@pytest.mark.parametrize("name", ["bevformer_tiny", "detr3d_r101"])
def test_reordering_the_rig_changes_nothing(repository: Path, name: str) -> None:
    """The network, with weights of its own for each camera, answers alike whatever order its cameras come in."""
    torch = pytest.importorskip("torch")
    from occbev_training.export.zoo import randomise_zero_init
    from occbev_training.models.build import build_model
    from occbev_training.models.families import make_graph, reduced

    model = reduced(load_model(repository / f"config/models/{name}.yaml"))
    torch.manual_seed(0)
    network = randomise_zero_init(build_model(model, "finetune")).eval()
    if hasattr(network.view_transform, "camera_embeds"):
        torch.nn.init.normal_(network.view_transform.camera_embeds, std=3.0)
    graph, family = make_graph(network), family_of(model)
    rig = CameraRig(tuple(camera(f"CAM_{n}", yaw) for n, yaw in NUSCENES.items()))
    images = torch.randn(6, 3, 64, 96)

    def answer(order: list[int], model=model) -> torch.Tensor:
        seen = CameraRig(tuple(rig.cameras[i] for i in order))
        tables = family.tables(model, seen, np.ones(6, bool), graph.form)
        arrays = {**tables, **family.first_state(model, 6)}
        if model.past_frames:
            from occbev.inference.families.record import Moment

            arrays |= family.motion(model, Moment(0, None, seen), None)
        inputs = {n: torch.from_numpy(np.asarray(a)) for n, a in arrays.items()}
        inputs |= {"images": images[order][None], "camera_valid": torch.ones(1, 6)}
        with torch.no_grad():
            return graph(**{n: inputs[n] for n in graph.inputs})[graph.outputs.index("class_logits")]

    given, other = list(range(6)), [4, 2, 0, 5, 3, 1]
    torch.testing.assert_close(answer(given), answer(other), atol=1e-4, rtol=1e-4)
    forgotten = replace(model, cameras=CameraOrder())
    assert (answer(given, forgotten) - answer(other, forgotten)).abs().max() > 1e-3
