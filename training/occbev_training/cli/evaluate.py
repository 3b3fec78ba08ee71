"""What `occbev-train evaluate` does; its arguments and its help are in arguments/evaluate.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from occbev.allocator import keep_large_blocks
from occbev.cli.console import make_console
from occbev.cli.progress import Progress, status
from occbev.inference.model_package import ModelPackage
from occbev_training.cli.arguments.evaluate import add_arguments
from occbev_training.cli.inputs import root_options
from occbev_training.data.cache import open_cache
from occbev_training.evaluation.data import CacheFrames, EvaluationData, RootFrames, open_evaluation_data
from occbev_training.evaluation.frames import Priors, fit_priors, score_priors
from occbev_training.evaluation.report import draw_plots, draw_worst, write_json
from occbev_training.evaluation.result_files import official_scores, results_of, scenes_of, score_files
from occbev_training.evaluation.run_package import WORST, PackageRun, RunOptions, run_in_processes
from occbev_training.evaluation.scores import Scores
from occbev_training.metrics.detection import THRESHOLDS, TP_ERRORS
from occbev_training.metrics.nuscenes_results import read_results, write_results
from occbev_training.metrics.occ3d_results import result_tokens
from occbev_training.sources.discovery import read_names
from occbev_training.sources.nuscenes import open_nuscenes

Record = dict[str, Any]

FILES, DATA, PAIRS = "result files", "a package on --data", "a package on --pairs"
"""What is scored."""

EFFECTIVE = {
    **dict.fromkeys(("split", "boxes"), (PAIRS,)),
    **dict.fromkeys(("limit", "min_free"), (DATA, PAIRS)),
    **dict.fromkeys(("version", "classes", "draws"), (DATA, FILES)),
    **dict.fromkeys(("workers", "backend", "precision", "threads"), (DATA,)),
    **dict.fromkeys(("fit_priors", "priors", "calibrate", "save_voxels"), (DATA,)),
}
"""Option -> what it has an effect on."""


def run(args: argparse.Namespace) -> int:
    """Score and print; exits with 0 whatever the scores are."""
    _check(args)
    keep_large_blocks()
    console = make_console()
    if args.pairs is not None:
        return _of_pairs(args, console)
    record = _of_files(args, console) if args.package is None else _of_package(args, console)
    if args.json:
        write_json(args.json, record)
    if args.out:
        write_json(args.out / "metrics.json", record)
        draw_plots(record, args.out)
    _print(console, record)
    if args.out:
        console.print(f"{args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}", highlight=False)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.package is None and args.results is None and args.voxels is None:
        raise ValueError("nothing to score: name a package, or --results or --voxels")
    if args.package is not None and (args.results or args.voxels):
        raise ValueError("a package or result files are scored, not both")
    if args.package is not None and (args.data is None) == (args.pairs is None):
        raise ValueError("a package needs --data or --pairs: drives that it never saw")
    if args.package is None and args.pairs is not None:
        raise ValueError("--pairs scores a package: name one")
    if args.package is None and args.nuscenes is None:
        raise ValueError("result files need --nuscenes ROOT, the tables that they are of")
    _check_effects(args)
    if args.min_free is not None and not 0 <= args.min_free <= 1:
        raise ValueError(f"--min-free {args.min_free}: want a probability")
    if args.save_voxels and not args.out:
        raise ValueError("--save-voxels needs --out FOLDER")
    if args.priors and not args.fit_priors:
        raise ValueError(f"--priors {args.priors}: the file is written of --fit-priors CACHE, which is missing")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: want at least 1")
    if args.workers < 1 or args.draws < 0 or (args.limit is not None and args.limit < 1):
        raise ValueError(
            f"--workers {args.workers} and --limit {args.limit} must be at least 1, --draws {args.draws} at least 0"
        )


def _check_effects(args: argparse.Namespace) -> None:
    """Refuse options that would be ignored."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults, scored = parser.parse_args([]), FILES if args.package is None else DATA if args.pairs is None else PAIRS
    for name, effective in EFFECTIVE.items():
        if scored not in effective and getattr(args, name) != getattr(defaults, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {scored}, only on {' and '.join(effective)}")


def _of_files(args: argparse.Namespace, console: Console) -> Record:
    """Score a result file, a folder of voxels, or both."""
    tables, drives = open_nuscenes(args.nuscenes, options=root_options(args)), _drives(args)
    results = None if args.results is None else read_results(args.results)
    scenes: Sequence[str] | None = drives
    if scenes is None:
        named = result_tokens(args.voxels) & set(tables.tables["sample"]) if results is None else results
        scenes = scenes_of(tables, named, str(args.results or args.voxels))
    root = RootFrames(tables, scenes, with_images=False)
    with Progress(console=console) as progress:
        task = progress.add_task("scoring", total=len(root))
        scores, _ = score_files(root, results, args.voxels, lambda done: progress.update(task, completed=done))
    scored = [str(path) for path in (args.results, args.voxels) if path is not None]
    return {"scored": scored, **_base_record(args, root, scores)}


def _of_pairs(args: argparse.Namespace, console: Console) -> int:
    """Score a package's weights against LiDAR labels, and print what can be told without other truth."""
    from occbev_training.data.pair_samples import open_pairs
    from occbev_training.engine.adapt import load_network, score_pairs
    from occbev_training.engine.stages import predictor
    from occbev_training.evaluation.label_scores import box_scores
    from occbev_training.sources.box_labels import read_timed_boxes

    package, drives = ModelPackage.load(args.package), _drives(args)
    model, network = package.model, load_network(package)
    samples = open_pairs(args.pairs, model.image, model.grid, args.split, drives)
    with status(console, f"scoring {min(len(samples), args.limit or len(samples))} pairs"):
        scores = score_pairs(network, package, samples, args.limit, args.min_free)
        if args.boxes is not None:
            scores |= box_scores(predictor(network, model, samples), samples, model, read_timed_boxes(args.boxes))
    record: Record = {
        "package": {"name": model.name, "hash": package.hash, "predicts": package.predicts},
        "data": str(args.pairs),
        "drives": len(samples.drives),
        **scores,
    }
    if args.json:
        write_json(args.json, record)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "metrics.json", record)
    _print_pair_scores(console, record)
    return 0


def _print_pair_scores(console: Console, record: Record) -> None:
    table = Table("score", "value", title=f"{record['package']['name']} against {record['frames']} LiDAR labels")
    for name, value in record.items():
        if isinstance(value, dict) and name != "package":
            for part, number in value.items():
                table.add_row(f"{name}, {part}", _number(number))
        elif isinstance(value, float):
            table.add_row(name, _number(value))
    console.print(table)
    if record["package"]["predicts"]:
        console.print(f"the package predicts {record['package']['predicts']}", highlight=False)


def _of_package(args: argparse.Namespace, console: Console) -> Record:
    """Run a package on held-out frames and score what it says."""
    drives = _drives(args)
    package, evaluation_data = (
        ModelPackage.load(args.package),
        open_evaluation_data(args.data, drives, root_options(args)),
    )
    if args.fit_priors and not args.priors and not isinstance(evaluation_data, CacheFrames):
        raise ValueError(
            f"--fit-priors: priors are scored on a sample cache, {args.data} is a {evaluation_data.source}"
        )
    priors = _priors(args, package, console)
    indices = _chosen(len(evaluation_data), args.limit, package.model.past_frames > 0)
    voxels = args.out / "voxels" if args.save_voxels else None
    options = RunOptions(
        args.backend,
        args.threads,
        args.precision,
        args.min_free,
        args.calibrate,
        voxels,
        WORST if args.out else 0,
        drives,
        root_options(args),
    )
    with Progress(console=console) as progress:
        task = progress.add_task("scoring", total=len(indices))
        done = run_in_processes(
            args.package, args.data, indices, options, args.workers, lambda done: progress.update(task, completed=done)
        )
    scores = Scores.of(done.results(), package.model.occupancy_classes)
    if isinstance(evaluation_data, RootFrames):
        scores = official_scores(scores, done.results(), evaluation_data, indices)
    min_free = package.model.occupancy.min_free if args.min_free is None else args.min_free
    record = {
        "package": {
            "name": package.model.name,
            "family": package.model.family,
            "hash": package.hash,
            "trained_on": package.trained_on,
            "runtime": done.device,
            "outputs": list(done.outputs),
        },
        "min_free": min_free,
        **_base_record(args, evaluation_data, scores),
    }
    if done.calibration is not None:
        record["calibration"] = done.calibration.as_record()
    if priors is not None and isinstance(evaluation_data, CacheFrames):
        record["priors"] = score_priors(evaluation_data.cache, priors, package.model, indices)
    if args.out:
        _write_files(args, done, evaluation_data, indices, scores, record)
    return record


def _write_files(
    args: argparse.Namespace,
    done: PackageRun,
    evaluation_data: EvaluationData,
    indices: list[int],
    scores: Scores,
    record: Record,
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    worst = [frame for frames in done.worst.values() for frame in frames]
    by = sorted({frame.by for frame in worst})
    record["worst"] = [
        line for kind in by for line in draw_worst([f for f in worst if f.by == kind], evaluation_data, args.out)
    ]
    if isinstance(evaluation_data, RootFrames) and scores.boxes is not None:
        write_results(args.out / "results.json", results_of(done.results(), evaluation_data, indices))


def _base_record(args: argparse.Namespace, evaluation_data: EvaluationData, scores: Scores) -> Record:
    intervals = scores.intervals(args.draws) if args.draws else None
    return {
        "data": evaluation_data.source,
        "samples": len(scores.names),
        "drives": len(set(scores.drives)),
        **scores.as_record(),
        "intervals": None if intervals is None else intervals.as_record(),
    }


def _drives(args: argparse.Namespace) -> tuple[str, ...] | None:
    return None if args.scenes is None else read_names(args.scenes)


def _chosen(count: int, limit: int | None, in_order: bool) -> list[int]:
    most = min(limit or count, count)
    if in_order:
        return list(range(most))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def _priors(args: argparse.Namespace, package: ModelPackage, console: Console) -> Priors | None:
    if args.fit_priors is None:
        return Priors.load(package.path("priors.npz")) if package.has("priors.npz") else None
    with status(console, "taking the means of the training set"):
        priors = fit_priors(open_cache(args.fit_priors), package.model)
    if args.priors:
        priors.save(args.priors)
    return priors


def _print(console: Console, record: Record) -> None:
    console.print(_summary_table(record))
    if "detection" in record:
        console.print(_class_table(record["detection"]))
        console.print(_range_table(record["detection_by_range"]))
    if "occupancy" in record:
        console.print(_voxel_table(record["occupancy"]))
    measured = record["measured"]
    absent = [name for name in ("boxes", "occupancy", "rays") if name not in measured]
    console.print(
        f"measured: {', '.join(measured) or 'nothing'}"
        + (f"; not predicted or not known: {', '.join(absent)}" if absent else "")
    )
    if "calibration" in record:
        best, now = record["calibration"], record["summary"]
        names = [name for name in ("occupancy_iou", "occupancy_miou") if name in now]
        console.print(
            f"best occupancy.min_free {best['min_free']:g}: {', '.join(f'{n} {best[n]:.4f}' for n in names)};"
            f" scored with {record['min_free']:g}: {', '.join(f'{now[n]:.4f}' for n in names)}"
        )


def _summary_table(record: Record) -> Table:
    priors, intervals = record.get("priors"), record.get("intervals")
    columns = ["score", "measured"]
    if intervals:
        columns.append(f"95 % of draws of {intervals['units']} {intervals['drawn']}s")
    if priors:
        columns.append("training set's means")
    table = Table(*columns, title=f"{record['samples']} samples of {record['drives']} drives, {record['data']}")
    for name, value in record["summary"].items():
        row = [name, _number(value)]
        if intervals:
            lo_hi = intervals.get(name)
            row.append("" if lo_hi is None else f"{lo_hi[0]:.3f} to {lo_hi[1]:.3f}")
        if priors:
            row.append("" if name not in priors else _number(priors[name]))
        table.add_row(*row)
    return table


def _class_table(detection: Mapping[str, Any]) -> Table:
    """AP at each distance in metres, and the mean errors of boxes within 2 m of their truth."""
    headers = ["AP", *(f"{t:g}" for t in THRESHOLDS), "ATE", "ASE", "AOE", "AVE", "AAE"]
    title = "boxes by class: AP at distances in metres, and errors within 2 m"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("class", no_wrap=True)
    for header in ("true", *headers):
        table.add_column(header, justify="right", no_wrap=True)
    for name, by in detection["AP"].items():
        of_class = detection["class_tp_errors"][name]
        cells = [float(np.mean(list(by.values()))), *by.values(), *(of_class[e] for e in TP_ERRORS)]
        table.add_row(name, str(detection["truths"][name]), *(_number(cell, 2) for cell in cells))
    means = [detection["mAP"], *[None] * len(THRESHOLDS), *(detection["tp_errors"][e] for e in TP_ERRORS)]
    total = sum(detection["truths"].values())
    table.add_row("mean", str(total), *(_number(cell, 2) for cell in means))
    return table


def _range_table(rings: Mapping[str, Any]) -> Table:
    table = Table("distance", "true", "mAP", "car AP 2 m", "pedestrian AP 2 m", title="boxes by range")
    for name, ring in rings.items():
        ap = [ring["AP"][label]["2.0"] if ring["truths"][label] else None for label in ("car", "pedestrian")]
        table.add_row(name, str(sum(ring["truths"].values())), *map(_number, [ring["mAP"], *ap]))
    return table


def _voxel_table(occupancy: Mapping[str, Any]) -> Table:
    table = Table("voxels", "occupied", "IoU", title="occupied against free")
    for part in ("iou_by_range", "iou_by_visibility"):
        for name, group in occupancy[part].items():
            table.add_row(name, f"{group['occupied_voxels']:,}", _number(group["iou"]))
        table.add_section()
    for name, iou in occupancy["class_iou"].items():
        if iou is not None:
            table.add_row(name, "", _number(iou))
    return table


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"
