"""Camera lenses: from directions to pixels and back, for every distortion model of ROS that is understood.

One object serves rectification, labels, overlays and network geometry; an unknown model is an error everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Maps = tuple[NDArray[np.int16], NDArray[np.uint16]]

COEFFICIENTS = {"none": (0,), "plumb_bob": (4, 5), "rational_polynomial": (8, 12, 14), "equidistant": (4,)}
"""Distortion model -> how many coefficients it may have, in ROS CameraInfo order; none at all means no distortion."""

MAX_FISHEYE_ANGLE = np.deg2rad(95.0)
"""Largest angle between a ray and the optical axis that an equidistant lens is taken to see."""

MAX_SLOPE = np.tan(np.deg2rad(89.0))
"""Largest x / z of a ray through a lens without fisheye."""

MATRIX_COLUMNS = 18
"""Columns of a lens as one array (3, 18): the intrinsic, and in the last row the model's number and coefficients."""

NEWTON_STEPS = 20
EXACT = 1e-9
"""Change of a slope or of an angle at which an inversion has converged."""

_QUARTER = np.array([[0.0, -1.0], [1.0, 0.0]])
"""A quarter turn clockwise in x right, y down."""

NOWHERE = -30_000
"""Pixel of rectification maps that lies outside every image."""


class LensError(ValueError):
    """A lens that is not understood; the text says which value and what would be right."""


@dataclass(frozen=True, eq=False)
class Lens:
    """Maps directions of a camera frame (x right, y down, z forward) to pixels (u right, v down) and back.

    intrinsic: (3, 3) in pixels. model: a key of `COEFFICIENTS`. coefficients: in ROS CameraInfo order; empty or
    all zero is a pinhole, but for "equidistant", which is a fisheye with zeros as well.
    Pixels count as the intrinsic does: in a `Camera`, pixel i covers [i, i + 1).
    """

    intrinsic: Array
    model: str = "none"
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.model not in COEFFICIENTS:
            raise LensError(f"distortion model {self.model!r} is unknown; known are {', '.join(COEFFICIENTS)}")
        if self.coefficients and len(self.coefficients) not in COEFFICIENTS[self.model]:
            wanted = " or ".join(map(str, COEFFICIENTS[self.model]))
            raise LensError(
                f"distortion model {self.model} takes {wanted} coefficients, got {len(self.coefficients)}: "
                f"{list(self.coefficients)}"
            )
        if not np.all(np.isfinite(self.coefficients)):
            raise LensError(f"distortion coefficients must be finite, got {list(self.coefficients)}")

    @classmethod
    def from_matrix(cls, matrix: ArrayLike) -> Lens:
        """Read `as_matrix` back; (3, 3) is a pinhole. A matrix that an image warp (3, 3) was folded into is as good."""
        matrix = np.asarray(matrix, np.float64)
        if matrix.shape[1] == 3 or not matrix[2, 3]:
            return cls(matrix[:, :3])
        model = list(COEFFICIENTS)[int(matrix[2, 3])]
        return cls(matrix[:, :3], model, tuple(matrix[2, 4 : 4 + max(COEFFICIENTS[model])].tolist()))

    def as_matrix(self) -> Array:
        """Return the lens as one array (3, 18), whose first three columns are the intrinsic."""
        matrix = np.zeros((3, MATRIX_COLUMNS))
        matrix[:, :3] = self.intrinsic
        if not self.is_pinhole:
            matrix[2, 3] = list(COEFFICIENTS).index(self.model)
            matrix[2, 4 : 4 + len(self.coefficients)] = self.coefficients
        return matrix

    @property
    def is_pinhole(self) -> bool:
        """Whether straight lines stay straight: nothing distorts."""
        return not self.coefficients or (self.model != "equidistant" and not any(self.coefficients))

    @property
    def is_fisheye(self) -> bool:
        """Whether the lens sees directions beside and behind the image plane."""
        return self.model == "equidistant" and not self.is_pinhole

    @cached_property
    def max_angle(self) -> float:
        """Largest angle from the optical axis in radians up to which pixels move outwards; beyond, they fold back."""
        if self.is_pinhole:
            return float(np.pi / 2)
        if self.is_fisheye:
            return min(MAX_FISHEYE_ANGLE, _first_turn(*self._radial))
        return float(np.arctan(min(MAX_SLOPE, _first_turn(*self._radial))))

    def project(self, points: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
        """Project (M, 3) points of the camera frame, at any distance.

        Returns: pixels (M, 2), and which of them (M,) the lens can see: in front of it, or for a fisheye up to
            95 degrees aside, and not beyond the angle where the distortion folds back. Other pixels are NaN.
            Whether a pixel is inside the image is not asked.
        """
        points = np.asarray(points, np.float64).reshape(-1, 3)
        radius, depth = np.hypot(points[:, 0], points[:, 1]), points[:, 2]
        angle = np.arctan2(radius, depth)
        valid = (angle <= self.max_angle) if self.is_fisheye else (depth > 1e-9) & (angle < self.max_angle)
        valid &= np.any(points != 0, axis=1)
        pixels = np.full((len(points), 2), np.nan)
        seen, radius, angle = points[valid], radius[valid], angle[valid]
        if self.is_fisheye:
            scale = np.divide(self._distort_angle(angle), radius, out=np.zeros_like(angle), where=radius > 0)
            slopes = seen[:, :2] * scale[:, None]
        else:
            slopes = self._distort(seen[:, :2] / seen[:, 2:])
        pixels[valid] = slopes @ self.intrinsic[:2, :2].T + self.intrinsic[:2, 2]
        return pixels, valid

    def see(self, points: ArrayLike) -> tuple[Array, Array]:
        """Return pixels (M, 2) of points (M, 3) of the camera frame, and how far away they are (M,).

        That is the depth, or for a fisheye the distance; 0 where the lens cannot see a point.
        """
        points = np.asarray(points, np.float64).reshape(-1, 3)
        pixels, seen = self.project(points)
        away = np.linalg.norm(points, axis=1) if self.is_fisheye else points[:, 2]
        return np.nan_to_num(pixels, nan=-1e6), np.where(seen, away, 0.0)

    def rays(self, pixels: ArrayLike) -> Array:
        """Return where pixels (M, 2) look (M, 3), per metre of what `see` calls away; NaN where a lens shows nothing."""
        rays = self.unproject(pixels)
        return rays if self.is_fisheye else rays / rays[:, 2:]

    def unproject(self, pixels: ArrayLike) -> Array:
        """Return the unit rays (M, 3) of the camera frame that reach pixels (M, 2); NaN where none does."""
        pixels = np.asarray(pixels, np.float64).reshape(-1, 2)
        slopes = (pixels - self.intrinsic[:2, 2]) @ np.linalg.inv(self.intrinsic[:2, :2]).T
        if self.is_fisheye:
            return self._fisheye_rays(slopes)
        straight = slopes if self.is_pinhole else self._straighten(slopes)
        rays = np.column_stack([straight, np.ones(len(straight))])
        return np.asarray(rays / np.linalg.norm(rays, axis=1, keepdims=True))

    def scale(self, scale_x: float, scale_y: float) -> Lens:
        """Return the lens of an image scaled by these factors."""
        return Lens(np.diag([scale_x, scale_y, 1.0]) @ self.intrinsic, self.model, self.coefficients)

    @property
    def can_turn(self) -> bool:
        """Whether `turn` is possible: a tilted sensor has coefficients that a turn does not keep."""
        return not any(self.coefficients[12:])

    def turn(self, height: int) -> Lens:
        """Return the lens of an image of this height that is turned clockwise by a quarter; raises LensError if tilted."""
        if not self.can_turn:
            raise LensError(f"a lens with a tilted sensor cannot be turned: coefficients {list(self.coefficients)}")
        intrinsic = np.eye(3)
        intrinsic[:2, :2] = _QUARTER @ self.intrinsic[:2, :2] @ _QUARTER.T
        intrinsic[:2, 2] = _QUARTER @ self.intrinsic[:2, 2] + [height, 0]
        c = list(self.coefficients)
        if self.model in ("plumb_bob", "rational_polynomial") and c:
            c[2], c[3] = c[3], -c[2]  # p1 and p2: a direction, (p2, p1)
        if len(c) >= 12:
            c[8:12] = -c[10], -c[11], c[8], c[9]  # thin prism: two directions, (s1, s3) and (s2, s4)
        return Lens(intrinsic, self.model, tuple(c))

    def maps(self, target: Array, size: tuple[int, int]) -> Maps:
        """Return the rectification maps for `cv2.remap`: where each pixel of a pinhole image lies in this one.

        target: (3, 3) intrinsic of the pinhole. size: its (width, height). Pixel i covers [i, i + 1) in both.
        Pixels of directions that the lens does not see lie outside the image.
        """
        # OpenCV puts pixel centres at integers, the intrinsics here at + 0.5: shift the principal points.
        half = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        build = cv2.fisheye.initUndistortRectifyMap if self.is_fisheye else cv2.initUndistortRectifyMap
        coefficients = np.array(self.coefficients or (0.0,) * 4)
        first, second = build(
            self.intrinsic - half, coefficients, np.eye(3), np.asarray(target) - half, size, cv2.CV_16SC2
        )
        places = np.array(first, np.int16)
        places[self._unseen(np.asarray(target, np.float64), size)] = NOWHERE
        return places, np.asarray(second, np.uint16)

    def _unseen(self, target: Array, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Return which pixels (H, W) of a pinhole image look further aside than the lens sees."""
        pixels = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in size)), -1).reshape(-1, 2)
        rays = Lens(target).unproject(pixels)
        return np.asarray(np.arccos(np.clip(rays[:, 2], -1, 1)) > self.max_angle).reshape(size[1], size[0])

    @property
    def _radial(self) -> tuple[Polynomial, Polynomial]:
        """Numerator and denominator of the distorted radius over the radius, or of the angle for a fisheye."""
        c = self.coefficients
        if self.model == "equidistant":
            return Polynomial([0, 1, 0, c[0], 0, c[1], 0, c[2], 0, c[3]]), Polynomial([1.0])
        k3 = c[4] if len(c) > 4 else 0.0
        below = [1, 0, c[5], 0, c[6], 0, c[7]] if len(c) >= 8 else [1.0]
        return Polynomial([0, 1, 0, c[0], 0, c[1], 0, k3]), Polynomial(below)

    def _distort_angle(self, angle: Array) -> Array:
        """Return the radius in units of the focal length at which a fisheye shows rays (M,) at an angle."""
        return np.asarray(self._radial[0](angle))

    def _distort(self, slopes: Array) -> Array:
        """Return the distorted slopes (M, 2) of x / z, y / z."""
        if self.is_pinhole or not len(slopes):
            return slopes
        points = np.column_stack([slopes, np.ones(len(slopes))])
        none = np.zeros(3)
        pixels, _ = cv2.projectPoints(points[:, None], none, none, np.eye(3), np.array(self.coefficients))
        return np.asarray(pixels, np.float64).reshape(-1, 2)

    def _fisheye_rays(self, slopes: Array) -> Array:
        radius = np.linalg.norm(slopes, axis=1)
        above, slope = self._radial[0], self._radial[0].deriv()
        angle = _start(above, self.max_angle, radius)
        for _ in range(NEWTON_STEPS):
            step = (above(angle) - radius) / slope(angle)
            angle = np.clip(angle - np.nan_to_num(step), 0, self.max_angle)
        angle[np.abs(above(angle) - radius) > 1e-6] = np.nan
        unit = np.divide(slopes, radius[:, None], out=np.zeros_like(slopes), where=radius[:, None] > 0)
        return np.asarray(np.column_stack([unit * np.sin(angle)[:, None], np.cos(angle)]), np.float64)

    def _straighten(self, slopes: Array) -> Array:
        """Invert `_distort`, by Newton's method from the inverse of the radial part alone; NaN where none is found."""
        radius, limit = np.linalg.norm(slopes, axis=1), float(np.tan(self.max_angle))
        above, below = self._radial
        start = _start(lambda r: above(r) / below(r), limit, radius)
        ratio = np.divide(start, radius, out=np.ones_like(radius), where=radius > 0)
        found = slopes * ratio[:, None]
        for _ in range(NEWTON_STEPS):
            step = _newton_step(self._distort, found, slopes)
            found = found - step
            if not np.any(np.abs(step) > EXACT):
                break
        wrong = np.abs(self._distort(found) - slopes).max(axis=1, initial=0) > 1e-6
        found[wrong | (np.linalg.norm(found, axis=1) > limit)] = np.nan
        return found


def _newton_step(distort: Callable[[Array], Array], found: Array, wanted: Array) -> Array:
    """Return by how much (M, 2) slopes must go down so that they distort to those that are wanted."""
    small = 1e-6
    error = distort(found) - wanted
    by_x = (distort(found + [small, 0]) - distort(found - [small, 0])) / (2 * small)
    by_y = (distort(found + [0, small]) - distort(found - [0, small])) / (2 * small)
    determinant = by_x[:, 0] * by_y[:, 1] - by_x[:, 1] * by_y[:, 0]
    determinant = np.where(np.abs(determinant) < 1e-9, 1e-9, determinant)
    x = (error[:, 0] * by_y[:, 1] - error[:, 1] * by_y[:, 0]) / determinant
    y = (error[:, 1] * by_x[:, 0] - error[:, 0] * by_x[:, 1]) / determinant
    return np.clip(np.nan_to_num(np.stack([x, y], 1)), -0.5, 0.5)


def _start(radial: Callable[[Array], Array], limit: float, wanted: Array) -> Array:
    """Return where a growing function of [0, limit] comes near the wanted values, by a table."""
    places = np.linspace(0, limit, 1024)
    return np.interp(wanted, radial(places), places)


def _first_turn(above: Polynomial, below: Polynomial) -> float:
    """Return the smallest positive place where above / below stops growing or has a pole; infinity if nowhere."""
    ends = [(above.deriv() * below - above * below.deriv()).roots(), below.roots()]
    roots = np.concatenate(ends)
    real = roots[(np.abs(roots.imag) < 1e-9) & (roots.real > 1e-9)].real
    return float(real.min(initial=np.inf))
