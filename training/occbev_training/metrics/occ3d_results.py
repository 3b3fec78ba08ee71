"""Voxel results in the form of the Occ3D challenge: one `<sample token>.npz` of (X, Y, Z) uint8 classes a frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occbev.classes import OCCUPANCY_CLASSES
from occbev.files import ArraysError, read_arrays
from occbev_training.metrics.nuscenes_results import ResultsError

ARRAY = "arr_0"
"""Name that `numpy.savez_compressed(path, labels)` gives, which the challenge's own code writes."""

KNOWN_ARRAYS = (ARRAY, "semantics", "pred")


def write_occupancy(folder: Path, token: str, label: NDArray[np.uint8]) -> Path:
    """Write the voxel classes (X, Y, Z) of one sample, 17 = free; a slash in its name becomes a hyphen."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{token.replace('/', '-')}.npz"
    np.savez_compressed(path, label.astype(np.uint8))
    return path


def result_tokens(folder: Path) -> set[str]:
    """Return the samples that `read_occupancy` would find in a folder."""
    nested = {path.parent.name for path in folder.glob("*/*/*.npz")}
    return nested | {path.stem for path in folder.glob("*.npz")}


def read_occupancy(
    folder: Path, token: str, shape: tuple[int, ...], classes: int = len(OCCUPANCY_CLASSES)
) -> NDArray[np.uint8]:
    """Read what `write_occupancy` or another code's export of the challenge wrote.

    Found as `<token>.npz` or `<scene>/<token>/labels.npz`; the array is arr_0, semantics or pred.
    Raises:
        ResultsError: no such file, no such array, another shape, or a value that is no class.
    """
    path = folder / f"{token.replace('/', '-')}.npz"
    if not path.is_file():
        nested = sorted(folder.glob(f"*/{token}/*.npz"))
        if not nested:
            raise ResultsError(f"{folder}: no {token}.npz; the folder must hold one file for every sample")
        path = nested[0]
    try:
        arrays = read_arrays(path)
    except ArraysError as error:
        raise ResultsError(str(error)) from error
    name = next((n for n in KNOWN_ARRAYS if n in arrays), None)
    if name is None:
        raise ResultsError(f"{path}: holds {sorted(arrays)}, want one of {KNOWN_ARRAYS}")
    label = arrays[name]
    if label.shape != tuple(shape) or not np.issubdtype(label.dtype, np.integer):
        raise ResultsError(f"{path}: {label.dtype} {label.shape}, want integers {tuple(shape)} [x, y, z]")
    if label.size and (label.min() < 0 or label.max() >= classes):
        raise ResultsError(f"{path}: class {label.max()}, classes are 0 to {classes - 1}")
    return label.astype(np.uint8)
