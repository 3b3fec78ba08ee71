"""Summary of a long run: memory, threads, files and latency at its beginning beside those at its end; no ROS."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from occbev.reports.summaries import PROCESSED

MEMORY_GROWTH, LATENCY_RATIO = 0.02, 1.2
"""Most that resident memory may grow and the 99th percentile of latency may rise, from the first window to the last."""

SETTLE_S, SETTLE_SHARE = 30.0, 0.1
"""What is left out at the beginning, while caches fill: seconds, and share of a short run."""

WINDOW_S, WINDOW_SHARE = 60.0, 0.25
"""Length of the first and the last window: seconds, and share of a short run."""


@dataclass(frozen=True)
class Sample:
    """A process at one moment. at_ns: steady clock. rss_mb: resident memory. files: open file descriptors."""

    at_ns: int
    rss_mb: float
    threads: int
    files: int


def sample(pid: int) -> Sample:
    """Look at a process; Linux only. Raises OSError where it has ended."""
    folder = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    if "VmRSS" not in fields:
        raise ProcessLookupError(f"process {pid} has ended")
    return Sample(
        time.monotonic_ns(),
        int(fields["VmRSS"].split()[0]) / 1024,
        int(fields["Threads"]),
        len(list((folder / "fd").iterdir())),
    )


class Watch:
    """Samples a process every second in a thread of its own, as a context."""

    def __init__(self, pid: int, interval_s: float = 1.0) -> None:
        self.samples: list[Sample] = []
        self._pid, self._interval_s = pid, interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            try:
                self.samples.append(sample(self._pid))
            except OSError:
                return


def account(samples: Sequence[Sample], lines: Sequence[Mapping[str, Any]], span_ns: tuple[int, int]) -> dict[str, Any]:
    """Compare the first window of a run with the last.

    lines: the node's frame log. span_ns: when playing began and ended, on the steady clock.
    Returns: `first` and `last` window, `growth` between them, `broken`: the limits that do not hold, in words;
        `rss_mb_by_minute`, from which a leak can be told from memory that is taken once.
    Raises:
        ValueError: the run was too short to say anything.
    """
    begin, end = span_ns
    length = end - begin
    settled = begin + min(SETTLE_S * 1e9, SETTLE_SHARE * length)
    window = min(WINDOW_S * 1e9, WINDOW_SHARE * length)
    first = _window(samples, lines, settled, settled + window)
    last = _window(samples, lines, end - window, end)
    growth = {
        "rss": round(last["rss_mb"] / first["rss_mb"] - 1, 4),
        "threads": last["threads"] - first["threads"],
        "files": last["files"] - first["files"],
        "latency_p99_ratio": round(last["latency_p99_ms"] / first["latency_p99_ms"], 3),
    }
    minutes = [_rss_mb(samples, at, at + 60e9) for at in np.arange(begin, end, 60e9)]
    course = {"rss_mb_by_minute": [mb for mb in minutes if mb is not None]}
    return {"first": first, "last": last, "growth": growth, "broken": _find_broken(growth), **course}


def _rss_mb(samples: Sequence[Sample], begin: float, end: float) -> float | None:
    """Return the median between two times, None where there is no sample."""
    own = [s.rss_mb for s in samples if begin <= s.at_ns < end]
    return round(float(np.median(own)), 1) if own else None


def _window(samples: Sequence[Sample], lines: Sequence[Mapping[str, Any]], begin: float, end: float) -> dict[str, Any]:
    own = [s for s in samples if begin <= s.at_ns < end]
    done = [n for n in lines if n["outcome"] == PROCESSED and begin <= n["published_ns"] < end]
    if not own or not done:
        raise ValueError(
            f"the window of {(end - begin) / 1e9:.0f} s holds {len(own)} samples and {len(done)} results: run longer"
        )
    return {
        "seconds": round((end - begin) / 1e9, 1),
        "rss_mb": round(float(np.median([s.rss_mb for s in own])), 1),
        "threads": max(s.threads for s in own),
        "files": max(s.files for s in own),
        "results": len(done),
        "latency_p50_ms": _percentile(done, 50),
        "latency_p99_ms": _percentile(done, 99),
    }


def _percentile(done: Sequence[Mapping[str, Any]], share: int) -> float:
    return round(float(np.percentile([line["stages_ms"]["total"] for line in done], share)), 2)


def _find_broken(growth: Mapping[str, float]) -> list[str]:
    broken = []
    if growth["rss"] >= MEMORY_GROWTH:
        broken.append(f"resident memory grew by {growth['rss']:.1%}, limit {MEMORY_GROWTH:.0%}")
    broken += [f"{growth[name]} more {name} at the end" for name in ("threads", "files") if growth[name] > 0]
    if growth["latency_p99_ratio"] > LATENCY_RATIO:
        broken.append(
            f"the 99th percentile of latency rose {growth['latency_p99_ratio']:.2f} times, limit {LATENCY_RATIO}"
        )
    return broken
