"""Triangle meshes of the simulated street and the few solids that everything is assembled from.

A mesh carries, per triangle, what the renderer and the ground truth must know: material, class, surface coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.geometry import rotation_from_yaw

_FACES = ((0, 1, 5, 4), (2, 3, 7, 6), (1, 2, 6, 5), (3, 0, 4, 7), (4, 5, 6, 7), (3, 2, 1, 0))
"""Corners of a solid's faces: right, left, front, rear, top, bottom."""

_CORNER_SIGNS = np.array(
    [
        [-1, -1, -1],
        [1, -1, -1],
        [1, 1, -1],
        [-1, 1, -1],
        [-1, -1, 1],
        [1, -1, 1],
        [1, 1, 1],
        [-1, 1, 1],
    ],
    np.float64,
)


@dataclass(frozen=True)
class Mesh:
    """Triangles with their attributes.

    triangles: (T, 3, 3) float32. uv: (T, 3, 2) float32, metres along the surface.
    material: (T,) int32 row of the material table. label: (T,) uint8 occupancy class.
    solid: (S, 3) float32 points inside closed bodies. solid_label: (S,) uint8.
    """

    triangles: NDArray[np.float32]
    uv: NDArray[np.float32]
    material: NDArray[np.int32]
    label: NDArray[np.uint8]
    solid: NDArray[np.float32]
    solid_label: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.triangles)

    def move(self, position: ArrayLike, yaw: float) -> Mesh:
        """Return the mesh turned by `yaw` about +z and then shifted to `position` (3,)."""
        rotation = rotation_from_yaw(yaw).astype(np.float32).T
        shift = np.asarray(position, np.float32)
        return replace(self, triangles=self.triangles @ rotation + shift, solid=self.solid @ rotation + shift)

    def scale(self, factor: float) -> Mesh:
        """Return the mesh made larger by a factor, patterns as they were."""
        f = np.float32(factor)
        return replace(self, triangles=self.triangles * f, solid=self.solid * f)


def join(meshes: Sequence[Mesh]) -> Mesh:
    """Concatenate meshes; none at all gives an empty mesh."""
    if not meshes:
        return MeshBuilder().build()
    names = ("triangles", "uv", "material", "label", "solid", "solid_label")
    return Mesh(*(np.concatenate([getattr(mesh, name) for mesh in meshes]) for name in names))


def surface_samples(mesh: Mesh, spacing: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Cover every triangle evenly, about one point per spacing squared; returns (S, 3) points and labels (S,).

    Within a triangle the points follow an additive recurrence of low discrepancy, so no voxel of
    twice the spacing is left out by chance. Points inside solids follow.
    """
    a, b, c = (mesh.triangles[:, k] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    counts = np.ceil(area / spacing**2).astype(np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    u, v = (
        np.mod(0.5 + 0.7548776662466927 * number, 1),
        np.mod(0.5 + 0.5698402909980532 * number, 1),
    )
    folded = u + v > 1
    u, v = (
        np.where(folded, 1 - u, u).astype(np.float32)[:, None],
        np.where(folded, 1 - v, v).astype(np.float32)[:, None],
    )
    points = a[owner] + u * (b - a)[owner] + v * (c - a)[owner]
    return np.concatenate([points, mesh.solid]), np.concatenate([mesh.label[owner], mesh.solid_label])


class MeshBuilder:
    """Collects quads, solids, cylinders and blobs, then hands over one Mesh."""

    def __init__(self, label: int = 0) -> None:
        """Start an empty mesh; `label` is the occupancy class of parts that name no other."""
        self.label = label
        self._triangles: list[NDArray[np.float64]] = []
        self._uv: list[NDArray[np.float64]] = []
        self._attributes: list[NDArray[np.int64]] = []
        self._solid: list[tuple[NDArray[np.float64], int]] = []

    def quads(
        self,
        corners: ArrayLike,
        material: int,
        label: int | None = None,
        uv: ArrayLike | None = None,
    ) -> None:
        """Add (Q, 4, 3) quads, corners in order around; uv (Q, 4, 2) defaults to metres along two edges."""
        corners = np.asarray(corners, np.float64).reshape(-1, 4, 3)
        coordinates = _edge_uv(corners) if uv is None else np.asarray(uv, np.float64).reshape(-1, 4, 2)
        for chosen in ([0, 1, 2], [0, 2, 3]):
            self._add(corners[:, chosen], coordinates[:, chosen], material, label)

    def solid(
        self,
        corners: ArrayLike,
        material: int | Sequence[int],
        label: int | None = None,
        filled: bool = True,
    ) -> None:
        """Add a convex body by its 8 corners: bottom four around, then the top four above them.

        material: one for all faces, or six for right, left, front, rear, top, bottom.
        """
        corners = np.asarray(corners, np.float64)
        materials = (material,) * 6 if isinstance(material, int) else tuple(material)
        for face, chosen in zip(_FACES, materials, strict=True):
            self.quads(corners[list(face)], chosen, label)
        if filled:
            self._solid.append((_inside(corners), self.label if label is None else label))

    def box(
        self,
        centre: ArrayLike,
        size: ArrayLike,
        material: int | Sequence[int],
        yaw: float = 0.0,
        label: int | None = None,
        filled: bool = True,
    ) -> None:
        """Add a box by its centre, size and yaw."""
        corners = _CORNER_SIGNS * np.asarray(size) / 2
        self.solid(corners @ rotation_from_yaw(yaw).T + np.asarray(centre), material, label, filled)

    def frustum(
        self,
        low: Sequence[float],
        high: Sequence[float],
        material: int | Sequence[int],
        label: int | None = None,
        filled: bool = True,
    ) -> None:
        """Add a body between two rectangles (x0, x1, y0, y1, z), the lower one first."""
        corners = [
            [x, y, r[4]] for r in (low, high) for x, y in ((r[0], r[2]), (r[1], r[2]), (r[1], r[3]), (r[0], r[3]))
        ]
        self.solid(corners, material, label, filled)

    def beam(
        self,
        start: ArrayLike,
        end: ArrayLike,
        width: float,
        material: int,
        label: int | None = None,
    ) -> None:
        """Add a square bar between two points."""
        start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
        side, up = _across(end - start)
        offsets = np.array([-side - up, side - up, side + up, -side + up]) * width / 2
        self.solid(np.concatenate([start + offsets, end + offsets]), material, label, filled=False)

    def cylinder(
        self,
        start: ArrayLike,
        end: ArrayLike,
        radii: tuple[float, float],
        material: int,
        label: int | None = None,
        sides: int = 8,
    ) -> None:
        """Add a closed (cone-shaped) cylinder between two points with a radius at each."""
        start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
        side, up = _across(end - start)
        angle = np.linspace(0, 2 * np.pi, sides + 1)
        ring = np.cos(angle)[:, None] * side + np.sin(angle)[:, None] * up
        low, high = start + radii[0] * ring, end + radii[1] * ring
        self.quads(np.stack([low[:-1], low[1:], high[1:], high[:-1]], 1), material, label)
        for centre, rim in ((start, low), (end, high)):
            self._fan(centre, rim, material, label)

    def blob(
        self,
        centre: ArrayLike,
        radii: ArrayLike,
        material: int,
        rng: np.random.Generator,
        label: int | None = None,
        roughness: float = 0.15,
        detail: int = 1,
    ) -> None:
        """Add a lumpy ellipsoid."""
        vertices, faces = _icosphere(detail)
        radii = np.asarray(radii, np.float64)
        shape = vertices * (1 - roughness * rng.random((len(vertices), 1))) * radii
        uv = np.stack([np.arctan2(vertices[:, 1], vertices[:, 0]) * radii[0], vertices[:, 2] * radii[2]], -1)
        self._add((shape + np.asarray(centre))[faces], uv[faces], material, label)
        inside = rng.uniform(-1, 1, (int(min(400, 8 + 60 * np.prod(radii))), 3))
        inside = inside[np.linalg.norm(inside, axis=1) < 0.85] * radii
        self._solid.append((inside + np.asarray(centre), self.label if label is None else label))

    def build(self) -> Mesh:
        """Return everything added so far as one mesh."""
        if not self._triangles:
            return Mesh(
                np.zeros((0, 3, 3), np.float32),
                np.zeros((0, 3, 2), np.float32),
                np.zeros(0, np.int32),
                np.zeros(0, np.uint8),
                np.zeros((0, 3), np.float32),
                np.zeros(0, np.uint8),
            )
        attributes = np.concatenate(self._attributes)
        solid = [points for points, _ in self._solid] or [np.zeros((0, 3))]
        solid_label = [np.full(len(points), label, np.uint8) for points, label in self._solid]
        return Mesh(
            np.concatenate(self._triangles).astype(np.float32),
            np.concatenate(self._uv).astype(np.float32),
            attributes[:, 0].astype(np.int32),
            attributes[:, 1].astype(np.uint8),
            np.concatenate(solid).astype(np.float32),
            np.concatenate(solid_label or [np.zeros(0, np.uint8)]),
        )

    def _fan(
        self,
        centre: NDArray[np.float64],
        rim: NDArray[np.float64],
        material: int,
        label: int | None,
    ) -> None:
        triangles = np.stack([np.broadcast_to(centre, rim[1:].shape), rim[:-1], rim[1:]], 1)
        self._add(triangles, triangles[..., :2], material, label)

    def _add(
        self,
        triangles: NDArray[np.float64],
        uv: NDArray[np.float64],
        material: int,
        label: int | None,
    ) -> None:
        self._triangles.append(triangles)
        self._uv.append(uv)
        attributes = np.array([[material, self.label if label is None else label]])
        self._attributes.append(np.repeat(attributes, len(triangles), axis=0))


def _edge_uv(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    width = np.linalg.norm(corners[:, 1] - corners[:, 0], axis=1)
    height = np.linalg.norm(corners[:, 3] - corners[:, 0], axis=1)
    zero = np.zeros_like(width)
    flat = [zero, zero, width, zero, width, height, zero, height]
    return np.stack(flat, -1).reshape(-1, 4, 2)


def _inside(corners: NDArray[np.float64], spacing: float = 0.25) -> NDArray[np.float64]:
    """Points inside a body by trilinear blending of its corners."""
    length = np.ptp(corners, axis=0)
    axes = [(np.arange(n) + 0.5) / n for n in np.maximum(1, np.ceil(length / spacing)).astype(int)]
    a, b, c = (v.ravel()[:, None] for v in np.meshgrid(*axes, indexing="ij"))
    low = (1 - b) * ((1 - a) * corners[0] + a * corners[1]) + b * ((1 - a) * corners[3] + a * corners[2])
    high = (1 - b) * ((1 - a) * corners[4] + a * corners[5]) + b * ((1 - a) * corners[7] + a * corners[6])
    return (1 - c) * low + c * high


def _across(axis: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two unit vectors at right angles to `axis` and to each other."""
    axis = axis / np.linalg.norm(axis)
    helper = np.array([0.0, 0.0, 1.0]) if abs(axis[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
    side = np.cross(axis, helper)
    side /= np.linalg.norm(side)
    return side, np.cross(side, axis)


def _icosphere(detail: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Unit sphere from a subdivided icosahedron: vertices (V, 3), faces (F, 3)."""
    if detail not in _SPHERES:
        golden = (1 + 5**0.5) / 2
        base = [[s * a, t * b, 0] for s in (-1, 1) for t in (-1, 1) for a, b in ((1, golden),)]
        vertices = np.array([np.roll(v, k) for k in range(3) for v in base])
        vertices /= np.linalg.norm(vertices, axis=1, keepdims=True)
        edge = np.sort(np.linalg.norm(vertices[0] - vertices, axis=1))[1] * 1.01
        near = np.linalg.norm(vertices[:, None] - vertices, axis=-1) < edge
        faces = np.array(
            [
                (i, j, k)
                for i in range(12)
                for j in range(i)
                for k in range(j)
                if near[i, j] and near[j, k] and near[i, k]
            ]
        )
        for _ in range(detail):
            vertices, faces = _subdivide(vertices, faces)
        _SPHERES[detail] = vertices, faces
    return _SPHERES[detail]


def _subdivide(
    vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    ab, bc, ca = ((p + q) / np.linalg.norm(p + q, axis=1, keepdims=True) for p, q in ((a, b), (b, c), (c, a)))
    corners = np.concatenate([np.stack(t, 1) for t in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))])
    unique, index = np.unique(np.round(corners.reshape(-1, 3), 9), axis=0, return_inverse=True)
    return unique, index.reshape(-1, 3)


_SPHERES: dict[int, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
