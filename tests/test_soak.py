"""The account of a long run finds what grew, and only that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from occbev.reports.soak import Sample, Watch, account, sample

SPAN = (0, 600_000_000_000)


def samples(**slopes: float) -> list[Sample]:
    """One a second for ten minutes; what is named grows from its first value by this share."""
    made = []
    for second in range(600):
        grown = {name: 1 + slope * second / 600 for name, slope in slopes.items()}
        made.append(
            Sample(
                second * 10**9,
                400 * grown.get("rss", 1),
                round(30 * grown.get("threads", 1)),
                round(50 * grown.get("files", 1)),
            )
        )
    return made


def lines(slope: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            "stamp_ns": i,
            "outcome": "processed",
            "published_ns": i * 10**8,
            "stages_ms": {"total": (100 + i % 10) * (1 + slope * i / 6000)},
        }
        for i in range(6000)
    ]


def test_a_steady_run_breaks_nothing() -> None:
    record = account(samples(), lines(), SPAN)
    assert record["broken"] == []
    assert record["growth"] == {"rss": 0, "threads": 0, "files": 0, "latency_p99_ratio": 1}
    assert (record["first"]["seconds"], record["first"]["results"]) == (60, 600)


@pytest.mark.parametrize(
    ("grown", "slope", "text"),
    [
        ({"rss": 0.05}, 0.0, "resident memory grew by 4."),
        ({"threads": 0.1}, 0.0, "3 more threads"),
        ({"files": 0.1}, 0.0, "more files"),
        ({}, 0.5, "the 99th percentile of latency rose 1.4"),
    ],
)
def test_what_grows_is_named(grown: dict[str, float], slope: float, text: str) -> None:
    (broken,) = account(samples(**grown), lines(slope), SPAN)["broken"]
    assert text in broken


def test_the_course_of_memory_is_told_by_the_minute() -> None:
    course = account(samples(rss=0.1), lines(), SPAN)["rss_mb_by_minute"]
    assert len(course) == 10
    assert course == sorted(course)
    assert course[0] == pytest.approx(402, abs=0.5)
    assert course[-1] == pytest.approx(438, abs=0.5)


def test_a_short_run_compares_shares_of_itself() -> None:
    record = account(samples()[:60], lines()[:600], (0, 60 * 10**9))
    assert record["first"]["seconds"] == 15


def test_a_run_without_results_says_nothing() -> None:
    with pytest.raises(ValueError, match="0 results: run longer"):
        account(samples(), [], SPAN)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_is_watched_until_it_ends() -> None:
    assert sample(os.getpid()).rss_mb > 1
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Watch(process.pid, interval_s=0.01) as watch:
        while len(watch.samples) < 3:
            time.sleep(0.01)
        process.communicate(b"\n")
    assert watch.samples[0].threads == 1
    with pytest.raises(OSError, match=f"{process.pid}"):
        sample(process.pid)
