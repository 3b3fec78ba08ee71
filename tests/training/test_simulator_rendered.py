"""A drive rendered by worker processes is, bit for bit, the drive that one process renders."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("embreex", reason="the simulator casts rays with embreex")

from occbev.grid import GRIDS
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.simulator.lidar import LidarConfig
from occbev_training.simulator.rendered import RenderedDrive

CONFIG = DriveConfig(keys=2, key_rate=5.0, image=(96, 32), lidar=LidarConfig(columns=120), grid=GRIDS["tiny"])
SEED = 20_001


def test_rendering_in_processes_changes_nothing() -> None:
    steps: list[tuple[int, int]] = []
    rendered = RenderedDrive(SEED, CONFIG, 2, lambda done, total: steps.append((done, total)))
    drive = SimulatedDrive(SEED, CONFIG)
    total = len(drive.key_stamp_ns) + len(drive.sweep_stamp_ns)
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert rendered.rig.hash == drive.rig.hash
    np.testing.assert_array_equal(rendered.key_stamp_ns, drive.key_stamp_ns)
    for key in (1, 0):  # out of order: a frame must not depend on those before it
        pictures = [s.frames["CAM_BACK"].image for s in (rendered.frame_set(key), drive.frame_set(key))]
        assert pictures[0] == pictures[1]
        boxes, expected = rendered.annotations(key), drive.annotations(key)
        np.testing.assert_array_equal(boxes.boxes.box, expected.boxes.box)
        np.testing.assert_array_equal(boxes.lidar_points, expected.lidar_points)
        truth, wanted = rendered.occupancy_truth(key), drive.occupancy_truth(key)
        np.testing.assert_array_equal(truth.semantics, wanted.semantics)
        np.testing.assert_array_equal(truth.mask_camera, wanted.mask_camera)
    np.testing.assert_array_equal(rendered.sweep(7).points, drive.sweep(7).points)
