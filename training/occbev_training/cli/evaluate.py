"""Score a model package on drives that it never saw, beside what its training set alone would answer.

    occbev-train evaluate config/models/occbev-tiny --data CACHE
    occbev-train evaluate PACKAGE --data CACHE --fit-priors TRAINING_CACHE --priors priors.npz
    occbev-train evaluate PACKAGE --data VALIDATION_CACHE --calibrate --json report.json

The headline is the AP of cars within 30 m that have at least 5 LiDAR returns, at 2 m.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from occbev.config import ModelConfig
from occbev.inference.backend import load_backend
from occbev.inference.tables import TableCache
from occbev.model_package import ModelPackage
from occbev.preprocess import Preprocessor
from occbev.rig import Camera, CameraRig
from occbev_training.data.cache import CachedSample, SampleCache, open_cache
from occbev_training.evaluate import Prediction, Priors, evaluate, fit_priors, score_priors
from occbev_training.metrics.calibration import FreeThreshold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("package", type=Path, help="model package")
    parser.add_argument("--data", type=Path, required=True, help="sample cache of held-out drives")
    parser.add_argument("--limit", type=int, help="score this many samples, evenly spaced")
    parser.add_argument("--backend", default="auto", help="runtime, as for the node")
    parser.add_argument(
        "--precision", default="auto", help="auto, or f32 to forbid the hardware's fast type"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of the runtime")
    parser.add_argument(
        "--fit-priors",
        type=Path,
        metavar="CACHE",
        help="take the priors from these training drives",
    )
    parser.add_argument(
        "--priors", type=Path, help="where the fitted priors are written; by default nowhere"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="find the occupancy.min_free with the best occupied IoU on these drives, which should be validation"
        " drives; 'occbev-train export --calibration' takes the file of --json",
    )
    parser.add_argument(
        "--min-free", type=float, help="score with this occupancy.min_free instead of the package's"
    )
    parser.add_argument("--json", type=Path, help="write all scores to this file")


def run(args: argparse.Namespace) -> int:
    """Score and print; exits with 0 whatever the scores are."""
    console = Console()
    package, cache = ModelPackage.load(args.package), open_cache(args.data)
    priors = _priors(args, package, console)
    indices = np.unique(
        np.linspace(0, len(cache) - 1, min(args.limit or len(cache), len(cache)))
        .round()
        .astype(int)
    )
    model = _with_min_free(package.model, args.min_free)
    calibration = FreeThreshold(len(model.occupancy_classes)) if args.calibrate else None
    predict = package_predictor(package, cache, args.backend, args.threads, args.precision)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=len(indices))
        scores = evaluate(
            cache,
            predict,
            model,
            indices.tolist(),
            lambda done: progress.update(task, completed=done),
            calibration,
        )
    record: dict[str, Any] = {
        "samples": len(indices),
        "drives": len(cache.drives),
        "min_free": model.occupancy.min_free,
        **scores.as_record(),
    }
    if calibration is not None:
        record["calibration"] = calibration.as_record()
    if priors is not None:
        record["priors"] = score_priors(cache, priors, package.model)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))
    _print(console, record)
    return 0


def package_predictor(package: ModelPackage, cache: SampleCache, backend: str = "auto", threads: int | None = None,
                      precision: str = "auto") -> Callable[[int], Prediction]:  # fmt: skip
    """Return a function that predicts one cached sample with a package's graph."""
    runtime = load_backend(package, len(cache.info.cameras), backend, threads, precision)
    preprocessor, tables = (
        Preprocessor(package.model.image),
        TableCache(package.model, runtime.form),
    )

    def predict(index: int) -> Prediction:
        sample = cache[index]
        images = np.stack([preprocessor.normalise(image) for image in sample.images])
        valid = sample.camera_valid.astype(np.float32)
        inputs: dict[str, NDArray[Any]] = {
            "images": (images * valid[:, None, None, None])[None],
            "camera_valid": valid[None],
        }
        rig = network_rig(sample, cache.info.cameras, package.model)
        output = runtime.run({**inputs, **tables.tables(rig)})
        return Prediction(output["heatmap"][0], output["box"][0], output["occupancy_logits"][0])

    return predict


def _with_min_free(model: ModelConfig, min_free: float | None) -> ModelConfig:
    if min_free is None:
        return model
    if not 0 <= min_free <= 1:
        raise ValueError(f"--min-free {min_free}: want a probability")
    return replace(model, occupancy=replace(model.occupancy, min_free=min_free))


def network_rig(sample: CachedSample, names: tuple[str, ...], model: ModelConfig) -> CameraRig:
    """Return the cameras of one cached sample."""
    return CameraRig(tuple(
        Camera(name, model.image.width, model.image.height, intrinsic, cam2ego)
        for name, intrinsic, cam2ego in zip(names, sample.intrinsic, sample.cam2ego, strict=True)
    ))  # fmt: skip


def _priors(args: argparse.Namespace, package: ModelPackage, console: Console) -> Priors | None:
    if args.fit_priors is None:
        return Priors.load(package.path("priors.npz")) if package.has("priors.npz") else None
    with console.status("taking the means of the training set"):
        priors = fit_priors(open_cache(args.fit_priors), package.model)
    if args.priors:
        priors.save(args.priors)
    return priors


def _print(console: Console, record: dict[str, Any]) -> None:
    table = Table(
        "score",
        "network",
        "training set's means",
        title=f"{record['samples']} samples of {record['drives']} drives",
    )
    for name, value in record["summary"].items():
        prior = record.get("priors", {}).get(name)
        table.add_row(name, f"{value:.3f}", "" if prior is None else f"{prior:.3f}")
    console.print(table)
    if "calibration" in record:
        best = record["calibration"]
        console.print(
            f"best occupancy.min_free {best['min_free']:g}: occupancy_iou {best['occupancy_iou']:.4f}, occupancy_miou"
            f" {best['occupancy_miou']:.4f}; scored with {record['min_free']:g}:"
            f" {record['summary']['occupancy_iou']:.4f}, {record['summary']['occupancy_miou']:.4f}"
        )
