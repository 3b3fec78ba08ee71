"""Weights under other people's names: rules turn our names into published ones, their inverse reads checkpoints.

A rule is a regular expression over our names; the inverse is taken over the names that a network has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Rules = Sequence[tuple[str, str]]
"""(pattern, replacement) pairs; every one that matches is applied, in order."""


@dataclass(frozen=True)
class ConversionReport:
    """What became of a published checkpoint.

    converted: our names. dropped: published names without a place here. missing: our names that the
    checkpoint lacks. mismatched: our names whose shape differs; they are not loaded.
    """

    converted: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every weight of both sides found its partner."""
        return not (self.dropped or self.missing or self.mismatched)

    def __str__(self) -> str:
        counts = (f"{len(names)} {what}" for what, names in vars(self).items())
        return ", ".join(counts)


def reference_names(own_names: Iterable[str], rules: Rules) -> dict[str, str]:
    """Return our name -> published name; raises ValueError if two of ours meet in one."""
    names = {name: published_name(name, rules) for name in own_names}
    if len(set(names.values())) != len(names):
        seen: dict[str, str] = {}
        for own, published in names.items():
            if published in seen:
                raise ValueError(f"{own} and {seen[published]} both become {published}")
            seen[published] = own
    return names


def published_name(own: str, rules: Rules) -> str:
    """Return the published name of one of our weights."""
    for pattern, replacement in rules:
        own = re.sub(pattern, replacement, own)
    return own


def load_reference(network: nn.Module, state: Mapping[str, Tensor], rules: Rules) -> ConversionReport:
    """Load a published state dict into a network; the report says what did not fit.

    The network is not changed unless the conversion is complete.
    """
    own = network.state_dict()
    names = reference_names(own, rules)
    places = set(names.values())
    here = [n for n in own if names[n] in state]
    fits = [n for n in here if state[names[n]].shape == own[n].shape]
    report = ConversionReport(
        tuple(fits),
        tuple(n for n in state if n not in places),
        tuple(n for n in own if names[n] not in state),
        tuple(n for n in here if n not in set(fits)),
    )
    if report.complete:
        network.load_state_dict({n: state[names[n]] for n in fits}, assign=_on_meta(own))
    return report


def to_reference(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Return a state dict of ours under published names."""
    return {name: state[own] for own, name in reference_names(state, rules).items()}


def _on_meta(state: Mapping[str, Tensor]) -> bool:
    return any(value.is_meta for value in state.values())
