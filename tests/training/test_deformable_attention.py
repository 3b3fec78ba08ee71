"""Deformable attention: published numbers, both forms, gradients, places outside the maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from occbev_training.models.queries import deformable_attention as da  # noqa: E402

FORMS = (da.sample_by_grid, da.sample_by_bags)
LEVELS = da.Levels(((3, 5), (2, 2)))


def golden(golden_folder: Path, name: str) -> dict[str, torch.Tensor]:
    with np.load(golden_folder / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def operands(seed: int = 0, spread: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(2, 19, 2, 4, generator=generator)
    places = 0.5 + spread * (torch.rand(2, 7, 2, 2, 3, 2, generator=generator) - 0.5)
    weights = torch.rand(2, 7, 2, 2, 3, generator=generator)
    return [v.requires_grad_() for v in (value, places, weights)]


@pytest.mark.parametrize("form", FORMS)
def test_published_outputs_and_gradients(golden_folder: Path, form) -> None:
    arrays = golden(golden_folder, "bevformer_a_msda.npz")
    levels = da.Levels(tuple(map(tuple, arrays["spatial_shapes"].tolist())))
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [arrays[name].clone().requires_grad_() for name in names]
    output = form(inputs[0], levels, *inputs[1:])
    torch.testing.assert_close(output, arrays["output"], atol=1e-4, rtol=1e-4)
    output.backward(arrays["grad_output"])
    for name, tensor in zip(names, inputs, strict=True):
        torch.testing.assert_close(tensor.grad, arrays[f"grad_{name}"], atol=1e-4, rtol=1e-4)


def test_published_decoder_attention(golden_folder: Path) -> None:
    arrays = golden(golden_folder, "bevformer_a_msda.npz")
    attention = da.DeformableAttention(32, 8, 1, 4)
    prefix = "w.dec."
    attention.load_state_dict({k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)})
    query, position, value = (arrays[f"dec.{name}"].transpose(0, 1) for name in ("query", "query_pos", "value"))
    levels = da.Levels(tuple(map(tuple, arrays["dec.spatial_shapes"].tolist())))
    got = attention(query, position, value, arrays["dec.reference_points"][:, :, 0], levels)
    torch.testing.assert_close(got.transpose(0, 1), arrays["dec.output"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spread", [0.9, 3.0])
def test_both_forms_agree(spread: float, monkeypatch) -> None:
    monkeypatch.setattr(da, "CHUNK_ENTRIES", 100)  # several chunks
    results = []
    for form in FORMS:
        value, places, weights = operands(1, spread)
        output = form(value, LEVELS, places, weights)
        output.square().sum().backward()
        results.append([output, value.grad, places.grad, weights.grad])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_differences() -> None:
    value, places, weights = (v.detach().double().requires_grad_() for v in operands(2, 0.8))

    def read(*inputs: torch.Tensor) -> torch.Tensor:
        return da.sample_map(*inputs, LEVELS)

    assert torch.autograd.gradcheck(read, (value[0], places[0], weights[0]))


def test_a_place_at_a_cell_centre_reads_that_cell_and_far_ones_nothing() -> None:
    value = torch.arange(12.0).view(1, 12, 1, 1)
    levels = da.Levels(((3, 4),))
    centre = torch.tensor([2.5 / 4, 1.5 / 3])  # column 2, row 1
    places = torch.stack([centre, torch.tensor([1e9, -1e9]), torch.tensor([0.5, 2.0])])
    for form in FORMS:
        got = form(value, levels, places.view(1, 3, 1, 1, 1, 2), torch.ones(1, 3, 1, 1, 1))
        torch.testing.assert_close(got.flatten(), torch.tensor([6.0, 0, 0]))


def test_it_begins_with_one_direction_per_head_and_equal_trust() -> None:
    reading = da.OffsetAndWeight(8, heads=4, levels=2, points=3)
    offsets, weights = reading(torch.randn(5, 8))
    assert offsets.shape == (5, 4, 1, 2, 3, 2)
    torch.testing.assert_close(weights, torch.full((5, 4, 1, 2, 3), 1 / 6))
    torch.testing.assert_close(offsets[0, 1, 0, 0], torch.tensor([[0.0, 1], [0, 2], [0, 3]]))


@pytest.mark.parametrize("shape", [(5, 128, 24, 8), (40, 8, 500, 32), (3, 4, 1, 8), (1, 1, 1, 1)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_gradients_of_weights_are_products_however_often_a_corner_comes(shape, kind) -> None:
    bags, size, rows, channels = shape
    torch.manual_seed(0)
    corner = torch.randint(0, rows, (bags, size), dtype=torch.int32)
    table = torch.randn(rows, channels, dtype=kind, requires_grad=True)
    gradient = torch.randn(bags, channels, dtype=kind)
    want = (table[corner.long()] * gradient[:, None]).sum(-1)
    torch.testing.assert_close(da._entry_gradient(gradient, corner, table), want)
