"""The ground grid on streets of known shape: heights over a slope, shadows, margins of doubt, and calibrations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from occbev.config import ConfigError
from occbev.geometry import make_transform, rotation_from_yaw
from occbev.grid import VoxelGrid
from occbev.inference.factors import Factors, decode_factors
from occbev.inference.ground_grid import (
    GroundGridConfig,
    GroundGridMaker,
    SightLines,
    band_layers,
    ground_layer,
    obstacle_voxels,
)
from occbev.inference.postprocess import decode_occupancy, voxels_in_view
from occbev.inference.space_calibration import SCORES, SpaceCalibration, SpaceCalibrationError
from occbev.results import GroundGrid, VoxelEvidence
from occbev.rig import Camera, CameraRig

GRID = VoxelGrid((-16.0, -16.0, -1.0), (0.4, 0.4, 0.4), (80, 80, 10))
FORWARD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
CONFIG = GroundGridConfig()


def rig(names: str = "fblr", height: float = 1.5) -> CameraRig:
    """Cameras of 100 degrees at the origin, looking where their letter says."""
    turn = {"f": 0.0, "l": np.pi / 2, "b": np.pi, "r": -np.pi / 2}
    optics = np.array([[130.0, 0, 160], [0, 130, 60], [0, 0, 1]])
    pose = {name: make_transform(rotation_from_yaw(turn[name]) @ FORWARD, [0, 0, height]) for name in names}
    return CameraRig(tuple(Camera(name, 320, 240, optics, pose[name]) for name in names))


def sight(cameras: CameraRig, valid: np.ndarray | None = None) -> SightLines:
    return SightLines(cameras, GRID, voxels_in_view(cameras, GRID), valid)


def street(slope: float = 0.0, classes: bool = True) -> VoxelEvidence:
    """Ground that rises forward, a wall 6.4 m ahead, a bridge behind at 2.8 m."""
    x, y = _centres()
    layer = np.rint((slope * x + 1.0) / 0.4 - 0.5).astype(int)  # (Y, X)
    z = np.arange(10)[:, None, None]
    ground = (z == layer).astype(np.float32) * np.float32(0.95)
    wall = (x > 6.4) & (x < 7.2) & (np.abs(y) < 3) & (z > layer) & (z <= layer + 4)
    bridge = (x < -6.4) & (x > -7.2) & (np.abs(y) < 3) & (z == 9)
    obstacle = np.where(wall | bridge, np.float32(0.95), np.float32(0.01))
    if classes:
        return VoxelEvidence(obstacle[None, None].astype(np.float32), ground)
    return VoxelEvidence(np.maximum(obstacle, ground)[None, None].astype(np.float32), None)


def _centres() -> tuple[np.ndarray, np.ndarray]:
    centres = GRID.centres()[:, :, 0].transpose(1, 0, 2)
    return centres[..., 0], centres[..., 1]


def cell(grid: GroundGrid, x: float, y: float) -> int:
    return int(grid.cells[int((y + 16) / 0.4), int((x + 16) / 0.4)])


def make(evidence: VoxelEvidence, cameras: CameraRig | None = None, **changes: float) -> GroundGrid:
    return GroundGridMaker(GRID).make(evidence, sight(cameras or rig()), replace(CONFIG, **changes))


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.06])
def test_a_street_is_free_up_to_what_stands_on_it_and_unknown_behind(slope: float, classes: bool) -> None:
    grid = make(street(slope, classes))
    assert cell(grid, 5.0, 0.2) == 0
    assert cell(grid, 6.6, 0.2) == 100
    assert cell(grid, 12.0, 0.2) == -1, "the wall hides the ground behind it"
    assert cell(grid, 12.0, 12.0) == 0, "past the wall's end"
    assert cell(grid, -6.8, 0.2) == 0, "a vehicle drives under a bridge"
    assert cell(grid, 0.2, 0.2) == -1, "no camera sees what is under the vehicle"


def test_heights_above_the_ground_say_what_an_obstacle_is() -> None:
    assert band_layers(GRID, CONFIG) == (1, 6)
    assert band_layers(GRID, replace(CONFIG, min_height=0.9)) == (3, 6)
    evidence = street()
    low = np.full_like(evidence.obstacle, 0.01)
    low[0, 0, 3, 40, 60] = 0.95  # a box of 0.4 m on the ground, at x = 8.2, y = 0.2
    evidence = VoxelEvidence(low, evidence.ground)
    assert cell(make(evidence), 8.2, 0.2) == 100
    assert cell(make(evidence, min_height=0.5), 8.2, 0.2) == 0


def test_between_free_and_blocked_lies_unknown() -> None:
    evidence = street()
    for probability, wanted in ((0.05, 0), (0.15, -1), (0.5, 100)):
        clear = np.full_like(evidence.obstacle, 0.01)
        clear[0, 0, 4, 39:42, 59:62] = probability
        assert cell(make(VoxelEvidence(clear, evidence.ground)), 8.2, 0.2) == wanted


def test_neighbouring_cells_count_together() -> None:
    """A network spreads a thing that it places badly over cells none of which is likely."""
    evidence = street()

    def grid_with(rows: slice, columns: slice) -> GroundGrid:
        doubtful = np.full_like(evidence.obstacle, 0.01)
        doubtful[0, 0, 4, rows, columns] = 0.25
        return make(VoxelEvidence(doubtful, evidence.ground))

    assert cell(grid_with(slice(39, 42), slice(59, 62)), 8.2, 0.2) == 100
    assert cell(grid_with(slice(40, 41), slice(60, 61)), 8.2, 0.2) == -1


def test_a_low_obstacle_hides_only_its_own_shadow() -> None:
    evidence = street()
    low = np.full_like(evidence.obstacle, 0.01)
    low[0, 0, 3, 36:44, 50] = 0.95  # 0.4 m high at x = 4.2: a camera at 1.5 m sees the ground again 1.5 m behind it
    grid = make(VoxelEvidence(low, evidence.ground))
    assert cell(grid, 4.2, 0.2) == 100
    assert cell(grid, 12.0, 0.2) == 0
    tall = low.copy()
    tall[0, 0, 3:8, 36:44, 50] = 0.95
    assert cell(make(VoxelEvidence(tall, evidence.ground)), 12.0, 0.2) == -1


def test_nothing_is_known_behind_what_hides_whole_columns() -> None:
    """Probabilities of walls one behind the other multiply; what is no taller than a car, or hangs, hides no column."""
    evidence = street()

    def behind(*probabilities: float, layers: slice = slice(3, 10)) -> int:
        walls = np.full_like(evidence.obstacle, 0.001)
        for number, probability in enumerate(probabilities):
            walls[0, 0, layers, 30:50, 50 + 2 * number] = probability  # at x = 4.2, 5.0, ...
        walls[0, 0, 3:5, 38:42, 60] = 0.9  # a thing of 0.8 m at x = 8.2
        return cell(make(VoxelEvidence(walls, evidence.ground)), 8.2, 0.2)

    assert behind() == 100
    assert behind(0.9) == -1
    assert behind(0.4) == 100
    assert behind(0.4, 0.4) == -1
    assert behind(0.9, layers=slice(3, 6)) == 100, "over a car's roof"
    assert behind(0.9, layers=slice(9, 10)) == 100, "under a bridge"


def test_what_lies_in_no_image_is_unknown_and_so_is_what_a_silent_camera_saw() -> None:
    evidence, cameras = street(), rig("fb")
    grid = make(evidence, cameras)
    assert cell(grid, 0.2, 10.0) == -1
    assert not (grid.cells[~sight(cameras).in_image] != -1).any()
    only_back = sight(cameras, np.array([False, True]))
    grid = GroundGridMaker(GRID).make(evidence, only_back, CONFIG)
    assert cell(grid, 5.0, 0.2) == -1
    assert cell(grid, -5.0, 0.2) == 0


def test_no_camera_at_all_knows_nothing() -> None:
    nobody = sight(rig("f"), np.array([False]))
    assert (GroundGridMaker(GRID).make(street(), nobody, CONFIG).cells == -1).all()


def test_voxels_of_obstacles_stand_in_blocked_cells_above_the_ground() -> None:
    logits = np.full((18, 10, 80, 80), -8.0, np.float32)
    evidence = street()
    logits[4] = np.log(evidence.obstacle[0, 0])  # car
    logits[11] = np.log(np.maximum(evidence.ground, 1e-3))
    logits[17] = np.log(np.clip(1 - evidence.obstacle[0, 0] - evidence.ground, 1e-3, 1))
    occupancy = decode_occupancy(logits, GRID, ground=(11, 12, 13, 14))
    grid = GroundGridMaker(GRID).make(occupancy.evidence, sight(rig()), CONFIG)
    x, y, z = obstacle_voxels(occupancy, grid, CONFIG).T
    assert len(x) > 20
    assert (grid.cells[y, x] == 100).all()
    assert (z > grid.ground[y, x]).all()
    assert set(zip(x.tolist(), y.tolist(), strict=True)) == set(zip(*np.nonzero(grid.cells.T == 100), strict=True))


def test_factors_and_logits_of_the_same_street_give_the_same_grid() -> None:
    evidence = street()
    occupied = np.clip(evidence.obstacle[0, 0] + evidence.ground, 0, 0.98)
    is_ground = evidence.ground > 0.5
    kind = np.where(is_ground, 11, 4).astype(np.uint8)
    halves = kind[:, ::2, ::2]
    same = np.repeat(np.repeat(halves, 2, 1), 2, 2)
    assert (same == kind).mean() > 0.99
    parts = occupied.reshape(10, 40, 2, 40, 2).transpose(2, 4, 0, 1, 3)
    share = np.ones(halves.shape, np.float32)
    factors = decode_factors(Factors(np.ascontiguousarray(parts), halves, share, 17, 0.0), GRID, ground=(11,))
    logits = np.full((18, 10, 80, 80), -30.0, np.float32)
    logits[4] = np.where(same == 4, np.log(occupied), -30)
    logits[11] = np.where(same == 11, np.log(occupied), -30)
    logits[17] = np.log(1 - occupied)
    whole = decode_occupancy(logits, GRID, ground=(11,))
    grids = [GroundGridMaker(GRID).make(o.evidence, sight(rig()), CONFIG) for o in (factors, whole)]
    np.testing.assert_array_equal(grids[0].cells, grids[1].cells)
    np.testing.assert_array_equal(factors.state, whole.state)


def test_the_ground_is_found_by_the_networks_without_classes() -> None:
    for slope in (0.0, 0.06):
        layers = ground_layer(street(slope, classes=False), GRID), ground_layer(street(slope), GRID)
        assert np.abs(layers[0] - layers[1]).max() <= 1
        assert (layers[0] == layers[1]).mean() > 0.9


def test_unlikely_voxels_are_free_and_doubtful_ones_unknown() -> None:
    logits = np.zeros((18, 10, 80, 80), np.float32)
    logits[17] = 12.0
    logits[4, :, :, 40:] = 11.0  # P(car) 0.27
    occupancy = decode_occupancy(logits, GRID, max_occupied=np.full((80, 80), 0.1, np.float32))
    assert (occupancy.label == 17).all()
    assert (occupancy.state[:40] == 1).all()
    assert (occupancy.state[40:] == 0).all()
    assert (occupancy.confidence[40:] == 0).all()


def test_a_calibration_moves_the_decision_and_survives_its_file(tmp_path: Path) -> None:
    none = SpaceCalibration.none()
    overconfident = replace(none, obstacle=none.obstacle**3, missed=none.missed**0.5, fitted_on="twelve frames")
    overconfident.save(tmp_path / "space.npz")
    loaded = SpaceCalibration.load(tmp_path / "space.npz")
    assert loaded.fitted_on == "twelve frames"
    np.testing.assert_allclose(loaded.obstacle, overconfident.obstacle, atol=1e-6)
    assert loaded.column_score(0.35) == pytest.approx(np.full(4, 0.35 ** (1 / 3)), abs=0.01)
    assert loaded.free_score(0.1) == pytest.approx(np.full(4, 0.01), abs=0.01)
    evidence = street()
    doubtful = np.full_like(evidence.obstacle, 0.001)
    doubtful[0, 0, 4, 39:42, 59:62] = 0.5
    maker = GroundGridMaker(GRID, loaded)
    grid = maker.make(VoxelEvidence(doubtful, evidence.ground), sight(rig()), CONFIG)
    assert cell(grid, 8.2, 0.2) == -1
    assert grid.probability[40, 60] == pytest.approx(0.125, abs=0.02)


def test_calibrations_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    none = SpaceCalibration.none()
    for wrong, about in ((none.occupied[:, ::-1], "falls"), (none.occupied[:2], "want probabilities")):
        with pytest.raises(SpaceCalibrationError, match=about):
            replace(none, occupied=wrong)
    (tmp_path / "space.npz").write_bytes(b"no archive")
    with pytest.raises(SpaceCalibrationError, match=r"space\.npz"):
        SpaceCalibration.load(tmp_path / "space.npz")
    assert len(SCORES) == none.occupied.shape[1]
    with pytest.raises(ConfigError, match="max_height"):
        GroundGridConfig(min_height=3.0)
