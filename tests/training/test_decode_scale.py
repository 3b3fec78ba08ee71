"""occbev-tiny decodes JPEG at the smallest size that has its columns: what it sees is hardly other than at twice that size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("embreex", reason="the simulator casts rays with embreex")
pytest.importorskip("openvino")

from occbev.benchmarks.pipeline import cameras_around
from occbev.classes import FREE, OCCUPIED_STATE
from occbev.inference.model_package import ModelPackage, find_package
from occbev.inference.pipeline import Pipeline
from occbev.results import Boxes3D, Perception
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive

SEED, SIZE = 20_000, (800, 450)
"""Images of 800x450 are decoded at 400x225 for 352 columns, or whole for twice as many."""

SURE, NEAR_M = 0.5, 1.0
"""Score of a box, and how far apart it may be in the two results."""


def test_boxes_and_voxels_are_close_and_no_further_from_the_truth() -> None:
    drive = SimulatedDrive(SEED, DriveConfig(keys=1, key_rate=2.0, rig=cameras_around(6, SIZE), jpeg_quality=80))
    frame_set, truth = drive.frame_set(0), drive.occupancy_truth(0)
    package = ModelPackage.load(find_package("occbev-tiny"))
    assert package.model.image.oversampling == 1.0
    results: list[Perception] = []
    for oversampling in (1.0, 2.0):
        image = replace(package.model.image, oversampling=oversampling)
        line = Pipeline(replace(package, model=replace(package.model, image=image)), drive.rig, "openvino")
        frame = line.decode_frame(next(frame for frame in frame_set.frames.values() if frame), drive.rig.cameras[0])
        assert frame.image.shape[1] == {1.0: 400, 2.0: 800}[oversampling]  # type: ignore[union-attr]
        results.append(line.run(frame_set))
        line.close()
    fewer, more = results
    occupied = [result.occupancy.state == OCCUPIED_STATE for result in results]
    assert overlap(*occupied) > 0.8
    assert (fewer.occupancy.label == more.occupancy.label).mean() > 0.96
    assert found_share(fewer.boxes, more.boxes) > 0.75
    assert found_share(more.boxes, fewer.boxes) > 0.75
    seen = truth.mask_camera.astype(bool)
    solid = truth.semantics != FREE
    right = [overlap(cells & seen, solid & seen) for cells in occupied]
    assert right[0] > right[1] - 0.03


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def found_share(these: Boxes3D, those: Boxes3D) -> float:
    """Return the share of the sure boxes of one result that the other one has as well."""
    sure = these.box[these.score >= SURE, :2]
    apart = np.linalg.norm(sure[:, None] - those.box[None, :, :2], axis=-1)
    return float((apart.min(1) < NEAR_M).mean())
