"""Trees, hedges and bushes of world v2: leaves are small faces, so that light and LiDAR beams pass between them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occbev_training.simulator.materials import FOLIAGE, LAP, MaterialTable, linear_hsv
from occbev_training.simulator.mesh import Mesh, MeshBuilder
from occbev_training.simulator.street import VEGETATION

Points = NDArray[np.float64]


def draw_leaves(table: MaterialTable) -> tuple[int, ...]:
    """Four tones of one kind of leaf, from those in the shade to those in the light."""
    rng = table.rng
    if rng.random() < 0.1:
        base = table.draw_colour()
    else:
        base = linear_hsv(rng.uniform(0.13, 0.3), rng.uniform(0.25, 0.6), rng.uniform(0.3, 0.55))
    return tuple(table.add(base * tone, FOLIAGE, base * tone * 0.5, 0.3) for tone in (0.45, 0.8, 1.15, 1.6))


def build_tree(table: MaterialTable, height: float) -> Mesh:
    """A trunk that forks into boughs, each with clouds of leaves; or a conifer; or a palm-like bare stem.

    Crowns are (number of leaves) faces of 20 to 60 cm; a tree of 8 m has some 500.
    """
    rng, builder = table.rng, MeshBuilder(VEGETATION)
    bark = table.add(
        linear_hsv(rng.uniform(0.05, 0.1), rng.uniform(0.1, 0.35), rng.uniform(0.2, 0.42)), LAP, scale=0.18
    )
    leaves, trunk = draw_leaves(table), height * rng.uniform(0.26, 0.4)
    radius = 0.025 * height * rng.uniform(0.8, 1.3)
    if rng.random() < 0.15:
        _conifer(builder, height, radius, bark, leaves, rng)
        return builder.build()
    fork = np.array([*rng.normal(0, 0.03 * height, 2), trunk])
    builder.cylinder((0, 0, -0.2), fork, (radius, 0.75 * radius), bark, sides=7)
    crown = height - trunk
    middles, spread = [], crown * rng.uniform(0.34, 0.5)
    for angle in np.arange(rng.integers(4, 7)) * 2.4 + rng.uniform(0, 6):
        out = spread * rng.uniform(0.35, 0.95)
        tip = fork + [out * np.cos(angle), out * np.sin(angle), crown * rng.uniform(0.3, 0.8)]
        builder.cylinder(fork, tip, (0.5 * radius, 0.02), bark, sides=4)
        middles.append(tip)
    middles.append(fork + [0, 0, crown * 0.75])
    size = 0.24 + 0.034 * height
    for middle in middles:
        extent = np.array([1, 1, 0.75]) * spread * rng.uniform(0.42, 0.68)
        _add_leaves(builder, _inside_ball(rng, 130, middle, extent), size, leaves, rng)
    return builder.build()


def build_hedge(
    builder: MeshBuilder,
    a: Points,
    b: Points,
    height: float,
    thick: float,
    leaves: tuple[int, ...],
    rng: np.random.Generator,
) -> None:
    """Add a clipped hedge between two ground points: a dark core, and leaves that stand out of it."""
    yaw, length = float(np.arctan2(*(b - a)[1::-1])), float(np.linalg.norm(b - a))
    builder.box(
        (a + b) / 2 + [0, 0, height / 2 - 0.15], (length, thick * 0.8, height * 0.94), leaves[0], yaw, VEGETATION
    )
    number = int(60 * length)
    along, across, up = rng.random(number), rng.uniform(-0.5, 0.5, number), rng.random(number)
    face = rng.integers(0, 3, number)
    across[face < 2] = np.where(face < 2, face - 0.5, 0)[face < 2]
    up[face == 2] = 1.0
    side = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
    points = a + along[:, None] * (b - a) + across[:, None] * thick * side
    points[:, 2] += up * height - 0.05
    _add_leaves(builder, points + rng.normal(0, 0.05, points.shape), 0.2, leaves, rng)


def build_bush(table: MaterialTable, leaves: tuple[int, ...], size: float) -> Mesh:
    """A shrub of a given height, of leaves down to the ground."""
    rng, builder = table.rng, MeshBuilder(VEGETATION)
    builder.blob((0, 0, size * 0.35), np.array([0.5, 0.5, 0.45]) * size, leaves[0], rng, roughness=0.3)
    points = _inside_ball(rng, 90, np.array([0, 0, size * 0.42]), np.array([0.75, 0.75, 0.6]) * size)
    points[:, 2] = np.maximum(points[:, 2], 0.05)
    _add_leaves(builder, points, 0.1 + 0.1 * size, leaves, rng)
    return builder.build()


def _conifer(
    builder: MeshBuilder, height: float, radius: float, bark: int, leaves: tuple[int, ...], rng: np.random.Generator
) -> None:
    builder.cylinder((0, 0, -0.2), (0, 0, height), (radius, 0.02), bark, sides=6)
    up = rng.uniform(0.12, 1.0, 520) ** 0.8
    out, angle = height * 0.21 * (1.03 - up) * np.sqrt(rng.random(520)) + 0.05, rng.uniform(0, 6.28, 520)
    points = np.stack([out * np.cos(angle), out * np.sin(angle), up * height], -1)
    _add_leaves(builder, points, 0.2 + 0.03 * height, leaves, rng)


def _inside_ball(rng: np.random.Generator, number: int, middle: Points, radii: Points) -> Points:
    """Points (number, 3) in an ellipsoid, most of them near its skin."""
    way = rng.normal(size=(number, 3))
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    return middle + way * radii * rng.uniform(0.45, 1.05, (number, 1))


def _add_leaves(
    builder: MeshBuilder, points: Points, size: float, leaves: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Add a face of about `size` at each point (L, 3), turned at random; upper ones are lighter."""
    number = len(points)
    first = rng.normal(size=(number, 3)) * (1, 1, 0.6)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(first, rng.normal(size=(number, 3)))
    second /= np.linalg.norm(second, axis=1, keepdims=True)
    half = size * rng.uniform(0.5, 1.0, (number, 1)) * 0.62
    corners = np.stack(
        [points - half * first, points - 0.6 * half * second, points + half * first, points + 0.6 * half * second], 1
    )
    place = rng.uniform(0, 40, (number, 1, 2))
    uv = place + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 2 * half[:, None]
    rise = np.argsort(np.argsort(points[:, 2])) / max(number, 1)
    tone = np.clip((rise * 2.2 + rng.uniform(0, 1.8, number)).astype(int), 0, len(leaves) - 1)
    for k, material in enumerate(leaves):
        builder.quads(corners[tone == k], material, VEGETATION, uv[tone == k])
