"""Recordings to gated shards: label, measure, refuse what is not trustworthy, store the rest.

A unit of work is a stretch of one drive. It is a pure function of recording and configuration, leaves
either finished shards with a manifest or nothing, and so can be cut off and run again anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev import __version__
from occbev.files import file_hash, file_name, remove_abandoned, replace_file
from occbev.geometry import invert_transform
from occbev.grid import GRIDS, VoxelGrid
from occbev.messages.image_headers import image_fault
from occbev.results import CameraFrame, FrameSet
from occbev.rig import CameraRig
from occbev.trajectory import PoseError
from occbev_training.data.shards import (
    SHARD_BYTES,
    PairSample,
    ShardError,
    ShardReader,
    ShardWriter,
    write_index,
)
from occbev_training.occupancy.extrinsics import RigVerdict, gather, judge_rig
from occbev_training.occupancy.labels import Examined, LabelBuilder, LabelConfig
from occbev_training.occupancy.paper import paper_label
from occbev_training.occupancy.quality import (
    LIMITS,
    border_ratio,
    broken_limits,
    measure_key,
    observed_drop,
)
from occbev_training.sources.deskew import deskew_rays
from occbev_training.sources.recording import UNEXPECTED, Recording, RecordingError, describe_error, require_beam_origin

logger = logging.getLogger(__name__)

FLAG_ONLY = frozenset({"q3_observed_drop", "q6_camera_alignment", "q8_border_ratio"})
"""Limits that mark a sample but do not refuse it: a blocked view, small pictures, or a wall that
happens to stand along the border break them, too. Over a whole drive they tell a fault."""


VARIANTS = ("occbev", "boxes", "occbev_paper")
"""How labels can be made; a folder holds one variant."""


@dataclass(frozen=True)
class PairConfig:
    """How pairs are made; its hash, with the label's, names what is in a folder."""

    label: LabelConfig = field(default_factory=LabelConfig)
    """The labels."""
    grid: VoxelGrid = GRIDS["occ3d"]
    """Their grid."""
    segment: int = 200
    """Key frames of one unit of work."""
    min_cameras: int | None = None
    """Fewest cameras of a sample; None is all but one."""
    min_support: float = 0.5
    """Smallest share of the window's expected sweeps that must be there."""
    max_camera_dt: float | None = None
    """An image farther from the key time than this many seconds is left out; None: than `camera_reach`."""
    min_travel: float = 0.5
    """Metres since the last kept key frame; nearer ones count as standing."""
    max_standing: int = 10
    """Standing key frames that are kept in a row."""
    thorough_every: int = 20
    """Every n-th key frame is also measured for determinism, and holds what is known of the cameras; 0 for none."""
    gate: bool = True
    """Refuse samples that break a limit; off, they are only marked."""
    lidar: bool = False
    """Store the key sweep's returns, too."""
    shard_bytes: int = SHARD_BYTES
    """Size at which a shard is closed."""
    variant: str = "occbev"
    """How labels are made: occbev is free of annotations, boxes uses them, occbev_paper is the published
    recipe with its defects."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"pair variant {self.variant!r}; known are {', '.join(VARIANTS)}")
        if (self.variant == "boxes") != (self.label.objects == "boxes"):
            label = dataclasses.replace(self.label, objects="boxes" if self.variant == "boxes" else "evidence")
            object.__setattr__(self, "label", label)
        if self.segment < 1 or (self.max_camera_dt or 1) <= 0 or self.max_standing < 0:
            raise ValueError(
                f"pair config needs segment >= 1, max_camera_dt > 0 and max_standing >= 0; "
                f"got {self.segment}, {self.max_camera_dt}, {self.max_standing}"
            )
        fewest = 1 if self.min_cameras is None else self.min_cameras
        if fewest < 1 or not 0 <= self.min_support <= 1 or self.min_travel < 0:
            raise ValueError(
                f"pair config needs min_cameras >= 1, min_support in 0..1 and min_travel >= 0; "
                f"got {self.min_cameras}, {self.min_support:g}, {self.min_travel:g}"
            )

    @property
    def hash(self) -> str:
        """Twelve hex digits over every parameter that a sample depends on."""
        record = dataclasses.asdict(self) | {"grid": self.grid.hash, "label": self.label.hash}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Unit:
    """Key frames [first, last) of one drive."""

    drive: str
    first: int
    last: int

    @property
    def name(self) -> str:
        """Prefix of the unit's files."""
        return f"{self.drive}-{self.first:06d}"


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit: samples kept, key frames refused by reason, shards by name with hash."""

    unit: Unit
    samples: int
    refused: Mapping[str, int]
    shards: Mapping[str, str]
    config_hash: str
    rows: Sequence[Mapping[str, Any]]
    source: str = ""
    """Fingerprint of what the recording was opened from and how."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """Camera -> kept samples without its image; each sample holds the reason."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Topic and reason -> messages of the recording that were left out, told by its first unit."""
    calibration: Mapping[str, str] = field(default_factory=dict)
    """Camera -> what its images say of its calibration."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """What was refused or missing -> the first case of it, in words with its key frame, topic and value."""


@dataclass(frozen=True)
class UnitFailure:
    """A unit that could not be made, and why; what it had written is gone."""

    unit: Unit
    reason: str


UNEXPECTED_ERROR = "unexpected_error"
"""Why a key frame is refused where the fault is not in its data but in the code."""


@dataclass
class Refusals:
    """Key frames that became no pair.

    counts: reason -> how many. first: reason -> the first one in words: key frame, topic or file, value.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        """Count one key frame."""
        self.counts[name] += 1
        self.explain(name, reason)

    def explain(self, name: str, reason: str) -> None:
        """Note a reason, where it is the first of its name."""
        self.first.setdefault(name, reason)


def units_of(drive: str, keys: int, segment: int) -> list[Unit]:
    """Cut a drive of `keys` key frames into units."""
    return [Unit(drive, first, min(first + segment, keys)) for first in range(0, keys, segment)]


VALIDATION, BETWEEN = "validation", "between"
"""Splits of what is held out, and of what lies too near to it to be learned from."""


def my_share(units: Sequence[Unit], task_index: int, num_tasks: int) -> list[Unit]:
    """Return the units of one task of an array job; raises ValueError for an impossible index."""
    if not 0 <= task_index < num_tasks:
        raise ValueError(f"task index {task_index} is not in 0..{num_tasks - 1}")
    return list(units)[task_index::num_tasks]


def make_unit(
    recording: Recording,
    unit: Unit,
    folder: Path,
    config: PairConfig,
    progress: Callable[[], None] = lambda: None,
    source: str = "",
) -> UnitReport:
    """Write the shards of one unit and then its manifest; a unit that is finished is left as it is.

    One with key frames that could not be read is tried again: what was in the way may be gone.

    progress: called after every key frame. source: the opener's fingerprint of the recording.
    """
    done = read_manifest(folder / f"{file_name(unit.name, 'drive name')}.json", config)
    if done is not None and (done.unit, done.source) == (unit, source) and not _may_go_better(done):
        for _ in range(unit.first, unit.last):
            progress()
        return done
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder, unit.name)
    rig = _judge_rig(recording, unit, config)
    writer = ShardWriter(folder, unit.name, config.shard_bytes)
    refused, missing = Refusals(), Counter[str]()
    try:
        for sample, values, broken in _samples(recording, unit, config, refused, progress, rig.agreement):
            writer.add(sample, _row(recording, sample, values, broken))
            for camera, reason in sample.meta["missing"].items():
                missing[camera] += 1
                refused.explain(camera, f"{sample.key}: {reason}")
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    _flag_observed_drop(writer.rows)
    report = UnitReport(
        unit,
        len(writer.rows),
        dict(sorted(refused.counts.items())),
        writer.shards,
        config.hash,
        writer.rows,
        source,
        dict(sorted(missing.items())),
        getattr(recording, "skipped", {}) if unit.first == 0 else {},
        {verdict.camera: verdict.text for verdict in rig.cameras},
        dict(sorted(refused.first.items())),
    )
    _write_manifest(folder / f"{unit.name}.json", report)
    return report


def _may_go_better(report: UnitReport) -> bool:
    """Whether what was in the way of a key frame may be gone: a file that was away, a fault of the code."""
    return any(report.refused.get(name) for name in ("unreadable", UNEXPECTED_ERROR))


def _judge_rig(recording: Recording, unit: Unit, config: PairConfig) -> RigVerdict:
    """Ask the unit's images whether the cameras look where their calibration says.

    Raises RecordingError where they surely do not and samples are gated: every label would be seen from a wrong place.
    """
    if config.variant == "occbev_paper":
        return RigVerdict((), "", 0)
    verdict = judge_rig(recording, gather(recording, unit.first, unit.last))
    if config.gate and verdict.faults:
        raise RecordingError(
            f"calibration contradicts the images: {'; '.join(verdict.faults)}. Correct it (`occbev overlay` draws it), "
            "or give --no-gate to make the pairs all the same"
        )
    return verdict


Measured = tuple[PairSample, dict[str, float], list[str]]
"""A sample, its measures, and the limits that it breaks."""


def _samples(
    recording: Recording,
    unit: Unit,
    config: PairConfig,
    refused: Refusals,
    progress: Callable[[], None],
    camera_agreement: float,
) -> Iterator[Measured]:
    """Yield the unit's samples; a key frame that cannot be read costs no other."""
    maker = _SampleMaker(recording, config, refused, camera_agreement)
    chosen, standing = _moving_keys(recording, config)
    refused.counts["standing"] += sum(unit.first <= key < unit.last for key in standing)
    for key in range(unit.first, unit.last):
        if key in chosen:
            made = maker.make(key)
            if made is not None:
                yield made
        progress()


class _SampleMaker:
    """Labels, measures and gates key frames in order; what is refused is counted in `refused`."""

    def __init__(
        self, recording: Recording, config: PairConfig, refused: Refusals, camera_agreement: float = np.nan
    ) -> None:
        self.recording, self.config, self.refused = recording, config, refused
        self._camera_agreement = camera_agreement
        self._builder = _builder(recording, config)
        all_but_one = max(1, len(recording.rig) - 1)
        self._max_camera_dt = config.max_camera_dt or camera_reach(recording)
        self._min_cameras = config.min_cameras if config.min_cameras is not None else all_but_one
        self._previous: Examined | None = None

    def make(self, key: int) -> Measured | None:
        """Make the sample of one key frame, or count why there is none."""
        try:
            return self._make(key)
        except Exception as error:  # whatever a reader or decoder raises of one key frame's data
            logger.debug("%s key %d", self.recording.name, key, exc_info=True)
            name = UNEXPECTED_ERROR if isinstance(error, UNEXPECTED) else "unreadable"
            self._refuse(key, name, describe_error(error))
            return None

    def _make(self, key: int) -> Measured | None:
        examined, frames = self._examine(key)
        if examined is None:
            return None
        values = self._measure(key, examined, frames)
        broken = broken_limits(values)
        stopping = [] if self.config.variant == "occbev_paper" else [n for n in broken if n not in FLAG_ONLY]
        if self.config.gate and stopping:
            self._refuse(key, stopping[0], f"{values[stopping[0]]:.4g}, want {_bound(stopping[0])}")
            return None
        return _sample(self.recording, examined, frames, self.config, values), values, broken

    def _measure(self, key: int, examined: Examined, frames: FrameSet) -> dict[str, float]:
        if self.config.variant == "occbev_paper":
            return {"q8_border_ratio": border_ratio(examined.label)}
        every = self.config.thorough_every
        thorough = every > 0 and key % every == 0
        values = measure_key(self._builder, examined, frames, self._previous, thorough, self._camera_agreement)
        self._previous = examined
        return values

    def _examine(self, key: int) -> tuple[Examined | None, FrameSet]:
        """Label one key frame, or count why it cannot be labelled."""
        whole = _whole_images(self.recording.frame_set(key), self.recording.rig)
        frames = _near_frames(whole, self._max_camera_dt)
        if len(frames.cameras) < self._min_cameras:
            self._refuse(key, "too_few_cameras", self._count_cameras(frames))
            return None, frames
        try:
            examined = self._builder.examine(key, frames)
        except PoseError as error:
            self._refuse(key, "no_pose", str(error))
            return None, frames
        refusal = self._judge_support(examined)
        if refusal is not None:
            self._refuse(key, *refusal)
            return None, frames
        return examined, frames

    def _judge_support(self, examined: Examined) -> tuple[str, str] | None:
        """Return why a label has too few sweeps, or no beam, behind it, by name and in words, or None."""
        stats, lost = examined.label.stats, examined.window.lost
        needed = self.config.min_support * stats["sweeps_expected"]
        if stats["sweeps"] >= needed and stats["reference_sweeps"]:
            observed = stats["free"] + stats["occupied"]
            return None if observed else ("nothing_observed", f"no beam of {stats['sweeps']} sweeps crosses the grid")
        text = f"{stats['sweeps']} of {stats['sweeps_expected']} sweeps within the window"
        unreadable = lost.get("unreadable", 0)
        if unreadable:
            return (
                "unreadable_sweeps",
                f"{text}, {unreadable} cannot be read; the first: {self._builder.first_unreadable}",
            )
        text += "".join(f", {count} {name}" for name, count in lost.items())
        if stats["reference_sweeps"]:
            return "low_support", text
        return "no_sweep_at_key", f"{text}, none of them at the key time"

    def _count_cameras(self, frames: FrameSet) -> str:
        count = f"{len(frames.cameras)} of {len(self.recording.rig)} cameras, want {self._min_cameras}"
        missing = [f"; first missing: {name}: {reason}" for name, reason in frames.missing.items()]
        return count + "".join(missing[:1])

    def _refuse(self, key: int, name: str, reason: str) -> None:
        text = f"{self.recording.name} key {key}: {reason}"
        logger.info("%s: %s", name, text)
        self.refused.add(name, text)


@dataclass(frozen=True)
class TrialPair:
    """One key frame as a pair in memory, or why it is none: reason -> the case in words."""

    key: int
    sample: PairSample | None
    refused: Mapping[str, str]


def try_key(recording: Recording, key: int, config: PairConfig) -> TrialPair:
    """Make the pair of one key frame without writing it."""
    refused = Refusals()
    made = _SampleMaker(recording, replace(config, thorough_every=0), refused).make(key)
    return TrialPair(key, None if made is None else made[0], refused.first)


def _bound(name: str) -> str:
    limit = next(limit for limit in LIMITS if limit.name == name)
    return f">= {limit.at_least:g}" if limit.at_least > -np.inf else f"<= {limit.at_most:g}"


class _PaperBuilder(LabelBuilder):
    """Makes the labels of the published recipe in place of ours; nothing but the border is measured of them."""

    def examine(self, key: int, frames: FrameSet | None = None) -> Examined:
        """Label one key frame by the recipe; the window is ours and only tells which sweeps there are."""
        window = self.window(key)
        label = paper_label(self.recording, key)
        stats = self._stats(window) | dict(label.stats)
        return Examined(key, dataclasses.replace(label, stats=stats), window, None)


def _builder(recording: Recording, config: PairConfig) -> LabelBuilder:
    require_beam_origin(recording)
    kind = _PaperBuilder if config.variant == "occbev_paper" else LabelBuilder
    return kind(recording, config.label, config.grid)


def _whole_images(frames: FrameSet, rig: CameraRig) -> FrameSet:
    """Drop encoded images that are cut, or of another size than their calibration."""
    kept: dict[str, CameraFrame | None] = {}
    missing = dict(frames.missing)
    for name, frame in frames.frames.items():
        fault = None
        if frame is not None and isinstance(frame.image, bytes):
            fault = image_fault(frame.image, (rig[name].width, rig[name].height))
        kept[name] = frame if fault is None else None
        if fault is not None:
            missing[name] = f"broken image: {fault}"
    return FrameSet(frames.stamp_ns, kept, missing)


def camera_reach(recording: Recording) -> float:
    """Return how many seconds an image may lie from the key time: a period of the LiDAR, at least 0.06.

    Cameras that fire as the LiDAR passes them lie half a turn from the middle of a sweep, and where LiDAR and cameras
    run half a turn apart, twice that.
    """
    steps = np.diff(recording.sweep_stamp_ns)
    return max(0.06, 1.1 * float(np.median(steps)) / 1e9) if len(steps) else 0.06


def _near_frames(frames: FrameSet, max_dt: float) -> FrameSet:
    """Drop images that are too far from the key time."""
    kept: dict[str, CameraFrame | None] = {}
    missing = dict(frames.missing)
    for name, frame in frames.frames.items():
        late = frame is not None and abs(frame.stamp_ns - frames.stamp_ns) > max_dt * 1e9
        kept[name] = None if late else frame
        if late:
            missing[name] = f"exposed more than {max_dt:.3g} s from the key time"
    return FrameSet(frames.stamp_ns, kept, missing)


def _moving_keys(recording: Recording, config: PairConfig) -> tuple[set[int], set[int]]:
    """Return the key frames to label, and those left out because the vehicle stands."""
    chosen: set[int] = set()
    standing: set[int] = set()
    last: NDArray[np.float64] | None = None
    still = 0
    for key, stamp in enumerate(recording.key_stamp_ns):
        try:
            here = recording.trajectory.at(int(stamp))[:3, 3]
        except PoseError:
            chosen.add(key)  # refused later, with its reason
            continue
        if last is None or np.linalg.norm(here - last) >= config.min_travel:
            last, still = here, 0
            chosen.add(key)
        elif still < config.max_standing:
            still += 1
            chosen.add(key)
        else:
            standing.add(key)
    return chosen, standing


def _sample(
    recording: Recording,
    examined: Examined,
    frames: FrameSet,
    config: PairConfig,
    values: Mapping[str, float],
) -> PairSample:
    """Put together what is stored of one key frame."""
    label, window = examined.label, examined.window
    stamp_ns = int(recording.key_stamp_ns[examined.key])
    images = {name: _encode(frame) for name, frame in frames.frames.items() if frame is not None}
    volumes = label.volumes
    meta = {
        "drive": recording.name,
        "stamp_ns": stamp_ns,
        "variant": config.variant,
        "label_free": config.variant != "boxes",
        "window": config.label.window,
        "sweep_stamp_ns": [sweep.stamp_ns for sweep in window.sweeps],
        "camera_dt": {
            name: round((frame.stamp_ns - stamp_ns) / 1e9, 6)
            for name, frame in frames.frames.items()
            if frame is not None
        },
        "grid": label.grid.as_record() | {"hash": label.grid.hash},
        "sweep_age": [round((sweep.stamp_ns - stamp_ns) / 1e9, 6) for sweep in window.sweeps],
        "pose_source": "odom",
        "deskew": _deskew(recording, examined),
        "label_config": config.label.hash,
        "pair_config": config.hash,
        "rig": recording.rig.hash,
        "version": __version__,
        "stats": dict(label.stats),
        "quality": {name: _number(value) for name, value in sorted(values.items())},
        "missing": dict(frames.missing),
    }
    key_name = f"{recording.name}/{stamp_ns}"
    return PairSample(
        key_name,
        images,
        _calibration(recording, stamp_ns, frames),
        meta,
        volumes,
        _returns(recording, stamp_ns, config.label) if config.lidar else None,
    )


def _deskew(recording: Recording, examined: Examined) -> str:
    """Return how the motion within sweeps was known."""
    sweeps = examined.window.sweeps
    known = "point_times" if sweeps and sweeps[0].timed else "compensated"
    return str(getattr(recording, "deskew", known))


def _calibration(recording: Recording, stamp_ns: int, frames: FrameSet) -> dict[str, Any]:
    """Return each camera's record with its stamp and its place in ego at the key time."""
    global2ego = invert_transform(recording.trajectory.at(stamp_ns))
    cameras = {}
    for camera in recording.rig.cameras:
        record = camera.as_record()
        frame = frames.frames.get(camera.name)
        if frame is not None:
            pose = frame.ego2global
            pose = recording.trajectory.at(frame.stamp_ns) if pose is None else pose
            record["stamp_ns"] = frame.stamp_ns
            record["cam2ego_at_key"] = (global2ego @ pose @ camera.cam2ego).tolist()
        cameras[camera.name] = record
    lidar2ego = recording.lidar2ego.tolist()
    return {
        "order": list(recording.rig.names),
        "cameras": cameras,
        "lidar2ego": lidar2ego,
        "ego2global": recording.trajectory.at(stamp_ns).tolist(),
    }


def _encode(frame: CameraFrame) -> bytes:
    """Return the original bytes of an image, or a PNG of raw pixels: nothing is lost either way."""
    if isinstance(frame.image, bytes):
        return frame.image
    return bytes(cv2.imencode(".png", cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR))[1])


def _returns(recording: Recording, stamp_ns: int, label: LabelConfig) -> NDArray[np.float32]:
    nearest = int(np.argmin(np.abs(recording.sweep_stamp_ns - stamp_ns)))
    sweep = recording.sweep(nearest)
    rays = deskew_rays(sweep, recording.trajectory, stamp_ns, label.ego_box, label.limits)
    return rays.end[rays.hit].astype(np.float32)


def _row(
    recording: Recording, sample: PairSample, values: Mapping[str, float], broken: Sequence[str]
) -> dict[str, Any]:
    """Return the index columns of a sample."""
    place = np.array(sample.calibration["ego2global"])[:2, 3]
    row = {
        "drive": recording.name,
        "stamp_ns": sample.meta["stamp_ns"],
        "split": "",
        "cameras": len(sample.images),
        "variant": sample.meta["variant"],
        "location": str(getattr(recording, "location", recording.name)),
        "cell_x": int(np.floor(place[0] / 100)),
        "cell_y": int(np.floor(place[1] / 100)),
        "flags": ",".join(broken),
    }
    return (
        row
        | {limit.name: _number(values.get(limit.name, np.nan)) for limit in LIMITS}
        | {name: _number(value) for name, value in values.items() if name.startswith("q3_")}
    )


def _flag_observed_drop(rows: Sequence[dict[str, Any]]) -> None:
    """Mark samples that observe much less than the rest of their unit."""
    numbers = [{k: np.nan if v is None else v for k, v in row.items() if k.startswith("q3_")} for row in rows]
    limit = next(limit for limit in LIMITS if limit.name == "q3_observed_drop")
    for row, drop in zip(rows, observed_drop(numbers), strict=True):
        row[limit.name] = drop
        if not limit.holds(drop):
            row["flags"] = ",".join(filter(None, [row["flags"], limit.name]))


def _number(value: float) -> float | None:
    """Return a value for JSON and Parquet: six digits, None for what could not be measured."""
    return None if np.isnan(value) else round(float(value), 6)


def _write_manifest(path: Path, report: UnitReport) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(report), sort_keys=True, indent=1))


def _parse_manifest(path: Path) -> UnitReport | None:
    """Read a unit's manifest; None where the file is none."""
    try:
        record = json.loads(path.read_text())
        return UnitReport(**{**record, "unit": Unit(**record["unit"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_manifest(path: Path, config: PairConfig) -> UnitReport | None:
    """Read a unit's manifest; None if it is absent, made otherwise, or if a shard of it is gone or changed."""
    report = _parse_manifest(path)
    if report is None or report.config_hash != config.hash:
        return None
    return None if _describe_damage(path.parent, report) else report


def _describe_damage(folder: Path, report: UnitReport) -> list[str]:
    """Return the shards of a unit that are gone or changed."""
    return [
        shard
        for shard, digest in report.shards.items()
        if not (folder / shard).exists() or file_hash(folder / shard) != digest
    ]


def read_reports(folder: Path) -> list[UnitReport]:
    """Return the finished units of a folder, by name.

    Raises:
        ShardError: a shard is gone or changed, or they were made with more than one configuration, or
            those of a drive from more than one input.
    """
    reports = [_parse_manifest(path) for path in sorted(folder.glob("*.json"))]
    found = [report for report in reports if report is not None]
    damaged = [shard for report in found for shard in _describe_damage(folder, report)]
    if damaged:
        raise ShardError(
            f"{folder}: {damaged} are gone or changed since they were made; give the command that made them again"
        )
    configs = Counter(report.config_hash for report in found)
    if len(configs) > 1:
        raise ShardError(
            f"{folder}: its units were made with {len(configs)} configurations "
            f"({', '.join(f'{name}: {n} units' for name, n in configs.items())}); use one folder for each"
        )
    sources: dict[str, set[str]] = {}
    for report in found:
        sources.setdefault(report.unit.drive, set()).add(report.source)
    mixed = sorted(drive for drive, made_from in sources.items() if len(made_from) > 1)
    if mixed:
        raise ShardError(
            f"{folder}: units of {mixed} were made from different inputs, or of one input read in "
            "different ways; use one folder for each"
        )
    return found


def remove_units_beyond(folder: Path, keys: Mapping[str, int]) -> None:
    """Remove manifests of units that begin after the end of their drive: an input of its name got shorter.

    keys: drive -> its key frames now. Shards without a manifest do not count.
    """
    for path in sorted(folder.glob("*.json")):
        report = _parse_manifest(path)
        if report is not None and report.unit.first >= keys.get(report.unit.drive, report.unit.first + 1):
            path.unlink(missing_ok=True)


def join_units(folder: Path, shares: Mapping[str, float], divide: bool = False) -> dict[str, int]:
    """Index every finished unit of a folder and split it; returns the number of samples per split.

    Without any sample no index is written. Raises ShardError as `read_reports`.

    shares: split -> share, by drive and by place: drives that met within 100 m of each other in one
    location share a split. No split of two groups or more stays empty. No drive is divided, but where
    `divide` is asked for and all drives met: see `hold_out_ends`.
    """
    rows = [dict(row) for report in read_reports(folder) for row in report.rows]
    if not rows:
        return {}
    split = assign_splits(rows, shares)
    for row in rows:
        row["split"] = split[row["drive"]]
    write_index(folder, rows)
    if divide and shares.get(VALIDATION) and VALIDATION not in split.values():
        window = float(ShardReader(folder).sample(rows[0]["key"]).meta["window"])
        hold_out_ends(rows, shares[VALIDATION] / sum(shares.values()), window)
        write_index(folder, rows)
    return dict(Counter(row["split"] for row in rows))


def hold_out_ends(rows: Sequence[dict[str, Any]], share: float, window: float) -> None:
    """Give the last share of the time of every drive to validation.

    window: seconds of sweeps on either side of a label. Pairs before the cut whose labels share sweeps with those after
    it go to neither split.
    """
    stamps: dict[str, list[int]] = {}
    for row in rows:
        stamps.setdefault(row["drive"], []).append(row["stamp_ns"])
    for row in rows:
        first, last = min(stamps[row["drive"]]), max(stamps[row["drive"]])
        before = (last - share * (last - first) - row["stamp_ns"]) / 1e9
        row["split"] = VALIDATION if before < 0 else BETWEEN if before < 2 * window else row["split"]


def assign_splits(rows: Sequence[Mapping[str, Any]], shares: Mapping[str, float]) -> dict[str, str]:
    """Give each drive a split, the same for all drives that share a place, the same on every run."""
    group = {str(row["drive"]): str(row["drive"]) for row in rows}

    def root(drive: str) -> str:
        while group[drive] != drive:
            drive = group[drive]
        return drive

    first: dict[tuple[str, int, int], str] = {}
    for row in rows:
        place = (str(row["location"]), int(row["cell_x"]), int(row["cell_y"]))
        one, other = root(first.setdefault(place, str(row["drive"]))), root(str(row["drive"]))
        group[max(one, other)] = min(one, other)
    groups = {root(drive) for drive in group}
    split = _draw_splits(groups, {name: share for name, share in shares.items() if share > 0})
    return {drive: split[root(drive)] for drive in group}


def _draw_splits(groups: Collection[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Draw a split for each group by its name; a split that none fell into gets the one that fell nearest to it."""
    names, edges = list(shares), np.cumsum(list(shares.values())) / sum(shares.values())
    if len(groups) == 1:  # nothing could be learned from a drive that is held back
        return dict.fromkeys(groups, max(shares, key=lambda name: shares[name]))
    draw = {group: int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32 for group in sorted(groups)}
    split = {group: names[int(np.searchsorted(edges, at, side="right"))] for group, at in draw.items()}
    for number, name in enumerate(names):
        held = Counter(split.values())
        spare = [group for group in split if held[split[group]] > 1]
        if spare and not held[name]:
            middle = edges[number] - shares[name] / sum(shares.values()) / 2
            split[min(spare, key=lambda group: abs(draw[group] - middle))] = name
    return split
