"""Houses of world v2, with relief: windows stand back behind piers and bands, and cornices, columns, balconies, shop
fronts, signs and pipes stand out.

A house is built in its own frame: front towards +y, origin at the middle of its ground.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev_training.simulator.materials import (
    BRICK,
    LAP,
    NOISE,
    PANES,
    PLAIN,
    SLABS,
    SPECKLE,
    STRIPES,
    MaterialTable,
    linear,
)
from occbev_training.simulator.mesh import Mesh, MeshBuilder
from occbev_training.simulator.street import MANMADE

FOUNDATION = 1.6
"""Houses reach this far into the ground, so that a slope uncovers no gap below them."""


@dataclass(frozen=True)
class Style:
    """What all fronts of one house share: metres, shares of a bay or floor, and rows of the material table.

    pier: share of a bay that is wall. sill, lintel: share of a floor below and above a window. out: how far columns and
    bands stand out.
    """

    bay: float
    floor: float
    recess: float
    pier: float
    sill: float
    lintel: float
    out: float
    wall: int
    trim: int
    glass: int
    dark: int


@dataclass(frozen=True)
class Front:
    """One side of a house: lower left corner seen from outside, unit direction to the right, outward normal, size."""

    corner: NDArray[np.float64]
    along: NDArray[np.float64]
    out: NDArray[np.float64]
    width: float
    height: float

    def at(self, u: ArrayLike, v: ArrayLike, w: ArrayLike) -> NDArray[np.float64]:
        """Points (..., 3) at u to the right, v up and w outwards."""
        u, v, w = np.broadcast_arrays(np.asarray(u, float), np.asarray(v, float), np.asarray(w, float))
        up = np.array([0.0, 0.0, 1.0])
        return self.corner + u[..., None] * self.along + v[..., None] * up + w[..., None] * self.out


def build_house(table: MaterialTable, width: float, depth: float, floors: int) -> Mesh:
    """A house of (width, depth) metres with so many floors."""
    rng, builder = table.rng, MeshBuilder(MANMADE)
    style = _draw_style(table, floors)
    height = floors * style.floor + rng.uniform(0.3, 0.9)
    fronts = _fronts(width, depth, height)
    shops = floors > 1 and rng.random() < 0.6
    for number, front in enumerate(fronts[:3]):
        _add_front(builder, front, style, floors)
        if number == 0 and shops:
            _add_shops(builder, front, style, table)
        if number == 0 or rng.random() < 0.3:
            _add_ornaments(builder, front, style, table, floors, shops)
    back = fronts[3]
    builder.quads(_sheet(back, [0], [width], [0], [height], 0.0), style.wall)
    for corner in (0, width):  # closes the edge between two fronts
        foot = fronts[0].at(corner, 0, -style.recess)
        builder.beam(foot, foot + [0, 0, height], 2 * style.recess, style.wall)
    roof = table.add(table.draw_colour(), SPECKLE, scale=0.4)
    builder.quads([fronts[0].at([0, width, width, 0], height, [0, 0, -depth, -depth])], roof)
    builder.box((0, 0, -FOUNDATION / 2), (width, depth, FOUNDATION), style.dark, filled=False)
    _add_roof(builder, table, style, (width, depth, height), floors)
    return builder.build()


def _draw_style(table: MaterialTable, floors: int) -> Style:
    rng = table.rng
    kind = rng.choice(("masonry", "tower", "ribbon"), p=(0.7, 0.15, 0.15) if floors > 2 else (0.9, 0.0, 0.1))
    texture = int(rng.choice((BRICK, SLABS, LAP, NOISE, PLAIN), p=(0.38, 0.22, 0.2, 0.1, 0.1)))
    scale = {BRICK: 0.45, LAP: 0.25, SLABS: 1.0}.get(texture, 0.6) * rng.uniform(0.8, 1.4)
    colour = table.draw_colour()
    wall = table.add(colour, texture, colour * rng.uniform(0.4, 0.8), float(scale))
    trim = table.add(np.clip(colour * rng.uniform(1.3, 2.2), 0.02, 0.85), SPECKLE, scale=0.3)
    tint = linear(np.array([0.22, 0.26, 0.28]) * rng.uniform(0.7, 1.5))
    frame = linear(np.full(3, rng.choice((0.15, 0.85)))) if rng.random() < 0.8 else table.draw_colour()
    lit = tuple(np.array([1.0, 0.75, 0.4]) * rng.uniform(0.3, 1.0))
    glass = table.add(tint, PANES, frame, 1.0, gloss=float(rng.uniform(0.5, 0.95)), glow=lit)
    dark = table.add(colour * 0.5, SLABS, scale=0.8)
    if kind == "tower":
        pier, sill, lintel, recess, out = 0.08, 0.06, 0.04, 0.08, 0.1
    elif kind == "ribbon":
        pier, sill, lintel, recess, out = 0.1, 0.3, 0.14, 0.18, 0.08
    else:
        pier, sill, lintel = rng.uniform(0.38, 0.6), rng.uniform(0.22, 0.34), rng.uniform(0.1, 0.2)
        recess, out = rng.uniform(0.14, 0.4), rng.uniform(0.05, 0.2)
    bay, floor = rng.uniform(1.5, 3.2), rng.uniform(2.9, 3.5)
    return Style(
        bay, floor, float(recess), float(pier), float(sill), float(lintel), float(out), wall, trim, glass, dark
    )


def _fronts(width: float, depth: float, height: float) -> list[Front]:
    """Front, left, right and rear side."""
    x, y = width / 2, depth / 2
    corners = ((x, y), (-x, y), (x, -y), (-x, -y))
    ways = ((-1, 0), (0, -1), (0, 1), (1, 0))
    outs = ((0, 1), (-1, 0), (1, 0), (0, -1))
    return [
        Front(np.array([*c, 0.0]), np.array([*a, 0.0]), np.array([*o, 0.0]), width if a[0] else depth, height)
        for c, a, o in zip(corners, ways, outs, strict=True)
    ]


def _sheet(
    front: Front, u0: ArrayLike, u1: ArrayLike, v0: ArrayLike, v1: ArrayLike, w: ArrayLike
) -> NDArray[np.float64]:
    """Rectangles (Q, 4, 3) parallel to a front."""
    u0, u1, v0, v1, w = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, float)) for x in (u0, u1, v0, v1, w)))
    u, v = np.stack([u0, u1, u1, u0], -1), np.stack([v0, v0, v1, v1], -1)
    return front.at(u, v, w[:, None])


def _bars(
    builder: MeshBuilder,
    front: Front,
    span: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
    depth: tuple[float, float],
    material: int,
) -> None:
    """Add boxes that stand on a front: u0, u1, v0, v1 of each, and how far their rear and front faces stand out."""
    u0, u1, v0, v1 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, float)) for x in span))
    w0, w1 = depth
    face = np.stack([np.stack([u0, u1, u1, u0], -1), np.stack([v0, v0, v1, v1], -1)], -1)
    builder.quads(front.at(face[..., 0], face[..., 1], w1), material, uv=face)
    rim = np.array([w0, w0, w1, w1])
    flat = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * [1.0, w1 - w0]
    for v in (v0, v1):
        u = np.stack([u0, u1, u1, u0], -1)
        uv = np.stack([u, np.broadcast_to(rim, u.shape)], -1)
        builder.quads(front.at(u, v[:, None], rim), material, uv=uv)
    for u_side in (u0, u1):
        v = np.stack([v0, v1, v1, v0], -1)
        builder.quads(front.at(u_side[:, None], v, rim), material, uv=np.broadcast_to(flat, (*v.shape, 2)))


def _add_front(builder: MeshBuilder, front: Front, style: Style, floors: int) -> None:
    """Glass in a plane that stands back; piers and bands before it leave the windows open."""
    bays = max(1, round(front.width / style.bay))
    bay, top = front.width / bays, floors * style.floor
    cells = np.array([[0, 0], [bays, 0], [bays, floors], [0, floors]], float)
    builder.quads(_sheet(front, [0], [front.width], [0], [top], -style.recess), style.glass, uv=cells)
    half = style.pier * bay / 2
    middle = np.arange(bays + 1) * bay
    u0, u1 = np.maximum(middle - half, 0), np.minimum(middle + half, front.width)
    _bars(builder, front, (u0, u1, 0.0, front.height), (-style.recess, 0.0), style.wall)
    level = np.arange(floors + 1) * style.floor
    v0 = np.maximum(level - style.lintel * style.floor, 0)
    v1 = np.minimum(level + style.sill * style.floor, front.height)
    v1[-1] = front.height
    _bars(builder, front, (0.0, front.width, v0, v1), (-style.recess, 0.0), style.wall)


def _add_ornaments(
    builder: MeshBuilder, front: Front, style: Style, table: MaterialTable, floors: int, shops: bool
) -> None:
    """Sills, bands, a cornice, columns, balconies, pipes."""
    rng = table.rng
    bays = max(1, round(front.width / style.bay))
    bay = front.width / bays
    level = np.arange(1, floors) * style.floor
    if rng.random() < 0.6 and len(level):
        high = level + style.sill * style.floor
        _bars(builder, front, (0.0, front.width, high - 0.12, high), (0.0, style.out), style.trim)
    if rng.random() < 0.5 and len(level):
        low = level - style.lintel * style.floor
        half = (1 - style.pier) * bay / 2 + 0.12
        u, v = (x.ravel() for x in np.meshgrid((np.arange(bays) + 0.5) * bay, low))
        _bars(builder, front, (u - half, u + half, v, v + 0.25), (0.0, 0.5 * style.out), style.trim)
    _bars(builder, front, (0.0, front.width, front.height - 0.45, front.height), (0.0, style.out + 0.2), style.trim)
    _bars(builder, front, (0.0, front.width, 0.0, 0.5), (0.0, 0.05), style.dark)
    if rng.random() < 0.4:
        middle = np.arange(0, bays + 1, rng.integers(1, 4)) * bay
        u0, u1 = np.clip(middle - 0.3, 0, None), np.clip(middle + 0.3, None, front.width)
        _bars(builder, front, (u0, u1, 0.0, front.height), (0.0, style.out + 0.1), style.trim)
    if rng.random() < 0.45:
        _add_balconies(builder, front, style, table, floors, shops)
    pipe = table.add(linear(np.full(3, rng.uniform(0.2, 0.6))))
    for u in rng.uniform(0.3, front.width - 0.3, int(rng.integers(0, 3))):
        _bars(builder, front, (u, u + 0.1, 0.0, front.height), (0.0, 0.12), pipe)


def _add_balconies(
    builder: MeshBuilder, front: Front, style: Style, table: MaterialTable, floors: int, shops: bool
) -> None:
    rng = table.rng
    bays = max(1, round(front.width / style.bay))
    bay, rail = front.width / bays, table.add(linear(np.full(3, rng.uniform(0.08, 0.8))))
    columns = np.flatnonzero(rng.random(bays) < 0.45)
    if not len(columns) or floors < 2:
        return
    u, v = (x.ravel() for x in np.meshgrid((columns + 0.5) * bay, np.arange(1, floors) * style.floor))
    half, out = min(bay * 0.48, 1.6), rng.uniform(0.7, 1.3)
    _bars(builder, front, (u - half, u + half, v + 0.05, v + 0.25), (0.0, out), style.trim)
    _bars(builder, front, (u - half, u + half, v + 1.15, v + 1.22), (out - 0.06, out), rail)
    steps = np.linspace(-half, half, 9)
    posts_u, posts_v = (x.ravel() for x in (u[:, None] + steps, np.repeat(v[:, None], len(steps), 1)))
    _bars(builder, front, (posts_u - 0.03, posts_u + 0.03, posts_v + 0.25, posts_v + 1.2), (out - 0.05, out), rail)


def _add_shops(builder: MeshBuilder, front: Front, style: Style, table: MaterialTable) -> None:
    """A shop front along the ground floor: wide panes, a board with letters, awnings, doors."""
    rng = table.rng
    board = style.floor * (1 - style.lintel)
    glass = table.add(
        linear(np.array([0.25, 0.28, 0.28])), PANES, linear(np.full(3, 0.12)), 1.0, gloss=0.8, glow=(1, 0.9, 0.7)
    )
    start = 0.3
    while start < front.width - 2.5:
        width = min(rng.uniform(3, 8), front.width - start - 0.3)
        panes = np.array([[0, 0], [1, 0], [1, 0.99], [0, 0.99]]) * [max(1, round(width / 1.6)), 1]
        builder.quads(_sheet(front, [start], [start + width], [0.45], [board], 0.02), glass, uv=panes)
        sign, ink = table.draw(PLAIN), table.draw(PLAIN)
        end = start + width
        _bars(builder, front, (start, end, board, board + 0.7), (0.0, 0.18), sign)
        letters = np.arange(start + 0.4, start + width * rng.uniform(0.5, 0.9), 0.42)
        tall = rng.uniform(0.2, 0.5, len(letters))
        _bars(
            builder,
            front,
            (letters, letters + rng.uniform(0.08, 0.32, len(letters)), board + 0.12, board + 0.12 + tall),
            (0.18, 0.22),
            ink,
        )
        door = start + rng.uniform(0.2, 0.7) * width
        _bars(builder, front, (door, door + 1.0, 0.0, 2.3), (0.0, 0.06), table.draw(PLAIN))
        if rng.random() < 0.4:
            u = np.array([start, end, end, start])
            cloth = table.draw(STRIPES)
            builder.quads([front.at(u, [board - 0.75, board - 0.75, board, board], [1.3, 1.3, 0.1, 0.1])], cloth)
            _bars(builder, front, (start, end, board - 1.0, board - 0.75), (1.28, 1.3), cloth)
        if rng.random() < 0.5:  # a sign across the pavement
            u0 = start + rng.uniform(0, width)
            _bars(builder, front, (u0, u0 + 0.12, board + 0.8, board + 2.0), (0.15, 1.0), table.draw(PLAIN))
        start = end + rng.uniform(0.2, 0.8)


def _add_roof(
    builder: MeshBuilder, table: MaterialTable, style: Style, size: tuple[float, float, float], floors: int
) -> None:
    rng, (width, depth, height) = table.rng, size
    if floors < 4 and rng.random() < 0.5:
        rise, x, y = rng.uniform(1.5, 3.5), width / 2 + 0.4, depth / 2 + 0.5
        tiles = table.add(table.draw_colour() * 0.7, LAP, scale=0.3)
        low = [[-x, -y], [x, -y], [x, y], [-x, y]]
        high = [[-x, -0.05], [x, -0.05], [x, 0.05], [-x, 0.05]]
        corners = [[*p, height] for p in low] + [[*p, height + rise] for p in high]
        builder.solid(corners, (tiles, tiles, style.wall, style.wall, tiles, tiles), filled=False)
        builder.box((rng.uniform(-0.3, 0.3) * width, 0.5, height + rise), (0.8, 0.8, 1.6), style.trim, filled=False)
        return
    for y in (-depth / 2 + 0.1, depth / 2 - 0.1):
        builder.box((0, y, height + 0.3), (width, 0.2, 0.6), style.trim, filled=False)
    for _ in range(int(rng.integers(1, 5))):
        place = rng.uniform(-0.35, 0.35, 2) * (width, depth)
        box = rng.uniform((0.8, 0.8, 0.8), (3.5, 3.0, 2.4))
        builder.box((*place, height + box[2] / 2), box, table.draw(LAP), filled=False)
