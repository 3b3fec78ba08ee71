"""Rays against the street: a scene built once for what stands and a small one rebuilt for what moves.

Embree does the intersection; this module only keeps track of which triangle belongs to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from numpy.typing import NDArray

from occbev_training.simulator.mesh import Mesh, join
from occbev_training.simulator.world import Actor, World

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Hits:
    """First intersections of (R,) rays.

    distance: (R,) along the unit direction, inf for a miss. triangle: (R,) row of `StreetScene.mesh`, -1
    for a miss. weights: (R, 2) barycentric weights of corners 1 and 2. normal: (R, 3) unit, against the ray.
    """

    distance: F32
    triangle: NDArray[np.int32]
    weights: F32
    normal: F32


class RayScene:
    """One set of triangles (T, 3, 3) ready for rays."""

    def __init__(self, triangles: F32) -> None:
        """Build the search tree; an empty set is allowed and never hit."""
        self._scene = None
        if len(triangles):
            self._scene = rtcore_scene.EmbreeScene()
            self._mesh = TriangleMesh(self._scene, np.ascontiguousarray(triangles, np.float32))

    def first(self, origins: F32, directions: F32, limit: F32) -> dict[str, NDArray[np.float32]] | None:
        """Intersect rays no farther than `limit` (R,); None for an empty scene."""
        if self._scene is None:
            return None
        return self._scene.run(origins, directions, dists=limit, query="INTERSECT", output=True)  # type: ignore[no-any-return]

    def find_blocked(self, origins: F32, directions: F32, limit: F32) -> NDArray[np.bool_]:
        """Tell which rays hit anything within `limit`."""
        if self._scene is None:
            return np.zeros(len(origins), bool)
        return np.asarray(self._scene.run(origins, directions, dists=limit, query="OCCLUDED")) >= 0


class StreetScene:
    """The whole street at any time of the drive."""

    def __init__(self, world: World) -> None:
        """Build the static part, with no moving actor placed; `mesh` numbers static triangles first, then those of moving actors."""
        self._actors: Sequence[Actor] = world.moving_actors
        bodies = join([actor.shape.mesh for actor in self._actors])
        self.mesh: Mesh = join([world.static, bodies])
        self._static_count = len(world.static)
        self._static = RayScene(world.static.triangles)
        self._bodies = bodies.triangles
        counts = [len(actor.shape.mesh) for actor in self._actors]
        self._owner = np.repeat(np.arange(len(self._actors)), counts)
        self._rows = np.zeros(0, np.int64)
        self._moving = RayScene(self._bodies[:0])

    def pose(self, time: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Poses (A, 4) of the moving actors at one time, or at one time for each (A,)."""
        times = np.broadcast_to(np.asarray(time, np.float64), len(self._actors))
        poses = [actor.track.at(when) for actor, when in zip(self._actors, times, strict=True)]
        return np.array(poses).reshape(-1, 4)

    def place(self, pose: NDArray[np.float64], keep: NDArray[np.bool_] | None = None) -> None:
        """Put the moving actors at poses (A, 4); those outside `keep` (A,) are left out."""
        self._rows = np.flatnonzero(np.ones(len(self._owner), bool) if keep is None else keep[self._owner])
        owner = self._owner[self._rows]
        c, s = np.cos(pose[:, 3]), np.sin(pose[:, 3])
        zero, one = np.zeros_like(c), np.ones_like(c)
        turned = np.array([[c, -s, zero], [s, c, zero], [zero, zero, one]]).transpose(2, 1, 0)
        triangles = self._bodies[self._rows] @ turned.astype(np.float32)[owner]
        self._moving = RayScene(triangles + pose[owner, None, :3].astype(np.float32))

    def first(self, origins: F32, directions: F32, reach: float = 400.0) -> Hits:
        """Find what each ray (origins, unit directions (R, 3)) hits first within `reach`."""
        origins, directions = (
            np.ascontiguousarray(origins, np.float32),
            np.ascontiguousarray(directions, np.float32),
        )
        found = self._static.first(origins, directions, np.full(len(origins), reach, np.float32))
        assert found is not None, "a street always has ground"
        moving = self._moving.first(origins, directions, found["tfar"])
        triangle, distance = found["primID"].astype(np.int32, copy=False), found["tfar"]
        u, v, normal = found["u"], found["v"], found["Ng"]
        if moving is not None:
            nearer = np.flatnonzero(moving["primID"] >= 0)
            triangle[nearer] = self._rows[moving["primID"][nearer]] + self._static_count
            distance[nearer], u[nearer], v[nearer] = (
                moving["tfar"][nearer],
                moving["u"][nearer],
                moving["v"][nearer],
            )
            normal[nearer] = moving["Ng"][nearer]
        distance[triangle < 0] = np.inf
        return Hits(distance, triangle, np.stack([u, v], -1), _facing(normal, directions))

    def find_blocked(self, origins: F32, directions: F32, reach: float) -> NDArray[np.bool_]:
        """Tell which rays (R,) hit anything within `reach`."""
        limit = np.full(len(origins), reach, np.float32)
        blocked = self._static.find_blocked(origins, directions, limit)
        free = np.flatnonzero(~blocked)
        blocked[free] = self._moving.find_blocked(origins[free], directions[free], limit[free])
        return blocked


def _facing(normal: F32, directions: F32) -> F32:
    """Unit normals turned against the rays."""
    length = np.sqrt(np.einsum("rc,rc->r", normal, normal))
    along = np.einsum("rc,rc->r", normal, directions)
    factor = np.where(along > 0, -1.0, 1.0) / np.maximum(length, 1e-12)
    return normal * factor[:, None].astype(np.float32)
