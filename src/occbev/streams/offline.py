"""A bag through intake and pipeline without ROS: the same code as the live node, as fast as it goes, dropping nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from occbev.frame_job import FrameJob
from occbev.graph import COMPRESSED, resolve
from occbev.inference.pipeline import Pipeline
from occbev.messages.bags import BagError, BagMessage, BagReader, BagWriter
from occbev.messages.readers import MessageError, stamp_to_ns
from occbev.reports.summaries import frames_of, summarise
from occbev.results import Perception
from occbev.streams.frame_log import PROCESSED, describe_job
from occbev.streams.intake import Intake
from occbev.streams.parameters import PerceptionParameters
from occbev.streams.runner import PerceptionLine, load_pipeline

LOG = logging.getLogger(__name__)

Encode = Callable[[Perception], Iterable[BagMessage]]
"""Makes the messages that the node would publish of a result."""

POSE_WAIT_NS = 100_000_000
"""Bag time after a set's last exposure until its ego poses are taken to be in."""


class OfflineReplay:
    """Feeds messages to an intake by their log times and runs the pipeline on every set."""

    def __init__(self, parameters: PerceptionParameters, pipeline: Pipeline) -> None:
        # Nothing comes while a set is resolved: what a bag has of its poses is in by then.
        ego_motion = replace(parameters.ego_motion, wait_s=0.0)
        self.parameters = replace(parameters, ego_motion=ego_motion)
        self.intake = Intake(self.parameters, pipeline.decode_frame)
        self.anchors: list[int] = []
        self.sent: dict[str, dict[int, list[int]]] = {name: {} for name in parameters.names}
        self.lines: list[dict[str, Any]] = []
        self._line = PerceptionLine(self.intake, pipeline, self._warn)
        self._waiting: list[FrameJob] = []
        self._roles = self._topics()
        self._warned: set[str] = set()

    def topics(self, bag: BagReader) -> list[str]:
        """Return the topics of a bag that are used; raises BagError if no image topic is among them."""
        used = [topic for topic in self._roles if topic in bag.topics]
        if not any(self._roles[topic][0] == "image" for topic in used):
            configured = sorted(t for t, (role, _) in self._roles.items() if role == "image")
            raise BagError(
                f"{bag.path}: none of the configured image topics is in this bag. Configured: {', '.join(configured)}. "
                f"In the bag: {', '.join(sorted(bag.topics)) or 'nothing'}. Set cameras.<name>.topic in the parameter file"
            )
        return used

    def results(self, bag: BagReader) -> Iterator[Perception]:
        """Yield a result for every set; raises BagError where the bag is damaged."""
        now_ns = 0
        self._read_static_transforms(bag)
        try:
            for message in bag.messages(self.topics(bag)):
                now_ns = message.log_ns
                self._waiting += self.intake.poll(now_ns)
                self._take(message, bag)
                yield from self._due(now_ns)
            self._waiting += self.intake.flush(now_ns)
            yield from self._due(None)
            self._note_drops()
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
            self._book(camera, stamp_to_ns(record.header.stamp))
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

    def _book(self, camera: str, stamp_ns: int) -> None:
        self.sent[camera].setdefault(stamp_ns, []).append(time.monotonic_ns())
        if camera == self.parameters.anchor_camera:
            self.anchors.append(stamp_ns)

    def _due(self, now_ns: int | None) -> Iterator[Perception]:
        """Run the waiting sets whose poses have come by bag time `now_ns` (None: all)."""
        self._note_drops()
        while self._waiting:
            last_ns = max(self._waiting[0].stamps_ns.values())
            if now_ns is not None and abs(now_ns - last_ns) < POSE_WAIT_NS:
                return
            result = self._run(self._waiting.pop(0))
            if result is not None:
                yield result

    def _run(self, job: FrameJob) -> Perception | None:
        job.begun_ns = time.monotonic_ns()
        if not self._line.prepare(job):
            self._enter(job.stamp_ns, "too_few_cameras")
            return None
        self._line.infer(job)
        perception = self._line.decode(job)
        job.published_ns = time.monotonic_ns()
        stages_ms = {**job.stages_ms, "set": (job.published_ns - job.begun_ns) / 1e6}
        self._enter(job.stamp_ns, PROCESSED, **describe_job(job, stages_ms))
        return perception

    def _enter(self, stamp_ns: int, outcome: str, **details: Any) -> None:
        at_ns = time.monotonic_ns()
        self.lines.append({"stamp_ns": stamp_ns, "outcome": outcome, "at_ns": at_ns, **details})

    def _note_drops(self) -> None:
        for stamp_ns, reason in self.intake.take_key_drops():
            self._enter(stamp_ns, reason)

    def _warn(self, about: str, text: str) -> None:
        """Log a warning once; what differs only in its stamps or counts, which stand at the end, is the same one."""
        key = about + text[:70]
        if key not in self._warned:
            self._warned.add(key)
            LOG.warning(text)

    def _topics(self) -> dict[str, tuple[str, str]]:
        """Return topic -> (role, camera)."""
        names = {"tf": self.parameters.tf_topic, "tf_static": self.parameters.tf_static_topic}
        roles: dict[str, tuple[str, str]] = {resolve(topic): (role, "") for role, topic in names.items()}
        roles[resolve(self.parameters.ego_motion.odometry_topic)] = ("odometry", "")
        for camera in self.parameters.names:
            roles[resolve(self.parameters.info_topic(camera))] = ("info", camera)
            for topic in self.parameters.image_topics(camera):
                roles[resolve(topic)] = ("image", camera)
        return roles


def replay_offline(
    path: Path,
    parameters: PerceptionParameters,
    record: Path | None = None,
    boxes: Path | None = None,
    encode: Encode | None = None,
) -> dict[str, Any]:
    """Run a whole bag; return the summary and the fate of every frame.

    record: new bag folder for output messages, which `encode` makes. boxes: file for one JSON line per result.
    """
    with BagReader(path) as bag, ExitStack() as stack:
        replay = OfflineReplay(parameters, load_pipeline(parameters))
        replay.topics(bag)
        writer = stack.enter_context(BagWriter(record)) if record else None
        lines = stack.enter_context(boxes.open("w")) if boxes else None
        for perception in replay.results(bag):
            if writer is not None and encode is not None:
                for message in encode(perception):
                    writer.write(message)
            if lines is not None:
                _write_boxes(lines, perception)
        frames = frames_of(replay.anchors, replay.sent, replay.lines, parameters.anchor_camera)
        published = dict(writer.counts) if writer else {}
        fallback_sets = len({line["stamp_ns"] for line in replay.lines} - set(replay.anchors))
        summary = summarise(frames, published, fallback_sets)
    return {"bag": str(path), "offline": True, "summary": summary, "frames": frames}


def _write_boxes(file: TextIO, perception: Perception) -> None:
    boxes = perception.boxes
    record = {
        "stamp_ns": perception.stamp_ns,
        "cameras": boxes.cameras,
        "box": boxes.box.round(4).tolist(),
        "label": boxes.label.tolist(),
        "score": boxes.score.round(4).tolist(),
        "occupied": int((perception.occupancy.state == 2).sum()),
    }
    file.write(json.dumps(record) + "\n")
