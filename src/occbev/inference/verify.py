"""Compare a runtime on this machine with ONNX Runtime on the CPU in single precision, and time it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from occbev.inference.backend import Backend, RunSettings, load_backend
from occbev.inference.example_inputs import Arrays, example_inputs, relative_difference
from occbev.inference.model_package import ModelPackage, PackageError

SEEDS = (0, 1)
"""Inputs that are compared: of a first frame, and of one that follows another."""

LIMITS = {"f32": 1e-3, "auto": 0.2}
"""Largest difference of an output by precision, relative to its largest value; auto may be fp16 or int8."""


@dataclass(frozen=True)
class Verification:
    """What was measured of a runtime.

    device: in words. differences: output -> largest difference relative to its largest value; of classes the share that
    differs. latency_ms, p95_ms: of one run with its copies, median and 95th percentile of `rounds`.
    """

    device: str
    cameras: int
    differences: Mapping[str, float]
    latency_ms: float
    p95_ms: float
    rounds: int

    def problems(self, limit: float) -> list[str]:
        """Say which outputs are further off than a limit, or not finite; classes may differ in a share of it."""
        return [
            f"{name} differs by {difference:.2g}, at most {limit:g} is allowed"
            for name, difference in self.differences.items()
            if not difference <= limit
        ]


def verify(package: ModelPackage, runtime: str, settings: RunSettings, cameras: int, rounds: int) -> Verification:
    """Run a package on a runtime and on the reference, on rings of cameras that see noise.

    Raises: BackendError if the runtime cannot load it, PackageError if the package has no ONNX graph.
    """
    if not package.has("model.onnx"):
        raise PackageError(f"{package.folder}: holds no model.onnx to compare with; it has {sorted(package.files)}")
    backend = load_backend(package, cameras, runtime, settings)
    reference = load_backend(package, cameras, "onnxruntime", RunSettings(precision="f32", provider="cpu"))
    worst: dict[str, float] = {}
    for seed in SEEDS if package.model.past_frames else SEEDS[:1]:
        wanted = reference.run(example_inputs(package.model, reference.form, cameras, seed))
        inputs = example_inputs(package.model, backend.form, cameras, seed)
        found = backend.run(inputs)
        for name in wanted.keys() & found.keys():
            difference = relative_difference(wanted[name], found[name])
            worst[name] = float(np.fmax(worst.get(name, 0.0), difference) if np.isfinite(difference) else np.nan)
    times = _time_runs(backend, inputs, rounds)
    median, p95 = np.percentile(times, [50, 95])
    return Verification(backend.device, cameras, dict(sorted(worst.items())), float(median), float(p95), rounds)


def _time_runs(backend: Backend, inputs: Arrays, rounds: int) -> list[float]:
    """Return how many milliseconds each run took, after three that do not count."""
    times = []
    for _ in range(rounds + 3):
        begun = time.perf_counter()
        backend.run(inputs)
        times.append(1e3 * (time.perf_counter() - begun))
    return times[3:]
