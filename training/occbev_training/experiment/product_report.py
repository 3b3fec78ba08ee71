"""The chapter of a plan with a network of the product: every seed, what pre-training changes, and what is not measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from occbev_training.experiment.product import ARMS, ProductPlan, product_tasks
from occbev_training.experiment.report import NOT_RUN, WITHOUT, Chapter, Section
from occbev_training.experiment.runs import Row
from occbev_training.experiment.statistics import SCORED, Difference, MatchRecord, compare

SHOWN = {
    "mAP": "mAP",
    "NDS": "NDS",
    "occupancy_miou": "mIoU",
    "occupancy_iou": "occupancy IoU",
    "car_AP_2m_30m": "car AP at 2 m within 30 m",
}
"""Headline number of `occbev-train evaluate` -> its name here."""


def product_chapter(plan: ProductPlan, rows: Sequence[Row], command: str) -> Chapter:
    """Return the chapter of a plan. command: that which repeats it."""
    runs = {(row["arm"], row["percent"], row["seed"]): row for row in rows if row["kind"] == "run"}
    missing = len(product_tasks(plan)) - len(rows)
    sections = [_answer(plan, runs, missing), _other_scores(plan, runs)]
    sections += [_every_seed(plan, runs, percent) for percent in plan.percents if runs]
    title = f"`{plan.model.name}` from ImageNet weights: plan `{plan.name}`"
    return Chapter(title, plan.name, [*sections, _what_was_run(plan, rows, command)], _zoo_rows(plan, runs))


Runs = dict[tuple[str, float, int], Row]


def _answer(plan: ProductPlan, runs: Runs, missing: int) -> Section:
    scope = (
        f"The published comparison at a small scale: `{plan.model.name}` begins from ImageNet weights of its image "
        f"encoder, with (O) and without ({', '.join(arm for arm in plan.arms if arm != 'O')}) pre-training on occupancy, on "
        "simulated streets, with the recipes of `config/training`."
    )
    questions = {
        "R0": "O - R0 is the published question, what pre-training adds to the same fine-tuning.",
        "R": "O - R asks it at equal compute: R is fine-tuned for as many steps as O has in both phases.",
    }
    scope = " ".join([scope, *(text for arm, text in questions.items() if arm in plan.arms)])
    if not runs:
        state = (
            f"**Not measured.** The plan is registered and none of its {len(product_tasks(plan))} tasks is run: they "
            f"train on {plan.samples():,} samples, of which two cores do one or two a second. The training of the "
            "shipped weights did about 200 a second on one H200, by which this would take about "
            f"{plan.samples() / 200 / 60:.0f} minutes, without its drives; this was not tried."
        )
        return Section("Answer", (scope, state))
    lines = []
    for pair, percent in itertools.product(plan.compared, plan.percents):
        difference = _compare(plan, runs, percent, pair)
        if difference is not None:
            low, high = (100 * value for value in difference.interval)
            lines.append(
                f"- {pair[0]} - {pair[1]} at {percent:g} % of labels: {100 * difference.mean:+.2f} mAP, 95 % interval "
                f"{low:+.2f} to {high:+.2f}, {len(difference.each)} paired seeds. No test was registered."
            )
    lines += [f"\n{note}" for note in plan.notes]
    state = (
        f"{missing} of {len(product_tasks(plan))} tasks are not run." if missing else "Every run of the plan is here."
    )
    at = ", ".join(f"{distance:g}" for distance in SCORED)
    rule = f"Here mAP is the area under the whole precision-recall curve at {at} m; the tables have the nuScenes rule."
    return Section("Answer", (scope, "\n".join(lines) or NOT_RUN, rule, state))


def _paired(plan: ProductPlan, runs: Runs, percent: float, pair: tuple[str, str]) -> list[int]:
    """Return the seeds that both arms were run with."""
    return [seed for seed in range(plan.seeds) if all((arm, percent, seed) in runs for arm in pair)]


def _compare(plan: ProductPlan, runs: Runs, percent: float, pair: tuple[str, str]) -> Difference | None:
    seeds = _paired(plan, runs, percent, pair)
    if not seeds:
        return None
    records = {arm: [MatchRecord.from_record(runs[arm, percent, seed]["matches"]) for seed in seeds] for arm in pair}
    return compare(*pair, records, plan.draws)


def _other_scores(plan: ProductPlan, runs: Runs) -> Section:
    """Compare every headline number, without intervals."""
    rows = []
    for (first, second), percent in itertools.product(plan.compared, plan.percents):
        seeds = _paired(plan, runs, percent, (first, second))
        gains = [_gain(runs, percent, seeds, (first, second), name) for name in SHOWN]
        if seeds:
            rows.append((f"{first} - {second}", f"{percent:g} %", *gains))
    if not rows:
        return Section("What pre-training changes")
    text = "In points: the mean over the seeds, and each seed in brackets. Exploratory: nothing here was tested."
    return Section("What pre-training changes", (text,), (("difference", "labels", *SHOWN.values()), *rows))


def _gain(runs: Runs, percent: float, seeds: Sequence[int], pair: tuple[str, str], name: str) -> str:
    """Return a number's mean difference and that of each seed; "-" where the network does not answer what it is about."""
    scores = [[runs[arm, percent, seed]["summary"].get(name) for arm in pair] for seed in seeds]
    if not scores or any(None in both for both in scores):
        return "-"
    each = [100 * (first - second) for first, second in scores]
    return f"{np.mean(each):+.2f} ({', '.join(f'{value:+.2f}' for value in each)})"


def _zoo_rows(plan: ProductPlan, runs: Runs) -> list[tuple[str, ...]]:
    """With and without pre-training at every share of labels, run or not."""
    rows = []
    for percent, pair in itertools.product(plan.percents, plan.compared):
        samples = plan.pretrain_steps * plan.batch
        network = f"`{plan.model.name}` from ImageNet weights, pre-trained on {samples:,} samples"
        start = (network, "simulated streets", f"{percent:g} %", WITHOUT[pair[1]])
        difference = _compare(plan, runs, percent, pair)
        if difference is None:
            rows.append((*start, *["not measured"] * 3, "0"))
            continue
        seeds = _paired(plan, runs, percent, pair)
        means = (100 * np.mean([runs[arm, percent, seed]["mAP"] for seed in seeds]) for arm in reversed(pair))
        low, high = (100 * value for value in difference.interval)
        gain = f"{100 * difference.mean:+.2f}, {low:+.2f} to {high:+.2f}"
        rows.append((*start, *(f"{mean:.2f}" for mean in means), gain, str(len(seeds))))
    return rows


def _every_seed(plan: ProductPlan, runs: Runs, percent: float) -> Section:
    rows: list[tuple[str, ...]] = []
    for arm in (arm for arm in ARMS if arm in plan.arms):
        have = {seed: runs[arm, percent, seed] for seed in range(plan.seeds) if (arm, percent, seed) in runs}
        rows += [
            (arm, str(seed), *(_cell([have[seed]] if seed in have else [], name) for name in SHOWN))
            for seed in range(plan.seeds)
        ]
        rows.append((arm, "mean", *(_cell(list(have.values()), name) for name in SHOWN)))
    return Section(
        f"Every seed at {percent:g} % of labels", ("In percent.",), (("arm", "seed", *SHOWN.values()), *rows)
    )


def _cell(rows: Sequence[Row], name: str) -> str:
    """Mean of a number over some runs in percent; "-" where the network does not answer what it is about."""
    if not rows:
        return NOT_RUN
    values = [row["summary"][name] for row in rows if name in row["summary"]]
    return f"{100 * np.mean(values):.2f}" if values else "-"


def _what_was_run(plan: ProductPlan, rows: Sequence[Row], command: str) -> Section:
    text = [f"```\n{command}\n```"]
    if plan.departures:
        text.append(
            "Departures from the published comparison, with reasons:\n\n" + "\n".join(f"- {d}" for d in plan.departures)
        )
    facts = [
        ("plan", f"`{plan.name}`, hash `{plan.hash}`"),
        ("drives", f"{plan.train.count} train, {plan.test.count} test, {plan.keys} key frames each"),
        ("phase 1", f"{plan.pretrain_steps} steps of {plan.batch}, `{plan.pretrain}`"),
        (
            "phase 2",
            f"{plan.finetune_steps} steps of {plan.batch}"
            + (f", R {plan.pretrain_steps + plan.finetune_steps}" if "R" in plan.arms else "")
            + f"; `{plan.finetune}`",
        ),
        *((f"arm {arm}", what) for arm, what in ARMS.items() if arm in plan.arms),
    ]
    if rows:
        hours, seconds = (sum(row[name] for row in rows) for name in ("cpu_hours", "seconds"))
        devices = ", ".join(sorted({row["device"] for row in rows}))
        facts.append(
            ("what it took", f"{hours:.2f} CPU hours, {seconds / 60:.1f} minutes one task after another, on {devices}")
        )
    return Section("What was run", tuple(text), (("", ""), *facts))
