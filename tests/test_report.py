"""The report page stands alone, shows every number it was given, and escapes what it did not write."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from occbev.cli import demo
from occbev.reports.report import FrameLatency, Scene, write_report

AP = {"car": {"0.5": 0.11, "1.0": 0.22, "2.0": 0.33, "4.0": 0.44}}
NONE = {"bus": dict.fromkeys(AP["car"], 0.0)}


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        "frames_in": 100,
        "frames_processed": 98,
        "drops": {"superseded": 2, "stale": 0},
        "published": {"/perception/output/objects": 98},
        "rate_hz": 4.9,
        "latency_ms": {"inference": {"p50": 90, "p95": 120}, "total": {"p50": 150, "p95": 210}},
        "detection": {
            "mAP": 0.123,
            "NDS": 0.234,
            "AP": AP | NONE,
            "AP_30m": AP | NONE,
            "AP_30m_prior": {"car": dict.fromkeys(AP["car"], 0.07)},
        },
        "occupancy": {"iou": 0.35, "iou_mean_of_training_set": 0.21, "mIoU": 0.15},
        "versions": {"<b>occbev</b>": "0.1.0"},
    }


class Structure(HTMLParser):
    """Collects tags and what they point at."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]


def page(tmp_path: Path, summary: dict[str, Any], scenes: list[Scene]) -> tuple[str, Structure]:
    frames = [FrameLatency(0.2 * i, None if i == 7 else 150.0 + i) for i in range(20)]
    write_report(tmp_path / "report.html", summary, scenes, frames)
    text = (tmp_path / "report.html").read_text()
    structure = Structure()
    structure.feed(text)
    return text, structure


def scene(time: float) -> Scene:
    picture = np.full((20, 40, 3), 128, np.uint8)
    return Scene(time, ((("six cameras", picture),), (("truth", picture), ("predicted", picture))))


def test_everything_is_inside_the_page(tmp_path: Path, summary: dict[str, Any]) -> None:
    text, structure = page(tmp_path, summary, [scene(0.0), scene(1.0)])
    assert structure.tags.count("img") == 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in structure.sources)
    assert not re.search(r"https?://|url\(", text)


def test_numbers_are_shown_beside_what_they_must_beat(tmp_path: Path, summary: dict[str, Any]) -> None:
    text, _ = page(tmp_path, summary, [scene(0.0)])
    for shown in (
        "98 of 100",
        "2 superseded",
        "4.9 Hz",
        "150 ms",
        "0.33",
        "mean scores 0.07",
        "mean grid scores 0.21",
        "0.123",
        "0.234",
    ):
        assert shown in text
    assert "stale" not in re.search(r"<section class=tiles>.*?</section>", text)[0]  # type: ignore[index]


def test_classes_without_any_score_are_left_out(tmp_path: Path, summary: dict[str, Any]) -> None:
    text, _ = page(tmp_path, summary, [])
    assert "<th scope=row>car</th>" in text
    assert "<th scope=row>bus</th>" not in text


def test_dropped_frames_are_marked(tmp_path: Path, summary: dict[str, Any]) -> None:
    text, _ = page(tmp_path, summary, [])
    assert (text.count('class="dropped"'), text.count("<circle")) == (1, 19)


def test_text_from_outside_is_escaped(tmp_path: Path, summary: dict[str, Any]) -> None:
    text, _ = page(tmp_path, summary, [])
    assert "&lt;b&gt;occbev&lt;/b&gt;" in text
    assert "<b>occbev" not in text


def test_a_run_without_results_still_makes_a_page(tmp_path: Path, summary: dict[str, Any]) -> None:
    summary |= {
        "frames_processed": 0,
        "latency_ms": {},
        "detection": {"mAP": 0.0, "NDS": 0.0, "AP": {}},
    }
    summary["occupancy"] = {"iou": float("nan"), "iou_mean_of_training_set": None, "mIoU": 0.0}
    text, _ = page(tmp_path, summary, [])
    assert "No frame was processed" in text


def test_a_demo_that_is_too_fast_for_the_machine_says_so() -> None:
    summary = {
        "frames_in": 100,
        "frames_processed": 40,
        "drops": {"replaced_by_newer": 60},
        "drive": {"sets of images per second": 5.0},
    }
    said = demo.too_fast(summary)
    assert said is not None
    assert "5.0 sets a second, of which it processed 2.0" in said
    assert "60 were replaced" in said
    assert said.endswith("--key-rate 1.8")
    assert demo.too_fast(summary | {"drops": {"replaced_by_newer": 4}}) is None
    assert demo.too_fast(summary | {"frames_processed": 0}) is None
