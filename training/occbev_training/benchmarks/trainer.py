"""The training loop of `occbev-tiny`: how much of a step is not forward, backward or optimiser.

Samples are random but of real size, read back from a cache by one worker process, augmented and collated as in
training; only their content is made up.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from occbev.allocator import keep_large_blocks
from occbev.benchmarks import Options, Report
from occbev.config import ModelConfig, to_record
from occbev.geometry import make_transform, rotation_from_yaw
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev_training.data.augment import AugmentConfig
from occbev_training.data.cache import (
    SAMPLE_SUFFIX,
    CachedSample,
    CacheInfo,
    SampleCache,
    open_cache,
    write_sample,
)
from occbev_training.data.datasets import Collate, SampleDataset, batches
from occbev_training.engine.config import OptimConfig, TrainingConfig
from occbev_training.engine.trainer import Trainer, tune_process
from occbev_training.losses import objectives
from occbev_training.models.build import build_model

CAMERA_COUNT = 6
SAMPLES = 8
WARM_STEPS = 2
STEPS_PER_ROUND = 2
LOADED_PER_ROUND = 6
WORK = ("forward", "backward", "optimiser")


def run(options: Options) -> Report:
    """Train both stages for a few steps each and report where the time went."""
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = random_cache(Path(folder) / "cache", LiftSplatModel())
        values["loader_cpu_s_per_sample"] = measure_loader(cache, LiftSplatModel(), options.rounds)
        shares = {stage: measure(stage, cache, Path(folder) / stage, options) for stage in ("pretrain", "finetune")}
    for stage, share in shares.items():
        values |= {f"{stage}_{name}": value for name, value in share.items()}
    for name in ("overhead_share", "data_wait_share"):  # the worse of the two stages
        values[name] = max(share[name] for share in shares.values())
    return Report("trainer", values)


def measure_loader(cache: SampleCache, model: ModelConfig, rounds: int, batch: int = 2) -> float:
    """Return the processor seconds in which a loader's worker makes one sample of a batch: read, augmented, joined.

    The median over batches; what hands a batch to the trainer's process is not in it.
    """
    dataset, join = SampleDataset(cache, model, AugmentConfig(), seed=0), Collate(model)
    spent = []
    keep_large_blocks()
    with one_thread():
        for number in range(rounds * LOADED_PER_ROUND + 1):
            begun = time.process_time()
            join([dataset[number * batch + place] for place in range(batch)])
            spent.append((time.process_time() - begun) / batch)
    return float(np.median(spent[1:]))  # the first one loads compiled code


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, as a loader's worker does."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def measure(
    stage: str, cache: SampleCache, folder: Path, options: Options, batch: int = 2, workers: int = 1
) -> dict[str, float]:
    """Return the shares of one stage: of wall time from the end of the warm-up to the last step."""
    model, threads = LiftSplatModel(), options.threads or 1
    steps = WARM_STEPS + STEPS_PER_ROUND * options.rounds
    config = TrainingConfig(
        stage=stage,
        steps=steps,
        batch=batch,
        threads=threads,
        workers=workers,
        log_every=STEPS_PER_ROUND,
        validate_every=0,
        optim=OptimConfig(scales={}),
    )
    tune_process(threads)
    network = build_model(model, stage)
    objectives.prefer_channels_last(network)
    if stage == "pretrain":
        objective: Any = objectives.PretrainObjective(model, config.loss)
    else:
        weights = torch.ones(len(model.occupancy_classes))
        objective = objectives.FinetuneObjective(model, config.loss, weights)
    dataset = SampleDataset(cache, model, AugmentConfig(), seed=0)
    trainer = Trainer(
        config, network, objective, lambda first: batches(dataset, config.batch, config.workers, first), folder
    )
    marks: list[tuple[float, Counter[str]]] = []

    def mark(line: Mapping[str, Any]) -> None:
        marks.append((time.perf_counter(), Counter(trainer.seconds)))

    trainer.run(report=mark)
    (begun, before), (ended, after) = marks[0], marks[-1]
    spent = {part: after[part] - before[part] for part in (*WORK, "data")}
    total = ended - begun
    return {
        "overhead_share": 1 - sum(spent[part] for part in WORK) / total,
        "data_wait_share": spent["data"] / total,
        "samples_per_s": config.batch * (steps - WARM_STEPS) / total,
        **{f"{part}_ms": 1e3 * spent[part] / (steps - WARM_STEPS) for part in WORK},
    }


def random_cache(root: Path, model: ModelConfig) -> SampleCache:
    """Write a cache of random samples of a model's size and open it."""
    drive = root / "random"
    drive.mkdir(parents=True)
    names = tuple(f"cam{i}" for i in range(CAMERA_COUNT))
    files = {
        f"{i:04d}{SAMPLE_SUFFIX}": write_sample(drive / f"{i:04d}{SAMPLE_SUFFIX}", random_sample(model, i))
        for i in range(SAMPLES)
    }
    info = CacheInfo(model.image, names, model.grid)
    record = {"info": to_record(info), "labels": {"made": "at random"}, "files": files}
    (drive / "drive.json").write_text(json.dumps(record))
    return open_cache(root)


def random_sample(model: ModelConfig, seed: int) -> CachedSample:
    """Return a sample with the share of occupied and observed voxels of a street, and forty boxes."""
    rng = np.random.default_rng(seed)
    width, height, shape = model.image.width, model.image.height, model.grid.shape
    optical = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    yaws = np.linspace(0, 2 * np.pi, CAMERA_COUNT, endpoint=False)
    cam2ego = np.stack([make_transform(rotation_from_yaw(yaw) @ optical, (1.0, 0.0, 1.5)) for yaw in yaws])
    intrinsic = np.array([[0.6 * width, 0, width / 2], [0, 0.6 * width, height / 2], [0, 0, 1]])
    returns, boxes = 4000 * CAMERA_COUNT, 40
    state = rng.choice(3, shape, p=(0.6, 0.35, 0.05)).astype(np.uint8)
    box = np.concatenate(
        [
            rng.uniform(-40, 40, (boxes, 2)),
            rng.uniform(0, 1, (boxes, 1)),
            rng.uniform(1, 5, (boxes, 3)),
            rng.uniform(-3, 3, (boxes, 1)),
            rng.normal(size=(boxes, 2)),
        ],
        1,
    )
    return CachedSample(
        images=rng.integers(0, 255, (CAMERA_COUNT, height, width, 3)).astype(np.uint8),
        camera_valid=np.ones(CAMERA_COUNT, bool),
        intrinsic=np.tile(intrinsic, (CAMERA_COUNT, 1, 1)),
        cam2ego=cam2ego,
        lidar_camera=rng.integers(0, CAMERA_COUNT, returns).astype(np.uint8),
        lidar_pixel=(rng.random((returns, 2)) * (width, height)).astype(np.float32),
        lidar_depth=rng.uniform(1, 45, returns).astype(np.float32),
        state=state,
        camera_visible=np.where(state > 0, rng.integers(0, 64, shape), 0).astype(np.uint8),
        hit_sweeps=rng.integers(0, 5, shape).astype(np.uint8),
        pass_sweeps=rng.integers(0, 20, shape).astype(np.uint8),
        boxes=box.astype(np.float32),
        labels=rng.integers(0, len(model.detection_classes), boxes),
        lidar_points=np.full(boxes, 10),
        semantics=np.where(state == 2, rng.integers(0, 17, shape), 17).astype(np.uint8),
        mask_camera=state > 0,
    )
