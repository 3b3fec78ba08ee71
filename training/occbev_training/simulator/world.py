"""One seeded city block: ground, scenery, the traffic on it, the route of the ego vehicle, and the light.

Positions are in the world frame of the drive, z up, whose origin lies on the main road where the route begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev_training.simulator.actors import Parts, Shape, build_shape
from occbev_training.simulator.detailed_scenery import build_detailed_scenery, join_scenery
from occbev_training.simulator.materials import Materials, MaterialTable, linear
from occbev_training.simulator.mesh import Mesh, join
from occbev_training.simulator.road_details import LOT, CarPark, build_road_details, ground_materials
from occbev_training.simulator.scenery import build_scenery
from occbev_training.simulator.street import DEPTH, ROAD, Bend, Plan, build_ground, draw_plan

TRACK_RATE = 50.0
"""Samples of every track per second."""

MUTED = (0.62, 0.26, 0.12)
"""Shares of greys, earth tones and saturated paint in streets of world v2."""

WHEELBASE, WHEEL_TRACK = 2.8, 1.6
"""Distance between the ego vehicle's axles and between its wheels of one axle."""


@dataclass(frozen=True)
class Track:
    """A path over time: times (P,) seconds, pose (P, 4) x, y, z, yaw (unwrapped); one sample stands still."""

    times: NDArray[np.float64]
    pose: NDArray[np.float64]

    @property
    def moving(self) -> bool:
        """Whether the position ever changes."""
        return len(self.pose) > 1 and bool(np.ptp(self.pose[:, :2], axis=0).max() > 0.01)

    def at(self, times: ArrayLike) -> NDArray[np.float64]:
        """Poses (..., 4) at the given times."""
        times = np.asarray(times, np.float64)
        return np.stack([np.interp(times, self.times, self.pose[:, k]) for k in range(4)], -1)

    def velocity(self, time: float) -> NDArray[np.float64]:
        """World velocity (3,) by central difference over one sample."""
        step = 1 / TRACK_RATE
        return (self.at(time + step)[:3] - self.at(time - step)[:3]) / (2 * step)


@dataclass(frozen=True)
class Actor:
    """One labelled object."""

    name: str
    shape: Shape
    track: Track


@dataclass(frozen=True)
class Light:
    """Sky, sun and air.

    sun: (3,) unit direction towards it. sun_colour, sky_colour, haze_colour: (3,) linear RGB.
    haze: extinction per metre. night: 0 by day, 1 in darkness. cloud: 0 clear, 1 overcast.
    """

    sun: NDArray[np.float32]
    sun_colour: NDArray[np.float32]
    sky_colour: NDArray[np.float32]
    haze_colour: NDArray[np.float32]
    haze: float
    night: float
    cloud: float
    name: str


@dataclass(frozen=True)
class World:
    """Everything that a drive goes through.

    static: ground, scenery and all actors that never move. static_actors, moving_actors: together all
    labelled objects. ego: track of base_link with its roll and pitch (P, 2). detailed: whether it is of world v2, whose
    pictures have mirrors, clouds and a bonnet.
    """

    static: Mesh
    materials: Materials
    static_actors: tuple[Actor, ...]
    moving_actors: tuple[Actor, ...]
    ego: Track
    ego_tilt: NDArray[np.float64]
    light: Light
    detailed: bool = False


def build_world(seed: int, duration: float, version: str = "v1") -> World:
    """Draw the block of one seed with `duration` seconds of traffic, of a version of the streets."""
    rng = np.random.default_rng((seed, 20260))
    route, detailed = _draw_route(rng, duration), version == "v2"
    end = max(route.length + 90.0, 150.0)
    plan = draw_plan(rng, -85.0, end, route.turn_at)
    bend = Bend.draw(rng, plan.start, plan.end, (250, 100) if detailed else (400, 180))
    table = MaterialTable(rng, MUTED) if detailed else MaterialTable(rng)
    parts = Parts.create(table)
    if detailed:
        parts = parts.add_trim(table)
    car_parks: list[CarPark] = []
    if detailed:
        static, car_parks = _build_detailed_street(plan, bend, table)
    else:
        static = [build_ground(plan, bend, table), build_scenery(plan, bend, table)]
    times = np.arange(0.0, duration + 1e-9, 1 / TRACK_RATE)
    line = _route_line(route, plan)
    ego = _track_along(line, route.travelled, bend, times)
    cast = Cast(plan, bend, table, parts, times, ego)
    cast.fill(route)
    cast.fill_car_parks(car_parks)
    parked = tuple(a for a in cast.actors if not a.track.moving)
    static += [a.shape.mesh.move(a.track.pose[0, :3], a.track.pose[0, 3]) for a in parked]
    moving = tuple(a for a in cast.actors if a.track.moving)
    return World(
        join(static),
        table.build(),
        parked,
        moving,
        ego,
        _ground_tilt(line, route.travelled, bend) + _sway(rng, times),
        draw_light(rng, _DETAILED_WEATHER if detailed else _WEATHER),
        detailed,
    )


def _build_detailed_street(plan: Plan, bend: Bend, table: MaterialTable) -> tuple[list[Mesh], list[CarPark]]:
    surface = ground_materials(table)
    ground = build_ground(plan, bend, table, surface)
    details = build_road_details(plan, bend, table, table.colour_of(surface[ROAD]))
    scenery = build_detailed_scenery(plan, bend, table)
    return [ground, details, join_scenery(scenery)], scenery.car_parks


@dataclass(frozen=True)
class Route:
    """How the ego drives: path length over time (P,) and what it does at `turn_at`."""

    travelled: NDArray[np.float64]
    length: float
    turn_at: float | None
    turn: int


def _draw_route(rng: np.random.Generator, duration: float) -> Route:
    cruise = rng.uniform(2.0, 12.0)
    turn = int(rng.choice((0, -1, 1), p=(0.62, 0.2, 0.18)))
    stop = rng.uniform(0, duration) if rng.random() < 0.3 else None
    turn_time = rng.uniform(0.45, 0.75) * duration
    step, speed, travelled = 1 / TRACK_RATE, cruise * rng.uniform(0.4, 1.0), [0.0]
    for time in np.arange(step, duration + 1e-9, step):
        target = cruise
        if turn and abs(time - turn_time) < 4.0:
            target = min(cruise, 4.5)
        if stop is not None and 0 < time - stop < 6:
            target = 0.0
        speed += float(np.clip(target - speed, -2.2 * step, 1.5 * step))
        travelled.append(travelled[-1] + speed * step)
    path = np.array(travelled)
    turn_at = float(np.interp(turn_time, np.arange(len(path)) * step, path)) if turn else None
    if turn_at is not None and (turn_at < 15 or path[-1] - turn_at > DEPTH - 15):
        turn, turn_at = 0, None
    return Route(path, float(path[-1]), turn_at, turn)


def _route_line(route: Route, plan: Plan) -> NDArray[np.float64]:
    """Plan polyline (L, 2) of the ego: its lane, and the arc into the crossing where it turns."""
    lane = -plan.lane / 2
    start, far = np.array([[0.0, lane]]), np.array([[route.length + 60, lane]])
    if not route.turn or route.turn_at is None:
        return np.concatenate([start, far])
    crossing = min(plan.crossings, key=lambda c: abs(c.s - (route.turn_at or 0.0)))
    exit_s = crossing.s + route.turn * crossing.half / 2
    radius = 6.5 if route.turn < 0 else 8.5
    angle = np.linspace(0, np.pi / 2, 40)
    arc = np.stack(
        [
            exit_s - radius + radius * np.sin(angle),
            lane + route.turn * radius * (1 - np.cos(angle)),
        ],
        -1,
    )
    return np.concatenate([start, arc, [[exit_s, route.turn * (DEPTH - 1)]]])


def _track_along(
    line: NDArray[np.float64],
    travelled: NDArray[np.float64],
    bend: Bend,
    times: NDArray[np.float64],
) -> Track:
    """Turn a plan polyline and the way travelled along it into a world track, heading along the path."""
    here, ahead, behind = (bend.at(*_along(line, travelled + k).T) for k in (0.0, 0.4, -0.4))
    yaw = np.unwrap(np.arctan2((ahead - behind)[:, 1], (ahead - behind)[:, 0]))
    return Track(times, np.concatenate([here, yaw[:, None]], 1))


def _along(line: NDArray[np.float64], way: NDArray[np.float64]) -> NDArray[np.float64]:
    """Plan points (P, 2) after `way` (P,) metres along a plan polyline (L, 2)."""
    pieces = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    return np.stack([np.interp(way, pieces, line[:, k]) for k in range(2)], -1)


def _ground_tilt(line: NDArray[np.float64], travelled: NDArray[np.float64], bend: Bend) -> NDArray[np.float64]:
    """Roll and pitch (P, 2) of a vehicle whose four wheels stand on the ground along its way."""
    front, back = (_along(line, travelled + k * WHEELBASE / 2) for k in (1, -1))
    apart = np.maximum(np.linalg.norm(front - back, axis=1), 1e-6)  # less where the way begins
    forward = (front - back) / apart[:, None]
    left = np.stack([-forward[:, 1], forward[:, 0]], -1) * WHEEL_TRACK / 2
    middle = _along(line, travelled)

    def height(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return bend.at(*points.T)[:, 2]

    # Turning about x by a positive angle lifts the left side, about y it lowers the front.
    roll = np.arctan2(height(middle + left) - height(middle - left), WHEEL_TRACK)
    return np.stack([roll, -np.arctan2(height(front) - height(back), apart)], -1)


def _sway(rng: np.random.Generator, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Roll and pitch (P, 2) of slow suspension movement."""
    phase, rate = rng.uniform(0, 2 * np.pi, 4), rng.uniform(0.3, 1.6, 4)
    size = np.deg2rad(rng.uniform(0.02, 0.2, 4))
    sway = size * np.sin(2 * np.pi * rate * times[:, None] + phase)
    return np.stack([sway[:, 0] + sway[:, 1], sway[:, 2] + sway[:, 3]], -1)


class Cast:
    """Places actors one by one and refuses any that would run into another or into the ego."""

    def __init__(
        self,
        plan: Plan,
        bend: Bend,
        table: MaterialTable,
        parts: Parts,
        times: NDArray[np.float64],
        ego: Track,
    ):
        """Start with the ego alone."""
        self.plan, self.bend, self.table, self.parts, self.times = plan, bend, table, parts, times
        self.rng, self.ego = table.rng, ego
        self.actors: list[Actor] = []
        self._checked = times[:: int(TRACK_RATE // 4)]
        self._discs: list[NDArray[np.float64]] = []
        self._radii: list[NDArray[np.float64]] = []
        self._remember(*_discs(_shift(ego.at(self._checked), 1.4), (4.9, 2.1)))

    def fill(self, route: Route) -> None:
        """Place moving traffic first, then what stands, then people."""
        self._drive_traffic(route)
        self._works()
        self._park()
        self._walk()

    def fill_car_parks(self, lots: Sequence[CarPark]) -> None:
        """Park cars nose or tail first in some bays."""
        rng = self.rng
        for lot in lots:
            share = rng.uniform(0.3, 0.9)
            for s, d in lot.bays():
                if rng.random() < share:
                    yaw = rng.choice((-1, 1)) * np.pi / 2 + rng.normal(0, 0.03)
                    self.add("car", self.standing(s, d + rng.normal(0, 0.15), yaw, LOT), 0.0)

    def add(self, name: str, track: Track, margin: float = 0.3, shape: Shape | None = None) -> bool:
        """Place one actor unless it comes within `margin` of another; returns whether it was placed."""
        shape = shape or build_shape(name, self.table, self.parts)
        discs, radius = _discs(track.at(self._checked), shape.size[:2])
        if self._collides(discs, radius + margin):
            return False
        self._remember(discs, radius)
        self.actors.append(Actor(f"{name}_{len(self.actors):03d}", shape, track))
        return True

    def standing(self, s: float, d: float, yaw: float, z: float = 0.0) -> Track:
        """Track of something that stands at a plan point, turned by `yaw` against the main road."""
        pose = np.append(self.bend.at(s, d, z), float(self.bend.yaw(s)) + yaw)
        return Track(np.zeros(1), pose[None])

    def _remember(self, discs: NDArray[np.float64], radius: float) -> None:
        self._discs.append(discs)
        self._radii.append(np.full(discs.shape[1], radius))

    def _collides(self, discs: NDArray[np.float64], radius: float) -> bool:
        others, radii = np.concatenate(self._discs, 1), np.concatenate(self._radii)
        gap = np.linalg.norm(discs[:, :, None] - others[:, None], axis=-1) - radii
        return bool(gap.min() < radius)

    def _drive_traffic(self, route: Route) -> None:
        rng, plan = self.rng, self.plan
        for direction in (-1, 1):
            for lane in range(plan.lanes):
                pace = rng.uniform(0.5, 1.3)
                s = plan.start + rng.uniform(5, 40)
                while s < plan.end - 10:
                    self._drive_one(direction, lane, s, pace, route)
                    s += rng.uniform(9, 45)
        for crossing in plan.crossings:
            for direction in (-1, 1):
                if rng.random() < 0.6:
                    self._drive_across(crossing.s, crossing.half, direction)

    def _drive_one(self, direction: int, lane: int, s: float, pace: float, route: Route) -> None:
        """One vehicle in its lane; those in the ego's own direction keep its changing pace."""
        rng, plan = self.rng, self.plan
        name = str(rng.choice(("car", "truck", "bus", "motorcycle", "bicycle"), p=(0.73, 0.1, 0.05, 0.06, 0.06)))
        d = -direction * (lane + 0.5) * plan.lane + rng.normal(0, 0.12)
        if direction > 0:
            travelled = route.travelled * (pace if lane else 1.0)
        else:
            travelled = self.times * 8.0 * pace
        if name == "bicycle":
            d, travelled = (
                -direction * (plan.lanes * plan.lane - 0.5),
                self.times * rng.uniform(2.5, 6.0),
            )
        far = s + direction * (travelled[-1] + 30)
        line = np.array([[s, d], [far, d]])
        stop = np.clip(travelled, 0, max(0.0, (plan.end - s - 3) if direction > 0 else (s - plan.start - 3)))
        self.add(name, _track_along(line, stop, self.bend, self.times), margin=0.9)

    def _drive_across(self, s: float, half: float, direction: int) -> None:
        """A vehicle on the crossing road: one that drives over if the way is clear, else one that waits."""
        rng, lane = self.rng, s + direction * half / 2
        start = -direction * rng.uniform(15, 60)
        line = np.array([[lane, start], [lane, direction * (DEPTH - 3)]])
        way = np.clip(self.times * rng.uniform(3, 9), 0, abs(line[1, 1] - start))
        if not self.add("car", _track_along(line, way, self.bend, self.times), margin=1.0):
            self.add(
                str(rng.choice(("car", "truck"))),
                self.standing(lane, -direction * (self.plan.kerb + 5.0), direction * np.pi / 2),
                0.5,
            )

    def _park(self) -> None:
        rng, plan = self.rng, self.plan
        if not plan.parking:
            return
        for side in (-1, 1):
            share, s = rng.uniform(0.1, 0.65), plan.start + rng.uniform(3, 8)
            while s < plan.end - 4:
                if rng.random() < share and plan.clear_of_crossings(s, 8.0):
                    self._park_one(s, side)
                s += rng.uniform(5.6, 7.5)

    def _park_one(self, s: float, side: int) -> None:
        rng, plan = self.rng, self.plan
        name = str(
            rng.choice(
                ("car", "truck", "trailer", "motorcycle", "bicycle"),
                p=(0.82, 0.05, 0.03, 0.06, 0.04),
            )
        )
        d = side * (plan.kerb - 1.12 + rng.normal(0, 0.06))
        yaw = (0.0 if side < 0 else np.pi) + rng.normal(0, 0.03) + (np.pi if rng.random() < 0.1 else 0.0)
        self.add(name, self.standing(s, d, yaw), 0.1)

    def _works(self) -> None:
        """Road works: cones tapering off a stretch beside the kerb, barriers, sometimes a machine."""
        rng, plan = self.rng, self.plan
        for _ in range(int(rng.choice((0, 1, 2), p=(0.35, 0.4, 0.25)))):
            side, s = int(rng.choice((-1, 1))), rng.uniform(5, max(10.0, plan.end - 80))
            if not plan.clear_of_crossings(s, 4.0):
                continue
            outer = plan.kerb - 0.3
            depth = plan.parking if plan.parking else 0.4
            for k in range(int(rng.integers(3, 9))):
                d = side * (outer - depth * min(1.0, (k + 1) / 3))
                self.add(
                    "traffic_cone",
                    self.standing(s + 2.2 * k, d + rng.normal(0, 0.1), rng.uniform(0, 6)),
                    0.0,
                )
            for k in range(int(rng.integers(0, 5))):
                self.add(
                    "barrier",
                    self.standing(
                        s + 3 + 2.7 * k,
                        side * (outer - 0.6 * depth),
                        np.pi / 2 + rng.normal(0, 0.06),
                    ),
                    0.0,
                )
            if rng.random() < 0.45:
                self.add(
                    "construction_vehicle",
                    self.standing(s + rng.uniform(18, 24), side * (plan.kerb - 0.6), rng.uniform(-0.3, 0.3)),
                    0.0,
                )

    def _walk(self) -> None:
        rng, plan = self.rng, self.plan
        for side in (-1, 1):
            for s in np.arange(plan.start, plan.end, 1.0):
                if rng.random() < 0.07:
                    self._walk_one(float(s), side)
            for _ in range(int(rng.integers(0, 4))):
                s = rng.uniform(plan.start, plan.end)
                name = str(rng.choice(("bicycle", "motorcycle", "barrier", "traffic_cone"), p=(0.5, 0.2, 0.2, 0.1)))
                d = side * (plan.walk_middle(side) + rng.uniform(-0.6, 0.6))
                self.add(name, self.standing(s, d, rng.uniform(0, 6.28), 0.13), 0.1)
        for crossing in plan.crossings:
            for _ in range(int(rng.integers(1, 5))):
                self._cross_one(crossing.s + rng.choice((-1, 1)) * (crossing.half + 1.9 + rng.uniform(-1, 1)))

    def _walk_one(self, s: float, side: int) -> None:
        rng, d = self.rng, side * (self.plan.walk_middle(side) + self.rng.uniform(-0.8, 0.8))
        if rng.random() < 0.3 or not self.plan.clear_of_crossings(s, 5.0):
            self.add("pedestrian", self.standing(s, d, rng.uniform(0, 6.28), 0.13), 0.15)
            return
        direction = int(rng.choice((-1, 1)))
        way = self.times * rng.uniform(0.7, 1.7)
        room = min([abs(c.s - s) - c.half for c in self.plan.crossings if (c.s - s) * direction > 0] + [60.0])
        track = _track_along(
            np.array([[s, d], [s + direction * 80, d]]),
            np.minimum(way, room),
            self.bend,
            self.times,
        )
        self.add("pedestrian", _raise_by(track, 0.13), 0.15)

    def _cross_one(self, s: float) -> None:
        """Someone who walks over the main road, if a gap in the traffic allows."""
        rng, kerb = self.rng, self.plan.kerb
        side, speed = int(rng.choice((-1, 1))), rng.uniform(1.0, 1.6)
        for _ in range(4):
            way = np.clip((self.times - rng.uniform(-6, self.times[-1])) * speed, 0, 2 * kerb + 3)
            line = np.array([[s, side * (kerb + 1.5)], [s, -side * (kerb + 1.5)]])
            if self.add("pedestrian", _track_along(line, way, self.bend, self.times), 0.6):
                return


def _raise_by(track: Track, height: float) -> Track:
    return Track(track.times, track.pose + np.array([0, 0, height, 0]))


def _shift(pose: NDArray[np.float64], forward: float) -> NDArray[np.float64]:
    moved = pose.copy()
    moved[:, 0] += forward * np.cos(pose[:, 3])
    moved[:, 1] += forward * np.sin(pose[:, 3])
    return moved


def _discs(pose: NDArray[np.float64], size: tuple[float, ...]) -> tuple[NDArray[np.float64], float]:
    """Cover a box l, w at poses (S, 4) with discs: centres (S, n, 2) and their common radius."""
    length, width = max(size[0], 0.3), max(size[1], 0.3)
    along, across = (
        np.array([np.cos(pose[:, 3]), np.sin(pose[:, 3])]).T,
        np.array([-np.sin(pose[:, 3]), np.cos(pose[:, 3])]).T,
    )
    if width > length:
        length, width, along = width, length, across
    number = int(np.ceil(length / width))
    offsets = (np.arange(number) - (number - 1) / 2) * (length / number)
    return pose[:, None, :2] + offsets[:, None] * along[:, None], 0.5 * float(np.hypot(width, length / number))


Weather = Mapping[str, tuple[float, float, float, float, float]]
"""Name -> strength of sun and sky, haze per metre, darkness, cloud."""


def draw_light(rng: np.random.Generator, weather: Weather) -> Light:
    """Draw time of day and weather."""
    name = str(
        rng.choice(
            ("sunny", "hazy", "overcast", "fog", "dusk", "night"),
            p=(0.38, 0.14, 0.2, 0.08, 0.1, 0.1),
        )
    )
    height = np.deg2rad({"dusk": rng.uniform(4, 14)}.get(name, rng.uniform(20, 70)))
    around = rng.uniform(0, 2 * np.pi)
    sun = np.array(
        [np.cos(around) * np.cos(height), np.sin(around) * np.cos(height), np.sin(height)],
        np.float32,
    )
    strength, sky, haze, night, cloud = weather[name]
    warmth = np.array([1.0, 0.93 if name != "dusk" else 0.62, 0.84 if name != "dusk" else 0.35], np.float32)
    blue = linear(np.array([0.62, 0.74, 0.92])) if cloud < 0.5 else linear(np.array([0.8, 0.82, 0.85]))
    blue = blue * (1, 0.9, 1.0) if name == "dusk" else blue
    sky_colour = (blue * sky * rng.uniform(0.85, 1.15)).astype(np.float32)
    grey = sky_colour.mean() * np.array([1.08, 1.05, 1.05], np.float32)
    return Light(
        sun,
        warmth * np.float32(strength * rng.uniform(0.85, 1.15)),
        sky_colour,
        grey.astype(np.float32),
        haze * rng.uniform(0.7, 1.3),
        night,
        cloud,
        name,
    )


_WEATHER: Weather = {
    "sunny": (2.3, 0.8, 0.0012, 0.0, 0.15),
    "hazy": (1.6, 0.9, 0.006, 0.0, 0.4),
    "overcast": (0.15, 1.25, 0.003, 0.0, 1.0),
    "fog": (0.1, 1.2, 0.025, 0.0, 1.0),
    "dusk": (1.0, 0.35, 0.004, 0.45, 0.3),
    "night": (0.03, 0.035, 0.003, 1.0, 0.5),
}

_DETAILED_WEATHER: Weather = {
    "sunny": (3.0, 0.95, 0.001, 0.0, 0.3),
    "hazy": (2.0, 1.05, 0.002, 0.0, 0.5),
    "overcast": (0.3, 1.4, 0.001, 0.0, 0.9),
    "fog": (0.1, 1.3, 0.012, 0.0, 1.0),
    "dusk": (1.3, 0.4, 0.003, 0.45, 0.4),
    "night": (0.03, 0.035, 0.003, 1.0, 0.5),
}
