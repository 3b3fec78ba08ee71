"""Calibration that comes in pieces: CameraInfo, TF, parameters or a rig file become one CameraRig."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import make_transform, rotation_from_rpy, rotation_from_xyzw
from occbev.messages.readers import MessageError, calibration_key, camera_from_info
from occbev.messages.tf import Buffer, TransformException
from occbev.rig import Camera, CameraRig, RigError
from occbev.streams.parameters import PerceptionParameters

NEAR, LOW, HIGH = 5.0, 1.0, 6.0
"""Metres from a camera, below and above `base_link`, within which grids have voxels to see."""


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
        self._image_frames: dict[str, str] = {}
        self._built: dict[str, tuple[Any, ...]] = {}
        self._cameras: dict[str, Camera] = {}
        self._placed: dict[str, tuple[str, int, NDArray[np.float64]]] = {}
        self._fixed = self._load_rig(parameters.rig) if parameters.rig else None
        self._last: Calibrated | None = None

    def add_info(self, camera: str, message: Any) -> None:
        """Take a CameraInfo; the newest always holds."""
        key = calibration_key(message)
        if self._info_keys.get(camera) != key:
            self._info_keys[camera], self._infos[camera] = key, message

    def note_image_frame(self, camera: str, frame: str) -> None:
        """Remember the frame that a camera's images name, for calibrations that name none."""
        self._image_frames[camera] = frame

    def now(self) -> Calibrated:
        """Return the rig that the pieces so far make."""
        if self._fixed is not None:
            return Calibrated(self._fixed, {})
        cameras, problems = [], {}
        for name in self._parameters.names:
            try:
                cameras.append(self._camera(name))
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

    def describe_frames(self, name: str) -> str:
        """Say where a camera's images and its CameraInfo name different frames, "" if they agree."""
        if self._fixed is not None or self._parameters.cameras[name].frame_id:
            return ""
        info, image = self._infos.get(name), self._image_frames.get(name, "")
        frame = "" if info is None else str(info.header.frame_id)
        if not image or not frame or image == frame:
            return ""
        return (
            f"its images name the frame {image!r}, its CameraInfo {frame!r}, which is used: set cameras.{name}.frame_id"
        )

    def describe_view(self, name: str) -> str:
        """Say where a camera looks past every voxel, as one in the body frame does, "" where it does not."""
        camera = self.camera(name)
        if camera is None or _reaches_the_road(camera):
            return ""
        frame = self._parameters.cameras[name].frame_id or (
            info.header.frame_id if (info := self._infos.get(name)) else ""
        )
        source = f"is {frame!r} the optical frame?" if frame else "is its extrinsic that of the optical frame?"
        return f"its rays meet no voxel beyond {NEAR:g} m: it looks at the sky or at the ground; {source}"

    def _camera(self, name: str) -> Camera:
        info = self._infos.get(name)
        if info is None:
            raise MessageError(f"no CameraInfo on {self._parameters.info_topic(name)}: publish it, or set `rig`")
        cam2ego = self._cam2ego(name, info)
        key = (self._info_keys[name], cam2ego.tobytes())
        if self._built.get(name) != key:
            rectified = self._parameters.cameras[name].is_rectified()
            self._cameras[name] = camera_from_info(name, info, cam2ego, rectified)
            self._built[name] = key
        return self._cameras[name]

    def _cam2ego(self, name: str, info: Any) -> NDArray[np.float64]:
        own = self._parameters.cameras[name]
        frame = own.frame_id or str(info.header.frame_id) or self._image_frames.get(name, "")
        base = self._parameters.base_frame
        if not own.extrinsic and (not frame or frame == base):
            raise MessageError(
                f"its messages name the frame {frame!r}, not an optical frame: set cameras.{name}.frame_id or .extrinsic"
            )
        known = self._placed.get(name)
        if known is not None and known[:2] == (frame, self._buffer.static_version):
            return known[2]
        try:
            version = self._buffer.static_version
            cam2ego = self._buffer.lookup_matrix(base, frame, 0)
            if self._buffer.is_static(base, frame):
                self._placed[name] = (frame, version, cam2ego)
            return cam2ego
        except TransformException as error:
            if own.extrinsic:
                return make_transform(rotation_from_xyzw(own.extrinsic[3:]), own.extrinsic[:3])
            raise TransformException(
                f"no transform {frame!r} -> {base!r} on /tf_static or /tf: {error}; or set cameras.{name}.extrinsic"
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
