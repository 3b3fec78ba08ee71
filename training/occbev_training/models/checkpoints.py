"""Weights on disk as safetensors, and their transfer from pre-training to fine-tuning by named parts.

Nothing is loaded in part without a report that says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from occbev.files import one_line

TRANSFERRED_PARTS: Mapping[str, str] = {
    "image_encoder": "image_encoder",
    "view_transform": "view_transform",
    "bev_encoder": "bev_encoder",
    "occupancy_decoder": "occupancy_head",
}
"""Part of a pre-trained network -> the part of the fine-tuned one that begins from it."""


class CheckpointError(ValueError):
    """Weights that cannot be read or do not fit; the text names the file and the first keys."""


@dataclass(frozen=True)
class TransferReport:
    """What became of each weight of the target network.

    carried: taken from the source. new: the source has no such weight.
    mismatched: the source has it in another shape; the target keeps its own.
    unused: weights of the source that the target has no place for.
    """

    carried: tuple[str, ...]
    new: tuple[str, ...]
    mismatched: tuple[str, ...]
    unused: tuple[str, ...] = ()

    def as_record(self) -> dict[str, list[str]]:
        """The report as plain values, for JSON and YAML."""
        return {key: list(names) for key, names in asdict(self).items()}

    def __str__(self) -> str:
        return ", ".join(f"{len(names)} {key}" for key, names in asdict(self).items())


def save_weights(path: Path, state: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
    """Write weights and a JSON record (the configuration that they belong to) in one file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, path, metadata={"record": json.dumps(record)})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read `save_weights` back; raises CheckpointError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("record", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"{path}: the weights {name} {tuple(value.shape)} are not finite")
    return state, record


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights that must fit exactly; source: what an error calls them."""
    own = network.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = sorted(n for n in own if n in state and own[n].shape != state[n].shape)
    for what, names in (("missing", missing), ("unknown", extra), ("of another shape", wrong)):
        if names:
            raise CheckpointError(f"{source}: {len(names)} weights are {what}: {names[:3]}")
    network.load_state_dict(dict(state))


def transfer(source_state: Mapping[str, Tensor], network: nn.Module) -> TransferReport:
    """Begin a network from pre-trained weights, part by part as `TRANSFERRED_PARTS` says.

    A weight whose part kept its name (resuming, or the same stage) is carried as well.
    """
    offered = _rename(source_state, network.state_dict())
    own = network.state_dict()
    carried = [n for n in own if n in offered and offered[n].shape == own[n].shape]
    mismatched = [n for n in own if n in offered and offered[n].shape != own[n].shape]
    network.load_state_dict({n: offered[n] for n in carried}, strict=False)
    return TransferReport(
        tuple(carried),
        tuple(n for n in own if n not in offered),
        tuple(mismatched),
        tuple(n for n in offered if n not in own),
    )


def _rename(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    present = {name.split(".")[0] for name in target}
    renamed = {}
    for name, value in source.items():
        part, _, rest = name.partition(".")
        place = part if part in present else TRANSFERRED_PARTS.get(part, part)
        renamed[f"{place}.{rest}"] = value
    return renamed
