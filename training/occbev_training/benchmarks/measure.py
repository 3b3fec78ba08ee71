"""What the training benches add to those of `occbev.benchmarks`: devices, speed-ups and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

from occbev.benchmarks import Timing


def bench_device() -> str:
    """Return where a bench runs: "cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def waiting(methods: Mapping[str, Callable[[], object]], device: str) -> dict[str, Callable[[], object]]:
    """Return the methods such that each call ends only when its work on the device is done."""
    return {name: _wait_after(method, device) for name, method in methods.items()}


def speedup(baseline: Timing, method: Timing, device: str = "cpu") -> float:
    """Return how many times faster a method is: by processor time, on other devices by the clock."""
    if device == "cpu":
        return baseline.cpu_ms / method.cpu_ms
    return baseline.wall_ms / method.wall_ms


def peak_bytes(method: Callable[[], object]) -> int:
    """Return the most memory on the CPU that one call holds at a time, its result included.

    Counts what torch allocates, in order of allocation; what was there before does not count.
    """
    method()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = method()
    del result
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _wait_after(method: Callable[[], object], device: str) -> Callable[[], object]:
    def call() -> object:
        result = method()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return call
