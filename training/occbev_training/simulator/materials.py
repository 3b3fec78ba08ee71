"""Materials of the simulated street: one distribution of colours and textures for things and background alike.

Whatever can be painted draws from `MaterialTable.draw`, so neither colour nor pattern gives a class away.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

PLAIN, SPECKLE, BRICK, FACADE, STRIPES, FOLIAGE, SLABS, NOISE = range(8)
"""Texture kinds."""
ASPHALT, WORN, PANES, LAP, TURF = range(8, 13)
"""Texture kinds of world v2: road surface with cracks, paint that is worn off, windows, boards or tiles, grass."""

_TABLE = 512
_PER_METRE = 8.0

Floats = NDArray[np.floating[Any]]
"""float32, and float64 where the noise table is part of it."""


@dataclass(frozen=True)
class Materials:
    """Columns of the material table, one row per material.

    colour, second: (K, 3) linear RGB. kind: (K,) texture. scale: (K,) metres of one texture period.
    gloss: (K,) share of mirrored sky. glow: (K, 3) light given off at night, linear RGB.
    """

    colour: NDArray[np.float32]
    second: NDArray[np.float32]
    kind: NDArray[np.int32]
    scale: NDArray[np.float32]
    gloss: NDArray[np.float32]
    glow: NDArray[np.float32]


class MaterialTable:
    """Collects materials; each `add` returns the row number that meshes refer to."""

    def __init__(self, rng: np.random.Generator, groups: tuple[float, float, float] = (0.45, 0.25, 0.3)) -> None:
        """Start an empty table that draws from `rng`; groups: shares of greys, earth tones and saturated paint."""
        self.rng, self.groups = rng, groups
        self._rows: list[tuple[NDArray[np.float32], NDArray[np.float32], int, float, float, NDArray[np.float32]]] = []

    def add(
        self,
        colour: NDArray[np.float32],
        kind: int = PLAIN,
        second: NDArray[np.float32] | None = None,
        scale: float = 1.0,
        gloss: float = 0.0,
        glow: tuple[float, float, float] = (0, 0, 0),
    ) -> int:
        """Add one material with linear RGB colours and return its row."""
        other = colour * 0.6 if second is None else second
        self._rows.append((colour, other, kind, scale, gloss, np.array(glow, np.float32)))
        return len(self._rows) - 1

    def draw(self, kind: int | None = None) -> int:
        """Draw a painted surface from the distribution that everything shares."""
        rng = self.rng
        kinds = (PLAIN, NOISE, STRIPES, SLABS, BRICK, SPECKLE)
        chosen = int(rng.choice(kinds, p=(0.5, 0.16, 0.1, 0.08, 0.06, 0.1))) if kind is None else kind
        scale = float(rng.uniform(0.15, 0.9))
        return self.add(
            self.draw_colour(),
            chosen,
            self.draw_colour() if rng.random() < 0.4 else None,
            scale,
            gloss=float(rng.choice((0.0, 0.05, 0.18), p=(0.5, 0.25, 0.25))),
        )

    def colour_of(self, row: int) -> NDArray[np.float32]:
        """Linear RGB (3,) of a row."""
        return self._rows[row][0]

    def draw_colour(self) -> NDArray[np.float32]:
        """Draw linear RGB (3,) from the colours of this street."""
        return draw_colour(self.rng, self.groups)

    def build(self) -> Materials:
        """Return the table as arrays."""
        colour, second, kind, scale, gloss, glow = zip(*self._rows, strict=True)
        return Materials(
            np.array(colour, np.float32),
            np.array(second, np.float32),
            np.array(kind, np.int32),
            np.array(scale, np.float32),
            np.array(gloss, np.float32),
            np.array(glow, np.float32),
        )


def draw_colour(
    rng: np.random.Generator, groups: tuple[float, float, float] = (0.45, 0.25, 0.3)
) -> NDArray[np.float32]:
    """Draw linear RGB (3,): greys, earth tones or saturated paint, with these shares."""
    group = rng.choice(3, p=groups)
    if group == 0:
        grey = rng.uniform(0.12, 0.9)
        return linear(np.clip(grey + rng.normal(0, 0.015, 3), 0.03, 0.95))
    if group == 1:
        return linear_hsv(rng.uniform(0.03, 0.14), rng.uniform(0.15, 0.6), rng.uniform(0.25, 0.85))
    return linear_hsv(rng.uniform(0, 1), rng.uniform(0.35, 0.85), rng.uniform(0.2, 0.85))


def linear_hsv(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    """Linear RGB (3,) of a display colour given as HSV in [0, 1]."""
    return linear(np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value)))


def linear(display: NDArray[np.float64]) -> NDArray[np.float32]:
    """Linear light of display RGB in [0, 1]."""
    return np.asarray(display, np.float32) ** 2.2


def albedo(
    materials: Materials,
    material: NDArray[np.int32],
    uv: Floats,
    footprint: Floats,
    height: Floats,
) -> tuple[Floats, Floats]:
    """Evaluate the textures of (R,) surface points.

    uv: (R, 2) metres along the surface. footprint: (R,) metres that a pixel covers there; finer
    patterns fade to their mean. height: (R,) metres above the street.
    Returns: linear RGB (R, 3) and the share (R,) that is window glass.
    """
    kind = materials.kind[material]
    mix = np.zeros(len(material), np.float32)
    glass = np.zeros(len(material), np.float32)
    brightness = 0.86 + 0.28 * noise(uv, 0.35)
    for texture, pattern in _PATTERNS.items():
        chosen = np.flatnonzero(kind == texture)
        if len(chosen):
            scale = materials.scale[material[chosen]]
            mean, value, shade = pattern(uv[chosen], scale, material[chosen])
            fade = np.clip(1.5 * scale / np.maximum(footprint[chosen], 1e-4) - 0.5, 0, 1)
            mix[chosen] = mean + fade * (value - mean)
            brightness[chosen] *= 1 + fade * (shade - 1)
    chosen = np.flatnonzero(kind == FACADE)
    if len(chosen):
        glass[chosen] = mix[chosen]
    chosen = np.flatnonzero(kind == PANES)
    if len(chosen):
        glass[chosen] = 1 - mix[chosen]
    colour = materials.colour[material]
    colour += mix[:, None] * (materials.second[material] - colour)
    # Splashed dirt darkens whatever stands on the street.
    brightness *= 0.8 + 0.2 * np.clip(height / 0.6, 0, 1)
    return colour * brightness[:, None], glass


def noise(uv: Floats, per_metre: float) -> Floats:
    """Smooth noise (R,) in [0, 1] of several octaves; `per_metre` 1 has features from 0.1 to 4 m."""
    if not len(uv):
        return np.zeros(0)
    scaled = np.mod(uv * np.float32(per_metre * _PER_METRE), _TABLE).astype(np.float32)
    padded = -len(scaled) % 256
    grid = np.pad(scaled, ((0, padded), (0, 0))).reshape(-1, 256, 2)
    parts = [
        cv2.remap(_noise_table(), part[..., 0], part[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        for part in np.array_split(grid, -(-len(grid) // 16384) or 1)
    ]
    return np.concatenate(parts).reshape(-1)[: len(uv)].astype(np.float64, copy=False)


def _noise_table() -> Floats:
    """The tileable noise that every texture reads; the same in all drives."""
    if "noise" not in _TABLES:
        rng = np.random.default_rng(7)
        table = np.zeros((_TABLE, _TABLE), np.float32)
        for octave in range(1, 9):
            size = 2**octave
            grid = np.pad(rng.random((size, size), np.float32), 2, mode="wrap")
            scale = _TABLE // size
            layer = cv2.resize(grid, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
            table += layer[2 * scale : -2 * scale, 2 * scale : -2 * scale] * 0.72**octave
        low, high = np.percentile(table, (2, 98))
        _TABLES["noise"] = np.clip((table - low) / (high - low), 0, 1)
    return _TABLES["noise"]


def _cell_hash(a: NDArray[np.int64], b: NDArray[np.int64], c: NDArray[np.int64]) -> NDArray[np.float32]:
    """A number in [0, 1) for each lattice cell, the same each time."""
    mixed = (a * 73856093) ^ (b * 19349663) ^ (c * 83492791)
    mixed = (mixed ^ (mixed >> 13)) * 1274126177
    return ((mixed ^ (mixed >> 16)) & 0xFFFF).astype(np.float32) / np.float32(65536)


Pattern = tuple[float, Floats, Floats]
"""Mean share of the second colour, its share at each point, brightness factor at each point."""


def _plain(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    zero = np.zeros(len(uv), np.float32)
    return 0.0, zero, zero + 1


def _speckle(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    fine = noise(uv, 4.0)
    return 0.1, 0.35 * np.clip(noise(uv, 0.6) - 0.55, 0, 1), 0.75 + 0.5 * fine


def _brick(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    row = np.floor(uv[:, 1] / (0.3 * scale))
    along = uv[:, 0] / scale + 0.5 * np.mod(row, 2)
    mortar = (np.mod(uv[:, 1] / (0.3 * scale), 1) < 0.15) | (np.mod(along, 1) < 0.06)
    tone = _cell_hash(row.astype(np.int64), np.floor(along).astype(np.int64), material.astype(np.int64))
    return 0.2, mortar.astype(np.float32), 0.8 + 0.4 * tone


def _facade(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    floor_height, bay = 3.1, 1.6 + 2.2 * scale
    floor, column = np.floor(uv[:, 1] / floor_height), np.floor(uv[:, 0] / bay)
    v, u = np.mod(uv[:, 1], floor_height) / floor_height, np.mod(uv[:, 0], bay) / bay
    pick = _cell_hash(column.astype(np.int64), np.zeros(len(uv), np.int64), material.astype(np.int64))
    ground, door = floor < 0.5, pick < 0.25
    margin = 0.14 + 0.2 * (1 - np.clip(scale, 0, 1))
    window = (np.abs(u - 0.5) < 0.5 - margin) & (v > np.where(ground & door, 0.0, 0.3)) & (v < 0.84)
    frame = window & ((np.abs(u - 0.5) > 0.5 - margin - 0.03) | (np.abs(u - 0.5) < 0.015) | (v > 0.8))
    ledge = (v > 0.95).astype(np.float32)
    tone = _cell_hash(floor.astype(np.int64), column.astype(np.int64), material.astype(np.int64))
    return (
        0.35,
        (window & ~frame).astype(np.float32),
        np.where(window, 0.7 + 0.6 * tone, 1 - 0.25 * ledge),
    )


def _stripes(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    across = np.where(material % 2 == 0, uv[:, 0], uv[:, 1])
    return 0.5, (np.mod(across / scale, 1) < 0.5).astype(np.float32), np.ones(len(uv), np.float32)


def _foliage(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    leaf = noise(uv, 3.0)
    return 0.4, np.clip(2.0 * noise(uv, 1.1) - 0.6, 0, 1), 0.45 + 1.1 * leaf


def _slabs(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    a, b = uv[:, 0] / scale, uv[:, 1] / scale
    joint = (np.mod(a, 1) < 0.05) | (np.mod(b, 1) < 0.05)
    tone = _cell_hash(np.floor(a).astype(np.int64), np.floor(b).astype(np.int64), material.astype(np.int64))
    return 0.1, 0.6 * joint.astype(np.float32), 0.88 + 0.24 * tone


def _noise(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    return 0.5, np.clip(3 * noise(uv, 0.8) - 1, 0, 1), np.ones(len(uv), np.float32)


def _asphalt(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    """Aggregate, stains, and cracks where slow noise passes its middle."""
    slow = noise(uv, 0.22)
    crack = np.clip(1 - np.abs(slow - 0.5) / 0.004, 0, 1) * (noise(uv + 17.0, 0.05) > 0.45)
    return 0.03, 0.6 * crack.astype(np.float32), (0.72 + 0.56 * noise(uv, 3.0)) * (0.85 + 0.3 * slow)


def _worn(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    gone = np.clip(5 * (noise(uv, 1.6) + 0.35 * noise(uv, 0.15) - 0.78), 0, 0.9)
    return 0.25, gone, 0.85 + 0.3 * noise(uv, 4.0)


def _panes(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    """One window for each whole number of u and v: mullion, transom, and blinds behind some."""
    column, floor = np.floor(uv[:, 0]), np.floor(uv[:, 1])
    u, v = uv[:, 0] - column, uv[:, 1] - floor
    tone = _cell_hash(floor.astype(np.int64), column.astype(np.int64), material.astype(np.int64))
    split = np.where(material % 3 == 0, np.abs(u - 0.5), np.abs(np.mod(3 * u, 1) - 0.5) + np.float32(0.42))
    frame = (split < 0.025) | (np.abs(v - 0.66) < 0.018) | (split > 0.88)
    blinds = (v > 0.35 + 1.1 * np.mod(7 * tone, 1)) & (tone > 0.35)
    lines = 0.85 + 0.3 * (np.mod(v * 24, 1) < 0.5)
    return 0.08, frame.astype(np.float32), np.where(blinds, 4.0 * lines, 0.5 + 1.1 * tone)


def _lap(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    along = np.where(material % 2 == 0, uv[:, 1], uv[:, 0]) / scale
    row = np.floor(along)
    tone = _cell_hash(row.astype(np.int64), np.floor(uv[:, 0] / 2.4).astype(np.int64), material.astype(np.int64))
    part = along - row
    return 0.1, (part < 0.12).astype(np.float32), (0.75 + 0.4 * part) * (0.9 + 0.2 * tone)


def _turf(uv: NDArray[np.float32], scale: NDArray[np.float32], material: NDArray[np.int32]) -> Pattern:
    """Grass: tufts over bare and dry spots."""
    dry = np.clip(4 * noise(uv, 0.5) - 1.9, 0, 1)
    return 0.4, dry, (0.35 + 1.3 * noise(uv, 2.2)) * (0.75 + 0.5 * noise(uv + 9.0, 0.3))


_PATTERNS = {
    PLAIN: _plain,
    SPECKLE: _speckle,
    BRICK: _brick,
    FACADE: _facade,
    STRIPES: _stripes,
    FOLIAGE: _foliage,
    SLABS: _slabs,
    NOISE: _noise,
    ASPHALT: _asphalt,
    WORN: _worn,
    PANES: _panes,
    LAP: _lap,
    TURF: _turf,
}
_TABLES: dict[str, Floats] = {}
