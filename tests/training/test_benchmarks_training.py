"""The benchmarks measure the same thing in all their methods; speed itself is reported, not tested."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
from torch import nn  # noqa: E402

from occbev.benchmarks import Options, Report, Timing  # noqa: E402
from occbev.inference.families.lift_splat import LiftSplatModel  # noqa: E402
from occbev_training.benchmarks import encoder, gpu, pooling, trainer  # noqa: E402
from occbev_training.benchmarks.measure import peak_bytes, speedup, waiting  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402


def test_ratios_compare_processor_time() -> None:
    assert speedup(Timing(8, 30, 9), Timing(2, 10, 3)) == 3
    assert speedup(Timing(8, 30, 9), Timing(2, 10, 3), "cuda") == 4
    assert waiting({"a": lambda: 5}, "cpu")["a"]() == 5


def test_peak_memory_is_that_of_what_is_held_together() -> None:
    megabyte = 1 << 20

    def two_then_one() -> torch.Tensor:
        first = torch.zeros(megabyte, dtype=torch.uint8)
        second = torch.zeros(megabyte, dtype=torch.uint8)
        del first, second
        return torch.zeros(megabyte, dtype=torch.uint8)

    assert 2 * megabyte <= peak_bytes(two_then_one) < 2.5 * megabyte


def test_both_poolings_and_their_gradients_are_equal() -> None:
    case = pooling.make_case(bins=8, channels=4)
    assert len(case.order) > 1000
    torch.testing.assert_close(pooling.pool_by_bag(case), pooling.pool_by_cumsum(case), rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    bag = pooling.forward_backward(pooling.pool_by_bag, case)
    torch.manual_seed(0)
    cumsum = pooling.forward_backward(pooling.pool_by_cumsum, case)
    for got, want in zip(bag(), cumsum(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_the_pooling_bench_reports_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    small = pooling.make_case(bins=4, channels=4)
    monkeypatch.setattr(pooling, "make_case", lambda device: small)
    result = pooling.run(Options(rounds=1, threads=1))
    keys = {"forward_vs_cumsum", "forward_backward_vs_cumsum", "peak_extra_vs_io"}
    assert set(result.ratios) == keys
    assert all(value > 0 for value in result.ratios.values())


def test_the_trainer_bench_reports_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = reduced(LiftSplatModel())
    monkeypatch.setattr(trainer, "LiftSplatModel", lambda: small)
    found = trainer.run(Options(rounds=1, threads=1))
    assert {"overhead_share", "data_wait_share", "pretrain_samples_per_s"} <= set(found.values)
    assert 0 <= found.values["data_wait_share"] < 1
    assert 0 < found.values["loader_cpu_s_per_sample"] < 1


def test_the_gpu_bench_runs_on_a_cpu_at_reduced_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small = reduced(LiftSplatModel())
    for module in (gpu, trainer):
        monkeypatch.setattr(module, "LiftSplatModel", lambda: small)
    for name in ("attention", "encoder"):  # which have tests of their own
        monkeypatch.setattr(
            getattr(gpu, name), "run", lambda options, n=name: Report(n, {"time_ms": 1.0}, {"ours": 2.0})
        )
    found = gpu.run(Options(rounds=1, threads=1))
    assert found.values["training"]["pretrain_samples_per_s"] > 0
    assert found.values["training"]["workers"] >= 1
    differences = found.values["bf16_difference"]
    assert set(differences) == {"occupancy_logits", "heatmap", "box"}
    assert all(1e-5 < difference < 0.5 for difference in differences.values())
    assert found.ratios == {"attention.ours": 2.0, "encoder.ours": 2.0}


def test_every_runtime_of_the_encoder_bench_agrees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    network = nn.Sequential(*layers).eval()
    images = torch.randn(2, 3, 32, 32)
    methods, differences, provider = encoder.methods_of(network, images, tmp_path, 1, compiled=False)
    assert provider in encoder.PROVIDERS.values()
    assert set(methods) == {
        "eager",
        "folded_channels_last",
        "onnxruntime_f32",
        "openvino_f32",
        "onnxruntime_int8",
        "openvino_int8",
    }
    exact = {name: value for name, value in differences.items() if "int8" not in name}
    assert max(exact.values()) < 1e-5
    assert max(differences.values()) < 0.1
