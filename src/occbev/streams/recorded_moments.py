"""A recorded run as moments: the images of one bag, joined as the node joins them, with the results of another."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occbev.frame_job import FrameJob
from occbev.geometry import invert_transform, transform_points
from occbev.graph import DEBUG_TYPE
from occbev.grid import VoxelGrid
from occbev.messages.bags import BagMessage, BagReader
from occbev.messages.readers import MessageError, cloud_from_message, points_of_cloud
from occbev.messages.tf import TransformException
from occbev.reports.moments import Image, Moment, fit_rig
from occbev.reports.recorded_outputs import CLOUD, OUTPUTS, Published, iterate_recorded
from occbev.results import CameraFrame
from occbev.rig import Camera, CameraRig
from occbev.streams.bag_jobs import BagJobs
from occbev.streams.intake import Intake
from occbev.streams.kept_inputs import DROPPED, STAGE
from occbev.streams.parameters import PerceptionParameters
from occbev.trajectory import PoseError

LOG = logging.getLogger(__name__)

MAX_CLOUD_GAP_NS = 100_000_000
"""A cloud farther than this from a key time is not shown with it."""


def recorded_moments(
    inputs: Path, outputs: Path | None, parameters: PerceptionParameters, grid: VoxelGrid
) -> Iterator[Moment]:
    """Yield a moment for every frame set of `inputs`, and for every result of `outputs` that belongs to none.

    outputs: what `occbev replay --record` wrote, which may be the same bag; None for images alone.
    Raises:
        BagError: a bag is damaged, or holds none of the configured image topics. MessageError: see `read_recorded`.
    """
    with BagReader(inputs) as bag, ExitStack() as stack:
        feed = BagJobs(parameters, leave_encoded, lambda about, text: LOG.warning("%s: %s", about, text))
        results = _Results(outputs, grid)
        clouds = _Clouds(stack.enter_context(BagReader(inputs)), feed.intake, parameters.base_frame)
        account = _read_account(outputs) if outputs else {}
        fate = Fate()
        for job in feed.jobs(bag):
            feed.intake.gather(job)
            for result in results.before(job.stamp_ns):
                yield moment_of(None, result, Fate(), {})
            fate = account.get(feed.log_ns.get(job.stamp_ns, -1), Fate(dropped=fate.dropped))
            yield moment_of(job, results.at(job.stamp_ns), fate, clouds.at(job.stamp_ns))
        for result in results.before(None):
            yield moment_of(None, result, Fate(), {})


@dataclass(frozen=True)
class Fate:
    """What became of a key time. dropped: reason -> how many were lost since the start."""

    latency_ms: Mapping[str, float] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)


def moment_of(
    job: FrameJob | None, result: Published | None, fate: Fate, clouds: Mapping[str, NDArray[np.float32]]
) -> Moment:
    """Join a gathered frame set with its result; either may be None, not both."""
    images = {} if job is None else _images(job)
    stamp_ns = job.stamp_ns if job is not None else result.stamp_ns if result is not None else 0
    return Moment(
        stamp_ns,
        images=images,
        rig=None if job is None or job.rig is None else _rig_at_key(job.rig, job, images),
        boxes=None if result is None else result.boxes,
        occupancy=None if result is None else result.occupancy,
        ground=None if result is None else result.ground,
        clouds=clouds,
        missing={} if job is None else dict(job.missing),
        latency_ms=fate.latency_ms,
        dropped=fate.dropped,
    )


def leave_encoded(frame: CameraFrame, camera: Camera) -> CameraFrame:
    """Keep an image as its bytes: viewers decode it themselves."""
    return frame


def _images(job: FrameJob) -> dict[str, Image | bytes]:
    frames = {} if job.frame_set is None else job.frame_set.frames
    return {name: frame.image for name, frame in frames.items() if frame is not None}


def _rig_at_key(rig: CameraRig, job: FrameJob, images: Mapping[str, Image | bytes]) -> CameraRig:
    motion = job.motion or {}
    return fit_rig(rig.move_cameras(motion.get(name, np.eye(4)) for name in rig.names), images)


class _Results:
    """Results in the order of their publishing, joined to key times that only go forward."""

    def __init__(self, bag: Path | None, grid: VoxelGrid) -> None:
        self._coming = iterate_recorded(bag, grid) if bag is not None else iter(())
        self._waiting: dict[int, Published] = {}

    def at(self, stamp_ns: int) -> Published | None:
        """Return the result of a key time."""
        while stamp_ns not in self._waiting and max(self._waiting, default=-1) < stamp_ns and self._pull():
            pass
        return self._waiting.pop(stamp_ns, None)

    def before(self, stamp_ns: int | None) -> list[Published]:
        """Return the results before a key time that no frame set had; None for all that are left."""
        while (stamp_ns is None or max(self._waiting, default=-1) < stamp_ns) and self._pull():
            pass
        passed = sorted(s for s in self._waiting if stamp_ns is None or s < stamp_ns)
        return [self._waiting.pop(stamp) for stamp in passed]

    def _pull(self) -> bool:
        result = next(self._coming, None)
        if result is not None:
            self._waiting[result.stamp_ns] = result
        return result is not None


class _Clouds:
    """The clouds of each LiDAR nearest to key times that only go forward, in base_link at the key time."""

    def __init__(self, bag: BagReader, intake: Intake, base_frame: str) -> None:
        self._bag, self._intake, self._base = bag, intake, base_frame
        topics = [t for t, kind in bag.topics.items() if kind == CLOUD and OUTPUTS not in t]
        self._coming = {topic: bag.messages([topic]) for topic in topics}
        self._near: dict[str, list[BagMessage]] = {topic: [] for topic in topics}
        self._warned: set[str] = set()

    def at(self, stamp_ns: int) -> dict[str, NDArray[np.float32]]:
        """Return topic -> returns (M, 3); one that cannot be placed is left out with a warning."""
        found = {}
        for topic, near in self._near.items():
            while not near or self._bag.stamp_ns(near[-1]) < stamp_ns:
                message = next(self._coming[topic], None)
                if message is None:
                    break
                near.append(message)
                del near[:-2]
            nearest = min(near, key=lambda m: abs(self._bag.stamp_ns(m) - stamp_ns), default=None)
            if nearest is not None and abs(self._bag.stamp_ns(nearest) - stamp_ns) <= MAX_CLOUD_GAP_NS:
                try:
                    found[topic.strip("/").replace("/", "_")] = self._place(nearest, stamp_ns)
                except (MessageError, TransformException) as error:
                    self._warn(topic, str(error))
        return found

    def _place(self, message: BagMessage, stamp_ns: int) -> NDArray[np.float32]:
        record = self._bag.decode(message)
        points = points_of_cloud(cloud_from_message(record))
        points = points[np.isfinite(points).all(1)]
        lidar2ego = self._intake.buffer.lookup_matrix(self._base, record.header.frame_id)
        try:
            poses = self._intake.ego.poses([self._bag.stamp_ns(message), stamp_ns])
        except PoseError:
            poses = None
        if poses is not None:
            lidar2ego = invert_transform(poses[1]) @ poses[0] @ lidar2ego
        return transform_points(lidar2ego, points).astype(np.float32)

    def _warn(self, topic: str, text: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            LOG.warning("%s is not shown: %s", topic, text)


def _read_account(bag: Path) -> dict[int, Fate]:
    """Read log time of an anchor image -> what became of its key time, as `kept_inputs` wrote it."""
    latency: dict[int, dict[str, float]] = defaultdict(dict)
    lost: dict[int, dict[str, int]] = defaultdict(dict)
    stage, dropped = (part.removeprefix("~") for part in (STAGE, DROPPED))
    with BagReader(bag) as reader:
        topics = [t for t, kind in reader.topics.items() if kind == DEBUG_TYPE and (stage in t or dropped in t)]
        for message in reader.messages(topics):
            value = float(reader.decode(message).data)
            name = message.topic.rsplit("/", 1)[-1]
            if stage in message.topic:
                latency[message.log_ns][name.removesuffix("_ms")] = value
            else:
                lost[message.log_ns][name] = int(value)
    fates: dict[int, Fate] = {}
    so_far: dict[str, int] = {}
    for log_ns in sorted({*latency, *lost}):
        so_far = {**so_far, **lost.get(log_ns, {})}
        fates[log_ns] = Fate(latency.get(log_ns, {}), so_far)
    return fates
