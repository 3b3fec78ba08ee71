"""Scores of 3D boxes as nuScenes defines them: AP by centre distance, true-positive errors, NDS.

Matching is greedy by score as in the official evaluation, carried out for all samples and
thresholds at once; numbers equal those of the official kit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.results import Boxes3D
from occbev_training.sources.recording import Annotations

Array = NDArray[np.float64]

CLASS_RANGE: dict[str, float] = {
    "car": 50.0,
    "truck": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "construction_vehicle": 50.0,
    "pedestrian": 40.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "traffic_cone": 30.0,
    "barrier": 30.0,
}
"""Metres from the ego vehicle, exclusive, within which a class is scored."""

NEAR_RANGE, NEAR_POINTS = 30.0, 5
"""The headline AP: truths within this many metres and with this many LiDAR returns."""

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
"""Centre distances in metres of the four APs."""

TP_THRESHOLD = 2.0
TP_ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")

UNDEFINED_ERRORS: dict[str, tuple[str, ...]] = {
    "traffic_cone": ("orient_err", "vel_err", "attr_err"),
    "barrier": ("vel_err", "attr_err"),
}
"""True-positive errors that mean nothing for a class and are left out of the means."""

MIN_RECALL, MIN_PRECISION = 0.1, 0.1
MAX_BOXES = 500
"""More predictions than this in one sample are an error, not cut off."""

RECALLS = np.linspace(0.0, 1.0, 101)
FIRST_RECALL = round(100 * MIN_RECALL) + 1

MOVING_SPEED = 0.2
"""Speed in m/s above which the usual attribute rule calls an object moving."""


@dataclass(frozen=True)
class BoxTable:
    """Boxes of many samples, flat, in file order.

    sample: (M,) int64 number of the sample. label: (M,) int64 index into the scored classes.
    xy: (M, 2) centre. size: (M, 3) l, w, h. yaw: (M,). velocity: (M, 2), NaN unknown.
    attribute: (M,) int64, -1 for none. score: (M,). distance: (M,) metres from the ego vehicle in the
    plane. Truth only: ignored (M,) bool, boxes whose match is neither right nor wrong. Positions of
    one sample share a frame.
    """

    sample: NDArray[np.int64]
    label: NDArray[np.int64]
    xy: Array
    size: Array
    yaw: Array
    velocity: Array
    attribute: NDArray[np.int64]
    score: Array
    distance: Array
    ignored: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, index: NDArray[Any]) -> BoxTable:
        return BoxTable(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ClassMatches:
    """What became of one class's predictions, in the order of their scores.

    score: (P,). sample: (P,). truth: (T, P) row of the matched truth for each threshold,
    -1 none (false positive), -2 an ignored truth. positives: number of truths to find, by sample.
    """

    score: Array
    sample: NDArray[np.int64]
    truth: NDArray[np.int64]
    prediction: NDArray[np.int64]
    positives: NDArray[np.int64]


@dataclass(frozen=True)
class ClassOutcome:
    """One class's matches and all that its scores need; parts and resamples of it can be scored as well.

    errors: error -> (P,), of predictions matched within TP_THRESHOLD, NaN elsewhere. distance: (P,) of the
    predictions. truth_distance, truth_sample: (G,) of the truths. truth_counted: (G,) False where ignored.
    """

    name: str
    matches: ClassMatches
    errors: Mapping[str, Array]
    distance: Array
    truth_distance: Array
    truth_sample: NDArray[np.int64]
    truth_counted: NDArray[np.bool_]

    def within(self, lo: float, hi: float) -> ClassOutcome:
        """Keep what is from `lo` to below `hi` metres away: truths, and predictions by the truth they match.

        A prediction that matches no truth counts where it is itself, so that rings partition the whole.
        """
        truth = self.matches.truth
        near = np.append(self.truth_distance, np.inf)
        place = np.where(truth >= 0, near[truth], self.distance)
        outside = (place < lo) | (place >= hi)
        counted = self.truth_counted & (self.truth_distance >= lo) & (self.truth_distance < hi)
        positives = np.bincount(self.truth_sample[counted], minlength=len(self.matches.positives))
        matches = replace(self.matches, truth=np.where(outside, -2, truth), positives=positives)
        return replace(self, matches=matches)

    def resampled(self, times: NDArray[np.int64]) -> ClassOutcome:
        """Take each sample as often as `times` (S,) says, as if it had been recorded so often."""
        index = np.repeat(np.arange(len(self.matches.score)), times[self.matches.sample])
        matches = self.matches
        matches = ClassMatches(
            matches.score[index],
            matches.sample[index],
            matches.truth[:, index],
            matches.prediction[index],
            matches.positives * times[: len(matches.positives)],
        )
        errors = {name: values[index] for name, values in self.errors.items()}
        return replace(self, matches=matches, errors=errors, distance=self.distance[index])


@dataclass(frozen=True)
class DetectionOutcome:
    """What became of every prediction of a data set, before any score is taken of it."""

    classes: Mapping[str, ClassOutcome]
    samples: int

    def scores(self) -> DetectionScores:
        """Return the scores of all samples and ranges."""
        return _scores_of(self.classes.values())

    def scores_within(self, lo: float, hi: float) -> DetectionScores:
        """Return the scores of boxes from `lo` to below `hi` metres away from the ego vehicle."""
        return _scores_of([outcome.within(lo, hi) for outcome in self.classes.values()])

    def scores_resampled(self, times: NDArray[np.int64]) -> DetectionScores:
        """Return the scores of samples taken as often as `times` (S,) says."""
        return _scores_of([outcome.resampled(times) for outcome in self.classes.values()])


@dataclass(frozen=True)
class DetectionScores:
    """The nuScenes detection scores.

    ap: class -> threshold -> AP. tp_errors: class -> error -> value, NaN where undefined.
    precision: class -> threshold -> (101,) over recalls 0, 0.01, ..., 1. truths: class -> boxes scored.
    """

    ap: Mapping[str, Mapping[float, float]]
    tp_errors: Mapping[str, Mapping[str, float]]
    truths: Mapping[str, int]
    predictions: Mapping[str, int]
    precision: Mapping[str, Mapping[float, Array]] = field(repr=False, default_factory=dict)

    @property
    def class_ap(self) -> dict[str, float]:
        """Class -> mean AP over the thresholds."""
        return {name: float(np.mean(list(by.values()))) for name, by in self.ap.items()}

    @property
    def mean_ap(self) -> float:
        """The official mAP: a class without ground truth counts as 0."""
        return float(np.mean(list(self.class_ap.values())))

    @property
    def classes_without_truth(self) -> tuple[str, ...]:
        """Classes that the mAP counts as 0 because there was nothing to find."""
        return tuple(name for name, count in self.truths.items() if count == 0)

    @property
    def mean_ap_of_present(self) -> float:
        """Mean AP over the classes that have ground truth; NaN if none has."""
        present = [ap for name, ap in self.class_ap.items() if self.truths[name]]
        return float(np.mean(present)) if present else math.nan

    @property
    def mean_tp_errors(self) -> dict[str, float]:
        """Error -> mean over the classes for which it is defined."""
        return {error: float(np.nanmean([by[error] for by in self.tp_errors.values()])) for error in TP_ERRORS}

    @property
    def nds(self) -> float:
        """The nuScenes detection score: half mAP, half true-positive scores."""
        kept = sum(max(0.0, 1.0 - error) for error in self.mean_tp_errors.values())
        return (5 * self.mean_ap + kept) / 10

    def as_record(self) -> dict[str, Any]:
        """The scores as plain values; what is undefined is None. precision: at recalls 0, 0.01, ..., 1."""
        return {
            "mAP": self.mean_ap,
            "NDS": self.nds,
            "AP": {name: {str(t): v for t, v in by.items()} for name, by in self.ap.items()},
            "tp_errors": self.mean_tp_errors,
            "class_tp_errors": {
                name: {e: None if math.isnan(v) else v for e, v in by.items()} for name, by in self.tp_errors.items()
            },
            "precision": {
                name: {str(t): [round(float(v), 6) for v in curve] for t, curve in by.items()}
                for name, by in self.precision.items()
            },
            "truths": dict(self.truths),
            "predictions": dict(self.predictions),
            "classes_without_truth": list(self.classes_without_truth),
        }


def evaluate_detection(
    predictions: Sequence[Boxes3D],
    truths: Sequence[Annotations],
    classes: Sequence[str] = DETECTION_CLASSES,
    max_range: float | None = None,
    min_points: int | None = None,
    ignore_excluded: bool = False,
) -> DetectionScores:
    """Score boxes against annotations, sample by sample in the ego frame.

    max_range: score within this many metres where that is nearer than the class's own range.
    min_points: truths need this many LiDAR returns; None means 1, as in nuScenes.
    ignore_excluded: predictions that match a truth left out by range or returns count neither way;
        the official rule (False) makes them false positives.
    Attributes are those of the usual rule (moving or not, by speed), for both sides.

    Raises:
        ValueError: the two lists differ in length, or a sample has over 500 predictions.
    """
    return match_detection(predictions, truths, classes, max_range, min_points, ignore_excluded).scores()


def match_detection(
    predictions: Sequence[Boxes3D],
    truths: Sequence[Annotations],
    classes: Sequence[str] = DETECTION_CLASSES,
    max_range: float | None = None,
    min_points: int | None = None,
    ignore_excluded: bool = False,
) -> DetectionOutcome:
    """Match boxes against annotations as `evaluate_detection` does, to be scored in parts or resampled."""
    if len(predictions) != len(truths):
        raise ValueError(f"{len(predictions)} samples predicted, {len(truths)} annotated")
    predicted = _velocity_known(_table(list(predictions)))
    predicted = predicted[_in_range(predicted, classes, max_range)]
    wanted = _table([truth.boxes for truth in truths])
    points = np.concatenate([np.zeros(0, np.int64), *(truth.lidar_points for truth in truths)])
    known = wanted.label < len(classes)
    scored = _in_range(wanted, classes, max_range) & (points >= (1 if min_points is None else min_points))
    wanted = replace(wanted, ignored=~scored)[known if ignore_excluded else scored]
    outcome = match_boxes(predicted, wanted, classes)
    return replace(outcome, samples=len(truths))


def match_near(found: Sequence[Boxes3D], meant: Sequence[Annotations]) -> DetectionOutcome:
    """Match near and well-measured truths.

    Predictions that match a truth left out for its range or returns count neither way: finding a hidden
    car is neither rewarded nor punished.
    """
    return match_detection(found, meant, max_range=NEAR_RANGE, min_points=NEAR_POINTS, ignore_excluded=True)


def score_boxes(predictions: BoxTable, truths: BoxTable, classes: Sequence[str] = DETECTION_CLASSES) -> DetectionScores:
    """Score two tables whose filters were applied before; their labels index `classes`."""
    return match_boxes(predictions, truths, classes).scores()


def match_boxes(
    predictions: BoxTable, truths: BoxTable, classes: Sequence[str] = DETECTION_CLASSES
) -> DetectionOutcome:
    """Match two tables whose filters were applied before; their labels index `classes`.

    Raises:
        ValueError: a sample has over 500 predictions.
    """
    check_box_counts(predictions)
    samples = max(int(boxes.sample.max(initial=-1)) for boxes in (predictions, truths)) + 1
    outcomes = {}
    for label, name in enumerate(classes):
        found, meant = predictions[predictions.label == label], truths[truths.label == label]
        matches = match_class(found, meant, samples)
        outcomes[name] = ClassOutcome(
            name,
            matches,
            _errors_of_matches(name, found, meant, matches),
            found.distance[matches.prediction],
            meant.distance,
            meant.sample,
            ~meant.ignored,
        )
    return DetectionOutcome(outcomes, samples)


def check_box_counts(predictions: BoxTable, samples: Sequence[str] | None = None) -> None:
    """Raise ValueError where a sample has over 500 predictions, as the official evaluation does.

    samples: what the error calls each of them; its number if None.
    """
    counts = np.bincount(predictions.sample) if len(predictions) else np.zeros(1, int)
    if counts.max() > MAX_BOXES:
        most = int(counts.argmax())
        name = most if samples is None else samples[most]
        raise ValueError(f"sample {name} has {counts.max()} predictions, at most {MAX_BOXES} are allowed")


def match_class(predictions: BoxTable, truths: BoxTable, samples: int | None = None) -> ClassMatches:
    """Match one class greedily: by falling score (ties: later row first) each takes the nearest free truth.

    All samples advance together: round r handles the r-th best prediction of every sample.
    samples: how many there are; as many as the rows name if None.
    """
    if samples is None:
        samples = max(int(boxes.sample.max(initial=-1)) for boxes in (predictions, truths)) + 1
    order = np.lexsort((-np.arange(len(predictions)), -predictions.score))
    ranked = predictions.sample[order]
    truth = np.full((len(THRESHOLDS), len(order)), -1, np.int64)
    positives = np.bincount(truths.sample[~truths.ignored], minlength=samples)
    matches = ClassMatches(predictions.score[order], ranked, truth, order, positives)
    slots, counts = _by_sample(ranked, samples)  # (S, P) positions in rank order
    rows, truth_counts = _by_sample(truths.sample, samples)  # (S, G) truth rows
    busy = np.flatnonzero((counts > 0) & (truth_counts > 0))
    busy = busy[np.argsort(-counts[busy], kind="stable")]
    if len(busy) == 0:
        return matches
    rows = rows[busy, : truth_counts[busy].max()]
    places = np.where(rows[..., None] >= 0, truths.xy[rows], np.inf)  # (A, G, 2)
    blocked = np.repeat((rows < 0)[None], len(THRESHOLDS), 0)  # (T, A, G)
    ignored = truths.ignored[rows]
    limits = np.array(THRESHOLDS)[:, None]
    for rank in range(int(counts[busy[0]])):
        active = int(np.searchsorted(-counts[busy], -rank, side="left"))  # samples with more than rank
        at = slots[busy[:active], rank]
        offset = places[:active] - predictions.xy[order[at]][:, None]
        with np.errstate(invalid="ignore"):
            distance = np.sqrt(offset[..., 0] ** 2 + offset[..., 1] ** 2)
        result = truth[:, at]
        _take(distance, blocked[:, :active], ~ignored[:active], rows[:active], limits, result)
        if ignored.any():
            _take(distance, blocked[:, :active], ignored[:active], rows[:active], limits, result, -2)
        truth[:, at] = result
    return matches


def average_precision(precision: Array) -> float:
    """Return the AP of a precision curve over the 101 recalls: low recall and precision are cut off."""
    kept = np.clip(precision[FIRST_RECALL:] - MIN_PRECISION, 0.0, None)
    return float(np.mean(kept)) / (1.0 - MIN_PRECISION)


def usual_attributes(
    label: NDArray[np.int64], velocity: Array, classes: Sequence[str] = DETECTION_CLASSES
) -> NDArray[np.int64]:
    """Return 1 for moving, 0 for still, -1 for classes without attributes or an unknown velocity."""
    speed = np.hypot(velocity[:, 0], velocity[:, 1])
    without = np.isin(label, [i for i, name in enumerate(classes) if name in ("barrier", "traffic_cone")])
    return np.where(without | ~np.isfinite(speed), -1, speed > MOVING_SPEED).astype(np.int64)


def _table(samples: Sequence[Boxes3D]) -> BoxTable:
    box = np.concatenate([np.zeros((0, 9)), *(boxes.box for boxes in samples)]).astype(np.float64)
    label = np.concatenate([np.zeros(0, np.int64), *(boxes.label for boxes in samples)])
    score = np.concatenate([np.zeros(0), *(boxes.score for boxes in samples)])
    sample = np.repeat(np.arange(len(samples)), [len(boxes) for boxes in samples])
    return BoxTable(
        sample,
        label,
        box[:, :2],
        box[:, 3:6],
        box[:, 6],
        box[:, 7:9],
        usual_attributes(label, box[:, 7:9]),
        score,
        np.hypot(box[:, 0], box[:, 1]),
        np.zeros(len(sample), bool),
    )


def _velocity_known(table: BoxTable) -> BoxTable:
    """Replace unknown predicted velocities by 0, so that not answering is no way around the error."""
    velocity = np.nan_to_num(table.velocity)
    return replace(table, velocity=velocity, attribute=usual_attributes(table.label, velocity))


def _in_range(table: BoxTable, classes: Sequence[str], max_range: float | None) -> NDArray[np.bool_]:
    limit = np.array([min(CLASS_RANGE[name], max_range or np.inf) for name in classes] + [0.0])
    return table.distance < limit[np.minimum(table.label, len(classes))]


def _by_sample(sample: NDArray[np.int64], samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (S, longest) positions of each sample's rows in order, -1 beyond, and the (S,) counts."""
    counts = np.bincount(sample, minlength=samples)
    order = np.argsort(sample, kind="stable")
    start = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    table = np.full((samples, int(counts.max(initial=0))), -1, np.int64)
    table[sample[order], np.arange(len(sample)) - start[sample[order]]] = order
    return table, counts


def _take(
    distance: Array,
    blocked: NDArray[np.bool_],
    kind: NDArray[np.bool_],
    rows: NDArray[np.int64],
    limits: Array,
    result: NDArray[np.int64],
    mark: int | None = None,
) -> None:
    """Give each active sample's prediction its nearest free truth of a kind, for every threshold.

    distance, kind, rows: (A, G). blocked: (T, A, G), updated. result: (T, A), updated where it is -1.
    """
    free = np.where(blocked | ~kind, np.inf, distance)
    nearest = free.argmin(axis=2)  # (T, A)
    shortest = np.take_along_axis(free, nearest[..., None], 2)[..., 0]
    hit = (shortest < limits) & (result == -1)
    threshold, active = np.nonzero(hit)
    chosen = nearest[threshold, active]
    blocked[threshold, active, chosen] = True
    result[threshold, active] = rows[active, chosen] if mark is None else mark


def _curve(matches: ClassMatches, threshold: int) -> tuple[Array, Array]:
    """Return precision and score (101,) at the recalls, zero beyond the highest recall reached."""
    truth = matches.truth[threshold]
    counted = truth != -2
    hits, score = (truth >= 0)[counted], matches.score[counted]
    positives = int(matches.positives.sum())
    if positives == 0 or not hits.any():
        return np.zeros(len(RECALLS)), np.zeros(len(RECALLS))
    found = np.cumsum(hits).astype(np.float64)
    precision, recall = found / np.arange(1, len(hits) + 1), found / positives
    return (
        np.interp(RECALLS, recall, precision, right=0),
        np.interp(RECALLS, recall, score, right=0),
    )


def _scores_of(outcomes: Iterable[ClassOutcome]) -> DetectionScores:
    ap: dict[str, dict[float, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    precision: dict[str, dict[float, Array]] = {}
    truths: dict[str, int] = {}
    predictions: dict[str, int] = {}
    at = THRESHOLDS.index(TP_THRESHOLD)
    for outcome in outcomes:
        name, matches = outcome.name, outcome.matches
        curves = [_curve(matches, t) for t in range(len(THRESHOLDS))]
        precision[name] = {t: curve for t, (curve, _) in zip(THRESHOLDS, curves, strict=True)}
        ap[name] = {t: average_precision(curve) for t, curve in precision[name].items()}
        errors[name] = _tp_errors(outcome, curves[at][1])
        truths[name] = int(matches.positives.sum())
        predictions[name] = int(np.count_nonzero(matches.truth[at] != -2))
    return DetectionScores(ap, errors, truths, predictions, precision)


def _errors_of_matches(name: str, predictions: BoxTable, truths: BoxTable, matches: ClassMatches) -> dict[str, Array]:
    """Return the five errors (P,) of predictions matched within 2 m; NaN for the others."""
    truth = matches.truth[THRESHOLDS.index(TP_THRESHOLD)]
    hit = truth >= 0
    found, meant = predictions[matches.prediction[hit]], truths[truth[hit]]
    errors = {}
    for error, values in match_errors(found, meant, half_turn=name == "barrier").items():
        errors[error] = np.full(len(truth), np.nan)
        errors[error][hit] = values
    return errors


def _tp_errors(outcome: ClassOutcome, score_at_recall: Array) -> dict[str, float]:
    """Return the five errors of the matches at 2 m, each averaged over recalls from 11 % on."""
    matches = outcome.matches
    hit = matches.truth[THRESHOLDS.index(TP_THRESHOLD)] >= 0
    reached = np.flatnonzero(score_at_recall)
    last = int(reached[-1]) if len(reached) else 0
    undefined = UNDEFINED_ERRORS.get(outcome.name, ())
    return {
        error: math.nan
        if error in undefined
        else _mean_over_recalls(outcome.errors[error][hit], matches.score[hit], score_at_recall, last)
        for error in TP_ERRORS
    }


def match_errors(found: BoxTable, meant: BoxTable, *, half_turn: bool = False) -> dict[str, Array]:
    """Return the five errors (H,) of matched pairs; NaN where the truth does not know.

    half_turn: headings that differ by pi are the same (barriers).
    """
    smaller = np.prod(np.minimum(found.size, meant.size), axis=1)
    union = np.prod(found.size, axis=1) + np.prod(meant.size, axis=1) - smaller
    period = np.pi if half_turn else 2 * np.pi
    turn = np.abs(np.mod(meant.yaw - found.yaw + period / 2, period) - period / 2)
    wrong = (found.attribute != meant.attribute).astype(np.float64)
    return {
        "trans_err": np.hypot(*(found.xy - meant.xy).T),
        "scale_err": 1.0 - smaller / union,
        "orient_err": turn,
        "vel_err": np.hypot(*(found.velocity - meant.velocity).T),
        "attr_err": np.where(meant.attribute < 0, np.nan, wrong),
    }


def _mean_over_recalls(errors: Array, scores: Array, score_at_recall: Array, last: int) -> float:
    """Average the running mean of matched errors, resampled at the recalls by score."""
    if last < FIRST_RECALL:
        return 1.0
    resampled = np.interp(score_at_recall[::-1], scores[::-1], _running_mean(errors)[::-1])[::-1]
    return float(np.mean(resampled[FIRST_RECALL : last + 1]))


def _running_mean(values: ArrayLike) -> Array:
    """Return the mean of the known values so far; 1 throughout where none is known."""
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    count = np.cumsum(known)
    total = np.cumsum(np.where(known, values, 0.0))
    return np.divide(total, count, out=np.zeros(len(values)), where=count > 0)
