"""A self-contained page of one run: what the node saw and published, how well, how fast, and with what.

Takes finished pictures, voxels, boxes and numbers. Charts are SVG in the page, and `space` draws voxels and boxes in 3D.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.reports.space import Panel, panel_record, script_json, space_of_records, space_script

Image = NDArray[np.uint8]

JPEG_QUALITY = 85
CHART_WIDTH = 1080

MAX_BYTES = 12_000_000
"""Largest page; moments are left out, evenly, until it is kept."""


@dataclass(frozen=True)
class Scene:
    """One moment: its time in the drive, row by row captioned (H, W, 3) uint8 RGB pictures, and what is shown in 3D."""

    time: float
    rows: tuple[tuple[tuple[str, Image], ...], ...]
    panels: tuple[Panel, ...] = ()


@dataclass(frozen=True)
class About:
    """Title and introduction of a page."""

    title: str
    text: str


DEMO = About(
    "occbev demo",
    "A simulated drive that the network never saw, played as a ROS 2 bag over real DDS through the perception node. "
    "Everything below was published by the node, recorded, and scored against the simulator's truth. "
    "The weights were trained on simulated streets only.",
)


@dataclass(frozen=True)
class FrameLatency:
    """When one frame's key time was in the drive, and how many milliseconds its result took; None = dropped."""

    time: float
    total_ms: float | None


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    scenes: Sequence[Scene],
    frames: Sequence[FrameLatency],
    about: About = DEMO,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Write the page; `summary` is what `summary.json` holds, without "detection" and "occupancy" where nothing was scored.

    max_bytes: how large the page may become; scenes are left out evenly until it is kept.
    """
    before, after = _tiles(summary), [_latency(summary, frames), _accuracy(summary), _facts(summary)]
    scripts = space_script() + _SCRIPT
    title, intro = _text(about.title), _text(about.text)
    rest = sum(len(text.encode()) for text in (before, *after, scripts, _STYLE, _PAGE, title, intro)) + 20_000
    viewer = _viewer(_fitting([_packed(scene) for scene in scenes], max_bytes - rest))
    body = "\n".join([before, viewer, *after])
    page = _PAGE.format(title=title, intro=intro, style=_STYLE, body=body, script=scripts)
    path.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class _Packed:
    """A scene as HTML and as records of its panels. size: bytes of both."""

    time: float
    html: str
    panels: list[dict[str, Any]]
    size: int


def _packed(scene: Scene) -> _Packed:
    text = _scene(scene)
    panels = [panel_record(panel) for panel in scene.panels]
    return _Packed(scene.time, text, panels, len(text.encode()) + len(script_json(panels)))


def _fitting(scenes: Sequence[_Packed], max_bytes: int) -> list[_Packed]:
    """Leave out scenes evenly until the others fit."""
    for count in range(len(scenes), 0, -1):
        chosen = [scenes[i] for i in np.unique(np.linspace(0, len(scenes) - 1, count).round().astype(int))]
        if sum(scene.size for scene in chosen) <= max_bytes:
            return chosen
    return []


def _tiles(summary: Mapping[str, Any]) -> str:
    total = summary["latency_ms"].get("total", {})
    tiles = [
        ("Frames processed", f"{summary['frames_processed']} of {summary['frames_in']}", _drops(summary)),
        ("Rate", f"{_number(summary['rate_hz'], 1)} Hz", "results per second"),
        (
            "Latency",
            f"{_number(total.get('p50'), 0)} ms",
            f"median; {_number(total.get('p95'), 0)} ms at the 95th percentile",
        ),
        *_score_tiles(summary),
    ]
    cells = "".join(
        f"<div class=tile><span>{_text(name)}</span><strong>{_text(value)}</strong><small>{_text(note)}</small></div>"
        for name, value, note in tiles
    )
    return f"<section class=tiles>{cells}</section>"


def _score_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if "detection" not in summary or "occupancy" not in summary:
        return []
    occupancy = summary["occupancy"]
    car, prior = _car_ap(summary, "AP_30m"), _car_ap(summary, "AP_30m_prior")
    mean = _number(occupancy.get("iou_mean_of_training_set"), 2)
    return [
        ("Car AP, 2 m", _number(car, 2), f"within 30 m; the training set's mean scores {_number(prior, 2)}"),
        ("Occupancy IoU", _number(occupancy["iou"], 2), f"the training set's mean grid scores {mean}"),
    ]


def _drops(summary: Mapping[str, Any]) -> str:
    dropped = {reason: count for reason, count in summary["drops"].items() if count}
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"


def _car_ap(summary: Mapping[str, Any], key: str) -> float | None:
    value = summary["detection"].get(key, {}).get("car", {}).get("2.0")
    return None if value is None else float(value)


def _viewer(scenes: Sequence[_Packed]) -> str:
    """All scenes, one visible at a time, with a slider and a play button."""
    if not scenes:
        return "<section><p>No frame was processed, so there is nothing to show.</p></section>"
    pages = "".join(_shown(scene, index == 0) for index, scene in enumerate(scenes))
    space = space_of_records([scene.panels for scene in scenes]) if any(scene.panels for scene in scenes) else ""
    hint = "<p>Drag to turn, Shift and drag to move, wheel or two fingers to zoom.</p>" if space else ""
    last = len(scenes) - 1
    return (
        "<section><h2>Cameras and results</h2>"
        "<div class=controls><button id=play type=button>Play</button>"
        f'<input id=slider type=range min=0 max={last} value=0 aria-label="Time">'
        f"<output id=clock></output></div>{space}{hint}<div id=scenes>{pages}</div></section>"
    )


def _scene(scene: Scene) -> str:
    return "".join(f"<div class=row>{''.join(_figure(*cell) for cell in row)}</div>" for row in scene.rows)


def _shown(scene: _Packed, visible: bool) -> str:
    hidden = "" if visible else " hidden"
    return f'<div class=scene data-time="{scene.time:.1f}"{hidden}>{scene.html}</div>'


def _figure(caption: str, image: Image) -> str:
    style = f"flex:{image.shape[1] / image.shape[0]:.4f}"  # equal heights along a row
    picture = f'<img alt="{_text(caption)}" src="{_data_uri(image)}">'
    return f"<figure style={style}>{picture}<figcaption>{_text(caption)}</figcaption></figure>"


def _data_uri(image: Image) -> str:
    done, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    if not done:
        raise ValueError(f"a picture of shape {image.shape} cannot be encoded as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def _latency(summary: Mapping[str, Any], frames: Sequence[FrameLatency]) -> str:
    return (
        "<section><h2>Latency</h2>"
        "<p>Total: from the publication of the last image of a frame set to the publication of its result. Bars end at the median, lines at the 95th percentile.</p>"
        f"{_stage_chart(summary['latency_ms'])}"
        "<p>Every frame of the drive; a cross is a frame that was dropped.</p>"
        f"{_timeline(frames)}</section>"
    )


def _stage_chart(stages: Mapping[str, Mapping[str, float]]) -> str:
    """Horizontal bars: median per stage, whisker to the 95th percentile."""
    longest = max((stage["p95"] for stage in stages.values()), default=1.0) or 1.0
    left, height = 130, 26
    scale = (CHART_WIDTH - left - 140) / longest
    bars = []
    for index, (name, stage) in enumerate(stages.items()):
        y, p50, p95 = index * height + 4, stage["p50"] * scale, stage["p95"] * scale
        kind = "total" if name == "total" else "part"
        bars.append(
            f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{_text(name)}</text>'
            f'<rect class="{kind}" x="{left}" y="{y}" width="{p50:.1f}" height="17" rx="2"/>'
            f'<path class="whisker" d="M{left + p50:.1f} {y + 8.5}H{left + p95:.1f}m0 -4v8"/>'
            f'<text x="{left + p95 + 8:.1f}" y="{y + 13}">'
            f"{_number(stage['p50'], 1)} / {_number(stage['p95'], 1)} ms</text>"
        )
    return _svg(len(bars) * height + 4, "".join(bars), "Latency by stage")


def _timeline(frames: Sequence[FrameLatency]) -> str:
    """One dot per frame over the drive's time."""
    known = [frame.total_ms for frame in frames if frame.total_ms is not None]
    top, height, left = max(known, default=1.0) * 1.1 or 1.0, 180, 80
    span = max((frame.time for frame in frames), default=1.0) or 1.0

    def at(frame: FrameLatency) -> tuple[float, float]:
        value = top if frame.total_ms is None else frame.total_ms
        x = left + frame.time / span * (CHART_WIDTH - left - 20)
        return x, 10 + (1 - value / top) * (height - 40)

    marks = []
    for step in (0.0, 0.5, 1.0):
        y = 10 + (1 - step) * (height - 40)
        marks.append(f'<path class="grid" d="M{left} {y:.1f}H{CHART_WIDTH - 20}"/>')
        marks.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{top * step:.0f} ms</text>')
    for frame in frames:
        x, y = at(frame)
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
        cross = f'<path class="dropped" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>'
        marks.append(cross if frame.total_ms is None else shape)
    marks.append(f'<text x="{left}" y="{height - 8}">0 s</text>')
    marks.append(f'<text x="{CHART_WIDTH - 20}" y="{height - 8}" text-anchor="end">{span:.0f} s</text>')
    return _svg(height, "".join(marks), "Latency of every frame")


def _svg(height: float, inner: str, title: str) -> str:
    label = f'role="img" aria-label="{_text(title)}"'
    return f'<svg viewBox="0 0 {CHART_WIDTH} {height:.0f}" {label}>{inner}</svg>'


def _accuracy(summary: Mapping[str, Any]) -> str:
    if "detection" not in summary or "occupancy" not in summary:
        return "<section><h2>Scores</h2><p>The truth of this drive is not known.</p></section>"
    detection, occupancy = summary["detection"], summary["occupancy"]
    return (
        "<section><h2>Scores</h2>"
        f"<p>Detection over the full range: mAP {_number(detection['mAP'], 3)} "
        f"({_number(detection.get('mAP_present'), 3)} over the classes that are present), "
        f"NDS {_number(detection['NDS'], 3)}. Occupancy over camera-visible voxels: "
        f"IoU {_number(occupancy['iou'], 3)} (mean grid of the training set "
        f"{_number(occupancy.get('iou_mean_of_training_set'), 3)}), mIoU {_number(occupancy['mIoU'], 3)}.</p>"
        f"{_ap_table(detection)}</section>"
    )


def _ap_table(detection: Mapping[str, Any]) -> str:
    """Average precision of each class that occurs, near and far, beside the prior."""
    groups = [
        ("AP", "full range"),
        ("AP_30m", "within 30 m, 5 points or more"),
        ("AP_30m_prior", "the training set's mean, within 30 m"),
    ]
    distances = ("0.5", "1.0", "2.0", "4.0")
    titles = "".join(f"<th colspan=4>{_text(title)}</th>" for _, title in groups)
    columns = "".join(f"<th>{d} m</th>" for _ in groups for d in distances)
    rows = []
    for name in detection["AP"]:
        scores = [detection.get(key, {}).get(name, {}).get(d) for key, _ in groups for d in distances]
        if any(score for score in scores):
            cells = "".join(f"<td>{_number(score, 2)}</td>" for score in scores)
            rows.append(f"<tr><th scope=row>{_text(name.replace('_', ' '))}</th>{cells}</tr>")
    head = f"<thead><tr><th></th>{titles}</tr><tr><th>Average precision</th>{columns}</tr></thead>"
    return f"<div class=wide><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _facts(summary: Mapping[str, Any]) -> str:
    titles = {
        "drive": "The drive",
        "model": "The model",
        "published": "Messages published",
        "drops": "Frames dropped",
        "seconds": "Seconds taken",
        "machine": "The machine",
        "versions": "Versions",
    }
    tables = "".join(
        f"<div><h3>{title}</h3><table>{_fact_rows(summary[key])}</table></div>"
        for key, title in titles.items()
        if summary.get(key)
    )
    return f"<section><h2>Machine, versions and settings</h2><div class=facts>{tables}</div></section>"


def _fact_rows(facts: Mapping[str, Any]) -> str:
    return "".join(
        f"<tr><th scope=row>{_text(str(key))}</th><td>{_text(str(value))}</td></tr>" for key, value in facts.items()
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><header><h1>{title}</h1><p>{intro}</p></header>
{body}
<script>{script}</script></body></html>
"""

_STYLE = """
:root{--ink:#1c2430;--soft:#5c6878;--line:#dde2e8;--paper:#fff;--wash:#f5f7f9;--accent:#0b7285;--warn:#c92a2a}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaef;--soft:#98a4b3;--line:#303844;--paper:#14181e;--wash:#1c222a;
--accent:#3bc9db;--warn:#ff8787}}
*{box-sizing:border-box}
body{margin:0 auto;padding:40px 24px 80px;max-width:1240px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;font-variant-numeric:tabular-nums}
h1{margin:0;font-size:34px;letter-spacing:-.02em}h2{margin:56px 0 8px;font-size:22px;letter-spacing:-.01em}
h3{margin:0 0 6px;font-size:15px}header p,section>p{max-width:75ch;margin:6px 0 14px;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin-top:28px}
.tile{background:var(--wash);border-radius:8px;padding:14px 16px}
.tile span{display:block;color:var(--soft);font-size:14px}.tile strong{display:block;font-size:28px;line-height:1.25}
.tile small{color:var(--soft);font-size:13px;line-height:1.35;display:block}
.row{display:flex;gap:10px;margin-bottom:10px}figure{margin:0;min-width:0}
img{width:100%;display:block;border-radius:4px}figcaption{font-size:13px;color:var(--soft);margin-top:3px}
.controls{display:flex;gap:14px;align-items:center;margin:14px 0}
.controls input{flex:1;accent-color:var(--accent)}.controls output{min-width:4em;text-align:right;color:var(--soft)}
button{font:inherit;color:var(--paper);background:var(--accent);border:0;border-radius:6px;padding:5px 18px;cursor:pointer}
.stage{position:relative;height:min(62vh,560px);border-radius:8px;overflow:hidden;background:var(--wash)}
.stage canvas{width:100%;height:100%;display:block;touch-action:none;cursor:grab}
.names{position:absolute;inset:10px 0 auto 0;display:flex;pointer-events:none}
.names span{flex:1;padding-left:12px;font-size:14px;font-weight:600}.names span+span{border-left:1px solid var(--line)}
.chips{display:flex;flex-wrap:wrap;gap:6px;margin:8px 0}
.chip{font-size:13px;padding:2px 10px;color:var(--ink);background:var(--wash);border:1px solid var(--line);border-radius:12px}
.chip[aria-pressed=false]{opacity:.4}
.chip i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px;outline:1px solid var(--line)}
svg{width:100%;height:auto;font-size:13px}svg text{fill:var(--ink)}svg .part{fill:var(--soft);opacity:.55}
svg .total,svg circle{fill:var(--accent)}svg .whisker{stroke:var(--ink);stroke-width:1.2;fill:none}
svg .grid{stroke:var(--line)}svg .dropped{stroke:var(--warn);stroke-width:2;fill:none}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px}td,th{padding:4px 10px;text-align:right;font-weight:400}
th[scope=row]{text-align:left}thead th{color:var(--soft);text-align:center;border-bottom:1px solid var(--line)}
tbody tr+tr td,tbody tr+tr th{border-top:1px solid var(--line)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:28px}
.facts table{width:100%}.facts td{overflow-wrap:anywhere}.facts th{color:var(--soft);padding-left:0;vertical-align:top}
"""

_SCRIPT = """
const scenes=[...document.querySelectorAll('.scene')],slider=document.getElementById('slider'),
clock=document.getElementById('clock'),play=document.getElementById('play'),space=document.querySelector('div.space');
let timer=null;
function show(i){scenes.forEach((s,k)=>s.hidden=k!==i);slider.value=i;clock.textContent=scenes[i].dataset.time+' s';
if(space)space.showMoment(i)}
function stop(){clearInterval(timer);timer=null;play.textContent='Play'}
if(slider){show(0);slider.oninput=()=>{stop();show(+slider.value)};
play.onclick=()=>{if(timer)return stop();play.textContent='Pause';
timer=setInterval(()=>show((+slider.value+1)%scenes.length),500)}}
"""
