"""One run: phase 1 without boxes, phase 2 with them, and the score. Training continues from its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from occbev.classes import FREE
from occbev.files import replace_file
from occbev.grid import xyz_from_volume
from occbev.inference.postprocess import BoxDecoding, decode_boxes
from occbev.results import Boxes3D
from occbev_training.data.augment import NO_AUGMENTATION, draw_augmentation
from occbev_training.data.datasets import Collate, SampleDataset, TrainingBatch, augmented, batches
from occbev_training.engine.config import OptimConfig, TrainingConfig
from occbev_training.engine.trainer import Loader, Objective, Trainer
from occbev_training.evaluation.frames import annotations_of
from occbev_training.experiment.network import CLASSES, MODEL, build_slim, reset_norms
from occbev_training.experiment.plan import PHASE1, WITHOUT_PHASE1, Plan, Settings
from occbev_training.experiment.pool import Pool, labelled_pool, whole_pool
from occbev_training.experiment.statistics import MatchRecord
from occbev_training.losses.config import LossConfig
from occbev_training.losses.objectives import FinetuneObjective, PretrainObjective, shown
from occbev_training.losses.voxels_and_centres import depth_loss
from occbev_training.metrics.detection import DetectionOutcome, match_detection
from occbev_training.metrics.occupancy import binary_counts, binary_iou
from occbev_training.models.checkpoints import read_weights, transfer
from occbev_training.models.lift_splat.lift_splat import BatchedPoints
from occbev_training.models.network import NetworkOutput, OccBevNetwork

LABELS_OF: Mapping[str, str] = {"Op": "published", "X": "wrong_drive", "V": "unweighted"}
"""Arm -> the labels of phase 1 (see `pool.LABELS`), where they are not the measured ones."""

CARRIED: Mapping[str, tuple[str, ...]] = {
    "D": ("image_encoder", "view_transform"),
    "I-image": ("image_encoder",),
    "I-view": ("image_encoder", "view_transform"),
    "I-bev": ("bev_encoder",),
}
"""Arm -> parts of the network that phase 2 takes from phase 1, where it is not all three."""

ALL_PARTS = ("image_encoder", "view_transform", "bev_encoder")

SCORING = BoxDecoding(threshold=0.03, max_boxes=40)
"""Decoding for scores: average precision ranks boxes, so those with low scores are kept."""

LOG_EVERY = 25


@dataclass(frozen=True)
class DepthObjective:
    """Phase 1 of arm D: the depth of each image where a LiDAR return gives it; no BEV is made."""

    def __call__(self, network: nn.Module, batch: TrainingBatch) -> Mapping[str, Tensor]:
        """Return the term `depth`."""
        assert isinstance(network, OccBevNetwork)
        assert isinstance(batch.geometry, BatchedPoints)
        images = shown(batch.images, batch.camera_valid, batch.shown, MODEL.image)
        features = network.image_encoder(images.flatten(0, 1))
        logits, _ = network.view_transform.predict_depth(features, batch.geometry.ray.flatten(0, 1))
        return {"depth": depth_loss(logits.unflatten(0, images.shape[:2]), batch.depth_bin)}


def phase1_of(arm: str) -> str | None:
    """Return the arm whose phase 1 an arm begins from; None without one."""
    return None if arm in WITHOUT_PHASE1 else PHASE1.get(arm, arm)


def pretrain(arm: str, seed: int, plan: Plan, root: Path, folder: Path) -> None:
    """Train phase 1 of an arm, or continue it; `folder` then holds `weights.safetensors`."""
    pool = whole_pool(root, "train", plan.world, LABELS_OF.get(arm, "measured"), seed)
    config = _training_config(plan, plan.pretrain_steps, seed, plan.settings_of(arm), tune_encoder=False)
    losses = LossConfig(occupancy="occbev_paper" if arm == "Op" else "three_state", depth=0.0)
    objective: Objective = DepthObjective() if arm == "D" else PretrainObjective(MODEL, losses)
    _train(config, build_slim("pretrain", seed), objective, pool, folder)


def finetune(
    arm: str, percent: float, seed: int, settings: Settings, plan: Plan, root: Path, folder: Path, start: Path | None
) -> OccBevNetwork:
    """Train phase 2 of an arm, or continue it; returns the trained network in evaluation mode.

    start: weights of phase 1; None of arms without one.
    """
    network = build_slim("finetune", seed, constant_depth=arm == "K")
    if start is not None:
        parts = CARRIED.get(arm, ALL_PARTS)
        state, _ = read_weights(start)
        report = transfer({name: value for name, value in state.items() if name.split(".")[0] in parts}, network)
        if report.mismatched or report.unused:
            raise ValueError(f"{start}: does not fit the network of phase 2: {report}")
    reset_norms(network)
    steps = plan.finetune_steps + (plan.pretrain_steps if arm in ("R", "K") else 0)
    config = _training_config(plan, steps, seed, settings, tune_encoder=True)
    losses = LossConfig(depth=0.0, velocity=0.0)
    objective = FinetuneObjective(MODEL, losses, torch.ones(len(MODEL.occupancy_classes)))
    pool = labelled_pool(root, plan.world, percent, seed)
    _train(config, network, objective, pool, folder)
    state, _ = read_weights(folder / "weights.safetensors")
    network.load_state_dict(state)
    return network.eval()


def cpu_seconds(folder: Path) -> float:
    """Return the processor time that a training took, over all its restarts."""
    path = folder / "cpu.json"
    return float(json.loads(path.read_text())) if path.exists() else 0.0


def network_outputs(network: nn.Module, pool: Pool, batch: int = 16) -> list[NetworkOutput]:
    """Run a network in evaluation mode on every sample as it was recorded; one output for each batch."""
    size = (MODEL.image.width, MODEL.image.height)
    collate, outputs = Collate(MODEL), []
    for first in range(0, len(pool), batch):
        samples = []
        for index in range(first, min(first + batch, len(pool))):
            still = draw_augmentation(0, len(pool[index].images), size, NO_AUGMENTATION)
            samples.append(augmented(pool.name(index), pool[index], still, MODEL))
        joined = collate(samples)
        images = shown(joined.images, joined.camera_valid, joined.shown, MODEL.image)
        with torch.no_grad():
            outputs.append(network(images, joined.camera_valid, joined.geometry))
    return outputs


def predict_boxes(network: nn.Module, pool: Pool) -> list[Boxes3D]:
    """Return the boxes of every sample."""
    found = []
    for output in network_outputs(network, pool):
        heatmaps, boxes = (output.answers[name].float().numpy() for name in ("heatmap", "box"))
        found += [decode_boxes(*maps, MODEL.bev, SCORING, (), CLASSES) for maps in zip(heatmaps, boxes, strict=True)]
    return found


def match(found: list[Boxes3D], pool: Pool) -> DetectionOutcome:
    """Match boxes with the truth of every sample by the nuScenes rule."""
    names = ("boxes", "labels", "lidar_points")
    truths = [annotations_of(pool.read(index, names)) for index in range(len(pool))]
    return match_detection(found, truths, CLASSES)


def score_detection(network: nn.Module, pool: Pool) -> MatchRecord:
    """Return the matches of every box, by drive; all scores follow from them."""
    drives = [pool.drives.index(pool.drive(index)) for index in range(len(pool))]
    return MatchRecord.of(match(predict_boxes(network, pool), pool), drives)


def score_occupancy(network: nn.Module, pool: Pool) -> float:
    """Return the IoU of occupied voxels against dense truth where a camera sees them."""
    counts = np.zeros(3, np.int64)
    for index, said in enumerate(predict_occupied(network, pool)):
        sample = pool[index]
        counts += binary_counts(sample.semantics != FREE, said, sample.mask_camera)
    return binary_iou(counts)


def predict_occupied(network: nn.Module, pool: Pool) -> list[NDArray[np.bool_]]:
    """Return the voxels (X, Y, Z) of every sample that a network of phase 1 calls occupied."""
    found: list[NDArray[np.bool_]] = []
    for output in network_outputs(network, pool):
        logits = output.answers["reconstruction_logits"]
        found += [xyz_from_volume(one) for one in (logits[:, 1] > logits[:, 0]).numpy()]
    return found


def _training_config(plan: Plan, steps: int, seed: int, settings: Settings, tune_encoder: bool) -> TrainingConfig:
    scale = settings.encoder_scale
    scales = {"image_encoder": scale, "view_transform": scale} if tune_encoder and scale != 1 else {}
    return TrainingConfig(
        steps=steps,
        batch=plan.batch,
        seed=seed,
        channels_last=False,
        threads=1,
        workers=0,
        optim=OptimConfig(lr=settings.lr, scales=scales, ema=0.0),
        augment=plan.augment,
        log_every=LOG_EVERY,
        validate_every=0,
        checkpoint_minutes=1.0,
    )


def _train(config: TrainingConfig, network: nn.Module, objective: Objective, pool: Pool, folder: Path) -> None:
    """Train to the end. A run that was killed continues from its checkpoint; a finished one returns at once."""
    if (folder / "weights.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    dataset = SampleDataset(pool, MODEL, config.augment, config.seed)
    clock = _ProcessorClock(folder / "cpu.json")
    with _single_thread():
        trainer = Trainer(config, network, objective, _loader(dataset, config.batch), folder)
        trainer.run(report=clock)
    clock({})


def _loader(dataset: SampleDataset, batch: int) -> Loader:
    return lambda first: batches(dataset, batch, 0, first)


class _ProcessorClock:
    """Adds the processor time of this process to what a file holds, whenever a line of metrics is written."""

    def __init__(self, path: Path) -> None:
        self._path, self._before = path, float(json.loads(path.read_text())) if path.exists() else 0.0
        self._begun = time.process_time()

    def __call__(self, line: Mapping[str, Any]) -> None:
        with replace_file(self._path) as temporary:
            temporary.write_text(json.dumps(round(self._before + time.process_time() - self._begun, 2)))


class _single_thread:
    """Compute in one thread inside, as before outside."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
