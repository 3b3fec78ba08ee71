"""The camera rig: what each camera sees and where it sits on the vehicle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from occbev.files import YamlError, read_yaml
from occbev.geometry import (
    invert_transform,
    make_transform,
    rotation_from_xyzw,
    transform_points,
    xyzw_from_rotation,
)
from occbev.lens import Lens, LensError

MAX_SIDE = 65_535
"""Most pixels along a side of an image: what a JPEG can have."""

DIRECTIONS = ("front", "front left", "left", "back left", "back", "back right", "right", "front right")
"""Eighths of a turn to the left."""

LEAST_UPRIGHT = 0.5
"""Sine of the least angle between an optical axis and the vertical at which an image has an upright position."""

HEADER = """\
# A camera rig, in the order in which the network gets the cameras. Each has
#   name                    as in the topics file, or in the node's cameras.names
#   width, height           pixels for which the calibration holds; images of the same aspect may be larger or smaller
#   intrinsic               3x3 pinhole matrix in these pixels, u right and v down; pixel i covers [i, i + 1)
#   distortion_model        none, plumb_bob, rational_polynomial or equidistant (a fisheye, Kannala-Brandt), as in CameraInfo
#   distortion              its coefficients in CameraInfo's order: 4 or 5, 8, 4; empty for none
#   cam2ego                 pose of the optical frame (x right, y down, z forward) in base_link (x forward, y left, z up):
#     translation           x, y, z in metres
#     rotation_xyzw         unit quaternion, as in /tf
"""
"""What `CameraRig.save` writes above the cameras."""


class RigError(ValueError):
    """A rig or calibration that cannot be used, saying which camera and which value."""


@dataclass(frozen=True)
class Camera:
    """One calibrated camera.

    intrinsic: (3, 3) pinhole matrix in pixels of a width x height image (u right, v down).
    distortion: coefficients of `distortion_model`, in ROS CameraInfo order; empty for "none".
    cam2ego: (4, 4), optical frame (x right, y down, z forward) to base_link.
    """

    name: str
    width: int
    height: int
    intrinsic: NDArray[np.float64]
    cam2ego: NDArray[np.float64]
    distortion_model: str = "none"
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "intrinsic", np.asarray(self.intrinsic, np.float64))
        object.__setattr__(self, "cam2ego", np.asarray(self.cam2ego, np.float64))
        object.__setattr__(self, "distortion", tuple(float(v) for v in self.distortion))
        square = self.intrinsic.shape == (3, 3) and bool(np.all(np.isfinite(self.intrinsic)))
        if not square or self.intrinsic[0, 0] <= 0 or self.intrinsic[1, 1] <= 0:
            raise RigError(
                f"camera {self.name}: intrinsic must be a finite 3x3 with positive focal lengths, "
                f"got {self.intrinsic.tolist()}"
            )
        if self.cam2ego.shape != (4, 4) or not np.all(np.isfinite(self.cam2ego)):
            raise RigError(f"camera {self.name}: cam2ego must be a finite 4x4 transform, got {self.cam2ego.tolist()}")
        if not _is_rotation(self.cam2ego[:3, :3]):
            raise RigError(f"camera {self.name}: the rotation of cam2ego is not orthonormal")
        if not (0 < self.width <= MAX_SIDE and 0 < self.height <= MAX_SIDE):
            raise RigError(f"camera {self.name}: size {self.width}x{self.height}; each must be 1 to {MAX_SIDE}")
        try:
            _ = self.lens
        except LensError as error:
            raise RigError(f"camera {self.name}: {error}") from error

    @cached_property
    def lens(self) -> Lens:
        """How the camera maps directions of its own frame to pixels and back."""
        return Lens(self.intrinsic, self.distortion_model, self.distortion)

    @property
    def ego2cam(self) -> NDArray[np.float64]:
        """base_link to the optical frame, (4, 4)."""
        return invert_transform(self.cam2ego)

    def project(self, points: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Project (M, 3) points of base_link through the lens.

        Returns: pixels (M, 2), how far away the points are (M,), and which are farther than 0.1 m and inside the image.
            How far away is the depth, or for a fisheye, which sees beside and behind its image plane, the distance.
            Pixels of points that the lens cannot see are NaN.
        """
        points_cam = transform_points(self.ego2cam, points).reshape(-1, 3)
        pixels, seen = self.lens.project(points_cam)
        away = np.linalg.norm(points_cam, axis=1) if self.lens.is_fisheye else points_cam[:, 2]
        inside = seen & (away > 0.1) & np.all((pixels >= 0) & (pixels < (self.width, self.height)), axis=-1)
        return pixels, away, inside

    def resize(self, scale_x: float, scale_y: float, crop: tuple[float, float], size: tuple[int, int]) -> Camera:
        """Return the camera of an image scaled, then cropped at (x0, y0) to `size` = (width, height).

        Pixel i of the source covers [i, i + 1), so that scaling keeps image borders in place.
        """
        intrinsic = np.diag([scale_x, scale_y, 1.0]) @ self.intrinsic
        intrinsic[0, 2] -= crop[0]
        intrinsic[1, 2] -= crop[1]
        return replace(self, intrinsic=intrinsic, width=size[0], height=size[1])

    @property
    def quarter_turns(self) -> int:
        """Quarter turns clockwise, 0 to 3, after which an image stands upright; 0 where the camera looks up or down."""
        x, y, _ = self.cam2ego[2, :3]  # upwards in the optical frame
        if np.hypot(x, y) < LEAST_UPRIGHT or not self.lens.can_turn:
            return 0
        return round(float(np.arctan2(-x, -y)) / (np.pi / 2)) % 4

    def turn(self, quarters: int) -> Camera:
        """Return the camera of the image turned clockwise by so many quarters."""
        if not quarters:
            return self
        lens, cam2ego = self.lens.turn(self.height), self.cam2ego.copy()
        cam2ego[:3, :2] = np.column_stack([-self.cam2ego[:3, 1], self.cam2ego[:3, 0]])
        quarter = Camera(self.name, self.height, self.width, lens.intrinsic, cam2ego, lens.model, lens.coefficients)
        return quarter.turn(quarters - 1)

    def fit_to(self, width: int, height: int) -> Camera:
        """Return the camera of the images it really delivers: scaled where they have its aspect, else as it is."""
        if (width, height) == (self.width, self.height) or abs(height - self.height * width / self.width) >= 1:
            return self
        return self.resize(width / self.width, height / self.height, (0, 0), (width, height))

    def _placed(self, cam2ego: NDArray[np.float64]) -> Camera:
        """Return the camera at another pose, a checked one: nothing else is checked or made anew."""
        moved = object.__new__(Camera)
        moved.__dict__.update(self.__dict__, cam2ego=cam2ego)
        return moved

    def as_record(self) -> dict[str, Any]:
        """The camera as plain values, for YAML and JSON."""
        return {
            "name": self.name,
            "width": self.width,
            "height": self.height,
            "intrinsic": self.intrinsic.tolist(),
            "distortion_model": self.distortion_model,
            "distortion": list(self.distortion),
            "cam2ego": {
                "translation": self.cam2ego[:3, 3].tolist(),
                "rotation_xyzw": xyzw_from_rotation(self.cam2ego[:3, :3]).tolist(),
            },
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Camera:
        """Read `as_record` back; raises RigError naming the camera and what is missing or no number."""
        if not isinstance(record, dict):
            raise RigError(f"a camera must be keys and values, got {str(record)[:80]!r}")
        try:
            pose = record["cam2ego"]
            cam2ego = make_transform(rotation_from_xyzw(pose["rotation_xyzw"]), pose["translation"])
            return cls(
                str(record["name"]),
                int(record["width"]),
                int(record["height"]),
                record["intrinsic"],
                cam2ego,
                record.get("distortion_model", "none"),
                tuple(record.get("distortion", ())),
            )
        except KeyError as error:
            raise RigError(f"camera {record.get('name', '?')}: key {error} is missing") from error
        except RigError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise RigError(f"camera {record.get('name', '?')}: {error}") from error


def viewing_direction(camera: Camera) -> str:
    """Return where a camera looks as text: "left, level". The text of an unusual view, such as "up", ends with a question."""
    right, _, ahead = camera.cam2ego[:3, :3].T
    height = float(np.rad2deg(np.arcsin(np.clip(ahead[2], -1, 1))))
    if height > 60:
        return "up: is `frame_id` the optical frame?"
    if height < -75:
        return "down: is `frame_id` the optical frame?"
    sector = round(float(np.arctan2(ahead[1], ahead[0])) / (np.pi / 4)) % len(DIRECTIONS)
    tilt = "level" if abs(height) < 10 else f"{abs(height):.0f} degrees {'up' if height > 0 else 'down'}"
    # The image's right lies level in a camera that stands upright; its down then points down, too.
    roll = float(np.rad2deg(np.arctan2(-right[2], -camera.cam2ego[2, 1])))
    if abs(roll) > 45:
        return f"{DIRECTIONS[sector]}, {tilt}, rolled by {abs(roll):.0f} degrees: is `frame_id` the optical frame?"
    return f"{DIRECTIONS[sector]}, {tilt}"


def _is_rotation(rotations: NDArray[np.float64]) -> bool:
    """Whether matrices (..., 3, 3) are orthonormal; one that is not finite is not."""
    return bool(np.abs(rotations @ np.swapaxes(rotations, -1, -2) - np.eye(3)).max() <= 1e-3)


@dataclass(frozen=True)
class CameraRig:
    """The cameras in the model's order."""

    cameras: tuple[Camera, ...] = field(compare=False)
    hash: str = field(init=False)
    """Sixteen hex digits over every calibration value: the cache key of geometry tables."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        names = self.names
        if not names or len(set(names)) != len(names):
            raise RigError(f"a rig needs cameras with different names, got {names}")
        digest = hashlib.sha256()
        for camera in self.cameras:
            digest.update(f"{camera.name} {camera.width} {camera.height} {camera.distortion_model}".encode())
            digest.update(camera.intrinsic.tobytes() + camera.cam2ego.tobytes() + np.array(camera.distortion).tobytes())
        object.__setattr__(self, "hash", digest.hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.cameras)

    def __getitem__(self, name: str) -> Camera:
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise RigError(f"no camera {name!r} in this rig; it has {self.names}")

    @property
    def names(self) -> tuple[str, ...]:
        """Camera names in the model's order."""
        return tuple(camera.name for camera in self.cameras)

    @property
    def intrinsics(self) -> NDArray[np.float64]:
        """Intrinsics of the cameras, (N, 3, 3)."""
        return np.stack([camera.intrinsic for camera in self.cameras])

    @property
    def lens_matrices(self) -> NDArray[np.float64]:
        """What the geometry of networks takes: `intrinsics`, or (N, 3, 18) where some lens is no pinhole."""
        if all(camera.lens.is_pinhole for camera in self.cameras):
            return self.intrinsics
        return np.stack([camera.lens.as_matrix() for camera in self.cameras])

    @property
    def cam2egos(self) -> NDArray[np.float64]:
        """Poses of the cameras, (N, 4, 4)."""
        return np.stack([camera.cam2ego for camera in self.cameras])

    def reorder(self, names: Sequence[str]) -> CameraRig:
        """Return the same cameras in another order, or a part of them."""
        return CameraRig(tuple(self[name] for name in names))

    def move_cameras(self, ego_at_capture2ego: Iterable[ArrayLike]) -> CameraRig:
        """Return the rig with each cam2ego carried into another ego frame (for capture times that differ).

        ego_at_capture2ego: one (4, 4) per camera: ego at that camera's exposure -> the key ego frame.
        """
        motions = [np.asarray(motion, np.float64) for motion in ego_at_capture2ego]
        if len(motions) != len(self) or any(motion.shape != (4, 4) for motion in motions):
            raise RigError(f"want a motion (4, 4) for each of {self.names}, got {len(motions)}")
        moved = np.stack(motions) @ self.cam2egos
        if not (np.isfinite(moved).all() and _is_rotation(moved[:, :3, :3])):
            raise RigError(f"motions of {self.names} are not all rigid and finite")
        return CameraRig(tuple(camera._placed(pose) for camera, pose in zip(self.cameras, moved, strict=True)))

    def as_text(self) -> str:
        """The rig as YAML, with a header that explains it."""
        records = {"cameras": [c.as_record() for c in self.cameras]}
        return HEADER + yaml.safe_dump(records, sort_keys=False, default_flow_style=None, width=110)

    def save(self, path: str | Path) -> None:
        """Write the rig as YAML."""
        Path(path).write_text(self.as_text())

    @classmethod
    def load(cls, path: str | Path) -> CameraRig:
        """Read a rig from YAML, as `HEADER` describes it; raises RigError naming the file."""
        try:
            record = read_yaml(Path(path))
            if not isinstance(record, dict) or not isinstance(record.get("cameras"), list):
                raise RigError("want the key cameras with a list of cameras")
            return cls(tuple(Camera.from_record(entry) for entry in record["cameras"]))
        except (OSError, RigError, YamlError) as error:
            raise RigError(f"{path}: {error}") from error
