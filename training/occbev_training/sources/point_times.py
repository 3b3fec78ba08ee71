"""When each point of a cloud was measured: the conventions of LiDAR drivers, found by name, type and span.

A cloud without times gets them from the azimuth of its points, since the sensor turns at a constant rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occbev_training.sources.recording import RecordingError

FIELDS = {
    "time": "Velodyne or Leishen",
    "time_offset": "seconds from the stamp",
    "t": "Ouster",
    "timestamp": "Hesai, RoboSense or Livox",
    "offset_time": "Livox",
    "time_stamp": "Autoware XYZIRCAEDT",
}
"""Fields that hold times -> who writes them so, in the order in which they are tried."""

SPAN = (0.02, 0.25)
"""Seconds that the points of one rotation may take: a field with another span holds something else."""

_SCALES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
MODES = ("auto", "compensated", "azimuth", "clockwise", "counterclockwise")
"""What `--point-times` takes beside FIELD, FIELD:UNIT and FIELD:UNIT:absolute."""


@dataclass(frozen=True)
class PointTimes:
    """How the times of a recording's points are known.

    kind: point_times, azimuth or compensated; it is stored with every label. field, scale: the field that holds
    them, and its unit in seconds. absolute: whether they count from the epoch, not from the stamp. own_clock: whether
    they count from a zero of the sensor, so that the first point counts as measured at the stamp.
    spin, period: for azimuth, +1 counterclockwise seen from above or -1 clockwise, and the seconds of a turn.
    """

    kind: str
    field: str = ""
    scale: float = 1.0
    absolute: bool = False
    own_clock: bool = False
    spin: int = 0
    period: float = 0.1

    @property
    def text(self) -> str:
        """One line for people."""
        if self.kind == "azimuth":
            way = "counterclockwise" if self.spin > 0 else "clockwise"
            return f"no time field: by azimuth, {way}, {self.period * 1e3:.0f} ms a turn"
        if self.kind == "compensated":
            return "no time field: points count as compensated to their stamp"
        unit = next(name for name, scale in _SCALES.items() if scale == self.scale)
        base = "absolute" if self.absolute else "from the stamp"
        if self.own_clock:
            base = "on the sensor's own clock: the first point counts as measured at the stamp"
        return f"field {self.field} in {unit}, {base} ({FIELDS.get(self.field, 'named by hand')})"

    def offsets(
        self, cloud: NDArray[np.void], points: NDArray[np.float32], stamp_ns: int
    ) -> NDArray[np.float32] | None:
        """Return seconds (M,) from the stamp of each point, or None where points are compensated.

        cloud: (M,) structured. points: (M, 3) of it.
        """
        if self.kind == "compensated":
            return None
        if self.kind == "azimuth":
            return azimuth_offsets(points, self.spin, self.period)
        if self.own_clock:
            return _since_first(cloud[self.field], self.scale).astype(np.float32)
        return _seconds(cloud[self.field], self.scale, self.absolute, stamp_ns).astype(np.float32)


def find_point_times(
    cloud: NDArray[np.void],
    points: NDArray[np.float32],
    stamp_ns: int,
    period: float,
    mode: str = "auto",
    compensated: bool = False,
) -> PointTimes:
    """Decide from one cloud how the times of a recording's points are known.

    period: seconds of one rotation. mode: see `MODES`. compensated: whether clouds without times count as compensated.

    Raises:
        RecordingError: a field that was named is not there or has an impossible span, or the
            sense of rotation cannot be told.
    """
    names = cloud.dtype.names or ()
    if mode == "compensated":
        return PointTimes("compensated")
    if mode in ("clockwise", "counterclockwise"):
        return PointTimes("azimuth", spin=1 if mode == "counterclockwise" else -1, period=period)
    if mode not in ("auto", "azimuth"):
        return _find_named(cloud, names, stamp_ns, mode)
    if mode == "auto":
        for name in FIELDS:
            found = _fitting(cloud[name], name, stamp_ns) if name in names else None
            if found is not None:
                return found
        if compensated:
            return PointTimes("compensated")
    spin = spin_sense(points)
    if spin == 0:
        raise RecordingError(
            f"points have no times (fields {sorted(names)}) and no order that tells how the sensor turns; "
            "say --point-times clockwise, counterclockwise or compensated"
        )
    return PointTimes("azimuth", spin=spin, period=period)


def azimuth_offsets(points: NDArray[np.float32], spin: int, period: float) -> NDArray[np.float32]:
    """Return seconds (M,) since the first point, by how far the sensor has turned: frac(s (a - a0) / 2 pi) T."""
    if not len(points):
        return np.zeros(0, np.float32)
    azimuth = np.arctan2(points[:, 1].astype(np.float64), points[:, 0])
    first = azimuth[np.argmax(np.isfinite(azimuth))]
    turned = np.mod(spin * (azimuth - first) / (2 * np.pi), 1.0)
    beginning = turned[: max(1, len(turned) // 100)]
    beginning[beginning > 0.9] = 0.0  # what noise puts just before the first point
    return (turned * period).astype(np.float32)


def spin_sense(points: NDArray[np.float32]) -> int:
    """Tell from the order of points whether azimuth grows (+1) or falls (-1) while the sensor turns; 0 if unclear."""
    finite = points[np.isfinite(points).all(axis=1)]
    if len(finite) < 1000:
        return 0
    azimuth = np.arctan2(finite[:, 1].astype(np.float64), finite[:, 0])
    blocks = azimuth[: len(azimuth) // 200 * 200].reshape(200, -1)
    middle = np.angle(np.exp(1j * blocks).mean(axis=1))
    step = np.angle(np.exp(1j * np.diff(middle)))
    sense = float(np.mean(np.sign(step[np.abs(step) < np.pi / 2])) if len(step) else 0.0)
    return int(np.sign(sense)) if abs(sense) > 0.6 else 0


def _seconds(values: NDArray[np.generic], scale: float, absolute: bool, stamp_ns: int) -> NDArray[np.float64]:
    """Return times in seconds from the stamp."""
    if absolute:
        base = stamp_ns / 1e9 / scale  # subtracted before it is scaled: float64 holds no ns of the epoch
        return (values.astype(np.float64) - base) * scale
    return values.astype(np.float64) * scale


def _since_first(values: NDArray[np.generic], scale: float) -> NDArray[np.float64]:
    """Return seconds since the earliest point, subtracted before they are scaled."""
    exact = values if values.dtype.kind in "ui" else values.astype(np.float64)
    finite = exact[np.isfinite(exact.astype(np.float64))]
    return np.asarray((exact - finite.min()).astype(np.float64) * scale)


def _fitting(values: NDArray[np.generic], name: str, stamp_ns: int) -> PointTimes | None:
    """Return the first unit in which a field's values span one rotation near the stamp, or else anywhere; or None."""
    finite = values[np.isfinite(values.astype(np.float64))]
    if not len(finite):
        return None
    scales = ("ns", "us") if values.dtype.kind in "ui" else ("s", "ns", "us", "ms")
    for unit in scales:
        for absolute in (False, True):
            seconds = _seconds(finite, _SCALES[unit], absolute, stamp_ns)
            near = np.abs(seconds).max() < 1.0
            if near and SPAN[0] <= seconds.max() - seconds.min() <= SPAN[1]:
                return PointTimes("point_times", name, _SCALES[unit], absolute)
    for unit in scales:
        if SPAN[0] <= float(_since_first(finite, _SCALES[unit]).max()) <= SPAN[1]:
            return PointTimes("point_times", name, _SCALES[unit], own_clock=True)
    return None


def _find_named(cloud: NDArray[np.void], names: Sequence[str], stamp_ns: int, mode: str) -> PointTimes:
    """Read FIELD[:UNIT[:absolute]]."""
    name, unit, base = (*mode.split(":"), "", "")[:3]
    if name not in names or unit not in ("", *_SCALES) or base not in ("", "absolute", "stamp"):
        raise RecordingError(
            f"point times {mode!r}: want {', '.join(MODES)} or FIELD:UNIT:absolute with a field of "
            f"{sorted(names)} and a unit of {list(_SCALES)}"
        )
    if unit:
        return PointTimes("point_times", name, _SCALES[unit], base == "absolute")
    found = _fitting(cloud[name], name, stamp_ns)
    if found is None:
        low, high = float(cloud[name].min()), float(cloud[name].max())
        raise RecordingError(
            f"point times: field {name!r} runs from {low:g} to {high:g}: in no unit a rotation "
            f"of {SPAN[0]} to {SPAN[1]} s"
        )
    return found
