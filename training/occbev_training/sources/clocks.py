"""Clocks of a bag: offset and drift of stamps against the recorder, and against odometry in turns of the vehicle.

Stamps of a sensor whose clock is off place everything it sees where the vehicle was not. What can be
measured with confidence can be corrected; anything else is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from occbev.geometry import transform_points, yaw_from_rotation
from occbev.results import Sweep
from occbev.rig import Camera
from occbev.trajectory import Trajectory
from occbev_training.sources.deskew import middle_ns

SIMULATED_BEFORE = 10**17
"""Stamps before 1973 are those of a simulation that began at zero."""

CLOCK_OFFSET, CLOCK_DRIFT = 1.0, 50e-6
"""Largest accepted median of log time minus stamp in seconds, and slope of it in s/s."""

SEARCH, LARGEST, STEP = 0.25, 0.15, 0.005
"""Seconds of offset either way that are tried, that are accepted, and between two tries."""

TURNING = 0.1
"""Yaw rate in rad/s that makes a turn; straight on, no offset shows."""

WINDOWS, AGREE, PEAK_RATIO = 5, 0.005, 1.3
"""Windows that must tell the same offset, its largest standard error in seconds, and the least ratio of the
best peak to the next."""

CORRELATED = 0.7
"""Least correlation of a sensor's turns with the odometry's."""


@dataclass(frozen=True)
class ClockCorrection:
    """What is added to a topic's stamps: a constant, and what a drift makes since `pivot_ns`."""

    offset_ns: int
    drift: float = 0.0
    pivot_ns: int = 0

    def apply(self, stamp_ns: int) -> int:
        """Return the corrected stamp."""
        return stamp_ns + self.offset_ns + round(self.drift * (stamp_ns - self.pivot_ns))

    def plus(self, seconds: float) -> ClockCorrection:
        """Return the correction with a further constant."""
        return ClockCorrection(self.offset_ns + round(seconds * 1e9), self.drift, self.pivot_ns)


@dataclass(frozen=True)
class TopicTimes:
    """Stamps of a topic's messages in bag order: header's and log's (M,) int64 in ns."""

    stamp_ns: NDArray[np.int64]
    log_ns: NDArray[np.int64]

    @property
    def rate(self) -> float:
        """Messages per second by their stamps."""
        span = (self.stamp_ns.max() - self.stamp_ns.min()) / 1e9 if len(self.stamp_ns) > 1 else 0.0
        return float((len(self.stamp_ns) - 1) / span) if span > 0 else 0.0

    @property
    def lag(self) -> NDArray[np.float64]:
        """Log time minus stamp, in seconds."""
        return (self.log_ns - self.stamp_ns) / 1e9

    @property
    def simulated(self) -> bool:
        """Whether stamps are those of a simulation while the log has wall time: the two have nothing in common."""
        return bool(len(self.stamp_ns) and self.stamp_ns.max() < SIMULATED_BEFORE < self.log_ns.min())

    @property
    def drift(self) -> float:
        """How fast the lag grows, by a robust line through its ends' medians; see `drift_error`."""
        return self._drift[0]

    @property
    def drift_error(self) -> float:
        """Standard error of `drift`: a short or jittery recording does not tell it well."""
        return self._drift[1]

    @property
    def drifts(self) -> bool:
        """Whether the clock surely drifts more than is accepted."""
        return abs(self.drift) - 3 * self.drift_error > CLOCK_DRIFT

    @property
    def largest_step(self) -> float:
        """The largest change of the lag's median from ten messages to the next ten, in seconds."""
        blocks = len(self.stamp_ns) // 10
        if blocks < 2:
            return 0.0
        medians = np.median(self.lag[: blocks * 10].reshape(blocks, 10), axis=1)
        return float(np.abs(np.diff(medians)).max())

    @property
    def _drift(self) -> tuple[float, float]:
        third = len(self.stamp_ns) // 3
        if third < 3:
            return 0.0, np.inf
        order = np.argsort(self.stamp_ns, kind="stable")
        lag, time = self.lag[order], (self.stamp_ns[order] - self.stamp_ns.min()) / 1e9
        first, last = lag[:third], lag[-third:]
        step = float(np.median(time[-third:]) - np.median(time[:third]))
        if step <= 0:
            return 0.0, np.inf
        spread = [1.4826 * np.median(np.abs(part - np.median(part))) for part in (first, last)]
        error = 1.2533 * np.hypot(*spread) / np.sqrt(third) / step  # standard error of a median
        return float((np.median(last) - np.median(first)) / step), float(error)


def without_common_lag(times: Mapping[str, TopicTimes]) -> dict[str, TopicTimes]:
    """Take off the log times what all topics lag behind them alike, as where a bag that was played is recorded again."""
    lags = [float(np.median(own.lag)) for own in times.values() if len(own.stamp_ns)]
    common = float(np.median(lags)) if len(lags) > 1 else 0.0
    if abs(common) <= CLOCK_OFFSET or max(abs(lag - common) for lag in lags) > CLOCK_OFFSET:
        return dict(times)
    return {topic: TopicTimes(own.stamp_ns, own.log_ns - round(common * 1e9)) for topic, own in times.items()}


def by_log_times(times: Mapping[str, TopicTimes], reference: str) -> dict[str, ClockCorrection]:
    """Return a rough correction of every topic, such that it lags behind the log as the reference does.

    What stays is the difference between the delays of the topics: milliseconds.
    """
    corrections = {}
    base = times[reference]
    for topic, own in times.items():
        if topic == reference or not len(own.stamp_ns):
            continue
        offset = float(np.median(own.lag) - np.median(base.lag))
        drift = own.drift - base.drift if own.drifts or base.drifts else 0.0
        far = abs(offset) > CLOCK_OFFSET or drift != 0.0
        pivot = int(np.median(own.stamp_ns))
        corrections[topic] = ClockCorrection(round(offset * 1e9), drift, pivot) if far else ClockCorrection(0)
    return corrections


@dataclass(frozen=True)
class Turns:
    """How a sensor saw the vehicle turn: from and to (P,) int64 in ns by its stamps, turn (P,) in rad."""

    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    turn: NDArray[np.float64]


@dataclass(frozen=True)
class ClockOffset:
    """What must be added to a sensor's stamps so that it turns with the odometry; fault says why not to trust it."""

    seconds: float
    spread: float = 0.0
    correlation: float = 0.0
    fault: str = ""

    @property
    def text(self) -> str:
        """One line for people."""
        if self.fault:
            return self.fault
        return (
            f"{self.seconds * 1e3:+.1f} ms against the odometry, known to "
            f"{self.spread * 1e3:.1f} ms by {WINDOWS} windows, correlation {self.correlation:.2f}"
        )


def measure_offset(turns: Turns, trajectory: Trajectory) -> ClockOffset:
    """Find the offset at which a sensor's turns correlate best with the odometry's."""
    lags = np.arange(-SEARCH, SEARCH + STEP / 2, STEP)
    reach = round(SEARCH * 1e9)
    known = (turns.start_ns - reach >= trajectory.stamp_ns[0]) & np.isfinite(turns.turn)
    known &= turns.end_ns + reach <= trajectory.stamp_ns[-1]
    start, end, turn = turns.start_ns[known], turns.end_ns[known], turns.turn[known]
    odometry = _odometry_turns(start, end, lags, trajectory)  # (L, P)
    seconds = (end - start) / 1e9
    chosen = _near_turns(np.abs(odometry[len(lags) // 2]) / np.maximum(seconds, 1e-6), start)
    if chosen.sum() < 10 * WINDOWS:
        return ClockOffset(
            0.0,
            fault=f"not measurable: {int(chosen.sum())} pairs in turns faster than {TURNING} "
            f"rad/s, {10 * WINDOWS} wanted",
        )
    rate, own = odometry[:, chosen] / seconds[chosen], turn[chosen] / seconds[chosen]
    whole = _correlation(rate, own)
    best, ratio = _peak(whole, lags)
    parts = [_peak(_correlation(rate[:, part], own[part]), lags)[0] for part in _without_each(len(own))]
    # Estimates that share most of their samples lie close together whatever each window says: the
    # jackknife's standard error makes up for that.
    spread = float(np.sqrt((WINDOWS - 1) * np.var(parts)))
    found = ClockOffset(float(np.median(parts)), spread, float(whole.max()))
    faults = []
    if abs(best) > LARGEST:
        faults.append(f"{best * 1e3:+.0f} ms is more than {LARGEST * 1e3:.0f} ms")
    if spread > AGREE:
        faults.append(f"{WINDOWS} windows tell it to {spread * 1e3:.1f} ms only, {AGREE * 1e3:.0f} ms allowed")
    if ratio < PEAK_RATIO:
        faults.append(f"the best peak is only {ratio:.2f} times the next, {PEAK_RATIO} wanted")
    if whole.max() < CORRELATED:
        faults.append(f"turns correlate by {whole.max():.2f} only")
    return ClockOffset(found.seconds, spread, found.correlation, "; ".join(faults))


def _odometry_turns(
    start: NDArray[np.int64],
    end: NDArray[np.int64],
    lags: NDArray[np.float64],
    trajectory: Trajectory,
) -> NDArray[np.float64]:
    """Return the odometry's turns (L, P) over intervals moved by each lag."""
    base = int(trajectory.stamp_ns[0])
    time = (trajectory.stamp_ns - base) / 1e9
    yaw = np.unwrap([yaw_from_rotation(pose[:3, :3]) for pose in trajectory.ego2global])
    first, last = (start - base) / 1e9, (end - base) / 1e9
    return np.stack([np.interp(last + lag, time, yaw) - np.interp(first + lag, time, yaw) for lag in lags])


def _near_turns(rate: NDArray[np.float64], start: NDArray[np.int64], margin: float = 1.0) -> NDArray[np.bool_]:
    """Return which samples (P,) lie within a second of a turn: its beginning and end tell the time best."""
    turning = start[rate > TURNING] / 1e9
    if not len(turning):
        return np.zeros(len(start), np.bool_)
    place = np.clip(np.searchsorted(turning, start / 1e9), 1, max(1, len(turning) - 1))
    near = np.minimum(
        np.abs(turning[np.minimum(place, len(turning) - 1)] - start / 1e9), np.abs(turning[place - 1] - start / 1e9)
    )
    return near <= margin


def _without_each(count: int) -> list[NDArray[np.int64]]:
    """Return samples in time order without each of `WINDOWS` windows that have none in common."""
    samples = np.arange(count)
    return [np.setdiff1d(samples, window) for window in np.array_split(samples, WINDOWS)]


def _correlation(many: NDArray[np.float64], one: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Pearson's correlation (L,) of each row of `many` with `one`."""
    a = many - many.mean(axis=1, keepdims=True)
    b = one - one.mean()
    return a @ b / np.maximum(np.sqrt((a**2).sum(axis=1) * (b**2).sum()), 1e-12)


def _peak(values: NDArray[np.float64], lags: NDArray[np.float64]) -> tuple[float, float]:
    """Return the place of the highest value by a parabola, and how many times the next peak it is."""
    best = int(np.argmax(values))
    inner = np.flatnonzero((values[1:-1] > values[:-2]) & (values[1:-1] >= values[2:])) + 1
    others = values[inner[np.abs(lags[inner] - lags[best]) > 3 * STEP]]
    ratio = float(values[best] / max(others.max(initial=0.0), 1e-9))
    if not 0 < best < len(values) - 1:
        return float(lags[best]), ratio
    left, middle, right = values[best - 1 : best + 2]
    curve = left - 2 * middle + right
    return float(lags[best] + (0.5 * (left - right) / curve * STEP if curve < 0 else 0.0)), ratio


def joined(parts: Sequence[Turns]) -> Turns:
    """Put the turns of several stretches together."""
    if not parts:
        nothing = np.zeros(0, np.int64)
        return Turns(nothing, nothing, np.zeros(0))
    return Turns(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("start_ns", "end_ns", "turn")))


def stretches_in_turns(stamp_ns: NDArray[np.int64], trajectory: Trajectory, most: int = 150) -> list[NDArray[np.int64]]:
    """Return runs of neighbouring samples (numbers of `stamp_ns`, increasing) in and around turns.

    At most `most` pairs in all, the same number from each of `WINDOWS` stretches of the turns.
    """
    if len(stamp_ns) < 2:
        return []
    start, end = stamp_ns[:-1], stamp_ns[1:]
    turn = _odometry_turns(start, end, np.zeros(1), trajectory)[0]
    near = _near_turns(np.abs(turn) / np.maximum((end - start) / 1e9, 1e-6), start)
    near &= end - start < 250_000_000
    groups = np.array_split(np.flatnonzero(near), WINDOWS)
    chosen = np.concatenate([group[: most // WINDOWS] for group in groups])
    if not len(chosen):
        return []
    runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)
    return [np.append(run, run[-1] + 1) for run in runs]


def lidar_turns(sweeps: Sequence[Sweep]) -> Turns:
    """Return how the vehicle turned from each sweep to the next, by matching what stands around it.

    The match belongs to the middle of the points, wherever within the sweep its stamp lies.
    """
    clouds = [_standing(sweep) for sweep in sweeps]
    motion = np.zeros(3)
    turns = []
    for before, after in zip(clouds[:-1], clouds[1:], strict=True):
        motion = _match(before, after, motion)
        turns.append(motion[2])
    stamps = np.array([middle_ns(sweep) for sweep in sweeps], np.int64)
    return Turns(stamps[:-1], stamps[1:], np.array(turns, np.float64))


def _standing(sweep: Sweep) -> NDArray[np.float64]:
    """Return the places (M, 2) in ego of what stands 0.3 to 3 m above the road, one for each 0.25 m."""
    points = transform_points(sweep.lidar2ego, sweep.points[np.isfinite(sweep.points).all(axis=1)])
    distance = np.linalg.norm(points[:, :2], axis=1)
    use = (points[:, 2] > 0.3) & (points[:, 2] < 3.0) & (distance > 4) & (distance < 40)
    _, first = np.unique(np.floor(points[use, :2] / 0.25).astype(np.int64), axis=0, return_index=True)
    return points[use, :2][np.sort(first)]


def _match(before: NDArray[np.float64], after: NDArray[np.float64], guess: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x, y and yaw (3,) that carry points of `after` onto the lines of `before` (ICP, trimmed)."""
    if min(len(before), len(after)) < 50:
        return np.full(3, np.nan)
    motion = np.nan_to_num(guess)
    tree = cKDTree(before)
    _, around = tree.query(before, k=6)
    spread = before[around] - before[around].mean(axis=1, keepdims=True)  # (M, 6, 2)
    _, vectors = np.linalg.eigh(np.einsum("mka,mkb->mab", spread, spread))
    normals = vectors[:, :, 0]
    for reach in (2.0, 1.0, 1.0, 0.6, 0.6, 0.4, 0.4, 0.4):
        cosine, sine = np.cos(motion[2]), np.sin(motion[2])
        moved = after @ np.array([[cosine, sine], [-sine, cosine]]) + motion[:2]
        distance, nearest = tree.query(moved, distance_upper_bound=reach)
        use = np.isfinite(distance)
        if use.sum() < 50:
            return np.full(3, np.nan)
        normal, point = normals[nearest[use]], moved[use]
        error = np.einsum("ma,ma->m", normal, before[nearest[use]] - point)
        lever = normal[:, 1] * (point[:, 0] - motion[0]) - normal[:, 0] * (point[:, 1] - motion[1])
        jacobian = np.column_stack([normal, lever])
        weight = 1.0 / (1.0 + (error / 0.1) ** 2)
        step = np.linalg.lstsq(jacobian * weight[:, None], error * weight, rcond=None)[0]
        motion = motion + step
    return motion


def camera_turns(stamps: Sequence[int], images: Sequence[NDArray[np.uint8]], camera: Camera) -> Turns:
    """Return how the vehicle turned from each grey image (H, W) to the next, by tracked corners."""
    turns = [_image_turn(a, b, camera) for a, b in zip(images[:-1], images[1:], strict=True)]
    times = np.array(stamps, np.int64)
    return Turns(times[:-1], times[1:], np.array(turns, np.float64))


def _image_turn(before: NDArray[np.uint8], after: NDArray[np.uint8], camera: Camera) -> float:
    """Return the yaw of ego between two images, NaN where too few corners are found again."""
    corners = cv2.goodFeaturesToTrack(before, 400, 0.01, max(4, before.shape[1] / 100))
    if corners is None or len(corners) < 30:
        return np.nan
    size = (21, 21)
    found, ok, _ = cv2.calcOpticalFlowPyrLK(before, after, corners, corners.copy(), winSize=size, maxLevel=4)
    back, ok_back, _ = cv2.calcOpticalFlowPyrLK(after, before, found, found.copy(), winSize=size, maxLevel=4)
    use = (ok[:, 0] > 0) & (ok_back[:, 0] > 0) & (np.abs(back - corners).max(axis=(1, 2)) < 0.5)
    if use.sum() < 30:
        return np.nan
    rays = [_rays(points[use], camera) for points in (corners, found)]
    known = np.isfinite(rays[0] + rays[1]).all(axis=(1, 2))
    if known.sum() < 30:
        return np.nan
    rays = [own[known] for own in rays]
    cam2ego, pixel = camera.cam2ego[:3, :3], 1.0 / camera.intrinsic[0, 0]
    still = _rotation_alone(rays[0][:, 0], rays[1][:, 0], pixel)
    if still is not None:  # an essential matrix needs a motion to find
        return yaw_from_rotation(cam2ego @ still.T @ cam2ego.T)
    matrix, inside = cv2.findEssentialMat(rays[0], rays[1], np.eye(3), cv2.RANSAC, 0.999, 0.7 * pixel)
    if matrix is None or matrix.shape != (3, 3):
        return np.nan
    _, rotation, _, _ = cv2.recoverPose(matrix, rays[0], rays[1], np.eye(3), mask=inside)
    return yaw_from_rotation(cam2ego @ rotation.T @ cam2ego.T)


def _rotation_alone(
    before: NDArray[np.float64], after: NDArray[np.float64], pixel: float
) -> NDArray[np.float64] | None:
    """Return the rotation (3, 3) that carries slopes (C, 2) before to those after, if hardly any moves otherwise."""
    rays = [np.column_stack([slopes, np.ones(len(slopes))]) for slopes in (before, after)]
    a, b = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in rays)
    weight = np.ones(len(a))
    for _ in range(6):
        u, _, vt = np.linalg.svd((b * weight[:, None]).T @ a)
        rotation = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
        error = np.linalg.norm(b - a @ rotation.T, axis=1) / pixel
        weight = 1.0 / (1.0 + error**2)
    return rotation if np.mean(error < 1.0) > 0.8 else None


def _rays(corners: NDArray[np.float32], camera: Camera) -> NDArray[np.float64]:
    """Return the slopes x / z, y / z (C, 1, 2) of corners (C, 1, 2); NaN where the lens shows nothing."""
    rays = camera.lens.unproject(corners)
    return np.asarray(rays[:, None, :2] / rays[:, None, 2:])
