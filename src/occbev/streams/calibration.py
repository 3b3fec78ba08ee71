"""Calibration that comes in pieces: CameraInfo, TF, parameters or a rig file become one CameraRig."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import make_transform, rotation_from_rpy
from occbev.messages.readers import MessageError, calibration_key, camera_from_info
from occbev.messages.tf import Buffer, TransformException, clean_frame
from occbev.rig import Camera, CameraRig, RigError
from occbev.streams.parameters import PerceptionParameters

NEAR, LOW, HIGH = 5.0, 1.0, 6.0
"""Metres from a camera, below and above `base_link`, within which grids have voxels to see."""


MAX_LAG_NS, REACH_NS = 100_000_000, 1_000_000_000
"""A camera that moves may be placed where it was so long before its exposure; one this far behind is not waited for."""


FLIP_S = 10.0
"""How long a calibration that changed back is named."""


@dataclass(frozen=True)
class Calibrated:
    """The rig as far as it is known.

    rig: one camera per name in the parameters' order; those in `problems` are fallback cameras that must be masked.
    problems: camera -> what is missing and what would help.
    """

    rig: CameraRig
    problems: dict[str, str]


class Calibration:
    """Collects calibration and answers with the rig that is valid now; a change of any piece changes the rig."""

    def __init__(self, parameters: PerceptionParameters, buffer: Buffer) -> None:
        self._parameters, self._buffer = parameters, buffer
        self._infos: dict[str, Any] = {}
        self._info_keys: dict[str, tuple[Any, ...]] = {}
        self._former_keys: dict[str, tuple[Any, ...] | None] = {}
        self._flipped: dict[str, float] = {}
        self._image_frames: dict[str, str] = {}
        self._built: dict[str, tuple[Any, ...]] = {}
        self._cameras: dict[str, Camera] = {}
        self._exposures: dict[str, int] = {}
        self._placed: dict[str, tuple[str, int, NDArray[np.float64]]] = {}
        self._fixed = self._load_rig(parameters.rig) if parameters.rig else None
        self._last: Calibrated | None = None
        self._viewed: dict[str, tuple[Camera, bool]] = {}

    def add_info(self, camera: str, message: Any) -> None:
        """Take a CameraInfo; the newest always holds."""
        key, held = calibration_key(message), self._info_keys.get(camera)
        if held != key:
            if key == self._former_keys.get(camera):
                self._flipped[camera] = time.monotonic()
            self._former_keys[camera] = held
            self._info_keys[camera], self._infos[camera] = key, message

    def note_image_frame(self, camera: str, frame: str) -> None:
        """Remember the frame that a camera's images name, for calibrations that name none."""
        self._image_frames[camera] = frame

    def now(self, stamps_ns: Mapping[str, int] | None = None) -> Calibrated:
        """Return the rig that the pieces so far make.

        stamps_ns: camera -> exposure at which a camera that moves in the base frame is placed; else where it was last.
        """
        if self._fixed is not None:
            return Calibrated(self._fixed, {})
        cameras, problems = [], {}
        for name in self._parameters.names:
            try:
                cameras.append(self._camera(name, (stamps_ns or {}).get(name)))
            except (MessageError, RigError, TransformException) as error:
                problems[name] = str(error)
                cameras.append(fallback_camera(name))
        if self._last is None or self._last.problems != problems or not _same(self._last.rig.cameras, cameras):
            self._last = Calibrated(CameraRig(tuple(cameras)), problems)
        return self._last

    def camera(self, name: str) -> Camera | None:
        """Return one camera, or None while its calibration is incomplete."""
        try:
            return self._fixed[name] if self._fixed is not None else self._camera(name)
        except (MessageError, RigError, TransformException):
            return None

    def wait_until(self, stamps_ns: Mapping[str, int], timeout_s: float) -> None:
        """Wait until the transforms of cameras that move in the base frame have reached their exposures, if they may soon."""
        base, deadline = self._parameters.base_frame, time.monotonic() + timeout_s
        for name, stamp_ns in stamps_ns.items():
            lag_ns = self._lag_ns(name, stamp_ns)
            if 0 < lag_ns <= REACH_NS and self._buffer.moves(base, self._frame(name)):
                left_ns = max(0, int((deadline - time.monotonic()) * 1e9))
                self._buffer.can_transform(base, self._frame(name), stamp_ns, left_ns)

    def describe_lag(self, name: str) -> str:
        """Say how far the transform of a camera that moves ends before its last image, "" if it does not."""
        lag_ns, frame = self._lag_ns(name, self._exposures.get(name, 0)), self._frame(name)
        if lag_ns <= MAX_LAG_NS or not self._buffer.moves(self._parameters.base_frame, frame):
            return ""
        return f"frame {frame!r} moves, but its newest transform is {lag_ns / 1e9:.2f} s older than the image"

    def describe_flips(self, name: str) -> str:
        """Say that a camera's calibration lately changed back to the one before, "" if it did not."""
        if time.monotonic() - self._flipped.get(name, -FLIP_S) >= FLIP_S:
            return ""
        topic = self._parameters.info_topic(name)
        return f"its CameraInfo changes back and forth: do two publishers send {topic}?"

    def describe_frames(self, name: str) -> str:
        """Say where a camera's images and its CameraInfo name different frames, "" if they agree."""
        if self._fixed is not None or self._parameters.cameras[name].frame_id:
            return ""
        info, image = self._infos.get(name), self._image_frames.get(name, "")
        frame = "" if info is None else str(info.header.frame_id)
        if not image or not frame or clean_frame(image) == clean_frame(frame):
            return ""
        return (
            f"its images name the frame {image!r}, its CameraInfo {frame!r}, which is used: set cameras.{name}.frame_id"
        )

    def describe_view(self, name: str) -> str:
        """Say where a camera looks past every voxel, as one in the body frame does, "" where it does not."""
        camera = self.camera(name)
        if camera is None or self._reaches_the_road(camera):
            return ""
        frame = self._parameters.cameras[name].frame_id or (
            info.header.frame_id if (info := self._infos.get(name)) else ""
        )
        source = f"is {frame!r} the optical frame?" if frame else "is its extrinsic that of the optical frame?"
        return f"its rays meet no voxel beyond {NEAR:g} m: it looks at the sky or at the ground; {source}"

    def _reaches_the_road(self, camera: Camera) -> bool:
        """As the function of this name says; a camera is looked at once."""
        known = self._viewed.get(camera.name)
        if known is None or known[0] is not camera:
            known = self._viewed[camera.name] = camera, _reaches_the_road(camera)
        return known[1]

    def _camera(self, name: str, stamp_ns: int | None = None) -> Camera:
        info = self._infos.get(name)
        if info is None:
            raise MessageError(f"no CameraInfo on {self._parameters.info_topic(name)}: publish it, or set `rig`")
        cam2ego = self._cam2ego(name, stamp_ns)
        key = (self._info_keys[name], cam2ego.tobytes())
        if self._built.get(name) != key:
            rectified = self._parameters.cameras[name].is_rectified()
            self._cameras[name] = camera_from_info(name, info, cam2ego, rectified)
            self._built[name] = key
        return self._cameras[name]

    def _frame(self, name: str) -> str:
        """Return the optical frame of a camera, "" while nothing names it."""
        info = self._infos.get(name)
        named = "" if info is None else str(info.header.frame_id)
        return clean_frame(self._parameters.cameras[name].frame_id or named or self._image_frames.get(name, ""))

    def _lag_ns(self, name: str, stamp_ns: int) -> int:
        """How much older than a stamp the newest moving transform of a camera is; 0 where none leads to it."""
        frame = self._frame(name)
        if self._fixed is not None or self._known_place(name, frame) is not None:
            return 0
        newest_ns = self._buffer.latest_ns(self._parameters.base_frame, frame)
        return stamp_ns - newest_ns if newest_ns else 0

    def _known_place(self, name: str, frame: str) -> NDArray[np.float64] | None:
        """Return where a camera is that only static transforms place, while they stay as they were."""
        known = self._placed.get(name)
        return known[2] if known is not None and known[:2] == (frame, self._buffer.static_version) else None

    def _cam2ego(self, name: str, stamp_ns: int | None) -> NDArray[np.float64]:
        own, frame, base = self._parameters.cameras[name], self._frame(name), self._parameters.base_frame
        if not own.extrinsic and (not frame or frame == base):
            raise MessageError(
                f"its messages name the frame {frame!r}, not an optical frame: set cameras.{name}.frame_id or .extrinsic"
            )
        known = self._known_place(name, frame)
        if known is not None:
            return known
        try:
            version = self._buffer.static_version
            if stamp_ns is None:
                cam2ego = self._buffer.lookup_matrix(base, frame, 0)
            else:
                cam2ego, self._exposures[name] = self._buffer.lookup_nearest(base, frame, stamp_ns), stamp_ns
            if self._buffer.is_static(base, frame):
                self._placed[name] = (frame, version, cam2ego)
            return cam2ego
        except TransformException as error:
            if own.extrinsic:
                return own.cam2ego()
            topics = f"{self._parameters.tf_static_topic} or {self._parameters.tf_topic}"
            raise TransformException(
                f"no transform {frame!r} -> {base!r} on {topics}: {error}; or set cameras.{name}.extrinsic"
            ) from error

    def _load_rig(self, path: str) -> CameraRig:
        return CameraRig.load(Path(path)).reorder(self._parameters.names)


def _reaches_the_road(camera: Camera) -> bool:
    """Whether any of a camera's rays is `NEAR` metres away while it is between the ground and `HIGH` metres."""
    pixels = np.stack(np.meshgrid(np.linspace(0, camera.width, 7), np.linspace(0, camera.height, 7)), -1).reshape(-1, 2)
    rays = camera.lens.unproject(pixels) @ camera.cam2ego[:3, :3].T
    x, y, z = rays[np.isfinite(rays).all(axis=1)].T
    height = camera.cam2ego[2, 3] + NEAR * z / np.maximum(np.hypot(x, y), 1e-6)
    return bool(np.any((height > -LOW) & (height < HIGH)))


def fallback_camera(name: str) -> Camera:
    """Make a camera for a slot without calibration, so that the network keeps its number of inputs; it must be masked."""
    cam2ego = make_transform(rotation_from_rpy(-np.pi / 2, 0.0, -np.pi / 2), (0.0, 0.0, 1.5))
    intrinsic = np.array([[560.0, 0, 352], [0, 560, 198], [0, 0, 1]])
    return Camera(name, 704, 396, intrinsic, cam2ego)


def _same(before: tuple[Camera, ...], after: list[Camera]) -> bool:
    return len(before) == len(after) and all(
        a is b
        or (
            a.name == b.name
            and np.array_equal(a.intrinsic, b.intrinsic)
            and np.array_equal(a.cam2ego, b.cam2ego)
            and (a.width, a.height, a.distortion) == (b.width, b.height, b.distortion)
        )
        for a, b in zip(before, after, strict=True)
    )
