"""From incoming messages to a frame set that is ready for the pipeline: decode, synchronise, calibrate, add ego motion.

It knows messages only by their fields, so the live node and offline replay use the same code.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.ego_signals import WRONG_AXES, TwistAxes
from occbev.frame_job import FrameJob
from occbev.inference.pipeline import motion_to_key
from occbev.inference.preprocess import ImageError
from occbev.messages.readers import (
    MessageError,
    StampedPose,
    base_pose,
    base_twist,
    pose_from_message,
    read_image,
    stamp_to_ns,
)
from occbev.messages.tf import Buffer, clean_frame
from occbev.results import CameraFrame, FrameSet
from occbev.rig import Camera
from occbev.streams.calibration import Calibration
from occbev.streams.decode_pool import DecodePool
from occbev.streams.ego_motion import EgoPoses
from occbev.streams.parameters import PerceptionParameters
from occbev.streams.sync import FrameSynchronizer
from occbev.trajectory import PoseError

Decode = Callable[[CameraFrame, Camera], CameraFrame]
"""Turns the encoded bytes of a frame into an array."""

WAITING_DECODES = 8
"""Images per camera that may wait for a decoding thread; more would only grow old."""

DECODE_TIMEOUT_S = 5.0
"""How long a set waits for an image that is being decoded."""

SPARSE = 8
"""Rows between those that the checks for frozen and black images look at."""

RECENT = 30
"""Arrivals of a camera over which its rate is taken."""


@dataclass
class Watch:
    """State of one camera, for diagnostics."""

    arrivals: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    refused: Counter[str] = field(default_factory=Counter)
    problem: str = ""
    input_problem: str = ""
    input_problem_ns: int = 0
    publishers: dict[str, int] = field(default_factory=dict)
    """Full name of each image topic -> how many send it."""
    wrong_type: str = ""
    """Which of its topics carries another type than the one that is read."""
    last_pixels: bytes = b""
    repeats: int = 0

    def note_input_problem(self, text: str, now_ns: int) -> None:
        """Remember what is wrong with images that never come as far as a set."""
        self.input_problem, self.input_problem_ns = text, now_ns

    def note_pixels(self, pixels: bytes) -> None:
        """Count how often in a row the same pixels came."""
        self.repeats = self.repeats + 1 if pixels == self.last_pixels else 1
        self.last_pixels = pixels

    @property
    def rate_hz(self) -> float:
        """Images per second over the recent arrivals."""
        if len(self.arrivals) < 2:
            return 0.0
        return (len(self.arrivals) - 1) * 1e9 / max(1, self.arrivals[-1] - self.arrivals[0])


@dataclass
class TransformWatch:
    """State of /tf and /tf_static, for diagnostics. arrival_ns: of the newest moving transforms."""

    arrival_ns: int | None = None
    static_messages: int = 0
    problem: str = ""
    problem_ns: int = 0
    problems: int = 0
    conflicts: dict[str, str] = field(default_factory=dict)
    """Child frame -> how two publishers place it; this holds until the node is activated anew."""
    stepped_back: dict[str, int] = field(default_factory=dict)
    """Child frame -> its last stamp, where that stepped back."""

    def note(self, static: bool, now_ns: int, problems: list[str]) -> None:
        """Note one message and what was wrong with it."""
        if static:
            self.static_messages += 1
        else:
            self.arrival_ns = now_ns
        if problems:
            self.problem, self.problem_ns = problems[-1], now_ns
            self.problems += len(problems)


class Intake:
    """Takes messages and returns jobs; `gather` adds images, calibration and ego motion, also in another thread."""

    def __init__(self, parameters: PerceptionParameters, decode: Decode) -> None:
        self.parameters = parameters
        self.buffer = Buffer()
        self.calibration = Calibration(parameters, self.buffer)
        self.ego = EgoPoses(parameters.ego_motion, self.buffer, parameters.base_frame, parameters.sync.reset_s)
        self.sync = FrameSynchronizer(parameters.names, parameters.anchor_camera, parameters.sync)
        self.watch = {name: Watch() for name in parameters.names}
        self.transforms = TransformWatch()
        self.motion_problem = self.motion_note = ""
        self.odometry_jump, self.odometry_jump_ns = "", 0
        self.twist_problem, self._twist_axes = "", TwistAxes()
        self._gathered_epoch: int | None = None
        self._decode = decode
        self._pool: DecodePool[CameraFrame] = DecodePool(parameters.decode_threads)
        self._lock = threading.RLock()

    def add_image(
        self, camera: str, message: Any, compressed: bool, now_ns: int, clock_ns: int | None = None
    ) -> list[FrameJob]:
        """Take an Image or CompressedImage and start to decode it; return the sets that it completes.

        now_ns: a clock that only goes forward. clock_ns: the clock that cameras should stamp by, None if unknown.
        """
        stamp_ns = stamp_to_ns(message.header.stamp)
        with self._lock:
            watch = self.watch[camera]
            watch.arrivals.append(now_ns)
            self.calibration.note_image_frame(camera, str(message.header.frame_id))
            if stamp_ns == 0:
                watch.refused["no_stamp"] += 1
                watch.note_input_problem("its images carry no stamp (header.stamp is 0)", now_ns)
                return []
            future = self._start(camera, message, compressed, stamp_ns)
            return self.sync.push(camera, stamp_ns, future, now_ns, clock_ns)

    def add_info(self, camera: str, message: Any) -> None:
        """Take a CameraInfo."""
        with self._lock:
            self.calibration.add_info(camera, message)

    def add_odometry(self, message: Any) -> None:
        """Take an Odometry or a pose.

        Raises:
            MessageError: it tells nothing of the base frame, or it is taken and jumps, or it is the first one by which
                twists are found to be in the wrong axes.
        """
        pose, base = pose_from_message(message), self.parameters.base_frame
        twist = base_twist(pose, base, self.buffer)
        problem = self.ego.add(pose.stamp_ns, base_pose(pose, base, self.buffer), twist)
        if problem:
            self.odometry_jump, self.odometry_jump_ns = problem, time.monotonic_ns()
            raise MessageError(problem)
        if twist is not None and self._find_twist_problem(pose):
            raise MessageError(self.twist_problem)

    def _find_twist_problem(self, pose: StampedPose) -> bool:
        """Compare twists with poses; True where they are now found to be in the axes of the parent frame."""
        assert pose.twist is not None, "only odometry with a twist is compared"
        self._twist_axes.add(pose.stamp_ns, pose.child2parent, pose.twist[:3])
        verdict, before = self._twist_axes.verdict, self.twist_problem
        if verdict:
            found = self._twist_axes.describe(pose.parent, pose.child)
            self.twist_problem = f"{found}; {WRONG_AXES}" if verdict == "parent" else ""
            self._twist_axes = TwistAxes()
        return bool(self.twist_problem) and not before

    def add_transforms(self, message: Any, static: bool, now_ns: int) -> list[str]:
        """Take a TFMessage; the good transforms of it are kept, what is wrong with the others is returned."""
        believed, problems = [], []
        for transform in message.transforms:
            if static or self._is_stamp_believed(transform):
                believed.append(transform)
            else:
                problems.append(self._describe_step_back(transform))
        problems += self.buffer.add_message(SimpleNamespace(transforms=believed), static)
        conflicts = self.buffer.take_conflicts()
        self.transforms.conflicts |= conflicts
        problems += conflicts.values()
        self.transforms.note(static, now_ns, problems)
        return problems

    def _is_stamp_believed(self, transform: Any) -> bool:
        """Whether a moving transform may be stored.

        One that steps back by more than `sync.reset_s` is ignored; the second in a row begins the frame anew, as a
        looped bag does. Other frames are left alone.
        """
        child, stamp_ns = clean_frame(transform.child_frame_id), stamp_to_ns(transform.header.stamp)
        newest_ns, step_ns = self.buffer.newest_ns(child), int(self.parameters.sync.reset_s * 1e9)
        stepped_back = self.transforms.stepped_back
        if newest_ns is None or stamp_ns >= newest_ns - step_ns:
            stepped_back.pop(child, None)
            return True
        before_ns = stepped_back.get(child)
        stepped_back[child] = stamp_ns
        if before_ns is None or not before_ns < stamp_ns <= before_ns + step_ns:
            return False
        del stepped_back[child]
        self.buffer.clear_frame(child)
        return True

    def _describe_step_back(self, transform: Any) -> str:
        child = clean_frame(transform.child_frame_id)
        newest_ns, stamp_ns = self.buffer.newest_ns(child) or 0, stamp_to_ns(transform.header.stamp)
        back_s = (newest_ns - stamp_ns) / 1e9
        return (
            f"frame {child!r}: its stamp steps back by {back_s:.2f} s and is ignored: does a second publisher send it?"
        )

    @property
    def has_waiting_sets(self) -> bool:
        """Whether a frame set waits for images, so that `poll` may have something to return."""
        return self.sync.pending > 0

    def poll(self, now_ns: int) -> list[FrameJob]:
        """Return the sets whose time is up."""
        with self._lock:
            return self.sync.poll(now_ns)

    def flush(self, now_ns: int) -> list[FrameJob]:
        """Return what waits, at the end of a recording."""
        with self._lock:
            return self.sync.flush(now_ns)

    def take_key_drops(self) -> list[tuple[int, str]]:
        """Return (stamp_ns, reason) of key times dropped by the synchroniser since the last call."""
        with self._lock:
            return self.sync.take_key_drops()

    def clock_jumped(self, now_ns: int) -> list[FrameJob]:
        """Start again after a backward jump of ROS time; static transforms and learned offsets stay."""
        with self._lock:
            self.buffer.clear()
            self.ego.clear()
            return self.sync.reset("clock_jump", now_ns)

    def read_calibration(self, stamps_ns: Mapping[str, int] | None = None) -> Any:
        """Return the rig as it is known now, or as it was at the exposures of a set: camera -> stamp."""
        with self._lock:
            return self.calibration.now(stamps_ns)

    def gather(self, job: FrameJob) -> None:
        """Wait for the images of a job and add calibration and ego motion.

        Cameras that cannot be used become `missing`, with the reason.
        """
        self.calibration.wait_until(job.stamps_ns, self.parameters.ego_motion.wait_s)
        calibrated = self.read_calibration(job.stamps_ns)
        frames: dict[str, CameraFrame | None] = dict.fromkeys(self.parameters.names)
        missing = dict(job.missing)
        for name, future in job.images.items():
            problem = describe_failure(name, future) or calibrated.problems.get(name)
            if problem:
                missing[name] = problem
            else:
                frames[name] = future.result()
        job.rig, job.missing = calibrated.rig, missing
        job.decode_ns = max((frame.decode_ns for frame in frames.values() if frame is not None), default=0)
        job.fresh, self._gathered_epoch = job.epoch != self._gathered_epoch, job.epoch
        self._set_problems(missing)
        self._add_motion(job, FrameSet(job.stamp_ns, frames, missing))
        self.motion_problem, self.motion_note = job.motion_problem, job.motion_note

    def retune(self, parameters: PerceptionParameters) -> None:
        """Take parameters of which only those have changed that may while the node runs."""
        with self._lock:
            self.parameters = parameters
            self.sync.retune(parameters.sync)

    def close(self) -> None:
        """End the decoding threads."""
        self._pool.close()

    def _start(self, camera: str, message: Any, compressed: bool, stamp_ns: int) -> Future[CameraFrame]:
        """Check a message and give it to a decoding thread; a bad one becomes a future that already failed."""
        future: Future[CameraFrame]
        try:
            limit = self.parameters.max_image_pixels
            image = read_image(message, limit)
            if self._pool.count(camera) >= WAITING_DECODES:
                raise MessageError(f"{WAITING_DECODES} of its images wait to be decoded: the machine is too slow")
        except MessageError as error:
            self.watch[camera].refused["bad_image"] += 1
            future = Future()
            future.set_exception(MessageError(str(error)))
            return future
        frame = CameraFrame(camera, stamp_ns, image)
        return self._pool.submit(camera, partial(self._decode_image, frame, self.calibration.camera(camera)))

    def _refuse_frozen(self, frame: CameraFrame) -> None:
        limit, watch = self.parameters.frozen_after, self.watch[frame.camera]
        watch.note_pixels(telling_pixels(frame.image))
        if limit and watch.repeats >= limit:
            raise ImageError(frame.camera, f"it is frozen: the same pixels came {watch.repeats} times in a row")

    def _decode_image(self, frame: CameraFrame, camera: Camera | None) -> CameraFrame:
        """Decode in a thread; without calibration the bytes stay, since the useful size is not known yet."""
        begin = time.perf_counter_ns()
        try:
            self._refuse_frozen(frame)
            frame = frame if camera is None else self._decode(frame, camera)
            self._refuse_black(frame)
        except Exception:
            self.watch[frame.camera].refused["bad_image"] += 1
            raise
        return replace(frame, decode_ns=time.perf_counter_ns() - begin)

    def _refuse_black(self, frame: CameraFrame) -> None:
        limit, image = self.parameters.black_below, frame.image
        if limit and not isinstance(image, bytes):
            brightest = int(image[::SPARSE].max())
            if brightest < limit:
                raise ImageError(frame.camera, f"it is black: its brightest value is {brightest}")

    def _add_motion(self, job: FrameJob, frame_set: FrameSet) -> None:
        """Add the frames with their ego poses, and the motion from each exposure to the key time."""
        job.frame_set = frame_set
        present = [frame for frame in frame_set.frames.values() if frame is not None]
        if not present:
            return
        stamps = [job.stamp_ns, *(frame.stamp_ns for frame in present)]
        self.ego.wait_until(max(stamps), self.parameters.ego_motion.wait_s)
        try:
            poses = self.ego.poses(stamps)
        except PoseError as error:
            job.motion_problem = str(error)
            return
        if poses is None:
            return
        placed = {f.camera: replace(f, ego2global=p) for f, p in zip(present, poses[1:], strict=True)}
        frames, signals = (
            {name: placed.get(name) for name in frame_set.frames},
            self.ego.signals(job.stamp_ns, poses[0]),
        )
        job.frame_set = replace(frame_set, frames=frames, signals=signals)
        job.ego2global = poses[0]
        job.motion = motion_to_key(job.frame_set, poses[0])
        if self.ego.extrapolated_s:
            job.motion_note = f"extrapolated by {self.ego.extrapolated_s * 1e3:.0f} ms"

    def note_problem(self, camera: str, reason: str) -> None:
        """Show in diagnostics why a camera was left out of the last set."""
        with self._lock:
            self.watch[camera].problem = reason

    def _set_problems(self, missing: Mapping[str, str]) -> None:
        with self._lock:
            for name, watch in self.watch.items():
                watch.problem = missing.get(name, "")


def describe_failure(camera: str, image: Future[CameraFrame]) -> str:
    """Wait for an image; say why there is none, "" if there is one.

    The error is read and not raised again: its traceback would hold this set's images until the garbage collector runs.
    """
    try:
        error = image.exception(timeout=DECODE_TIMEOUT_S)
    except Exception as late:
        error = late
    if error is None:
        return ""
    if isinstance(error, (ImageError, MessageError)):
        return str(error).removeprefix(f"camera {camera}: ")
    return f"its image was not decoded: {type(error).__name__}: {error}"


def telling_pixels(image: bytes | NDArray[np.uint8]) -> bytes:
    """Return encoded bytes, or some rows of an image: those of two images differ, but for a frozen camera."""
    return image if isinstance(image, bytes) else image[::SPARSE].tobytes()
