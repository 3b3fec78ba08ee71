"""Ground grids against the truth, and calibrations that are fitted on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from occbev.classes import OCCUPANCY_CLASSES
from occbev.grid import GRIDS, VoxelGrid
from occbev.inference.ground_grid import GroundGridConfig
from occbev.inference.model_package import ModelPackage
from occbev.inference.space_calibration import SCORES, read_calibration
from occbev_training.evaluation.data import RecordingFrames
from occbev_training.evaluation.space import SpaceError, dense_frames, divide, fit_space, score_space
from occbev_training.export import calibrate
from occbev_training.export.calibrate import write_calibration
from occbev_training.metrics.occupancy import GridError
from occbev_training.metrics.space import (
    CurveFit,
    SpaceCounts,
    cells_within,
    missed_curves,
    truth_of_classes,
    truth_of_states,
)
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive

GRID = VoxelGrid((-4.0, -4.0, -1.0), (0.4, 0.4, 0.4), (20, 20, 10))
CONFIG = GroundGridConfig()
ROAD, CAR, TREE, FREE = (OCCUPANCY_CLASSES.index(n) for n in ("driveable_surface", "car", "vegetation", "free"))


def street() -> tuple[np.ndarray, np.ndarray]:
    """Road over everything, a car, and the crown of a tree 3 m above the road; a camera sees the half with x > 0."""
    semantics = np.full(GRID.shape, FREE, np.uint8)
    semantics[:, :, 2] = ROAD
    semantics[14:17, 5:8, 3:6] = CAR
    semantics[14:17, 14:17, 9] = TREE
    seen = np.zeros(GRID.shape, bool)
    seen[10:] = True
    return semantics, seen


def test_obstacles_are_what_stands_between_the_heights_and_is_seen() -> None:
    truth = truth_of_classes(*street(), GRID, CONFIG)
    assert truth.obstacle.sum() == 9
    assert truth.obstacle[5:8, 14:17].all(), "axes are [y, x]"
    assert truth.free[14:17, 14:17].all(), "a vehicle drives under the tree"
    assert truth.unseen is not None
    assert truth.unseen[:, :10].all()
    assert not (truth.free | truth.obstacle)[:, :10].any()


def test_the_label_of_a_lidar_gives_the_same_truth_of_a_flat_street() -> None:
    semantics, seen = street()
    state = np.where(semantics == FREE, 1, 2).astype(np.uint8)
    by_lidar, by_class = truth_of_states(state, seen, GRID, CONFIG), truth_of_classes(semantics, seen, GRID, CONFIG)
    np.testing.assert_array_equal(by_lidar.obstacle, by_class.obstacle)
    np.testing.assert_array_equal(by_lidar.free, by_class.free)
    assert by_lidar.unseen is None


def test_shares_are_of_the_cells_that_count() -> None:
    truth = truth_of_classes(*street(), GRID, CONFIG)
    cells = np.full((20, 20), -1, np.int8)
    cells[5:8, 14], cells[5:8, 15] = 100, 0  # of nine obstacle cells three blocked, three free
    cells[0, :] = 0
    image = np.ones((20, 20), bool)
    image[:, 0] = False
    record = (SpaceCounts() + SpaceCounts.of(cells, truth, image, np.ones((20, 20), bool))).as_record()
    assert record["obstacles_published_free"] == record["obstacles_published_blocked"] == pytest.approx(1 / 3, abs=1e-3)
    assert record["unseen_published_free"] == pytest.approx(10 / 200)
    assert record["in_no_image_published_unknown"] == pytest.approx(19 / 20)
    assert record["free_ground_published_free"] == pytest.approx(10 / 191, abs=1e-3)
    assert cells_within(GRID, 1.0).sum() == 16


def test_curves_rise_and_are_what_was_counted() -> None:
    rng = np.random.default_rng(0)
    fit, score = CurveFit(), rng.random(40_000).astype(np.float32)
    true = rng.random(40_000) < score**2
    fit.add(score, true, np.zeros(40_000, np.intp))
    curves = fit.rising()
    assert (np.diff(curves, axis=1) >= 0).all()
    assert np.abs(curves[0] - SCORES**2).max() < 0.08
    np.testing.assert_array_equal(curves[0], curves[3])
    assert fit.calibration_error() == pytest.approx(float(np.mean(score - score**2)), abs=0.02)
    assert fit.calibration_error(curves) < 0.01


def test_obstacles_whose_ground_no_camera_sees_are_not_missed() -> None:
    score, ring = np.array([0.1, 0.2, 0.6, 0.9], np.float32), np.zeros(4, np.intp)
    missed = missed_curves([score], [ring], [np.array([True, False, True, True])])
    at = dict(zip(SCORES.tolist(), missed[0].tolist(), strict=True))
    assert (at[0.0], at[0.25], at[0.625], at[1.0]) == (0, 0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def frames() -> list[Any]:
    """Two key frames of a street by night with their truth."""
    drive = SimulatedDrive(20_009, DriveConfig(keys=12, key_rate=1.0, world="v1"))
    recorded = RecordingFrames([(drive, key) for key in (1, 9)])
    return list(dense_frames(recorded, range(2), GRIDS["occ3d"], CONFIG))


def test_truth_on_another_grid_is_refused() -> None:
    recorded = RecordingFrames([(SimulatedDrive(20_009, DriveConfig(keys=1, world="v1")), 0)])
    with pytest.raises(GridError, match=r"predicted on 200x200x16 voxels of \(0.512, 0.512, 0.5\) m"):
        next(dense_frames(recorded, range(1), GRIDS["det"], CONFIG))


def test_the_shipped_package_calls_few_obstacles_free_and_little_ground_blocked(
    frames: list[Any], repository: Path
) -> None:
    package = ModelPackage.load(repository / "config/models/occbev-tiny")
    assert read_calibration(package).fitted_on
    record = score_space(package, frames, CONFIG).as_record()
    assert record["obstacles_published_free"] < 0.2
    assert record["obstacles_published_blocked"] > 0.4
    assert record["free_ground_published_blocked"] < 0.06
    assert record["free_ground_published_free"] > 0.75
    assert record["in_no_image_published_unknown"] == 1


def test_a_calibration_is_measured_on_frames_that_it_was_not_fitted_on(frames: list[Any], repository: Path) -> None:
    assert divide(["a", "a", "b", "c"]) == [0, 0, 1, 0]
    assert divide(["a"] * 5) == [0, 0, 0, 1, 1], "of a single drive the end is the other half"
    package = ModelPackage.load(repository / "config/models/occbev-tiny")
    fit = fit_space(package, frames, "two frames", CONFIG)
    assert all(half.counts.any() for half in (*fit.voxels, *fit.obstacles))
    with pytest.raises(SpaceError, match="1 frames: want two or more"):
        fit_space(package, frames[:1], "one frame", CONFIG)


def test_a_package_is_calibrated_and_its_card_says_so(
    frames: list[Any], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(repository / "config/models/occbev-tiny", tmp_path / "package")
    package = ModelPackage.load(tmp_path / "package")
    fit = fit_space(package, frames, "two frames", CONFIG)
    write_calibration(package, fit)
    again = ModelPackage.load(tmp_path / "package")
    assert read_calibration(again).fitted_on == "two frames"
    assert again.metrics["space"]["frames"] == 2
    card = (tmp_path / "package" / "README.md").read_text()
    assert card.count("## Calibration of probabilities") == 1
    assert "Fitted on two frames" in card
    with monkeypatch.context() as stopped:  # while the slow part is at work
        stopped.setattr(calibrate, "draw_reliability", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_calibration(again, fit)
    assert read_calibration(ModelPackage.load(again.folder)).fitted_on == "two frames"
    with pytest.raises(SpaceError, match="0 frames"):
        fit_space(package, [], "nothing", CONFIG)
