"""What is really there: boxes of one instant, and every voxel's class with what cameras and LiDAR can see of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, OCCUPANCY_CLASSES
from occbev.geometry import invert_transform, points_in_box, rotation_from_yaw, transform_points
from occbev.grid import VoxelGrid
from occbev.results import Boxes3D
from occbev.rig import Camera
from occbev_training.simulator.mesh import Mesh, surface_samples
from occbev_training.simulator.raycast import F32
from occbev_training.simulator.world import Actor, World
from occbev_training.sources.recording import Annotations

_RANK = np.array(
    [
        OCCUPANCY_CLASSES.index(name)
        for name in (
            "terrain",
            "other_flat",
            "sidewalk",
            "driveable_surface",
            "vegetation",
            "manmade",
            "others",
            "barrier",
            "trailer",
            "truck",
            "bus",
            "construction_vehicle",
            "car",
            "motorcycle",
            "bicycle",
            "traffic_cone",
            "pedestrian",
        )
    ]
)
"""Classes from the one that gives way in a shared voxel to the one that always stays."""

_SPACING = 0.18

_TILE = 10.0
"""Side of the world tiles that static points are sorted by."""


def annotate(
    actors: Sequence[Actor],
    ego2world: NDArray[np.float64],
    time: float,
    points: NDArray[np.floating[Any]],
    prefix: str,
    reach: float = 60.0,
) -> Annotations:
    """Boxes of all actors within `reach` in the ego frame at `time`.

    points: (M, 3) returns of the key sweep in the ego frame, counted per box.
    """
    world2ego = invert_transform(ego2world)
    ego_yaw = np.arctan2(ego2world[1, 0], ego2world[0, 0])
    rows, labels, names = [], [], []
    for actor in actors:
        pose = actor.track.at(time)
        centre = transform_points(world2ego, pose[:3] + [0, 0, actor.shape.size[2] / 2])
        if np.hypot(centre[0], centre[1]) <= reach:
            yaw = np.pi - np.mod(np.pi - (pose[3] - ego_yaw), 2 * np.pi)
            velocity = world2ego[:3, :3] @ actor.track.velocity(time)
            rows.append([*centre, *actor.shape.size, yaw, *velocity[:2]])
            labels.append(actor.shape.label)
            names.append(f"{prefix}/{actor.name}")
    box = np.array(rows, np.float32).reshape(-1, 9)
    counts = np.array([int(points_in_box(points, row).sum()) for row in box], np.int64)
    boxes = Boxes3D(box, np.array(labels, np.int64), np.ones(len(box), np.float32))
    return Annotations(boxes, tuple(names), counts)


class Solids:
    """Dense points of everything in a world, ready to be binned at any time and pose."""

    def __init__(self, world: World) -> None:
        """Sample what stands once, near the route only, and each moving actor in its own frame."""
        near = _near_route(world.static, world.ego.pose[::50, :2], 66.0)
        points, label = surface_samples(near, _SPACING)
        tile = np.floor(points[:, :2] / _TILE).astype(np.int64)
        order = np.lexsort((_rank(label), tile[:, 1], tile[:, 0]))
        self._points, self._label, tile = points[order], label[order], tile[order]
        starts = np.flatnonzero(np.concatenate([[True], np.any(np.diff(tile, axis=0), axis=1)]))
        self._tiles, self._starts = tile[starts], np.append(starts, len(points))
        self._moving = [(actor, *surface_samples(actor.shape.mesh, _SPACING)) for actor in world.moving_actors]

    def semantics(self, grid: VoxelGrid, ego2world: NDArray[np.float64], time: float) -> NDArray[np.uint8]:
        """Label every voxel (X, Y, Z) of the grid; 17 where nothing is."""
        filled = np.full(grid.size, FREE, np.uint8)
        world2ego = invert_transform(ego2world).astype(np.float32)
        reach = float(np.hypot(*np.abs([grid.lo[:2], grid.hi[:2]]).max(0)))
        middles = transform_points(
            invert_transform(ego2world),
            np.insert((self._tiles + 0.5) * _TILE, 2, ego2world[2, 3], axis=1),
        )[:, :2]
        half = _TILE * 0.71
        close = np.all(
            (middles > np.array(grid.lo[:2]) - half) & (middles < np.array(grid.hi[:2]) + half),
            axis=1,
        )
        for k in np.flatnonzero(close):
            part = slice(self._starts[k], self._starts[k + 1])
            _fill(
                filled,
                grid,
                self._points[part] @ world2ego[:3, :3].T + world2ego[:3, 3],
                self._label[part],
            )
        for actor, points, label in self._moving:
            pose = actor.track.at(time)
            if np.hypot(*(pose[:2] - ego2world[:2, 3])) < reach + 10:
                actor2world = np.eye(4)
                actor2world[:3, :3], actor2world[:3, 3] = rotation_from_yaw(pose[3]), pose[:3]
                actor2ego = (world2ego @ actor2world).astype(np.float32)
                _fill(filled, grid, points @ actor2ego[:3, :3].T + actor2ego[:3, 3], label)
        return filled.reshape(grid.shape)


def find_seen_voxels(
    seen: NDArray[np.bool_],
    grid: VoxelGrid,
    origins: F32,
    directions: F32,
    length: F32,
    step: float = 0.25,
    start: float = 0.0,
) -> None:
    """Mark in `seen` (X * Y * Z,) what rays (R, 3) cross between `start` and their `length` (R,), end included.

    Points every `step` metres, not the exact walk of `occupancy.rays`: truth shares no code with the labels that it judges.
    """
    lo, pitch = np.array(grid.lo, np.float32), np.array(grid.pitch, np.float32)
    near, far = _clip(origins, directions, np.array(grid.lo, np.float32), np.array(grid.hi, np.float32))
    first, last = np.maximum(near, start), np.minimum(far, length)
    used = np.flatnonzero(last > first)
    counts = np.ceil((last - first)[used] / step).astype(np.int64) + 1
    for part in np.array_split(np.arange(len(used)), max(1, int(counts.sum() // 2_000_000))):
        ray = np.repeat(used[part], counts[part])
        number = np.arange(len(ray)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        way = np.minimum(first[ray] + np.float32(step) * number.astype(np.float32), last[ray])
        flat = np.zeros(len(ray), np.int32)
        for axis in range(3):
            position = (origins[ray, axis] - lo[axis] + directions[ray, axis] * way) / pitch[axis]
            cell = np.clip(position.astype(np.int32), 0, grid.shape[axis] - 1)
            flat = flat * grid.shape[axis] + cell
        seen[flat] = True


def mark_ends(seen: NDArray[np.bool_], grid: VoxelGrid, cam2ego: NDArray[np.float64], rays: F32, distance: F32) -> None:
    """Mark the voxels in which a camera's unit rays (h, w, 3) end after `distance` (h, w)."""
    hit = np.isfinite(distance)
    ends = transform_points(cam2ego, rays[hit] * (distance[hit] + np.float32(0.02))[:, None])
    cells, inside = grid.indices(ends)
    seen[grid.flatten(cells[inside])] = True


def mark_centres(
    seen: NDArray[np.bool_],
    voxels: tuple[NDArray[np.int64], F32],
    cam2ego: NDArray[np.float64],
    camera: Camera,
    step: int,
    depth: F32,
) -> None:
    """Mark voxels whose centre no surface hides from a camera.

    voxels: flat indices (S,) and centres (S, 3) in the ego frame. depth: (h, w) of every `step`-th pixel; the
    distance along its ray where the lens is no pinhole.
    """
    flat, centres = voxels
    ego2cam = invert_transform(cam2ego).astype(np.float32)
    local = centres @ ego2cam[:3, :3].T + ego2cam[:3, 3]
    u, v, away = _see(camera, local)
    inside = (away > 0.05) & (u >= 0) & (v >= 0) & (u < camera.width) & (v < camera.height)
    u, v, away, flat = u[inside], v[inside], away[inside], flat[inside]
    row = np.minimum((v / step).astype(np.int32), depth.shape[0] - 1)
    column = np.minimum((u / step).astype(np.int32), depth.shape[1] - 1)
    seen[flat[away < depth[row, column]]] = True


def _see(camera: Camera, local: F32) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return pixels and how far away points (S, 3) of the camera frame are: depth, or the distance for other lenses."""
    if not camera.lens.is_pinhole:
        pixels, lit = camera.lens.project(local)
        return *np.nan_to_num(pixels, nan=-1.0).T, np.linalg.norm(local, axis=1) * lit
    before = np.maximum(local[:, 2], np.float32(0.05))
    k = camera.intrinsic.astype(np.float32)
    return k[0, 0] * local[:, 0] / before + k[0, 2], k[1, 1] * local[:, 1] / before + k[1, 2], local[:, 2]


def _clip(origins: F32, directions: F32, lo: F32, hi: F32) -> tuple[F32, F32]:
    """Where rays enter and leave a box; entry beyond exit for those that miss it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (lo - origins) / directions, (hi - origins) / directions
    return np.fmax.reduce(np.fmin(a, b), axis=1), np.fmin.reduce(np.fmax(a, b), axis=1) - np.float32(1e-3)


def _fill(filled: NDArray[np.uint8], grid: VoxelGrid, points: F32, label: NDArray[np.uint8]) -> None:
    """Write labels of points into their voxels; of several the last one stays."""
    cell = np.floor((points - np.array(grid.lo, np.float32)) / np.array(grid.pitch, np.float32))
    inside = np.flatnonzero(np.all((cell >= 0) & (cell < np.array(grid.shape)), axis=1))
    filled[grid.flatten(cell[inside])] = label[inside]


def _rank(label: NDArray[np.uint8]) -> NDArray[np.int64]:
    rank = np.zeros(len(OCCUPANCY_CLASSES), np.int64)
    rank[_RANK] = np.arange(len(_RANK))
    return rank[label]


def _near_route(mesh: Mesh, route: NDArray[np.float64], reach: float) -> Mesh:
    """The triangles and solid points that any grid along the route can hold."""

    def close(points: F32) -> NDArray[np.bool_]:
        least = np.full(len(points), np.inf, np.float32)
        for place in route.astype(np.float32):
            away = np.maximum(np.abs(points[:, 0] - place[0]), np.abs(points[:, 1] - place[1]))
            np.minimum(least, away, out=least)
        return (least < reach) & (points[:, 2] < 9.0)

    low = np.concatenate([mesh.triangles[..., :2].mean(1), mesh.triangles[..., 2].min(1, keepdims=True)], 1)
    keep = close(low) & (np.ptp(mesh.triangles, axis=1).max(1) < 60)
    solid = close(mesh.solid)
    return Mesh(
        mesh.triangles[keep],
        mesh.uv[keep],
        mesh.material[keep],
        mesh.label[keep],
        mesh.solid[solid],
        mesh.solid_label[solid],
    )
