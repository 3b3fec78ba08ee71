"""Boxes of unlabelled frames, found by a package's own network that is shown the depth which the LiDAR measured.

What it finds in a frame and in the frame's mirror image is joined and moved onto the returns. Adapting learns to find
these boxes from images alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from occbev.config import ModelConfig
from occbev.files import replace_file
from occbev.geometry import transform_points, wrap_angle
from occbev.lens import Lens
from occbev.results import Boxes3D
from occbev_training.data.augment import NO_AUGMENTATION, Draw, augment_boxes, draw_augmentation
from occbev_training.data.cache import CachedSample
from occbev_training.data.datasets import Collate, TrainingBatch, augmented
from occbev_training.data.pair_samples import PairSamples, taught_path
from occbev_training.evaluation.frames import Prediction, boxes_of
from occbev_training.losses.objectives import shown
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, LiftSplat
from occbev_training.models.network import OccBevNetwork

CERTAIN = 12.0
"""Logit of the depth bin that a LiDAR return gives, against those that the network says of the others."""

BEYOND = 1
"""Bins beyond a return at which its feature cell is splatted: the nearest return of 16x16 pixels lies on the near side,
and the heads know the network's own depth, which is spread to the far one.
"""

LEAST_SCORE = 0.15
"""Boxes with a lower score, the mean over both images, teach nothing."""

JOIN_RADIUS = 2.0
"""Metres within which boxes of one class, each from another image, are the same thing."""

MAX_BOXES = 120
"""The best boxes of an image are looked at."""

REACH, STEP = 2.0, 0.2
"""Metres by which a box may move along its own axes onto the returns, and the step of the search."""

SHELL, APRON, CLEARANCE = 0.4, 0.5, 0.35
"""Metres: returns lie so deep in the faces that look at the cameras, and none so near around the box; they are looked for
so much higher than the box, which leaves the road out.
"""

LEAST_RETURNS, MOST_RETURNS = 8, 400
"""A box with fewer returns around it stays where it is; of more than the latter some are taken."""


@dataclass(frozen=True)
class Teacher:
    """A package's network that is shown the LiDAR's depth.

    Its detection head works where depth is right, and depth is what fails first on cameras that it does not know.
    """

    network: OccBevNetwork
    model: ModelConfig

    @classmethod
    def of(cls, network: nn.Module, model: ModelConfig) -> Teacher | None:
        """Take a network; None where it has no boxes, a memory, or no plain Lift-Splat."""
        known = isinstance(network, OccBevNetwork) and isinstance(network.view_transform, LiftSplat)
        if not known or network.detection_head is None or network.temporal is not None:
            return None
        return cls(network, model)

    def find(self, sample: CachedSample) -> Boxes3D:
        """Return the boxes of a sample in base_link, best first, with the score that both images give them."""
        size, views = (self.model.image.width, self.model.image.height), []
        for mirrored in (False, True):
            draw = mirror_draw(len(sample.images), size) if mirrored else still_draw(len(sample.images), size)
            batch = Collate(self.model)([augmented("", sample, draw, self.model)])
            heatmap, box = self.maps(batch)
            prediction = Prediction(heatmap=heatmap[0].cpu().numpy(), box=box[0].cpu().numpy())
            found = boxes_of(prediction, self.model)
            assert found is not None
            found = found[np.arange(min(len(found.label), MAX_BOXES))]
            views.append(replace(found, box=augment_boxes(found.box, draw)))  # a mirror is its own inverse
        joined = join_boxes(views)
        return move_onto_returns(joined[joined.score >= LEAST_SCORE], sample)

    @torch.no_grad()
    def maps(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Return centre logits (B, K, Y, X) and boxes (B, 10, Y, X), by the LiDAR's depth where it is known."""
        network = self.network
        batch = batch.to(next(network.parameters()).device)
        view, geometry, head = network.view_transform, batch.geometry, network.detection_head
        assert isinstance(geometry, BatchedPoints)
        assert isinstance(head, nn.Module)
        images = shown(batch.images, batch.camera_valid, batch.shown, self.model.image)
        features = network.image_encoder(images.flatten(0, 1))
        logits, context = view.predict_depth(features, geometry.ray.flatten(0, 1))
        measured = measured_depth(logits.unflatten(0, batch.images.shape[:2]), batch.depth_bin)
        heatmap, box = head(network.bev_encoder(view.pool(measured, context, batch.camera_valid, geometry)))
        return heatmap.float(), box.float()


def teach(
    teacher: Teacher,
    samples: PairSamples,
    indices: Iterable[int],
    folder: Path,
    found: Callable[[], None] = lambda: None,
) -> PairSamples:
    """Find boxes in some of the pairs and keep them in `folder`, those that are there already as they are.

    found: called after each. Returns: the pairs with these boxes in place of labels.
    """
    for index in indices:
        path = taught_path(folder, samples.name(index))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            boxes = teacher.find(samples[index])
            with replace_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, box=boxes.box, label=boxes.label)
        found()
    return replace(samples, taught=folder)


def still_draw(cameras: int, size: tuple[int, int]) -> Draw:
    """Return the draw that changes nothing."""
    return draw_augmentation(0, cameras, size, NO_AUGMENTATION)


def mirror_draw(cameras: int, size: tuple[int, int]) -> Draw:
    """Return the draw that swaps left and right of scene and images."""
    mirrored = replace(NO_AUGMENTATION, image_flip=1.0, flip_with_bev=False)
    return replace(draw_augmentation(0, cameras, size, mirrored), bev_sign=(1, -1))


def measured_depth(logits: Tensor, bins: Tensor) -> Tensor:
    """Return depth logits (B * N, D, h, w) that are sure of the bin `BEYOND` that of each return.

    logits: (B, N, D, h, w). bins: (B, N, h, w), negative without a return.
    """
    known = (bins >= 0).flatten(0, 1)[:, None]
    sure = (
        functional.one_hot((bins + BEYOND).clamp(0, logits.shape[2] - 1), logits.shape[2]).movedim(-1, 2).flatten(0, 1)
        * CERTAIN
    )
    return torch.where(known, sure, logits.flatten(0, 1).float())


def join_boxes(views: Sequence[Boxes3D]) -> Boxes3D:
    """Join what several images of one scene show (weighted boxes fusion, Solovyev et al. 2021), best first.

    A joined box is the mean by score; its score is the sum over the number of images, so that they have to agree.
    """
    box = np.concatenate([one.box for one in views]).astype(np.float64)
    label, score = (np.concatenate([getattr(one, name) for one in views]) for name in ("label", "score"))
    view = np.repeat(np.arange(len(views)), [len(one.label) for one in views])
    order, free = np.argsort(-score, kind="stable"), np.ones(len(label), bool)
    joined, labels, scores = [], [], []
    for best in order:
        if not free[best]:
            continue
        away = np.hypot(*(box[:, :2] - box[best, :2]).T)
        near = order[(free & (label == label[best]) & (away < JOIN_RADIUS))[order]]
        members = near[np.unique(view[near], return_index=True)[1]]  # the best of each image
        free[near] = False
        joined.append(_mean_box(box[members], score[members]))
        labels.append(label[best])
        scores.append(score[members].sum() / len(views))
    rank = np.argsort(-np.array(scores), kind="stable")
    rows = np.array(joined, np.float32).reshape(-1, 9)
    return Boxes3D(rows[rank], np.array(labels, np.int64)[rank], np.array(scores, np.float32)[rank])


def _mean_box(box: NDArray[np.float64], score: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean (9,) of boxes by score, the best first; headings that are opposite to the best one's are turned."""
    weight = score / score.sum()
    mean = weight @ box
    turn = wrap_angle(box[:, 6] - box[0, 6])
    turn = np.where(np.abs(turn) > np.pi / 2, wrap_angle(turn + np.pi), turn)
    mean[6] = wrap_angle(box[0, 6] + weight @ turn)
    return np.asarray(mean)


def move_onto_returns(boxes: Boxes3D, sample: CachedSample) -> Boxes3D:
    """Move every box along its own axes so that the faces that look at the cameras lie on the returns around it."""
    returns, origin = returns_in_ego(sample), sample.cam2ego[:, :3, 3].mean(0)
    box = boxes.box.astype(np.float64)
    for row in box:
        length, width, height, yaw = row[3:7]
        axes = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
        half = np.array([length, width]) / 2
        if length < REACH:
            continue  # small things could jump to others
        beside = np.abs(returns[:, 2] - row[2] - CLEARANCE) < height / 2
        around = (returns[beside, :2] - row[:2]) @ axes.T
        around = around[np.all(np.abs(around) < half + REACH, axis=1)]
        if len(around) < LEAST_RETURNS:
            continue
        around = around[:: -(-len(around) // MOST_RETURNS)]
        towards = axes @ (origin[:2] - row[:2])
        faces = np.where(np.abs(towards) > half, np.sign(towards), 0.0)
        row[:2] += _best_shift(np.ascontiguousarray(around), half, faces) @ axes
    return replace(boxes, box=box.astype(np.float32))


def returns_in_ego(sample: CachedSample) -> NDArray[np.float64]:
    """Return the LiDAR returns (P, 3) of all images in base_link."""
    points = []
    for camera, intrinsic in enumerate(sample.intrinsic):
        chosen = sample.lidar_camera == camera
        rays = Lens.from_matrix(intrinsic).rays(sample.lidar_pixel[chosen])
        points.append(transform_points(sample.cam2ego[camera], rays * sample.lidar_depth[chosen, None]))
    return np.concatenate(points)


@njit(cache=True)
def _best_shift(
    points: NDArray[np.float64], half: NDArray[np.float64], faces: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the shift (2,) of a box along its own axes that fits points (M, 2) about its middle best.

    half: half its length and width. faces: which face along each axis looks at the cameras, 0 for neither. Points in the
    shell of these faces speak for a shift, points just outside of the box against it, as does the shift itself.
    """
    steps, best, shift = int(round(REACH / STEP)), -1e9, np.zeros(2)
    for i in range(-steps, steps + 1):
        for j in range(-steps, steps + 1):
            along, across = i * STEP, j * STEP
            total = -0.02 * len(points) * (abs(along) + abs(across))
            for point in points:
                x, y = point[0] - along, point[1] - across
                if abs(x) <= half[0] and abs(y) <= half[1]:
                    deep_x = half[0] - faces[0] * x if faces[0] != 0 else np.inf
                    deep_y = half[1] - faces[1] * y if faces[1] != 0 else np.inf
                    total += 1.0 if min(deep_x, deep_y) <= SHELL else 0.1
                elif abs(x) <= half[0] + APRON and abs(y) <= half[1] + APRON:
                    total -= 0.7
            if total > best:
                best = total
                shift[0], shift[1] = along, across
    return shift
