"""Occ-BEV for every view transform: one call reconstructs occupancy, and parts are handed on by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from occbev.config import ModelConfig  # noqa: E402
from occbev.inference.example_inputs import ring_rig  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import transfer  # noqa: E402
from occbev_training.models.families import make_geometry, reduced  # noqa: E402

CAMERAS = 3
# configuration -> parts that fine-tuning takes, and those that begin anew
HANDED_ON = {
    "occbev-tiny": (
        {"image_encoder", "view_transform", "bev_encoder", "occupancy_head"},
        {"detection_head", "occupancy_head"},
    ),
    "bevdet_r50": ({"image_encoder", "view_transform", "bev_encoder"}, {"detection_head"}),
    "bevdepth4d_r50": ({"image_encoder", "view_transform", "bev_encoder", "temporal"}, {"detection_head"}),
    "bevdepth_r50_megvii": ({"image_encoder", "view_transform", "bev_encoder"}, {"detection_head"}),
    "bevdet_occ_r50": ({"image_encoder", "view_transform", "bev_encoder", "occupancy_head"}, set()),
    "flashocc_r50_m1": ({"image_encoder", "view_transform", "bev_encoder"}, {"occupancy_head"}),
    "bevformer_base": ({"image_encoder", "view_transform"}, {"detection_head"}),
    "bevformer_base_occ": ({"image_encoder", "view_transform", "occupancy_head"}, set()),
    "detr3d_r101": ({"image_encoder"}, {"detection_head"}),
}


def model_of(repository: Path, name: str) -> ModelConfig:
    return reduced(load_model(repository / "config/models" / f"{name}.yaml"))


def inputs(model: ModelConfig, samples: int = 1):
    rig, image = ring_rig(model, CAMERAS), model.image
    intrinsic = np.stack([[c.intrinsic for c in rig.cameras]] * samples)
    cam2ego = np.stack([[c.cam2ego for c in rig.cameras]] * samples)
    valid = torch.ones(samples, CAMERAS)
    generator = torch.Generator().manual_seed(0)
    shape = (samples, CAMERAS, 3, image.height, image.width)
    images = torch.randn(shape, generator=generator)
    return images, valid, make_geometry(model, intrinsic, cam2ego, valid).to("cpu")


@pytest.mark.parametrize("name", HANDED_ON)
def test_every_family_reconstructs_and_hands_its_parts_on(repository: Path, name: str) -> None:
    model = model_of(repository, name)
    torch.manual_seed(0)
    network = build_model(model, "pretrain").train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # one value per channel at this size cannot be normalised by a batch
    output = network(*inputs(model, 2))
    logits = output.answers["reconstruction_logits"]
    assert logits.shape == (2, 2, *model.grid.shape[::-1])
    logits.square().mean().backward()
    silent = {
        part
        for part in ("image_encoder", "view_transform", "occupancy_decoder")
        if not any(p.grad is not None and p.grad.any() for p in getattr(network, part).parameters())
    }
    assert silent == set()  # what is reconstructed teaches every part

    target = build_model(model, "finetune")
    before = {n: v.clone() for n, v in target.state_dict().items()}
    report = transfer(network.state_dict(), target)
    carried, new = HANDED_ON[name]
    assert {n.split(".")[0] for n in report.carried} == carried
    assert {n.split(".")[0] for n in (*report.new, *report.mismatched)} == new | (
        {"occupancy_head"} if report.mismatched else set()
    )
    assert {n.split(".")[-2] for n in report.mismatched} <= {"2"}  # its last layer
    assert {n.split(".")[0] for n in report.unused} <= {"occupancy_head", "view_transform"}
    everything = (*report.carried, *report.new, *report.mismatched)
    assert sorted(everything) == sorted(before)
    after, source = target.state_dict(), network.state_dict()
    for weight in report.carried:
        origin = weight.replace("occupancy_head", "occupancy_decoder")
        assert torch.equal(after[weight], source[origin])
    for weight in (*report.new, *report.mismatched):
        assert torch.equal(after[weight], before[weight])


def test_what_a_missing_camera_shows_changes_no_reconstruction(repository: Path) -> None:
    for name in ("occbev-tiny", "bevformer_tiny", "detr3d_r101"):
        model = model_of(repository, name)
        torch.manual_seed(0)
        network = build_model(model, "pretrain").eval()
        images, valid, _ = inputs(model)
        valid[0, 1] = 0
        rig = ring_rig(model, CAMERAS)
        geometry = make_geometry(model, [[c.intrinsic for c in rig.cameras]], [[c.cam2ego for c in rig.cameras]], valid)
        other = images.clone()
        other[0, 1] = 5
        with torch.no_grad():
            first, second = (network(i, valid, geometry).answers["reconstruction_logits"] for i in (images, other))
        torch.testing.assert_close(first, second)
