"""Published names: both directions, what a report says, and what is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from occbev_training.models.renaming import (  # noqa: E402
    load_reference,
    reference_names,
    to_reference,
)

RULES = ((r"^0\.", "stem."), (r"^1\.(\d)\.", r"head.\1.fc."))


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2)))


def test_weights_go_out_and_come_back() -> None:
    torch.manual_seed(0)
    source, target = small(), small()
    published = to_reference(source.state_dict(), RULES)
    assert set(published) == {"stem.weight", "stem.bias", "head.0.fc.weight", "head.0.fc.bias"}
    report = load_reference(target, published, RULES)
    assert report.complete
    assert len(report.converted) == 4
    x = torch.randn(5, 3)
    torch.testing.assert_close(target(x), source(x))


def test_a_report_names_what_does_not_fit_and_nothing_is_loaded() -> None:
    network = small()
    before = network[0].weight.clone()
    state = to_reference(small().state_dict(), RULES)
    del state["stem.bias"]
    state["extra"] = torch.zeros(1)
    state["head.0.fc.weight"] = torch.zeros(2, 5)
    report = load_reference(network, state, RULES)
    assert not report.complete
    assert (report.dropped, report.missing, report.mismatched) == (
        ("extra",),
        ("0.bias",),
        ("1.0.weight",),
    )
    assert str(report) == "2 converted, 1 dropped, 1 missing, 1 mismatched"
    torch.testing.assert_close(network[0].weight, before)


def test_rules_that_merge_two_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="both become same"):
        reference_names(["a", "b"], ((r"^[ab]$", "same"),))
