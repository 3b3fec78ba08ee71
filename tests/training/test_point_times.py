"""Times of points: every driver's convention is told from its field, and made from azimuth where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from occbev_training.sources.point_times import azimuth_offsets, find_point_times, spin_sense
from occbev_training.sources.recording import RecordingError

STAMP = 1_700_000_000_123_456_789
OFFSET = np.linspace(0.0, 0.1, 4000)


def turning(spin: int, rings: int = 4) -> np.ndarray:
    """Points (4000, 3) of a sensor that turns once, all rings of one azimuth together."""
    azimuth = 2.0 + spin * 2 * np.pi * np.arange(1000) / 1000
    points = np.stack([np.cos(azimuth), np.sin(azimuth), np.zeros(1000)], 1) * 12
    return np.repeat(points, rings, axis=0).astype(np.float32)


def cloud(name: str | None = None, values: np.ndarray | None = None) -> np.ndarray:
    kind = [(axis, "<f4") for axis in "xyz"]
    if name is not None:
        kind.append((name, values.dtype))
    rows = np.zeros(len(OFFSET), kind)
    if name is not None:
        rows[name] = values
    return rows


DRIVERS = {
    "Velodyne": ("time", OFFSET.astype("<f4"), OFFSET),
    "Velodyne, negative": ("time", (OFFSET - 0.1).astype("<f4"), OFFSET - 0.1),
    "Ouster": ("t", (OFFSET * 1e9).astype("<u4"), OFFSET),
    "Hesai": ("timestamp", STAMP / 1e9 + OFFSET, OFFSET),
    "Livox": ("timestamp", STAMP + OFFSET * 1e9, OFFSET),
    "Livox, whole": ("offset_time", (OFFSET * 1e9).astype("<u4"), OFFSET),
    "Autoware": ("time_stamp", (OFFSET * 1e9).astype("<u4"), OFFSET),
    "microseconds": ("t", (OFFSET * 1e6).astype("<u4"), OFFSET),
}


@pytest.mark.parametrize("driver", DRIVERS)
def test_each_driver_is_recognised(driver: str) -> None:
    name, values, wanted = DRIVERS[driver]
    rows, points = cloud(name, values), turning(1)
    found = find_point_times(rows, points, STAMP, 0.1)
    assert (found.kind, found.field) == ("point_times", name)
    assert name in found.text
    np.testing.assert_allclose(found.offsets(rows, points, STAMP), wanted, atol=2e-6)


def test_a_field_with_an_impossible_span_is_no_time() -> None:
    rows = cloud("time", np.zeros(4000, "<f4"))
    assert find_point_times(rows, turning(-1), STAMP, 0.1).kind == "azimuth"
    assert find_point_times(rows, turning(-1), STAMP, 0.1, compensated=True).kind == "compensated"
    with pytest.raises(RecordingError, match="runs from 0 to 0"):
        find_point_times(rows, turning(-1), STAMP, 0.1, "time")


@pytest.mark.parametrize("spin", [1, -1])
def test_azimuth_tells_the_time_where_no_field_does(spin: int) -> None:
    points = turning(spin)
    assert spin_sense(points) == spin
    found = find_point_times(cloud(), points, STAMP, 0.1)
    assert (found.kind, found.spin) == ("azimuth", spin)
    offsets = found.offsets(cloud(), points, STAMP)
    np.testing.assert_allclose(offsets, np.repeat(np.arange(1000) / 1000 * 0.1, 4), atol=1e-4)
    by_ring = points.reshape(1000, 4, 3).transpose(1, 0, 2).reshape(-1, 3)
    assert spin_sense(by_ring) == spin, "ring after ring"
    assert azimuth_offsets(points[:0], spin, 0.1).shape == (0,)


def test_what_cannot_be_told_is_asked_for() -> None:
    shuffled = np.random.default_rng(0).permutation(turning(1))
    with pytest.raises(RecordingError, match="--point-times clockwise"):
        find_point_times(cloud(), shuffled, STAMP, 0.1)
    for mode, spin in (("clockwise", -1), ("counterclockwise", 1)):
        assert find_point_times(cloud(), shuffled, STAMP, 0.1, mode).spin == spin
    assert find_point_times(cloud(), shuffled, STAMP, 0.1, "compensated").offsets(cloud(), shuffled, 0) is None
    rows = cloud("when", (OFFSET * 1e3).astype("<f4"))
    assert find_point_times(rows, shuffled, STAMP, 0.1, "when:ms").offsets(rows, shuffled, STAMP)[-1] == np.float32(0.1)
    with pytest.raises(RecordingError, match="want auto, compensated"):
        find_point_times(rows, shuffled, STAMP, 0.1, "never:ms")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("timestamp", 4321.5 + OFFSET),
        ("timestamp", ((4321.5 + OFFSET) * 1e9).astype("<u8")),
        ("t", ((4000.25 + OFFSET) * 1e6).astype("<u4")),
    ],
)
def test_times_on_the_clock_of_the_sensor_count_by_their_span(name: str, values: np.ndarray) -> None:
    """Since the sensor was switched on, say: where it begins is not known, so the first point has the stamp."""
    rows, points = cloud(name, values), turning(1)
    found = find_point_times(rows, points, STAMP, 0.1)
    assert (found.kind, found.own_clock) == ("point_times", True)
    assert "own clock" in found.text
    np.testing.assert_allclose(found.offsets(rows, points, STAMP), OFFSET, atol=2e-6)
