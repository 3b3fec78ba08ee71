"""Voxel traversal against brute force, at faces, edges and corners, and whatever the order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from occbev.geometry import make_transform, rotation_from_rpy
from occbev.grid import VoxelGrid
from occbev_training.occupancy.rays import (
    CameraRays,
    bundle_rays,
    cast,
    gather_hits,
    mark_visible,
    traverse,
)
from occbev_training.sources.deskew import Rays

GRID = VoxelGrid((-2.0, -1.5, -1.0), (0.5, 0.4, 0.25), (10, 8, 6))
UNIT = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (6, 6, 6))


def rays_of(origin, end, hit=True) -> Rays:
    end = np.asarray(end, np.float64).reshape(-1, 3)
    origin = np.broadcast_to(np.asarray(origin, np.float64), end.shape).copy()
    return Rays(end, origin, np.broadcast_to(hit, len(end)).copy())


def passed(origin, end, grid=UNIT) -> list[tuple[int, int, int]]:
    flat = traverse(np.array(origin, float), np.array(end, float), grid)
    return [tuple(int(i) for i in np.unravel_index(f, grid.shape)) for f in flat]


def sampled_cells(origin, end, grid) -> tuple[set[int], set[int]]:
    """Cells that 1/50-cell samples of the segment visit, and those it visits for longer than that."""
    length = np.linalg.norm((end - origin) / grid.pitch)
    t = np.linspace(0, 1, int(length * 50) + 2)[:, None]
    cells, inside = grid.indices(origin + t * (end - origin))
    flat, count = np.unique(grid.flatten(cells[inside]), return_counts=True)
    return set(flat.tolist()), set(flat[count > 1].tolist())


def chord(origin, end, flat, grid) -> float:
    """Length, in cells, of the segment inside one cell, by clipping."""
    cell = np.array(np.unravel_index(flat, grid.shape))
    o, e = (origin - grid.lo) / grid.pitch, (end - grid.lo) / grid.pitch
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (cell - o) / (e - o), (cell + 1 - o) / (e - o)
    enter, leave = max(0.0, np.nanmax(np.minimum(a, b))), min(1.0, np.nanmin(np.maximum(a, b)))
    return max(0.0, leave - enter) * float(np.linalg.norm(e - o))


def test_brute_force_agrees_on_random_rays() -> None:
    rng = np.random.default_rng(0)
    span = np.array(GRID.hi) - GRID.lo
    compared = 0
    for _ in range(300):
        origin, end = (np.array(GRID.lo) + rng.uniform(-0.6, 1.6, 3) * span for _ in range(2))
        walked = traverse(origin, end, GRID).tolist()
        assert len(walked) == len(set(walked)), "no cell twice"
        cells, inside = GRID.indices(end[None])
        last = {int(GRID.flatten(cells)[0])} if inside[0] else set()
        assert not last & set(walked), "the end cell is no pass of its own ray"
        visited, surely = sampled_cells(origin, end, GRID)
        assert surely - last <= set(walked)
        for extra in set(walked) - visited:
            assert chord(origin, end, extra, GRID) < 1 / 50 + 1e-9
        compared += len(walked)
    assert compared > 1000


def test_steps_are_face_neighbours_and_the_sensor_cell_is_passed() -> None:
    walked = passed((0.5, 0.5, 0.5), (5.4, 3.2, 1.7))
    assert walked[0] == (0, 0, 0)
    assert np.abs(np.diff(np.array([*walked, (5, 3, 1)]), axis=0)).sum(axis=1).tolist() == [1] * len(walked)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("direction", [1, -1])
def test_axis_parallel_rays(axis: int, direction: int) -> None:
    origin, end = np.full(3, 2.5), np.full(3, 2.5)
    origin[axis], end[axis] = (0.5, 4.5) if direction > 0 else (4.5, 0.5)
    walked = np.array(passed(origin, end))
    assert walked[:, axis].tolist() == ([0, 1, 2, 3] if direction > 0 else [4, 3, 2, 1])
    assert (np.delete(walked, axis, axis=1) == 2).all()


def test_a_ray_on_the_lower_face_is_inside_and_on_the_upper_face_outside() -> None:
    assert len(passed((0.5, 0.0, 0.5), (9.0, 0.0, 0.5))) == 6
    assert passed((0.5, 6.0, 0.5), (9.0, 6.0, 0.5)) == []


def test_ends_on_a_face_an_edge_and_a_corner_belong_to_the_upper_cell() -> None:
    assert passed((0.5, 0.5, 0.5), (3.0, 0.5, 0.5)) == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert passed((3.5, 0.5, 0.5), (1.0, 0.5, 0.5)) == [(3, 0, 0), (2, 0, 0)]
    edge, corner = (
        passed((0.5, 0.5, 0.5), (2.0, 2.0, 0.5)),
        passed((0.5, 0.5, 0.5), (2.0, 2.0, 2.0)),
    )
    assert edge == [(0, 0, 0), (1, 0, 0), (1, 1, 0)], "ties go x before y"
    assert corner == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]


def test_an_end_on_the_outer_face_leaves_the_grid() -> None:
    assert passed((3.5, 0.5, 0.5), (6.0, 0.5, 0.5)) == [(3, 0, 0), (4, 0, 0), (5, 0, 0)]


def test_a_sensor_outside_starts_at_the_entry_face() -> None:
    assert passed((-3.0, 2.5, 2.5), (2.5, 2.5, 2.5)) == [(0, 2, 2), (1, 2, 2)]
    assert passed((9.0, 2.5, 2.5), (-9.0, 2.5, 2.5)) == [(i, 2, 2) for i in range(5, -1, -1)]
    assert passed((-3.0, 2.5, 2.5), (-1.0, 2.5, 2.5)) == []
    assert passed((-1.0, 7.5, 2.5), (5.0, 9.0, 2.5)) == []


def test_a_ray_of_no_length_does_nothing() -> None:
    assert passed((2.5, 2.5, 2.5), (2.5, 2.5, 2.5)) == []
    assert passed((2.2, 2.5, 2.5), (2.8, 2.5, 2.5)) == []


def test_a_long_ray_does_not_drift() -> None:
    grid = VoxelGrid((0, 0, 0), (0.1, 0.1, 0.1), (3000, 4, 4))
    walked = traverse(np.array([0.05, 0.2001, 0.35]), np.array([299.95, 0.2001, 0.35]), grid)
    cells = np.array(np.unravel_index(walked, grid.shape)).T
    assert len(cells) == 2999
    assert (cells[:, 1:] == (2, 3)).all()


def evidence_of(bundles, grid=UNIT, distance=0.2):
    return cast(bundles, gather_hits(bundles, grid), grid, distance)


def test_the_fast_walk_passes_what_the_plain_one_does() -> None:
    rng = np.random.default_rng(7)
    span = np.array(GRID.hi) - GRID.lo
    ends = np.array(GRID.lo) + rng.uniform(-0.5, 1.5, (300, 3)) * span
    origins = np.array(GRID.lo) + rng.uniform(-0.5, 1.5, (300, 3)) * span
    ends[:20, 1:] = origins[:20, 1:]  # along an axis
    ends[20:25] = origins[20:25]  # of no length
    for origin, end in zip(origins, ends, strict=True):
        bundle = bundle_rays(rays_of(origin, [end]), np.eye(4), GRID, 0.8, collapse=False)
        marked = np.flatnonzero(evidence_of([bundle], GRID).passes)
        assert marked.tolist() == sorted(traverse(origin, end, GRID).tolist())


def test_hits_are_counted_and_averaged() -> None:
    ends = [[4.2, 2.5, 2.5], [4.6, 2.7, 2.5], [9.0, 2.5, 2.5]]
    bundle = bundle_rays(rays_of((0.5, 2.5, 2.5), ends), np.eye(4), UNIT, 0.8)
    assert len(bundle) == 2
    hits = gather_hits([bundle, bundle], UNIT)
    assert hits.cell.tolist() == [UNIT.flatten([[4, 2, 2]])[0]]
    assert hits.count.tolist() == [4]
    assert hits.sweeps.tolist() == [0b11]
    assert np.allclose(hits.centroid, [[4.4, 2.6, 2.5]])


def test_a_cut_beam_hits_nothing_but_carves() -> None:
    bundle = bundle_rays(rays_of((0.5, 2.5, 2.5), [[4.5, 2.5, 2.5]], hit=False), np.eye(4), UNIT, 0.8)
    evidence = evidence_of([bundle])
    assert len(evidence.hits.cell) == 0
    assert np.flatnonzero(evidence.passes).tolist() == UNIT.flatten([[i, 2, 2] for i in range(4)]).tolist()


def test_only_a_beam_through_the_returns_that_goes_on_contradicts_them() -> None:
    hit = bundle_rays(rays_of((0.5, 2.5, 2.5), [[3.5, 2.5, 2.5]]), np.eye(4), UNIT, 0.8)

    def conflicts(origin, end) -> int:
        other = bundle_rays(rays_of(origin, [end]), np.eye(4), UNIT, 0.8)
        return int(evidence_of([hit, other]).conflicts[0])

    assert conflicts((0.5, 2.5, 2.5), (5.5, 2.5, 2.5)) == 1
    assert conflicts((0.5, 2.5, 2.85), (5.5, 2.5, 2.85)) == 0, "0.35 m beside the returns"
    assert conflicts((0.5, 2.5, 2.5), (4.7, 2.5, 2.5)) == 0, "ends 0.7 m behind the cell"
    assert conflicts((0.5, 2.5, 2.5), (4.9, 2.5, 2.5)) == 1
    assert conflicts((0.5, 2.5, 2.5), (9.0, 2.5, 2.5)) == 1, "leaves the grid"


def test_the_margin_of_a_beam_that_ends_outside_counts_from_its_end() -> None:
    hit = bundle_rays(rays_of((0.5, 2.5, 2.5), [[5.5, 2.5, 2.5]]), np.eye(4), UNIT, 0.8)
    for collapse in (False, True):
        near, far = (
            bundle_rays(rays_of((0.5, 2.5, 2.5), [[x, 2.5, 2.5]]), np.eye(4), UNIT, 0.8, collapse) for x in (6.3, 6.9)
        )
        assert evidence_of([hit, near]).conflicts.tolist() == [0]
        assert evidence_of([hit, far]).conflicts.tolist() == [1]


@pytest.fixture(scope="module")
def room() -> Rays:
    """Beams of a sensor in a rough box-shaped room, some of which leave the grid."""
    rng = np.random.default_rng(1)
    direction = rng.normal(size=(4000, 3))
    direction /= np.abs(direction).max(axis=1, keepdims=True)
    reach = rng.choice([0.9, 1.4], 4000)[:, None] + rng.normal(0, 0.01, (4000, 1))
    sensor = np.array([0.4, 0.1, -0.2])
    return rays_of(sensor, sensor + direction * reach)


def test_collapsed_rays_keep_hits_exactly_and_passes_nearly(room) -> None:
    fine = VoxelGrid((-2.0, -2.0, -1.2), (0.2, 0.2, 0.2), (20, 20, 12))
    single, joined = (bundle_rays(room, np.eye(4), fine, 0.1, collapse) for collapse in (False, True))
    assert len(joined) < 0.6 * len(single)
    assert joined.weight.sum() == len(single)
    a, b = evidence_of([single], fine), evidence_of([joined], fine)
    for name in ("cell", "count", "sweeps", "centroid"):
        assert np.array_equal(getattr(a.hits, name), getattr(b.hits, name)), name
    plain, fast = a.passes != 0, b.passes != 0
    # One sweep of scattered beams is the hard case; the labels' own bounds are held on real sweeps.
    assert (plain & fast).sum() >= 0.95 * plain.sum()
    assert (fast & ~plain).sum() <= 0.002 * plain.sum()


def test_one_origin_for_all_beams_is_as_one_for_each(room) -> None:
    shared = Rays(room.end, np.broadcast_to(room.origin[:1], room.end.shape), room.hit)
    motion = make_transform(rotation_from_rpy(0.02, -0.01, 0.4), [0.03, -0.02, 0.01])
    one, each = (bundle_rays(r, motion, GRID, 0.1) for r in (shared, room))
    for field in dataclasses.fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(each, field.name)), field.name


@pytest.mark.parametrize("collapse", [False, True])
def test_evidence_does_not_depend_on_the_order_of_points(room, collapse: bool) -> None:
    motion = make_transform(rotation_from_rpy(0.02, -0.01, 0.4), [0.03, -0.02, 0.01])
    order = np.random.default_rng(2).permutation(len(room))
    mixed = Rays(room.end[order], room.origin[order], room.hit[order])
    first, second = (evidence_of([bundle_rays(r, motion, GRID, 0.1, collapse)], GRID) for r in (room, mixed))
    assert first.passes.any()
    assert first.conflicts.any()
    for name in ("passes", "conflicts", "conflict_sweeps"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert np.array_equal(first.hits.centroid, second.hits.centroid)


def test_more_sweeps_than_bits_are_refused() -> None:
    bundle = bundle_rays(rays_of((0.5, 2.5, 2.5), [[3.5, 2.5, 2.5]]), np.eye(4), UNIT, 0.8)
    with pytest.raises(ValueError, match="64 sweeps"):
        gather_hits([bundle] * 64, UNIT)


def seen(state, origin=(0.5, 2.5, 2.5), direction=(1.0, 0.0, 0.0), limit=5.0) -> list[int]:
    visible = np.zeros(UNIT.shape, np.uint8)
    ray = CameraRays((np.array(direction, float).reshape(1, 1, 3),), (60.0,))
    mark_visible(ray, make_transform(np.eye(3), origin), state, UNIT, 3, limit, visible)
    assert set(np.unique(visible)) <= {0, 8}
    return np.flatnonzero(visible[:, 2, 2]).tolist()


def test_a_camera_sees_up_to_the_first_surface() -> None:
    state = np.ones(UNIT.shape, np.uint8)
    assert seen(state) == [0, 1, 2, 3, 4, 5]
    state[3, 2, 2] = 2
    assert seen(state) == [0, 1, 2, 3]
    assert seen(state, origin=(9.0, 2.5, 2.5), direction=(-1.0, 0.0, 0.0)) == [3, 4, 5]


def test_a_camera_ray_ends_in_the_unknown_and_marks_none_of_it() -> None:
    state = np.ones(UNIT.shape, np.uint8)
    state[1:4] = 0
    assert seen(state) == [0, 4, 5]
    assert seen(state, limit=2.5) == [0]
    state[5, 2, 2] = 0
    assert seen(state, limit=3.5) == [0, 4]


def fan(rows: int, columns: int) -> np.ndarray:
    """Directions (rows, columns, 3) around +x."""
    y = (np.arange(columns) + 0.5) / columns * 1.4 - 0.7
    z = (np.arange(rows) + 0.5) / rows * 1.0 - 0.5
    zz, yy = np.meshgrid(z, y, indexing="ij")
    rays = np.stack([np.ones_like(yy), yy, zz], -1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def test_coarse_rays_near_by_see_what_fine_rays_see() -> None:
    rng = np.random.default_rng(6)
    grid = VoxelGrid((-10.0, -10.0, -2.0), (0.4, 0.4, 0.4), (50, 50, 16))
    state = np.ones(grid.shape, np.uint8)
    state[:, :, :2] = 2
    for x, y in rng.integers(0, 50, (40, 2)):
        state[x, y, : rng.integers(3, 16)] = rng.choice([0, 2])
    cam2grid = make_transform(np.eye(3), [-9.9, 0.05, -0.5])
    full, quick = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    mark_visible(CameraRays((fan(160, 240),), (30.0,)), cam2grid, state, grid, 0, 5.0, full)
    levels = CameraRays((fan(40, 60), fan(80, 120), fan(160, 240)), (5.0, 10.0, 30.0))
    mark_visible(levels, cam2grid, state, grid, 0, 5.0, quick)
    assert full.sum() > 3000
    assert (full & quick).sum() >= 0.985 * full.sum()
    assert (quick & ~full & 1).sum() <= 0.002 * full.sum()
