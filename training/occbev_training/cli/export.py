"""What `occbev-train export` does; its arguments and its help are in arguments/export.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from occbev.cli.progress import status
from occbev.config import ConfigError, ModelConfig
from occbev.inference.families import load_model
from occbev.inference.model_package import ModelPackage
from occbev_training.cli.inputs import choose_output
from occbev_training.data.cache import open_cache
from occbev_training.export.package import ExportError, export_package
from occbev_training.export.quantise import QuantisationError
from occbev_training.export.run_folder import is_run, read_run
from occbev_training.export.zoo import randomise_zero_init
from occbev_training.metrics.calibration import fit_min_free
from occbev_training.models.build import build_for_weights, build_model
from occbev_training.models.checkpoints import load_strictly, read_weights

SOURCES = "want the folder of a run, its weights.safetensors, a package or, with --untrained, a configuration"


def run(args: argparse.Namespace) -> int:
    """Export, check the graphs against torch, and print what was written; 1 if a graph is refused."""
    args.out = choose_output(args.out, args.position, "the package")
    if not args.weights.exists():
        raise ConfigError(f"{args.weights}: no such file or folder; {SOURCES}")
    model, network, provenance, metrics = _untrained(args) if args.untrained else _trained(args)
    console = Console(stderr=args.json)
    records = {**provenance, **_read(args.provenance)}, {**metrics, **_read(args.metrics)}
    frames = None if args.int8 is None else open_cache(args.int8)
    try:
        with status(console, "exporting and checking the graphs on several rigs"):
            package = export_package(
                network,
                model,
                args.out,
                *records,
                args.add,
                args.cameras or None,
                frames,
                untrained=args.untrained,
                gpu=args.gpu,
            )
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


def _trained(args: argparse.Namespace) -> tuple[ModelConfig, nn.Module, dict[str, Any], dict[str, Any]]:
    model, weights, provenance, metrics = _source(args.weights, args.model)
    model = _calibrate(model, args.calibration)
    state, _ = read_weights(weights)
    network = build_for_weights(model, state)
    load_strictly(network, state, str(weights))
    return model, network, provenance, metrics


def _untrained(args: argparse.Namespace) -> tuple[ModelConfig, nn.Module, dict[str, Any], dict[str, Any]]:
    given = {"--model": args.model, "--int8": args.int8, "--calibration": args.calibration, "--metrics": args.metrics}
    if useless := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(useless)} cannot be used with --untrained, which takes only a configuration")
    model = load_model(args.weights)
    torch.manual_seed(0)
    return model, randomise_zero_init(build_model(model, "finetune")), {}, {}


def _source(origin: Path, model: Path | None) -> tuple[ModelConfig, Path, dict[str, Any], dict[str, Any]]:
    """Return the model, its weights file, and what a run or a package knows of its training and of its scores."""
    if is_run(origin):
        run = read_run(origin)
        return run.model if model is None else load_model(model), run.weights, run.provenance, run.metrics
    if origin.is_dir():
        package = ModelPackage.load(origin)
        config = package.model if model is None else load_model(model)
        return config, package.path("weights.safetensors"), dict(package.provenance), {}
    if model is None:
        raise ConfigError(
            f"{origin}: a single file of weights needs --model, its configuration; the folder of its run needs none"
        )
    return load_model(model), origin, {}, {}


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
