"""Score a network on evaluation samples, and the mean of the training set beside it.

Needs neither torch nor numba: predictions come from a function, priors from a small file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES, FREE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.config import ModelConfig
from occbev.files import read_arrays
from occbev.grid import BevGrid, VoxelGrid, xyz_from_volume
from occbev.inference.pipeline import boxes_of as decoded_boxes
from occbev.inference.postprocess import BoxDecoding, decode_boxes, decode_occupancy
from occbev.results import Boxes3D
from occbev_training.evaluation.scores import FrameResult, OccupancyView, Scores, count_occupancy
from occbev_training.metrics.detection import DetectionScores, evaluate_detection, match_near
from occbev_training.metrics.occupancy import binary_counts, binary_iou, require_grid
from occbev_training.sources.recording import Annotations

if TYPE_CHECKING:  # the demo scores without what caches are read by
    from occbev_training.data.cache import SampleCache
    from occbev_training.data.samples import Samples

Floats = NDArray[np.float32]

SCORING = BoxDecoding(threshold=0.02, max_boxes=300)
"""Decoding for scores: the ranking is judged, so weak boxes are kept. Priors are decoded by it as well."""

TRUTH = ("boxes", "labels", "lidar_points", "semantics", "mask_camera")
"""Arrays of a cached sample that it is scored against."""

_VELOCITY_CELLS = 2
_LEAST_PEAK = 1e-6


@dataclass(frozen=True)
class Prediction:
    """Network outputs for one sample; what the network does not have is None.

    heatmap: (C, Y, X) logits. box: (10, Y, X). occupancy: (K, Z, Y, X), reconstruction: (2, Z, Y, X) logits.
    boxes, label: in base_link and (X, Y, Z) classes, of outputs that were decoded already. has_classes: False where
    `label` says only what is occupied.
    """

    heatmap: Floats | None = None
    box: Floats | None = None
    occupancy: Floats | None = None
    reconstruction: Floats | None = None
    boxes: Boxes3D | None = None
    label: NDArray[np.uint8] | None = None
    has_classes: bool = True


@dataclass(frozen=True)
class Priors:
    """Scores without looking at images: the means of the training set.

    heatmap: (C, Y, X) float16 share of training frames with a box of the class centred in the cell, smoothed.
    box: (C, 10) mean box of each class in the channels of the detection head.
    occupied: (X, Y, Z) uint8, 255 x share of frames in which a camera-visible voxel is occupied.
    threshold: share above which a voxel counts as occupied, best on the training frames.
    """

    heatmap: NDArray[np.float16]
    box: NDArray[np.float32]
    occupied: NDArray[np.uint8]
    threshold: float

    def boxes(self, bev: BevGrid) -> Boxes3D:
        """Decode the mean heat map as if it were a network's output: the same boxes for every frame."""
        share = np.clip(self.heatmap.astype(np.float64), _LEAST_PEAK, 1 - _LEAST_PEAK)
        # A share is small where traffic is spread out; only the ranking is scored, so scale the best peak up.
        share = share / share.max() * 0.9
        heatmap = np.log(share / (1 - share)).astype(np.float32)
        found = []
        for label in range(len(heatmap)):  # one box map holds one class's mean
            single = np.full_like(heatmap, -20.0)
            single[label] = heatmap[label]
            maps = np.broadcast_to(self.box[label][:, None, None], (10, *heatmap.shape[1:]))
            found.append(decode_boxes(single, np.ascontiguousarray(maps), bev, BoxDecoding(1e-3, SCORING.max_boxes)))
        return best_boxes(found, SCORING.max_boxes)

    def occupancy(self) -> NDArray[np.bool_]:
        """The training set's mean grid at its best threshold, (X, Y, Z) bool."""
        return self.occupied > 255 * self.threshold

    def save(self, path: Path) -> None:
        """Write as compressed .npz."""
        np.savez_compressed(
            path, heatmap=self.heatmap, box=self.box, occupied=self.occupied, threshold=np.float64(self.threshold)
        )

    @classmethod
    def load(cls, path: Path) -> Priors:
        """Read `save` back; raises ValueError naming the file."""
        try:
            arrays = read_arrays(path, ("heatmap", "box", "occupied", "threshold"))
            return cls(arrays["heatmap"], arrays["box"], arrays["occupied"], float(arrays["threshold"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the priors of a training set: {error}") from error


def evaluate(
    cache: Samples, predict: Callable[[int], Prediction], model: ModelConfig, indices: Iterable[int] | None = None
) -> Scores:
    """Score a predictor on samples of a cache (all by default)."""
    frames = []
    for index in range(len(cache)) if indices is None else indices:
        output, sample = predict(index), cache.read(index, TRUTH)
        truth = dense_truth(sample, cache.info.grid)
        name, drive = cache.name(index), cache.drive(index)
        frames.append(score_frame(name, drive, output, model, annotations_of(sample), truth))
    return Scores.of(frames, model.occupancy_classes)


def score_frame(
    name: str,
    drive: str,
    output: Prediction,
    model: ModelConfig,
    annotations: Annotations | None,
    truth: OccupancyView | None,
) -> FrameResult:
    """Decode a network's outputs for one frame and compare them with the truth."""
    counts, label = None, labels_of(output, model)
    if truth is not None and label is not None:
        counts = count_occupancy(label, model.grid, truth, len(model.occupancy_classes), output.has_classes)
    return FrameResult(name, drive, boxes_of(output, model), annotations, counts)


def boxes_of(output: Prediction, model: ModelConfig) -> Boxes3D | None:
    """Return the boxes of a prediction in base_link, None of a network that predicts none."""
    if output.boxes is not None or output.heatmap is None or output.box is None:
        return output.boxes
    return decoded_boxes({"heatmap": output.heatmap[None], "box": output.box[None]}, model, SCORING)


def labels_of(output: Prediction, model: ModelConfig) -> NDArray[np.uint8] | None:
    """Return the voxel classes (X, Y, Z) of a prediction, None of a network that predicts none."""
    if output.label is not None or output.occupancy is None:
        return output.label
    voxels = decode_occupancy(output.occupancy, model.grid, min_free=model.occupancy.min_free)
    return voxels.label


def dense_truth(sample: Mapping[str, NDArray[Any]], grid: VoxelGrid) -> OccupancyView | None:
    """Return the dense labels of a cached sample, None where it has none."""
    if not sample["mask_camera"].any():
        return None
    return OccupancyView(sample["semantics"], sample["mask_camera"], grid)


def detection_scores(
    predicted: Sequence[Boxes3D], truths: Sequence[Annotations]
) -> tuple[DetectionScores, DetectionScores]:
    """Return (full, near) scores; see `match_near`."""
    return evaluate_detection(predicted, truths), match_near(predicted, truths).scores()


def score_priors(
    cache: SampleCache, priors: Priors, model: ModelConfig, indices: Iterable[int] | None = None
) -> dict[str, float]:
    """Score the priors as a detector and as an occupancy grid on samples of a cache (all by default)."""
    boxes, grid = priors.boxes(model.bev), priors.occupancy()
    truths, counts = [], np.zeros(3, np.int64)
    for index in range(len(cache)) if indices is None else indices:
        sample = cache.read(index, TRUTH)
        truths.append(annotations_of(sample))
        counts += binary_counts(sample["semantics"] != FREE, grid, sample["mask_camera"])
    full, near = detection_scores([boxes] * len(truths), truths)
    return {
        "car_AP_2m_30m": near.ap["car"][2.0],
        "car_AP_2m_50m": full.ap["car"][2.0],
        "mAP": full.mean_ap,
        "mAP_30m": near.mean_ap,
        "occupancy_iou": binary_iou(counts),
    }


def fit_priors(cache: SampleCache, model: ModelConfig, progress: Callable[[int], None] = lambda done: None) -> Priors:
    """Compute the means of a training set: where boxes of each class are, their size, and what is occupied.

    Raises:
        GridError: the training set's voxels are on another grid than the model's.
    """
    require_grid(cache.info.grid, model.grid)
    bev = model.bev
    heatmap = np.zeros((len(DETECTION_CLASSES), *bev.shape[::-1]))
    box_sum, box_count = np.zeros((len(DETECTION_CLASSES), 10)), np.zeros(len(DETECTION_CLASSES))
    occupied, seen = (
        np.zeros(cache.info.grid.shape, np.int32),
        np.zeros(cache.info.grid.shape, np.int32),
    )
    for index in range(len(cache)):
        sample = cache.read(index, TRUTH)
        found = sample["lidar_points"] > 0
        box, label = sample["boxes"][found], sample["labels"][found]
        for name, one in zip(label, box, strict=True):
            add_gaussian(heatmap[name], bev.map_coordinates(one[:2]), radius=max(one[3:5]) / 2 / bev.pitch[0])
        np.add.at(box_sum, label, box_channels(box))
        box_count += np.bincount(label, minlength=len(box_count))
        mask = sample["mask_camera"]
        seen += mask
        occupied += mask & (sample["semantics"] != FREE)
        progress(index + 1)
    mean = box_sum / np.maximum(box_count, 1)[:, None]
    share = np.divide(occupied, seen, out=np.zeros(seen.shape), where=seen > 0)
    stored = np.round(255 * share).astype(np.uint8)
    threshold = best_threshold(stored, occupied, seen)
    return Priors((heatmap / len(cache)).astype(np.float16), mean.astype(np.float32), stored, threshold)


def best_threshold(share: NDArray[np.uint8], occupied: NDArray[np.int32], seen: NDArray[np.int32]) -> float:
    """Return the threshold on `share` / 255 with the best occupied IoU over the frames that were counted.

    A grid that is the same for every frame needs only counts: choosing a voxel adds `occupied` right
    answers and `seen` - `occupied` wrong ones.
    """
    hits = np.bincount(share.ravel(), occupied.ravel(), 256)
    wrong = np.bincount(share.ravel(), (seen - occupied).ravel(), 256)
    above = slice(None, None, -1)
    chosen_hits, chosen_wrong = np.cumsum(hits[above])[above], np.cumsum(wrong[above])[above]
    iou = chosen_hits / np.maximum(hits.sum() + chosen_wrong, 1)
    return float((int(iou.argmax()) - 0.5) / 255)


def box_channels(box: Floats) -> NDArray[np.float64]:
    """Return (M, 10) channels of the detection head for (M, 9) boxes, centred in their cells and at rest."""
    box = np.asarray(box, np.float64)
    half = np.full((len(box), 2), 0.5)
    yaw = box[:, 6:7]
    still = np.zeros((len(box), _VELOCITY_CELLS))
    return np.hstack([half, box[:, 2:3], np.log(np.maximum(box[:, 3:6], 1e-3)), np.sin(yaw), np.cos(yaw), still])


def add_gaussian(plane: NDArray[np.float64], place: NDArray[np.float64], radius: float) -> None:
    """Add a bump of height 1 at a continuous (column, row) of a (Y, X) plane; sigma is radius / 3, at least half a cell."""
    sigma = max(radius / 3, 0.5)
    reach = int(np.ceil(3 * sigma))
    column, row = np.floor(place).astype(int)
    if not (0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]):
        return
    rows = np.arange(max(0, row - reach), min(plane.shape[0], row + reach + 1))
    columns = np.arange(max(0, column - reach), min(plane.shape[1], column + reach + 1))
    distance = (rows[:, None] - row) ** 2 + (columns[None] - column) ** 2
    plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += np.exp(-distance / (2 * sigma**2))


def annotations_of(sample: dict[str, NDArray[Any]]) -> Annotations:
    """Turn cached boxes back into annotations."""
    scores = np.ones(len(sample["boxes"]), np.float32)
    boxes = Boxes3D(sample["boxes"], sample["labels"], scores)
    return Annotations(boxes, ("",) * len(boxes), sample["lidar_points"])


def best_boxes(parts: Sequence[Boxes3D], most: int) -> Boxes3D:
    """Join boxes and keep the best."""
    box = np.concatenate([part.box for part in parts])
    label = np.concatenate([part.label for part in parts])
    score = np.concatenate([part.score for part in parts])
    order = np.argsort(-score, kind="stable")[:most]
    return Boxes3D(box[order], label[order], score[order])


def reconstruction_iou(cache: Samples, predict: Callable[[int], Prediction], indices: Iterable[int]) -> float:
    """Return the occupied IoU of stage 1 against the LiDAR-made labels, over camera-visible observed voxels."""
    counts = np.zeros(3, np.int64)
    for index in indices:
        output, sample = predict(index), cache.read(index, ("state", "camera_visible"))
        assert output.reconstruction is not None
        guess = xyz_from_volume(output.reconstruction[1] > output.reconstruction[0])
        mask = (sample["camera_visible"] != 0) & (sample["state"] != UNOBSERVED_STATE)
        counts += binary_counts(sample["state"] == OCCUPIED_STATE, guess, mask)
    return binary_iou(counts)
