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
from occbev.inference.pipeline import Pipeline
from occbev.messages.bags import BagMessage, BagReader, BagWriter
from occbev.reports.summaries import frames_of, summarise
from occbev.results import Perception
from occbev.streams.bag_jobs import BagJobs
from occbev.streams.frame_log import PROCESSED, describe_job
from occbev.streams.kept_inputs import keep_inputs, latched_outputs
from occbev.streams.parameters import PerceptionParameters
from occbev.streams.runner import PerceptionLine, load_pipeline

LOG = logging.getLogger(__name__)

Encode = Callable[[Perception], Iterable[BagMessage]]
"""Makes the messages that the node would publish of a result."""


class OfflineReplay:
    """Runs the pipeline on every frame set of a bag and writes down what became of each.

    wants_ground: whether results have a ground grid, which costs milliseconds.
    """

    def __init__(self, parameters: PerceptionParameters, pipeline: Pipeline, wants_ground: bool = True) -> None:
        self.lines: list[dict[str, Any]] = []
        self.feed = BagJobs(parameters, pipeline.decode_frame, self._warn)
        self._line = PerceptionLine(self.feed.intake, pipeline, self._warn)
        self._warned: set[str] = set()
        self._wants_ground = wants_ground

    def results(self, bag: BagReader) -> Iterator[Perception]:
        """Yield a result for every set; raises BagError where the bag is damaged."""
        for job in self.feed.jobs(bag):
            self._note_drops()
            result = self._run(job)
            if result is not None:
                yield result
        self._note_drops()

    def _run(self, job: FrameJob) -> Perception | None:
        job.begun_ns, job.wants_ground = time.monotonic_ns(), self._wants_ground
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
        for stamp_ns, reason in self.feed.intake.take_key_drops():
            self._enter(stamp_ns, reason)

    def _warn(self, about: str, text: str) -> None:
        """Log a warning once; what differs only in its stamps or counts, which stand at the end, is the same one."""
        key = about + text[:70]
        if key not in self._warned:
            self._warned.add(key)
            LOG.warning(text)


def replay_offline(
    path: Path,
    parameters: PerceptionParameters,
    record: Path | None = None,
    boxes: Path | None = None,
    encode: Encode | None = None,
    inputs: bool = False,
) -> dict[str, Any]:
    """Run a whole bag; return the summary and the fate of every frame.

    record: new bag folder for output messages, which `encode` makes. boxes: file for one JSON line per result.
    inputs: record what the network was given as well, and the fate of every key time.
    """
    with BagReader(path) as bag, ExitStack() as stack:
        replay = OfflineReplay(parameters, load_pipeline(parameters), wants_ground=record is not None)
        replay.feed.topics(bag)
        writer = stack.enter_context(BagWriter(record, latched_outputs())) if record else None
        if boxes:
            boxes.parent.mkdir(parents=True, exist_ok=True)
        lines = stack.enter_context(boxes.open("w")) if boxes else None
        for perception in replay.results(bag):
            if writer is not None and encode is not None:
                log_ns = replay.feed.log_ns.get(perception.stamp_ns, perception.stamp_ns)
                for message in encode(perception):
                    writer.write(replace(message, log_ns=log_ns))
            if lines is not None:
                _write_boxes(lines, perception)
        frames = frames_of(replay.feed.anchors, replay.feed.sent, replay.lines, parameters.anchor_camera)
        published = dict(writer.counts) if writer else {}
        if writer is not None and inputs:
            keep_inputs(writer, bag, parameters, frames)
        fallback_sets = len({line["stamp_ns"] for line in replay.lines} - set(replay.feed.anchors))
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
        "track": None if boxes.track is None else boxes.track.tolist(),
        "occupied": int((perception.occupancy.state == 2).sum()),
    }
    file.write(json.dumps(record) + "\n")
