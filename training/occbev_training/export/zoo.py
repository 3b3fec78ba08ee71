"""The networks in config/models: what is published of each, and whether it converts and exports."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from occbev.config import ModelConfig
from occbev_training.export.package import check_graphs, write_onnx
from occbev_training.models.build import build_model
from occbev_training.models.families import make_graph, reduced
from occbev_training.models.renaming import load_reference

REACH = 2.0
"""Cells that random sampling offsets reach, and the spread of random attention logits, whatever the width."""


def randomise_zero_init(network: nn.Module) -> nn.Module:
    """Give weights that are initialised with zero random values, so that every part contributes as after training.

    Deformable offsets and attention weights start at zero, and with fresh norms deep random nets give nearly constant outputs.
    """
    for name, weight in network.named_parameters():
        if any(part in name for part in ("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(weight, std=REACH / math.sqrt(weight.shape[1]))
        elif "conv_offset.weight" in name:
            nn.init.normal_(weight, std=0.02)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


# --- what is published -----------------------------------------------------------------------

_LIFT = ("lss_geometry", "lss_bev_pool")
_DEPTH = (*_LIFT, "bevdepth_gt")
_VOXELS = (*_LIFT, "occ3d_miou")
_FORMER = ("bevformer_a_msda", "bevformer_b_sca", "bevformer_c_tsa", "bevformer_g_focal")
_EGO = (*_FORMER, "bevformer_b2_projection_ego", "bevformer_f_occ_decoder")


@dataclass(frozen=True)
class ReferenceNetwork:
    """What is known of a published network.

    table: name of its key table. fixtures: arrays that its parts are held to by the tests.
    score: as published on nuScenes val, "" if none is known. stage: of the published weights.
    """

    table: str = ""
    fixtures: tuple[str, ...] = ()
    score: str = ""
    stage: str = "finetune"


REFERENCE_NETWORKS: Mapping[str, ReferenceNetwork] = {
    "occbev-tiny": ReferenceNetwork(),
    "occbev-small": ReferenceNetwork(),
    "occbev-base": ReferenceNetwork(),
    "occ_bev_sweep2": ReferenceNetwork("occ_bev_sweep2", _EGO, "", "pretrain"),
    "bevformer_tiny": ReferenceNetwork("bevformer_tiny", _FORMER, "NDS 35.4, mAP 25.2"),
    "bevformer_small": ReferenceNetwork("bevformer_small", _FORMER, "NDS 47.9, mAP 37.0"),
    "bevformer_base": ReferenceNetwork("bevformer_base", _FORMER, "NDS 51.7, mAP 41.6; with Occ-BEV 53.4, 43.8"),
    "bevformer_base_occ": ReferenceNetwork("bevformer_base_occ", (*_EGO, "occ3d_miou"), "mIoU 23.67"),
    "bevformer_small_occ": ReferenceNetwork("", (*_EGO, "occ3d_miou")),
    "detr3d_r101": ReferenceNetwork("detr3d_r101", ("detr3d_h_cross_attn", "bevformer_g_focal"), "NDS 42.2, mAP 34.7"),
    "bevdet_r50": ReferenceNetwork("bevdet-r50", _LIFT, "NDS 35.0, mAP 28.3"),
    "bevdet4d_r50": ReferenceNetwork("bevdet4d-r50", _LIFT, "NDS 44.7, mAP 31.4 (CBGS)"),
    "bevdepth4d_r50": ReferenceNetwork("bevdepth4d-r50-bevdet-dev3", _DEPTH, "NDS 48.3, mAP 36.1 (CBGS)"),
    "bevdepth_r50_first": ReferenceNetwork("bevdepth-r50-bevdet-master", _DEPTH, "NDS 40.6, mAP 33.3"),
    "bevdepth_r50_megvii": ReferenceNetwork("bevdepth-r50-megvii", _DEPTH),
    "bevdepth4d_r50_megvii": ReferenceNetwork("bevdepth-r50-megvii-2key-da", _DEPTH, "NDS 48.05, mAP 34.84 (CBGS)"),
    "bevdet_occ_r50": ReferenceNetwork("bevdet-occ-r50", _VOXELS, "mIoU 31.60"),
    "bevdet_occ_r50_4d_stereo": ReferenceNetwork("bevdet-occ-r50-4d-stereo", _VOXELS, "mIoU 36.1"),
    "flashocc_r50_m0": ReferenceNetwork("flashocc-r50-m0", _VOXELS, "mIoU 31.95"),
    "flashocc_r50_m1": ReferenceNetwork("flashocc-r50", _VOXELS, "mIoU 32.08"),
}
"""Configuration in config/models -> what is published of it."""


@dataclass(frozen=True)
class FamilyRow:
    """One network, as measured by `measure`.

    parameters: in millions. keys: weights of the published table that found their place, out of all, or None.
    parity: largest difference of ONNX Runtime from torch relative to an output's largest value; None if it was not
        asked for. operators: of the ONNX graph.
    """

    name: str
    family: str
    parameters: float
    keys: tuple[int, int] | None
    parity: float | None
    operators: tuple[str, ...]

    def cells(self) -> list[str]:
        """The row of the README's table; scores of our own weights stand in another table there."""
        published = REFERENCE_NETWORKS.get(self.name, ReferenceNetwork())
        return [
            f"`{self.name}`",
            self.family,
            f"{self.parameters:.2f}",
            "-" if self.keys is None else f"{self.keys[0]} of {self.keys[1]}",
            " ".join(published.fixtures) or "-",
            "not measured" if self.parity is None else f"{self.parity:.0e}",
            published.score or "-",
            "see above" if self.name == SCORED else "-",
        ]


SCORED = "occbev-tiny"
"""The network whose weights are shipped, and so scored."""

HEADER = (
    "model",
    "view transform",
    "M parameters",
    "keys converted",
    "golden fixtures",
    "ONNX against torch",
    "published, nuScenes val",
    "measured here",
)


def measure(
    name: str, model: ModelConfig, golden: Path | None, full_size: bool = False, export: bool = True
) -> FamilyRow:
    """Build a network, map its published keys and, with `export`, write and check its ONNX graph.

    golden: folder of the key tables. full_size: export as configured, not `reduced`, which takes minutes and memory;
        it is checked on six cameras, reduced graphs on six and five.
    Raises: ExportError if the graph differs from torch or holds an operator that it must not.
    """
    published = REFERENCE_NETWORKS.get(name, ReferenceNetwork())
    with torch.device("meta"):
        network = build_model(model, published.stage)
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    keys = None
    if published.table and golden is not None:
        keys = count_converted_keys(network, golden / f"{published.table}_state_dict.json")
    parity: float | None = None
    operators: tuple[str, ...] = ()
    if export:
        exported, cameras = (model, (6,)) if full_size else (reduced(model), (6, 5))
        parity, operators = export_random(exported, cameras, published.stage)
    return FamilyRow(name, model.family, parameters, keys, parity, operators)


def count_converted_keys(network: nn.Module, table: Path) -> tuple[int, int]:
    """Return how many weights of a published table have their place in a network on the meta device, and all."""
    shapes = json.loads(table.read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    report = load_reference(network, state, network.reference_names)  # type: ignore[arg-type]
    return len(report.converted), len(shapes)


def export_random(model: ModelConfig, cameras: Sequence[int], stage: str) -> tuple[float, tuple[str, ...]]:
    """Export a network with random weights; returns its parity on rigs of these sizes and the graph's operators."""
    torch.manual_seed(0)
    network = randomise_zero_init(build_model(model, stage)).eval()
    with tempfile.TemporaryDirectory() as folder:
        operators = write_onnx(make_graph(network), model, Path(folder) / "model.onnx")
        parity = check_graphs(network, model, Path(folder), cameras=cameras)
    return max(parity.onnxruntime.values()), tuple(sorted(operators))
