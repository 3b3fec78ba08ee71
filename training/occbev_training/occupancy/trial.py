"""The last checks of bag-check: one pair made in memory, and the calibration compared with the images.

A bag whose messages are all there may still give no label; this makes one and says what is missing from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from occbev.classes import OCCUPIED_STATE
from occbev.rig import Camera, viewing_direction
from occbev_training.occupancy.extrinsics import CameraVerdict, Moment, RigVerdict, gather, judge_rig
from occbev_training.occupancy.pairs import PairConfig, TrialPair, try_key
from occbev_training.sources.bag_check import Verdict
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.deskew import EgoBox
from occbev_training.sources.recording import Recording

FAST, TURNING = 70.0, 200.0
"""Metres and degrees per second that no road vehicle does."""


@dataclass(frozen=True)
class CameraRow:
    """One camera in words. fov_deg: across and down; sky: the side of the image where it is brightest."""

    name: str
    topic: str
    size: str
    lens: str
    view: str
    fov_deg: tuple[float, float]
    sky: str
    agrees: str


@dataclass(frozen=True)
class Trial:
    """What became of a drive: verdicts for the table of requirements, and the cameras."""

    verdicts: list[Verdict]
    cameras: list[CameraRow]


def try_drive(recording: Recording, config: PairConfig | None = None) -> Trial:
    """Judge the rig by its images and make one pair in memory; what goes wrong becomes a verdict."""
    moments = gather(recording)
    rig = judge_rig(recording, moments)
    topics = recording.topics.images if isinstance(recording, BagRecording) else {}
    rows = [describe_camera(c, topics.get(c.name, ""), moments, rig) for c in recording.rig.cameras]
    left_out = recording.left_out.items() if isinstance(recording, BagRecording) else ()
    verdicts = [Verdict(f"camera {name} is left out", False, reason, must=False) for name, reason in left_out]
    verdicts += [_view_verdict(row) for row in rows if "?" in row.view]
    verdicts += [*_calibration_verdicts(rig), _motion_verdict(recording)]
    return Trial([*verdicts, *_pair_verdicts(recording, config or PairConfig())], rows)


def describe_camera(camera: Camera, topic: str, moments: Sequence[Moment], rig: RigVerdict) -> CameraRow:
    """Put one camera into words."""
    views = [moment.views[camera.name].grey for moment in moments if camera.name in moment.views]
    found = next((verdict.answer for verdict in rig.cameras if verdict.camera == camera.name), "not sure")
    return CameraRow(
        camera.name,
        topic,
        f"{camera.width}x{camera.height}",
        "pinhole" if camera.lens.is_pinhole else camera.distortion_model,
        viewing_direction(camera),
        field_of_view(camera),
        brightest_side(views),
        found,
    )


def field_of_view(camera: Camera) -> tuple[float, float]:
    """Return the angles in degrees across the middle row and column of an image; NaN where the lens sees no edge."""
    width, height = float(camera.width), float(camera.height)
    ends = np.array([[0.0, height / 2], [width, height / 2], [width / 2, 0.0], [width / 2, height]])
    left, right, top, bottom = camera.lens.unproject(ends)
    return _between(left, right), _between(top, bottom)


def _between(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.rad2deg(np.arccos(np.clip(one @ other, -1, 1))))


def brightest_side(images: Sequence[NDArray[np.float32]]) -> str:
    """Return the side of grey images (H, W) towards which brightness rises: by day, that of the sky."""
    strength = dict.fromkeys(("top", "bottom", "left", "right"), 0.0)
    for image in images:
        v, u = np.mgrid[: image.shape[0], : image.shape[1]]
        down, across = (float(np.corrcoef(axis.ravel(), image.ravel())[0, 1]) for axis in (v, u))
        for side, value in (("top", -down), ("bottom", down), ("left", -across), ("right", across)):
            strength[side] += value / len(images)
    side = max(strength, key=lambda name: strength[name])
    return side if strength[side] > 0.2 else "not clear"


def _view_verdict(row: CameraRow) -> Verdict:
    return Verdict(f"view of {row.name}", False, row.view, must=row.agrees != "agrees")


def _calibration_verdicts(rig: RigVerdict) -> list[Verdict]:
    if not rig.moments:
        return [Verdict("calibration", False, "no key frame has images, a sweep and a pose to compare", must=False)]
    cameras = [_camera_verdict(verdict) for verdict in rig.cameras]
    if not rig.lidar_fault:
        return cameras
    lidar = Verdict("calibration of the LiDAR", False, f"it is {rig.lidar_fault}")
    return [lidar, *(replace(verdict, ok=True) for verdict in cameras)]


def _camera_verdict(verdict: CameraVerdict) -> Verdict:
    sure = bool(verdict.fault)
    return Verdict(f"calibration of {verdict.camera}", verdict.answer == "agrees", verdict.text, must=sure)


def _motion_verdict(recording: Recording) -> Verdict:
    """Metres driven against time: poses that jump are no odometry."""
    stamps, poses = recording.trajectory.stamp_ns, recording.trajectory.ego2global
    if len(stamps) < 2:
        return Verdict("motion", False, "a single pose; the vehicle's way is not known", must=False)
    seconds = np.maximum(np.diff(stamps) / 1e9, 1e-3)
    way = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    cosine = (np.einsum("nij,nij->n", poses[:-1, :3, :3], poses[1:, :3, :3]) - 1) / 2
    turn = np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))
    jumps = int(
        np.count_nonzero((way > FAST * np.maximum(seconds, 0.05)) | (turn > TURNING * np.maximum(seconds, 0.05)))
    )
    metres, duration = float(way.sum()), float((stamps[-1] - stamps[0]) / 1e9)
    text = f"{metres:.0f} m in {duration:.0f} s, {3.6 * metres / max(duration, 1e-9):.0f} km/h on average"
    if jumps:
        return Verdict(
            "motion", False, f"{text}; {jumps} steps are faster than {FAST:g} m/s: poses of a jumping estimate"
        )
    moved = metres >= 2.0
    return Verdict("motion", moved, text + ("" if moved else "; a standing vehicle teaches little"), must=False)


def _pair_verdicts(recording: Recording, config: PairConfig) -> list[Verdict]:
    """Make pairs in memory, from the middle of the drive on, until one succeeds; say why none did."""
    keys = len(recording.key_stamp_ns)
    count, reasons = 0, dict[str, str]()
    for key in dict.fromkeys([keys // 2, keys // 3, 2 * keys // 3, 0, keys - 1]):
        pair = try_key(recording, key, config)
        if pair.sample is not None:
            return _made(pair, recording, config.label.ego_box)
        count, reasons = count + 1, {**pair.refused, **reasons}
    first = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return [Verdict("one pair", False, f"none of {count} key frames gives one; the first reason of each kind: {first}")]


def _made(pair: TrialPair, recording: Recording, body: EgoBox) -> list[Verdict]:
    assert pair.sample is not None
    volumes = pair.sample.label
    observed = volumes.state > 0
    occupied = volumes.state == OCCUPIED_STATE
    seen = volumes.camera_visible > 0
    count, cameras = len(pair.sample.images), len(recording.rig)
    share = float(seen[observed].mean()) if observed.any() else 0.0
    text = (
        f"key frame {pair.key}: {count} of {cameras} images, {observed.mean():.0%} of the grid observed, "
        f"{int(occupied.sum())} cells occupied, {share:.0%} of what is observed is seen by a camera"
    )
    missing = [
        Verdict(f"image of {name}", False, f"key frame {pair.key}: {reason}", must=False)
        for name, reason in pair.sample.meta["missing"].items()
    ]
    return [*missing, _body_verdict(pair.sample.meta["stats"], body), Verdict("one pair", share > 0, text)]


def _body_verdict(stats: Mapping[str, int], body: EgoBox) -> Verdict:
    """Say which box is taken for the vehicle itself: it hides what stands in it, and what reaches beyond is an obstacle."""
    x, y, z = (f"{lo:g} to {hi:g}" for lo, hi in zip(body.lo, body.hi, strict=True))
    count, every = stats.get("points_ego_body", 0), stats.get("rays", 0)
    share = count / max(1, count + every)
    text = (
        f"x {x}, y {y}, z {z} m counts as the vehicle itself, with {share:.1%} of the returns; where yours is larger or "
        "smaller, give --ego-box to pairs, learn, adapt or prepare"
    )
    return Verdict("vehicle's body", True, text, must=False)
