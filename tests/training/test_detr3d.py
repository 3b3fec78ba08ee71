"""DETR3D and object queries: published numbers, refinement, cameras that are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from occbev.inference.families.queries import QueryHeadConfig  # noqa: E402
from occbev_training.models.heads.query_head import QueryHead, encode_boxes, inverse_sigmoid  # noqa: E402
from occbev_training.models.queries.detr3d import CameraSampling, CameraScene  # noqa: E402

EXTENT = ((-8.0, -6.0, -2.0), (8.0, 6.0, 2.0))


def normalise_images(matrices: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Turn matrices to pixels into matrices to 0..1."""
    scale = torch.diag(torch.tensor([1 / width, 1 / height, 1, 1], dtype=torch.float64))
    return (scale @ matrices.double()).float()


def test_published_cross_attention(golden_folder: Path) -> None:
    with np.load(golden_folder / "detr3d_h_cross_attn.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    extent = tuple(tuple(arrays["pc_range"][i : i + 3].tolist()) for i in (0, 3))
    attention = CameraSampling(32, 6, 2, extent)
    attention.load_state_dict({k[2:]: v for k, v in arrays.items() if k.startswith("w.")})
    height, width = arrays["img_shape"].tolist()
    scene = CameraScene(
        [arrays[f"feat{i}"][0].float() for i in (0, 1)],
        normalise_images(arrays["lidar2img"], width, height)[None],
        torch.ones(1, 6),
        torch.arange(6)[None],
    )
    query, position = (arrays[name].transpose(0, 1) for name in ("query", "query_pos"))
    with torch.no_grad():
        got = attention(query, position, arrays["reference_points"], scene)
    torch.testing.assert_close(got.transpose(0, 1), arrays["output"], atol=1e-4, rtol=1e-4)


class Recorder(torch.nn.Module):
    """A cross-attention that reads nothing and remembers where it was asked to read."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[torch.Tensor] = []

    def forward(self, query, position, reference, scene):
        self.references.append(reference)
        return query


def head() -> QueryHead:
    torch.manual_seed(0)
    config = QueryHeadConfig(queries=5, layers=3, heads=2, hidden=16)
    return QueryHead(config, 8, 4, EXTENT, Recorder).eval()


def test_each_layer_starts_where_the_one_before_said() -> None:
    decoder = head()
    logits, codes = decoder([None] * 2)
    assert logits.shape == (3, 2, 5, 4)
    assert codes.shape == (3, 2, 5, 10)
    lo, hi = torch.tensor(EXTENT)
    for layer in (1, 2):
        said = (codes[layer - 1][..., [0, 1, 4]] - lo) / (hi - lo)
        torch.testing.assert_close(decoder.layers[layer].cross.references[0], said)
    centres = codes[..., [0, 1, 4]]
    assert (centres >= lo).all()
    assert (centres <= hi).all()


def test_only_the_first_reference_is_learned() -> None:
    decoder = head()
    _, codes = decoder([None])
    codes[2].sum().backward()
    first, *rest = (layer.cross.references[0] for layer in decoder.layers)
    assert first.requires_grad
    assert not any(reference.requires_grad for reference in rest)
    assert not decoder.reference_points.weight.grad.any()


def test_a_box_code_is_the_published_one() -> None:
    box = torch.tensor([[1.0, 2, 3, 4.5, 1.9, 1.6, 0.3, 5, 6]])
    x, y, log_w, log_l, z, log_h, sin, cos, vx, vy = encode_boxes(box)[0].tolist()
    assert (x, y, z, vx, vy) == (1, 2, 3, 5, 6)
    assert np.exp([log_l, log_w, log_h]) == pytest.approx([4.5, 1.9, 1.6])
    assert np.arctan2(sin, cos) == pytest.approx(-0.3 - np.pi / 2)


def test_the_logit_is_bounded() -> None:
    x = torch.tensor([-1.0, 0, 0.3, 1, 2])
    back = inverse_sigmoid(x).sigmoid()
    torch.testing.assert_close(back, x.clamp(0, 1), atol=2e-5, rtol=0)


def test_a_missing_camera_is_not_read() -> None:
    torch.manual_seed(0)
    attention = CameraSampling(8, 2, 1, EXTENT)
    torch.nn.init.normal_(attention.attention_weights.weight)
    forward = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    centred = torch.tensor([[1.0, 0, 0.5, 0], [0, 1, 0.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    matrices = (centred @ forward).expand(1, 2, 4, 4)
    maps = torch.randn(2, 8, 4, 4)
    query, position = torch.randn(2, 1, 6, 8)
    reference = torch.tensor([0.9, 0.5, 0.5]).expand(1, 6, 3)  # ahead of both
    scenes = [
        CameraScene([maps * scale], matrices, torch.tensor([[1.0, valid]]), torch.tensor([[0, 1]]))
        for scale, valid in ((1, 0.0), (torch.tensor([1.0, 0]).view(2, 1, 1, 1), 1.0), (1, 1.0))
    ]
    missing, dark, both = (attention(query, position, reference, scene) for scene in scenes)
    torch.testing.assert_close(missing, dark)
    assert (missing - both).abs().max() > 1e-3
