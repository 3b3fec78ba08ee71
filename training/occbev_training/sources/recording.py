"""The one interface of every recording, whatever it was read from: images, sweeps, poses, calibration, labels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from occbev.grid import VoxelGrid
from occbev.results import Boxes3D, FrameSet, Sweep
from occbev.results import RecordingError as RecordingError  # readers of training sources raise it, too
from occbev.rig import CameraRig
from occbev.trajectory import Trajectory

logger = logging.getLogger(__name__)


def describe_error(error: BaseException) -> str:
    """Return an error as one line; one that is not of this project is named by its kind, too."""
    text = " ".join(str(error).split())
    known = type(error).__module__.startswith("occbev")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


UNEXPECTED = (AssertionError, AttributeError, ImportError, NameError, NotImplementedError, TypeError)
"""Errors of these kinds are bugs of occbev, whatever the input."""


def require_beam_origin(recording: Recording) -> None:
    """Raise RecordingError for clouds in base_link without a LiDAR origin: rays would start on the road at the rear axle."""
    if getattr(recording, "beams_from_base", False):
        raise RecordingError(
            f"{recording.name}: its clouds are in base_link itself, which does not say where their beams begin; "
            "give --lidar-origin X Y Z, the place of the LiDAR in base_link in metres"
        )


@contextmanager
def leave_out(problems: MutableMapping[str, str], name: str) -> Iterator[None]:
    """Run the reading of one input: whatever it raises becomes its line in `problems`, and the rest goes on.

    Readers, databases and decompressors raise nearly anything for a damaged file. Ctrl-C still stops.
    """
    try:
        yield
    except Exception as error:
        logger.debug("%s", name, exc_info=True)
        problems[name] = describe_error(error)


@dataclass(frozen=True)
class Annotations:
    """Labelled boxes of one key frame, in base_link at the key stamp.

    boxes: scores are 1; velocities are NaN where they are not known.
    instance: (M,) track names. lidar_points: (M,) int64 returns inside each box.
    """

    boxes: Boxes3D
    instance: tuple[str, ...]
    lidar_points: NDArray[np.int64]


@dataclass(frozen=True)
class OccupancyTruth:
    """Dense labels in Occ3D form, indexed [x, y, z].

    semantics: (X, Y, Z) uint8 class, 17 = free. mask_lidar, mask_camera: (X, Y, Z) bool.
    """

    semantics: NDArray[np.uint8]
    mask_lidar: NDArray[np.bool_]
    mask_camera: NDArray[np.bool_]
    grid: VoxelGrid


class Recording(Protocol):
    """One drive. Key frames are the stamps at which labels are made; sweeps are every LiDAR rotation.

    rig: cameras at their native size. lidar2ego: (4, 4).
    key_stamp_ns, sweep_stamp_ns: (K,), (S,) int64, increasing.
    """

    name: str
    rig: CameraRig
    lidar2ego: NDArray[np.float64]
    trajectory: Trajectory
    key_stamp_ns: NDArray[np.int64]
    sweep_stamp_ns: NDArray[np.int64]

    def sweep(self, index: int) -> Sweep:
        """Read one LiDAR rotation."""
        ...

    def frame_set(self, key: int) -> FrameSet:
        """Read the encoded images of one key frame; each frame carries its own stamp and ego2global."""
        ...

    def annotations(self, key: int) -> Annotations | None:
        """Return the boxes of one key frame, or None where the recording has none."""
        ...

    def occupancy_truth(self, key: int) -> OccupancyTruth | None:
        """Return the dense labels of one key frame, or None where the recording has none."""
        ...
