"""Occupancy labels of small ray-traced scenes whose truth is known, and the defects they must not have.

W1 to W10 are the defects of the reference label scripts, one regression test each.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from tests.training.traced_drive import (
    FORWARD_CAMERA,
    GRID,
    KEY_NS,
    LIDAR2EGO,
    Block,
    TracedDrive,
)

from occbev.geometry import make_transform, rotation_from_rpy, transform_points
from occbev.results import CameraFrame, FrameSet, Sweep
from occbev.rig import Camera, CameraRig
from occbev.trajectory import Trajectory
from occbev_training.occupancy.labels import (
    LabelBuilder,
    LabelConfig,
    build_label,
    camera_rays,
    pixel_rays,
)
from occbev_training.occupancy.paper import PAPER_GRID, paper_label

UNOBSERVED, FREE, OCCUPIED = 0, 1, 2


def cell(x: float, y: float, z: float) -> tuple[int, int, int]:
    """The voxel of a point of the test grid."""
    indices, inside = GRID.indices([[x, y, z]])
    assert inside[0], (x, y, z)
    return tuple(int(i) for i in indices[0])


def label_of(drive: TracedDrive, **changes):
    return build_label(drive, 0, LabelConfig(**changes), GRID)


WALL = Block((10.2, 0.0, 1.5), (0.4, 12.0, 3.0))
PARKED = Block((6.2, 5.0, 0.8), (4.0, 1.8, 1.6))
MOVER = Block((-2.2, -5.0, 0.8), (4.0, 1.8, 1.6), velocity=(-8.0, 0.0))


@pytest.fixture(scope="module")
def street():
    drive = TracedDrive([WALL, PARKED, MOVER])
    return drive, label_of(drive)


def test_a_ground_plane_is_one_layer_with_free_space_above_and_nothing_known_below() -> None:
    state = label_of(TracedDrive()).state
    layer = cell(5.0, 5.0, 0.0)[2]
    assert np.flatnonzero((state == OCCUPIED).any(axis=(0, 1))).tolist() in (
        [layer],
        [layer - 1, layer],
    )
    near = np.linalg.norm(GRID.centres()[:, :, layer, :2] - (0.9, 0), axis=-1)
    ring = (near > 4) & (near < 12)
    ground = np.maximum(state[:, :, layer], state[:, :, layer - 1])
    assert (ground[ring] == OCCUPIED).mean() > 0.97
    assert (state[:, :, layer + 1][ring] == FREE).mean() > 0.98
    assert (state[:, :, : layer - 1] == UNOBSERVED).all()


def test_a_wall_is_occupied_free_before_and_unobserved_behind(street) -> None:
    """W1: space that no beam reached is not free."""
    _, label = street
    for y in (-4.2, 0.2, 4.2):
        assert label.state[cell(10.1, y, 1.2)] == OCCUPIED
        assert label.state[cell(8.2, y if y != 4.2 else 2.2, 1.2)] == FREE
        assert label.state[cell(13.0, y, 1.0)] == UNOBSERVED
    assert 0.1 < (label.state == UNOBSERVED).mean() < 0.9


def test_a_parked_box_stays(street) -> None:
    _, label = street
    shell = [cell(4.2 + 0.3, y, 0.9) for y in (4.4, 5.0, 5.6)] + [cell(x, 4.2, 0.9) for x in (5.0, 6.2, 7.5)]
    assert [int(label.state[c]) for c in shell] == [OCCUPIED] * len(shell)


def test_ground_between_the_rings_is_not_free() -> None:
    """Beams skim over ground that no beam happens to hit."""
    inner, layer = (slice(8, 32), slice(8, 32)), cell(5.0, 5.0, 0.0)[2]
    for grazing, most in ((True, 0.001), (False, 1.0)):
        drive = TracedDrive(speed=0.0, rings=24)
        label = build_label(drive, 0, LabelConfig(ground_grazing=grazing), GRID)
        free = (label.state[(*inner, layer)] == FREE).mean()
        assert free <= most
        assert (label.state[(*inner, layer + 1)] == FREE).mean() > 0.9
    assert free > 0.1, "what the rule is for"


def test_a_mover_leaves_no_trail(street) -> None:
    """W2: 8 m/s for 2 s would smear a car over 20 m."""
    _, label = street
    along = np.arange(-11.0, 7.0, 0.8)
    outside = along[np.abs(along - MOVER.centre[0]) > 2.8]
    trail = [cell(x, y, 1.2) for x in outside for y in (-5.4, -4.6)]
    assert sum(int(label.hit_sweeps[c]) >= 2 for c in trail) > 10, "it did drive there"
    states = [int(label.state[c]) for c in trail]
    assert OCCUPIED not in states
    assert states.count(FREE) > 0.7 * len(states)
    assert label.state[cell(-3.0, -4.2, 1.0)] == OCCUPIED, "where it is at the key time it stays"
    assert label.stats["dynamic_cells"] > 40


def test_points_outside_the_grid_do_not_pile_up_on_its_border() -> None:
    """W3: nothing is clamped."""
    drive = TracedDrive([Block((30.0, 0.0, 3.0), (1.0, 40.0, 6.0))], ground=False)
    label = label_of(drive)
    assert label.stats["hit_cells"] == 0
    assert not (label.state == OCCUPIED).any()
    assert (label.state[-1] == FREE).any(), "beams to it cross the border plane"


def test_points_land_in_the_cell_that_the_grid_names() -> None:
    """W4: pitch is extent / n, index is floor((p - lo) / pitch)."""
    rng = np.random.default_rng(4)
    points = rng.uniform((-15.9, -15.9, -0.9), (15.9, 15.9, 3.7), (500, 3))
    points = points[np.abs(points - (0.9, 0, 1.8)).max(axis=1) > 5]
    sweeps = {0: points}
    drive = TracedDrive(ground=False, sweeps=1, extra=sweeps)
    state = label_of(drive).state
    indices, inside = GRID.indices(points)
    assert inside.all()
    wanted = np.zeros(GRID.shape, bool)
    wanted[tuple(indices.T)] = True
    assert np.array_equal(state == OCCUPIED, wanted)


def test_labels_are_in_base_link_whatever_the_lidar_axes() -> None:
    """W5: a wall ahead of the car is at +x, its height counts from the ground."""
    for yaw in (0.0, -np.pi / 2, 2.0):
        drive = TracedDrive([WALL], speed=0.0)
        drive.lidar2ego = make_transform(rotation_from_rpy(0, 0, yaw), [0.9, 0.0, 1.8])
        state = label_of(drive).state
        occupied = np.argwhere(state[:, :, 3:] == OCCUPIED)
        assert len(occupied) > 50
        x = GRID.centres()[tuple(occupied.T)][:, 0]
        assert np.all(np.abs(x - 10.2) < 0.8), yaw


def test_the_ego_body_is_no_obstacle() -> None:
    """W6: in every sweep, the reference one included."""
    rng = np.random.default_rng(5)
    body = rng.uniform((-1.2, -1.0, 0.2), (3.9, 1.0, 2.1), (300, 3))
    drive = TracedDrive(extra=dict.fromkeys(range(21), body))
    label = label_of(drive)
    inside = np.all((GRID.centres() > (-1.3, -1.05, 0.5)) & (GRID.centres() < (4.0, 1.05, 2.2)), axis=-1)
    assert not (label.state[inside] == OCCUPIED).any()
    assert label.stats["points_ego_body"] + label.stats["points_too_near"] >= 21 * 300
    assert label_of(TracedDrive()).stats["free"] == label.stats["free"], "a dropped point carves nothing"


def test_what_drives_where_the_vehicle_is_at_another_time_is_no_obstacle() -> None:
    """Under itself a LiDAR sees no ground, so that such a trail would be the lowest there is, and stay."""
    ahead = Block((8.0, 0.0, 0.8), (4.0, 1.8, 1.6), velocity=(8.0, 0.0))
    label = label_of(TracedDrive([ahead], speed=8.0))
    centres = GRID.centres()
    own = np.all((centres > (-1.3, -1.05, 0.1)) & (centres < (4.0, 1.05, 2.2)), axis=-1)
    assert (label.hit_sweeps[own] > 0).sum() > 5, "it was there before"
    assert not (label.state[own] == OCCUPIED).any()


def test_states_are_the_three_that_losses_and_metrics_know(street) -> None:
    """W7: labels and what they are compared with have one encoding and one grid."""
    _, label = street
    assert label.state.dtype == np.uint8
    assert set(np.unique(label.state)) == {UNOBSERVED, FREE, OCCUPIED}
    assert label.grid == GRID
    assert label.state.shape == label.camera_visible.shape == label.hit_sweeps.shape == GRID.shape


def test_a_stray_return_is_not_occupied() -> None:
    """W8: rain and dust hit a cell once."""
    stray = np.array([[6.2, 2.2, 2.0]])
    once = label_of(TracedDrive(extra={4: stray})).state[cell(6.2, 2.2, 2.0)]
    at_key = label_of(TracedDrive(extra={10: stray})).state[cell(6.2, 2.2, 2.0)]
    assert once != OCCUPIED
    assert at_key == OCCUPIED, "the reference sweep decides first"


def test_a_slope_does_not_split_the_ground() -> None:
    """W9: poses are used in three dimensions."""
    drive = TracedDrive(slope=0.08, speed=8.0)
    flat = label_of(TracedDrive(slope=0.0, speed=8.0))
    steep = label_of(drive)
    assert np.abs(steep.state.astype(int) - flat.state).astype(bool).mean() < 0.002
    occupied = steep.state == OCCUPIED
    assert occupied.sum(axis=2)[occupied.any(axis=2)].max() <= 2


def test_sweeps_are_read_once_for_neighbouring_keys_and_nothing_is_deprecated() -> None:
    """W10: the reference script reads each sweep again for every key and dies on a new NumPy."""
    drive = TracedDrive(sweeps=31)
    drive.key_stamp_ns = KEY_NS + np.array([-500_000_000, 0, 500_000_000])
    builder = LabelBuilder(drive, LabelConfig(), GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = [builder.build(key) for key in range(3)]
    assert drive.reads == 31
    assert [label.stats["sweeps"] for label in labels] == [21, 21, 21]


def test_one_sweep_gives_hits_and_free_space_only_where_it_looked() -> None:
    label = label_of(TracedDrive([WALL], sweeps=1))
    assert label.stats["reference_sweeps"] == 1
    assert label.state[cell(10.1, 0.2, 1.2)] == OCCUPIED
    assert label.hit_sweeps.max() == label.pass_sweeps.max() == 1


@pytest.mark.parametrize("points", [np.zeros((0, 3)), np.array([[6.2, 2.2, 2.0]])])
def test_an_empty_sweep_and_a_single_point(points) -> None:
    drive = TracedDrive(ground=False, sweeps=1, extra={0: points})
    drive.lidar2ego = make_transform(LIDAR2EGO[:3, :3], [0.9, 0.1, 1.7])
    label = label_of(drive)
    assert label.stats["occupied"] == len(points)
    # From there to (6.2, 2.3, 1.9) the beam crosses 6 faces in x, 2 in y, 1 in z before the last cell.
    assert label.stats["free"] == (0 if len(points) == 0 else 9)


def test_a_recording_without_sweeps_knows_nothing() -> None:
    drive = TracedDrive(sweeps=1)
    drive.key_stamp_ns = drive.key_stamp_ns + 1_500_000_000
    label = label_of(drive)
    assert label.stats["sweeps"] == 0
    assert label.stats["low_support"] == 1
    assert not label.state.any()
    assert not label.camera_visible.any()


def test_sweeps_without_a_pose_are_counted_not_used() -> None:
    drive = TracedDrive(sweeps=21)
    keep = drive.trajectory.stamp_ns >= KEY_NS - 500_000_000
    drive.trajectory = Trajectory(drive.trajectory.stamp_ns[keep], drive.trajectory.ego2global[keep])
    stats = label_of(drive).stats
    assert (stats["sweeps"], stats["sweeps_without_pose"]) == (16, 5)


def test_the_order_of_points_changes_nothing(street) -> None:
    drive, label = street

    class Shuffled(TracedDrive):
        def sweep(self, index: int) -> Sweep:
            sweep = super().sweep(index)
            order = np.random.default_rng(index).permutation(len(sweep.points))
            return dataclasses.replace(sweep, points=sweep.points[order])

    other = label_of(Shuffled(drive.blocks))
    for name in ("state", "camera_visible", "hit_sweeps", "pass_sweeps"):
        assert np.array_equal(getattr(label, name), getattr(other, name)), name
    assert dict(label.stats) == dict(other.stats)


def test_collapsing_beams_changes_little(street) -> None:
    drive, fast = street
    plain = label_of(drive, collapse=False)
    free = plain.state == FREE
    assert (free & (fast.state == FREE)).sum() >= 0.985 * free.sum()
    assert (~free & (fast.state == FREE)).sum() <= 0.002 * free.sum()
    assert np.array_equal(plain.hit_sweeps, fast.hit_sweeps)


def test_each_camera_sees_its_own_side_and_only_what_is_observed(street) -> None:
    _, label = street
    front, back = label.camera_visible & 1, label.camera_visible & 2
    centres = GRID.centres()
    assert front[cell(10.1, 0.2, 1.2)]
    assert not back[cell(10.1, 0.2, 1.2)]
    assert back[cell(-8.2, 0.2, 1.0)]
    assert not front[centres[..., 0] < 1.0].any()
    assert not label.camera_visible[label.state == UNOBSERVED].any()
    assert not front[cell(13.0, 0.2, 1.0)], "behind the wall"


def test_cameras_from_the_eighth_on_share_a_bit(street) -> None:
    drive, label = street
    front, back = drive.rig.cameras
    others = [dataclasses.replace(front, name=f"FRONT {n}") for n in range(1, 8)]
    crowded = TracedDrive([WALL, PARKED, MOVER])
    crowded.rig = CameraRig((front, *others, back))
    many = label_of(crowded)
    sees_front, sees_back = label.camera_visible & 1 > 0, label.camera_visible & 2 > 0
    for bit in range(7):
        assert np.array_equal(many.camera_visible >> bit & 1 > 0, sees_front)
    assert np.array_equal(many.camera_visible >> 7 > 0, sees_front | sees_back)


def test_visibility_uses_each_cameras_own_pose(street) -> None:
    drive, label = street
    late = drive.trajectory.at(KEY_NS + 900_000_000)
    frames = {"FRONT": CameraFrame("FRONT", KEY_NS, b"", late), "BACK": None}
    moved = build_label(drive, 0, LabelConfig(), GRID, FrameSet(KEY_NS, frames, {"BACK": "lost"}))
    assert np.array_equal(moved.state, label.state)
    assert not (moved.camera_visible & 2).any(), "a missing camera sees nothing"
    x = GRID.centres()[..., 0]
    nearest = [x[(lab.camera_visible & 1) > 0].min() for lab in (label, moved)]
    assert nearest[1] - nearest[0] > 1.9


def test_pixel_rays_cover_the_image_evenly_at_any_resolution() -> None:
    camera = Camera("C", 1600, 900, [[1260, 0, 800], [0, 1260, 450], [0, 0, 1]], FORWARD_CAMERA)
    small = camera.resize(0.22, 0.22, (0, 70), (352, 128))
    config = LabelConfig(camera_spacing=4 / 1260, camera_aspect=2.0, camera_levels=3, camera_near=10.0)
    for each in (camera, small):
        rays = camera_rays(each, config)
        assert rays.until == (10.0, 20.0, 60.0)
        for level, directions in enumerate(rays.directions):
            points = transform_points(each.cam2ego, directions.reshape(-1, 3))
            pixels, _, inside = each.project(points)
            assert inside.all()
            step = 4 * each.intrinsic[0, 0] / 1260 * 2 ** (2 - level)
            for axis, size, apart in ((0, each.width, 2 * step), (1, each.height, step)):
                along = np.unique(pixels[:, axis].round(4))
                assert np.isclose(np.diff(along).max(), apart, rtol=0.05)
                assert along.min() < apart
                assert along.max() > size - apart
    assert [d.shape[:2] for d in camera_rays(camera, config).directions] == [
        (57, 50),
        (114, 100),
        (228, 200),
    ]


@pytest.mark.parametrize(
    ("model", "distortion"),
    [("plumb_bob", (-0.3, 0.1, 0.001, -0.001, 0.0)), ("equidistant", (0.02, -0.01, 0.0, 0.0))],
)
def test_pixel_rays_go_through_the_real_lens(model: str, distortion: tuple[float, ...]) -> None:
    import cv2

    intrinsic = np.array([[500.0, 0, 320], [0, 510.0, 240], [0, 0, 1]])
    camera = Camera("C", 640, 480, intrinsic, FORWARD_CAMERA, model, distortion)
    rays = pixel_rays(camera, 24, 32).reshape(-1, 3)
    project = cv2.fisheye.projectPoints if model == "equidistant" else cv2.projectPoints
    pixels = project(rays[:, None], np.zeros(3), np.zeros(3), intrinsic, np.array(distortion))[0][:, 0]
    straight = pixel_rays(dataclasses.replace(camera, distortion=()), 24, 32).reshape(-1, 3)
    wanted = straight / straight[:, 2:] @ intrinsic.T
    assert np.abs(pixels - wanted[:, :2]).max() < 0.02
    assert np.abs(rays - straight).max() > 0.005


def test_the_hash_names_every_parameter() -> None:
    base = LabelConfig()
    assert base.hash == LabelConfig().hash
    assert base.hash != dataclasses.replace(base, dynamic_ratio=1.5).hash
    assert base.hash != dataclasses.replace(base, limits=dataclasses.replace(base.limits, max_range=50)).hash


@pytest.mark.parametrize("changes", [{"window": 0.0}, {"max_sweeps": 64}, {"ground_columns": 4}])
def test_impossible_parameters_are_refused(changes) -> None:
    with pytest.raises(ValueError, match="got"):
        LabelConfig(**changes)


def test_the_published_recipe_is_reproduced_with_its_defects(street) -> None:
    """What W1 to W6 and W8 are about, seen in the reference labels of the same drive."""
    drive, ours = street
    far = np.array([[80.0, 3.0, 1.0], [55.0, -3.0, 9.0]])
    drive = TracedDrive(drive.blocks, sweeps=41, extra={18: far})
    drive.key_stamp_ns = KEY_NS + np.arange(-2, 3) * 500_000_000
    label = paper_label(drive, 2)
    occupied = label.state == OCCUPIED
    assert label.grid is PAPER_GRID
    assert label.stats["sweeps"] == 21
    assert np.allclose(label.grid.pitch, (0.51457, 0.51457, 0.53333), atol=1e-4)
    assert not (label.state == UNOBSERVED).any(), "W1: all the rest is free"

    def at(x: float, y: float, z: float) -> bool:
        """Whether a point of base_link is occupied: the grid stands on the LiDAR."""
        return bool(occupied[tuple(PAPER_GRID.indices(np.array([[x, y, z]]) - (0.9, 0, 1.8))[0][0])])

    trail = [at(x, -4.2, 1.0) for x in np.arange(-8.0, 2.0, 0.5)]
    assert np.mean(trail) > 0.6, "W2: the mover smears"
    assert at(51.4 + 0.9, -3.0, 5.0), "W3: outliers pile up on the border"
    assert not occupied[-1, 105].any(), "beyond 60 m nothing is kept"
    assert at(10.1, 0.2, 1.2)
    assert ours.state[cell(-6.2, -4.2, 1.0)] != OCCUPIED


def test_no_camera_ray_goes_through_the_vehicle_itself(street, tmp_path) -> None:
    import cv2

    drive, label = street
    mask = np.zeros((90, 160), np.uint8)
    mask[:, :80] = 255
    cv2.imwrite(str(tmp_path / "FRONT.png"), mask)
    masked = label_of(drive, ego_masks=str(tmp_path))
    y = GRID.centres()[..., 1]
    left, right = (
        (y > 0.8) & (label.camera_visible & 1 > 0),
        (y < -0.8) & (label.camera_visible & 1 > 0),
    )
    assert left.sum() > 100
    assert not (masked.camera_visible[left] & 1).any(), "the left half of the image shows the vehicle"
    assert (masked.camera_visible[right] & 1).mean() > 0.99
    assert np.array_equal(masked.camera_visible & 2, label.camera_visible & 2), "the other camera has no mask"
    before = LabelConfig(ego_masks=str(tmp_path)).hash
    cv2.imwrite(str(tmp_path / "FRONT.png"), mask[:, :40])
    assert LabelConfig(ego_masks=str(tmp_path)).hash != before, "what the masks hold is part of the hash"
    with pytest.raises(ValueError, match=r"FRONT.png: 40x90 pixels; FRONT has 160x90"):
        LabelBuilder(drive, LabelConfig(ego_masks=str(tmp_path)), GRID).build(0)


def test_threads_beside_each_other_make_the_same_labels(street) -> None:
    """Q9: kernels release the interpreter's lock and share nothing."""
    from concurrent.futures import ThreadPoolExecutor

    drive, label = street
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: LabelBuilder(drive, LabelConfig(), GRID).build(0), range(4)))
    for other in others:
        for name in ("state", "camera_visible", "hit_sweeps", "pass_sweeps"):
            assert np.array_equal(getattr(label, name), getattr(other, name)), name
