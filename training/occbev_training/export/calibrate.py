"""Put a calibration of space into a package: the curves, their picture, and what they are worth on the card."""

from __future__ import annotations

from typing import Any

from occbev.inference.model_package import ModelPackage, write_package
from occbev.inference.space_calibration import FILE_NAME
from occbev_training.evaluation.space import SpaceFit, draw_reliability

PICTURE = "reliability.png"

HEADING = "\n## How sure it is\n"


def write_calibration(package: ModelPackage, fit: SpaceFit) -> dict[str, Any]:
    """Write a calibration into a package and seal it again; returns what its `metrics` then say of it."""
    record = fit.as_record()
    fit.calibration.save(package.folder / FILE_NAME)
    draw_reliability(fit, package.folder / PICTURE)
    card = package.folder / "README.md"
    text = card.read_text() if card.is_file() else f"# {package.model.name}\n"
    card.write_text(text.split(HEADING)[0].rstrip("\n") + "\n" + HEADING + _section(record))
    write_package(package.folder, package.model, package.provenance, {**package.metrics, "space": record})
    return record


def _section(record: dict[str, Any]) -> str:
    return f"""
Fitted on {record["fitted_on"]}. Expected calibration error: how far a stated probability is from the truth.

| | as the network says | calibrated |
|---|---|---|
| a voxel is occupied | {record["voxels_ece"]:.3f} | {record["voxels_ece_calibrated"]:.3f} |
| a cell holds an obstacle | {record["obstacles_ece"]:.3f} | {record["obstacles_ece_calibrated"]:.3f} |

![How often it is so, for every probability that the network says, by distance]({PICTURE})

Dots are what was counted, lines the calibration. It is stored in `{FILE_NAME}`; without that file the ground grid
takes the network's word.
"""
