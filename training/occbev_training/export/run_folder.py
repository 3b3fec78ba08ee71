"""The folder of a training run as the origin of a package: its model, its weights, and the text of its card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occbev.config import ConfigError, ModelConfig
from occbev.files import read_yaml
from occbev.inference.families import load_model

STAGE_KEYS = {"pretrain": "stage_1", "finetune": "stage_2"}
"""Stage of a run -> key of the provenance that tells of it."""

TASKS = {
    "pretrain": "three-state occupancy from LiDAR, and depth",
    "finetune": "boxes and semantic occupancy",
}


@dataclass(frozen=True)
class FinishedRun:
    """What a run left for a package. metrics: its last scores on validation drives, if it had any."""

    model: ModelConfig
    weights: Path
    provenance: dict[str, Any]
    metrics: dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / "run.json").is_file()


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        ConfigError: the run is not finished, or run.json is damaged; names the file.
    """
    weights = folder / "weights.safetensors"
    if not weights.is_file():
        raise ConfigError(f"{folder}: the run is not finished: it has no weights.safetensors; give its command again")
    record = _read_json(folder / "run.json")
    lines = _read_lines(folder / "metrics.jsonl")
    steps = max((int(line["step"]) for line in lines), default=0)
    scores = next(({"step": line["step"], **line["validation"]} for line in lines[::-1] if "validation" in line), None)
    return FinishedRun(
        load_model(folder / "model.yaml"),
        weights,
        _provenance(folder, record, steps),
        {} if scores is None else {"validation": scores},
    )


def _provenance(folder: Path, record: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return what the card says of the training: data, steps, seed, first weights, versions."""
    stage, drives = record["stage"], record["drives"]
    data = Path(str(read_yaml(folder / "inputs.yaml").get("data"))).name
    told = {
        "task": TASKS[stage],
        "steps": steps,
        "drives": len(drives),
        "samples": record["samples"],
        "seed": record["seed"],
        "data_hash": record["data_hash"],
        "begun_from": {key: value for key, value in record["begun_from"].items() if key in ("start", "sha256")},
        "versions": record["versions"],
    }
    return {"data": f"{len(drives)} drives of {data}", STAGE_KEYS[stage]: told}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    missing = {"stage", "drives", "samples", "seed", "data_hash", "begun_from", "versions"} - set(record)
    if missing:
        raise ConfigError(f"{path}: {', '.join(sorted(missing))} is missing; the folder is of another version")
    return dict(record)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
    return lines
