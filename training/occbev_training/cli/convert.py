"""What `occbev-train convert` does; its arguments and its help are in arguments/convert.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from occbev.config import ConfigError, ModelConfig, to_record
from occbev.files import file_hash
from occbev.inference.families import load_model
from occbev.inference.model_package import ModelPackage, write_package
from occbev.share import share_path
from occbev_training.models.build import TRAINING_STAGES, build_model
from occbev_training.models.checkpoint_files import read_recorded
from occbev_training.models.checkpoints import CheckpointError, save_weights
from occbev_training.models.renaming import (
    ConversionReport,
    Rules,
    load_reference,
    reference_names,
)

PREFIX = "model."


def run(args: argparse.Namespace) -> int:
    """Convert and print what became of every weight."""
    model = load_family(args.family)
    state = read_recorded(args.checkpoint)
    stage, report, weights = convert(model, state, str(args.checkpoint))
    package = write_converted(args.out, model, stage, weights, args.checkpoint)
    record = {
        "folder": str(args.out),
        "stage": stage,
        "converted": len(report.converted),
        "dropped": len(report.dropped),
        "missing": len(report.missing),
        "mismatched": len(report.mismatched),
        "package": package.hash,
    }
    if args.json:
        print(json.dumps(record))
    else:
        Console().print(f"{args.out}: {report}; a network of stage {stage!r}", highlight=False)
    return 0


def load_family(name: str) -> ModelConfig:
    """Read config/models/NAME.yaml; raises ConfigError listing those that there are."""
    folder = share_path("config/models")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(f"--family {name!r}: no such configuration; known are {known}")
    return load_model(path)


def convert(
    model: ModelConfig, state: dict[str, Tensor], source: str
) -> tuple[str, ConversionReport, dict[str, Tensor]]:
    """Find the stage whose network the checkpoint is of; return it, the report and weights under our names.

    source: what an error calls the checkpoint. Raises: CheckpointError with the report of the better fit.
    """
    reports = {}
    for stage in TRAINING_STAGES:
        network = _on_meta(model, stage)
        if network is None:
            continue
        rules: Rules = network.reference_names  # type: ignore[assignment]
        names = reference_names(network.state_dict(), rules)
        named = take_prefix(state, set(names.values()))
        report = load_reference(network, named, rules)
        if report.complete:
            return stage, report, {own: named[name] for own, name in names.items()}
        reports[stage] = report
    stage, report = max(reports.items(), key=lambda entry: len(entry[1].converted))
    first = {what: names[0] for what in ("dropped", "missing", "mismatched") if (names := getattr(report, what))}
    raise CheckpointError(f"{source}: not the weights of {model.name}: {report} ({stage}); first {first}")


def take_prefix(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Take `model.`, the prefix of Lightning's modules, off every name or put it before, if more of `names` are met so."""
    without = {name.removeprefix(PREFIX): value for name, value in state.items()}
    ways = (state, without, {f"{PREFIX}{name}": value for name, value in state.items()})
    return max(ways, key=lambda way: len(names & way.keys()))


def write_converted(
    folder: Path, model: ModelConfig, stage: str, weights: dict[str, Tensor], source: Path
) -> ModelPackage:
    """Write a package that holds weights and configuration; graphs are made by `occbev-train export`."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is not empty; a package has a folder of its own")
    record = {"model": to_record(model), "stage": stage}
    save_weights(folder / "weights.safetensors", weights, record)
    provenance = {
        "data": f"published weights of {model.name}",
        "stage": stage,
        "converted_from": {"file": source.name, "sha256": file_hash(source)},
    }
    count = sum(value.numel() for value in weights.values())
    (folder / "README.md").write_text(
        f"# {model.name}\n\nPublished weights, converted from `{source.name}` without loss: {len(weights)}"
        f" tensors, {count / 1e6:.2f} million values, a network of stage `{stage}`.\n"
        "Their licence is that of their publisher.\n"
    )
    return write_package(folder, model, provenance, {})


def _on_meta(model: ModelConfig, stage: str) -> nn.Module | None:
    """Build a network without memory for its weights, or None where the family has no such stage."""
    try:
        with torch.device("meta"):
            network = build_model(model, stage)
    except ConfigError:
        return None
    if not getattr(network, "reference_names", ()):
        raise ConfigError(f"{model.name}: no published weights are known for this family")
    return network
