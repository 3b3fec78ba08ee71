"""The label benchmark compares like with like: its baseline gives the states that ours gives."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from tests.training.traced_drive import GRID, Block, TracedDrive

from occbev_training.benchmarks.labels import (
    COPIES,
    _copies,
    _peak_mb,
    _plain,
    _plain_states,
    _plain_steps,
    _python,
    _python_ms,
    _rays,
    _states,
    load_copies,
)
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig, pixel_rays
from occbev_training.occupancy.rays import CameraRays, bundle_rays


@pytest.fixture(scope="module")
def recording():
    drive = TracedDrive([Block((10.2, 0.0, 1.5), (0.4, 12.0, 3.0))], rings=20, columns=120)
    sweep = drive.sweep(10)
    return _copies("traced", drive.rig, drive.frame_set(0), sweep, drive.trajectory.at(sweep.stamp_ns))


def test_ten_copies_stand_half_a_metre_apart(recording) -> None:
    places = recording.trajectory.ego2global[:, :3, 3]
    assert len(places) == COPIES
    assert np.allclose(np.linalg.norm(np.diff(places, axis=0), axis=1), 0.5)
    label = LabelBuilder(recording, LabelConfig(camera_spacing=0.05), GRID).build(0)
    assert label.stats["sweeps"] == COPIES
    assert label.stats["reference_sweeps"] == 1


def test_the_baseline_marks_the_same_cells(recording) -> None:
    rays, motions = _rays(recording)
    single = [bundle_rays(r, m, GRID, 0.8, collapse=False) for r, m in zip(rays, motions, strict=True)]
    ours, plain = _states(single, GRID), _plain_states(rays, motions, GRID)
    assert (plain == 1).sum() > 2000
    assert np.mean(ours != plain) < 1e-3, "it adds up its steps, so a corner may fall the other way"
    assert _plain_steps(rays, motions, GRID) > (plain == 1).sum()
    slow, fast = np.zeros(GRID.size, np.uint8), np.zeros(GRID.size, np.uint8)
    parts = (np.array(GRID.lo), np.array(GRID.pitch), np.array(GRID.shape))
    for cast, state in ((_python, slow), (_plain, fast)):
        cast(rays[0].end[:300], rays[0].origin[:300], motions[0], *parts, state)
    assert (slow == 1).sum() > 100
    assert np.array_equal(slow, fast)
    assert _python_ms(_python, rays[0], motions[0], GRID) > 0


def seen_through(recording, state, stride: int) -> np.ndarray:
    """Which camera sees which cell (X, Y, Z, 8) along one whole ray through every so many pixels."""
    builder = LabelBuilder(recording, LabelConfig())
    for camera in recording.rig.cameras:
        rays = pixel_rays(camera, camera.height // stride, camera.width // stride)
        rays = CameraRays((rays.astype(np.float32),), (builder.config.camera_range,))
        builder._camera_rays[camera.name] = (camera, rays)
    visible = builder._visibility(0, recording.frame_set(0), state)
    return np.unpackbits(visible[..., None], axis=-1).astype(bool)


def test_camera_bits_are_at_least_those_of_every_fourth_pixel(shared, monkeypatch) -> None:
    monkeypatch.setenv("OCCBEV_SHARED", str(shared))
    recording = load_copies()
    label = LabelBuilder(recording, LabelConfig()).build(0)
    ours = np.unpackbits(label.camera_visible[..., None], axis=-1).astype(bool)
    every, fourth = (seen_through(recording, label.state, stride) for stride in (1, 4))
    for cells in (label.state != 0, label.state == 2):
        assert (ours & every)[cells].sum() >= (fourth & every)[cells].sum()
    assert (ours & ~every).sum() <= 0.001 * every.sum()


def test_a_workers_memory_is_its_own() -> None:
    ballast = np.ones(200 << 17)  # 200 MiB in this process
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        child = pool.submit(_peak_mb).result()
    assert ballast.nbytes / 2**20 < _peak_mb()
    assert child < _peak_mb() - 100
