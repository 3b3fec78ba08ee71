"""Example inputs of a graph, to compare runtimes: a ring of cameras with images of noise, and motion between two frames."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.config import ModelConfig
from occbev.geometry import make_transform, rotation_from_yaw
from occbev.inference.families import family_of
from occbev.inference.families.record import Moment
from occbev.inference.table_cache import TableCache
from occbev.rig import Camera, CameraRig

Arrays = dict[str, NDArray[Any]]


def example_inputs(model: ModelConfig, form: str, cameras: int, seed: int = 0, rig: CameraRig | None = None) -> Arrays:
    """Return all inputs that a graph of a model can take, for a rig (by default a ring) with random images, all valid.

    form: of its tables. seed: 0 is a first frame; in any other a network with a memory finds a random state and a motion.
    """
    generator, image = np.random.default_rng(seed), model.image
    rig = rig or ring_rig(model, cameras)
    pixels = generator.standard_normal((1, len(rig), 3, image.height, image.width))
    arrays: Arrays = {
        "images": pixels.astype(np.float32),
        "camera_valid": np.ones((1, len(rig)), np.float32),
        **TableCache(model, form).tables(rig),
    }
    family = family_of(model)
    before = Moment(0, make_transform(rotation_from_yaw(0.3), (100.0, 50.0, 0.0)), rig)
    now = Moment(500_000_000, make_transform(rotation_from_yaw(0.4), (101.5, 50.4, 0.0)), rig)
    for name, state in family.first_state(model, len(rig)).items():
        arrays[name] = generator.standard_normal(state.shape).astype(np.float32)
    return arrays | family.motion(model, now, before if seed else None)


def ring_rig(model: ModelConfig, cameras: int) -> CameraRig:
    """Return network-size cameras that look outwards in equal steps from 1.6 m above ground."""
    width, height = model.image.width, model.image.height
    intrinsic = np.array([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2], [0, 0, 1]])
    ring = []
    for index in range(cameras):
        yaw = 2 * np.pi * index / cameras
        pose = np.eye(4)
        pose[:3, 0] = np.sin(yaw), -np.cos(yaw), 0  # right
        pose[:3, 1] = 0, 0, -1  # down
        pose[:3, 2] = np.cos(yaw), np.sin(yaw), 0  # forward
        pose[:3, 3] = np.cos(yaw), np.sin(yaw), 1.6
        ring.append(Camera(f"CAM_{index}", width, height, intrinsic, pose))
    return CameraRig(tuple(ring))


def relative_difference(want: NDArray[Any], got: NDArray[Any]) -> float:
    """Return max |a - b| / max |a|; of whole numbers, such as classes, the share that differs."""
    if np.issubdtype(want.dtype, np.integer):
        return float((want != got).mean())
    return float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-30))
