"""Ground grids of a package beside the truth, and the calibration of their probabilities.

Frames come with their truth from anywhere: dense classes of a simulator or Occ3D, or the label of a LiDAR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.grid import VoxelGrid
from occbev.inference.ground_grid import GroundGridConfig, GroundGridMaker, SightLines, find_columns, in_sight
from occbev.inference.model_package import ModelPackage
from occbev.inference.postprocess import occupied_probability, voxels_in_view
from occbev.inference.preprocess import network_camera
from occbev.inference.space_calibration import SpaceCalibration, read_calibration
from occbev.results import CameraFrame, FrameSet, GroundGrid, VoxelEvidence
from occbev.rig import CameraRig
from occbev_training.data.pair_samples import PairSamples
from occbev_training.evaluation.data import EvaluationData, EvaluationFrame, RecordingFrames, read_cached_rig
from occbev_training.evaluation.run_package import PackageNetwork, RunOptions
from occbev_training.metrics.occupancy import require_grid
from occbev_training.metrics.space import (
    CurveFit,
    SpaceCounts,
    SpaceTruth,
    cells_within,
    missed_curves,
    truth_of_classes,
    truth_of_states,
)
from occbev_training.sources.recording import Recording

Frames = Iterable[tuple[EvaluationFrame, SpaceTruth]]
"""Key frames with what is true of them, by time within each drive."""

MAX_FRAMES = 120
"""Frames that a calibration is fitted on at most, evenly spread: what the network says of each stays in memory."""


class SpaceError(ValueError):
    """Frames or a package that cannot be used for a ground grid, saying what would be right."""


def dense_frames(
    evaluation_data: EvaluationData, indices: Iterable[int], grid: VoxelGrid, config: GroundGridConfig
) -> Iterator[Any]:
    """Yield frames whose dense classes are known; raises GridError if these are on another grid than `grid`."""
    for index in indices:
        frame = evaluation_data.frame(index)
        if frame.truth is not None:
            truth = frame.truth
            require_grid(truth.grid, grid)
            yield frame, truth_of_classes(truth.semantics, truth.mask_camera, truth.grid, config)


def lidar_frames(
    recording: Recording, keys: Sequence[int], grid: VoxelGrid, config: GroundGridConfig, window: float = 1.0
) -> Iterator[Any]:
    """Yield key frames of a recording with the labels of its LiDAR, of sweeps within `window` seconds."""
    from occbev_training.occupancy.labels import LabelBuilder, LabelConfig

    builder = LabelBuilder(recording, LabelConfig(window=window), grid)
    frames = RecordingFrames([(recording, key) for key in keys])
    for number, key in enumerate(keys):
        label = builder.build(key)
        yield frames.frame(number), truth_of_states(label.state, label.camera_visible > 0, grid, config)


def pair_frames(pairs: PairSamples, indices: Iterable[int], config: GroundGridConfig) -> Iterator[Any]:
    """Yield pairs with the labels of their LiDAR."""
    names, grid = pairs.info.cameras, pairs.info.grid
    for index in indices:
        sample = pairs[index]
        frames = {
            name: CameraFrame(name, index + 1, image) if valid else None
            for name, image, valid in zip(names, sample.images, sample.camera_valid, strict=True)
        }
        missing = {name: "not among the pair's images" for name, frame in frames.items() if frame is None}
        rig = read_cached_rig(sample, names)
        frame_set = FrameSet(index + 1, frames, missing)
        frame = EvaluationFrame(pairs.name(index), pairs.drive(index), "", frame_set, rig, None, None, None, None)
        yield frame, truth_of_states(sample.state, sample.camera_visible > 0, grid, config)


@dataclass(frozen=True)
class SpaceFrame:
    """A network's outputs for one frame, what the cameras see, and the truth. occupied: (Z, Y, X), P(occupied)."""

    evidence: VoxelEvidence
    occupied: NDArray[np.float32]
    sight: SightLines
    truth: SpaceTruth
    ground: GroundGrid
    name: str
    drive: str


class SpaceNetwork:
    """A package that predicts occupied space, frame after frame."""

    def __init__(self, package: ModelPackage, options: RunOptions | None = None) -> None:
        self.package, self._network = package, PackageNetwork(package, options or RunOptions())
        self._sight: tuple[tuple[str, bytes], SightLines] | None = None

    def frames(self, frames: Frames, config: GroundGridConfig | None = None) -> Iterator[SpaceFrame]:
        """Run on frames; raises SpaceError if the package predicts no voxels."""
        maker = GroundGridMaker(self.package.model.grid, read_calibration(self.package))
        for frame, truth in frames:
            self._network(frame)
            found = self._network.perception
            if found is None or found.occupancy.evidence is None:
                raise SpaceError(f"{self.package.model.name} predicts no voxels: there is no ground grid to score")
            evidence, sight = found.occupancy.evidence, self._sight_of(frame)
            occupied = occupied_probability(self._network.last_outputs)
            ground = maker.make(evidence, sight, config or GroundGridConfig())
            yield SpaceFrame(evidence, occupied, sight, truth, ground, frame.name, frame.drive)

    def _sight_of(self, frame: EvaluationFrame) -> SightLines:
        """The lines of sight of a frame's cameras, kept for the last rig."""
        model = self.package.model
        rig = CameraRig(tuple(network_camera(camera, model.image) for camera in frame.rig.cameras))
        valid = np.array([frame.frame_set.frames.get(name) is not None for name in rig.names])
        key = rig.hash, valid.tobytes()
        if self._sight is None or self._sight[0] != key:
            self._sight = key, SightLines(rig, model.grid, voxels_in_view(rig, model.grid), valid)
        return self._sight[1]


def score_space(
    package: ModelPackage,
    frames: Frames,
    config: GroundGridConfig | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SpaceCounts:
    """Compare the ground grids of a package with the truth, and count right and wrong cells."""
    counts, near = SpaceCounts(), cells_within(package.model.grid)
    for done, frame in enumerate(SpaceNetwork(package).frames(frames, config)):
        counts += SpaceCounts.of(frame.ground.cells, frame.truth, frame.sight.in_image, near)
        progress(done + 1)
    return counts


@dataclass
class SpaceFit:
    """A calibration and what it was fitted on."""

    calibration: SpaceCalibration
    voxels: tuple[CurveFit, CurveFit] = field(default_factory=lambda: (CurveFit(), CurveFit()))
    """The two halves of the frames, see `divide`: each is the test of what is fitted on the other."""
    obstacles: tuple[CurveFit, CurveFit] = field(default_factory=lambda: (CurveFit(), CurveFit()))
    frames: int = 0

    def as_record(self) -> dict[str, Any]:
        """Calibration errors before and after, as plain values; after: fitted on one half, measured on the other."""
        record: dict[str, Any] = {"fitted_on": self.calibration.fitted_on, "frames": self.frames}
        for name, (one, other) in (("voxels", self.voxels), ("obstacles", self.obstacles)):
            errors = [a.calibration_error(b.rising()) for a, b in ((one, other), (other, one))]
            record[f"{name}_ece"] = round((one + other).calibration_error(), 4)
            record[f"{name}_ece_calibrated"] = round(float(np.mean(errors)), 4)
        return record


def fit_space(
    package: ModelPackage,
    frames: Frames,
    fitted_on: str,
    config: GroundGridConfig | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SpaceFit:
    """Fit the calibration of a package on frames that its training never saw; rings by distance, see `CurveFit`.

    Raises:
        SpaceError: fewer than two frames, or no obstacle in any.
    """
    config, grid = config or GroundGridConfig(), package.model.grid
    fit, kept, drives = SpaceFit(SpaceCalibration.none()), [], list[str]()
    counted: list[tuple[CurveFit, CurveFit]] = []
    rings = fit.calibration.rings(grid.bev)
    anywhere = np.ones(rings.shape, np.float32)
    for frame in SpaceNetwork(package).frames(frames, config):
        truth, known = frame.truth, frame.truth.known
        counted.append((CurveFit(), CurveFit()))
        of_voxels, of_obstacles = counted[-1]
        of_voxels.add(frame.occupied[known], truth.occupied[known], np.broadcast_to(rings, known.shape)[known])
        columns, cells = find_columns(frame.evidence, grid, config, anywhere), truth.obstacle | truth.free
        of_obstacles.add(columns.score[cells], truth.obstacle[cells], rings[cells])
        kept.append((frame.evidence, frame.sight, truth.obstacle))
        drives.append(frame.drive)
        fit.frames += 1
        progress(fit.frames)
    if fit.frames < 2:
        raise SpaceError(f"{fit.frames} frames: want two or more, to fit on some and to measure on others")
    for half, parts in zip(divide(drives), counted, strict=True):
        for total, part in zip((fit.voxels, fit.obstacles), parts, strict=True):
            total[half].counts += part.counts
    voxels, obstacles = fit.voxels[0] + fit.voxels[1], fit.obstacles[0] + fit.obstacles[1]
    if not obstacles.counts[1].any():
        raise SpaceError(f"{fit.frames} frames hold no obstacle that a camera sees: nothing to calibrate on")
    rising = SpaceCalibration(voxels.rising(), obstacles.rising(), fit.calibration.missed, fitted_on=fitted_on)
    fit.calibration = _with_missed(rising, kept, grid, config)
    return fit


def divide(drives: Sequence[str]) -> list[int]:
    """Return the half, 0 or 1, of each frame by its drive: every second drive is in one, or the end of a single drive."""
    number = {drive: place for place, drive in enumerate(dict.fromkeys(drives))}
    if len(number) == 1:
        return [int(place >= len(drives) / 2) for place in range(len(drives))]
    return [number[drive] % 2 for drive in drives]


def _with_missed(
    calibration: SpaceCalibration,
    kept: Sequence[tuple[VoxelEvidence, SightLines, NDArray[np.bool_]]],
    grid: VoxelGrid,
    config: GroundGridConfig,
) -> SpaceCalibration:
    """Count which obstacles would be published free: where their ground is taken to be seen, at each score."""
    rings, scores, places, may = calibration.rings(grid.bev), [], [], []
    hiding = GroundGridMaker(grid, calibration).limits(config).hiding
    for evidence, sight, obstacle in kept:
        columns = find_columns(evidence, grid, config, hiding)
        sees_ground, _ = in_sight(columns, sight, grid, calibration, rings)
        scores.append(columns.score[obstacle])
        places.append(rings[obstacle])
        may.append(sees_ground[obstacle])
    missed = missed_curves(scores, places, may)
    return SpaceCalibration(calibration.occupied, calibration.obstacle, missed, fitted_on=calibration.fitted_on)


def draw_reliability(fit: SpaceFit, path: Path) -> Path:
    """Draw predicted probability against measured frequency, by distance, before and after calibration."""
    from matplotlib.figure import Figure

    from occbev.inference.space_calibration import SCORES

    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=100)
    parts = (("voxel is occupied", fit.voxels), ("cell holds an obstacle", fit.obstacles))
    for number, (title, halves) in enumerate(parts):
        counted = halves[0] + halves[1]
        axes = figure.add_subplot(1, 2, number + 1)
        axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
        edges = [f"{edge:g} m" for edge in fit.calibration.edges]
        names = [f"{a} to {b}" for a, b in zip(edges, edges[1:], strict=False)] + [f"from {edges[-1]}"]
        curves = (fit.calibration.occupied, fit.calibration.obstacle)[number]
        for ring, name in enumerate(names):
            share, count = counted.reliability(ring)
            drawn = axes.plot(SCORES, curves[ring], linewidth=1.4, label=name)
            enough = count >= 20
            axes.plot(SCORES[enough], share[enough], ".", markersize=4, color=drawn[0].get_color())
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability that the network says", title=title)
        axes.set_ylabel("how often it is so")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
