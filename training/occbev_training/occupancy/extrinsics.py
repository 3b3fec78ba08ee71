"""Check each camera's calibration against its images, with LiDAR and ego motion.

Four measures compare a placement of a camera with what it saw; a higher number fits better:
depth edges of the LiDAR on edges of the image, patches that move from one key frame to the next as their points do,
patches that neighbouring cameras share, and brightness that rises towards the sky. The placement of the calibration
competes with turns of 5, 90 and 180 degrees, a body frame in place of the optical one, the inverse, and the places
of the other cameras. A verdict says how sure it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from occbev.geometry import invert_transform, project_points, transform_points
from occbev.messages.image_headers import decoding_fault
from occbev.results import FrameSet
from occbev.rig import Camera, CameraRig
from occbev.trajectory import PoseError
from occbev_training.sources.deskew import RayLimits, deskew_rays
from occbev_training.sources.recording import Recording, RecordingError

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Image = NDArray[np.float32]

WIDTH = 320
"""Pixels to which images are scaled: an error of 5 degrees is then still 20 pixels wide."""

_RANGE = RayLimits(max_range=100.0)
_PATCH = np.stack([axis.ravel() for axis in np.mgrid[-3:4, -3:4]][::-1], 1).astype(np.float64)
_STEPS = 6 * np.array([(0.0, 0.0), *((np.cos(a), np.sin(a)) for a in np.arange(6) * np.pi / 3)])
_DEPTHS = (6.0, 15.0, 100.0)
_LEAST_CONTRAST = 2.5


@dataclass(frozen=True)
class View:
    """One small, undistorted image with its pinhole, and LiDAR points (M, 3) in ego at its exposure."""

    camera: Camera
    stamp_ns: int
    grey: Image
    points: Array
    edges: tuple[Array, Array]
    """Points before something farther, and the same moved towards it; (E, 3) each, in ego at the exposure."""

    @cached_property
    def gradient(self) -> Image:
        """(4, H, W): contrast across four directions against the contrast around, mean 0."""
        return _gradients(self.grey)

    @cached_property
    def grid_patches(self) -> tuple[Image, Array]:
        """Patches (M, 49) with contrast from all over the image, and their rays (M, 3) of depth 1."""
        across, down = np.arange(6.5, self.camera.width - 6, 10), np.arange(6.5, self.camera.height - 6, 10)
        pixels = np.stack(np.meshgrid(across, down), -1).reshape(-1, 2)
        patches, contrast = _patches(self.grey, pixels, np.ones(len(pixels)))
        clear = contrast > _LEAST_CONTRAST
        rays = np.column_stack([pixels, np.ones(len(pixels))]) @ np.linalg.inv(self.camera.intrinsic).T
        return patches[clear], rays[clear]


@dataclass(frozen=True)
class Moment:
    """The views of one key frame, and those of a later one after the vehicle has moved."""

    views: Mapping[str, View]
    later: Mapping[str, View]
    motion: Mapping[str, Array]
    """Camera -> ego at its exposure to ego at its later one, (4, 4)."""


@dataclass(frozen=True)
class Placement:
    """A place that a camera may truly have. other: the camera whose calibrated place it is.

    lidar_turn: a rotation of the LiDAR points in ego, (4, 4), in place of one of the camera.
    """

    fault: str
    """What is wrong with the calibration if this is the true place, "" for the calibration itself."""
    cam2ego: Array
    other: str = ""
    small: bool = False
    lidar_turn: Array | None = None


@dataclass(frozen=True)
class Evidence:
    """How well one placement of a camera fits; each measure is a mean over `count` places."""

    edges: float = 0.0
    edge_count: int = 0
    motion: float = 0.0
    motion_count: int = 0
    overlap: float = 0.0
    overlap_count: int = 0
    sky: float = 0.0
    moments: int = 1

    @property
    def score(self) -> float:
        """One number of the four; measures of few places count less. The weights keep the right place of every
        camera of two nuScenes scenes, one PandaSet scene and a simulated drive before all its wrong ones."""
        edges = self.edges * self.edge_count / (self.edge_count + 40)
        motion = self.motion * self.motion_count / (self.motion_count + 80)
        overlap = self.overlap * self.overlap_count / (self.overlap_count + 60)
        return edges + 2 * motion + 5 * overlap + 0.3 * self.sky

    def __add__(self, other: Evidence) -> Evidence:
        """Join the evidence of two moments."""
        edges = _joined(self.edges, self.edge_count, other.edges, other.edge_count)
        motion = _joined(self.motion, self.motion_count, other.motion, other.motion_count)
        overlap = _joined(self.overlap, self.overlap_count, other.overlap, other.overlap_count)
        moments = self.moments + other.moments
        sky = (self.sky * self.moments + other.sky * other.moments) / moments
        return Evidence(*edges, *motion, *overlap, sky, moments)


def _joined(one: float, one_count: int, other: float, other_count: int) -> tuple[float, int]:
    count = one_count + other_count
    return (one * one_count + other * other_count) / max(1, count), count


def small_grey(image: NDArray[np.uint8] | bytes, camera: Camera) -> tuple[Image, Camera]:
    """Return an image as blurred grey of `WIDTH` pixels without distortion, and the pinhole that fits it.

    Raises RecordingError where encoded bytes hold no image.
    """
    if isinstance(image, bytes):
        fault = decoding_fault(image)
        grey = None if fault else cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE)
        if grey is None:
            raise RecordingError(
                f"camera {camera.name}: an encoded image cannot be decoded: {fault or 'it is damaged'}"
            )
    else:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if not camera.lens.is_pinhole:
        coefficients = np.array(camera.distortion)
        if camera.distortion_model == "equidistant":
            grey = cv2.fisheye.undistortImage(grey, camera.intrinsic, coefficients, Knew=camera.intrinsic)
        else:
            grey = cv2.undistort(grey, camera.intrinsic, coefficients)
    width = min(WIDTH, camera.width)
    size = width, max(1, round(camera.height * width / camera.width))
    small = replace(
        camera.resize(size[0] / camera.width, size[1] / camera.height, (0, 0), size),
        distortion=(),
        distortion_model="none",
    )
    scaled = cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(scaled, (0, 0), 1.0), np.float32), small


def _gradients(grey: Image) -> Image:
    along_u, along_v = cv2.Sobel(grey, cv2.CV_32F, 1, 0) / 8, cv2.Sobel(grey, cv2.CV_32F, 0, 1) / 8
    around = np.sqrt(cv2.GaussianBlur(along_u**2 + along_v**2, (0, 0), 12)) + 1.5
    channels = []
    for angle in np.arange(4) * np.pi / 4:
        across = np.abs(float(np.cos(angle)) * along_u + float(np.sin(angle)) * along_v) / around
        across = np.minimum(across, 1.5)
        across -= cv2.GaussianBlur(across, (0, 0), 8)
        across /= max(float(across.std()), 1e-6)
        channels.append(cv2.dilate(across, np.ones((3, 3), np.uint8)))
    stacked = np.stack(channels)
    return np.asarray(stacked - stacked.mean(axis=(1, 2), keepdims=True), np.float32)


def depth_edges(points: Array, origin: Array, reach: float = 0.02) -> tuple[Array, Array]:
    """Find points (M, 3) well before a neighbour as seen from the LiDAR, at most 4000 of them.

    Returns: the points (E, 3), and the same moved by the angle to that neighbour at their own range.
    """
    away = points - origin
    distance = np.linalg.norm(away, axis=1)
    usable = distance > 2.0
    away, distance, points = away[usable], distance[usable], points[usable]
    if len(points) < 10:
        return np.zeros((0, 3)), np.zeros((0, 3))
    direction = away / distance[:, None]
    _, neighbours = cKDTree(direction).query(direction, k=6, distance_upper_bound=reach)
    behind = np.append(distance, 0.0)[neighbours]
    farthest = behind[:, 1:].argmax(axis=1) + 1
    rows = np.arange(len(points))
    edge = np.flatnonzero(behind[rows, farthest] > 1.1 * distance + 1.0)
    edge = edge[:: len(edge) // 4000 + 1]
    neighbour = neighbours[edge, farthest[edge]]
    return points[edge], direction[neighbour] * distance[edge, None] + origin


def _inside(pixels: Array, depth: Array, camera: Camera, margin: float = 0.0) -> NDArray[np.bool_]:
    size = np.array((camera.width, camera.height)) - margin
    return (depth > 1.0) & np.all((pixels >= margin) & (pixels < size), axis=-1)


def _edge_fit(view: View, ego2cam: Array) -> tuple[float, int]:
    """Mean contrast across the depth edges that fall into the image."""
    points, beside = (transform_points(ego2cam, part) for part in view.edges)
    pixels, depth = project_points(points, view.camera.intrinsic)
    inside = _inside(pixels, depth, view.camera) & (beside[:, 2] > 0.5)
    if not inside.any():
        return 0.0, 0
    step = project_points(beside[inside], view.camera.intrinsic)[0] - pixels[inside]
    channel = np.rint(np.arctan2(step[:, 1], step[:, 0]) / (np.pi / 4)).astype(np.int64) % 4
    cell = pixels[inside].astype(np.int64)
    # One vote per pixel and direction: a near object has many points, a far one few.
    place = np.ravel_multi_index((channel, cell[:, 1], cell[:, 0]), view.gradient.shape)
    votes = np.unique(place)
    return float(view.gradient.reshape(-1)[votes].mean()), len(votes)


def _patches(grey: Image, pixels: Array, scale: Array) -> tuple[Image, Image]:
    """Return 7x7 patches (M, 49) without mean, over their contrast, and that contrast (M,)."""
    place = np.rint(pixels[:, None] - 0.5 + _PATCH * scale[:, None, None]).astype(np.int32)
    u = np.clip(place[..., 0], 0, grey.shape[1] - 1)
    v = np.clip(place[..., 1], 0, grey.shape[0] - 1)
    values = grey[v, u]
    values = values - values.mean(axis=1, keepdims=True)
    contrast = np.sqrt(np.einsum("mp,mp->m", values, values) / values.shape[1])
    return values / (contrast[:, None] + 3.0), contrast


def _likeness(grey: Image, patches: Image, pixels: Array, scale: Array) -> Image:
    """How like the patches (M, 49) are to those at `pixels` (M, 2), and to those six pixels beside; (7, M)."""
    places = (pixels + _STEPS[:, None]).reshape(-1, 2)
    found = _patches(grey, places, np.tile(scale, len(_STEPS)))[0].reshape(len(_STEPS), len(pixels), -1)
    return np.asarray(np.einsum("smp,mp->sm", found, patches) / patches.shape[1])


def _motion_fit(view: View, later: View, motion: Array, ego2cam: Array) -> tuple[float, int]:
    """How much better patches of static points are found where the ego motion puts them than beside."""
    camera = view.camera
    now, then = (transform_points(ego2cam, part) for part in (view.points, transform_points(motion, view.points)))
    (pixels, depth), (moved, far) = (project_points(part, camera.intrinsic) for part in (now, then))
    use = _inside(pixels, depth, camera, 4) & _inside(moved, far, camera, 4)
    use &= (np.linalg.norm(moved - pixels, axis=1) > 4) & (depth > 2) & (far > 2)
    use[use] &= np.abs(np.log(depth[use] / far[use])) < np.log(2)
    chosen = np.flatnonzero(use)
    chosen = chosen[:: len(chosen) // 400 + 1]
    patches, contrast = _patches(view.grey, pixels[chosen], np.ones(len(chosen)))
    clear = contrast > _LEAST_CONTRAST
    chosen, patches = chosen[clear], patches[clear]
    if not len(chosen):
        return 0.0, 0
    scale = depth[chosen] / far[chosen]
    like = _likeness(later.grey, patches, moved[chosen], scale)
    return float((like[0] - like[1:].mean(axis=0)).mean()), len(chosen)


def _overlap_fit(view: View, others: Iterable[View], cam2ego: Array) -> tuple[float, int]:
    """How much better what other cameras see in the same directions fits than what is beside, at the best depth."""
    patches, rays = view.grid_patches
    gains = [_overlap_with(other, patches, rays, cam2ego, view.camera.intrinsic[0, 0]) for other in others]
    gain = np.concatenate([*gains, np.zeros(0)])
    return (float(gain.mean()), len(gain)) if len(gain) else (0.0, 0)


def _overlap_with(other: View, patches: Image, rays: Array, cam2ego: Array, focal: float) -> Array:
    """Gains (G,) of those patches, along rays (M, 3), that one other camera sees at some depth."""
    like = np.full((len(_STEPS), len(rays)), -np.inf)
    for depth in _DEPTHS:
        points = transform_points(other.camera.ego2cam @ cam2ego, rays * depth)
        place, far = project_points(points, other.camera.intrinsic)
        seen = np.flatnonzero(_inside(place, far, other.camera, 4))
        if len(seen):
            scale = np.full(len(seen), other.camera.intrinsic[0, 0] / focal)
            like[:, seen] = np.maximum(like[:, seen], _likeness(other.grey, patches[seen], place[seen], scale))
    like = like[:, np.isfinite(like[0])]
    return np.asarray(like[0] - like[1:].mean(axis=0))


def _sky_fit(view: View, cam2ego: Array) -> float:
    """Correlation of brightness with the elevation at which a placement makes the pixels look."""
    camera = view.camera
    grid = np.stack(np.meshgrid(np.arange(4, camera.width, 8), np.arange(4, camera.height, 8)), -1).reshape(-1, 2)
    rays = np.column_stack([grid + 0.5, np.ones(len(grid))]) @ np.linalg.inv(camera.intrinsic).T @ cam2ego[:3, :3].T
    elevation = rays[:, 2] / np.linalg.norm(rays, axis=1)
    brightness = view.grey[grid[:, 1], grid[:, 0]]
    if brightness.std() < 1 or elevation.std() < 1e-3:
        return 0.0
    return float(np.corrcoef(elevation, brightness)[0, 1])


def weigh(moments: Sequence[Moment], name: str, place: Placement) -> Evidence:
    """Return the evidence for one placement of a camera."""
    total: Evidence | None = None
    for moment in moments:
        if name in moment.views:
            evidence = _weigh_view(moment, name, place)
            total = evidence if total is None else total + evidence
    return total or Evidence()


def _weigh_view(moment: Moment, name: str, place: Placement) -> Evidence:
    view, later = moment.views[name], moment.later.get(name)
    if place.lidar_turn is not None:
        points, *edges = (transform_points(place.lidar_turn, part) for part in (view.points, *view.edges))
        view = replace(view, points=points, edges=(edges[0], edges[1]))
    ego2cam = invert_transform(place.cam2ego)
    motion = (0.0, 0) if later is None else _motion_fit(view, later, moment.motion[name], ego2cam)
    others = [other for key, other in moment.views.items() if key not in (name, place.other)]
    overlap = _overlap_fit(view, others, place.cam2ego)
    return Evidence(*_edge_fit(view, ego2cam), *motion, *overlap, _sky_fit(view, place.cam2ego))


_BODY2OPTICAL = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
_AXES = {"pitched": (1.0, 0.0, 0.0), "turned": (0.0, 1.0, 0.0), "rolled": (0.0, 0.0, 1.0)}
"""Axes of the optical frame, x right, y down, z forward."""


def placements(camera: Camera, rig: CameraRig) -> list[Placement]:
    """Return the calibration of a camera and what it is tried against."""
    here = camera.cam2ego
    found = [Placement("", here)]
    for verb, axis in _AXES.items():
        for degrees in (-5, 5, -90, 90, 180):
            fault = f"{verb} by {abs(degrees)} degrees"
            found.append(Placement(fault, here @ _turned(np.array(axis), -degrees), small=abs(degrees) < 10))
    found.append(
        Placement("in the body frame (x forward) in place of the optical one", here @ _rotation(_BODY2OPTICAL.T))
    )
    found.append(Placement("turned from body to optical frame twice", here @ _rotation(_BODY2OPTICAL)))
    found.append(Placement("inverted (its transform goes the other way)", invert_transform(here)))
    others = [other for other in rig.cameras if other.name != camera.name]
    return found + [Placement(f"another camera's: the place of {o.name} fits", o.cam2ego, o.name) for o in others]


def _rotation(rotation: Array) -> Array:
    a2b = np.eye(4)
    a2b[:3, :3] = rotation
    return a2b


def _turned(axis: Array, degrees: float) -> Array:
    return _rotation(cv2.Rodrigues(axis * np.deg2rad(degrees))[0])


def lidar_turns(lidar2ego: Array) -> dict[str, Array]:
    """Return what would undo a turn of the LiDAR about the vertical; fault -> (4, 4) of points in ego."""
    found = {}
    for degrees in (-90, 90, 180):
        turn = _turned(np.array([0.0, 0.0, 1.0]), -degrees)
        turn[:3, 3] = lidar2ego[:3, 3] - turn[:3, :3] @ lidar2ego[:3, 3]
        found[f"turned by {degrees:+d} degrees about the vertical"] = turn
    return found


def weigh_placements(moments: Sequence[Moment], camera: Camera, rig: CameraRig) -> list[tuple[Placement, Evidence]]:
    """Weigh a camera's calibration, which comes first, and what it is tried against.

    Where the calibration fits better than any wrong place ever does, only small turns are tried. Images so small that
    such a turn moves them by few pixels do not tell it from noise.
    """
    tried = placements(camera, rig)
    if camera.intrinsic[0, 0] * np.tan(np.deg2rad(SMALL_TURN)) < LEAST_SHIFT:
        tried = [placement for placement in tried if not placement.small]
    here = weigh(moments, camera.name, tried[0])
    beyond_doubt = here.score - 0.3 * here.sky > BEYOND_DOUBT
    others = [p for p in tried[1:] if p.small or not beyond_doubt]
    return [(tried[0], here), *((p, weigh(moments, camera.name, p)) for p in others)]


@dataclass(frozen=True)
class CameraVerdict:
    """What the images say of one camera's calibration.

    fault: what is wrong, "" where nothing is known to be. margin: how much the calibration's score is above
    (right) or below (wrong) that of the best other placement.
    """

    camera: str
    fault: str
    margin: float
    evidence: Evidence

    @property
    def answer(self) -> str:
        """agrees, not sure, likely wrong or wrong."""
        if self.fault:
            return "wrong" if self.margin < -SURE else "likely wrong"
        return "agrees" if self.margin > LEAST else "not sure"

    @property
    def text(self) -> str:
        """The verdict in a line."""
        e = self.evidence
        seen = f"{e.edge_count} depth edges, {e.motion_count} moved and {e.overlap_count} shared patches"
        if self.fault:
            return f"{self.answer}: by its images, the calibration is {self.fault} (margin {-self.margin:.2f}; {seen})"
        return f"{self.answer} (margin {self.margin:.2f}; {seen})"


LEAST, SURE = 0.12, 0.35
"""Difference of scores from which on a placement is taken, and from which on without doubt."""

SMALL_TURN, LEAST_SHIFT = 5.0, 8.0
"""Degrees of a small turn, and the pixels by which it must move an image to be tried."""

LEAST_EVIDENCE = 0.4
"""Score without the sky below which a placement is noise: the right place of every real camera had 0.5."""

BEYOND_DOUBT = 1.0
"""Score without the sky that no wrong place reached: the best had 0.6."""

LEAST_SMALL = 0.15
"""The same for a turn of a few degrees, which edges beside the right ones may imitate."""


@dataclass(frozen=True)
class RigVerdict:
    """What the images say of a rig. lidar_fault: "" where the LiDAR is not turned. moments: key frames that were used."""

    cameras: tuple[CameraVerdict, ...]
    lidar_fault: str
    moments: int

    @property
    def agreement(self) -> float:
        """Share of the cameras that nothing contradicts (Q6); NaN where no key frame could be used."""
        return float(np.mean([not verdict.fault for verdict in self.cameras])) if self.moments else np.nan

    @property
    def faults(self) -> list[str]:
        """One line for each sensor whose calibration is wrong."""
        if self.lidar_fault:
            return [f"LiDAR: {self.lidar_fault}"]
        return [f"{verdict.camera}: {verdict.text}" for verdict in self.cameras if verdict.fault]


def judge_rig(recording: Recording, moments: Sequence[Moment] | None = None) -> RigVerdict:
    """Compare every camera's calibration, and the LiDAR's, with what its images show over a few key frames.

    Without a readable key frame with images and a sweep, nothing is sure. Takes some seconds.
    """
    moments = gather(recording) if moments is None else moments
    cameras = [camera for camera in recording.rig.cameras if any(camera.name in m.views for m in moments)]
    weighed = {c.name: weigh_placements(moments, c, recording.rig) for c in cameras}
    verdicts = {name: choose_placement(name, found) for name, found in weighed.items()}
    unseen = [CameraVerdict(n, "", 0.0, Evidence()) for n in recording.rig.names if n not in verdicts]
    for name in list(verdicts):
        verdicts |= _swapped_with(verdicts, name, weighed)
    calibrated = {name: found[0][1].score for name, found in weighed.items()}
    lidar = _lidar_fault(moments, cameras, calibrated, recording.lidar2ego)
    return RigVerdict((*verdicts.values(), *unseen), lidar, len(moments))


def choose_placement(name: str, found: Sequence[tuple[Placement, Evidence]]) -> CameraVerdict:
    """Return the verdict on a camera whose calibration, which comes first, and other placements were weighed."""
    (_, here), *others = found
    gross = max(((p, e) for p, e in others if not p.small), key=lambda pair: pair[1].score, default=None)
    small = max(((p, e) for p, e in others if p.small), key=lambda pair: pair[1].score, default=None)
    margin = here.score if gross is None else here.score - gross[1].score
    before_small = gross is not None and (small is None or gross[1].score > small[1].score)
    if gross is not None and before_small and margin < -LEAST and _counts(gross[1]):
        return CameraVerdict(name, gross[0].fault, margin, here)
    if small is None:
        return CameraVerdict(name, "", margin, here)
    slight = here.score - small[1].score
    # What neighbours share is found within 5 degrees, too: a turn that loses it imitates, it does not correct.
    keeps = here.overlap_count < 40 or small[1].overlap >= here.overlap - 0.02
    if slight < -LEAST_SMALL and keeps and _counts(small[1]):
        return CameraVerdict(name, small[0].fault, slight, here)
    return CameraVerdict(name, "", margin, here)


def _counts(evidence: Evidence) -> bool:
    """Whether the images say enough of a placement to put it before the calibration."""
    return evidence.score - 0.3 * evidence.sky > LEAST_EVIDENCE


def _swapped_with(
    verdicts: Mapping[str, CameraVerdict], name: str, weighed: Mapping[str, Sequence[tuple[Placement, Evidence]]]
) -> dict[str, CameraVerdict]:
    """Name the other one of two swapped cameras as such, too, where its own images alone are not sure of it."""
    other = next((p.other for p, _ in weighed[name] if p.other and p.fault == verdicts[name].fault), "")
    if other not in verdicts or any(p.other and p.fault == verdicts[other].fault for p, _ in weighed[other]):
        return {}
    here = weighed[other][0][1]
    there = next(((e, p) for p, e in weighed[other] if p.other == name), None)
    if there is None or there[0].score <= here.score:
        return {}
    return {other: replace(verdicts[other], fault=there[1].fault, margin=here.score - there[0].score)}


def _lidar_fault(
    moments: Sequence[Moment], cameras: Sequence[Camera], calibrated: Mapping[str, float], lidar2ego: Array
) -> str:
    """Return how the LiDAR is turned, "" where it is not: all cameras must gain together."""
    best, named = LEAST, ""
    for fault, turn in lidar_turns(lidar2ego).items():
        places = {c.name: Placement(fault, c.cam2ego, lidar_turn=turn) for c in cameras}
        gains = [weigh(moments, name, place).score - calibrated[name] for name, place in places.items()]
        if gains and np.mean(gains) > best:
            best = float(np.mean(gains))
            named = f"{fault}: {sum(gain > 0 for gain in gains)} of {len(gains)} cameras fit better so"
    return named


def gather(recording: Recording, first: int = 0, last: int | None = None, count: int = 3) -> list[Moment]:
    """Read up to `count` of the key frames [first, last) with images and a sweep, each with a later one after some way.

    Key frames that cannot be read or have no pose are passed over.
    """
    keys = np.arange(len(recording.key_stamp_ns))[first:last]
    moments: list[Moment] = []
    for part in np.array_split(keys, max(1, min(count, len(keys)))):
        for key in np.roll(part, len(part) // 2)[:3]:
            moment = _moment(recording, int(key))
            if moment is not None:
                moments.append(moment)
                break
    return moments


def _moment(recording: Recording, key: int) -> Moment | None:
    stamp_ns = int(recording.key_stamp_ns[key])
    if not len(recording.sweep_stamp_ns):
        return None
    nearest = int(np.argmin(np.abs(recording.sweep_stamp_ns - stamp_ns)))
    if abs(int(recording.sweep_stamp_ns[nearest]) - stamp_ns) > 1_000_000_000:
        return None
    try:
        views = _views(recording.frame_set(key), recording, nearest)
        later_key = _later_key(recording, key)
        later = {} if later_key is None else _views(recording.frame_set(later_key), recording, None)
        motion = {
            n: recording.trajectory.relative(v.stamp_ns, later[n].stamp_ns) for n, v in views.items() if n in later
        }
    except Exception:  # whatever a reader or decoder raises of one key frame's data
        logger.debug("%s key %d", recording.name, key, exc_info=True)
        return None
    return Moment(views, later, motion) if views else None


def _later_key(recording: Recording, key: int, least: float = 0.4, most: float = 8.0) -> int | None:
    """Return the next key frame, or else the one before, that is between `least` and `most` metres away."""
    stamps = recording.key_stamp_ns
    here = recording.trajectory.at(int(stamps[key]))[:3, 3]
    for step in (1, -1):
        other = key + step
        while 0 <= other < len(stamps) and abs(int(stamps[other] - stamps[key])) <= 3_000_000_000:
            try:
                way = float(np.linalg.norm(recording.trajectory.at(int(stamps[other]))[:3, 3] - here))
            except PoseError:
                break
            if way >= least:
                if way > most:
                    break
                return other
            other += step
    return None


def _views(frames: FrameSet, recording: Recording, sweep: int | None) -> dict[str, View]:
    """Make the views of a frame set; without a sweep they hold no points."""
    nothing = np.zeros((0, 3))
    points, edges = nothing, (nothing, nothing)
    if sweep is not None:
        rays = deskew_rays(recording.sweep(sweep), recording.trajectory, frames.stamp_ns, None, _RANGE)
        points = rays.end[rays.hit]
        edges = depth_edges(points, rays.origin[0]) if len(points) else edges
        points = points[np.random.default_rng(0).permutation(len(points))[:6_000]]
    views = {}
    for name in frames.cameras:
        frame = frames.frames[name]
        assert frame is not None
        grey, small = small_grey(frame.image, recording.rig[name])
        key2exposure = recording.trajectory.relative(frames.stamp_ns, frame.stamp_ns)
        moved = [transform_points(key2exposure, part) for part in (points, *edges)]
        views[name] = View(small, frame.stamp_ns, grey, moved[0], (moved[1], moved[2]))
    return views
