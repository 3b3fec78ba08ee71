"""What a bag must have to become training pairs: one verdict per requirement, with the numbers behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.config import ImageConfig
from occbev.ego_signals import JUDGED_M, WRONG_AXES
from occbev.geometry import invert_transform, pose_from_xyzw
from occbev.inference.preprocess import seen_rows
from occbev.messages.bags import BagReader
from occbev.messages.image_headers import encoded_size
from occbev.messages.readers import stamp_to_ns
from occbev.messages.tf import Buffer, clean_frame
from occbev.messages.topics import ODOMETRY, POSE, BagTopics
from occbev.rig import Camera
from occbev.trajectory import PoseError, Trajectory
from occbev_training.sources.bag_index import BagOptions, find_topics, raw_times, split_at_jumps, usable_stamps
from occbev_training.sources.bags import SMALL_ERROR, BagRecording
from occbev_training.sources.clocks import (
    AGREE,
    CLOCK_OFFSET,
    CORRELATED,
    LARGEST,
    ClockCorrection,
    ClockOffset,
    TopicTimes,
    Turns,
    by_log_times,
    camera_turns,
    joined,
    lidar_turns,
    measure_offset,
    stretches_in_turns,
    without_common_lag,
)
from occbev_training.sources.deskew import EgoBox
from occbev_training.sources.point_times import SPAN
from occbev_training.sources.recording import Recording, RecordingError

T = TypeVar("T")

CAMERA_RATE, ODOMETRY_RATE = 5.0, 20.0
"""Lowest accepted message rates in Hz."""

DIFFERENT = 0.5, np.deg2rad(3.0)
"""Metres and radians by which odometry and /tf may differ over a second; an estimate corrects itself now and then."""

IMAGES = 5
"""Images of a camera whose size is looked at."""

NOTICEABLE = 0.01
"""Seconds of clock offset from which on a fix is recommended."""

_SHOULD = {
    "IMU": ("sensor_msgs/msg/Imu",),
    "GNSS": ("sensor_msgs/msg/NavSatFix",),
    "vehicle speed": (
        "geometry_msgs/msg/TwistStamped",
        "geometry_msgs/msg/TwistWithCovarianceStamped",
        "autoware_vehicle_msgs/msg/VelocityReport",
        "autoware_auto_vehicle_msgs/msg/VelocityReport",
    ),
    "diagnostics": ("diagnostic_msgs/msg/DiagnosticArray",),
}


@dataclass(frozen=True)
class Verdict:
    """One requirement. must: whether a bag that fails it is refused."""

    requirement: str
    ok: bool
    text: str
    must: bool = True


def check_bag(path: Path, options: BagOptions | None = None, measure_turns: bool = True) -> list[Verdict]:
    """Judge a bag; problems become verdicts, only a bag that cannot be opened raises RecordingError.

    measure_turns: also compare clocks by how LiDAR and cameras see the vehicle turn; takes seconds.
    """
    options = options or BagOptions()
    bag = BagReader(path)
    try:
        verdicts: list[Verdict] = []
        try:
            topics = find_topics(bag, options)
            verdicts.append(Verdict("topics", True, f"{len(topics.images)} cameras, profile {topics.profile}"))
        except RecordingError as error:
            return [Verdict("topics", False, str(error))]
        try:
            times = read_times(bag, topics.all, options.clock)
        except RecordingError as error:
            return [*verdicts, Verdict("messages", False, str(error))]
        verdicts += _presence(bag, topics, times)
        parents, tf_path = _read_transforms(bag, topics, options.base_frame)
        verdicts.append(parents)
        clocks = without_common_lag(split_at_jumps(times)[0])
        for topic in dict.fromkeys([*topics.images.values(), *topics.lidars, topics.odometry]):
            if topic is not None and len(clocks[topic].stamp_ns):
                verdicts += [_stamps(topic, times[topic]), _clock(topic, clocks[topic])]
        for name, kinds in _SHOULD.items():
            there = any(kind in bag.topics.values() for kind in kinds)
            verdicts.append(Verdict(name, there, "present" if there else "absent", must=False))
        verdicts.append(Verdict("message counts", True, "as promised"))  # reading holds them against each other
    finally:
        bag.close()
    return verdicts + _as_recording(path, replace(options, topics=topics), measure_turns, tf_path)


def read_times(
    bag: BagReader, topics: Sequence[str], clock: Mapping[str, ClockCorrection] | None = None
) -> dict[str, TopicTimes]:
    """Read stamps, corrected by `clock`, and log times; raises RecordingError where the bag breaks off."""
    clock = clock or {}
    found: dict[str, list[tuple[int, int]]] = {t: [] for t in topics if t in bag.topics}
    for message in bag.messages(list(found)):
        stamp, topic = bag.stamp_ns(message), message.topic
        found[topic].append((clock[topic].apply(stamp) if topic in clock else stamp, message.log_ns))
    empty: dict[str, list[tuple[int, int]]] = {topic: [] for topic in topics}
    return {topic: TopicTimes(*np.array(pairs, np.int64).reshape(-1, 2).T) for topic, pairs in (empty | found).items()}


def _presence(bag: BagReader, topics: BagTopics, times: Mapping[str, TopicTimes]) -> list[Verdict]:
    """Cameras, their calibration topics, LiDAR and odometry: there, and often enough."""
    verdicts = []
    for name, topic in topics.images.items():
        rate = _rate(times[topic])
        verdicts.append(
            Verdict(
                f"camera {name}",
                _reaches(rate, CAMERA_RATE),
                f"{topic}: {rate:.1f} Hz, at least {CAMERA_RATE:g} wanted",
            )
        )
    if topics.lidar is None:
        verdicts.append(Verdict("lidar", False, "no sensor_msgs/PointCloud2 topic; vendor packets are not read"))
    for topic in topics.lidars:
        rate = _rate(times[topic])
        verdicts.append(Verdict("lidar", rate > 0, f"{topic}: {rate:.1f} Hz"))
    if topics.odometry is None and topics.tf not in bag.topics:
        verdicts.append(Verdict("odometry", False, f"no topic of {ODOMETRY} or {POSE}, and no {topics.tf}"))
    return verdicts  # poses are judged as the reader finds them


def _read_transforms(bag: BagReader, topics: BagTopics, base_frame: str) -> tuple[Verdict, Trajectory | None]:
    """One parent and, of fixed frames, one place for each frame; of the vehicle's own frame that is a must.

    Returns also the vehicle's poses in its parent, as the moving transforms tell them.
    """
    buffer, conflicts, poses = Buffer(1.0), dict[str, str](), dict[int, NDArray[np.float64]]()
    for message in bag.messages([t for t in (topics.tf_static, topics.tf) if t in bag.topics]):
        try:
            decoded = bag.decode(message)
        except RecordingError:
            continue  # the reader counts it
        buffer.add_message(decoded, message.topic == topics.tf_static)
        conflicts |= buffer.take_conflicts()
        for transform in decoded.transforms if message.topic == topics.tf else ():
            if clean_frame(transform.child_frame_id) == base_frame:
                with suppress(ValueError):
                    t, q = transform.transform.translation, transform.transform.rotation
                    stamp = stamp_to_ns(transform.header.stamp)
                    poses[stamp] = pose_from_xyzw((t.x, t.y, t.z), (q.x, q.y, q.z, q.w))
    text = "; ".join(conflicts.values()) or "each frame has one"
    verdict = Verdict("parents of frames", not conflicts, text, must=base_frame in conflicts)
    stamps = sorted(poses)
    if not stamps:
        return verdict, None
    return verdict, Trajectory(np.array(stamps, np.int64), np.stack([poses[stamp] for stamp in stamps]), max_gap=0.5)


def _odometry(recording: BagRecording) -> Verdict:
    """Poses often enough, or smooth enough, to interpolate between them."""
    where = recording.topics.odometry or f"poses of {recording.topics.tf}"
    stamps, (metres, radians) = recording.trajectory.stamp_ns, recording.trajectory.interpolation_error
    rate = _rate(TopicTimes(stamps, stamps))
    smooth = metres <= SMALL_ERROR[0] and radians <= SMALL_ERROR[1]
    left = f"interpolation leaves {metres * 100:.1f} cm and {np.rad2deg(radians):.2f} degrees"
    most = f"{SMALL_ERROR[0] * 100:g} cm and {np.rad2deg(SMALL_ERROR[1]):.1f} degrees"
    return Verdict(
        "odometry",
        _reaches(rate, ODOMETRY_RATE) or smooth,
        f"{where}: {rate:.1f} Hz, {left}; wanted are {ODOMETRY_RATE:g} Hz or at most {most}, 50 Hz are advised",
    )


def _reaches(rate: float, wanted: float) -> bool:
    """Whether a measured rate is the wanted one or more: stamps of exactly 5 Hz jitter about it."""
    return rate >= 0.99 * wanted


def _rate(times: TopicTimes) -> float:
    """Return the rate of the messages that are used, over those parts of the time that a jump back divides."""
    keep, jumps, _ = usable_stamps(times.stamp_ns.tolist())
    stamps = times.stamp_ns[keep]
    steps = np.delete(np.diff(stamps), [keep.index(jump) - 1 for jump in jumps]) / 1e9
    return float(len(steps) / steps.sum()) if len(steps) else 0.0


def _stamps(topic: str, times: TopicTimes) -> Verdict:
    """Stamps that are set, do not jump back and do not repeat. What is left out is counted, a jump divides the bag."""
    _, jumps, reasons = usable_stamps(times.stamp_ns.tolist())
    counts = ", ".join(f"{n} {reason}s" for reason, n in reasons.items())
    return Verdict(
        f"stamps of {topic}",
        not jumps and not sum(reasons.values()),
        f"{counts}, {len(jumps)} jumps back, of {len(times.stamp_ns)}; they are left out, "
        "a jump back begins another drive",
        must=reasons["zero stamp"] > 0.1 * len(times.stamp_ns),
    )


def _clock(topic: str, times: TopicTimes) -> Verdict:
    """A clock that runs with the recorder's."""
    lag, drift = times.lag, times.drift
    median, jitter = float(np.median(lag)), float(np.percentile(np.abs(lag - np.median(lag)), 99))
    error = f" +- {times.drift_error * 1e6:.0f}" if np.isfinite(times.drift_error) else ""
    return Verdict(
        f"clock of {topic}",
        clock_fault(times) is None,
        f"log - stamp: median {median * 1e3:.1f} ms, 99 % within {jitter * 1e3:.1f} ms, "
        f"drift {drift * 1e6:.0f}{error} ppm, largest step {times.largest_step * 1e3:.1f} ms",
    )


def clock_fault(times: TopicTimes) -> str | None:
    """Return why a topic's clock cannot be the recorder's, or None."""
    usable, _, _ = usable_stamps(times.stamp_ns.tolist())
    times = TopicTimes(times.stamp_ns[usable], times.log_ns[usable])
    if not len(times.stamp_ns) or times.simulated:
        return None
    median = float(np.median(times.lag))
    if abs(median) > CLOCK_OFFSET:
        return f"stamps are {median:.3f} s behind the log"
    if times.drifts:
        return f"stamps drift by {times.drift * 1e6:.0f} ppm against the log"
    if times.largest_step > CLOCK_OFFSET:
        return f"stamps jump by {times.largest_step:.3f} s against the log"
    return None


def _as_recording(path: Path, options: BagOptions, measure_turns: bool, tf_path: Trajectory | None) -> list[Verdict]:
    """Transforms, calibration, poses, point times and clocks, as the reader itself sees them."""
    try:
        recording = BagRecording(path, options)
    except (RecordingError, ValueError) as error:
        return [Verdict("transforms and calibration", False, str(error))]
    try:
        verdicts = [
            Verdict(
                f"camera_info and transform of {camera.name}",
                True,
                f"{camera.width}x{camera.height}, {camera.distortion_model}, in base_link at "
                f"{np.round(camera.cam2ego[:3, 3], 2).tolist()}",
            )
            for camera in recording.rig.cameras
        ]
        verdicts += [_image_size(recording, name, size) for name, size in recording.calibrated_sizes.items()]
        verdicts += [
            Verdict(f"rows of {rows.camera}", not rows.cuts_horizon, str(rows), must=False)
            for rows in seen_rows(recording.rig, ImageConfig())
        ]
        if len(recording.sweep_stamp_ns):
            verdicts.append(
                Verdict(
                    "transform of the LiDAR",
                    True,
                    f"in base_link at {np.round(recording.lidar2ego[:3, 3], 2).tolist()}",
                )
            )
        parts = "" if recording.parts == 1 else f" in the first of {recording.parts} parts"
        verdicts.append(
            Verdict("key frames", True, f"{len(recording.key_stamp_ns)} of {len(recording.rig)} cameras{parts}")
        )
        verdicts.append(_left_out(recording))
        verdicts.append(_odometry(recording))
        verdicts += [_poses(recording), _twist(recording), *_against_tf(recording, tf_path)]
        if len(recording.sweep_stamp_ns):
            verdicts.append(_point_times(recording))
            if measure_turns:
                verdicts += _turn_verdicts(recording)
    finally:
        recording.close()
    return verdicts


def _image_size(recording: BagRecording, camera: str, calibrated: tuple[int, int]) -> Verdict:
    """Width and height of a few images over the drive against those of the camera's calibration."""
    stamps, sizes = recording.exposures(camera), Counter[tuple[int, int]]()
    for number in np.unique(np.linspace(0, len(stamps) - 1, IMAGES).astype(int)).tolist() if len(stamps) else ():
        with suppress(RecordingError, ValueError):
            image = recording.exposure(camera, number)
            size = encoded_size(image) if isinstance(image, bytes) else (image.shape[1], image.shape[0])
            sizes.update([] if size is None else [size])
    found = ", ".join(f"{width}x{height}" for width, height in sizes) or "none that can be read"
    text = f"images {found}; calibration {calibrated[0]}x{calibrated[1]}"
    used = recording.rig[camera].width, recording.rig[camera].height
    if set(sizes) - {used}:
        text += f": images that are not {used[0]}x{used[1]} are missing"
    elif used != calibrated:
        text += ": it is scaled to the images"
    return Verdict(f"image size of {camera}", set(sizes) == {calibrated}, text, must=False)


def _left_out(recording: BagRecording) -> Verdict:
    """Messages that were left out, such as poses before an estimator has begun."""
    counts = ", ".join(f"{what} {count}" for what, count in recording.skipped.items())
    return Verdict("messages left out", not counts, counts or "none", must=False)


def _twist(recording: BagRecording) -> Verdict:
    """Whether the velocities of the odometry are in the axes of its child frame."""
    axes = recording.twist_axes
    if not axes.verdict:
        reason = f"{axes.metres:.1f} m are driven in directions that tell, {JUDGED_M:g} wanted"
        return Verdict("twist of odometry", True, f"not compared with poses: {reason}", must=False)
    text = f"{recording.topics.odometry}: {axes.describe(*recording.pose_frames)}"
    remedy = {"child": "", "parent": f"; {WRONG_AXES}", "neither": "; one of the two is wrong"}[axes.verdict]
    return Verdict("twist of odometry", axes.verdict == "child", text + remedy, must=False)


def _against_tf(recording: BagRecording, tf_path: Trajectory | None) -> list[Verdict]:
    """Odometry against /tf where both tell the vehicle's poses: over each second they must drive the same way."""
    if recording.topics.odometry is None or tf_path is None:
        return []
    apart = _largest_difference(recording.trajectory, tf_path)
    if apart is None:
        return []
    metres, radians = apart
    same = bool(metres <= DIFFERENT[0] and radians <= DIFFERENT[1])
    where = f"{recording.topics.odometry} and {recording.topics.tf}"
    text = f"{where}: over a second they differ by up to {metres:.2f} m and {np.rad2deg(radians):.1f} degrees"
    return [Verdict("odometry against /tf", bool(same), text + ("" if same else "; which one is right?"))]


def _largest_difference(one: Trajectory, other: Trajectory) -> tuple[float, float] | None:
    """Return the largest difference of the motions over a second, in metres and radians; None without a second shared."""
    first, last = max(one.stamp_ns[0], other.stamp_ns[0]), min(one.stamp_ns[-1], other.stamp_ns[-1])
    worst: tuple[float, float] | None = None
    for start in np.arange(first, last - 1_000_000_000, 1_000_000_000).tolist():
        try:
            motions = [path.relative(start, start + 1_000_000_000) for path in (one, other)]
        except PoseError:
            continue
        step = invert_transform(motions[0]) @ motions[1]
        metres = float(np.linalg.norm(step[:3, 3]))
        radians = float(np.arccos(np.clip((np.trace(step[:3, :3]) - 1) / 2, -1, 1)))
        worst = (metres, radians) if worst is None else (max(worst[0], metres), max(worst[1], radians))
    return worst


def _poses(recording: Recording) -> Verdict:
    """Whether every sweep and key frame has a pose."""
    missing = 0
    stamps = np.concatenate([recording.sweep_stamp_ns, recording.key_stamp_ns])
    for stamp in stamps:
        try:
            recording.trajectory.at(int(stamp))
        except PoseError:
            missing += 1
    path = recording.trajectory.ego2global[:, :3, 3]
    metres = float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
    return Verdict(
        "poses",
        missing <= 0.1 * len(stamps),
        f"{missing} of {len(stamps)} sweeps and key frames without one; {metres:.0f} m driven",
    )


def _point_times(recording: BagRecording) -> Verdict:
    """The per-point time convention that was found in the middle sweep, and whether its span is plausible."""
    try:
        found = recording.point_times
    except RecordingError as error:
        return Verdict("per-point time", False, str(error))
    assert found is not None
    if found.kind != "point_times":
        hint = "fine only if the driver compensates motion itself" if found.kind == "compensated" else "less exact"
        return Verdict("per-point time", False, f"{found.text}; {hint}", must=False)
    offset = recording.probe_offsets()
    low, high = float(np.nanmin(offset)), float(np.nanmax(offset))
    return Verdict(
        "per-point time",
        SPAN[0] <= high - low <= SPAN[1],
        f"{found.text}: {low * 1e3:.1f} to {high * 1e3:.1f} ms; a rotation lasts 20 to 250 ms",
    )


def measure_clocks(recording: BagRecording) -> dict[str, ClockOffset]:
    """Compare LiDAR and cameras with the odometry by how they see the vehicle turn; topic -> offset."""
    found: dict[str, ClockOffset] = {}
    trajectory = recording.trajectory
    for topic in recording.topics.lidars:
        runs = stretches_in_turns(recording.cloud_stamps(topic), trajectory)
        read = partial(recording.cloud, topic)
        turns = joined([lidar_turns(sweeps) for run in runs for sweeps in _readable(read, run)])
        found[topic] = measure_offset(turns, trajectory)
    for camera in recording.rig.cameras:
        stamps = recording.exposures(camera.name)
        scale = min(1.0, 800 / camera.width)
        size = round(camera.width * scale), round(camera.height * scale)
        small = camera.resize(size[0] / camera.width, size[1] / camera.height, (0, 0), size)
        parts = []
        for run in stretches_in_turns(stamps, trajectory):
            seen = partial(_describe_topics, recording, camera.name, stamps, size)
            parts += [_turns_between(exposures, small) for exposures in _readable(seen, run)]
        found[recording.topics.images[camera.name]] = measure_offset(joined(parts), trajectory)
    return found


def _turns_between(exposures: Sequence[tuple[int, NDArray[np.uint8]]], camera: Camera) -> Turns:
    """Return the turns between (stamp, grey image) in order of time."""
    return camera_turns([stamp for stamp, _ in exposures], [image for _, image in exposures], camera)


def _readable(read: Callable[[int], T], run: NDArray[np.int64]) -> Iterator[list[T]]:
    """Yield the stretches of a run that can be read, of at least two."""
    stretch: list[T] = []
    for number in run:
        try:
            stretch.append(read(int(number)))
        except RecordingError:
            if len(stretch) > 1:
                yield stretch
            stretch = []
    if len(stretch) > 1:
        yield stretch


def _describe_topics(
    recording: BagRecording,
    camera: str,
    stamps: NDArray[np.int64],
    size: tuple[int, int],
    number: int,
) -> tuple[int, NDArray[np.uint8]]:
    """Return the stamp and the grey image of one exposure."""
    return int(stamps[number]), _grey(recording.exposure(camera, number), size)


def _grey(image: NDArray[np.uint8] | bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a grey image of a size; an undecodable one is black, so that no corner is found in it."""
    if isinstance(image, bytes):
        grey = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE)
    else:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if grey is None:
        return np.zeros(size[::-1], np.uint8)
    return np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)


def _turn_verdicts(recording: BagRecording) -> list[Verdict]:
    """Offsets of LiDAR and cameras against the odometry."""
    verdicts = []
    for topic, offset in measure_clocks(recording).items():
        # Only an offset that is surely there makes a bag useless; noise measures anything.
        sure = offset.spread <= AGREE and offset.correlation >= CORRELATED
        far = sure and abs(offset.seconds) > LARGEST
        small = not offset.fault and abs(offset.seconds) <= NOTICEABLE
        advice = "" if offset.fault or small else "; --clock-fix corrects it"
        verdicts.append(Verdict(f"turns seen on {topic}", small, offset.text + advice, must=far))
    return verdicts


def fix_clocks(path: Path, options: BagOptions) -> BagOptions:
    """Return options that correct the clocks of a part: by log times where they are far off, then by turns.

    Raises:
        RecordingError: naming the topic whose offset cannot be told with confidence.
    """
    rough = _rough_clocks(path, options)
    recording = BagRecording(path, replace(options, clock=rough))
    try:
        measured = measure_clocks(recording)
        topics = recording.topics
    finally:
        recording.close()
    doubtful = [f"{topic}: {offset.text}" for topic, offset in measured.items() if offset.fault]
    if doubtful:
        raise RecordingError(f"{path}: clocks cannot be corrected: {'; '.join(doubtful)}")
    clock = {topic: rough.get(topic, ClockCorrection(0)).plus(offset.seconds) for topic, offset in measured.items()}
    return replace(options, topics=topics, clock=clock)


def _rough_clocks(path: Path, options: BagOptions) -> dict[str, ClockCorrection]:
    """Return what log times tell of the clocks of a part."""
    recording = BagRecording(path, options)
    try:
        if recording.topics.odometry is None:
            raise RecordingError(f"{path}: clocks are compared with an odometry topic, and there is none")
        return by_log_times(recording.times(), recording.topics.odometry)
    finally:
        recording.close()


def refuse_bad_clocks(path: Path, options: BagOptions) -> None:
    """Raise RecordingError naming the topic whose clock is surely not the recorder's."""
    bag = BagReader(path)
    try:
        topics = find_topics(bag, options)
        times = raw_times(bag, topics)
    finally:
        bag.close()
    faults = [
        f"{topic}: {fault}"
        for stretch in split_at_jumps(times)
        for topic, own in without_common_lag(stretch).items()
        if (fault := clock_fault(own)) is not None
    ]
    simulated = [topic for topic, own in times.items() if own.simulated]
    others = [topic for topic, own in times.items() if len(own.stamp_ns) and not own.simulated]
    if simulated and others:
        raise RecordingError(
            f"{path}: {', '.join(simulated)} have simulated time, {', '.join(others)} have wall time; record all of them "
            "with use_sim_time, or none"
        )
    if faults:
        raise RecordingError(f"{path}: {'; '.join(faults)}. Give --clock-fix to measure and correct it")


def propose_ego_box(recording: Recording, sweeps: int = 40, share: float = 0.9) -> EgoBox | None:
    """Box the cells around the vehicle that are hit in nearly every sweep while it moves; None without any.

    Sweeps that cannot be read or have no pose are left out. Raises RecordingError where the vehicle
    hardly moves: then everything is hit in every sweep.
    """
    used, places = [], []
    for index in np.unique(np.linspace(0, len(recording.sweep_stamp_ns) - 1, sweeps).astype(int)):
        try:
            places.append(recording.trajectory.at(int(recording.sweep_stamp_ns[index]))[:3, 3])
            used.append(recording.sweep(int(index)))
        except (PoseError, RecordingError):
            del places[len(used) :]
    if not used or np.linalg.norm(np.array(places) - places[0], axis=1).max() < 20.0:
        raise RecordingError(f"{recording.name}: it moves less than 20 m, so its own body does not stand out")
    pitch, reach, counts = 0.1, 6.0, Counter[tuple[int, ...]]()
    for sweep in used:
        points = np.asarray(sweep.points, np.float64) @ sweep.lidar2ego[:3, :3].T + sweep.lidar2ego[:3, 3]
        near = points[np.abs(points).max(axis=1) < reach]
        for cell in np.unique(np.floor(near / pitch).astype(int), axis=0).tolist():
            counts[tuple(cell)] += 1
    often = np.array([cell for cell, count in counts.items() if count > share * len(used)])
    # The road under the vehicle is hit in every sweep, too.
    body = often[often[:, 2] * pitch >= 0.1] if len(often) else often
    if not len(body):
        return None
    low, high = body.min(axis=0) * pitch, (body.max(axis=0) + 1) * pitch
    return EgoBox(tuple(np.round(low, 2).tolist()), tuple(np.round(high, 2).tolist()))
