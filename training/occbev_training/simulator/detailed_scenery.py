"""What stands beside the roads of world v2: houses with relief, leafy trees and hedges before them, fences, rails,
poles with wires, traffic lights, signs, bins, car parks and driveways.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from occbev.geometry import rotation_from_yaw
from occbev_training.simulator.facades import build_house
from occbev_training.simulator.materials import LAP, MaterialTable, linear
from occbev_training.simulator.mesh import Mesh, MeshBuilder, join
from occbev_training.simulator.plants import build_bush, build_hedge, build_tree, draw_leaves
from occbev_training.simulator.road_details import CarPark, build_driveway, build_lot
from occbev_training.simulator.scenery import (
    LOT_HEIGHT,
    blocks_between_crossings,
    build_bin,
    build_kiosk,
    build_lamp,
    build_post,
    build_sign,
    place_mesh,
)
from occbev_training.simulator.street import MANMADE, Bend, Plan


@dataclass
class Scenery:
    """Grows while a street is built: meshes, and the car parks that cars may stand in."""

    plan: Plan
    bend: Bend
    table: MaterialTable
    trees: list[Mesh]
    meshes: list[Mesh] = field(default_factory=list)
    car_parks: list[CarPark] = field(default_factory=list)

    def place(self, mesh: Mesh, s: float, d: float, yaw: float = 0.0, z: float = LOT_HEIGHT) -> None:
        """Set a mesh upright at a plan point."""
        self.meshes.append(place_mesh(mesh, self.bend, s, d, z, yaw))

    def plant(self, s: float, d: float, height: float) -> None:
        """Set one of the street's trees, of a height, turned at random."""
        rng = self.table.rng
        tree = self.trees[rng.integers(len(self.trees))]
        self.place(tree.scale(height / 8.0), s, d, rng.uniform(0, 6.28))


def build_detailed_scenery(plan: Plan, bend: Bend, table: MaterialTable) -> Scenery:
    """Build both sides of a street and the houses that close the view."""
    rng = table.rng
    scenery = Scenery(plan, bend, table, [build_tree(table, 8.0) for _ in range(5)])
    styles = rng.choice(("town", "suburb", "park"), size=2, p=(0.5, 0.32, 0.18))
    for side, style in zip((-1, 1), styles, strict=True):
        for block in blocks_between_crossings(plan):
            _front_row(scenery, side, block, str(style))
            _back_row(scenery, side, block)
            _furniture(scenery, side, block)
    _wires(scenery, int(rng.choice((-1, 1))))
    for crossing in plan.crossings:
        _traffic_lights(scenery, crossing.s, crossing.half)
    _end_rows(scenery)
    return scenery


def _front_row(scenery: Scenery, side: int, block: tuple[float, float], style: str) -> None:
    rng, plan = scenery.table.rng, scenery.plan
    front, s = plan.front(side), block[0] + rng.uniform(0, 2)
    setback = {"town": rng.uniform(0.3, 2.5), "suburb": rng.uniform(3, 7), "park": rng.uniform(8, 14)}[style]
    density = {"town": 0.84, "suburb": 0.72, "park": 0.25}[style]
    while s < block[1] - 6:
        width = min(rng.uniform(8, 22), block[1] - s)
        span = (s, s + width)
        if rng.random() < density:
            floors = int(rng.integers(2, 7) if style == "town" else rng.integers(1, 4))
            depth = rng.uniform(8, 13)
            house = build_house(scenery.table, width, depth, floors)
            scenery.place(house, s + width / 2, side * (front + setback + depth / 2), 0.0 if side < 0 else np.pi)
            _forecourt(scenery, span, side, front, setback)
        elif width > 10 and rng.random() < 0.5:
            _car_park(scenery, span, side, front)
        else:
            _garden(scenery, span, side, (front + 1.5, front + 12))
        s += width + (rng.uniform(0, 3) if style == "town" else rng.uniform(1, 8))


def _forecourt(scenery: Scenery, span: tuple[float, float], side: int, front: float, setback: float) -> None:
    """What is between pavement and house: a boundary, bushes, trees, a drive."""
    rng, table = scenery.table.rng, scenery.table
    leaves = draw_leaves(table)
    if setback > 2.5:
        _boundary(scenery, span, side * (front + 0.4))
        for s in rng.uniform(*span, rng.poisson((span[1] - span[0]) / 9)):
            scenery.plant(s, side * (front + rng.uniform(1.2, setback)), rng.uniform(3.5, 8))
        if rng.random() < 0.7:
            s, width = rng.uniform(span[0] + 2, span[1] - 2), rng.uniform(2.6, 4.5)
            scenery.meshes.append(
                build_driveway(scenery.plan, scenery.bend, table, s, side, width, front + setback - 0.3)
            )
    if setback > 1.0:
        for s in np.arange(span[0] + 0.7, span[1] - 0.5, rng.uniform(1.0, 3.0)):
            if rng.random() < 0.55:
                bush = build_bush(table, leaves, rng.uniform(0.5, 1.5))
                scenery.place(bush, s, side * (front + setback - 0.55), rng.uniform(0, 6))


def _car_park(scenery: Scenery, span: tuple[float, float], side: int, front: float) -> None:
    rng = scenery.table.rng
    lot = CarPark(span, front + 0.9, front + rng.uniform(8, 15.5), side)
    scenery.car_parks.append(lot)
    scenery.meshes.append(build_lot(lot, scenery.bend, scenery.table))
    middle = (span[0] + span[1]) / 2
    scenery.meshes.append(build_driveway(scenery.plan, scenery.bend, scenery.table, middle, side, 5.0, lot.near + 0.5))
    _boundary(scenery, (span[0], middle - 3), side * (front + 0.4))
    _boundary(scenery, (middle + 3, span[1]), side * (front + 0.4))


def _garden(scenery: Scenery, span: tuple[float, float], side: int, d: tuple[float, float]) -> None:
    rng = scenery.table.rng
    leaves = draw_leaves(scenery.table)
    area = (span[1] - span[0]) * (d[1] - d[0])
    for _ in range(rng.poisson(area / 34)):
        scenery.plant(rng.uniform(*span), side * rng.uniform(*d), rng.uniform(4, 10))
    for _ in range(rng.poisson(area / 28)):
        bush = build_bush(scenery.table, leaves, rng.uniform(0.4, 1.8))
        scenery.place(bush, rng.uniform(*span), side * rng.uniform(*d), rng.uniform(0, 6))
    _boundary(scenery, span, side * (d[0] - 1.1))


def _boundary(scenery: Scenery, span: tuple[float, float], d: float) -> None:
    """A wall, picket fence, railing or hedge, in pieces that follow the bend, with a gate."""
    rng, table, bend = scenery.table.rng, scenery.table, scenery.bend
    kind = str(rng.choice(("wall", "pickets", "railing", "hedge", "none"), p=(0.18, 0.2, 0.2, 0.32, 0.1)))
    if kind == "none" or span[1] - span[0] < 1:
        return
    builder = MeshBuilder(MANMADE)
    leaves, material, trim = draw_leaves(table), table.draw(), table.draw(LAP)
    height, gate = rng.uniform(0.8, 1.9), rng.uniform(*span)
    for start in np.arange(span[0], span[1] - 0.5, 2.0):
        end = min(start + 2.0, span[1])
        if abs((start + end) / 2 - gate) < 1.6:
            continue
        a, b = bend.at(start, d, LOT_HEIGHT), bend.at(end, d, LOT_HEIGHT)
        yaw, length = float(np.arctan2(*(b - a)[1::-1])), float(np.linalg.norm(b - a))
        if kind == "hedge":
            build_hedge(builder, a, b, height, 0.7, leaves, rng)
        elif kind == "wall":
            builder.box((a + b) / 2 + [0, 0, height / 2 - 0.1], (length, 0.25, height + 0.2), trim, yaw)
            builder.box((a + b) / 2 + [0, 0, height + 0.04], (length, 0.34, 0.09), material, yaw)
        else:
            wide = 0.09 if kind == "pickets" else 0.03
            for z in (0.2, height - 0.1):
                builder.beam(a + [0, 0, z], b + [0, 0, z], 0.05, material)
            for share in np.arange(0.5, 13) / 13:
                foot = a + share * (b - a)
                builder.box(foot + [0, 0, height / 2], (wide, 0.03, height), material, yaw, filled=False)
            builder.beam(a, a + [0, 0, height + 0.12], 0.1, material)
    scenery.meshes.append(builder.build())


def _back_row(scenery: Scenery, side: int, block: tuple[float, float]) -> None:
    rng, s = scenery.table.rng, block[0]
    front = scenery.plan.front(side) + 17
    while s < block[1] - 8:
        width, depth = min(rng.uniform(12, 30), block[1] - s), rng.uniform(10, 14)
        if rng.random() < 0.65:
            house = build_house(scenery.table, width, depth, int(rng.integers(2, 12)))
            away = front + rng.uniform(0, 6) + depth / 2
            scenery.place(house, s + width / 2, side * away, 0.0 if side < 0 else np.pi)
        else:
            for x in np.arange(1, width, 5.0):
                scenery.plant(s + x, side * (front + rng.uniform(0, 6)), rng.uniform(6, 12))
        s += width + rng.uniform(0, 6)


def _furniture(scenery: Scenery, side: int, block: tuple[float, float]) -> None:
    """Lamps, street trees, rails, signs, bins, cabinets and posts in the band beside the kerb."""
    rng, table, plan = scenery.table.rng, scenery.table, scenery.plan
    d = side * (plan.kerb + 0.55)
    lamp, spacing = build_lamp(table, rng.uniform(5.5, 9)), rng.uniform(20, 34)
    for s in np.arange(block[0] + rng.uniform(1, 15), block[1], spacing):
        scenery.place(lamp, s, d, -side * np.pi / 2, 0.1)
    if rng.random() < 0.7:
        size, step = rng.uniform(4.5, 9), rng.uniform(6, 14)
        for s in np.arange(block[0] + rng.uniform(2, 8), block[1] - 2, step):
            if rng.random() < 0.85:
                scenery.plant(s + rng.uniform(-1, 1), d + 0.2 * side, size * rng.uniform(0.75, 1.25))
    if rng.random() < 0.3 and block[1] - block[0] > 16:
        start = rng.uniform(block[0] + 1, block[1] - 14)
        _rail(scenery, (start, start + rng.uniform(8, 30)), side * (plan.kerb + 0.3), block[1])
    makers = (build_sign, build_bin, build_post, build_kiosk, build_sign)
    for s in rng.uniform(*block, rng.poisson((block[1] - block[0]) / 8)):
        thing = makers[rng.choice(5, p=(0.34, 0.2, 0.18, 0.08, 0.2))](table)
        scenery.place(thing, s, d + side * rng.uniform(0, 0.3), rng.choice((0, np.pi)) + rng.normal(0, 0.1))


def _rail(scenery: Scenery, span: tuple[float, float], d: float, last: float) -> None:
    """A guard rail or a pedestrian railing along the kerb."""
    rng, bend, builder = scenery.table.rng, scenery.bend, MeshBuilder(MANMADE)
    steel = scenery.table.add(linear(np.full(3, rng.uniform(0.35, 0.7))), gloss=0.1)
    heights, bars = ((0.45, 0.62), 0) if rng.random() < 0.5 else ((0.25, 1.0), 8)
    for start in np.arange(span[0], min(span[1], last - 2), 2.0):
        a, b = bend.at(start, d, LOT_HEIGHT), bend.at(start + 2.0, d, LOT_HEIGHT)
        builder.beam(a, a + [0, 0, heights[1] + 0.1], 0.1, steel)
        for z in heights:
            builder.beam(a + [0, 0, z], b + [0, 0, z], 0.12 if not bars else 0.05, steel)
        for share in np.arange(bars) / max(bars, 1):
            foot = a + share * (b - a)
            builder.beam(foot + [0, 0, 0.2], foot + [0, 0, 1.0], 0.03, steel)
    scenery.meshes.append(builder.build())


def _wires(scenery: Scenery, side: int) -> None:
    """Wooden poles with cross-arms and sagging wires, on some streets."""
    rng, plan, bend, builder = scenery.table.rng, scenery.plan, scenery.bend, MeshBuilder(MANMADE)
    if rng.random() < 0.5:
        return
    wood = scenery.table.add(linear(np.array([0.36, 0.31, 0.27])), LAP, scale=0.2)
    black = scenery.table.add(linear(np.full(3, 0.1)))
    d, height = side * (plan.kerb + 1.0), rng.uniform(8, 10)
    places = np.arange(plan.start + rng.uniform(0, 20), plan.end, rng.uniform(28, 40))
    tops = [bend.at(s, d, height) for s in places]
    across = np.array([[-0.9], [0.0], [0.9]])
    for s, top in zip(places, tops, strict=True):
        builder.cylinder(bend.at(s, d, -0.2), top + [0, 0, 0.5], (0.16, 0.11), wood, sides=7)
        left = rotation_from_yaw(float(bend.yaw(s)))[:, 1]
        builder.beam(top - 1.1 * left, top + 1.1 * left, 0.12, wood)
    for (s0, a), (s1, b) in zip(zip(places, tops, strict=True), list(zip(places, tops, strict=True))[1:], strict=False):
        for offset in across[:, 0]:
            start = a + offset * rotation_from_yaw(float(bend.yaw(s0)))[:, 1]
            end = b + offset * rotation_from_yaw(float(bend.yaw(s1)))[:, 1]
            share = np.linspace(0, 1, 6)[:, None]
            line = start + share * (end - start) - [0, 0, 2.4] * share * (1 - share)
            for p, q in zip(line[:-1], line[1:], strict=True):
                builder.beam(p, q, 0.035, black)
    scenery.meshes.append(builder.build())


def _traffic_lights(scenery: Scenery, s: float, half: float) -> None:
    """Signals on poles with arms over the road, at both sides of a crossing."""
    rng, plan, table = scenery.table.rng, scenery.plan, scenery.table
    if rng.random() < 0.35:
        return
    steel, black = table.add(linear(np.full(3, rng.uniform(0.2, 0.5)))), table.add(linear(np.full(3, 0.12)))
    lamps = [table.add(linear(np.array(c)), glow=tuple(2 * np.array(c))) for c in ((0.9, 0.1, 0.05), (0.1, 0.8, 0.4))]
    for side in (-1, 1):
        builder, reach = MeshBuilder(MANMADE), rng.uniform(2.5, 5.5)
        builder.cylinder((0, 0, -0.2), (0, 0, 5.6), (0.11, 0.08), steel)
        builder.beam((0, 0, 5.5), (0, reach, 5.6), 0.1, steel)
        for place in ((0.0, reach, 5.2), (0.0, 0.0, 3.0)):
            builder.box(place, (0.3, 0.38, 1.0), black)
            for face in (-0.16, 0.16):
                for k, lamp in enumerate(lamps):
                    builder.box((face, place[1], place[2] + 0.32 - 0.64 * k), (0.02, 0.2, 0.2), lamp)
        yaw = 0.0 if side < 0 else np.pi
        scenery.place(builder.build(), s + side * (half + 3.2), side * (plan.kerb + 0.5), yaw, 0.1)


def _end_rows(scenery: Scenery) -> None:
    """Houses and trees across both ends of the main road, so that no view runs into nothing."""
    rng, plan, bend = scenery.table.rng, scenery.plan, scenery.bend
    for near, s, turn in ((plan.start, plan.start - 12, 0.0), (plan.end, plan.end + 12, np.pi)):
        ahead = rotation_from_yaw(float(bend.yaw(near)))[:, 0]
        for d in (-55, -28, 0, 28, 55):
            house = build_house(scenery.table, 26.0, 12.0, int(rng.integers(2, 8)))
            yaw = float(bend.yaw(near)) - np.pi / 2 + turn
            scenery.meshes.append(house.move(bend.at(near, d) + ahead * (s - near), yaw))
        for place in np.arange(-60, 61, 9.0):
            tree = scenery.trees[rng.integers(len(scenery.trees))].scale(rng.uniform(0.6, 1.3))
            if abs(place) > plan.kerb + 2:
                scenery.meshes.append(tree.move(bend.at(near, place), rng.uniform(0, 6)))


def join_scenery(scenery: Scenery) -> Mesh:
    """Return everything as one mesh."""
    return join(scenery.meshes)
