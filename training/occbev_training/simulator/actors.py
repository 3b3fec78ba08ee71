"""Shapes of everything that gets a box: vehicles, two-wheelers, people, cones and barriers.

A shape stands in its own frame: x forward, z up, origin below the middle of its box on the ground.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from occbev.classes import DETECTION_CLASSES, OCCUPANCY_OF_DETECTION
from occbev_training.simulator.materials import PLAIN, MaterialTable, draw_colour, linear
from occbev_training.simulator.mesh import Mesh, MeshBuilder


@dataclass(frozen=True)
class Shape:
    """A body and the box that just holds it. size: l, w, h. label: index into DETECTION_CLASSES."""

    mesh: Mesh
    size: tuple[float, float, float]
    label: int


@dataclass(frozen=True)
class Trim:
    """Material rows of the small parts that cars of world v2 have: rims and handles, plates, gaps and grilles."""

    metal: int
    plate: int
    gap: int


@dataclass(frozen=True)
class Parts:
    """Material rows that vehicles share: dark rubber and metal, glass, lamps; trim where cars have small parts."""

    rubber: int
    glass: int
    front_lamp: int
    rear_lamp: int
    trim: Trim | None = None

    def add_trim(self, table: MaterialTable) -> Parts:
        """Return the same parts and those of the trim."""
        greys = (linear(np.full(3, grey)) for grey in (0.62, 0.85, 0.1))
        metal, plate, gap = (table.add(grey, gloss=gloss) for grey, gloss in zip(greys, (0.2, 0, 0), strict=True))
        return replace(self, trim=Trim(metal, plate, gap))

    @classmethod
    def create(cls, table: MaterialTable) -> Parts:
        """Add the shared materials of one street to its table."""
        grey = linear(np.full(3, table.rng.uniform(0.1, 0.25)))
        glass = linear(np.array([0.16, 0.19, 0.22]) * table.rng.uniform(0.5, 1.5))
        white, red = linear(np.array([0.8, 0.8, 0.75])), linear(np.array([0.6, 0.08, 0.06]))
        return cls(
            table.add(grey),
            table.add(glass, gloss=0.5),
            table.add(white, gloss=0.3, glow=(1.6, 1.5, 1.2)),
            table.add(red, gloss=0.2, glow=(0.9, 0.05, 0.03)),
        )


def build_shape(name: str, table: MaterialTable, parts: Parts) -> Shape:
    """Draw one shape of a detection class; its mesh touches all sides of its box."""
    label = DETECTION_CLASSES.index(name)
    builder = MeshBuilder(OCCUPANCY_OF_DETECTION[label])
    _SHAPES[name](builder, table, parts, table.rng)
    return _make_box(builder.build(), label)


def ego_body() -> Mesh:
    """The vehicle that carries the sensors, in base_link: what its own LiDAR sees of it."""
    builder = MeshBuilder()
    builder.frustum((-0.95, 3.75, -0.92, 0.92, 0.3), (-0.9, 3.6, -0.85, 0.85, 0.95), 0)
    builder.frustum((-0.8, 2.6, -0.85, 0.85, 0.95), (-0.6, 1.6, -0.68, 0.68, 1.5), 0)
    return builder.build()


def _make_box(mesh: Mesh, label: int) -> Shape:
    """Shift a mesh so that its bounds are centred over the origin and stand on the ground."""
    low, high = mesh.triangles.min((0, 1)), mesh.triangles.max((0, 1))
    shift = np.array([-(low[0] + high[0]) / 2, -(low[1] + high[1]) / 2, -low[2]])
    length, width, height = (float(v) for v in high - low)
    return Shape(mesh.move(shift, 0.0), (length, width, height), label)


def _wheels(builder: MeshBuilder, parts: Parts, axles: list[float], width: float, radius: float) -> None:
    for x in axles:
        for side in (-1, 1):
            outer = side * width / 2
            builder.cylinder(
                (x, outer - side * 0.24, radius),
                (x, outer, radius),
                (radius, radius),
                parts.rubber,
                sides=10,
            )


def _lamps(builder: MeshBuilder, parts: Parts, length: float, width: float, z: float) -> None:
    for side in (-1, 1):
        y = side * (width / 2 - 0.28)
        builder.box((length / 2 - 0.04, y, z), (0.1, 0.36, 0.15), parts.front_lamp)
        builder.box((-length / 2 + 0.04, y, z + 0.06), (0.1, 0.3, 0.18), parts.rear_lamp)


def _car(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    kind = rng.choice(("sedan", "hatch", "van", "pickup"), p=(0.4, 0.3, 0.17, 0.13))
    length, width, height = _CAR_SIZE[kind] * rng.uniform(0.93, 1.07, 3)
    paint = table.draw(PLAIN) if rng.random() < 0.8 else table.draw()
    belt, radius, half = height * rng.uniform(0.54, 0.6), rng.uniform(0.3, 0.37), length / 2
    nose = rng.uniform(0.2, 0.25) * length if kind != "van" else 0.14 * length
    side = width / 2
    builder.frustum(
        (-half, half - nose, -side, side, 0.22),
        (-half * 0.98, half - nose, -side * 0.95, side * 0.95, belt),
        paint,
    )
    _hood(builder, half - nose, half, side, belt, paint)
    _cabin(builder, kind, (length, width, height), belt, paint, parts)
    _wheels(builder, parts, [-0.3 * length, 0.31 * length], width + 0.02, radius)
    _lamps(builder, parts, length, width, belt * 0.78)
    for y in (-side, side):
        builder.box((half - nose - 0.35, y, belt + 0.06), (0.16, 0.14, 0.13), paint)
    builder.box((-half + 0.02, 0, 0.42), (0.08, width * 0.9, 0.22), parts.rubber)
    if parts.trim is not None:
        _trim_car(builder, kind, (length, width, height), belt, radius, parts.trim)


def _trim_car(
    builder: MeshBuilder, kind: str, size: tuple[float, float, float], belt: float, radius: float, trim: Trim
) -> None:
    """Add rims, gaps of doors, handles, sills, window posts, number plates and a grille."""
    length, width, height = size
    half, side = length / 2, width / 2
    rear, front, rear_top, front_top = (v * length for v in _CABIN[kind])
    for y in (-1, 1):
        for x in (-0.3 * length, 0.31 * length):
            outer = y * (side + 0.01)
            builder.cylinder(
                (x, outer, radius), (x, outer + 0.012 * y, radius), (0.62 * radius,) * 2, trim.metal, sides=10
            )
        for x in (0.16 * length, -0.05 * length, -0.24 * length):
            builder.beam((x, y * side * 1.003, 0.28), (x, y * side * 0.955, belt), 0.022, trim.gap)
        for x in (0.0, -0.2 * length):
            builder.box((x, y * side * 0.975, belt - 0.13), (0.17, 0.04, 0.03), trim.metal)
        builder.beam((-half * 0.9, y * side, 0.27), (0.22 * length, y * side, 0.27), 0.07, trim.gap)
        builder.beam((rear, y * side * 0.95, belt), (front, y * side * 0.95, belt), 0.03, trim.metal)
        middle, top = (rear + front) / 2, (rear_top + front_top) / 2
        builder.beam((middle, y * width * 0.477, belt), (top, y * width * 0.39, height - 0.04), 0.07, trim.gap)
    for x in (-half - 0.02, half - 0.01):
        builder.box((x, 0, 0.45), (0.03, 0.5, 0.12), trim.plate)
    builder.box((half - 0.03, 0, 0.6), (0.06, width * 0.52, 0.14), trim.gap)
    builder.box((half - 0.03, 0, 0.32), (0.08, width * 0.7, 0.1), trim.gap)
    for x in (-half * 0.93, -half * 0.7):
        builder.beam((x, -side * 0.85, belt + 0.004), (x, side * 0.85, belt + 0.004), 0.014, trim.gap)


def _hood(builder: MeshBuilder, x0: float, x1: float, side: float, belt: float, paint: int) -> None:
    corners = [
        [x0, -side, 0.22],
        [x1, -side * 0.9, 0.25],
        [x1, side * 0.9, 0.25],
        [x0, side, 0.22],
        [x0, -side * 0.95, belt],
        [x1 - 0.05, -side * 0.85, belt * 0.8],
        [x1 - 0.05, side * 0.85, belt * 0.8],
        [x0, side * 0.95, belt],
    ]
    builder.solid(corners, paint)


def _cabin(
    builder: MeshBuilder,
    kind: str,
    size: tuple[float, float, float],
    belt: float,
    paint: int,
    parts: Parts,
) -> None:
    """Greenhouse: painted pillars and roof with glass set into the four sides."""
    length, width, height = size
    rear, front, rear_top, front_top = (v * length for v in _CABIN[kind])
    low = (rear, front, -width * 0.47, width * 0.47, belt)
    high = (rear_top, front_top, -width * 0.38, width * 0.38, height)
    builder.frustum(low, high, paint)
    corners = np.array(
        [[x, y, r[4]] for r in (low, high) for x, y in ((r[0], r[2]), (r[1], r[2]), (r[1], r[3]), (r[0], r[3]))]
    )
    middle = corners.mean(0)
    for face in ((0, 1, 5, 4), (2, 3, 7, 6), (1, 2, 6, 5), (3, 0, 4, 7)):
        quad = corners[list(face)]
        inset = quad.mean(0) + (quad - quad.mean(0)) * np.array([0.86, 0.86, 0.8])
        normal = np.cross(quad[1] - quad[0], quad[3] - quad[0])
        normal *= np.sign(normal @ (quad.mean(0) - middle)) / np.linalg.norm(normal)
        builder.quads(inset + 0.012 * normal, parts.glass)


def _truck(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    length, width, height = rng.uniform(5.8, 9.5), rng.uniform(2.2, 2.6), rng.uniform(2.6, 3.7)
    cab, half, side = rng.uniform(1.6, 2.1), length / 2, width / 2
    top = min(height, rng.uniform(2.3, 2.8))
    paint, cargo = table.draw(), table.draw()
    builder.frustum(
        (half - cab, half, -side * 0.95, side * 0.95, 0.45),
        (half - cab, half - 0.25, -side * 0.9, side * 0.9, top),
        paint,
    )
    builder.quads(
        [
            [
                [half - 0.08, -side * 0.8, 1.4],
                [half - 0.08, side * 0.8, 1.4],
                [half - 0.2, side * 0.78, top - 0.3],
                [half - 0.2, -side * 0.78, top - 0.3],
            ]
        ],
        parts.glass,
    )
    for s in (-1, 1):
        builder.box((half - cab * 0.55, s * side * 0.93, 1.75), (cab * 0.6, 0.05, 0.6), parts.glass)
        builder.box((half - 0.15, s * (side + 0.12), 1.9), (0.12, 0.2, 0.4), parts.rubber)
    if rng.random() < 0.75:
        builder.box(
            ((-half + half - cab - 0.12) / 2, 0, (height + 0.85) / 2),
            (length - cab - 0.12, width, height - 0.85),
            cargo,
        )
    else:
        builder.box((-cab / 2, 0, 1.2), (length - cab - 0.12, width, 0.75), cargo)
    builder.box((-0.3, 0, 0.72), (length - 0.8, width * 0.5, 0.25), parts.rubber)
    _wheels(
        builder,
        parts,
        [half - cab * 0.55, -half + 1.2, -half + 2.3][: 3 if length > 7.5 else 2],
        width,
        0.47,
    )
    _lamps(builder, parts, length, width, 0.8)


def _bus(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    length, width, height = rng.uniform(9.5, 12.5), rng.uniform(2.45, 2.65), rng.uniform(2.9, 3.4)
    half, side, paint = length / 2, width / 2, table.draw()
    builder.frustum(
        (-half, half, -side, side, 0.35),
        (-half * 0.99, half * 0.98, -side * 0.97, side * 0.97, height),
        paint,
    )
    low, high = 1.25, height - 0.55
    for s in (-1, 1):
        for x in np.arange(-half + 0.5, half - 1.2, 1.45):
            builder.box(
                (x + 0.65, s * (side - 0.01), (low + high) / 2),
                (1.25, 0.05, high - low),
                parts.glass,
            )
        builder.box((s * (half - 0.04), 0, 1.75), (0.08, width * 0.88, 1.4), parts.glass)
    _wheels(builder, parts, [half - 2.4, -half + 2.8], width + 0.02, 0.48)
    _lamps(builder, parts, length, width, 0.75)


def _trailer(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    length, width, height = rng.uniform(5.0, 11.0), rng.uniform(2.1, 2.6), rng.uniform(2.4, 3.8)
    floor = rng.uniform(0.8, 1.1)
    builder.box((0, 0, (height + floor) / 2), (length, width, height - floor), table.draw())
    builder.beam((length / 2, 0, 0.6), (length / 2 + 1.2, 0, 0.55), 0.18, parts.rubber)
    builder.box((0, 0, floor - 0.15), (length * 0.95, width * 0.5, 0.3), parts.rubber)
    _wheels(builder, parts, [-length / 2 + 1.0, -length / 2 + 2.1], width, 0.45)


def _construction_vehicle(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    paint, arm = table.draw(), table.draw()
    turn = rng.uniform(-0.5, 0.5)
    for y in (-0.95, 0.95):
        builder.frustum(
            (-1.7, 1.7, y - 0.27, y + 0.27, 0.0),
            (-1.9, 1.9, y - 0.27, y + 0.27, 0.75),
            parts.rubber,
        )
    builder.box((-0.5, 0, 1.35), (2.6, 2.3, 1.1), paint, turn)
    builder.box((0.5, 0.6, 2.1), (1.3, 0.95, 1.5), (parts.glass,) * 4 + (paint, paint), turn)
    reach, knee = rng.uniform(3.0, 4.2), np.array([2.4, -0.4, rng.uniform(3.0, 3.6)])
    builder.beam((0.6, -0.4, 1.5), knee, 0.38, arm)
    builder.beam(knee, (reach + 0.6, -0.4, 1.2), 0.3, arm)
    builder.box((reach + 0.6, -0.4, 0.9), (0.8, 0.9, 0.7), parts.rubber)


def _barrier(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    """Length lies along y, as the nuScenes class has it: barriers are wider than long."""
    paint, width, height = table.draw(), rng.uniform(1.4, 2.4), rng.uniform(0.85, 1.1)
    if rng.random() < 0.5:
        builder.frustum((-0.3, 0.3, -width / 2, width / 2, 0), (-0.1, 0.1, -width / 2, width / 2, height), paint)
        return
    for z in (height - 0.15, height * 0.45):
        builder.box((0, 0, z), (0.08, width, 0.28), paint)
    for y in (-width * 0.42, width * 0.42):
        builder.beam((0, y, 0), (0, y, height), 0.08, parts.rubber)
        builder.box((0, y, 0.05), (0.6, 0.12, 0.1), parts.rubber)


def _cone(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    height, paint = rng.uniform(0.6, 1.0), table.draw()
    builder.box((0, 0, 0.03), (0.4, 0.4, 0.06), paint)
    builder.cylinder((0, 0, 0.05), (0, 0, height), (0.16, 0.03), paint, sides=9)
    builder.cylinder((0, 0, height * 0.5), (0, 0, height * 0.68), (0.12, 0.09), table.draw(PLAIN), sides=9)


def _pedestrian(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    height = rng.uniform(1.5, 1.92) if rng.random() < 0.88 else rng.uniform(1.0, 1.4)
    stride = rng.uniform(0.0, 0.28)
    legs, coat = table.draw(), table.draw()
    _person(builder, table, height, stride, legs, coat, 0.0, rng)
    if rng.random() < 0.25:
        builder.box((-0.26, 0, height * 0.7), (0.2, 0.32, 0.42), table.draw())
    if rng.random() < 0.15:
        builder.box((0.0, 0.34, height * 0.3), (0.3, 0.14, 0.3), table.draw())


def _person(
    builder: MeshBuilder,
    table: MaterialTable,
    height: float,
    stride: float,
    legs: int,
    coat: int,
    base: float,
    rng: np.random.Generator,
) -> None:
    hip, shoulder = base + 0.48 * height, base + 0.82 * height
    for side, step in ((-1, stride), (1, -stride)):
        builder.cylinder((step, side * 0.1, base), (0, side * 0.09, hip), (0.075, 0.1), legs, sides=6)
        builder.cylinder(
            (-step * 0.9, side * 0.27, hip),
            (0, side * 0.22, shoulder - 0.04),
            (0.05, 0.065),
            coat,
            sides=6,
        )
    builder.frustum((-0.12, 0.12, -0.17, 0.17, hip - 0.06), (-0.11, 0.11, -0.21, 0.21, shoulder), coat)
    skin = table.add(linear(np.array([0.85, 0.66, 0.54]) * rng.uniform(0.35, 1.05)))
    builder.blob((0.01, 0, base + 0.92 * height), (0.1, 0.085, 0.08 * height), skin, rng, roughness=0.05)
    builder.blob(
        (-0.02, 0, base + 0.95 * height),
        (0.11, 0.095, 0.05 * height),
        table.add(draw_colour(rng) * 0.5),
        rng,
    )


def _two_wheeler(
    builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator, motor: bool
) -> None:
    base, radius, tyre = rng.uniform(0.5, 0.56), 0.33, 0.12 if motor else 0.045
    base *= 1.25 if motor else 1.0
    frame = table.draw()
    for x in (-base, base):
        _ring(builder, x, radius, tyre, parts.rubber)
    pedal, saddle, head = (-0.05, 0, 0.32), (-base * 0.5, 0, 0.88), (base * 0.72, 0, 0.95)
    bar = 0.2 if motor else 0.055
    for start, end in (
        (pedal, saddle),
        (pedal, head),
        (saddle, head),
        ((-base, 0, radius), pedal),
        ((base, 0, radius), head),
    ):
        builder.beam(start, end, bar if end is not head or start is not saddle else bar * 1.3, frame)
    builder.beam((base * 0.66, -0.32, 1.03), (base * 0.66, 0.32, 1.03), 0.05, parts.rubber)
    if motor:
        builder.box((0.0, 0, 0.55), (0.7, 0.34, 0.42), frame)
        builder.box((-base * 0.5, 0, 0.82), (0.75, 0.3, 0.14), parts.rubber)
        builder.box((base * 0.85, 0, 0.9), (0.14, 0.2, 0.18), parts.front_lamp)
    else:
        builder.box((-base * 0.5, 0, 0.9), (0.26, 0.16, 0.08), parts.rubber)
    if rng.random() < 0.6:
        _person(builder, table, rng.uniform(1.25, 1.45), -0.15, table.draw(), table.draw(), 0.35, rng)


def _ring(builder: MeshBuilder, x: float, radius: float, tyre: float, material: int) -> None:
    angle = np.linspace(0, 2 * np.pi, 11)
    points = np.stack([x + radius * np.cos(angle), 0 * angle, radius + radius * np.sin(angle)], -1)
    for start, end in zip(points[:-1], points[1:], strict=True):
        builder.beam(start, end, tyre, material)


def _bicycle(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    _two_wheeler(builder, table, parts, rng, motor=False)


def _motorcycle(builder: MeshBuilder, table: MaterialTable, parts: Parts, rng: np.random.Generator) -> None:
    _two_wheeler(builder, table, parts, rng, motor=True)


_CAR_SIZE = {
    "sedan": np.array([4.7, 1.84, 1.46]),
    "hatch": np.array([4.1, 1.78, 1.52]),
    "van": np.array([5.0, 1.98, 1.95]),
    "pickup": np.array([5.3, 1.95, 1.8]),
}
_CABIN = {
    "sedan": (-0.4, 0.24, -0.27, 0.07),
    "hatch": (-0.48, 0.24, -0.41, 0.07),
    "van": (-0.49, 0.36, -0.47, 0.23),
    "pickup": (-0.12, 0.25, -0.09, 0.11),
}
"""Cabin's rear and front end at the belt, then at the roof, as shares of the length."""

_SHAPES: dict[str, Callable[[MeshBuilder, MaterialTable, Parts, np.random.Generator], None]] = {
    "car": _car,
    "truck": _truck,
    "bus": _bus,
    "trailer": _trailer,
    "construction_vehicle": _construction_vehicle,
    "barrier": _barrier,
    "traffic_cone": _cone,
    "pedestrian": _pedestrian,
    "bicycle": _bicycle,
    "motorcycle": _motorcycle,
}
