"""Result rows as tables, plots with intervals, one page, and `docs/results.md`, all generated.

A run that is missing is said to be missing; a tested difference has a verdict only when every paired seed is there.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from occbev_training.experiment.network import CLASSES, MODEL, build_slim
from occbev_training.experiment.plan import ARMS, Plan
from occbev_training.experiment.pool import Pool
from occbev_training.experiment.runs import Row, tasks_of
from occbev_training.experiment.statistics import (
    LEAST_SEEDS,
    SCORED,
    Difference,
    MatchRecord,
    compare,
    holm,
    interval_of,
)

NOT_RUN = "not run"

EASY, HARD, FEW_LABELS_SHARE, DEPTHLESS_SHARE = 0.85, 0.25, 0.6, 0.3
"""Bounds of the trained checks on the mAP of R: at all labels, of few labels to all, and without depth to with it."""


@dataclass(frozen=True)
class Section:
    """One part of the report. table: header and rows of text. plot: name and SVG. picture: file beside the plots."""

    title: str
    text: tuple[str, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    plot: tuple[str, str] | None = None
    picture: str = ""


@dataclass(frozen=True)
class Results:
    """The rows of one plan. draws: bootstrap draws, 0 for the plan's. found: a record of `found.Findings`, if there is one."""

    plan: Plan
    rows: Sequence[Row]
    draws: int = 0
    found: Row | None = None
    _records: dict[str, MatchRecord] = field(default_factory=dict, compare=False)

    @cached_property
    def runs(self) -> dict[tuple[str, float, int], Row]:
        """(arm, percent, seed) -> row of a run on test drives."""
        return {(row["arm"], row["percent"], row["seed"]): row for row in self.rows if row["kind"] == "run"}

    @cached_property
    def trials(self) -> list[Row]:
        """Rows of runs on development drives."""
        return [row for row in self.rows if row["kind"] == "trial"]

    @property
    def missing(self) -> list[str]:
        """Keys of the tasks that have no row."""
        done = {row["key"] for row in self.rows}
        return [task.key for task in tasks_of(self.plan) if task.key not in done]

    def record(self, row: Row) -> MatchRecord:
        """Return the matches of a row."""
        if row["key"] not in self._records:
            self._records[row["key"]] = MatchRecord.from_record(row["matches"])
        return self._records[row["key"]]

    def seeds_of(self, percent: float, *arms: str) -> list[int]:
        """Return the seeds that every one of the arms was run with."""
        have = [{seed for arm, share, seed in self.runs if (arm, share) == (one, percent)} for one in arms]
        return sorted(set.intersection(*have))

    def compare(self, first: str, second: str, percent: float) -> Difference | None:
        """Compare two arms over the seeds that both have; None without any."""
        seeds = self.seeds_of(percent, first, second)
        if not seeds:
            return None
        runs = {arm: [self.record(self.runs[arm, percent, seed]) for seed in seeds] for arm in (first, second)}
        return compare(first, second, runs, self.draws or self.plan.draws)

    @cached_property
    def tested(self) -> list[Difference | None]:
        """The registered differences, in their order."""
        return [self.compare(a, b, self.plan.family_percent) for a, b in self.plan.family]

    @property
    def complete(self) -> bool:
        """Whether every paired seed of the registered family was run."""
        wanted = self.plan.family_seeds
        return all(difference is not None and len(difference.each) == wanted for difference in self.tested)

    def adjusted(self) -> dict[str, float]:
        """Return the adjusted p of every registered difference; empty while one cannot be tested."""
        if not self.complete:
            return {}
        p = {name_of(d): d.p for d in self.tested if d is not None and d.p is not None}
        return holm(p) if len(p) == len(self.plan.family) else {}


def name_of(difference: Difference) -> str:
    """Name of a difference."""
    return f"{difference.first} - {difference.second}"


def sections_of(results: Results, command: str) -> list[Section]:
    """Return the report, the answer first. command: that which runs the plan."""
    sections = [
        _answer(results),
        _checks(results),
        _tested(results),
        _found(results),
        *_every_seed(results),
        _exploratory(results),
        _curve(results),
        _by_class(results),
        _phase1(results),
        _trials(results),
        _what_was_run(results, command),
    ]
    return [section for section in sections if section.text or section.table or section.plot]


def to_markdown(sections: Sequence[Section], pictures: str) -> str:
    """Return the report as Markdown, with titles of the third level. pictures: where its plots are, from the page."""
    parts = []
    for section in sections:
        parts.append(f"### {section.title}")
        parts += section.text
        if section.table[1:]:
            parts.append("\n".join(_markdown_table(section.table)))
        if section.plot:
            parts.append(f"![{section.title}]({pictures}/{section.plot[0]}.svg)")
        if section.picture:
            parts.append(f"![{section.title}]({pictures}/{section.picture})")
    return "\n\n".join(parts) + "\n"


def to_page(title: str, sections: Sequence[Section], pictures: Mapping[str, bytes] = {}) -> str:
    """Return the report as one HTML page with its plots in it. pictures: caption -> PNG, shown at the end."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(text).replace(chr(10), '<br>')}</p>" for text in section.text]
        if section.table[1:]:
            header, *rows = section.table
            cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
            cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
        if section.plot:
            parts.append(section.plot[1])
    for caption, data in pictures.items():
        source = base64.b64encode(data).decode()
        parts.append(f'<h2>{html.escape(caption)}</h2><img alt="" src="data:image/png;base64,{source}">')
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}}
table{{border-collapse:collapse}}td,th{{border:1px solid #ccc;padding:.2em .6em;text-align:left}}
img{{image-rendering:pixelated;max-width:100%}}svg{{max-width:100%;height:auto}}</style>
{body}</html>
"""


def _answer(results: Results) -> Section:
    plan, missing = results.plan, results.missing
    state = (
        "Every run of the plan is here."
        if not missing
        else f"{len(missing)} of {len(tasks_of(plan))} tasks are not run."
    )
    lines = _tested_answers(results) if plan.family else _untested_answers(results)
    return Section("Answer", (_scope(plan), "\n".join(lines), state))


def _scope(plan: Plan) -> str:
    """Say what the numbers are about, and what they are not about."""
    weights = sum(weight.numel() for weight in build_slim("finetune", 0).parameters())
    network = f"pictures of {MODEL.image.width}x{MODEL.image.height}, a network of {weights:,} weights"
    recorded = plan.world.recorded
    if recorded is None:
        return f"A mechanism check: simulated streets, {network}. It says nothing about nuScenes or real roads."
    half = recorded.blocks * recorded.block_keys
    return (
        f"One real street, `{recorded.name}`: boxes of its first {half} key frames are the labels, its last {half} are "
        f"scored; {network}. Pre-training saw simulated drives through the same cameras, and nothing of the recording. "
        "Both halves show the same street, so the numbers say nothing about another one."
    )


def _tested_answers(results: Results) -> list[str]:
    plan, lines, adjusted = results.plan, [], results.adjusted()
    for difference, (first, second) in zip(results.tested, plan.family, strict=True):
        name = f"{first} - {second}"
        where = f"- {name} at {plan.family_percent:g} % of labels"
        if difference is None or name not in adjusted:
            have = 0 if difference is None else len(difference.each)
            lines.append(f"{where}: **not tested**, {have} of {max(plan.family_seeds, LEAST_SEEDS)} paired seeds.")
        else:
            lines.append(
                f"{where}: **{_verdict(difference, adjusted[name])}** "
                f"({_points(difference.mean)} mAP, 95 % interval {_range(difference.interval)}, "
                f"adjusted p = {adjusted[name]:.3f}, {len(difference.each)} paired seeds)."
            )
    return lines


def _untested_answers(results: Results) -> list[str]:
    """Say with against without pre-training at every share of labels, where no test was registered."""
    lines = []
    for percent in sorted({group.percent for group in results.plan.runs}):
        difference = results.compare("O", "R", percent)
        if difference is not None:
            lines.append(
                f"- O - R at {percent:g} % of labels: {_points(difference.mean)} mAP, 95 % interval "
                f"{_range(difference.interval)}, {len(difference.each)} paired seeds. No test was registered."
            )
    return lines or ["- not run"]


def _verdict(difference: Difference, p: float) -> str:
    if p >= 0.05:
        return "no difference shown"
    return "a gain" if difference.mean > 0 else "a loss"


def _checks(results: Results) -> Section:
    found = [check for row in results.rows if row["kind"] == "check" for check in row["checks"]]
    found += _trained_checks(results)
    if results.plan.checks == "none":
        return Section("Sanity checks")
    found.sort(key=lambda check: bool(check["passed"]))
    rows = [
        (
            check["name"],
            _figure(check["value"]),
            check["bound"],
            "holds" if check["passed"] else "**fails**",
            check["meaning"],
        )
        for check in found
    ]
    text = "On development drives; failed checks come first. Checks without training are run before everything else."
    return Section("Sanity checks", (text,), (("check", "found", "bound", "", "meaning"), *rows))


def _trained_checks(results: Results) -> list[dict[str, Any]]:
    """Judge the trials of R and of the network without depth, and the wrong-drive control."""
    seed = results.plan.check_seed
    scores = {
        (row["arm"], row["percent"]): row["mAP"]
        for row in results.trials
        if row["seed"] == seed and row["key"] == f"trial-{row['arm']}-{row['percent']:g}-seed{seed}"
    }
    whole, few, depthless = (scores.get(key) for key in (("R", 100.0), ("R", 5.0), ("K", 100.0)))
    found = []

    def add(name: str, value: float, bound: str, passed: bool, meaning: str) -> None:
        found.append({"name": name, "value": value, "bound": bound, "passed": passed, "meaning": meaning})

    if whole is not None:
        add("mAP of R with all labels", whole, f"<= {EASY}", whole <= EASY, "above it the task is too easy")
        add(
            "mAP of R with all labels",
            whole,
            f">= {HARD}",
            whole >= HARD,
            "below it the task is too hard for these steps",
        )
    if whole and few is not None:
        share = few / whole
        bound = f"<= {FEW_LABELS_SHARE}"
        add(
            "R with 5 % of labels, as a share of all",
            share,
            bound,
            share <= FEW_LABELS_SHARE,
            "above it labels hardly matter",
        )
    if whole and depthless is not None:
        share = depthless / whole
        bound = f"< {DEPTHLESS_SHARE}"
        add("R without depth, as a share of R", share, bound, share < DEPTHLESS_SHARE, "above it depth hardly matters")
    control = results.compare("X", "R", results.plan.family_percent)
    if control is not None:
        null = control.interval[0] <= 0
        meaning = f"interval {_range(control.interval)} points; labels of another drive must not help"
        add(f"X - R, {len(control.each)} seeds", control.mean, "not above 0", null, meaning)
    return found


def _tested(results: Results) -> Section:
    if not results.plan.family:
        return Section("The tested differences")
    adjusted = results.adjusted()
    rows = []
    for difference in results.tested:
        if difference is not None:
            name = name_of(difference)
            p = "-" if difference.p is None or not results.complete else f"{difference.p:.3f}"
            holm_p = f"{adjusted[name]:.3f}" if name in adjusted else "not tested"
            each = ", ".join(f"{100 * value:+.2f}" for value in difference.each)
            rows.append((name, _points(difference.mean), _range(difference.interval), p, holm_p, each))
    header = ("difference", "mean, points of mAP", "95 % interval", "p, sign flips", "p, Holm", "each seed")
    text = (
        "Registered before any test drive was scored. Paired by seed, which sets weights, order, augmentation and the "
        "labelled drives. Intervals draw seeds, then test drives."
    )
    found = [difference for difference in results.tested if difference is not None]
    plot = ("differences", _plot_differences(results, found)) if found else None
    title = f"The tested differences, at {results.plan.family_percent:g} % of labels"
    return Section(title, (text,), (header, *rows), plot)


def _found(results: Results) -> Section:
    """Count the objects that one arm finds and the other does not, by networks of the same seed."""
    if results.found is None:
        return Section("Objects that are found only with pre-training")
    record, percent = results.found, results.plan.family_percent
    first, second = record["first"], record["second"]
    rows = []
    for name, row in record["classes"].items():
        means = (f"{row[what]:.1f}" for what in ("both", "first", "second", "neither"))
        rows.append((name, str(row["objects"]), *means))
    header = ("class", "objects", "both find it", f"{first} alone", f"{second} alone", "neither")
    seeds = len(record["seeds"])
    text = (
        (
            f"Which objects of the test drives does a network of {first} find, which one of {second} with the same seed? "
            f"Each network keeps its best boxes of a class, as many as there are objects of that class. An object is found "
            f"if one of them lies within 2 m. Means over {seeds} pairs of networks, at {percent:g} % of labels."
        ),
        (
            f"{record['usually_first_alone']} objects are found by most networks of {first} and not by most of {second}; "
            f"the other way round it is {record['usually_second_alone']}."
        ),
        (
            f"The picture shows, for five drives, the object with the largest difference in the number of networks that find "
            f"it: green is the object, dashed white are other true boxes, orange are the network's boxes. The middle column "
            f"is {second}, the right one {first}. The objects were chosen for this difference: they do not show how large a "
            f"gain is."
        ),
    )
    title = "Objects that are found only with pre-training"
    return Section(title, text, (header, *rows), picture=f"{results.plan.name}-found.jpg")


def _every_seed(results: Results) -> list[Section]:
    sections = []
    groups: dict[float, dict[str, int]] = defaultdict(dict)
    for group in results.plan.runs:
        for arm in group.arms:
            groups[group.percent][arm] = max(groups[group.percent].get(arm, 0), group.seeds)
    for percent, arms in sorted(groups.items()):
        rows = [
            (str(seed), *(_cell(results, arm, percent, seed, arms[arm]) for arm in arms))
            for seed in range(max(arms.values()))
        ]
        rows.append(("mean", *(_mean_cell(results, arm, percent) for arm in arms)))
        rows.append(("nuScenes' rule, mean", *(_mean_cell(results, arm, percent, "mAP_nuscenes") for arm in arms)))
        world, labelled = results.plan.world, results.plan.labelled(percent)
        if "unseen_rig" in world.simulated:
            rows.append(("unseen rig, mean", *(_mean_cell(results, arm, percent, "mAP_unseen_rig") for arm in arms)))
        frames = labelled * world.keys_of(world.labelled_split)
        units = "drives" if world.recorded is None else "blocks"
        rule = "nuScenes' rule leaves out recall and precision below 10 %."
        text = (f"mAP in percent. Labelled {units}: {labelled}, frames: {frames}. {rule}",)
        sections.append(Section(f"Every seed at {percent:g} % of labels", text, (("seed", *arms), *rows)))
    return sections


def _cell(results: Results, arm: str, percent: float, seed: int, seeds: int) -> str:
    if seed >= seeds:
        return ""
    row = results.runs.get((arm, percent, seed))
    return NOT_RUN if row is None else f"{100 * row['mAP']:.2f}"


def _mean_cell(results: Results, arm: str, percent: float, name: str = "mAP") -> str:
    values = [results.runs[arm, percent, seed][name] for seed in results.seeds_of(percent, arm)]
    return f"{100 * np.mean(values):.2f}" if values else NOT_RUN


_OF_STEPS = (
    "R learns boxes for as many steps as O has in both phases; R0 - R asks what these further steps give, O - R0 what "
    "pre-training adds to the same steps on boxes."
)


def _exploratory(results: Results) -> Section:
    """Compare every other pair that says something; no test, intervals alone."""
    pairs = [(arm, "R") for arm in ARMS if arm != "R"] + [
        ("O", arm) for arm in ("R0", "Op", "X", "I-image", "I-view", "I-bev", "V")
    ]
    registered = {(a, b, results.plan.family_percent) for a, b in results.plan.family}
    rows, found = [], []
    for percent in sorted({group.percent for group in results.plan.runs}):
        for first, second in pairs:
            difference = results.compare(first, second, percent)
            if difference is None or (first, second, percent) in registered:
                continue
            found.append(difference)
            each = ", ".join(f"{100 * value:+.2f}" for value in difference.each)
            rows.append(
                (name_of(difference), f"{percent:g} %", _points(difference.mean), _range(difference.interval), each)
            )
    if not rows:
        return Section("Exploratory differences")
    header = ("difference", "labels", "mean, points of mAP", "95 % interval", "each seed")
    text = (
        "Intervals of few seeds, without tests. O - Op asks what better labels add, O - I-image, O - I-view and "
        "O - I-bev which part carries what is learned, O - V what the weights of visibility add, X - R whether "
        "pre-training on wrong labels helps as well. " + _OF_STEPS
        if _has_controls(results.plan)
        else "Intervals of few seeds, without tests. " + _OF_STEPS,
    )
    return Section("Exploratory differences", text, (header, *rows))


def _has_controls(plan: Plan) -> bool:
    """Whether a plan runs the arms that explain a difference."""
    return any(arm in group.arms for group in plan.runs for arm in ("Op", "X", "V"))


def _curve(results: Results) -> Section:
    percents = sorted({percent for _, percent, _ in results.runs})
    arms = [arm for arm in ARMS if len({p for a, p, _ in results.runs if a == arm}) > 1]
    if not arms:
        return Section("mAP by the share of labels")
    text = []
    match = labels_to_match(results)
    if match is not None:
        text.append(match)
    return Section("mAP by the share of labels", tuple(text), (), ("labels", _plot_curve(results, arms, percents)))


def labels_to_match(results: Results) -> str | None:
    """Say at which share of labels R reaches what O has at the tested share, between shares on a log scale."""
    percent = results.plan.family_percent
    seeds = results.seeds_of(percent, "O")
    curve = [
        (share, float(np.mean([results.runs["R", share, seed]["mAP"] for seed in results.seeds_of(share, "R")])))
        for share in sorted({p for arm, p, _ in results.runs if arm == "R"})
    ]
    if not seeds or len(curve) < 2:
        return None
    wanted = float(np.mean([results.runs["O", percent, seed]["mAP"] for seed in seeds]))
    for (low, below), (high, above) in zip(curve, curve[1:], strict=False):
        if below <= wanted <= above and above > below:
            share = low * (high / low) ** ((wanted - below) / (above - below))
            return f"R needs about {share:.1f} % of the labels to reach what O has with {percent:g} % ({100 * wanted:.2f} mAP)."
    return f"R reaches what O has with {percent:g} % ({100 * wanted:.2f} mAP) at no share between those that were run."


def _by_class(results: Results) -> Section:
    percent = results.plan.family_percent
    arms = [arm for arm in ARMS if results.seeds_of(percent, arm)]
    if not arms:
        return Section("By class")
    rows = []
    for name in CLASSES:
        means = [
            [results.runs[arm, percent, seed]["AP"][name] for seed in results.seeds_of(percent, arm)] for arm in arms
        ]
        rows.append((name, *(f"{100 * np.mean(values):.2f}" for values in means)))
    text = (f"AP in percent at {percent:g} % of labels, mean over the seeds of each arm.",)
    return Section("By class", text, (("class", *arms), *rows))


def _phase1(results: Results) -> Section:
    rows = [
        (row["arm"], str(row["seed"]), f"{row['occupancy_iou']:.3f}")
        for row in results.rows
        if row["kind"] == "phase1" and row["occupancy_iou"] is not None
    ]
    if not rows:
        return Section("Occupancy after phase 1")
    text = (
        "IoU of occupied voxels against dense truth where a camera sees them: test drives, and development drives for "
        f"seed {results.plan.check_seed}. R and D have no occupancy."
        if results.plan.world.recorded is None
        else "IoU of occupied voxels against dense truth where a camera sees them, on simulated development drives."
    )
    return Section("Occupancy after phase 1", (text,), (("arm", "seed", "IoU"), *sorted(rows)))


def _trials(results: Results) -> Section:
    rows = [
        (row["arm"], f"{row['percent']:g} %", f"{row['lr']:g}", f"{row['encoder_scale']:g}", f"{100 * row['mAP']:.2f}")
        for row in results.trials
    ]
    if not rows:
        return Section("Runs on development drives")
    return Section(
        "Runs on development drives",
        (f"Seed {results.plan.check_seed}; for checks and for the choice of settings.",),
        (("arm", "labels", "lr", "encoder scale", "mAP"), *rows),
    )


def _what_was_run(results: Results, command: str) -> Section:
    plan, world = results.plan, results.plan.world
    hours: dict[str, float] = defaultdict(float)
    for row in results.rows:
        hours[row["kind"]] += row["cpu_hours"]
    facts = [
        ("plan", f"`{plan.name}`, hash `{plan.hash}`"),
        ("drives", _drives(plan)),
        (
            "pictures",
            (
                f"{'4' if world.recorded is None else 'all of the vehicle'}, {MODEL.image.width}x{MODEL.image.height}; "
                f"simulated LiDAR of {world.rings} x {world.columns}"
            ),
        ),
        (
            "mAP",
            f"area under the whole precision-recall curve, mean over {len(CLASSES)} classes and centre distances of {', '.join(f'{d:g}' for d in SCORED)} m",
        ),
        ("phase 1", f"{plan.pretrain_steps} steps of {plan.batch}"),
        (
            "phase 2",
            (
                f"{plan.finetune_steps} steps of {plan.batch}; {'R' if plan.checks == 'none' else 'R and K'} "
                f"{plan.pretrain_steps + plan.finetune_steps}"
            ),
        ),
        (
            "CPU hours",
            ", ".join(
                [*(f"{kind} {value:.2f}" for kind, value in sorted(hours.items())), f"all {sum(hours.values()):.2f}"]
            )
            + "; drives not counted",
        ),
    ]
    arms = {arm for group in plan.runs for arm in group.arms}
    facts += [(f"arm {arm}", ARMS[arm]) for arm in ARMS if arm in arms]
    text = [f"```\n{command}\n```"]
    if plan.departures:
        text.append("Departures from the design, with reasons:\n\n" + "\n".join(f"- {one}" for one in plan.departures))
    return Section("What was run", tuple(text), (("", ""), *facts))


def _drives(plan: Plan) -> str:
    world = plan.world
    names = {"unseen_rig": "with an unseen rig"}
    listed = ", ".join(f"{world.count(split)} {names.get(split, split)}" for split in world.simulated)
    text = f"{listed}; {world.keys} key frames each, streets {world.version}"
    if world.recorded is not None:
        recorded = world.recorded
        text += f"; the recording in 2 x {recorded.blocks} blocks of {recorded.block_keys} key frames"
    return text


def _plot_differences(results: Results, differences: Sequence[Difference]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.6 * len(differences)))
    axes = figure.add_subplot()
    for place, difference in enumerate(differences):
        low, high = (100 * value for value in difference.interval)
        axes.plot([low, high], [place, place], color="#1f4e79", linewidth=3, solid_capstyle="butt")
        axes.plot(100 * difference.mean, place, "o", color="#1f4e79", markersize=8)
        axes.plot(
            100 * np.array(difference.each),
            np.full(len(difference.each), place + 0.22),
            "|",
            color="#555",
            markersize=9,
        )
    axes.axvline(0, color="#999", linewidth=1)
    axes.set_yticks(range(len(differences)), [name_of(difference) for difference in differences])
    axes.set_ylim(len(differences) - 0.4, -0.6)
    axes.set_xlabel(f"points of mAP at {results.plan.family_percent:g} % of labels; bar: 95 % interval, ticks: seeds")
    return _svg(figure)


def _plot_curve(results: Results, arms: Sequence[str], percents: Sequence[float]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    axes = figure.add_subplot()
    for number, arm in enumerate(arms):
        shares = [p for p in percents if results.seeds_of(p, arm)]
        records = [[results.record(results.runs[arm, p, s]) for s in results.seeds_of(p, arm)] for p in shares]
        means = np.array([100 * np.mean([record.mean_ap()[0] for record in some]) for some in records])
        bounds = 100 * np.array([interval_of(some, results.draws or results.plan.draws) for some in records])
        place = np.array(shares) * 1.03**number
        axes.errorbar(place, means, np.abs(bounds.T - means), marker="o", capsize=3, label=arm)
    axes.set_xscale("log")
    axes.set_xticks(percents, [f"{p:g} %" for p in percents])
    axes.minorticks_off()
    axes.set_xlabel("labelled drives")
    axes.set_ylabel("mAP, percent")
    axes.legend()
    return _svg(figure)


def _svg(figure: Any) -> str:
    """Return a figure as SVG that is the same on every run."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "occbev", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    return "\n".join(line.rstrip() for line in svg[svg.index("<svg") :].splitlines()) + "\n"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _range(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def _figure(value: float) -> str:
    return f"{value:.3g}"


def draw_frames(pool: Pool, count: int = 4) -> bytes:
    """Draw the pictures of some frames, one below the other, as PNG: what the network sees."""
    chosen = np.unique(np.linspace(0, len(pool) - 1, count).round().astype(int))
    rows = [np.concatenate(list(pool[int(index)].images), axis=1) for index in chosen]
    large = np.concatenate(rows).repeat(3, axis=0).repeat(3, axis=1)
    done, data = cv2.imencode(".png", large[..., ::-1])
    assert done, "OpenCV encodes PNG"
    return data.tobytes()


HEADER = """\
# Results

Does pre-training on occupancy pay? This page is generated from the rows in `docs/results/`; every score here can be
computed again from them. Arms: R starts from random weights, O is pre-trained on occupancy labels that LiDAR gives without any
box, D on LiDAR depth. All arms are then trained on the same few boxes. Each chapter lists its other arms at the end.
"""


@dataclass(frozen=True)
class Chapter:
    """The results of one plan on the page.

    name: the plan's, before the names of its plots. zoo: rows of `ZOO_HEADER` in the table of the model zoo.
    """

    title: str
    name: str
    sections: Sequence[Section]
    zoo: Sequence[tuple[str, ...]]


def chapter_of(results: Results, command: str) -> Chapter:
    """Return the chapter of a plan. command: that which repeats it."""
    plan = results.plan
    where = "On simulated streets" if plan.world.recorded is None else "On a real drive"
    return Chapter(f"{where}: plan `{plan.name}`", plan.name, sections_of(results, command), _zoo_rows(results))


ZOO_HEADER = (
    "network",
    "scored on",
    "labels",
    "without it",
    "mAP without",
    "mAP with",
    "difference, 95 % interval",
    "seeds",
)
"""Columns of the model zoo's table of with and without pre-training."""

WITHOUT = {"R": "more fine-tuning", "R0": "the same fine-tuning"}
"""Arm without pre-training -> what it does instead, beside arm O."""

ZOO_BEGIN, ZOO_END = "<!-- pre-training: begin -->", "<!-- pre-training: end -->"


def _zoo_rows(results: Results) -> list[tuple[str, ...]]:
    """With and without pre-training at every share of labels that both were run at."""
    plan, rows = results.plan, []
    recorded = plan.world.recorded
    network = f"the small one of [results.md](results.md), {MODEL.image.width}x{MODEL.image.height}"
    where = "simulated streets" if recorded is None else f"`{recorded.name}`, second half"
    for percent, arm in itertools.product(sorted({group.percent for group in plan.runs}), WITHOUT):
        difference = results.compare("O", arm, percent)
        if difference is not None:
            seeds = results.seeds_of(percent, arm, "O")
            means = (100 * np.mean([results.runs[name, percent, seed]["mAP"] for seed in seeds]) for name in (arm, "O"))
            gain = f"{_points(difference.mean)}, {_range(difference.interval)}"
            scores = (*(f"{mean:.2f}" for mean in means), gain, str(len(seeds)))
            rows.append((network, where, f"{percent:g} %", WITHOUT[arm], *scores))
    return rows


def write_docs(page: Path, chapters: Sequence[Chapter]) -> None:
    """Write the page of the documentation, its plots under `results/`, and the table in the model zoo beside it."""
    folder = page.parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [HEADER]
    for chapter in chapters:
        sections = []
        for section in chapter.sections:
            if section.plot is not None:
                name, svg = f"{chapter.name}-{section.plot[0]}", section.plot[1]
                (folder / f"{name}.svg").write_text(svg)
                section = replace(section, plot=(name, svg))
            sections.append(section)
        parts.append(f"## {chapter.title}\n\n{to_markdown(sections, 'results')}")
    page.write_text("\n".join(parts))
    zoo = page.with_name("model-zoo.md")
    if zoo.exists():
        before, _, rest = zoo.read_text().partition(ZOO_BEGIN)
        table = "\n".join(_markdown_table((ZOO_HEADER, *(row for chapter in chapters for row in chapter.zoo))))
        zoo.write_text(f"{before}{ZOO_BEGIN}\n{table}\n{ZOO_END}{rest.partition(ZOO_END)[2]}")


def _markdown_table(table: Sequence[tuple[str, ...]]) -> list[str]:
    header, *rows = table
    return [f"| {' | '.join(line)} |" for line in (header, tuple("---" for _ in header), *rows)]
