"""The attention benchmark: its baseline is the same mathematics, and its report has the promised keys."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from occbev_training.benchmarks import attention as bench  # noqa: E402
from occbev_training.models.queries.deformable_attention import Levels  # noqa: E402


def test_baseline_and_report(monkeypatch) -> None:
    monkeypatch.setattr(bench, "LEVELS", Levels(((6, 10), (3, 5), (2, 3), (1, 2))))
    case = bench.make_case(24)
    assert case.hits.count.max() > 1  # some queries are seen by two cameras
    torch.testing.assert_close(case.ours(), case.padded(), atol=1e-4, rtol=1e-4)
    report = bench.measure(1, case, bench.make_case(6)).as_record()
    assert set(report["ratios"]) == {"forward_vs_padded", "forward_backward_vs_padded", "peak_memory_vs_padded"}
    assert report["values"]["queries"] == 24 * 24
