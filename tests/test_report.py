"""The report page stands alone, shows every number it was given, and escapes what it did not write."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from occbev.classes import FREE, FREE_STATE, OCCUPANCY_CLASSES, OCCUPIED_STATE
from occbev.cli import demo
from occbev.grid import VoxelGrid
from occbev.reports.report import About, FrameLatency, Scene, write_report
from occbev.reports.space import Panel, space_element, unpack_voxels
from occbev.results import Boxes3D, Occupancy

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


def noise(grid: VoxelGrid, share: float = 0.05) -> Occupancy:
    generator = np.random.default_rng(3)
    occupied = generator.random(grid.shape) < share
    label = np.where(occupied, generator.integers(0, FREE, grid.shape), FREE).astype(np.uint8)
    state = np.where(occupied, OCCUPIED_STATE, FREE_STATE).astype(np.uint8)
    return Occupancy(label, occupied.astype(np.float32), state, grid)


def embedded(text: str) -> dict[str, Any]:
    """What the page's script reads, by the rules of HTML: up to the first end of a script element."""
    return json.loads(re.search(r'<script type="application/json">(.*?)</script', text, re.DOTALL)[1])  # type: ignore[index]


@pytest.mark.parametrize("shape", [(40, 50, 8), (300, 20, 4)])
def test_the_page_holds_the_very_voxels_and_boxes_that_it_was_given(shape: tuple[int, int, int]) -> None:
    grid = VoxelGrid((-10.0, -20.0, -1.0), (0.5, 0.8, 0.4), shape)
    given, known = noise(grid), np.random.default_rng(4).random(shape) < 0.5
    boxes = Boxes3D(
        np.array([[10, -3, 0.8, 4.5, 1.9, 1.6, 2.9, 5, np.nan]], np.float32), np.array([8]), np.ones(1, np.float32)
    )
    data = embedded(space_element([[Panel("Prediction", given, boxes, known), Panel("Truth", given)]]))
    first, second = data["moments"][0]
    index, label, is_known = unpack_voxels(first["voxels"], shape)
    at = tuple(index.T)
    found = np.full(shape, FREE, np.uint8)
    found[at] = label
    np.testing.assert_array_equal(found, given.label)
    np.testing.assert_array_equal(is_known, known[at])
    assert len(index) == (given.state == OCCUPIED_STATE).sum()
    assert first["grid"] == {"lo": [-10.0, -20.0, -1.0], "pitch": [0.5, 0.8, 0.4], "shape": list(shape)}
    np.testing.assert_allclose(first["boxes"], [[10, -3, 0.8, 4.5, 1.9, 1.6, 2.9, 8, 1]], atol=1e-3)
    assert data["classes"][data["boxLabels"][8]] == "pedestrian"
    assert not unpack_voxels(second["voxels"], shape)[2].any()
    assert (first["hasKnown"], second["hasKnown"], second["boxes"]) == (True, False, [])


def test_voxels_without_classes_have_the_colour_of_their_height() -> None:
    grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 4, 3))
    bare = Occupancy(**{**vars(noise(grid, 0.5)), "has_classes": False})
    panel = embedded(space_element([[Panel("Voxels", bare)]]))["moments"][0][0]
    assert len(panel["heights"]) == 3
    assert len({tuple(colour) for colour in panel["heights"]}) == 3


def test_a_page_keeps_its_size_by_leaving_out_moments_evenly(tmp_path: Path, summary: dict[str, Any]) -> None:
    volume = noise(VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (60, 60, 8)), 0.5)
    scenes = [Scene(float(i), (), (Panel("Prediction", volume), Panel("Truth", volume))) for i in range(11)]
    path = tmp_path / "report.html"
    write_report(path, summary, scenes, [])
    whole = path.stat().st_size
    assert path.read_text().count("class=scene ") == 11
    write_report(path, summary, scenes, [], max_bytes=whole // 2)
    text = path.read_text()
    assert path.stat().st_size <= whole // 2
    times = [float(time) for time in re.findall(r'data-time="([\d.]+)"', text)]
    assert (times[0], times[-1]) == (0.0, 10.0)
    assert 3 <= len(times) == len(embedded(text)["moments"]) < 11
    assert max(np.diff(times)) <= 2 * min(np.diff(times))


def test_no_title_or_text_ends_the_script_or_becomes_markup(tmp_path: Path, summary: dict[str, Any]) -> None:
    hostile = "</script><script>alert(1)</script>&"
    volume = noise(VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 4, 2)))
    scenes = [Scene(0.0, ((("<img onerror=x>", np.zeros((4, 4, 3), np.uint8)),),), (Panel(hostile, volume),))]
    write_report(tmp_path / "report.html", summary, scenes, [], About(hostile, hostile))
    text = (tmp_path / "report.html").read_text()
    assert "alert(1)</script>" not in text
    assert "<img onerror" not in text
    assert embedded(text)["moments"][0][0]["title"] == hostile
    assert text.count("<script") == 2


def test_a_drive_without_truth_is_shown_without_scores(tmp_path: Path, summary: dict[str, Any]) -> None:
    del summary["detection"], summary["occupancy"]
    text, structure = page(tmp_path, summary, [scene(0.0)])
    assert "truth of this drive is not known" in text
    assert "IoU" not in text
    assert "table" in structure.tags


def test_every_class_name_is_shown_by_its_label(tmp_path: Path) -> None:
    data = embedded(space_element([]))
    assert data["classes"] == [name.replace("_", " ") for name in OCCUPANCY_CLASSES[:FREE]]
    assert len(data["colours"]) == FREE


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


def test_no_style_of_the_page_sizes_the_bars_of_a_chart(tmp_path: Path, summary: dict[str, Any]) -> None:
    text, _ = page(tmp_path, summary, [])
    kinds = set(re.findall(r'<rect class="(\w+)"', text))
    assert kinds == {"part", "total"}
    for kind in kinds:
        rules = re.findall(rf"\.{kind}\b[^{{}}]*\{{([^}}]*)\}}", text)
        assert rules
        assert not any("height" in rule for rule in rules), "it holds for rectangles, too"


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
