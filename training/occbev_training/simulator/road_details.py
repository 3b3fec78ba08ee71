"""What lies on the ground of world v2: worn paint, arrows, patches, seams, tyre tracks, covers, drains, driveways, car
parks. All of it is geometry a few millimetres above the ground, so LiDAR and truth hold it too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev_training.simulator.materials import (
    ASPHALT,
    NOISE,
    SLABS,
    SPECKLE,
    STRIPES,
    TURF,
    WORN,
    MaterialTable,
    linear,
    linear_hsv,
)
from occbev_training.simulator.mesh import Mesh, MeshBuilder
from occbev_training.simulator.street import FLAT, ROAD, TERRAIN, WALK, Bend, Plan

TRACKS, REPAIRS, PAINT, LOT = 0.005, 0.010, 0.015, 0.16
"""Heights above the carriageway of tyre tracks, repairs and paint, and of what covers a lot."""

_SHAFT = [[0, -0.08], [2.2, -0.08], [2.2, 0.08], [0, 0.08]]
_ARROWS = {
    "ahead": (_SHAFT, [[2.2, -0.35], [3.4, 0], [2.2, 0.35]]),
    "left": (_SHAFT, [[1.9, 0.08], [2.2, 0.08], [2.2, 0.6], [1.9, 0.6]], [[1.5, 0.6], [2.6, 0.6], [2.05, 1.3]]),
}
"""Convex parts along the way of driving and to its left, in metres."""


@dataclass(frozen=True)
class CarPark:
    """A paved lot between two values of s, from `near` to `far` metres beside the road; side -1 is right."""

    s: tuple[float, float]
    near: float
    far: float
    side: int

    def bays(self) -> list[tuple[float, float]]:
        """Middles (s, d) of its bays, across the row."""
        rows = [self.near + 2.8] if self.far - self.near < 14 else [self.near + 2.8, self.far - 2.8]
        return [(float(s), self.side * d) for d in rows for s in np.arange(self.s[0] + 1.5, self.s[1] - 1.2, 2.6)]


def ground_materials(table: MaterialTable) -> dict[int, int]:
    """Materials of the ground by class, and of kerb stones under -1."""
    rng = table.rng
    asphalt = linear(np.clip(rng.uniform(0.25, 0.48) + rng.normal(0, 0.01, 3), 0.1, 0.7))
    walk = linear(np.clip(rng.uniform(0.45, 0.72) + np.array([0.03, 0.01, -0.02]) * rng.uniform(-0.5, 1.5), 0.1, 0.9))
    grass = linear_hsv(rng.uniform(0.14, 0.27), rng.uniform(0.25, 0.5), rng.uniform(0.28, 0.5))
    straw = linear_hsv(rng.uniform(0.1, 0.14), rng.uniform(0.2, 0.4), rng.uniform(0.35, 0.6))
    odd = rng.random() < 0.15
    kerb = table.add(linear(np.full(3, 0.75)), STRIPES, linear(np.full(3, rng.choice((0.12, 0.75)))), 2.4)
    return {
        ROAD: table.add(asphalt, ASPHALT, asphalt * 0.3, 0.6),
        WALK: table.draw(SLABS) if odd else table.add(walk, SLABS, walk * 0.35, float(rng.uniform(0.5, 1.5))),
        TERRAIN: table.draw(NOISE) if odd else table.add(grass, TURF, straw, 0.6),
        FLAT: table.add(asphalt * rng.uniform(0.8, 1.5), ASPHALT, asphalt * 0.4, 0.6),
        -1: kerb if rng.random() < 0.2 else table.add(walk * 0.9, SPECKLE, scale=0.4),
    }


def build_road_details(plan: Plan, bend: Bend, table: MaterialTable, asphalt: NDArray[np.float32]) -> Mesh:
    """Tyre tracks, repairs, covers, drains and paint of a whole street, whose asphalt has a colour (3,)."""
    builder = MeshBuilder(ROAD)
    layer = _Layer(builder, bend, plan)
    _wear(layer, table, asphalt)
    _repair(layer, table, asphalt)
    _paint(layer, table)
    return builder.build()


def build_lot(lot: CarPark, bend: Bend, table: MaterialTable, paved: bool = True) -> Mesh:
    """Asphalt or gravel over a lot, its bays, and its driveway over the pavement."""
    builder, rng = MeshBuilder(FLAT), table.rng
    tone = linear(np.full(3, rng.uniform(0.3, 0.55)))
    ground = table.add(tone, ASPHALT if paved else SPECKLE, tone * 0.35, 0.6)
    _cover(builder, bend, lot.s, (lot.side * lot.near, lot.side * lot.far), LOT, ground)
    white = table.add(linear(np.full(3, 0.75)), WORN, tone)
    for s, d in lot.bays() if paved else ():
        _cover(builder, bend, (s - 1.3, s - 1.2), (d - 2.4, d + 2.4), LOT + 0.01, white)
    return builder.build()


def build_driveway(plan: Plan, bend: Bend, table: MaterialTable, s: float, side: int, width: float, far: float) -> Mesh:
    """A ramp up the kerb and a drive across the pavement, out to `far` metres from the middle of the road."""
    builder, rng = MeshBuilder(FLAT), table.rng
    tone = linear(np.full(3, rng.uniform(0.35, 0.65)))
    material = table.add(tone, SLABS if rng.random() < 0.5 else ASPHALT, tone * 0.5, 1.2)
    edges = (s - width / 2, s + width / 2)
    _cover(builder, bend, edges, (side * (plan.kerb + 0.3), side * far), LOT, material)
    d = side * np.array([plan.kerb - 0.5, plan.kerb + 0.3])
    low, high = bend.at(edges, d[0], 0.012), bend.at(edges, d[1], LOT)
    uv = np.array([[edges[0], d[0]], [edges[1], d[0]], [edges[1], d[1]], [edges[0], d[1]]])
    builder.quads([[low[0], low[1], high[1], high[0]]], material, FLAT, uv)
    return builder.build()


@dataclass(frozen=True)
class _Layer:
    """Where details of the carriageway go."""

    builder: MeshBuilder
    bend: Bend
    plan: Plan

    def strip(self, s: ArrayLike, d: ArrayLike, width: ArrayLike, height: float, material: int) -> None:
        """Add a band along plan points s, d (P,) of a width (P,) or one for all."""
        s, d, width = np.broadcast_arrays(np.asarray(s, float), np.asarray(d, float), np.asarray(width, float))
        low, high = self.bend.at(s, d - width / 2, height), self.bend.at(s, d + width / 2, height)
        uv_low, uv_high = np.stack([s, d - width / 2], -1), np.stack([s, d + width / 2], -1)
        corners = np.stack([low[:-1], low[1:], high[1:], high[:-1]], 1)
        self.builder.quads(corners, material, ROAD, np.stack([uv_low[:-1], uv_low[1:], uv_high[1:], uv_high[:-1]], 1))

    def patch(self, s: tuple[float, float], d: tuple[float, float], height: float, material: int) -> None:
        """Add a rectangle."""
        _cover(self.builder, self.bend, s, d, height, material, ROAD)

    def polygon(self, outline: NDArray[np.float64], height: float, material: int) -> None:
        """Add a polygon (P, 2) whose triangles all meet in its middle, of (s, d) corners."""
        middle, after = outline.mean(0), np.roll(outline, -1, 0)
        flat = np.stack([np.broadcast_to(middle, outline.shape), outline, after, after], 1)
        self.builder.quads(self.bend.at(flat[..., 0], flat[..., 1], height), material, ROAD, flat)

    def free(self, s: float, margin: float) -> bool:
        """Whether s is on the street and `margin` away from crossings."""
        return self.plan.start < s < self.plan.end and self.plan.clear_of_crossings(s, margin)


def _cover(
    builder: MeshBuilder,
    bend: Bend,
    s: tuple[float, float],
    d: tuple[float, float],
    height: float,
    material: int,
    label: int | None = None,
) -> None:
    """Add a rectangle of the plan in pieces of at most 2 m along and 4 m across."""
    along = np.linspace(s[0], s[1], max(2, int(np.ceil(abs(s[1] - s[0]) / 2)) + 1))
    across = np.linspace(d[0], d[1], max(2, int(np.ceil(abs(d[1] - d[0]) / 4)) + 1))
    i, j = (index.ravel() for index in np.indices((len(along) - 1, len(across) - 1)))
    corners = np.stack(
        [
            np.stack([along[i], along[i + 1], along[i + 1], along[i]], -1),
            np.stack([across[j], across[j], across[j + 1], across[j + 1]], -1),
        ],
        -1,
    )
    builder.quads(bend.at(corners[..., 0], corners[..., 1], height), material, label, corners)


def _wear(layer: _Layer, table: MaterialTable, asphalt: NDArray[np.float32]) -> None:
    """Darker bands where tyres roll and oil drips, and the joint between two lanes' asphalt."""
    plan, rng = layer.plan, table.rng
    dark = table.add(asphalt * rng.uniform(0.68, 0.92), ASPHALT, asphalt * 0.3, 0.6)
    seam = table.add(asphalt * rng.uniform(0.3, 0.7), SPECKLE, scale=0.4)
    s = np.arange(plan.start, plan.end, 2.0)
    for side in (-1, 1):
        for lane in range(plan.lanes):
            middle = side * (lane + 0.5) * plan.lane
            for offset in (-0.78, 0.78) if rng.random() < 0.6 else (0.0,):
                width = 0.25 + 0.22 * (1 + np.sin(s * rng.uniform(0.05, 0.12) + rng.uniform(0, 6)))
                layer.strip(s, middle + offset + 0.08 * np.sin(s * 0.07), width, TRACKS, dark)
            layer.strip(s, side * lane * plan.lane + rng.uniform(0.2, 0.5), 0.035, TRACKS, seam)
    layer.strip(s, np.full_like(s, plan.kerb - 0.18), 0.36, TRACKS, dark)
    layer.strip(s, np.full_like(s, 0.18 - plan.kerb), 0.36, TRACKS, dark)


def _repair(layer: _Layer, table: MaterialTable, asphalt: NDArray[np.float32]) -> None:
    """Patches with sealed rims, trenches, poured cracks, covers and drains."""
    plan, rng = layer.plan, table.rng
    length = plan.end - plan.start
    tar = table.add(asphalt * rng.uniform(0.2, 0.5), SPECKLE, scale=0.4)
    tones = [table.add(asphalt * tone, ASPHALT, asphalt * tone * 0.4, 0.6) for tone in (0.45, 0.7, 0.85, 1.4)]
    iron = table.add(linear(np.full(3, rng.uniform(0.15, 0.35))), STRIPES, linear(np.full(3, 0.08)), 0.09, gloss=0.1)
    for s in rng.uniform(plan.start + 3, plan.end - 9, rng.poisson(length / 11)):
        size = rng.uniform((0.8, 0.6), (7.0, 2.6))
        d = rng.uniform(-plan.kerb + 0.4, plan.kerb - 0.4 - size[1])
        layer.patch((s - 0.07, s + size[0] + 0.07), (d - 0.07, d + size[1] + 0.07), REPAIRS - 0.002, tar)
        layer.patch((s, s + size[0]), (d, d + size[1]), REPAIRS, tones[rng.integers(4)])
    for s in rng.uniform(plan.start + 3, plan.end - 3, rng.poisson(length / 30)):  # trenches across
        layer.patch((s - 0.05, s + 0.75), (-plan.kerb, plan.kerb), REPAIRS - 0.003, tar)
        layer.patch((s, s + 0.7), (-plan.kerb, plan.kerb), REPAIRS - 0.001, tones[rng.integers(4)])
    for s in rng.uniform(plan.start + 3, plan.end - 20, rng.poisson(length / 16)):
        way = np.cumsum(rng.uniform(0.15, 0.6, 24)) + s
        wander = rng.uniform(-plan.kerb, plan.kerb) + np.cumsum(rng.normal(0, 0.16, 24))
        layer.strip(
            way, np.clip(wander, -plan.kerb + 0.1, plan.kerb - 0.1), rng.uniform(0.02, 0.05), REPAIRS + 0.001, tar
        )
    for s in rng.uniform(plan.start + 3, plan.end - 3, rng.poisson(length / 14)):
        turn, radius = np.linspace(0, 2 * np.pi, 13)[:-1], rng.uniform(0.28, 0.42)
        place = np.array([s, rng.uniform(-plan.kerb + 0.8, plan.kerb - 0.8)])
        ring = np.stack([np.cos(turn), np.sin(turn)], -1)
        layer.polygon(place + (radius + 0.12) * ring, REPAIRS + 0.002, tones[rng.integers(4)])
        layer.polygon(place + radius * ring, REPAIRS + 0.004, iron)
    for side in (-1, 1):
        for s in np.arange(plan.start + rng.uniform(2, 12), plan.end - 2, rng.uniform(12, 22)):
            if layer.free(s, 1.0):
                edges = sorted((side * (plan.kerb - 0.5), side * (plan.kerb - 0.05)))
                layer.patch((s, s + 0.6), (edges[0], edges[1]), REPAIRS + 0.003, iron)


def _paint(layer: _Layer, table: MaterialTable) -> None:
    """Lane lines, edge lines, bays, stop lines, zebra crossings and arrows, all worn."""
    plan, rng = layer.plan, table.rng
    bare = linear(np.full(3, 0.4))
    white = table.add(linear(np.full(3, rng.uniform(0.72, 0.92))), WORN, bare)
    yellow = table.add(linear_hsv(0.12, rng.uniform(0.5, 0.8), 0.85), WORN, bare)
    middle = yellow if rng.random() < 0.45 else white
    twice = rng.random() < 0.5
    step, dash = float(rng.choice((6.0, 9.0, 12.0))), float(rng.choice((2.0, 3.0)))
    for s in np.arange(plan.start, plan.end - 3, 3.0):
        if layer.free(s + 1.5, 4.5):
            for d in (-0.12, 0.12) if twice else ():
                layer.strip([s, s + 1.5, s + 3.0], d, 0.11, PAINT, middle)
            for side in (-1, 1):
                if rng.random() < 0.97:
                    layer.strip([s, s + 1.5, s + 3.0], side * plan.lanes * plan.lane, 0.11, PAINT, white)
    for s in np.arange(plan.start, plan.end - 4, step):
        if not layer.free(s + dash / 2, 6.0):
            continue
        if not twice:
            layer.strip([s, s + dash], 0.0, 0.13, PAINT, middle)
        for k in range(1, plan.lanes):
            for side in (-1, 1):
                layer.strip([s, s + dash], side * k * plan.lane, 0.12, PAINT, white)
    if plan.parking:
        for s in np.arange(plan.start, plan.end, 6.0):
            for side in (-1, 1):
                if layer.free(s, 7.0):
                    inner, outer = side * plan.lanes * plan.lane, side * (plan.kerb - 0.3)
                    layer.patch((s, s + 0.12), (min(inner, outer), max(inner, outer)), PAINT, white)
    for crossing in plan.crossings:
        _paint_crossing(layer, crossing.s, crossing.half, white, rng)


def _paint_crossing(layer: _Layer, middle: float, half: float, white: int, rng: np.random.Generator) -> None:
    plan, zebra = layer.plan, rng.random() < 0.7
    lanes = plan.lanes * plan.lane
    for side in (-1, 1):
        near = middle + side * (half + 0.6)
        reach = (min(near, near + side * 2.6), max(near, near + side * 2.6))
        if zebra:
            for d in np.arange(-plan.kerb + 0.5, plan.kerb - 0.4, 1.1):
                layer.patch(reach, (d, d + 0.55), PAINT, white)
            beside = sorted((side * (plan.kerb + 0.5), side * (plan.kerb + 2.9)))
            for s in np.arange(middle - half + 0.4, middle + half - 0.4, 1.1):
                layer.patch((s, s + 0.55), (beside[0], beside[1]), PAINT, white)
        else:
            for edge in reach:
                layer.patch((edge, edge + 0.25), (-plan.kerb, plan.kerb), PAINT, white)
        line = middle + side * (half + 4.0)
        layer.patch((line, line + 0.4), (-lanes, 0.0) if side < 0 else (0.0, lanes), PAINT, white)
        for away in (6.0, 18.0):
            for lane in range(plan.lanes):
                kind = "left" if lane == 0 and rng.random() < 0.5 else "ahead"
                start = np.array([middle + side * (half + away + 3.4), side * (lane + 0.5) * plan.lane])
                if layer.free(float(start[0]), 4.0):
                    for part in _ARROWS[kind]:
                        layer.polygon(start - side * np.array(part, float), PAINT, white)
