"""Turn the weights of a fine-tuning run into a model package.

occbev-train export out/finetune/weights.safetensors config/models/occbev-tiny --model config/models/occbev-tiny.yaml
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from occbev.config import ConfigError, ModelConfig, load_config
from occbev_training.export import export_package
from occbev_training.export_bevdet import export_bevdet_package
from occbev_training.metrics.calibration import calibrated_min_free
from occbev_training.models.bevdet import BevDetNetwork
from occbev_training.models.build import build_network
from occbev_training.models.checkpoints import load_strictly, read_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("weights", type=Path, help="weights.safetensors of a fine-tuning run")
    parser.add_argument("folder", type=Path, help="where the package is written")
    parser.add_argument("--model", type=Path, required=True, help="model configuration (YAML)")
    parser.add_argument("--provenance", type=Path, help="JSON: data, steps, seeds of the training")
    parser.add_argument("--metrics", type=Path, help="JSON: held-out scores")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="JSON of 'occbev-train evaluate --calibrate': its occupancy.min_free goes into the package",
    )
    parser.add_argument(
        "--add", type=Path, nargs="*", default=[], help="files to ship along, such as priors.npz"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export, check the graphs against torch, and print what was written."""
    model = _calibrated(load_config(args.model, ModelConfig), args.calibration)
    network = build_network(model, "finetune")
    load_strictly(network, read_weights(args.weights)[0], str(args.weights))
    console = Console(stderr=args.json)
    with console.status("exporting and checking the graphs on rigs of 5, 6 and 7 cameras"):
        records = _read(args.provenance), _read(args.metrics)
        if isinstance(network, BevDetNetwork):
            if args.add:
                raise ConfigError(
                    f"--add {args.add[0]}: packages of {model.name} hold no such files"
                )
            package = export_bevdet_package(network, model, args.folder, *records)
        else:
            package = export_package(network, model, args.folder, *records, args.add)
    sizes = {name: (args.folder / name).stat().st_size for name in package.files}
    if args.json:
        print(json.dumps({"folder": str(args.folder), "bytes": sizes, "metrics": package.metrics}))
        return 0
    for name, size in sizes.items():
        console.print(f"{size / 1e6:8.2f} MB  {name}")
    for runtime, outputs in package.metrics["export_difference"].items():
        worst = max(outputs.values())
        console.print(
            f"{runtime}: differs from torch by at most {worst:.1e} of an output's largest value"
        )
    return 0


def _calibrated(model: ModelConfig, report: Path | None) -> ModelConfig:
    if report is None:
        return model
    min_free = calibrated_min_free(_read(report), str(report))
    return replace(model, occupancy=replace(model.occupancy, min_free=min_free))


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: holds a {type(record).__name__}, want one object")
    return record
