"""Put a calibration of space into a package: the curves, their picture, and the calibration errors on its card."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from occbev.inference.model_package import ModelPackage, write_package
from occbev.inference.space_calibration import FILE_NAME
from occbev_training.evaluation.space import SpaceFit, draw_reliability
from occbev_training.export.package import CARD, PARTIAL

PICTURE = "reliability.png"

HEADING = "\n## Calibration of probabilities\n"
HEADINGS = re.compile(rf"{HEADING}|\n## How sure it is\n")
"""The section of a card, as it is called now and in older packages."""


def write_calibration(package: ModelPackage, fit: SpaceFit) -> dict[str, Any]:
    """Write a calibration into a package and seal it again; returns what its `metrics` then say of it."""
    record = fit.as_record()
    card = package.folder / CARD
    text = card.read_text() if card.is_file() else f"# {package.model.name}\n"
    with tempfile.TemporaryDirectory(dir=package.folder, prefix=PARTIAL) as partial:  # slow work comes first
        folder = Path(partial)
        fit.calibration.save(folder / FILE_NAME)
        draw_reliability(fit, folder / PICTURE)
        (folder / CARD).write_text(HEADINGS.split(text)[0].rstrip("\n") + "\n" + HEADING + _section(record))
        for path in sorted(folder.iterdir()):
            os.replace(path, package.folder / path.name)
    write_package(package.folder, package.model, package.provenance, {**package.metrics, "space": record})
    return record


def _section(record: dict[str, Any]) -> str:
    return f"""
Fitted on {record["fitted_on"]}. Expected calibration error (mean distance of predicted probability and measured frequency):

| probability that | network | calibrated |
|---|---|---|
| a voxel is occupied | {record["voxels_ece"]:.3f} | {record["voxels_ece_calibrated"]:.3f} |
| a cell holds an obstacle | {record["obstacles_ece"]:.3f} | {record["obstacles_ece_calibrated"]:.3f} |

![Measured frequency against predicted probability, by distance]({PICTURE})

Dots are measured, lines are the calibration. It is stored in `{FILE_NAME}`; without that file the ground grid uses the
network's probabilities.
"""
