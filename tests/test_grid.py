"""Voxel and BEV grids: metres to indices and back, hashes, axis orders."""

from __future__ import annotations

import numpy as np
import pytest

from occbev.grid import GRIDS, BevGrid, VoxelGrid, volume_from_xyz, xyz_from_volume


def test_occ3d_voxel_centres_are_those_of_the_dataset() -> None:
    grid = GRIDS["occ3d"]
    np.testing.assert_allclose(grid.centres([0, 0, 0]), [-39.8, -39.8, -0.8])
    np.testing.assert_allclose(grid.centres([199, 100, 15]), [39.8, 0.2, 5.2])
    np.testing.assert_allclose(grid.hi, [40, 40, 5.4])
    assert grid.centres().shape == (200, 200, 16, 3)


def test_every_centre_falls_into_its_own_voxel() -> None:
    grid = GRIDS["tiny"]
    indices, inside = grid.indices(grid.centres().reshape(-1, 3))
    assert inside.all()
    np.testing.assert_array_equal(grid.flatten(indices), np.arange(grid.size))


def test_the_grid_is_half_open_and_never_clamps() -> None:
    grid = VoxelGrid((0, 0, 0), (1, 1, 1), (2, 2, 2))
    points = [[0, 0, 0], [2, 0, 0], [-1e-9, 0, 0], [1.999, 1.999, 1.999], [np.nan, 0, 0]]
    indices, inside = grid.indices(points)
    assert inside.tolist() == [True, False, False, True, False]
    assert indices[3].tolist() == [1, 1, 1]


def test_hash_depends_on_every_number_and_on_the_frame() -> None:
    base = GRIDS["occ3d"]
    others = [
        VoxelGrid((-40, -40, -1.1), base.pitch, base.shape),
        VoxelGrid(base.lo, (0.4, 0.4, 0.5), base.shape),
        VoxelGrid(base.lo, base.pitch, (200, 200, 15)),
        VoxelGrid(base.lo, base.pitch, base.shape, "lidar"),
    ]
    assert len({base.hash, *(grid.hash for grid in others)}) == 5
    assert VoxelGrid.from_record(base.as_record()) == base
    assert VoxelGrid.from_record(base.as_record()).hash == base.hash


def test_bad_grids_are_refused_with_their_values() -> None:
    with pytest.raises(ValueError, match="positive"):
        VoxelGrid((0, 0, 0), (0, 1, 1), (2, 2, 2))
    with pytest.raises(ValueError, match="axis order 'zyx'"):
        VoxelGrid.from_record({**GRIDS["tiny"].as_record(), "axis_order": "zyx"})


def test_label_and_volume_orders_convert_both_ways() -> None:
    label = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    volume = volume_from_xyz(label)
    assert volume.shape == (4, 3, 2)
    assert volume[3, 1, 0] == label[0, 1, 3]
    np.testing.assert_array_equal(xyz_from_volume(volume), label)


def test_bev_coordinates_are_column_then_row() -> None:
    bev = BevGrid((-10, -5), (1, 0.5), (20, 20))
    np.testing.assert_allclose(bev.map_coordinates([[-9.5, -4.0]]), [[0.5, 2.0]])
    np.testing.assert_allclose(bev.metres([[0.5, 2.0]]), [[-9.5, -4.0]])
    assert GRIDS["occ3d"].bev.shape == (200, 200)
