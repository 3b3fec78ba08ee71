"""The record of a head: its outputs, and what training and graphs know of it.

A new head is its file with a record such as `SEMANTICS`, its loss in `occbev_training.losses.objectives.HEAD_LOSSES`, and
a line in `heads` of the families that have it. What the robot decodes of its outputs stands in
`occbev.inference.families`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

Heads = Mapping["Head", nn.Module | None]
"""Every head of a family, in the order of its graphs' outputs -> the part; None where the network lacks it."""


def _build_nothing(model: Any) -> nn.Module | None:
    return None


@dataclass(frozen=True)
class Head:
    """A kind of head; two families may share it with parts of their own.

    part: its name in the network. outputs: names of the tensors that the part returns, in order.
    factors: names of what some parts return in their place while they train, from which a loss takes what it needs.
    loss: a key of `HEAD_LOSSES`, and "boxes" or "voxels" in `truth` what it learns from.
    stage: which stage of training it belongs to. reads: what it is called with, "bev" (B, C, Y, X) or the "scene" that
    object queries attend to. layered: its outputs begin with an axis of decoder layers, of which the last one answers.
    build: makes the part from a configuration, None where that has none.
    """

    part: str
    outputs: tuple[str, ...]
    loss: str
    truth: str
    stage: str = "finetune"
    reads: str = "bev"
    layered: bool = False
    factors: tuple[str, ...] = ()
    build: Callable[[Any], nn.Module | None] = field(default=_build_nothing, compare=False)

    def built_by(self, build: Callable[[Any], nn.Module | None]) -> Head:
        """Return the record with a family's own builder."""
        return replace(self, build=build)

    def name_outputs(self, answer: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Give the tensors that the part returned their names."""
        tensors = answer if isinstance(answer, tuple) else (answer,)
        names = self.outputs if len(tensors) == len(self.outputs) else self.factors
        return dict(zip(names, tensors, strict=True))

    def answered(self, names: Iterable[str]) -> bool:
        """Whether the outputs of this head, or its factors, are among these names."""
        names = set(names)
        return names.issuperset(self.outputs) or (bool(self.factors) and names.issuperset(self.factors))


def build_heads(heads: Sequence[Head], model: Any, stage: str) -> Heads:
    """Build the heads of a stage with random weights."""
    built = {head: head.build(model) for head in reversed(heads) if head.stage == stage}
    return {head: built.get(head) for head in heads}


class HeadedNetwork(nn.Module):
    """A network with heads, each of them the part that its record names.

    heads: every head of its family, those that this network lacks included.
    """

    heads: tuple[Head, ...] = ()

    def add_heads(self, heads: Heads) -> None:
        """Add the parts under their names."""
        self.heads = tuple(heads)
        for head, part in heads.items():
            self.register_module(head.part, part)

    def answer(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run every head that is there; inputs: what `Head.reads` names. Returns the outputs of all by name."""
        answers: dict[str, Tensor] = {}
        for head in heads_of(self):
            answers |= head.name_outputs(getattr(self, head.part)(inputs[head.reads]))
        return answers


def heads_of(network: nn.Module) -> tuple[Head, ...]:
    """Return the records of the heads that a network has."""
    heads: tuple[Head, ...] = getattr(network, "heads", ())
    return tuple(head for head in heads if getattr(network, head.part) is not None)


def learns_from(network: nn.Module, truth: str) -> bool:
    """Whether one of its heads learns from "boxes" or from "voxels"."""
    return any(head.truth == truth for head in heads_of(network))


def take_last_layers(heads: Sequence[Head], answers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the answers that count: of decoder layers the last one's, the others are there for training."""
    layered = {name for head in heads if head.layered for name in head.outputs}
    return {name: answer[-1] if name in layered else answer for name, answer in answers.items()}
