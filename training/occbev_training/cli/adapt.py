"""What `occbev-train adapt` does; its arguments and its help are in arguments/adapt.py."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn

from occbev.cli.console import make_console
from occbev.cli.progress import Progress, status
from occbev.config import ConfigError, ModelConfig, load_config
from occbev.grid import GRIDS
from occbev.inference.ground_grid import GroundGridConfig
from occbev.inference.model_package import ModelPackage, find_package
from occbev.inference.openvino_backend import INT8_GRAPH
from occbev.share import share_path
from occbev_training.cli import pairs
from occbev_training.cli.arguments.adapt import KEY_INTERVALS, MIN_TRAVEL
from occbev_training.cli.arguments.pairs import add_arguments as add_pair_arguments
from occbev_training.cli.arguments.shared import add_body_arguments, add_input_arguments
from occbev_training.cli.inputs import count_keys, find_inputs
from occbev_training.cli.pretrain import Display, signals
from occbev_training.data.label_frame import in_base_link
from occbev_training.data.pair_samples import PairSamples, open_pairs
from occbev_training.data.samples import JoinedSamples, Samples
from occbev_training.data.shards import INDEX_NAME, ShardReader
from occbev_training.engine.adapt import (
    AdaptConfig,
    AdaptData,
    Adapted,
    adapt,
    divide,
    evenly,
    load_network,
    occupied_voxels,
    provenance_of,
    shown_pairs,
)
from occbev_training.engine.rehearsal import SCORED_DRIVES, make_rehearsal
from occbev_training.engine.stages import network_outputs, predictor
from occbev_training.engine.taught_boxes import Teacher, teach
from occbev_training.evaluation.adapt_report import Look, write_report
from occbev_training.evaluation.frames import evaluate
from occbev_training.evaluation.label_scores import box_scores
from occbev_training.evaluation.space import MAX_FRAMES, SpaceError, fit_space, pair_frames
from occbev_training.export.calibrate import write_calibration
from occbev_training.export.package import export_package
from occbev_training.export.quantise import QuantisationError
from occbev_training.sources.box_labels import TimedBoxes, read_timed_boxes

PICTURES = 3
"""Held-out frames in the report."""


ENOUGH_KEYS = 1000
"""The shortest interval is chosen that gives no more key frames than this."""


def run(args: argparse.Namespace) -> int:
    """Adapt, export and report; 130 when it was stopped."""
    console = make_console()
    logging.getLogger("occbev_training").setLevel(logging.WARNING)
    package, config = ModelPackage.load(find_package(args.package)), adapt_config(args)
    root = _pairs_of(args, package.model)
    samples = open_pairs(root, package.model.image, package.model.grid, args.split, kept=args.out / "samples")
    train, held_out = divide(samples, _window(root), config.held_out)
    between = len(samples) - len(train) - len(held_out)
    rehearsal, forgotten = _rehearsal(args, package, config, samples, console)
    train = _teach(args, package, config, train, rehearsal is not None, console)
    data = AdaptData(train, held_out, rehearsal, forgotten)
    console.print(
        f"{package.model.name}: learns from {len(train)} pairs, {len(held_out)} are held out, "
        f"{between} between them are in neither, "
        f"{len(rehearsal or ())} simulated frames are rehearsed",
        highlight=False,
    )
    with Display(console) as display, signals() as prepared:
        found = adapt(package, data, config, args.out / "run", args.minutes, display.show, prepared)
    if found is None:
        return 130
    _finish(args, package, config, data, found, console)
    return 0


def adapt_config(args: argparse.Namespace) -> AdaptConfig:
    """Return the config with what the options change."""
    config = load_config(args.config or share_path("config/training/adapt.yaml"), AdaptConfig)
    training = config.training
    if args.steps is not None:
        training = replace(training, steps=args.steps)
    if args.threads is not None:
        training = replace(training, threads=args.threads)
    given = {"held_out": args.held_out, "rehearsal_drives": args.rehearsal_drives}
    return replace(config, training=training, **{k: v for k, v in given.items() if v is not None})


def _pairs_of(args: argparse.Namespace, model: ModelConfig) -> Path:
    """Return the folder of pairs: the one that is given, or the one that `pairs` makes of the bags."""
    if (args.inputs[0] / INDEX_NAME).exists():
        if len(args.inputs) > 1:
            raise ConfigError(f"{args.inputs[0]}: one folder of pairs, or bags; given are {len(args.inputs)} inputs")
        return Path(args.inputs[0])
    out: Path = args.out / "pairs"
    interval = args.key_interval or choose_interval(args)
    wanted = ["--key-interval", f"{interval:g}", "--window", str(args.window), "--min-travel", f"{MIN_TRAVEL:g}"]
    workers = ["--lidar", "--workers", str(args.workers), "--grid", grid_name(model)]
    given = [*given_arguments(args, add_body_arguments), *given_arguments(args, add_input_arguments)]
    status = make_pairs([*wanted, *workers, *given], args.inputs, out)
    if not (out / INDEX_NAME).exists():
        raise ConfigError(
            f"{out}: no pairs could be made (status {status}): 'occbev-train bag-check' says what is missing"
        )
    return out


def choose_interval(args: argparse.Namespace) -> float:
    """Return the seconds between key frames that suit the length of the drives of `args.inputs`."""
    found = find_inputs(args, args.inputs, args.out / "infos", KEY_INTERVALS[0])
    keys = sum(count_keys(found).values())
    return next((i for i in KEY_INTERVALS if keys * KEY_INTERVALS[0] / i <= ENOUGH_KEYS), KEY_INTERVALS[-1])


def grid_name(model: ModelConfig) -> str:
    """Return the name of the grid that a model's labels are on; raises ConfigError where it has none."""
    grid = in_base_link(model).grid
    for name, known in GRIDS.items():
        if known == grid:
            return name
    raise ConfigError(f"{model.name}: its grid {grid.as_record()} has no name, so that no pairs can be made for it")


def make_pairs(options: Sequence[str], inputs: Sequence[Path], out: Path) -> int:
    """Run the command `pairs`; returns its status."""
    parser = argparse.ArgumentParser()
    add_pair_arguments(parser)
    return pairs.run(parser.parse_args([*map(str, inputs), "--out", str(out), *options]))


def given_arguments(args: argparse.Namespace, declare: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """Return those options of `declare` that were given, as words for another command."""
    parser = argparse.ArgumentParser()
    declare(parser)
    words: list[str] = []
    for name, value in vars(parser.parse_args([])).items():
        given = getattr(args, name, value)
        if given != value:
            values = given if isinstance(given, list) else [] if given is True else [given]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def _window(root: Path) -> float:
    """Return how many seconds of sweeps before and after a label the labels of a folder were made from."""
    reader = ShardReader(root)
    return float(reader.sample(reader.rows[0]["key"]).meta["window"])


def _rehearsal(
    args: argparse.Namespace, package: ModelPackage, config: AdaptConfig, samples: PairSamples, console: Console
) -> tuple[Samples | None, Samples | None]:
    if not config.rehearsal or not config.rehearsal_drives:
        return None, None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("simulated drives to rehearse", total=config.rehearsal_drives + SCORED_DRIVES)
        return make_rehearsal(
            args.out / "rehearsal",
            package.model,
            samples.network_rig(),
            config.rehearsal_drives,
            config.rehearsal_keys,
            args.workers,
            lambda name, count: progress.advance(task),
        )


def _teach(
    args: argparse.Namespace,
    package: ModelPackage,
    config: AdaptConfig,
    train: PairSamples,
    rehearsed: bool,
    console: Console,
) -> PairSamples:
    """Find boxes in the pairs that the training will show, where the package's network can."""
    teacher = Teacher.of(load_network(package), package.model) if config.taught else None
    if teacher is None:
        return train
    used = shown_pairs(train, config, rehearsed)
    folder = args.out / "taught" / hashlib.sha256(f"{package.hash} {train.hash}".encode()).hexdigest()[:12]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("pairs in which boxes are looked for", total=len(used))
        return teach(teacher, train, used, folder, lambda: progress.advance(task))


def _finish(
    args: argparse.Namespace,
    package: ModelPackage,
    config: AdaptConfig,
    data: AdaptData,
    found: Adapted,
    console: Console,
) -> None:
    """Score boxes, write the package and the page, and print what came of it."""
    begun = load_network(package)
    models = {"before": (begun, package.model), "after": (found.network, found.model)}
    boxes = _box_file(args)
    record: dict[str, Any] = {"before": dict(found.before), "after": dict(found.after)}
    for name, (network, model) in models.items():
        if boxes is not None:
            record[name] |= box_scores(predictor(network, model, data.held_out), data.held_out, model, boxes)
        if data.forgotten is not None:
            scores = evaluate(data.forgotten, predictor(network, model, data.forgotten), model).summary()
            record[name] |= {f"simulated_{key}": value for key, value in scores.items()}
    metrics = {"held_out_part_of_the_drives": record}
    provenance = provenance_of(package, data, config, found)
    extra = [package.path("priors.npz")] if package.has("priors.npz") else []
    with status(console, "exporting and checking the graphs"):
        written, int8 = export_like(package, found, args.out / "package", provenance, metrics, extra, data)
    (args.out / "scores.json").write_text(json.dumps(record, indent=1))
    with status(console, "calibrating its probabilities"):
        calibrated = calibrate_space(args.out / "package", data.held_out)
    looks = _looks(package, data, found)
    facts = {
        "trained on": f"{len(data.train)} pairs of {', '.join(data.train.drives)}, without their boxes and classes",
        "held out": f"{len(data.held_out)} pairs; no training label uses a sweep of their time",
        "simulated": f"{len(data.rehearsal or ())} frames in the training, half of them through these cameras",
        "training": f"{found.steps} steps, {found.seconds:.0f} s, {found.processor_seconds:.0f} s of processor time",
        "weights": f"{found.share:.0%} adapted, {1 - found.share:.0%} of {package.model.name}",
        "probabilities": calibrated,
        "int8 graph": int8,
        "package": f"{args.out / 'package'}, from {package.model.name} ({package.hash})",
    }
    page = {**record, "grid": package.model.grid}
    write_report(args.out / "report.html", f"{package.model.name}, adapted without labels", facts, page, looks)
    for key in ("iou", "obstacle_depth_error", "car_AP_2m_30m", "simulated_car_AP_2m_30m", "simulated_occupancy_iou"):
        if key in record["before"] and key in record["after"]:
            console.print(f"{key}: {record['before'][key]:.3f} -> {record['after'][key]:.3f}", highlight=False)
    if "mean_grid_iou" in record["before"]:
        console.print(f"mean grid: iou {record['before']['mean_grid_iou']:.3f}", highlight=False)
    console.print(f"probabilities: {calibrated}", highlight=False, markup=False)
    console.print(f"int8 graph: {int8}", highlight=False, markup=False)
    console.print(f"{args.out / 'package'}: predicts {written.predicts}", highlight=False)
    console.print(
        f"look at {args.out / 'report.html'}; try it: occbev replay BAG --model {args.out / 'package'}", highlight=False
    )


def export_like(
    package: ModelPackage,
    found: Adapted,
    folder: Path,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    extra: Sequence[Path],
    data: AdaptData,
) -> tuple[ModelPackage, str]:
    """Export with an int8 graph where the package it came from has one; returns what came of that graph, too.

    Ranges are taken from the frames that were learned from and rehearsed.
    """
    given = found.network, found.model, folder, provenance, metrics, extra
    if not package.has(INT8_GRAPH):
        return export_package(*given), f"none: {package.model.name} has none"
    own = replace(data.train, taught=None)  # boxes were looked for only in the pairs that the training showed
    frames = own if data.rehearsal is None else JoinedSamples((own, data.rehearsal))
    try:
        written = export_package(*given, calibration=frames)
    except (ImportError, QuantisationError) as error:
        return export_package(*given), f"none: {error}"
    return written, f"agrees with float to {written.metrics['int8_agreement']:.3f} (soft intersection over union)"


def calibrate_space(folder: Path, held_out: PairSamples) -> str:
    """Calibrate a package's probabilities of occupancy on held-out pairs, as `calibrate` does; returns what came of it."""
    package, frames = ModelPackage.load(folder), evenly(len(held_out), MAX_FRAMES)
    fitted_on = f"{len(frames)} held-out pairs of {', '.join(held_out.drives[:4])}"
    try:
        fit = fit_space(package, pair_frames(held_out, frames, GroundGridConfig()), fitted_on)
    except SpaceError as error:
        return f"not calibrated: {error}"
    record = write_calibration(package, fit)
    before, after = record["voxels_ece"], record["voxels_ece_calibrated"]
    return f"calibrated on {fitted_on}: expected calibration error of voxels {before:.3f} -> {after:.3f} (space.npz)"


def _looks(package: ModelPackage, data: AdaptData, found: Adapted) -> list[Look]:
    samples, looks = data.held_out, []
    before = network_outputs(load_network(package), package.model, samples) if found.before else None
    after = network_outputs(found.network, found.model, samples)
    for index in evenly(len(samples), PICTURES):
        volumes = [
            np.zeros(package.model.grid.shape, bool)
            if look is None
            else occupied_voxels(look(index), model.occupancy.min_free)
            for look, model in ((before, package.model), (after, found.model))
        ]
        looks.append(Look(samples.name(index), samples[index], *volumes))
    return looks


def _box_file(args: argparse.Namespace) -> TimedBoxes | None:
    """Return the boxes that are given, or those of a `boxes.json` in the folder of the only input."""
    beside = args.inputs[0] / "boxes.json"
    path = args.boxes or (beside if beside.is_file() else None)
    return None if path is None else read_timed_boxes(path)
