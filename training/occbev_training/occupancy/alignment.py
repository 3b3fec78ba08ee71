"""Whether cameras and LiDAR agree: depth edges of the points must lie on edges of the pictures.

A calibration or clock that is off by half a degree or 30 ms moves them away. It is measure Q6.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from occbev.geometry import project_points, transform_points
from occbev.results import FrameSet
from occbev.rig import Camera
from occbev.trajectory import PoseError
from occbev_training.sources.deskew import deskew_rays
from occbev_training.sources.recording import Recording


def camera_alignment(recording: Recording, key: int, frames: FrameSet) -> float:
    """Q6: share of cameras where LiDAR depth edges meet image edges best as calibrated and stamped.

    Tried against a yaw error of 0.5 degrees and a time error of 30 ms either way. NaN where no
    camera shows enough depth edges. An error is only visible where the perturbation moves pixels,
    so a standing vehicle is tested for yaw alone.
    """
    verdicts = []
    for camera in recording.rig.cameras:
        frame = frames.frames.get(camera.name)
        if frame is None:
            continue
        scores = _edge_scores(recording, key, camera, frame.stamp_ns, _grey(frame.image))
        if scores is not None:
            verdicts.append(scores[0] >= max(scores[1:]))
    return float(np.mean(verdicts)) if verdicts else np.nan


def _grey(image: NDArray[np.uint8] | bytes) -> NDArray[np.float32]:
    """Return an image's blurred gradient magnitude, scaled to a mean of one."""
    if isinstance(image, bytes):
        grey = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE)
        if grey is None:
            raise ValueError("an encoded image cannot be decoded")
    else:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    grey = cv2.GaussianBlur(grey, (0, 0), max(0.7, grey.shape[1] / 800)).astype(np.float32)
    gradient = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    gradient = np.minimum(gradient, np.percentile(gradient, 97))
    return gradient / max(float(gradient.mean()), 1e-6)


def _edge_scores(
    recording: Recording, key: int, camera: Camera, stamp_ns: int, gradient: NDArray[np.float32]
) -> list[float] | None:
    """Mean gradient at depth edges: as calibrated first, then perturbed; None with too few edges."""
    stamps = recording.sweep_stamp_ns
    sweep = recording.sweep(int(np.argmin(np.abs(stamps - recording.key_stamp_ns[key]))))
    rays = deskew_rays(sweep, recording.trajectory, stamp_ns)
    points = transform_points(camera.ego2cam, rays.end[rays.hit])
    edges = points[_depth_edges(points, camera)]
    if len(edges) < 50:
        return None
    moves = [np.eye(4)]
    for angle in np.deg2rad((-0.5, 0.5)):
        turn = np.eye(4)
        turn[:3, :3] = cv2.Rodrigues(np.array([0.0, angle, 0.0]))[0]
        moves.append(turn)
    for shift_ns in (-30_000_000, 30_000_000):
        try:
            motion = recording.trajectory.relative(stamp_ns, stamp_ns + shift_ns)
        except PoseError:
            continue  # at the ends of a drive
        moves.append(camera.ego2cam @ motion @ camera.cam2ego)
    return [_mean_gradient(transform_points(move, edges), camera, gradient) for move in moves]


def _depth_edges(points: NDArray[np.float64], camera: Camera) -> NDArray[np.int64]:
    """Return the indices of points (camera frame) that stand well before a neighbour in the image."""
    pixels, depth = project_points(points, camera.intrinsic)
    size = (camera.width, camera.height)
    seen = np.flatnonzero((depth > 2) & np.all((pixels >= 0) & (pixels < size), axis=-1))
    if len(seen) < 10:
        return seen[:0]
    reach = 0.012 * camera.intrinsic[0, 0]
    _, neighbour = cKDTree(pixels[seen]).query(pixels[seen], k=5, distance_upper_bound=reach)
    behind = np.append(depth[seen], 0.0)[neighbour].max(axis=1)
    return seen[behind > 1.1 * depth[seen] + 1.0]


def _mean_gradient(points: NDArray[np.float64], camera: Camera, gradient: NDArray[np.float32]) -> float:
    pixels, depth = project_points(points, camera.intrinsic)
    cell = np.floor(pixels).astype(np.int64)
    height, width = gradient.shape
    inside = (depth > 1) & np.all((cell >= 0) & (cell < (width, height)), axis=-1)
    return float(gradient[cell[inside, 1], cell[inside, 0]].mean()) if inside.any() else 0.0
