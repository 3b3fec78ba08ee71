"""What stands beside the road and never moves: buildings, walls, hedges, trees, lamps, signs, bins.

Everything is placed in the plan and set upright in the world.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import rotation_from_yaw
from occbev_training.simulator.materials import (
    FACADE,
    FOLIAGE,
    MaterialTable,
    draw_colour,
    linear,
    linear_hsv,
)
from occbev_training.simulator.mesh import Mesh, MeshBuilder, join
from occbev_training.simulator.street import MANMADE, VEGETATION, Bend, Plan

LOT_HEIGHT = 0.12
_FOUNDATION = 1.6
"""Buildings reach this far into the ground, so that a slope uncovers no gap below them."""


def build_scenery(plan: Plan, bend: Bend, table: MaterialTable) -> Mesh:
    """Build both sides of the street, and a second row that closes the view."""
    meshes: list[Mesh] = []
    style = table.rng.choice(("town", "suburb", "park"), size=2, p=(0.5, 0.3, 0.2))
    for side in (-1, 1):
        for start, end in blocks_between_crossings(plan):
            meshes += _front_row(plan, bend, table, side, (start, end), str(style[int(side > 0)]))
            meshes += _back_row(plan, bend, table, side, (start, end))
            meshes += _furniture(plan, bend, table, side, (start, end))
    meshes += _end_walls(plan, bend, table)
    return join(meshes)


def blocks_between_crossings(plan: Plan) -> list[tuple[float, float]]:
    edges = [plan.start]
    for c in plan.crossings:
        edges += [c.s - c.half - c.walk - 0.5, c.s + c.half + c.walk + 0.5]
    edges.append(plan.end)
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 6]


def place_mesh(mesh: Mesh, bend: Bend, s: float, d: float, z: float = LOT_HEIGHT, yaw: float = 0.0) -> Mesh:
    return mesh.move(bend.at(s, d, z), float(bend.yaw(s)) + yaw)


def _front_row(
    plan: Plan, bend: Bend, table: MaterialTable, side: int, block: tuple[float, float], style: str
) -> list[Mesh]:
    rng, meshes = table.rng, []
    front, s = plan.front(side), block[0] + rng.uniform(0, 2)
    setback = {
        "town": rng.uniform(0.2, 1.5),
        "suburb": rng.uniform(3, 7),
        "park": rng.uniform(8, 14),
    }[style]
    density = {"town": 0.92, "suburb": 0.75, "park": 0.25}[style]
    while s < block[1] - 6:
        width = min(rng.uniform(8, 22), block[1] - s)
        if rng.random() < density:
            floors = int(rng.integers(2, 7) if style == "town" else rng.integers(1, 4))
            depth, back = rng.uniform(8, 13), setback + rng.uniform(0, 0.6)
            building = _building(table, width, depth, floors)
            meshes.append(
                place_mesh(
                    building, bend, s + width / 2, side * (front + back + depth / 2), yaw=0.0 if side < 0 else np.pi
                )
            )
        else:
            meshes += _garden(bend, table, (s, s + width), side, (front + 1.5, front + 12))
        if setback > 2.5:
            meshes.append(_boundary(bend, table, (s, s + width), side * (front + 0.4)))
        s += width + (rng.uniform(0, 1.5) if style == "town" else rng.uniform(1, 8))
    return meshes


def _building(table: MaterialTable, width: float, depth: float, floors: int) -> Mesh:
    """A house with its front towards +y; facades carry windows, roofs are flat or gabled."""
    rng, builder = table.rng, MeshBuilder(MANMADE)
    height = floors * 3.1 + rng.uniform(0.2, 0.9)
    glass = (
        linear(np.array([0.2, 0.24, 0.28]) * rng.uniform(0.5, 1.6)) if rng.random() < 0.7 else draw_colour(rng) * 0.4
    )
    lit = tuple(np.array([1.0, 0.75, 0.4]) * rng.uniform(0.2, 1.0))
    wall = table.add(draw_colour(rng), FACADE, glass, float(rng.uniform(0.1, 0.9)), gloss=0.0, glow=lit)
    plain, roof = table.draw(), table.draw()
    side = wall if rng.random() < 0.6 else plain
    builder.box(
        (0, 0, height / 2),
        (width, depth, height),
        (wall, wall, side, side, roof, roof),
        filled=False,
    )
    builder.box((0, 0, -_FOUNDATION / 2), (width, depth, _FOUNDATION), plain, filled=False)
    if rng.random() < 0.4:
        _gable(builder, width, depth, height, rng.uniform(1.5, 3.5), roof)
    else:
        for y in (-depth / 2, depth / 2):
            builder.box((0, y, height + 0.25), (width, 0.25, 0.5), plain, filled=False)
    if rng.random() < 0.3:
        for z in np.arange(1, floors):
            builder.box(
                (rng.uniform(-0.3, 0.3) * width, depth / 2 + 0.5, z * 3.1 + 0.5),
                (2.6, 1.0, 1.0),
                plain,
                filled=False,
            )
    if rng.random() < 0.35:
        builder.box(
            (rng.uniform(-0.2, 0.2) * width, depth / 2 + 0.55, 2.9),
            (rng.uniform(2, 5), 1.1, 0.15),
            table.draw(),
            filled=False,
        )
    return builder.build()


def _gable(builder: MeshBuilder, width: float, depth: float, base: float, rise: float, roof: int) -> None:
    x, y = width / 2 + 0.3, depth / 2 + 0.3
    corners = [
        [-x, -y, base],
        [x, -y, base],
        [x, y, base],
        [-x, y, base],
        [-x, -0.05, base + rise],
        [x, -0.05, base + rise],
        [x, 0.05, base + rise],
        [-x, 0.05, base + rise],
    ]
    builder.solid(corners, roof, filled=False)


def _garden(bend: Bend, table: MaterialTable, s: tuple[float, float], side: int, d: tuple[float, float]) -> list[Mesh]:
    rng = table.rng
    number = int(rng.poisson((s[1] - s[0]) * (d[1] - d[0]) / 45))
    return [
        place_mesh(_tree(table, float(rng.uniform(3, 8))), bend, rng.uniform(*s), side * rng.uniform(*d))
        for _ in range(number)
    ]


def _boundary(bend: Bend, table: MaterialTable, s: tuple[float, float], d: float) -> Mesh:
    """A wall, fence or hedge along the front of a lot, in pieces that follow the bend; sometimes none."""
    rng, builder = table.rng, MeshBuilder(MANMADE)
    kind = rng.choice(("wall", "fence", "hedge", "none"), p=(0.3, 0.25, 0.25, 0.2))
    if kind == "none":
        return builder.build()
    material = table.draw() if kind != "hedge" else _foliage(table)
    height, thick = {
        "wall": (rng.uniform(0.6, 2.0), 0.25),
        "fence": (rng.uniform(0.9, 1.6), 0.08),
        "hedge": (rng.uniform(0.7, 1.6), 0.7),
    }[kind]
    gate = rng.uniform(*s)
    for start in np.arange(s[0], s[1] - 0.5, 2.0):
        end = min(start + 2.0, s[1])
        if abs((start + end) / 2 - gate) < 1.6:
            continue
        a, b = bend.at(start, d, LOT_HEIGHT), bend.at(end, d, LOT_HEIGHT)
        yaw, length = float(np.arctan2(*(b - a)[1::-1])), float(np.linalg.norm(b - a))
        if kind == "fence":
            _fence(builder, a, b, height, material)
        else:
            label = VEGETATION if kind == "hedge" else MANMADE
            # A piece is level; its foot stands a little in the ground, so that hills show no gap.
            builder.box(
                (a + b) / 2 + [0, 0, height / 2 - 0.1],
                (length, thick, height + 0.2),
                material,
                yaw,
                label,
            )
    return builder.build()


def _fence(
    builder: MeshBuilder,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    height: float,
    material: int,
) -> None:
    for z in (0.15, height):
        builder.beam(a + [0, 0, z], b + [0, 0, z], 0.05, material)
    for share in np.linspace(0, 1, 9):
        post = a + share * (b - a)
        builder.beam(post, post + [0, 0, height], 0.035 if 0 < share < 1 else 0.09, material)


def _back_row(plan: Plan, bend: Bend, table: MaterialTable, side: int, block: tuple[float, float]) -> list[Mesh]:
    rng, meshes, s = table.rng, [], block[0]
    front = plan.front(side) + 17
    while s < block[1] - 8:
        width, depth = min(rng.uniform(12, 30), block[1] - s), rng.uniform(10, 14)
        if rng.random() < 0.65:
            building = _building(table, width, depth, int(rng.integers(2, 10)))
            meshes.append(
                place_mesh(
                    building,
                    bend,
                    s + width / 2,
                    side * (front + rng.uniform(0, 6) + depth / 2),
                    yaw=0.0 if side < 0 else np.pi,
                )
            )
        else:
            meshes += [
                place_mesh(_tree(table, float(rng.uniform(6, 11))), bend, s + x, side * (front + rng.uniform(0, 6)))
                for x in np.arange(1, width, 6.0)
            ]
        s += width + rng.uniform(0, 6)
    return meshes


def _furniture(plan: Plan, bend: Bend, table: MaterialTable, side: int, block: tuple[float, float]) -> list[Mesh]:
    """Lamps, street trees, signs, bins and posts in the band beside the kerb."""
    rng, meshes = table.rng, []
    d = side * (plan.kerb + 0.55)
    lamp, spacing = build_lamp(table, rng.uniform(5.5, 9)), rng.uniform(20, 34)
    lamps = np.arange(block[0] + rng.uniform(1, 15), block[1], spacing)
    meshes += [place_mesh(lamp, bend, s, d, 0.1, yaw=-side * np.pi / 2) for s in lamps]
    if rng.random() < 0.55:
        size, step = rng.uniform(4, 8), rng.uniform(6, 14)
        places = np.arange(block[0] + rng.uniform(2, 8), block[1] - 2, step)
        places = places[rng.random(len(places)) < 0.8] + rng.uniform(-1, 1)
        trees = [_tree(table, size * rng.uniform(0.8, 1.2)) for _ in places]
        meshes += [place_mesh(tree, bend, s, d + 0.2 * side) for tree, s in zip(trees, places, strict=True)]
    for s in rng.uniform(*block, int(rng.poisson((block[1] - block[0]) / 12))):
        thing = rng.choice(4)
        mesh = (
            (build_sign, build_bin, build_post, build_kiosk)[thing](table)
            if thing < 3 or rng.random() < 0.3
            else build_sign(table)
        )
        meshes.append(
            place_mesh(
                mesh,
                bend,
                float(s),
                d + side * rng.uniform(0, 0.3),
                0.12,
                yaw=rng.choice((0, np.pi)) + rng.normal(0, 0.1),
            )
        )
    return meshes


def _foliage(table: MaterialTable) -> int:
    """Leaves: mostly greens and autumn tones, at times any colour at all."""
    rng = table.rng
    if rng.random() < 0.2:
        return table.draw(FOLIAGE)
    colour = linear_hsv(rng.uniform(0.06, 0.36), rng.uniform(0.3, 0.75), rng.uniform(0.2, 0.6))
    return table.add(colour, FOLIAGE, scale=0.5)


def _tree(table: MaterialTable, height: float) -> Mesh:
    rng, builder = table.rng, MeshBuilder(VEGETATION)
    bark = table.add(
        linear_hsv(rng.uniform(0.04, 0.1), rng.uniform(0.1, 0.5), rng.uniform(0.15, 0.45)),
        FOLIAGE,
        scale=0.4,
    )
    leaf, trunk, crown = (
        _foliage(table),
        height * rng.uniform(0.28, 0.4),
        height * rng.uniform(0.24, 0.34),
    )
    lean = rng.normal(0, 0.05 * height, 2)
    top = np.array([*lean, height * 0.75])
    builder.cylinder((0, 0, -0.1), top, (0.035 * height * rng.uniform(0.7, 1.2), 0.05), bark, sides=7)
    if rng.random() < 0.15:  # a conifer
        for z, share in ((0.3, 1.0), (0.5, 0.75), (0.7, 0.45)):
            builder.cylinder((0, 0, z * height), (0, 0, (z + 0.3) * height), (crown * share, 0.05), leaf, sides=9)
        return builder.build()
    for _ in range(int(rng.integers(4, 8))):
        offset = rng.normal(0, 0.42, 3) * crown
        radii = crown * rng.uniform(0.5, 0.85) * np.array([1, 1, rng.uniform(0.7, 1.0)])
        z = max(trunk + radii[2] * 0.7, height - crown + offset[2] * 0.8)
        builder.blob((lean[0] + offset[0], lean[1] + offset[1], z), radii, leaf, rng, roughness=0.3, detail=2)
    return builder.build()


def build_lamp(table: MaterialTable, height: float) -> Mesh:
    builder, paint = MeshBuilder(MANMADE), table.draw()
    light = table.add(linear(np.full(3, 0.8)), glow=(2.5, 2.1, 1.4))
    builder.cylinder((0, 0, -0.1), (0, 0, height), (0.1, 0.06), paint)
    builder.beam((0, 0, height), (1.6, 0, height + 0.25), 0.09, paint)
    builder.box((1.7, 0, height + 0.2), (0.6, 0.22, 0.12), (paint,) * 5 + (light,))
    return builder.build()


def build_sign(table: MaterialTable) -> Mesh:
    builder, rng = MeshBuilder(MANMADE), table.rng
    height, size = rng.uniform(2.1, 2.8), rng.uniform(0.5, 0.8)
    builder.cylinder((0, 0, -0.1), (0, 0, height), (0.035, 0.035), table.draw(), sides=6)
    if rng.random() < 0.5:
        builder.cylinder((-0.04, 0, height), (-0.08, 0, height), (size / 2, size / 2), table.draw(), sides=12)
    else:
        builder.box((-0.06, 0, height), (0.03, size, size * rng.uniform(0.7, 1.3)), table.draw())
    return builder.build()


def build_bin(table: MaterialTable) -> Mesh:
    builder, rng = MeshBuilder(MANMADE), table.rng
    width, height = rng.uniform(0.4, 1.2), rng.uniform(0.7, 1.3)
    builder.frustum(
        (-0.3, 0.3, -width / 2, width / 2, 0),
        (-0.34, 0.34, -width / 2, width / 2, height),
        table.draw(),
    )
    return builder.build()


def build_post(table: MaterialTable) -> Mesh:
    builder = MeshBuilder(MANMADE)
    for x in np.arange(0, table.rng.integers(1, 5)) * 1.4:
        builder.cylinder((x, 0, -0.1), (x, 0, 0.95), (0.06, 0.06), table.draw(), sides=7)
    return builder.build()


def build_kiosk(table: MaterialTable) -> Mesh:
    """A shelter: roof, back wall and bench."""
    builder, paint = MeshBuilder(MANMADE), table.draw()
    builder.box((0, 0.0, 2.4), (3.6, 1.5, 0.12), paint)
    builder.box((0, 0.7, 1.2), (3.6, 0.06, 2.2), table.draw())
    builder.box((0, 0.45, 0.45), (2.6, 0.4, 0.08), paint)
    for x in (-1.7, 1.7):
        builder.beam((x, -0.6, -0.1), (x, -0.6, 2.4), 0.08, paint)
    return builder.build()


def _end_walls(plan: Plan, bend: Bend, table: MaterialTable) -> list[Mesh]:
    """Buildings across both ends of the main road and beside them, so that no view runs into nothing."""
    meshes = []
    for s, turn in ((plan.start - 12, 0.0), (plan.end + 12, np.pi)):
        for d in (-55, -28, 0, 28, 55):
            building = _building(table, 26.0, 12.0, int(table.rng.integers(2, 7)))
            near = plan.start if s < plan.start else plan.end
            shift = rotation_from_yaw(float(bend.yaw(near)))[:, 0] * (s - near)
            meshes.append(building.move(bend.at(near, d) + shift, float(bend.yaw(near)) - np.pi / 2 + turn))
    return meshes
