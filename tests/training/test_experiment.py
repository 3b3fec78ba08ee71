"""The experiment: plans that are held to, labels that no arm should see, and statistics against plain counts."""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import permutation_test

from occbev.config import save_config
from occbev.results import Boxes3D
from occbev.rig import CameraRig
from occbev_training.data.cache import CachedSample, write_sample
from occbev_training.experiment import checks
from occbev_training.experiment.found import Findings, found_among, keep_as_many, look_for_objects, targets_of
from occbev_training.experiment.network import CLASSES, GRID, MODEL, build_slim, reset_norms
from occbev_training.experiment.phases import ALL_PARTS, CARRIED, finetune, pretrain
from occbev_training.experiment.plan import (
    Drives,
    Plan,
    PlanError,
    RecordedPlan,
    RunGroup,
    WorldPlan,
    load_plan,
    register,
    registration_of,
    require_registered,
)
from occbev_training.experiment.pool import (
    Pool,
    drive_folder,
    labelled_drives,
    labelled_pool,
    sample_file,
    turn_sample,
    whole_pool,
)
from occbev_training.experiment.product import ProductPlan, load_any_plan
from occbev_training.experiment.recorded import block_keys, make_blocks, rig_file
from occbev_training.experiment.report import (
    ZOO_BEGIN,
    ZOO_END,
    Results,
    chapter_of,
    sections_of,
    to_markdown,
    to_page,
    write_docs,
)
from occbev_training.experiment.runs import (
    Task,
    Workplace,
    begin_with,
    do_task,
    read_rows,
    require_same_drives,
    run_tasks,
    tasks_of,
)
from occbev_training.experiment.statistics import CUT, SCORED, MatchRecord, compare, holm, sign_flip
from occbev_training.experiment.world import VEHICLES, rig_of
from occbev_training.metrics.detection import match_detection
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.sources.recording import Annotations

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "config" / "experiment").glob("*.yaml"))

SMALL = Plan(
    "small",
    WorldPlan(Drives(9990, 4), Drives(19990, 1), Drives(780_000, 2), Drives(790_000, 1), keys=2),
    pretrain_steps=2,
    finetune_steps=1,
    batch=2,
    runs=(RunGroup(("R", "D", "O"), 50.0, 2),),
    family_percent=50.0,
    draws=50,
)


def _sample(seed: int) -> CachedSample:
    """A scene of random pixels and voxels, seen through one of the experiment's rigs."""
    rng = np.random.default_rng(seed)
    rig = rig_of(VEHICLES[0], rng)
    boxes = np.zeros((4, 9), np.float32)
    boxes[:, :2] = rng.uniform(-20, 20, (4, 2))
    boxes[:, 2:7] = 0.8, 4.0, 2.0, 1.6, 0.3
    return CachedSample(
        images=rng.integers(0, 255, (4, 48, 96, 3), np.uint8),
        camera_valid=np.ones(4, bool),
        intrinsic=rig.intrinsics,
        cam2ego=rig.cam2egos,
        lidar_camera=rng.integers(0, 4, 50).astype(np.uint8),
        lidar_pixel=(rng.random((50, 2)) * (96, 48)).astype(np.float32),
        lidar_depth=rng.uniform(2, 30, 50).astype(np.float32),
        state=rng.integers(0, 3, GRID.shape, np.uint8),
        camera_visible=rng.integers(0, 16, GRID.shape, np.uint8),
        hit_sweeps=rng.integers(0, 5, GRID.shape, np.uint8),
        pass_sweeps=rng.integers(0, 5, GRID.shape, np.uint8),
        boxes=boxes,
        labels=np.array([0, 3, 8, 6]),  # car, bus, pedestrian, motorcycle
        lidar_points=np.full(4, 9),
        semantics=rng.integers(0, 18, GRID.shape, np.uint8),
        mask_camera=rng.random(GRID.shape) < 0.5,
    )


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Drives of `SMALL` as `make_world` leaves them, without rendering."""
    root = tmp_path / "world"
    for split in ("train", "development", "test", "unseen_rig"):
        for number in range(getattr(SMALL.world, split).count):
            folder = drive_folder(root, split, number, SMALL.world)
            folder.mkdir(parents=True)
            for key in range(SMALL.world.keys):
                write_sample(sample_file(folder, key), _sample(zlib.crc32(f"{split} {number} {key}".encode())))
            np.save(folder / "published.npy", np.ones((SMALL.world.keys, *GRID.shape), np.uint8))
            (folder / "done.json").write_text(json.dumps([split, number]))
    return root


@pytest.fixture
def place(tmp_path: Path, world: Path) -> Workplace:
    """A registered plan and its drives."""
    path = tmp_path / "small.yaml"
    save_config(path, SMALL)
    register(path, load_plan(path))
    return Workplace.of(path, tmp_path)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_of_the_project_is_registered_as_it_stands(path: Path) -> None:
    plan = load_any_plan(path)
    assert json.loads(registration_of(path).read_text())["hash"] == plan.hash
    assert plan.name == path.stem


def test_the_tested_family_can_reach_significance() -> None:
    plan = load_plan(ROOT / "config" / "experiment" / "mechanism.yaml")
    best = sign_flip([1.0] * plan.family_seeds)
    assert best is not None
    assert holm({str(pair): best for pair in plan.family}) == pytest.approx(
        dict.fromkeys(map(str, plan.family), 2 * best)
    )
    assert 2 * best < 0.05


def test_no_two_plans_share_test_drives() -> None:
    scored = []
    for plan in map(load_any_plan, PLANS):
        if isinstance(plan, ProductPlan):
            scored.append({*plan.test.seeds})
        elif plan.world.recorded is None:
            scored.append({*plan.world.test.seeds, *plan.world.unseen_rig.seeds})
    assert len(scored) >= 2
    assert all(not a & b for a, b in itertools.combinations(scored, 2))


def test_test_drives_stay_closed_until_the_plan_is_registered(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    save_config(path, SMALL)
    with pytest.raises(PlanError, match="not registered"):
        require_registered(path, load_plan(path))
    register(path, load_plan(path))
    require_registered(path, load_plan(path))
    save_config(path, replace(SMALL, finetune_steps=7))
    with pytest.raises(PlanError, match=r"has hash \w+, plan\.registered\.json registers"):
        require_registered(path, load_plan(path))
    with pytest.raises(PlanError, match="take another name"):
        register(path, load_plan(path))


def test_a_run_on_test_drives_of_a_changed_plan_is_refused_before_it_is_trained(place: Workplace) -> None:
    save_config(place.path, replace(SMALL, pretrain_steps=3))
    with pytest.raises(PlanError, match="registers"):
        do_task(Task("run", "R", 50, 0), place.path, place.out)
    assert not list(place.out.glob("*/runs"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: replace(SMALL.world, test=Drives(9990, 2)), r"world\.test: seeds .* must be within"),
        (lambda: replace(SMALL.world, unseen_rig=Drives(780_001, 2)), "two splits"),
        (lambda: replace(SMALL, runs=(RunGroup(("R",), 50, 2),)), r"arms \['D', 'O'\] are not run"),
        (lambda: replace(SMALL, checks="never"), "first, after_family or none"),
        (lambda: replace(SMALL, world=replace(SMALL.world, recorded=RecordedPlan("drive"))), "a real drive wants none"),
        (lambda: RecordedPlan("drive", blocks=0), "blocks and block_keys must be at least 1"),
        (lambda: replace(SMALL, check_seed=1), "runs on test drives have it"),
        (lambda: RunGroup(("R", "Q"), 10, 1), r"arms \['Q'\] are unknown"),
    ],
)
def test_plans_that_cannot_be_right_are_refused(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        wrong()


def test_shares_of_labels_are_nested_and_differ_between_seeds() -> None:
    few, more = (set(labelled_drives(40, percent, 3)) for percent in (10, 25))
    assert len(few) == 4
    assert len(more) == 10
    assert few < more
    assert labelled_drives(40, 10, 3) != labelled_drives(40, 10, 4)
    assert labelled_drives(40, 1, 0) == labelled_drives(40, 2.5, 0)


def test_pools_hold_the_classes_and_labels_of_their_arm(world: Path) -> None:
    ours, published, wrong, plain = (
        whole_pool(world, "train", SMALL.world, labels)
        for labels in ("measured", "published", "wrong_drive", "unweighted")
    )
    assert ours[0].labels.tolist() == [0, 1, 2]  # a bus is a large vehicle, a motorcycle has no class
    assert (published[3].state == 1).all()
    assert (plain[0].camera_visible == 255).all()
    for index in range(len(ours)):
        same = [i for i in range(len(ours)) if np.array_equal(ours[i].state, wrong[index].state)]
        assert len(same) == 1
        assert ours.drive(same[0]) != ours.drive(index)
        assert np.array_equal(ours[index].images, wrong[index].images)


def test_a_scene_turned_four_times_is_itself() -> None:
    sample = _sample(0)
    turned = sample
    for _ in range(4):
        turned = turn_sample(turned, 1)
    for name in ("cam2ego", "boxes", "state", "semantics"):
        np.testing.assert_allclose(getattr(turned, name), getattr(sample, name), atol=1e-5)
    once = turn_sample(sample, 1)
    np.testing.assert_allclose(once.boxes[:, 0], -sample.boxes[:, 1])
    occupied = np.argwhere(sample.state == 2)[0]
    x, y, z = GRID.centres(occupied)
    cell, _ = GRID.indices([(-y, x, z)])
    assert once.state[tuple(cell[0])] == 2


def test_the_bev_turns_with_the_scene_and_a_mismatch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.turn_scene(_sample(1))["passed"]
    monkeypatch.setattr(checks, "turn_sample", lambda sample, quarters: turn_sample(sample, 2))
    assert not checks.turn_scene(_sample(1))["passed"]


def test_the_colour_probe_finds_colours_that_tell_the_class(world: Path) -> None:
    def paint(pool: Pool, by_class: bool) -> Pool:
        rng = np.random.default_rng(0)
        for index in range(len(pool)):
            sample = pool[index]
            only = index % 2  # one car or one pedestrian, five metres before the first camera
            box = np.array([[5 * np.cos(np.pi / 4), 5 * np.sin(np.pi / 4), 1, 1, 1, 2, 0, 0, 0]], np.float32)
            colour = (200, 40, 40) if (only if by_class else rng.random() < 0.5) else (40, 40, 200)
            images = np.broadcast_to(np.array(colour, np.uint8), sample.images.shape)
            pool._kept[index] = replace(sample, images=images, boxes=box, labels=np.array([2 * only]))
        return pool

    leaking = [paint(whole_pool(world, split, SMALL.world), True) for split in ("train", "development")]
    assert checks.probe_colours(*leaking)["value"] == 1.0
    assert not checks.probe_colours(*leaking)["passed"]


def test_arms_of_one_seed_begin_alike_and_carry_what_they_say(world: Path, tmp_path: Path) -> None:
    pretrain("O", 0, SMALL, world, tmp_path / "phase1")
    start = tmp_path / "phase1" / "weights.safetensors"
    still = replace(SMALL, finetune_steps=1)
    before = {name: w.clone() for name, w in build_slim("finetune", 0).state_dict().items()}
    for arm in ("O", "I-image", "I-bev", "D"):
        network = finetune(arm, 50, 0, still.settings_of(arm), still, world, tmp_path / arm, start)
        moved = {
            name.split(".")[0]
            for name, weight in network.state_dict().items()
            if weight.ndim == 4 and float((weight - before[name]).abs().max()) > 3.5e-3  # one step moves a weight by lr
        }
        carried = set(CARRIED.get(arm, ALL_PARTS))
        assert carried - {"view_transform"} <= moved | carried
        assert "detection_head" not in moved
        assert moved <= carried


def test_norms_forget_phase_1() -> None:
    network = build_slim("finetune", 0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(5)
    reset_norms(network)
    means = [m.running_mean for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(mean is not None and bool((mean == 0).all()) for mean in means)


def _record(
    seed: int, skill: float, drives: int = 5, frames: int = 4
) -> tuple[MatchRecord, list[Boxes3D], list[Annotations]]:
    """Matches of random boxes, and the boxes that they are of."""
    rng = np.random.default_rng(seed)
    found, meant = [], []
    for _ in range(drives * frames):
        box = np.zeros((8, 9), np.float32)
        box[:, :2] = rng.uniform(-20, 20, (8, 2))
        box[:, 3:6] = 4, 2, 1.6
        label = rng.integers(0, len(CLASSES), 8)
        meant.append(Annotations(Boxes3D(box, label, np.ones(8, np.float32)), ("",) * 8, np.full(8, 5)))
        guess = box.copy()
        guess[:, :2] += rng.normal(scale=1.5 - skill, size=(8, 2))
        found.append(Boxes3D(guess, label, rng.random(8).astype(np.float32)))
    outcome = match_detection(found, meant, CLASSES)
    return MatchRecord.of(outcome, np.repeat(np.arange(drives), frames).tolist()), found, meant


def test_scores_of_resampled_drives_are_those_of_the_metrics() -> None:
    record, found, meant = _record(0, 0.9)
    outcome = match_detection(found, meant, CLASSES)
    for times in np.random.default_rng(1).multinomial(5, np.full(5, 0.2), 6):
        ap = outcome.scores_resampled(np.repeat(times, 4)).ap
        wanted = np.mean([ap[name][t] for name in CLASSES for t in SCORED])
        assert record.mean_ap(times[None], CUT)[0] == pytest.approx(wanted, abs=1e-12)
    precision = outcome.scores().precision
    whole = np.mean([precision[name][t].mean() for name in CLASSES for t in SCORED])
    assert record.mean_ap()[0] == pytest.approx(whole, abs=1e-12)
    assert record.mean_ap()[0] > 0.1
    again = MatchRecord.from_record(json.loads(json.dumps(record.as_record())))
    assert again.mean_ap()[0] == record.mean_ap()[0]
    assert again.class_ap() == record.class_ap()


def test_sign_flips_are_exact() -> None:
    assert sign_flip([1, 1, 1, 1, 1, 1]) == 2 / 64
    assert sign_flip([1, 1, 1, 1, 1]) is None
    values = np.random.default_rng(3).normal(0.4, 1, 7)
    counted = [
        abs(np.dot(signs, values)) >= abs(values.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=7)
    ]
    assert sign_flip(values.tolist()) == pytest.approx(np.mean(counted))
    scipys = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(values.tolist()) == pytest.approx(scipys.pvalue)
    assert sign_flip([0.0] * 6) == 1.0


def test_holm_steps_down() -> None:
    assert holm({"a": 0.01, "b": 0.04}) == {"a": 0.02, "b": 0.04}
    assert holm({"a": 0.04, "b": 0.03}) == {"b": 0.06, "a": 0.06}


def test_intervals_widen_where_seeds_or_drives_differ() -> None:
    better, worse = ([_record(seed, skill)[0] for seed in range(3)] for skill in (1.2, 0.4))
    found = compare("a", "b", {"a": better, "b": worse}, 400)
    low, high = found.interval
    assert low < found.mean < high
    assert low > 0
    same = compare("a", "b", {"a": better, "b": better}, 50)
    assert same.interval == (0.0, 0.0)
    one_seed = compare("a", "b", {"a": better[:1], "b": worse[:1]}, 400)
    assert one_seed.interval[1] > one_seed.interval[0]  # drives alone vary, too


def test_a_task_that_has_a_row_is_not_done_again_and_a_cut_line_is_dropped(place: Workplace) -> None:
    tasks = [Task("phase1", "O"), Task("run", "O", 50, 0)]
    assert [row["key"] for row in run_tasks(place, tasks, 1)] == ["phase1-O-seed0", "run-O-50-seed0"]
    assert list(run_tasks(place, tasks, 1)) == []
    text = place.rows.read_text()
    place.rows.write_text(text + '{"key": "run-R-50')
    assert len(read_rows(place.rows, SMALL.hash)) == 2
    (row,) = run_tasks(place, [*tasks, Task("run", "R", 50, 0)], 1)
    assert row["key"] == "run-R-50-seed0"
    assert [r["key"] for r in read_rows(place.rows)] == ["phase1-O-seed0", "run-O-50-seed0", "run-R-50-seed0"]
    assert read_rows(place.rows, "another plan") == []
    assert set(row["AP"]) == set(CLASSES)
    assert row["cpu_hours"] > 0


def test_kept_rows_are_gone_on_from_without_their_weights(place: Workplace, tmp_path: Path) -> None:
    first = [Task("phase1", "O"), Task("run", "O", 50, 0)]
    before = list(run_tasks(place, first, 1))
    kept, other = tmp_path / "small.jsonl", Workplace.of(place.path, tmp_path / "other")
    shutil.copyfile(place.rows, kept)
    shutil.copytree(place.world, other.world)
    assert begin_with(other, kept) == 2
    require_same_drives(other)
    later = Task("run", "I-image", 50, 0)  # wants the weights of phase 1, which no row holds
    assert [row["key"] for row in run_tasks(other, [*first, later], 1)] == ["phase1-O-seed0", later.key]
    assert [row["key"] for row in read_rows(other.rows)] == [*(row["key"] for row in before), later.key]
    assert begin_with(other, kept) == 0
    (other.world / "test").joinpath("sim-780000", "done.json").write_text('["another"]')
    with pytest.raises(PlanError, match="rows of test drives"):
        require_same_drives(other)


def test_tasks_stand_in_an_order_that_leaves_whole_pairs() -> None:
    plan = load_plan(ROOT / "config" / "experiment" / "mechanism.yaml")
    keys = [task.key for task in tasks_of(plan)]
    assert len(set(keys)) == len(keys)
    for task in tasks_of(plan):
        assert task.needs is None or keys.index(task.needs) < keys.index(task.key)
    family = [f"run-{arm}-10-seed{seed}" for seed in range(plan.family_seeds) for arm in ("R", "D", "O")]
    assert [key for key in keys if key in family] == family
    assert keys[: len(checks.UNTRAINED)] == [f"check-{name}" for name in checks.UNTRAINED]
    assert max(map(keys.index, family)) < keys.index("trial-K-100-seed100")


def _rows(plan: Plan, arms: dict[str, float], seeds: int) -> list[dict[str, object]]:
    rows = []
    for arm, skill in arms.items():
        for seed in range(seeds):
            record, _, _ = _record(seed, skill)
            scores = {
                "mAP": float(record.mean_ap()[0]),
                "mAP_unseen_rig": 0.1,
                "AP": record.class_ap(),
                "mAP_nuscenes": 0.0,
            }
            named = {"key": f"run-{arm}-50-seed{seed}", "kind": "run", "arm": arm, "seed": seed, "percent": 50.0}
            rows.append(named | scores | {"plan": plan.hash, "cpu_hours": 0.1, "matches": record.as_record()})
    return rows


def _enough_seeds() -> Plan:
    return replace(SMALL, runs=(RunGroup(("R", "D", "O"), 50, 7),), draws=100)


def test_a_verdict_needs_every_paired_seed() -> None:
    plan, skills = _enough_seeds(), {"R": 0.3, "D": 1.1, "O": 1.1}
    rows = _rows(plan, skills, 7)
    whole = Results(plan, rows)
    text = to_markdown(sections_of(whole, "command"), "results")
    assert "O - R at 50 % of labels: **a gain**" in text
    assert "O - D at 50 % of labels: **no difference shown**" in text
    part = to_markdown(sections_of(Results(plan, rows[:-1]), "command"), "results")
    assert "O - R at 50 % of labels: **not tested**, 6 of 7 paired seeds" in part
    assert "| 6 | " in part
    assert "not run" in part
    loss = to_markdown(sections_of(Results(plan, _rows(plan, {"R": 1.1, "D": 1.1, "O": 0.3}, 7)), "c"), "results")
    assert "O - R at 50 % of labels: **a loss**" in loss


def test_failed_checks_are_shown_first_and_wrong_labels_are_judged() -> None:
    plan = _enough_seeds()
    control = [row | {"arm": "X", "key": f"run-X-50-seed{row['seed']}"} for row in _rows(plan, {"O": 1.2}, 3)]
    check = {"kind": "check", "plan": plan.hash, "key": "check-a", "cpu_hours": 0.0, "arm": "a", "seed": 0}
    passed = checks.make_check("fine", 0.5, "<= 1", True, "all well")
    rows = [*_rows(plan, {"R": 0.3, "D": 0.4, "O": 0.5}, 3), *control, check | {"checks": [passed]}]
    text = to_markdown(sections_of(Results(plan, rows), "command"), "results")
    assert text.index("| X - R, 3 seeds |") < text.index("| fine |")
    assert "**fails**" in text


def test_the_page_and_the_docs_follow_from_the_rows(tmp_path: Path) -> None:
    plan = _enough_seeds()
    results = Results(plan, _rows(plan, {"R": 0.3, "D": 0.8, "O": 1.1}, 3))
    write_docs(tmp_path / "results.md", [chapter_of(results, "the command")])
    text = (tmp_path / "results.md").read_text()
    assert "## On simulated streets: plan `small`" in text
    assert "![The tested differences, at 50 % of labels](results/small-differences.svg)" in text
    first = (tmp_path / "results" / "small-differences.svg").read_bytes()
    write_docs(tmp_path / "results.md", [chapter_of(Results(plan, results.rows), "the command")])
    assert (tmp_path / "results" / "small-differences.svg").read_bytes() == first
    page = to_page("Small", sections_of(results, "the command"))
    assert "<svg" in page
    assert "O - R" in page


RECORDED = replace(
    SMALL,
    name="recorded",
    world=replace(SMALL.world, recorded=RecordedPlan("drive", blocks=1, block_keys=2)),
    runs=(RunGroup(("R", "O"), 100.0, 1),),
    family=(),
    family_percent=100.0,
    checks="none",
)


def test_halves_of_a_recording_share_no_key_frame() -> None:
    recorded = RecordedPlan("drive", blocks=7, block_keys=3)
    labelled, scored = (
        [key for number in range(7) for key in block_keys(split, number, 45, recorded)]
        for split in ("labelled", "test")
    )
    assert labelled == list(range(21))
    assert scored == list(range(24, 45))
    with pytest.raises(PlanError, match="41 key frames, want 42"):
        block_keys("test", 0, 41, recorded)


def test_a_plan_with_a_recording_learns_from_its_first_half_and_is_scored_on_its_second(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recorded.yaml"
    save_config(path, RECORDED)
    register(path, load_plan(path))
    assert load_plan(path).hash == RECORDED.hash != replace(RECORDED, world=SMALL.world).hash
    with pytest.raises(PlanError, match="give --recording"):
        make_blocks(world, RECORDED.world, None)
    drive = SimulatedDrive(9990, DriveConfig(keys=5, key_rate=5.0, image=(192, 96), grid=GRID))
    monkeypatch.setattr("occbev_training.experiment.recorded._open", lambda path, recorded: drive)
    make_blocks(world, RECORDED.world, tmp_path)
    sizes = {(camera.width, camera.height) for camera in CameraRig.load(rig_file(world)).cameras}
    assert sizes == {(96, 48)}
    labelled, scored = labelled_pool(world, RECORDED.world, 100, 0), whole_pool(world, "test", RECORDED.world)
    assert (labelled.drives, len(labelled), len(scored)) == (("block-000",), 2, 2)
    assert not np.array_equal(labelled[0].images, scored[0].images)
    rows = list(run_tasks(Workplace.of(path, tmp_path), tasks_of(RECORDED), 1))
    assert [row["key"] for row in rows] == ["run-R-100-seed0", "phase1-O-seed0", "run-O-100-seed0"]
    assert rows[0]["data"]["scored"] == scored.hash
    assert rows[0]["data"]["labelled"] == labelled.hash
    text = to_markdown(sections_of(Results(RECORDED, rows), "command"), "results")
    assert "O - R at 100 % of labels: " in text
    assert "No test was registered" in text
    assert "unseen rig, mean" not in text


def test_what_is_found_is_what_the_best_boxes_meet(world: Path) -> None:
    pool = whole_pool(world, "test", SMALL.world)
    targets = targets_of(pool)
    assert len(targets) == 3 * len(pool)  # a car, a bus and a pedestrian in every sample; a motorcycle has no class
    cars = np.flatnonzero(targets.label == 0)
    said = []
    for index in range(len(pool)):
        here = targets.sample == index
        box, label = targets.box[here].copy(), targets.label[here]
        box[label == 0, 0] += 10.0 if index == 1 else 0.5  # the car of one sample is missed
        score = np.full(len(box), 0.9, np.float32)
        noise = np.tile(box[:1], (20, 1))  # worse boxes than there are objects: cut off, however many
        noise[:, 1] += 7
        boxes = np.concatenate([box, noise])
        said.append(Boxes3D(boxes, np.append(label, np.zeros(20, int)), np.append(score, np.full(20, 0.1, np.float32))))
    kept = keep_as_many(said, targets)
    assert sum(len(one) for one in kept) == len(targets)
    found = found_among(kept, pool, targets)
    assert found[cars].tolist() == [sample != 1 for sample in targets.sample[cars]]
    assert found[targets.label != 0].all()


def test_objects_found_by_one_arm_alone_are_counted(place: Workplace) -> None:
    arms = ("O", "R")
    tasks = [Task("phase1", "O"), *(Task("run", arm, 50, 0) for arm in arms)]
    list(run_tasks(place, tasks, 1))
    findings = look_for_objects(place, arms, 50, [0])
    record = findings.record("O", "R")
    for name, row in record["classes"].items():
        assert sum(row[what] for what in ("both", "first", "second", "neither")) == row["objects"], name
    seen = np.zeros((3, len(findings.targets)), bool)
    alone = seen.copy()
    alone[:, 5] = True
    made = Findings(findings.targets, (0, 1, 2), {}, {"O": alone, "R": seen})
    assert made.record("O", "R")["usually_first_alone"] == 1
    assert made.record("O", "R")["usually_second_alone"] == 0
    drives = [str(sample) for sample in range(10)]
    assert made.clearest("O", "R", drives, 5) == [5]
    assert made.clearest("R", "O", drives, 5) == []
    rows = [*read_rows(place.rows)]
    text = to_markdown(sections_of(Results(SMALL, rows, found=record), "command"), "results")
    assert "| class | objects | both find it | O alone | R alone | neither |" in text
    assert "results/small-found.jpg" in text


def test_the_model_zoo_shows_with_and_without_pre_training(tmp_path: Path) -> None:
    plan = _enough_seeds()
    chapter = chapter_of(Results(plan, _rows(plan, {"R": 0.3, "R0": 0.2, "O": 1.1}, 3)), "the command")
    (network, where, labels, instead, without, gained, difference, seeds), *others = chapter.zoo
    assert "96x48" in network
    assert instead == "more fine-tuning"
    assert [(row[3], row[5]) for row in others] == [("the same fine-tuning", gained)]
    assert (where, labels, seeds) == ("simulated streets", "50 %", "3")
    assert float(difference.split(",")[0]) == pytest.approx(float(gained) - float(without), abs=0.011)
    zoo = tmp_path / "model-zoo.md"
    zoo.write_text(f"# Zoo\n{ZOO_BEGIN}\nold\n{ZOO_END}\nrest\n")
    write_docs(tmp_path / "results.md", [chapter])
    text = zoo.read_text()
    assert text.startswith("# Zoo\n")
    assert text.endswith("\nrest\n")
    assert "old" not in text
    assert f"| {without} | {gained} | {difference} |" in text


def test_the_committed_model_zoo_follows_from_the_committed_rows() -> None:
    plan = load_plan(ROOT / "config" / "experiment" / "mechanism.yaml")
    rows = read_rows(ROOT / "docs" / "results" / "mechanism.jsonl", plan.hash)
    zoo = (ROOT / "docs" / "model-zoo.md").read_text()
    for row in chapter_of(Results(plan, rows, draws=2), "").zoo:
        assert "| " + " | ".join(row[:6]) + " | " + row[6].split(",")[0] in zoo


def test_rig_types_look_all_around() -> None:
    def covered(vehicle_number: int) -> NDArray[np.bool_]:
        rig = rig_of(VEHICLES[vehicle_number], np.random.default_rng(0))
        angle = np.deg2rad(np.arange(0, 360, 5))
        points = np.stack([15 * np.cos(angle), 15 * np.sin(angle), np.full(len(angle), 1.0)], -1)
        return np.any([camera.project(points)[2] for camera in rig.cameras], axis=0)

    for number in range(len(VEHICLES)):
        assert covered(number).mean() > 0.9
    assert MODEL.image.width == 96


@pytest.mark.parametrize("name", ["mechanism", "real"])
def test_the_page_of_results_holds_every_seed_of_the_committed_rows(name: str) -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    plan = load_plan(ROOT / "config" / "experiment" / f"{name}.yaml")
    results = Results(plan, read_rows(ROOT / "docs" / "results" / f"{name}.jsonl", plan.hash))
    assert plan.hash in text
    for section in sections_of(Results(plan, results.rows, draws=2), ""):
        if section.title.startswith(("Every seed", "By class", "Occupancy")):
            assert to_markdown([section], "results") in text
