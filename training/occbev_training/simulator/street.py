"""The street as a plan: a straight block in (s, d) metres that one smooth map bends into the world.

s runs along the main road, d to its left; roads, kerbs, pavements, lots and markings are rectangles of the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.classes import OCCUPANCY_CLASSES
from occbev_training.simulator.materials import (
    FOLIAGE,
    NOISE,
    PLAIN,
    SLABS,
    SPECKLE,
    MaterialTable,
    linear,
    linear_hsv,
)
from occbev_training.simulator.mesh import Mesh, MeshBuilder

ROAD, WALK, TERRAIN, FLAT, MANMADE, VEGETATION = (
    OCCUPANCY_CLASSES.index(name)
    for name in ("driveable_surface", "sidewalk", "terrain", "other_flat", "manmade", "vegetation")
)
DEPTH = 75.0
"""The plan reaches this far to both sides of the main road."""
STEEPEST, STEEPEST_BANK = 0.04, 0.08
"""Largest slope of a road along its middle, and of the ground beside it away from it."""
LEVEL = 10.0
"""The ground is level across within this many metres of the middle of the main road."""
_BANK_RADIUS = 8.0
_PAINT_HEIGHT = 0.015
"""Road paint lies this far above the asphalt, more than a hill rises between two of its vertices."""


@dataclass(frozen=True)
class Bend:
    """Smooth map from plan to world: a centre line of small curvature over hills, and banks beside it.

    s: (P,) increasing. heading: (P,) of the centre line. line: (P, 3) its world points.
    banks: (2,) slope at which the ground rises away from the road, to its right and to its left.
    """

    s: NDArray[np.float64]
    heading: NDArray[np.float64]
    line: NDArray[np.float64]
    banks: NDArray[np.float64]

    @classmethod
    def draw(cls, rng: np.random.Generator, start: float, end: float, radii: tuple[float, float] = (400, 180)) -> Bend:
        """Draw a centre line between two values of s, straight or of either least radius, of slope below 4 %.

        Without hills the mean ground of all drives would be right, and a network would learn nothing from images.
        """
        s = np.arange(start, end + 1.0, 1.0)
        limit = rng.choice((0.0, 1 / radii[0], 1 / radii[1]), p=(0.3, 0.35, 0.35))
        knots = np.arange(start, end + 60, 45.0)
        curvature = np.interp(s, knots, rng.uniform(-limit, limit, len(knots)))
        heading = np.cumsum(curvature)
        heading -= np.interp(0.0, s, heading)
        x, y = np.cumsum(np.cos(heading)), np.cumsum(np.sin(heading))
        z = _hills(rng, s)
        line = np.stack([x - np.interp(0, s, x), y - np.interp(0, s, y), z], -1)
        return cls(s, heading, line, rng.uniform(-STEEPEST_BANK, STEEPEST_BANK, 2))

    def at(self, s: ArrayLike, d: ArrayLike, z: ArrayLike = 0.0) -> NDArray[np.float64]:
        """World points (..., 3) of plan points at height z above the ground plane."""
        s, d, z = np.broadcast_arrays(np.asarray(s, float), np.asarray(d, float), np.asarray(z, float))
        x, y, height = (np.interp(s, self.s, self.line[:, k]) for k in range(3))
        heading = np.interp(s, self.s, self.heading)
        beyond = np.maximum(np.abs(d) - LEVEL, 0.0)
        bank = self.banks[(d > 0).astype(int)] * beyond**2 / (beyond + _BANK_RADIUS)
        return np.stack([x - d * np.sin(heading), y + d * np.cos(heading), height + bank + z], -1)

    def yaw(self, s: ArrayLike) -> NDArray[np.float64]:
        """Heading of the main road in the world."""
        return np.interp(np.asarray(s, float), self.s, self.heading)


def _hills(rng: np.random.Generator, s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Height (P,) of the centre line along s, 0 at s = 0: two waves whose slopes stay below the steepest."""
    steepest = STEEPEST * np.sqrt(rng.uniform())
    share = rng.uniform(0.6, 1.0)
    height = np.zeros_like(s)
    for slope in (steepest * share, steepest * (1 - share)):
        rate, phase = 2 * np.pi / rng.uniform(70, 160), rng.uniform(0, 2 * np.pi)
        height += slope / rate * (np.sin(rate * s + phase) - np.sin(phase))
    return height


@dataclass(frozen=True)
class Crossing:
    """A road across the main one: its middle and half width along s, with pavements of `walk` metres."""

    s: float
    half: float
    walk: float


@dataclass(frozen=True)
class Plan:
    """Layout of one block: all lengths in metres of the plan.

    strips: per side (right, left) the (width, class) bands from the kerb outwards, before the lots.
    """

    start: float
    end: float
    lane: float
    lanes: int
    parking: float
    strips: tuple[tuple[tuple[float, int], ...], tuple[tuple[float, int], ...]]
    crossings: tuple[Crossing, ...]

    @property
    def kerb(self) -> float:
        """Distance of the kerb from the middle of the road."""
        return self.lanes * self.lane + self.parking

    def front(self, side: int) -> float:
        """Distance at which the lots of side -1 (right) or 1 (left) begin."""
        return self.kerb + sum(width for width, _ in self.strips[int(side > 0)])

    def walk_middle(self, side: int) -> float:
        """Distance of the middle of the pavement."""
        middle = self.kerb
        for width, kind in self.strips[int(side > 0)]:
            if kind == WALK:
                return middle + width / 2
            middle += width
        return middle

    def clear_of_crossings(self, s: float, margin: float) -> bool:
        """Whether s lies at least `margin` beyond the carriageway of every crossing."""
        return all(abs(s - c.s) > c.half + margin for c in self.crossings)


def draw_plan(rng: np.random.Generator, start: float, end: float, turn_at: float | None) -> Plan:
    """Draw a layout; a crossing stands at `turn_at` where the drive turns there."""
    lanes = int(rng.choice((1, 2), p=(0.65, 0.35)))
    parking = float(rng.choice((0.0, 2.3), p=(0.2, 0.8)))
    strips = tuple(_draw_strips(rng) for _ in range(2))
    places = [turn_at] if turn_at is not None else [rng.uniform(25, 70)]
    while places[-1] < end - 70:
        places.append(places[-1] + rng.uniform(70, 130))
    places = [s for s in places if start + 40 < s < end - 25]
    crossings = tuple(Crossing(float(s), float(rng.uniform(3.2, 3.8)), float(rng.uniform(2.0, 3.5))) for s in places)
    return Plan(start, end, float(rng.uniform(3.2, 3.7)), lanes, parking, strips, crossings)  # type: ignore[arg-type]


def _draw_strips(rng: np.random.Generator) -> tuple[tuple[float, int], ...]:
    walk = (float(rng.uniform(1.8, 4.0)), WALK)
    if rng.random() < 0.45:
        return ((float(rng.uniform(1.0, 2.4)), TERRAIN), walk)
    return (walk,)


def build_ground(plan: Plan, bend: Bend, table: MaterialTable, surface: dict[int, int] | None = None) -> Mesh:
    """Mesh the whole ground: carriageways, raised pavements with kerbs, verges, lots and road paint.

    surface: materials by class, and of kerb stones under -1; road paint is left to the caller then.
    """
    rng, builder, painted = table.rng, MeshBuilder(ROAD), surface is None
    surface = surface or _ground_materials(table)
    s_cuts, d_cuts = _cuts(plan)
    kind = np.array(
        [
            [_ground_class(plan, (a + b) / 2, (c + d) / 2) for c, d in zip(d_cuts, d_cuts[1:], strict=False)]
            for a, b in zip(s_cuts, s_cuts[1:], strict=False)
        ]
    )
    lots = {
        (k, side): int(rng.choice((TERRAIN, FLAT, WALK), p=(0.55, 0.25, 0.2))) for k in range(99) for side in (-1, 1)
    }
    for i, j in np.ndindex(kind.shape):
        if kind[i, j] < 0:
            block = sum(c.s < s_cuts[i] for c in plan.crossings)
            kind[i, j] = lots[block, 1 if d_cuts[j] > 0 else -1]
    height = np.vectorize(_HEIGHT.__getitem__)(kind)
    for i, j in np.ndindex(kind.shape):
        _add_cell(
            builder,
            bend,
            s_cuts[i : i + 2],
            d_cuts[j : j + 2],
            height[i, j],
            surface[kind[i, j]],
            kind[i, j],
        )
    _add_kerbs(builder, bend, s_cuts, d_cuts, height, surface[-1])
    if painted:
        _add_paint(builder, plan, bend, table)
    _add_horizon(builder, bend, surface[TERRAIN])
    return builder.build()


def _cuts(plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    s_cuts = {plan.start, plan.end}
    for c in plan.crossings:
        s_cuts |= {c.s - c.half - c.walk, c.s - c.half, c.s + c.half, c.s + c.half + c.walk}
    d_cuts = {-DEPTH, DEPTH, -plan.kerb, plan.kerb}
    for side in (-1, 1):
        edge = plan.kerb
        for width, _ in plan.strips[int(side > 0)]:
            edge += width
            d_cuts.add(side * edge)
    return np.array(sorted(s_cuts)), np.array(sorted(d_cuts))


def _ground_class(plan: Plan, s: float, d: float) -> int:
    """Class of a plan point, -1 for lots."""
    if abs(d) < plan.kerb or any(abs(s - c.s) < c.half for c in plan.crossings):
        return ROAD
    if any(abs(s - c.s) < c.half + c.walk for c in plan.crossings):
        return WALK
    edge = plan.kerb
    for width, kind in plan.strips[int(d > 0)]:
        edge += width
        if abs(d) < edge:
            return kind
    return -1


_HEIGHT = {ROAD: 0.0, WALK: 0.13, TERRAIN: 0.14, FLAT: 0.12}


def _ground_materials(table: MaterialTable) -> dict[int, int]:
    """Materials by class, and of the kerb stone under -1; in some streets from the shared distribution."""
    rng = table.rng
    odd = rng.random() < 0.2
    grass = linear_hsv(rng.uniform(0.12, 0.32), rng.uniform(0.25, 0.65), rng.uniform(0.25, 0.55))
    asphalt = linear(np.clip(rng.uniform(0.2, 0.55) + rng.normal(0, 0.012, 3), 0.1, 0.7))
    walk = linear(np.clip(rng.uniform(0.35, 0.75) + np.array([0.03, 0.01, -0.02]) * rng.uniform(-1, 2), 0.1, 0.9))
    return {
        ROAD: table.add(asphalt, SPECKLE, scale=0.25),
        WALK: table.draw(SLABS) if odd else table.add(walk, SLABS, scale=float(rng.uniform(0.5, 1.5))),
        TERRAIN: table.draw(NOISE) if odd else table.add(grass, FOLIAGE, scale=0.4),
        FLAT: table.draw() if odd else table.add(asphalt * rng.uniform(0.7, 1.6), SPECKLE, scale=0.25),
        -1: table.add(walk * 0.85, SLABS, scale=1.0),
    }


def _add_cell(
    builder: MeshBuilder,
    bend: Bend,
    s: NDArray[np.float64],
    d: NDArray[np.float64],
    height: float,
    material: int,
    label: int,
) -> None:
    along = np.linspace(s[0], s[1], max(2, int(np.ceil((s[1] - s[0]) / 2)) + 1))
    across = np.linspace(d[0], d[1], max(2, int(np.ceil((d[1] - d[0]) / 4)) + 1))
    i, j = (index.ravel() for index in np.indices((len(along) - 1, len(across) - 1)))
    corners_s = np.stack([along[i], along[i + 1], along[i + 1], along[i]], -1)
    corners_d = np.stack([across[j], across[j], across[j + 1], across[j + 1]], -1)
    builder.quads(bend.at(corners_s, corners_d, height), material, label, np.stack([corners_s, corners_d], -1))


def _add_kerbs(
    builder: MeshBuilder,
    bend: Bend,
    s_cuts: NDArray[np.float64],
    d_cuts: NDArray[np.float64],
    height: NDArray[np.float64],
    material: int,
) -> None:
    for i in range(len(s_cuts) - 1):
        for j in range(1, len(d_cuts) - 1):
            if height[i, j - 1] != height[i, j]:
                along = np.linspace(s_cuts[i], s_cuts[i + 1], max(2, int((s_cuts[i + 1] - s_cuts[i]) / 3) + 1))
                _add_face(
                    builder,
                    bend,
                    along,
                    np.full_like(along, d_cuts[j]),
                    height[i, j - 1 : j + 1],
                    material,
                )
    for i in range(1, len(s_cuts) - 1):
        for j in range(len(d_cuts) - 1):
            if height[i - 1, j] != height[i, j]:
                across = d_cuts[j : j + 2]
                _add_face(
                    builder,
                    bend,
                    np.full_like(across, s_cuts[i]),
                    across,
                    height[i - 1 : i + 1, j],
                    material,
                )


def _add_face(
    builder: MeshBuilder,
    bend: Bend,
    s: NDArray[np.float64],
    d: NDArray[np.float64],
    heights: NDArray[np.float64],
    material: int,
) -> None:
    low, high = bend.at(s, d, min(heights)), bend.at(s, d, max(heights))
    builder.quads(np.stack([low[:-1], low[1:], high[1:], high[:-1]], 1), material, WALK)


def _add_paint(builder: MeshBuilder, plan: Plan, bend: Bend, table: MaterialTable) -> None:
    """Lane lines, edge lines, stop lines and zebra crossings, a finger above the asphalt."""
    rng = table.rng
    white = table.add(linear(np.full(3, rng.uniform(0.6, 0.9))), PLAIN)
    yellow = table.add(linear_hsv(0.12, 0.7, 0.8), PLAIN)
    middle = yellow if rng.random() < 0.4 else white
    every = np.arange(plan.start, plan.end, rng.choice((6.0, 9.0, 12.0)))
    dashes = [s for s in every if plan.clear_of_crossings(s + 1.5, 6.0)]
    solid_middle = rng.random() < 0.4
    for s in np.arange(plan.start, plan.end, 3.0) if solid_middle else dashes:
        if plan.clear_of_crossings(s + 1.5, 4.5):
            _stripe(builder, bend, s, s + 3.0, 0.0, 0.13, middle)
    for s in dashes:
        for k in range(1, plan.lanes):
            for side in (-1, 1):
                _stripe(builder, bend, s, s + 3.0, side * k * plan.lane, 0.12, white)
    if plan.parking and rng.random() < 0.6:
        _add_parking_bays(builder, plan, bend, white)
    for crossing in plan.crossings:
        _add_crossing_paint(builder, plan, bend, crossing, white, bool(rng.random() < 0.7))


def _add_parking_bays(builder: MeshBuilder, plan: Plan, bend: Bend, paint: int) -> None:
    inner = plan.lanes * plan.lane
    for s in np.arange(plan.start, plan.end, 6.0):
        if plan.clear_of_crossings(s, 7.0):
            for side in (-1, 1):
                _patch(
                    builder,
                    bend,
                    (s, s + 0.12),
                    sorted((side * inner, side * (plan.kerb - 0.2))),
                    paint,
                )


def _add_crossing_paint(
    builder: MeshBuilder, plan: Plan, bend: Bend, crossing: Crossing, paint: int, zebra: bool
) -> None:
    half = plan.lanes * plan.lane
    for side in (-1, 1):
        near = crossing.s + side * (crossing.half + 0.6)
        if zebra:
            for d in np.arange(-plan.kerb + 0.5, plan.kerb - 0.4, 1.1):
                _patch(builder, bend, sorted((near, near + side * 2.6)), (d, d + 0.55), paint)
            for s in np.arange(crossing.s - crossing.half + 0.4, crossing.s + crossing.half - 0.4, 1.1):
                _patch(
                    builder,
                    bend,
                    (s, s + 0.55),
                    sorted((side * (plan.kerb + 0.5), side * (plan.kerb + 2.9))),
                    paint,
                )
        line = crossing.s + side * (crossing.half + 4.0)
        _patch(builder, bend, (line, line + 0.35), (-half, 0) if side < 0 else (0, half), paint)


def _stripe(builder: MeshBuilder, bend: Bend, s0: float, s1: float, d: float, width: float, paint: int) -> None:
    _patch(builder, bend, (s0, s1), (d - width / 2, d + width / 2), paint)


def _patch(builder: MeshBuilder, bend: Bend, s: ArrayLike, d: ArrayLike, paint: int) -> None:
    (s0, s1), (d0, d1) = np.asarray(s), np.asarray(d)
    corners = np.array([[s0, d0], [s1, d0], [s1, d1], [s0, d1]])
    builder.quads(bend.at(corners[:, 0], corners[:, 1], _PAINT_HEIGHT), paint, ROAD, corners)


def _add_horizon(builder: MeshBuilder, bend: Bend, material: int) -> None:
    centre = bend.at((bend.s[0] + bend.s[-1]) / 2, 0.0)
    lowest = bend.at(bend.s[:, None], np.array([-DEPTH, 0.0, DEPTH]))[..., 2].min()
    centre[2] = lowest - 0.6
    square = np.array([[-900, -900, 0], [900, -900, 0], [900, 900, 0], [-900, 900, 0]], np.float64)
    builder.quads(centre + square, material, TERRAIN, square[:, :2])
