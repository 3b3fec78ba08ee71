"""Turn the weights of a run of either stage, or a converted checkpoint, into a model package with graphs.

    occbev-train export out/finetune/weights.safetensors --out out/my-model --model config/models/occbev-tiny.yaml
    occbev-train export out/pretrain/weights.safetensors --out out/my-voxels --model config/models/occbev-tiny.yaml
    occbev-train convert bevformer_tiny.pth --family bevformer_tiny --out out/converted
    occbev-train export out/converted --out out/bevformer_tiny
    occbev-train export out/my-model --out out/my-model-int8 --int8 out/cache

Weights hold the heads that were trained, and the package predicts what these say: of a pre-training run voxels that are
free, occupied or unknown, without classes and without boxes.
Every graph is run beside torch in double precision before the package is sealed; it takes the place of an earlier one.
Networks of every family are exported.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from occbev.config import ConfigError, ModelConfig
from occbev.inference.families import load_model
from occbev.inference.model_package import ModelPackage
from occbev_training.cli.inputs import choose_output
from occbev_training.data.cache import open_cache
from occbev_training.export.package import ExportError, export_package
from occbev_training.export.quantise import QuantisationError
from occbev_training.metrics.calibration import fit_min_free
from occbev_training.models.build import build_for_weights
from occbev_training.models.checkpoints import load_strictly, read_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "weights",
        type=Path,
        help="weights.safetensors of a run of either stage, or a package of weights",
    )
    parser.add_argument("position", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder where the package is written")
    parser.add_argument("--model", type=Path, help="model configuration (YAML); a package has its own")
    parser.add_argument("--provenance", type=Path, help="JSON: data, steps, seeds of the training")
    parser.add_argument("--metrics", type=Path, help="JSON: held-out scores")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="JSON of 'occbev-train evaluate --calibrate': its occupancy.min_free goes into the package",
    )
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="files to ship along, such as priors.npz")
    parser.add_argument("--cameras", type=int, nargs="*", help="sizes of the rigs that graphs are checked on")
    parser.add_argument(
        "--int8",
        type=Path,
        metavar="CACHE",
        help="quantise the OpenVINO graph on frames of 'occbev-train prepare' that the network was trained on",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export, check the graphs against torch, and print what was written; 1 if a graph is refused."""
    args.out = choose_output(args.out, args.position, "the package")
    model, weights, provenance = _source(args.weights, args.model)
    model = _calibrate(model, args.calibration)
    state, _ = read_weights(weights)
    network = build_for_weights(model, state)
    load_strictly(network, state, str(weights))
    console = Console(stderr=args.json)
    records = {**provenance, **_read(args.provenance)}, _read(args.metrics)
    frames = None if args.int8 is None else open_cache(args.int8)
    try:
        with console.status("exporting and checking the graphs on several rigs"):
            package = export_package(network, model, args.out, *records, args.add, args.cameras or None, frames)
    except (ExportError, QuantisationError) as error:
        Console(stderr=True).print(f"{model.name}: {error}", highlight=False)
        return 1
    sizes = {name: (args.out / name).stat().st_size for name in package.files}
    operators = package.provenance["operators"]
    if args.json:
        record = {"bytes": sizes, "metrics": package.metrics, "operators": operators.split()}
        print(json.dumps({"folder": str(args.out), **record}))
        return 0
    for name, size in sizes.items():
        console.print(f"{size / 1e6:8.2f} MB  {name}")
    console.print(f"predicts {package.predicts}", highlight=False)
    console.print(f"operators: {operators}", highlight=False)
    for runtime, outputs in package.metrics["export_difference"].items():
        worst = max(outputs.values())
        console.print(f"{runtime}: differs from double precision by at most {worst:.1e} of an output's largest value")
    if frames is not None:
        share = package.metrics["int8_agreement"]
        console.print(f"int8: agrees with float to {share:.3f} (soft intersection over union)")
    return 0


def _source(weights: Path, model: Path | None) -> tuple[ModelConfig, Path, dict[str, Any]]:
    """Return the model, its weights file, and what a package among the arguments knows of their origin."""
    if weights.is_dir():
        package = ModelPackage.load(weights)
        config = package.model if model is None else load_model(model)
        return config, package.path("weights.safetensors"), dict(package.provenance)
    if model is None:
        raise ConfigError(f"{weights}: is no package, so that --model must name its configuration")
    return load_model(model), weights, {}


def _calibrate(model: ModelConfig, report: Path | None) -> ModelConfig:
    if report is None:
        return model
    min_free = fit_min_free(_read(report), str(report))
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
