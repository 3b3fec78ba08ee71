"""Quality measures: they hold on good labels and break when the fault they stand for is put in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from tests.training.traced_drive import GRID, KEY_NS, Block, TracedDrive

from occbev.geometry import make_transform, rotation_from_yaw
from occbev.results import FrameSet, Sweep
from occbev.trajectory import Trajectory
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig
from occbev_training.occupancy.quality import (
    LIMITS,
    border_ratio,
    broken_limits,
    compare_with_truth,
    ego_leak,
    held_out_sweep,
    is_deterministic,
    label_hash,
    measure_key,
    observed_by_ring,
    observed_drop,
    temporal_iou,
)
from occbev_training.sources.recording import OccupancyTruth

CONFIG = LabelConfig(window=0.5, camera_spacing=0.02)
STREET = [Block((10.2, 0.0, 1.5), (0.4, 12.0, 3.0)), Block((6.2, 5.0, 0.8), (4.0, 1.8, 1.6))]


def drive(**changes) -> TracedDrive:
    made = TracedDrive(STREET, rings=30, columns=240, **changes)
    made.key_stamp_ns = KEY_NS + np.array([0, 300_000_000])
    return made


def shaken(recording: TracedDrive, yaw: float) -> TracedDrive:
    """Poses that jump from sweep to sweep."""
    rng = np.random.default_rng(0)
    path = recording.trajectory
    turns = [make_transform(rotation_from_yaw(a), np.zeros(3)) for a in rng.normal(0, yaw, len(path.stamp_ns))]
    recording.trajectory = Trajectory(path.stamp_ns, path.ego2global @ np.stack(turns))
    return recording


@pytest.fixture(scope="module")
def good():
    builder = LabelBuilder(drive(), CONFIG, GRID)
    return builder, [builder.examine(key) for key in range(2)]


def test_a_good_drive_keeps_every_limit(good) -> None:
    builder, (first, _) = good
    blind = FrameSet(int(builder.recording.key_stamp_ns[1]), dict.fromkeys(builder.recording.rig.names))
    values = measure_key(builder, builder.examine(1, blind), blind, first, thorough=True)
    assert np.isnan(values["q6_camera_alignment"]), "no picture, no verdict"
    assert values["q9_deterministic"] == 1.0
    assert broken_limits(values) == []
    assert values["q4_temporal_iou"] > 0.9
    assert values["q5_ground_thickness"] < 0.01
    assert values["q7_ego_leak"] == 0


class TwoLidars(TracedDrive):
    """The points of two LiDARs half a metre apart, in one cloud."""

    def sweep(self, index: int) -> Sweep:
        one = super().sweep(index)
        origins, sensor = np.array([[0.0, 0, 0], [0.5, 0, 0]]), np.arange(len(one.points)) % 2
        return dataclasses.replace(one, origins=origins, sensor=sensor)


def test_the_order_of_points_does_not_matter_with_several_lidars_either() -> None:
    builder = LabelBuilder(TwoLidars(STREET, rings=30, columns=240), CONFIG, GRID)
    blind = FrameSet(int(builder.recording.key_stamp_ns[0]), dict.fromkeys(builder.recording.rig.names))
    assert is_deterministic(builder, 0, blind, builder.build(0, blind))


def test_bad_poses_break_the_held_out_sweep() -> None:
    builder = LabelBuilder(shaken(drive(), 0.3), CONFIG, GRID)
    ends, through = held_out_sweep(builder, builder.window(0))
    assert ends < 0.9 or through > 0.02


def test_a_pitching_pose_thickens_the_ground() -> None:
    from occbev_training.occupancy.quality import ground_thickness

    recording = drive()
    rng = np.random.default_rng(1)
    lift = np.tile(np.eye(4), (len(recording.trajectory.stamp_ns), 1, 1))
    lift[:, 2, 3] = rng.normal(0, 0.1, len(lift))
    path = recording.trajectory
    recording.trajectory = Trajectory(path.stamp_ns, path.ego2global @ lift)
    builder = LabelBuilder(recording, CONFIG, GRID)
    window = builder.window(0)
    assert ground_thickness(window, builder.judge(window), GRID) > 0.05


def test_labels_of_another_place_disagree(good) -> None:
    _, (first, second) = good
    motion = make_transform(np.eye(3), [-0.9, 0.0, 0.0])  # 3 m/s for 0.3 s
    assert temporal_iou(first.label, second.label, motion) > 0.9
    assert temporal_iou(first.label, second.label, make_transform(np.eye(3), [-0.9, 0.0, 1.2])) < 0.85


def test_occupied_cells_in_the_vehicle_are_counted(good) -> None:
    builder, (first, _) = good
    state = first.label.state.copy()
    state[tuple(GRID.indices([[1.0, 0.3, 1.0]])[0][0])] = 2
    assert ego_leak(dataclasses.replace(first.label, state=state), builder.config.ego_box) == 1


def test_clamped_points_show_on_the_border(good) -> None:
    _, (first, _) = good
    state = first.label.state.copy()
    state[:, :, -1] = 2
    assert border_ratio(first.label) < 2
    assert border_ratio(dataclasses.replace(first.label, state=state)) > 2


def test_a_blocked_view_shows_as_a_drop(good) -> None:
    _, (first, _) = good
    state = first.label.state.copy()
    state[:15] = 0
    names = ["q3_observed_10m", "q3_observed_20m", "q3_observed_30m", "q3_observed_40m"]
    whole, cut = (
        dict(zip(names, observed_by_ring(label), strict=True))
        for label in (first.label, dataclasses.replace(first.label, state=state))
    )
    drops = observed_drop([whole, whole, cut])
    assert drops[:2] == [0.0, 0.0]
    assert drops[2] > 0.3
    assert observed_drop([]) == []


def test_the_hash_sees_every_volume(good) -> None:
    _, (first, _) = good
    for name in ("state", "camera_visible", "hit_sweeps", "pass_sweeps"):
        volume = getattr(first.label, name).copy()
        volume[3, 4, 5] ^= 1
        assert label_hash(dataclasses.replace(first.label, **{name: volume})) != label_hash(first.label)


def test_truth_scores_count_what_is_right_and_sum(good) -> None:
    _, (first, _) = good
    label = first.label
    semantics = np.where(label.state == 2, 11, 17).astype(np.uint8)
    nothing = np.zeros(GRID.shape, bool)
    perfect = compare_with_truth(label, OccupancyTruth(semantics, nothing, nothing, GRID))
    assert perfect.ratios["precision"] == perfect.ratios["recall"] == 1.0
    assert perfect.free_wrong == 0
    empty = compare_with_truth(label, OccupancyTruth(np.full_like(semantics, 17), nothing, nothing, GRID))
    assert empty.ratios["precision"] == 0.0
    both = perfect + empty
    assert both.ratios["precision"] == 0.5
    other = dataclasses.replace(GRID, lo=(0.0, 0.0, 0.0))
    truth = OccupancyTruth(semantics, nothing, nothing, other)
    with pytest.raises(ValueError, match="differ"):
        compare_with_truth(label, truth)


def test_every_limit_can_break_and_what_was_not_measured_does_not() -> None:
    for limit in LIMITS:
        bad = limit.at_least - 0.1 if np.isfinite(limit.at_least) else limit.at_most + 0.1
        assert broken_limits({limit.name: bad}) == [limit.name]
        assert broken_limits({limit.name: np.nan}) == []
    assert broken_limits({}) == []
