"""Labels against traced truth: trails, lost surfaces and the published recipe's faults are counted right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from tests.training.traced_drive import GRID, KEY_NS, Block, TracedDrive

from occbev.geometry import points_in_box
from occbev_training.occupancy.comparison import Comparison, compare_key
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig
from occbev_training.sources.recording import OccupancyTruth

MOVER = Block((-2.2, -5.0, 0.8), (4.0, 1.8, 1.6), velocity=(-8.0, 0.0))
CONFIG = LabelConfig(camera_spacing=0.05)


class KnownDrive(TracedDrive):
    """A traced drive that knows its voxels and where its movers are."""

    def moving_boxes(self, stamp_ns: int) -> np.ndarray:
        t = (stamp_ns - KEY_NS) / 1e9
        shift = self.pose(0.0)[:3, 3]  # the world of the blocks is the ego frame at the key time
        movers = [b for b in self.blocks if b.velocity != (0.0, 0.0)]
        rows = [[*(np.array(b.centre) + (*(t * np.array(b.velocity)), 0) + shift), *b.size, 0.0] for b in movers]
        return np.array(rows, np.float64).reshape(-1, 7)

    def occupancy_truth(self, key: int) -> OccupancyTruth:
        centres = GRID.centres().reshape(-1, 3)
        solid = np.abs(centres[:, 2]) < GRID.pitch[2] / 2
        for block in self.blocks:
            grown = np.array(block.size) + GRID.pitch
            solid |= points_in_box(centres, [*block.centre, *grown, 0.0])
        semantics = np.where(solid, 11, 17).astype(np.uint8).reshape(GRID.shape)
        nothing = np.zeros(GRID.shape, bool)
        return OccupancyTruth(semantics, nothing, nothing, GRID)


@pytest.fixture(scope="module")
def drive() -> KnownDrive:
    made = KnownDrive([Block((10.2, 0.0, 1.5), (0.4, 12.0, 3.0)), MOVER], rings=30, columns=240)
    made.key_stamp_ns = KEY_NS + np.arange(-2, 3) * 500_000_000
    return made


@pytest.fixture(scope="module")
def found(drive) -> Comparison:
    return compare_key(LabelBuilder(drive, CONFIG, GRID), drive, 2)


def test_good_labels_keep_what_stands_and_lose_what_moved(found) -> None:
    record = found.as_record()
    assert record["precision"] > 0.98
    assert record["recall"] > 0.98
    assert record["static_lost"] < 0.02
    assert record["trail_cells"] > 30
    assert record["trails_removed"] > 0.9


def test_without_the_dynamic_rules_the_trail_counts_as_kept(drive, found) -> None:
    careless = dataclasses.replace(CONFIG, dynamic_ratio=1e9, reference_ratio=1e9)
    kept = compare_key(LabelBuilder(drive, careless, GRID), drive, 2)
    assert kept.counts.trail == found.counts.trail
    assert kept.counts.trail_kept > 5 * max(1, found.counts.trail_kept)


def test_the_recipes_faults_are_told_apart(found) -> None:
    paper = found.as_record()["paper"]
    assert 0.3 < paper["right"] < 0.99
    assert paper["trail"] > 0.01
    assert paper["free_never_seen"] > 0.1
    assert sum(paper[name] for name in ("right", "trail", "ego", "border", "other")) == pytest.approx(1.0)


def test_comparisons_add_up(found) -> None:
    twice = found + found
    assert twice.counts.trail == 2 * found.counts.trail
    assert twice.as_record()["precision"] == found.as_record()["precision"]


def test_a_drive_without_truth_is_refused(drive) -> None:
    class Blind(KnownDrive):
        def occupancy_truth(self, key: int) -> None:
            return None

    blind = Blind(drive.blocks)
    with pytest.raises(ValueError, match="no dense truth"):
        compare_key(LabelBuilder(blind, CONFIG, GRID), blind, 0)
