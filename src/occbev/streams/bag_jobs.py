"""A bag as frame sets: its messages go through the intake of the node, by their log times, without ROS.

bag = load_bag("my_bag", "vehicle/perception.yaml")
for frame_set, motion in bag: ...
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from occbev.frame_job import FrameJob, MotionToKey
from occbev.graph import COMPRESSED, params_file, resolve
from occbev.inference.preprocess import decode_image
from occbev.messages.bags import BagError, BagMessage, BagReader
from occbev.messages.readers import MessageError, stamp_to_ns
from occbev.results import CameraFrame, FrameSet
from occbev.rig import Camera, CameraRig
from occbev.streams.intake import Decode, Intake
from occbev.streams.parameters import PerceptionParameters, read_parameters

LOG = logging.getLogger(__name__)

Warn = Callable[[str, str], None]
"""Called with what a problem is about, such as "motion", and with its text."""

POSE_WAIT_NS = 100_000_000
"""Bag time after a set's last exposure until its ego poses are taken to be in."""


class BagJobs:
    """Feeds the messages of a bag to an intake and yields a job for every frame set, dropping none.

    anchors: stamps of the anchor's images. sent: camera -> stamp -> when (steady ns) each image was handed over.
    log_ns: stamp of an anchor's image -> its log time.
    """

    def __init__(self, parameters: PerceptionParameters, decode: Decode, warn: Warn) -> None:
        # Nothing comes while a set is gathered: what a bag has of its poses is in by then.
        ego_motion = replace(parameters.ego_motion, wait_s=0.0)
        self.parameters = replace(parameters, ego_motion=ego_motion)
        self.intake = Intake(self.parameters, decode)
        self.anchors: list[int] = []
        self.sent: dict[str, dict[int, list[int]]] = {name: {} for name in parameters.names}
        self.log_ns: dict[int, int] = {}
        self._warn = warn
        self._waiting: list[FrameJob] = []
        self._roles = topic_roles(self.parameters)

    def topics(self, bag: BagReader) -> list[str]:
        """Return the topics of a bag that are used; raises BagError if no image topic is among them."""
        used = [topic for topic in self._roles if topic in bag.topics]
        if not any(self._roles[topic][0] == "image" for topic in used):
            configured = sorted(t for t, (role, _) in self._roles.items() if role == "image")
            raise BagError(
                f"{bag.path}: none of the configured image topics is in this bag. Configured: {', '.join(configured)}. "
                f"In the bag: {', '.join(sorted(bag.topics)) or 'nothing'}. Give a parameter file with its topics "
                f"(`occbev rig {bag.path} --out vehicle` writes one)"
            )
        return used

    def jobs(self, bag: BagReader) -> Iterator[FrameJob]:
        """Yield a job for every set, before it is gathered; raises BagError where the bag is damaged."""
        now_ns = 0
        for note in bag.notes:
            self._warn("bag", note)
        self._read_static_transforms(bag)
        try:
            for message in bag.messages(self.topics(bag)):
                now_ns = message.log_ns
                self._waiting += self.intake.poll(now_ns)
                self._take(message, bag)
                yield from self._due(now_ns)
            self._waiting += self.intake.flush(now_ns)
            yield from self._due(None)
        finally:
            self.intake.close()

    def _read_static_transforms(self, bag: BagReader) -> None:
        """Take static transforms before anything else: one that comes late in a bag serves the sets before it.

        Of one that changes, the first place holds until its change comes.
        """
        topics = [topic for topic, (role, _) in self._roles.items() if role == "tf_static" and topic in bag.topics]
        for message in reversed(list(bag.messages(topics)) if topics else []):
            self.intake.buffer.add_message(bag.decode(message), static=True)
        self.intake.buffer.take_conflicts()

    def _take(self, message: BagMessage, bag: BagReader) -> None:
        role, camera = self._roles[message.topic]
        record = bag.decode(message)
        if role == "image":
            self._book(camera, stamp_to_ns(record.header.stamp), message.log_ns)
            self._waiting += self.intake.add_image(camera, record, message.type == COMPRESSED, message.log_ns)
        elif role == "info":
            self.intake.add_info(camera, record)
        elif role == "odometry":
            try:
                self.intake.add_odometry(record)
            except MessageError as error:
                self._warn("odometry", f"odometry on {message.topic}: {error}")
        else:
            for problem in self.intake.add_transforms(record, role == "tf_static", message.log_ns):
                self._warn("transforms", problem)

    def _book(self, camera: str, stamp_ns: int, log_ns: int) -> None:
        self.sent[camera].setdefault(stamp_ns, []).append(time.monotonic_ns())
        if camera == self.parameters.anchor_camera:
            self.anchors.append(stamp_ns)
            self.log_ns[stamp_ns] = log_ns

    def _due(self, now_ns: int | None) -> Iterator[FrameJob]:
        """Yield the waiting sets whose poses have come by bag time `now_ns` (None: all)."""
        while self._waiting:
            last_ns = max(self._waiting[0].stamps_ns.values())
            if now_ns is not None and abs(now_ns - last_ns) < POSE_WAIT_NS:
                return
            yield self._waiting.pop(0)


def topic_roles(parameters: PerceptionParameters, namespace: str = "") -> dict[str, tuple[str, str]]:
    """Return topic -> (role, camera) of all that the node reads; roles are image, info, odometry, tf and tf_static."""
    names = {"tf": parameters.tf_topic, "tf_static": parameters.tf_static_topic}
    roles: dict[str, tuple[str, str]] = {resolve(topic): (role, "") for role, topic in names.items()}
    roles[resolve(parameters.ego_motion.odometry_topic, namespace)] = ("odometry", "")
    for camera in parameters.names:
        roles[resolve(parameters.info_topic(camera), namespace)] = ("info", camera)
        for topic in parameters.image_topics(camera):
            roles[resolve(topic, namespace)] = ("image", camera)
    return roles


class BagFrames:
    """The frame sets of a bag in order, each with the motion of its cameras to the key time; may be read again."""

    def __init__(self, path: Path, parameters: PerceptionParameters) -> None:
        self._path, self._parameters = path, parameters

    def __iter__(self) -> Iterator[tuple[FrameSet, MotionToKey | None]]:
        """Yield (frame set, motion), as `Pipeline.run` takes them; images are decoded at full size."""
        for job in self.jobs():
            if job.frame_set is not None and len(job.frame_set.cameras) >= self._parameters.sync.min_cameras:
                yield job.frame_set, job.motion

    @property
    def rig(self) -> CameraRig:
        """The calibration of the first frame set; raises BagError where there is none."""
        for job in self.jobs():
            if job.rig is not None:
                return job.rig
        raise BagError(f"{self._path}: no frame set: no anchor image {self._parameters.anchor_camera} came")

    def jobs(self) -> Iterator[FrameJob]:
        """Yield the gathered job of every set, which also says why a camera is missing."""
        with BagReader(self._path) as bag:
            feed = BagJobs(self._parameters, decode_fully, lambda about, text: LOG.warning("%s: %s", about, text))
            for job in feed.jobs(bag):
                feed.intake.gather(job)
                yield job


def decode_fully(frame: CameraFrame, camera: Camera) -> CameraFrame:
    """Decode a frame at its full size."""
    return replace(frame, image=decode_image(frame.image, camera.name)) if isinstance(frame.image, bytes) else frame


def load_bag(path: Path | str, parameters: Path | str | None = None) -> BagFrames:
    """Open a bag as frame sets, joined and calibrated as the node joins them.

    path: bag folder, .mcap or .db3 file. parameters: a parameter file of the node, which names the topics; None for
    config/perception.yaml. `occbev rig BAG` writes one for a bag.
    """
    return BagFrames(Path(path), read_parameters(Path(parameters or params_file({}))))
