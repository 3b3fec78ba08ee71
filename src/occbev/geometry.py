"""Rigid transforms, quaternions, projection and boxes as plain numpy functions without state.

A transform `a2b` is a (4, 4) float64 matrix for column vectors: `p_b = a2b @ p_a`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def make_transform(rotation: ArrayLike, translation: ArrayLike) -> Array:
    """Join a (3, 3) rotation and a (3,) translation into one (4, 4) transform."""
    a2b = np.eye(4)
    a2b[:3, :3] = rotation
    a2b[:3, 3] = translation
    return a2b


def invert_transform(a2b: ArrayLike) -> Array:
    """Return b2a of rigid (..., 4, 4) transforms, by transposing the rotation."""
    a2b = np.asarray(a2b, np.float64)
    b2a = np.zeros_like(a2b)
    rotation_t = np.swapaxes(a2b[..., :3, :3], -1, -2)
    b2a[..., :3, :3] = rotation_t
    b2a[..., :3, 3] = -(rotation_t @ a2b[..., :3, 3:])[..., 0]
    b2a[..., 3, 3] = 1.0
    return b2a


def transform_points(a2b: ArrayLike, points: ArrayLike) -> Array:
    """Move (..., 3) points from frame a to frame b with one (4, 4) transform."""
    a2b = np.asarray(a2b, np.float64)
    return np.asarray(points, np.float64) @ a2b[:3, :3].T + a2b[:3, 3]


def rotation_from_wxyz(quaternion: ArrayLike) -> Array:
    """Turn (..., 4) quaternions in nuScenes order into (..., 3, 3) rotations.

    Raises:
        ValueError: a quaternion is not finite or its norm is not 1 within 1e-2.
    """
    q = np.asarray(quaternion, np.float64)
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    if not np.all(np.isfinite(q)) or np.any(np.abs(norm - 1.0) > 1e-2):
        raise ValueError(f"not a unit quaternion (w, x, y, z): {q.tolist()}, norm {norm.ravel().tolist()}")
    w, x, y, z = np.moveaxis(q / norm, -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([entry for row in rows for entry in row], -1).reshape(*w.shape, 3, 3)


def rotation_from_xyzw(quaternion: ArrayLike) -> Array:
    """Turn (..., 4) quaternions in ROS order into (..., 3, 3) rotations; raises as `rotation_from_wxyz`."""
    return rotation_from_wxyz(np.roll(np.asarray(quaternion, np.float64), 1, axis=-1))


def pose_from_xyzw(position: tuple[float, float, float], quaternion: tuple[float, float, float, float]) -> Array:
    """Make one (4, 4) pose of a position and a quaternion in ROS order, in plain floats.

    For messages that come a hundred times a second: numpy takes twenty times as long for a single one.
    Raises:
        ValueError: a number is not finite, or the quaternion's norm is not 1 within 1e-2.
    """
    norm = math.hypot(*quaternion)
    if not abs(norm - 1) <= 1e-2:
        raise ValueError(f"not a unit quaternion (x, y, z, w): {list(quaternion)}, norm {norm}")
    if not all(map(math.isfinite, position)):
        raise ValueError(f"position {position} is not finite")
    x, y, z, w = (value / norm for value in quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), position[0]],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x), position[1]],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y), position[2]],
            [0.0, 0.0, 0.0, 1.0],
        ]
    )


def wxyz_from_rotation(rotation: ArrayLike) -> Array:
    """Turn (..., 3, 3) rotations into unit quaternions (..., 4) w, x, y, z with w >= 0."""
    r = np.asarray(rotation, np.float64)
    outer = (_OUTER_OF_NONE + r.reshape(-1, 9) @ _OUTER_OF_ROTATION).reshape(-1, 4, 4)
    # The row of its largest diagonal entry is the stable branch (Shepperd 1978).
    q = outer[np.arange(len(outer)), np.einsum("nii->ni", outer).argmax(-1)]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(q[:, :1] < 0, -q, q).reshape(*r.shape[:-2], 4)


def _outer_of(r: Array) -> Array:
    """Return four times the outer product q q^T of the quaternion of one rotation (3, 3), which is linear in it."""
    wx, wy, wz = r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]
    xy, xz, yz = r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1]
    x, y, z = np.diag(r)
    return np.array(
        [
            [1 + x + y + z, wx, wy, wz],
            [wx, 1 + x - y - z, xy, xz],
            [wy, xy, 1 - x + y - z, yz],
            [wz, xz, yz, 1 - x - y + z],
        ]
    )


_OUTER_OF_NONE = _outer_of(np.zeros((3, 3))).ravel()
_OUTER_OF_ROTATION = np.stack([_outer_of(unit.reshape(3, 3)).ravel() - _OUTER_OF_NONE for unit in np.eye(9)])
"""The same as a matrix (9, 16) and an offset (16,), for many rotations at once."""


def xyzw_from_rotation(rotation: ArrayLike) -> Array:
    """Turn (..., 3, 3) rotations into unit quaternions in ROS order with w >= 0."""
    return np.roll(wxyz_from_rotation(rotation), -1, axis=-1)


def rotation_from_yaw(yaw: float) -> Array:
    """Rotate about +z by `yaw`, counter-clockwise seen from above."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rotation_from_rpy(roll: float, pitch: float, yaw: float) -> Array:
    """Compose Rz(yaw) Ry(pitch) Rx(roll), the fixed-axis convention of ROS (REP-103)."""
    cr, sr, cp, sp = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch)
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return rotation_from_yaw(yaw) @ about_y @ about_x


def yaw_from_rotation(rotation: ArrayLike) -> float:
    """Return the heading of the rotated +x axis about +z, in (-pi, pi]."""
    r = np.asarray(rotation, np.float64)
    return float(np.arctan2(r[1, 0], r[0, 0]))


def wrap_angle(angle: ArrayLike) -> Array:
    """Wrap angles into (-pi, pi]."""
    return np.pi - np.mod(np.pi - np.asarray(angle, np.float64), 2 * np.pi)


def frame2ego(frame: str) -> Array:
    """Return where a grid's frame is on the vehicle: `base_link`, or `lidar` for published weights."""
    if frame == "base_link":
        return np.eye(4)
    if frame == "lidar":
        return NUSCENES_LIDAR.copy()
    raise ValueError(f"grid frame {frame!r}: must be base_link or lidar")


def project_points(points_cam: ArrayLike, intrinsic: ArrayLike) -> tuple[Array, Array]:
    """Project (..., 3) points of a camera frame through a pinhole.

    Returns: pixels (..., 2) as (u right, v down) and depth (...). Pixels of points with depth <= 0
        are finite but meaningless: mask by depth.
    """
    points_cam = np.asarray(points_cam, np.float64)
    depth = points_cam[..., 2]
    homogeneous = points_cam @ np.asarray(intrinsic, np.float64).T
    safe = np.where(np.abs(depth) < 1e-9, 1e-9, depth)
    return homogeneous[..., :2] / safe[..., None], depth


def box_corners(boxes: ArrayLike) -> Array:
    """Return the (M, 8, 3) corners of (M, >= 7) boxes x, y, z (centre), l, w, h, yaw.

    Corners 0-3 are the front face (+x of the box), 4-7 the rear, each in the order
    left-top, right-top, right-bottom, left-bottom.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, np.shape(boxes)[-1] if np.size(boxes) else 7)
    signs = (
        np.array([[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1], [-1, 1, 1], [-1, -1, 1], [-1, -1, -1], [-1, 1, -1]])
        / 2
    )
    local = signs[None] * boxes[:, None, 3:6]
    c, s = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    x = c * local[..., 0] - s * local[..., 1]
    y = s * local[..., 0] + c * local[..., 1]
    return np.stack([x, y, local[..., 2]], -1) + boxes[:, None, :3]


def points_in_box(points: ArrayLike, box: ArrayLike) -> NDArray[np.bool_]:
    """Return which of (M, 3) points lie in one box x, y, z, l, w, h, yaw, bounds inclusive."""
    box = np.asarray(box, np.float64)
    local = (np.asarray(points, np.float64) - box[:3]) @ rotation_from_yaw(box[6])
    return np.all(np.abs(local) <= box[3:6] / 2, axis=-1)


NUSCENES_LIDAR = make_transform(rotation_from_yaw(-np.pi / 2), (0.94, 0.0, 1.84))
"""lidar2ego of the vehicle that the published weights know: x right, y forward, on the roof."""
