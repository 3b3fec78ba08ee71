"""Detection scores: by hand, by a plain re-statement of the rules, and against the official kit's numbers."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from occbev.classes import DETECTION_CLASSES
from occbev.results import Boxes3D
from occbev_training.metrics.detection import (
    TP_ERRORS,
    BoxTable,
    average_precision,
    evaluate_detection,
    match_class,
    match_errors,
    score_boxes,
)
from occbev_training.metrics.nuscenes_results import (
    ResultsError,
    evaluate_results,
    read_results,
    result_boxes,
    write_results,
)
from occbev_training.sources.nuscenes import open_nuscenes
from occbev_training.sources.nuscenes_writer import write_nuscenes
from occbev_training.sources.recording import Annotations

SHARED = Path(os.environ.get("OCCBEV_SHARED", Path(__file__).parents[3] / "shared")) / "data"
CAR, BARRIER, CONE = (DETECTION_CLASSES.index(n) for n in ("car", "barrier", "traffic_cone"))


def boxes(rows: list[tuple[float, ...]], label: int = CAR, scores: list[float] | None = None) -> Boxes3D:
    """Boxes at (x, y) with an optional yaw and velocity."""
    box = np.zeros((len(rows), 9), np.float32)
    for i, row in enumerate(rows):
        x, y, *rest = row
        yaw, vx, vy = [*rest, 0.0, 0.0, 0.0][:3]
        box[i] = [x, y, 0.8, 4.0, 2.0, 1.6, yaw, vx, vy]
    score = np.ones(len(rows)) if scores is None else scores
    return Boxes3D(box, np.full(len(rows), label), np.array(score, np.float32))


def annotated(rows: list[tuple[float, ...]], label: int = CAR, points: int = 10) -> Annotations:
    names = tuple(f"i{i}" for i in range(len(rows)))
    return Annotations(boxes(rows, label), names, np.full(len(rows), points))


def ap(predicted: list[Boxes3D], truth: list[Annotations], **options: object) -> dict[float, float]:
    return dict(evaluate_detection(predicted, truth, ("car",), **options).ap["car"])


def test_an_unknown_predicted_velocity_counts_as_standing() -> None:
    unknown, standing = (boxes([(10.0, 0.0, 0.0, speed, speed)]) for speed in (np.nan, 0.0))
    for found in (unknown, standing):
        errors = evaluate_detection([found], [annotated([(10.0, 0.0)])]).tp_errors["car"]
        assert (errors["vel_err"], errors["attr_err"]) == (0.0, 0.0)


def test_perfect_boxes_score_one() -> None:
    rows = [(10.0, 1.0), (20.0, -5.0), (30.0, 8.0)]
    scores = evaluate_detection([boxes(rows)] * 2, [annotated(rows)] * 2, ("car",))
    assert scores.mean_ap == pytest.approx(1.0)
    assert scores.nds == pytest.approx(1.0)
    assert scores.truths == {"car": 6}


def test_no_boxes_score_zero_with_errors_of_one() -> None:
    scores = evaluate_detection([Boxes3D.empty()], [annotated([(10, 0)])], ("car",))
    assert scores.mean_ap == 0
    assert scores.tp_errors["car"] == dict.fromkeys(TP_ERRORS, 1.0)
    assert scores.nds == 0


def test_class_without_truth_counts_as_zero_and_is_named() -> None:
    rows = [(10.0, 1.0)]
    scores = evaluate_detection([boxes(rows)], [annotated(rows)], ("car", "truck"))
    assert scores.mean_ap == pytest.approx(0.5)
    assert scores.classes_without_truth == ("truck",)
    assert scores.mean_ap_of_present == pytest.approx(1.0)


def test_one_right_one_wrong_by_hand() -> None:
    """Score order TP, FP with two truths: precision 1 up to recall 0.5, then nothing."""
    got = ap([boxes([(10, 0), (30, 20)], scores=[0.9, 0.8])], [annotated([(10, 0), (20, 0)])])
    # recalls 0.11..0.49 have precision 1; at 0.5 interpolation meets the repeated recall's last entry, 1/2
    expected = (39 * 0.9 + 1 * 0.4) / 90 / 0.9
    assert got[2.0] == pytest.approx(expected)


def test_thresholds_are_strict_centre_distances() -> None:
    got = ap([boxes([(11.0, 0)])], [annotated([(10.0, 0)])])
    assert got == pytest.approx({0.5: 0, 1.0: 0, 2.0: 1, 4.0: 1})


def test_each_truth_is_found_once() -> None:
    scores = evaluate_detection([boxes([(10, 0), (10, 0.1)], scores=[0.5, 0.9])], [annotated([(10, 0)])], ("car",))
    precision = scores.precision["car"][2.0]
    np.testing.assert_allclose(precision[:100], 1.0)
    assert precision[100] == pytest.approx(0.5)  # the double lowers it at full recall only
    two = ap([boxes([(10, 0), (10, 0.1)])], [annotated([(10, 0), (30, 0)])])
    assert two[2.0] < 0.5


def test_nearest_free_truth_is_taken_greedily_by_score() -> None:
    """The better score takes its nearest truth even if the other prediction loses its only one."""
    predicted = boxes([(0, 10), (0.0, 11.4)], scores=[0.9, 0.8])
    matches = _matches(predicted, annotated([(0, 11.0), (0, 7.9)]))
    assert matches.truth[2].tolist() == [0, -1]  # 2 m: the second is left with a truth 3.5 m away
    assert matches.truth[3].tolist() == [0, 1]  # 4 m


def test_equal_scores_are_taken_last_row_first() -> None:
    matches = _matches(boxes([(10, 0), (10, 0.2), (10, 0.4)], scores=[0.5, 0.5, 0.5]), annotated([(10, 0)]))
    assert matches.prediction.tolist() == [2, 1, 0]
    assert matches.truth[2].tolist() == [0, -1, -1]


def test_ranges_cut_truth_and_predictions() -> None:
    rows = [(10.0, 0), (49.9, 0), (50.0, 0), (30.0, 40.1)]
    scores = evaluate_detection([boxes(rows)], [annotated(rows)], ("car",))
    assert scores.truths["car"] == scores.predictions["car"] == 2
    near = evaluate_detection([boxes(rows)], [annotated(rows)], ("car",), max_range=30.0)
    assert near.truths["car"] == 1
    cones = evaluate_detection([boxes(rows, CONE)], [annotated(rows, CONE)], max_range=100.0)
    assert cones.truths["traffic_cone"] == 1  # 30 m is the class's own range


def test_truth_without_returns_is_dropped_or_ignored() -> None:
    unseen = Annotations(boxes([(10, 0), (20, 0)]), ("a", "b"), np.array([9, 0]))
    predicted = [boxes([(10, 0), (20, 0)], scores=[0.5, 0.9])]
    official = evaluate_detection(predicted, [unseen], ("car",))
    assert official.truths["car"] == 1
    assert official.ap["car"][2.0] < 0.6  # the box on the unseen car is a false positive
    lenient = evaluate_detection(predicted, [unseen], ("car",), ignore_excluded=True)
    assert lenient.truths["car"] == 1
    assert lenient.ap["car"][2.0] == pytest.approx(1.0)
    strict = evaluate_detection(predicted, [unseen], ("car",), min_points=10)
    assert strict.truths["car"] == 0
    every = evaluate_detection(predicted, [unseen], ("car",), min_points=0)
    assert every.truths["car"] == 2


def test_an_ignored_truth_absorbs_one_prediction_only() -> None:
    unseen = Annotations(boxes([(10, 0), (20, 0)]), ("a", "b"), np.array([9, 0]))
    predicted = [boxes([(10, 0), (20, 0), (20, 0.3)], scores=[0.5, 0.9, 0.8])]
    once = evaluate_detection(predicted, [unseen], ("car",), ignore_excluded=True)
    assert 0.1 < once.ap["car"][2.0] < 0.6


def test_errors_of_known_pairs() -> None:
    found = boxes([(10.0, 0.3, 0.1, 2.0, 0.0)])
    meant = boxes([(10.4, 0.0, -0.2, 2.0, 1.0)])
    errors = match_errors(_box_table(found), _box_table(meant))
    assert errors["trans_err"] == pytest.approx([0.5], abs=1e-6)
    assert errors["scale_err"] == pytest.approx([0.0])
    assert errors["orient_err"] == pytest.approx([0.3], abs=1e-6)
    assert errors["vel_err"] == pytest.approx([1.0], abs=1e-6)
    larger = boxes([(10, 0)])
    larger.box[0, 3] = 8.0  # 4x2x1.6 inside 8x2x1.6
    assert match_errors(_box_table(larger), _box_table(meant))["scale_err"] == pytest.approx([0.5])


def test_barriers_have_no_front() -> None:
    turned, straight = boxes([(10, 0, math.pi)], BARRIER), boxes([(10, 0, 0.0)], BARRIER)
    for half_turn, expected in ((True, 0.0), (False, math.pi)):
        errors = match_errors(_box_table(turned), _box_table(straight), half_turn=half_turn)
        assert errors["orient_err"] == pytest.approx([expected], abs=1e-6)
    scores = evaluate_detection([turned], [annotated([(10, 0)], BARRIER)])
    assert scores.tp_errors["barrier"]["orient_err"] == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(scores.tp_errors["barrier"]["vel_err"])


def test_unknown_true_velocity_is_skipped_and_unknown_predicted_is_zero() -> None:
    truth = annotated([(10, 0), (20, 0)])
    truth.boxes.box[0, 7:] = np.nan
    truth.boxes.box[1, 7:] = (3.0, 0.0)
    predicted = boxes([(10, 0, 0, 9.0, 9.0), (20, 0, 0, np.nan, np.nan)], scores=[0.9, 0.8])
    error = evaluate_detection([predicted], [truth], ("car",)).tp_errors["car"]["vel_err"]
    # 0 up to recall 0.5, where no velocity is known yet, then in a line to 3 at full recall
    assert error == pytest.approx(sum(3 * k / 50 for k in range(1, 51)) / 90)


def test_too_many_boxes_are_an_error() -> None:
    crowd = boxes([(10 + 0.01 * i, 0) for i in range(501)])
    with pytest.raises(ValueError, match="sample 1 has 501"):
        evaluate_detection([Boxes3D.empty(), crowd], [annotated([])] * 2)
    with pytest.raises(ValueError, match="1 samples predicted, 2 annotated"):
        evaluate_detection([Boxes3D.empty()], [annotated([])] * 2)


def test_matching_equals_a_plain_loop() -> None:
    """The array form against the rule stated one box at a time, with ties and crowded samples."""
    generator = np.random.default_rng(5)
    for _ in range(30):
        found = _random_table(generator, int(generator.integers(0, 60)), 4, truth=False)
        meant = _random_table(generator, int(generator.integers(0, 40)), 4, truth=True)
        matches = match_class(found, meant)
        for t, threshold in enumerate((0.5, 1.0, 2.0, 4.0)):
            assert matches.truth[t].tolist() == _match_by_loop(found, meant, threshold)


def test_average_precision_cuts_low_recall_and_precision() -> None:
    assert average_precision(np.ones(101)) == pytest.approx(1.0)
    assert average_precision(np.full(101, 0.1)) == 0.0
    only_low = np.zeros(101)
    only_low[:11] = 1.0
    assert average_precision(only_low) == 0.0


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {SHARED} is not there")
@pytest.mark.parametrize("name", ["cc_3dt_pure_det", "fastbev"])
def test_real_results_score_as_the_official_kit_says(name: str) -> None:
    folder = SHARED / "nuscenes-0103"
    expected = json.loads((folder / "results" / "reference_metrics.json").read_text())["results"][name]
    scores = evaluate_results(read_results(folder / "results" / f"{name}.json"), open_nuscenes(folder))
    assert sum(scores.truths.values()) == 1489
    assert scores.mean_ap == pytest.approx(expected["mean_ap"], abs=1e-9)
    assert scores.nds == pytest.approx(expected["nd_score"], abs=1e-6)
    assert scores.mean_tp_errors == pytest.approx(expected["tp_errors"], abs=1e-6)
    for label in DETECTION_CLASSES:
        by_distance = {float(t): v for t, v in expected["label_aps"][label].items()}
        assert scores.ap[label] == pytest.approx(by_distance, abs=1e-9)
        errors = {e: math.nan if v is None else v for e, v in expected["label_tp_errors"][label].items()}
        assert scores.tp_errors[label] == pytest.approx(errors, abs=1e-6, nan_ok=True)


def test_results_of_an_own_drive(tmp_path: Path, tiny_recording) -> None:
    """Truth written as results in the global frame scores as perfect, through the official path."""
    write_nuscenes([tiny_recording], tmp_path)
    root = open_nuscenes(tmp_path)
    recording = root.recordings()[0]
    results = {
        token: result_boxes(token, recording.annotations(key).boxes, recording.key_pose(key))
        for key, token in enumerate(recording.sample_tokens)
    }
    write_results(tmp_path / "results.json", results)
    scores = evaluate_results(read_results(tmp_path / "results.json"), root)
    assert scores.class_ap["car"] == pytest.approx(1.0)
    assert scores.class_ap["pedestrian"] == pytest.approx(1.0)
    assert scores.tp_errors["car"] == pytest.approx(dict.fromkeys(TP_ERRORS, 0.0), abs=2e-3)
    with pytest.raises(ResultsError, match="missing"):
        evaluate_results({}, root)
    results[recording.sample_tokens[0]][0]["detection_name"] = "tank"
    with pytest.raises(ResultsError, match="tank"):
        evaluate_results(results, root)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ResultsError, match="results.json"):
        read_results(tmp_path / "results.json")


def test_record_is_plain_json() -> None:
    record = evaluate_detection([boxes([(10, 0)])], [annotated([(10, 0)])]).as_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["class_tp_errors"]["traffic_cone"]["vel_err"] is None


def _box_table(of: Boxes3D) -> BoxTable:
    count = len(of)
    return BoxTable(
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        of.box[:, :2].astype(float),
        of.box[:, 3:6].astype(float),
        of.box[:, 6].astype(float),
        of.box[:, 7:9].astype(float),
        np.zeros(count, np.int64),
        of.score.astype(float),
        np.hypot(of.box[:, 0], of.box[:, 1]).astype(float),
        np.zeros(count, bool),
    )


def _matches(predicted: Boxes3D, truth: Annotations):
    return match_class(_box_table(predicted), _box_table(truth.boxes))


def _random_table(generator: np.random.Generator, count: int, samples: int, *, truth: bool) -> BoxTable:
    xy = generator.integers(0, 14, (count, 2)) * 0.5  # a lattice, so that distances tie
    return BoxTable(
        generator.integers(0, samples, count),
        np.zeros(count, np.int64),
        xy,
        np.ones((count, 3)),
        np.zeros(count),
        np.zeros((count, 2)),
        np.zeros(count, np.int64),
        generator.integers(0, 8, count) / 8,
        np.hypot(*xy.T),
        generator.random(count) < (0.3 if truth else 0.0),
    )


def _match_by_loop(found: BoxTable, meant: BoxTable, threshold: float) -> list[int]:
    order = sorted(range(len(found)), key=lambda i: (found.score[i], i), reverse=True)
    free = set(range(len(meant)))
    result = []
    for i in order:
        outcome = -1
        for ignored in (False, True):
            near = [
                (math.dist(found.xy[i], meant.xy[j]), j)
                for j in sorted(free)
                if meant.sample[j] == found.sample[i] and meant.ignored[j] == ignored
            ]
            if near and min(near)[0] < threshold:
                chosen = min(near)[1]
                free.remove(chosen)
                outcome = -2 if ignored else chosen
                break
        result.append(outcome)
    return result


def test_scores_do_not_depend_on_the_order_of_samples() -> None:
    generator = np.random.default_rng(9)
    found = _random_table(generator, 200, 10, truth=False)
    found = replace(found, score=generator.random(200))
    meant = _random_table(generator, 120, 10, truth=True)
    renumbered = generator.permutation(10)
    scores = score_boxes(found, meant, ("car",))
    moved = score_boxes(_renumber(found, renumbered), _renumber(meant, renumbered), ("car",))
    assert moved.ap["car"] == pytest.approx(scores.ap["car"])
    assert moved.tp_errors["car"] == pytest.approx(scores.tp_errors["car"])
    assert 0.1 < scores.mean_ap < 0.9


def _renumber(table: BoxTable, number: np.ndarray) -> BoxTable:
    rest = [getattr(table, n) for n in list(table.__dataclass_fields__)[1:]]
    return BoxTable(number[table.sample], *rest)


BROKEN = {
    "velocity": ([float("nan"), 0.0], None, [0.0], "fast", [0.0, 0.0, 0.0], [True, 0.0]),
    "detection_score": (float("nan"), "0.9", None, 1, float("inf"), True),
    "size": ([float("nan"), 4.0, 1.5], [-1.8, 4.0, 1.5], [0.0, 4.0, 1.5], 4.0, [[1.8], 4.0, 1.5]),
    "translation": ([float("nan"), 1.0, 0.5], [1.0, 2.0], [None, 1.0, 0.5]),
    "rotation": ([0.0, 0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0, 1.0], [1.0, 0.0, 0.0]),
    "attribute_name": (None, "vehicle.flying", ["vehicle.parked"]),
    "detection_name": ("Car", "", None, ["car"]),
    "sample_token": ("another", None, 7),
}


@pytest.fixture(scope="module")
def good_results(tmp_path_factory: pytest.TempPathFactory, make_recording) -> tuple[Path, dict[str, list[dict]]]:
    folder = tmp_path_factory.mktemp("results")
    write_nuscenes([make_recording(keys=2)], folder)
    recording = open_nuscenes(folder).recordings()[0]
    results = {
        token: result_boxes(token, recording.annotations(key).boxes, recording.key_pose(key))
        for key, token in enumerate(recording.sample_tokens)
    }
    return folder, results


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BROKEN.items() for value in values])
def test_a_box_that_the_official_kit_refuses_is_named(tmp_path: Path, good_results, field: str, value: object) -> None:
    results = json.loads(json.dumps(good_results[1]))
    sample = list(results)[1]
    results[sample][1][field] = value
    write_results(tmp_path / "results.json", results)
    with pytest.raises(ResultsError, match=rf"results\.json: sample {sample}, box 1: {field} is .*; want ") as caught:
        read_results(tmp_path / "results.json")
    assert "\n" not in str(caught.value)


def test_a_sample_with_too_many_boxes_is_named_by_its_token(good_results) -> None:
    folder, results = good_results
    sample = list(results)[1]
    crowded = {**results, sample: results[sample][:1] * 501}
    with pytest.raises(ValueError, match=f"sample {sample} has 501 predictions"):
        evaluate_results(crowded, open_nuscenes(folder))


def test_results_of_another_form_are_named(tmp_path: Path, good_results) -> None:
    path, sample = tmp_path / "results.json", next(iter(good_results[1]))
    for rows, text in ((None, "holds null; want a list"), ([3], "box 0: is 3; want an object")):
        write_results(path, {**good_results[1], sample: rows})
        with pytest.raises(ResultsError, match=f"sample {sample}.*{text}"):
            read_results(path)
    lacking = json.loads(json.dumps(good_results[1]))
    del lacking[sample][0]["velocity"]
    write_results(path, lacking)
    with pytest.raises(ResultsError, match="has no velocity"):
        read_results(path)
    path.write_text(json.dumps({"results": {}}))
    with pytest.raises(ResultsError, match="'meta'"):
        read_results(path)
    path.write_text('{"meta": {}, "results": {"a": [], "a": []}}')
    with pytest.raises(ResultsError, match="the key 'a' is there twice"):
        read_results(path)


def test_scores_against_nothing_are_refused(good_results, tmp_path: Path) -> None:
    folder, results = good_results
    root = open_nuscenes(folder)
    assert evaluate_results(results, root).class_ap["car"] == pytest.approx(1.0)
    for row in root.tables["category"].values():
        row["name"] = "forklift"
    with pytest.raises(ResultsError, match="4 boxes are of categories without a class: forklift 4; --classes"):
        evaluate_results(results, root)
    root = open_nuscenes(folder)
    for row in root.tables["sample_annotation"].values():
        row["num_lidar_pts"] = row["num_radar_pts"] = 0
    with pytest.raises(ResultsError, match="of 4 annotations 4 have a class, 4 .* none of them has a LiDAR"):
        evaluate_results(results, root)


def test_attributes_of_another_taxonomy_are_no_fault_of_the_truth(good_results) -> None:
    root = open_nuscenes(good_results[0])
    for row in root.tables["attribute"].values():
        row["name"] = "vehicle_state.driving"
    assert evaluate_results(good_results[1], root).class_ap["car"] == pytest.approx(1.0)
