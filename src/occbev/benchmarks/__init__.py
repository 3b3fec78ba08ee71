"""Speed benchmarks: each method beside its baselines in one process, rounds interleaved, medians and ratios.

Each benchmark is a module here with `run(options) -> Report`; nothing in the stack depends on one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from occbev.versions import machine


@dataclass(frozen=True)
class Options:
    """Options of every benchmark.

    rounds: how often each method runs. model: name or folder of a model package. threads: of runtimes, None for their choice.
    """

    rounds: int = 20
    model: str = "occbev-tiny"
    threads: int | None = None


@dataclass(frozen=True)
class LiveOptions(Options):
    """Further options of the live benchmark.

    size: (width, height) of the cameras. cameras: how many. rate: image sets a second. seconds: how long they are played.
    """

    size: tuple[int, int] = (1600, 900)
    cameras: int = 6
    rate: float = 10.0
    seconds: float = 15.0

    def __post_init__(self) -> None:
        if self.cameras < 1 or self.rate <= 0 or self.seconds * self.rate < 2:
            raise ValueError(
                f"--cameras {self.cameras}, --rate {self.rate:g} and --seconds {self.seconds:g}: "
                "want a camera and at least two image sets"
            )


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one method: median of wall clock and of this process's CPU time, and the 95th percentile."""

    wall_ms: float
    cpu_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Report:
    """What a benchmark found. values: in the unit that the key names. ratios: baseline over ours, above 1 is faster.

    heading, command: of its section in a Markdown file, where the benchmark's name and `--rounds` do not say what ran.
    """

    bench: str
    values: Mapping[str, Any]
    ratios: Mapping[str, float] = field(default_factory=dict)
    heading: str = ""
    command: str = ""

    def as_record(self) -> dict[str, Any]:
        """The report as plain values, with the machine that it holds for."""
        return {
            "bench": self.bench,
            "machine": machine(),
            "values": dict(self.values),
            "ratios": dict(self.ratios),
        }


def run_interleaved(methods: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time methods round-robin after one unmeasured round, so that a busy moment hits all of them."""
    wall: dict[str, list[float]] = {name: [] for name in methods}
    cpu: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            method()
            if number:
                wall[name].append(1e3 * (time.perf_counter() - start))
                cpu[name].append(1e3 * (time.process_time() - start_cpu))
    return {
        name: Timing(float(np.median(wall[name])), float(np.median(cpu[name])), float(np.percentile(wall[name], 95)))
        for name in methods
    }
