"""The small frozen dataclasses that are passed between stages, from camera frame to boxes and voxels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from occbev.ego_signals import EgoSignals
from occbev.grid import VoxelGrid, volume_from_xyz


class RecordingError(ValueError):
    """A recording that cannot be used, saying which file, topic or table and what would be right."""


@dataclass(frozen=True)
class CameraFrame:
    """One exposure of one camera.

    image: (H, W, 3) uint8 RGB, or the encoded bytes (JPEG, PNG) of it.
    ego2global: (4, 4) at this frame's own stamp, or None where the pose is not known. Of a recorded camera that moves on
        the vehicle it is chosen so that the rig's cam2ego leads to where the camera was.
    decode_ns: how long decoding took, 0 for bytes.
    """

    camera: str
    stamp_ns: int
    image: NDArray[np.uint8] | bytes
    ego2global: NDArray[np.float64] | None = None
    decode_ns: int = 0


@dataclass(frozen=True)
class FrameSet:
    """Frames of one instant, one slot per camera of the rig, in the rig's order.

    stamp_ns: the key time. frames: name -> frame, or None where the camera is missing.
    missing: name -> reason, for exactly the cameras whose slot is None.
    signals: what the vehicle says of its motion at the key time, None where nothing does.
    """

    stamp_ns: int
    frames: Mapping[str, CameraFrame | None]
    missing: Mapping[str, str] = field(default_factory=dict)
    signals: EgoSignals | None = None

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras that are present."""
        return tuple(name for name, frame in self.frames.items() if frame is not None)

    @property
    def spread_ms(self) -> float:
        """Time between the first and the last exposure of the set."""
        stamps = [frame.stamp_ns for frame in self.frames.values() if frame is not None]
        return (max(stamps) - min(stamps)) / 1e6 if stamps else 0.0


@dataclass(frozen=True)
class Sweep:
    """One LiDAR rotation.

    points: (M, 3) float32 in the LiDAR frame. intensity: (M,) float32.
    time_offset: (M,) float32 seconds from `stamp_ns` at which each point was measured, or None
    where the points are already compensated to `stamp_ns`.
    lidar2ego: (4, 4). pose_source: where ego poses come from, such as "odom".
    origins, sensor: of a cloud that several sensors measured, where each stands (K, 3) in the LiDAR frame and which
    of them measured each point (M,); None where all beams begin at the frame's origin.
    """

    points: NDArray[np.float32]
    stamp_ns: int
    lidar2ego: NDArray[np.float64]
    intensity: NDArray[np.float32] | None = None
    time_offset: NDArray[np.float32] | None = None
    pose_source: str = "odom"
    origins: NDArray[np.float64] | None = None
    sensor: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Boxes3D:
    """Boxes in base_link at the key time.

    box: (M, 9) float32: x, y, z (centre), l, w, h, yaw in (-pi, pi], vx, vy.
    label: (M,) int64 index into DETECTION_CLASSES. score: (M,) float32 in [0, 1].
    cameras: the cameras they were made from.
    track: (M,) int64, the same for one object in all sets; None where boxes are not tracked.
    """

    box: NDArray[np.float32]
    label: NDArray[np.int64]
    score: NDArray[np.float32]
    cameras: tuple[str, ...] = ()
    track: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.box)

    def __getitem__(self, index: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Boxes3D:
        track = None if self.track is None else self.track[index]
        return Boxes3D(self.box[index], self.label[index], self.score[index], self.cameras, track)

    @classmethod
    def empty(cls, cameras: tuple[str, ...] = ()) -> Boxes3D:
        """No boxes."""
        return cls(np.zeros((0, 9), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), cameras)


@dataclass(frozen=True)
class VoxelEvidence:
    """A network's predictions of obstacles and ground for each voxel, in the order of its outputs.

    occupied: (S, S, Z, Y / S, X / S) float32, P(occupied) of the S x S voxels of a cell, but P(occupied and not ground)
    where `not_ground` is None; the first axis is y. ground: (Z, Y / S, X / S) float32, weight of ground; None of a
    network that knows no ground classes. not_ground: (Z, Y / S, X / S) float32, 0 for cells that are of ground, else 1.
    """

    occupied: NDArray[np.float32]
    ground: NDArray[np.float32] | None = None
    not_ground: NDArray[np.float32] | None = None

    @property
    def obstacle(self) -> NDArray[np.float32]:
        """P(occupied and not ground), as `occupied`."""
        return self.occupied if self.not_ground is None else self.occupied * self.not_ground

    def obstacle_in(self, layer: int) -> NDArray[np.float32]:
        """P(occupied and not ground) of one layer, contiguous (S, S, Y / S, X / S)."""
        occupied = self.occupied[:, :, layer]
        return np.ascontiguousarray(occupied) if self.not_ground is None else occupied * self.not_ground[layer]


BLOCKED_CELL, FREE_CELL, UNKNOWN_CELL = 100, 0, -1
"""Values of a ground grid, those of nav_msgs/OccupancyGrid."""


@dataclass(frozen=True)
class GroundGrid:
    """Which cells of the ground are blocked, free or unknown, in base_link at the key time; all (Y, X).

    cells: int8, 100 blocked, 0 free, -1 unknown. probability: float32, of an obstacle.
    ground: layer of the voxel grid in which the local ground lies.
    """

    cells: NDArray[np.int8]
    probability: NDArray[np.float32]
    ground: NDArray[np.intp]
    grid: VoxelGrid

    @classmethod
    def unknown(cls, grid: VoxelGrid) -> GroundGrid:
        """Nothing is known of any cell."""
        shape = grid.shape[1::-1]
        cells = np.full(shape, UNKNOWN_CELL, np.int8)
        return cls(cells, np.zeros(shape, np.float32), np.zeros(shape, np.intp), grid)


@dataclass(frozen=True)
class Occupancy:
    """A labelled voxel volume in base_link at the key time, indexed [x, y, z].

    has_classes: False of networks that know what is occupied but not by what; occupied voxels are "others" then.

    label: (X, Y, Z) uint8, index into OCCUPANCY_CLASSES (17 = free).
    confidence: (X, Y, Z) float32 in [0, 1], of the label.
    state: (X, Y, Z) uint8: 0 unknown, 1 free, 2 occupied.
    evidence: what ground grids are made of; None where it is not known.
    """

    label: NDArray[np.uint8]
    confidence: NDArray[np.float32]
    state: NDArray[np.uint8]
    grid: VoxelGrid
    cameras: tuple[str, ...] = ()
    has_classes: bool = True
    evidence: VoxelEvidence | None = None

    def look_up(
        self, layer: NDArray[np.intp], column: NDArray[np.intp]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return label and confidence of voxels (M,); layer: along z. column: flat, of (Y, X)."""
        place = layer * (self.grid.shape[0] * self.grid.shape[1]) + column
        label, confidence = (volume_from_xyz(volume).reshape(-1) for volume in (self.label, self.confidence))
        return label.take(place), confidence.take(place)


@dataclass(frozen=True)
class Timings:
    """How long each stage took: stage name -> nanoseconds."""

    stage_ns: Mapping[str, int]

    @property
    def total_ms(self) -> float:
        """Sum over the stages."""
        return sum(self.stage_ns.values()) / 1e6


@dataclass(frozen=True)
class Perception:
    """The pipeline's result for one frame set."""

    stamp_ns: int
    boxes: Boxes3D
    occupancy: Occupancy
    timings: Timings
    missing: Mapping[str, str] = field(default_factory=dict)
    ground: GroundGrid | None = None
    """None if the network predicts no voxels."""
