"""Scores as fast as they are exact: detection against nuscenes-devkit's own loop, RayIoU on one thread.

The devkit needs numpy < 2 and so an environment of its own, which `make devkit` builds; its numbers must be ours.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.benchmarks import Options, Report, run_interleaved
from occbev.classes import DETECTION_CLASSES, FREE
from occbev.grid import GRIDS
from occbev_training.benchmarks import devkit_loop
from occbev_training.metrics.detection import (
    CLASS_RANGE,
    TP_ERRORS,
    BoxTable,
    DetectionScores,
    score_boxes,
)
from occbev_training.metrics.occupancy import ray_counts, ray_directions
from occbev_training.sources.nuscenes_writer import ATTRIBUTES

logger = logging.getLogger(__name__)

SAMPLES, BOXES, TRUTHS = 600, 200, 40
ORIGINS = 8
TOLERANCE = 1e-6
"""Largest difference of any score from the devkit's."""

DEVKIT_VARIABLE = "OCCBEV_DEVKIT"
"""Environment variable that names another Python with nuscenes-devkit."""


class DevkitError(RuntimeError):
    """The devkit cannot be run, or says something else than we do."""


def run(options: Options) -> Report:
    """Measure both; without the devkit the ratio is left out and the report says why."""
    truths = make_truths(SAMPLES, TRUTHS)
    predictions = make_predictions(truths, SAMPLES, BOXES)
    truth, predicted, origins = make_street()
    times = run_interleaved(
        {
            "nds": lambda: score_boxes(predictions, truths),
            "rayiou": lambda: ray_counts(truth, predicted, origins, GRIDS["occ3d"]),
        },
        options.rounds,
    )
    scores = score_boxes(predictions, truths)
    values: dict[str, Any] = {
        "rounds": options.rounds,
        "samples": SAMPLES,
        "predictions": len(predictions),
        "truths": len(truths),
        "equal_scores": len(predictions) - len(np.unique(predictions.score)),
        "nds": scores.nds,
        "nds_ms": times["nds"].cpu_ms,
        "rayiou_ms": times["rayiou"].cpu_ms,
        "rays": ORIGINS * len(ray_directions()),
    }
    ratios = {}
    try:
        record = run_devkit(predictions, truths, SAMPLES)
    except FileNotFoundError as error:
        logger.warning("%s", error)
        values["devkit"] = str(error)
    else:
        values["devkit_ms"] = record["cpu_ms"]
        values["largest_difference"] = compare(scores, record["scores"])
        ratios["nds_vs_devkit"] = record["cpu_ms"] / times["nds"].cpu_ms
    return Report("evaluation", values, ratios)


def make_truths(samples: int, boxes: int, seed: int = 0) -> BoxTable:
    """Return random truths of every class inside the range of their class; some velocities are unknown."""
    random = np.random.default_rng(seed)
    count = samples * boxes
    label = random.integers(0, len(DETECTION_CLASSES), count)
    reach = np.array([CLASS_RANGE[name] for name in DETECTION_CLASSES])[label]
    radius, angle = (
        reach * np.sqrt(random.random(count)) * 0.9,
        random.uniform(-np.pi, np.pi, count),
    )
    velocity = random.normal(scale=3, size=(count, 2))
    velocity[random.random(count) < 0.1] = np.nan
    return BoxTable(
        np.repeat(np.arange(samples), boxes),
        label,
        np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1),
        random.uniform(0.5, 6, (count, 3)),
        random.uniform(-np.pi, np.pi, count),
        velocity,
        _attributes(random, label),
        -np.ones(count),
        radius,
        np.zeros(count, bool),
    )


def make_predictions(truths: BoxTable, samples: int, boxes: int, seed: int = 1) -> BoxTable:
    """Return predictions, about half of them near a truth; scores have two digits, so that many are equal."""
    random = np.random.default_rng(seed)
    count = samples * boxes
    sample = np.repeat(np.arange(samples), boxes)
    near = random.random(count) < 0.5
    per_sample = len(truths) // samples
    source = sample * per_sample + random.integers(0, per_sample, count)
    label = np.where(near, truths.label[source], random.integers(0, len(DETECTION_CLASSES), count))
    reach = np.array([CLASS_RANGE[name] for name in DETECTION_CLASSES])[label]
    radius, angle = (
        reach * np.sqrt(random.random(count)) * 0.9,
        random.uniform(-np.pi, np.pi, count),
    )
    scattered = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    xy = np.where(near[:, None], truths.xy[source] + random.normal(scale=0.8, size=(count, 2)), scattered)
    size = np.where(near[:, None], truths.size[source], 2.0) * random.uniform(0.8, 1.2, (count, 3))
    yaw = truths.yaw[source] + random.normal(scale=0.3, size=count)
    velocity = np.nan_to_num(truths.velocity[source]) + random.normal(size=(count, 2))
    score = np.clip(random.normal(np.where(near, 0.6, 0.3), 0.2), 0.01, 0.99).round(2)
    return BoxTable(
        sample,
        label,
        xy,
        size,
        yaw,
        velocity,
        _attributes(random, label),
        score,
        np.hypot(*xy.T),
        np.zeros(count, bool),
    )


def make_street(seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Return a true and a predicted label volume of a street in the Occ3D grid, and eight ray origins on it."""
    random = np.random.default_rng(seed)
    truth = np.full(GRIDS["occ3d"].shape, FREE, np.uint8)
    truth[:, :, 2] = 11
    truth[:, 60:75, 2] = truth[:, 125:140, 2] = 13
    for side in (slice(20, 60), slice(140, 180)):
        for first in range(0, 200, 25):
            truth[first : first + int(random.integers(12, 23)), side, 2 : int(random.integers(10, 17))] = 15
    for _ in range(25):
        x, y = random.integers(5, 185), random.integers(62, 130)
        truth[x : x + 11, y : y + 5, 3:7] = 4
    for _ in range(30):
        x, y = random.integers(5, 195), random.integers(62, 138)
        truth[x : x + 2, y : y + 2, 3:13] = 16
    predicted = np.roll(truth, 1, 0)
    wrong = random.random(truth.shape) < 0.002
    predicted[wrong] = random.integers(0, FREE + 1, np.count_nonzero(wrong))
    origins = np.stack([np.linspace(-35, 35, ORIGINS), np.zeros(ORIGINS), np.full(ORIGINS, 1.84)], 1)
    return truth, predicted, origins.astype(np.float32)


def devkit_python() -> Path:
    """Return the Python of the devkit's environment; raises FileNotFoundError saying how to build it."""
    named = os.environ.get(DEVKIT_VARIABLE)
    path = Path(named) if named else Path(__file__).parents[3] / ".venv" / "devkit" / "bin" / "python"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no nuscenes-devkit to compare with; 'make devkit' builds its environment,"
            f" {DEVKIT_VARIABLE} names the Python of another one"
        )
    return path


def run_devkit(predictions: BoxTable, truths: BoxTable, samples: int) -> dict[str, Any]:
    """Let the devkit evaluate the same boxes in its own process: {cpu_ms, scores}.

    Raises:
        FileNotFoundError: there is no devkit.
        DevkitError: it failed, with its last words.
    """
    python = devkit_python()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "boxes.npz"
        _write_case(path, predictions, truths, samples)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)  # its packages are not ours
        done = subprocess.run(
            [str(python), devkit_loop.__file__, str(path)], capture_output=True, text=True, env=environment, check=False
        )
    if done.returncode:
        raise DevkitError(f"{python}: {done.stderr.strip()[-600:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def compare(ours: DetectionScores, theirs: dict[str, Any]) -> float:
    """Return the largest difference of any score; raises DevkitError naming one beyond the tolerance."""
    pairs = {"NDS": (ours.nds, theirs["nd_score"]), "mAP": (ours.mean_ap, theirs["mean_ap"])}
    for name in DETECTION_CLASSES:
        for threshold, ap in ours.ap[name].items():
            pairs[f"AP of {name} at {threshold}"] = ap, theirs["label_aps"][name][str(threshold)]
        for error in TP_ERRORS:
            want = theirs["label_tp_errors"][name][error]
            pairs[f"{error} of {name}"] = ours.tp_errors[name][error], math.nan if want is None else want
    worst = 0.0
    for name, (mine, want) in pairs.items():
        difference = 0.0 if math.isnan(mine) and math.isnan(want) else abs(mine - want)
        if not difference <= TOLERANCE:
            raise DevkitError(f"{name}: {mine} here, {want} in nuscenes-devkit")
        worst = max(worst, difference)
    return worst


def _attributes(random: np.random.Generator, label: NDArray[np.int64]) -> NDArray[np.int64]:
    without = np.isin(label, [DETECTION_CLASSES.index(n) for n in ("barrier", "traffic_cone")])
    drawn = random.integers(-1, len(ATTRIBUTES), len(label))
    return np.where(without, -1, drawn)


def _write_case(path: Path, predictions: BoxTable, truths: BoxTable, samples: int) -> None:
    arrays: dict[str, Any] = {
        "samples": samples,
        "classes": np.array(DETECTION_CLASSES),
        "attributes": np.array(ATTRIBUTES),
    }
    names = ("sample", "label", "xy", "size", "yaw", "velocity", "attribute", "score")
    for side, table in (("pred", predictions), ("gt", truths)):
        arrays |= {f"{side}_{name}": getattr(table, name) for name in names}
    np.savez(path, **arrays)
