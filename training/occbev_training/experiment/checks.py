"""Sanity checks before the experiment: the task is neither trivial nor hopeless, and no data leaks between splits.

Each gives a value, its bound, and whether it holds. The report shows all of them, failed ones first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occbev.classes import FREE
from occbev.geometry import box_corners
from occbev.inference.postprocess import decode_boxes
from occbev.lens import Lens
from occbev.results import Boxes3D
from occbev_training.data.augment import NO_AUGMENTATION, draw_augmentation
from occbev_training.data.cache import CachedSample
from occbev_training.data.datasets import Collate, augmented
from occbev_training.evaluation.frames import box_channels
from occbev_training.experiment.network import CLASSES, MODEL, build_slim
from occbev_training.experiment.phases import SCORING, match, network_outputs
from occbev_training.experiment.plan import SPLITS, Plan
from occbev_training.experiment.pool import Pool, labelled_drives, turn_sample, whole_pool
from occbev_training.experiment.statistics import MatchRecord
from occbev_training.losses.objectives import shown
from occbev_training.metrics.occupancy import binary_counts, binary_iou
from occbev_training.models.checkpoints import load_strictly, read_weights

Check = dict[str, Any]

UNTRAINED = ("leaks", "colour", "thumbnail", "turned")
"""Checks that need no training, in order."""

COLOUR_MARGIN, THUMBNAIL_BOUND, TURN_BOUND = 0.1, 0.05, 1e-4
"""How far above chance colours may tell the class, mAP of the thumbnail probe, relative error of a turned BEV."""


def look(name: str, world: Path, plan: Plan, start: Path | None = None) -> list[Check]:
    """Carry out one of `UNTRAINED`, or "frames". start: weights of a phase 1, for "frames"."""
    if name == "leaks":
        return find_leaks(plan)
    training, development = (whole_pool(world, split, plan.world) for split in ("train", "development"))
    if name == "colour":
        return [probe_colours(training, development)]
    if name == "thumbnail":
        return [probe_thumbnails(training, development)]
    if name == "turned":
        return [turn_scene(development[0])]
    assert name == "frames"
    assert start is not None
    return compare_frames(development, start)


def make_check(name: str, value: float, bound: str, passed: bool, meaning: str) -> Check:
    """Make the record of one check."""
    return {"name": name, "value": value, "bound": bound, "passed": bool(passed), "meaning": meaning}


def find_leaks(plan: Plan) -> list[Check]:
    """Count drives that two splits share, and labelled drives that a larger share lacks."""
    seeds = [seed for name in SPLITS for seed in getattr(plan.world, name).seeds]
    percents = sorted({group.percent for group in plan.runs})
    missing = 0
    for seed in range(plan.family_seeds):
        chosen = [set(labelled_drives(plan.world.train.count, percent, seed)) for percent in percents]
        missing += sum(len(small - large) for small, large in zip(chosen, chosen[1:], strict=False))
    return [
        make_check(
            "drives in two splits",
            shared := len(seeds) - len(set(seeds)),
            "0",
            shared == 0,
            "textures and streets follow from the seed, so none is shared",
        ),
        make_check(
            "labelled drives that a larger share lacks", missing, "0", missing == 0, "shares of one seed are nested"
        ),
    ]


def probe_colours(training: Pool, development: Pool, most: int = 240) -> Check:
    """Tell the class of a box from the mean colour of its pixels alone, by regularised least squares."""
    (x, y), (test_x, test_y) = (_colours(pool, most) for pool in (training, development))
    if len(y) == 0 or len(test_y) == 0:
        return make_check("class from colour alone", -1.0, "a box that is seen", False, "no box was seen")
    balance = 1 / np.sqrt(np.maximum(np.bincount(y, minlength=len(CLASSES)), 1))[y]
    weights = _ridge(x * balance[:, None], np.eye(len(CLASSES))[y] * balance[:, None], 1e-3)
    said = (test_x @ weights).argmax(1)
    present = np.unique(test_y)
    accuracy = float(np.mean([np.mean(said[test_y == label] == label) for label in present]))
    chance = 1 / len(present)
    return make_check(
        "class from colour alone",
        accuracy,
        f"<= {chance + COLOUR_MARGIN:.2f} (chance {chance:.2f})",
        accuracy <= chance + COLOUR_MARGIN,
        "balanced accuracy; above chance where colour tells classes apart, as orange cones do",
    )


def _colours(pool: Pool, most: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean colour and its products (M, 10) and class (M,) of the boxes that show at least four pixels."""
    features, labels = [np.zeros((0, 10))], []
    for index in np.unique(np.linspace(0, len(pool) - 1, min(most, len(pool))).round().astype(int)):
        sample = pool[int(index)]
        for box, label in zip(sample.boxes, sample.labels, strict=True):
            colour = _mean_colour(sample, box)
            if colour is not None:
                products = np.outer(colour, colour)[np.triu_indices(3)]
                features.append(np.concatenate([[1.0], colour, products])[None])
                labels.append(int(label))
    return np.concatenate(features), np.array(labels, np.int64)


def _mean_colour(sample: CachedSample, box: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """Mean RGB (3,) from 0 to 1 inside the middle half of a box's image; None where that is under four pixels."""
    corners = box_corners(box[None, :7])[0]
    height, width = sample.images.shape[1:3]
    for image, intrinsic, cam2ego in zip(sample.images, sample.intrinsic, sample.cam2ego, strict=True):
        ego2cam = np.linalg.inv(cam2ego)
        pixel, depth = Lens.from_matrix(intrinsic).see(corners @ ego2cam[:3, :3].T + ego2cam[:3, 3])
        if (depth < 0.5).any():
            continue
        low, high = pixel.min(0), pixel.max(0)
        middle, half = (low + high) / 2, (high - low) / 4
        u0, v0 = np.floor(np.maximum(middle - half, 0)).astype(int)
        u1, v1 = np.ceil(np.minimum(middle + half, (width, height))).astype(int)
        if (u1 - u0) * (v1 - v0) >= 4 and u1 > u0 and v1 > v0:
            colour: NDArray[np.float64] = image[v0:v1, u0:u1].reshape(-1, 3).mean(0) / 255
            return colour
    return None


def probe_thumbnails(training: Pool, development: Pool) -> Check:
    """Predict the heat map linearly from thumbnails of 6x3 pixels of each camera."""
    x, test_x = (np.stack([_thumbnail(pool[index]) for index in range(len(pool))]) for pool in (training, development))
    heat = np.stack([_cells(training[index]) for index in range(len(training))])
    weights = _ridge(x, heat.reshape(len(heat), -1), 10.0)
    said = (test_x @ weights).reshape(-1, *heat.shape[1:])
    shape = _mean_boxes(training)
    found = [_decode(one, shape) for one in said]
    value = float(MatchRecord.of(match(found, development), [0] * len(development)).mean_ap()[0])
    return make_check(
        "mAP of a linear probe of thumbnails",
        value,
        f"< {THUMBNAIL_BOUND}",
        value < THUMBNAIL_BOUND,
        "what mean colour and place in the street alone tell",
    )


def _thumbnail(sample: CachedSample) -> NDArray[np.float64]:
    images = sample.images.astype(np.float64) / 255
    count, height, width, _ = images.shape
    small = images.reshape(count, 3, height // 3, 6, width // 6, 3).mean((2, 4))
    return np.append(small.ravel(), 1.0)


def _cells(sample: CachedSample) -> NDArray[np.float64]:
    """Heat map (C, Y, X) of a sample: 1 in the cells that hold a centre."""
    heat = np.zeros((len(CLASSES), *MODEL.bev.shape[::-1]))
    cell = np.floor(MODEL.bev.map_coordinates(sample.boxes[:, :2])).astype(int)
    heat[sample.labels, cell[:, 1], cell[:, 0]] = 1
    return heat


def _mean_boxes(pool: Pool) -> NDArray[np.float32]:
    """Mean box of each class in the channels of the head, (C, 10)."""
    boxes = np.concatenate([pool[index].boxes for index in range(len(pool))])
    labels = np.concatenate([pool[index].labels for index in range(len(pool))])
    channels = box_channels(boxes)
    mean = [
        channels[labels == label].mean(0) if (labels == label).any() else np.zeros(10) for label in range(len(CLASSES))
    ]
    return np.stack(mean).astype(np.float32)


def _decode(heat: NDArray[np.float64], shape: NDArray[np.float32]) -> Boxes3D:
    share = np.clip(heat, 1e-4, 1 - 1e-4)
    logits = np.log(share / (1 - share)).astype(np.float32)
    maps = np.broadcast_to(shape[heat.argmax(0)].transpose(2, 0, 1), (10, *heat.shape[1:]))
    return decode_boxes(logits, np.ascontiguousarray(maps), MODEL.bev, SCORING, (), CLASSES)


def _ridge(x: NDArray[np.float64], y: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)


def turn_scene(sample: CachedSample) -> Check:
    """Turn a scene by a quarter: the splatted BEV of the turned cameras must be the turned BEV."""
    network = build_slim("pretrain", 0).eval()
    size = (MODEL.image.width, MODEL.image.height)
    still = draw_augmentation(0, len(sample.images), size, NO_AUGMENTATION)
    turned = turn_sample(sample, 1)
    batch = Collate(MODEL)([augmented("scene", one, still, MODEL) for one in (sample, turned)])
    images = shown(batch.images, batch.camera_valid, None, MODEL.image)
    with torch.no_grad():
        features = network.image_encoder(images.flatten(0, 1))
        # The ray table tells poses to the depth net; what is compared is where features go, so both get the first's.
        ray = batch.geometry.ray[:1].expand_as(batch.geometry.ray).flatten(0, 1)  # type: ignore[union-attr]
        logits, context = network.view_transform.predict_depth(features, ray)
        bev = network.view_transform.pool(logits, context, batch.camera_valid, batch.geometry)  # type: ignore[arg-type]
    first, second = bev  # (C, Z, Y, X): x to the right, y up the rows, so a turn of the scene goes from x to y
    error = float((torch.rot90(first, 1, (3, 2)) - second).abs().max() / first.abs().max())
    return make_check(
        "BEV of a turned scene against the turned BEV",
        error,
        f"<= {TURN_BOUND:g} of its largest value",
        error <= TURN_BOUND,
        "cameras, BEV and labels share one frame, base_link, in both phases",
    )


def compare_frames(development: Pool, start: Path) -> list[Check]:
    """Compare predictions of phase 1 in turned scenes with labels that are turned too, and with labels that are not."""
    network = build_slim("pretrain", 0)
    load_strictly(network, read_weights(start)[0], str(start))
    scores: Mapping[str, float] = _turned_scores(network.eval(), development)
    kept, wrong, mean = (scores[name] for name in ("turned along", "not turned", "as recorded"))
    return [
        make_check(
            "occupancy IoU of scenes turned by a quarter",
            kept,
            f">= 0.7 of the IoU as recorded ({mean:.3f})",
            kept >= 0.7 * mean,
            "the pre-trained BEV means the same in every direction",
        ),
        make_check(
            "the same against labels that were not turned",
            wrong,
            f"< the IoU with labels turned along ({kept:.3f})",
            wrong < kept,
            "a frame that differs between phases would be seen",
        ),
    ]


def _turned_scores(network: torch.nn.Module, pool: Pool) -> dict[str, float]:
    samples = [pool[index] for index in range(len(pool))]
    turned = Pool(pool.root, pool.split, pool.world, pool.numbers, pool.labels, pool.seed)
    turned._kept.update({index: turn_sample(sample, 1) for index, sample in enumerate(samples)})
    counts = {name: np.zeros(3, np.int64) for name in ("as recorded", "turned along", "not turned")}
    for shown_pool, names in ((pool, ("as recorded",)), (turned, ("turned along", "not turned"))):
        logits = [output.answers["reconstruction_logits"] for output in network_outputs(network, shown_pool)]
        said = [np.swapaxes(one.numpy(), 0, 2) for part in logits for one in part[:, 1] > part[:, 0]]
        for name in names:
            truths = turned if name == "turned along" else pool
            for index, occupied in enumerate(said):
                truth = truths[index]
                counts[name] += binary_counts(truth.semantics != FREE, occupied, truth.mask_camera)
    return {name: binary_iou(count) for name, count in counts.items()}
