"""Configuration of a training run: the schema of `config/training/*.yaml` and of the commands' `--optim.lr 1e-4`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from occbev.config import ConfigError
from occbev_training.data.augment import AugmentConfig
from occbev_training.losses.config import LossConfig

PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "step", "constant")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and the average of the weights."""

    lr: float = 1e-3
    """Peak learning rate of the parts that start from random weights."""
    scales: Mapping[str, float] = field(default_factory=lambda: {"image_encoder.trunk": 0.3})
    """Factor on the learning rate by prefix of the weights' names; the longest prefix counts, and 0 freezes."""
    weight_decay: float = 0.01
    """Decay of weights with two or more axes."""
    decay_all: bool = False
    """Decay biases and normalisation as well, as the BEVFormer recipe does."""
    schedule: str = "cosine"
    """cosine (down to `floor`), step (times `gamma` at every milestone) or constant."""
    by_epoch: bool = False
    """Keep the rate constant within an epoch, as the published cosine does."""
    milestones: tuple[int, ...] = ()
    """Finished epochs after which the step schedule falls."""
    gamma: float = 0.1
    """Factor on the rate at each milestone of the step schedule."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    warmup_steps: int = 0
    """The same as a number of steps; 0 takes the share."""
    warmup_from: float = 0.0
    """Share of the rate at which warm-up starts; 0 starts at the rate of its first step."""
    floor: float = 0.01
    """Share of the peak that the cosine ends at."""
    clip: float = 10.0
    """Largest gradient norm."""
    ema: float = 0.998
    """Decay of the averaged weights that are evaluated and shipped; 0 ships the weights themselves."""
    ema_ramp: float = 0.0
    """Updates over which the decay rises exponentially, as in BEVDet; 0 rises as (1 + t) / (10 + t)."""
    ema_begin: int = 0
    """Updates that count as done before the first one."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {self.schedule!r}: must be one of {SCHEDULES}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema {self.ema}: must be in [0, 1)")
        for name in ("warmup", "warmup_from", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim.{name} {getattr(self, name)}: is a share, must be in 0..1")
        if min(self.weight_decay, self.warmup_steps, *self.scales.values(), 0) < 0:
            raise ConfigError(
                f"optim: weight_decay {self.weight_decay}, warmup_steps {self.warmup_steps} and scales "
                f"{dict(self.scales)} must be at least 0"
            )
        if not (self.lr > 0 and self.clip > 0):
            raise ConfigError(f"lr {self.lr} and clip {self.clip}: both must be above 0")


@dataclass(frozen=True)
class TrainingConfig:
    """One stage of training."""

    stage: str = "pretrain"
    """pretrain (occupancy from LiDAR), finetune (boxes and semantic occupancy) or adapt (a package to new drives)."""
    model: str = "config/models/occbev-tiny.yaml"
    """Model config, relative to the working directory."""
    steps: int = 1000
    """Optimiser steps."""
    epochs: float = 0.0
    """Passes over the training samples; above 0 it sets the steps."""
    batch: int = 4
    """Samples per forward pass and process."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    seed: int = 0
    """Seed of the weights, the order of the samples and their augmentation."""
    precision: str = "fp32"
    """fp32, or autocast in bf16, or in fp16 with a scaled loss (losses and softmax stay in fp32)."""
    channels_last: bool = True
    """Store images and 2D weights channels last, which is faster on CPUs and tensor cores."""
    freeze_norms: bool = False
    """Freeze the statistics of batch normalisation, for batches that are too small to estimate them."""
    threads: int = 0
    """Compute threads; 0: torch decides."""
    workers: int = 1
    """Processes that prepare batches; 0 prepares them in the training process."""
    frame: str = "base_link"
    """base_link for the grids of every network and stage, or published to keep LiDAR axes and quirks of published weights."""
    history: int = -1
    """Past key frames for networks with a memory; -1: as many as the network joins, 2 for a BEVFormer."""
    past_after: int = 0
    """Epochs in which the past of a Lift-Splat network is zero before it sees it, as BEVDet4D's recipe has it."""
    unseen_voxels: int = 0
    """Number of voxels per sample that no camera sees and whose class is learned too; needs a dense truth."""
    balance: str = "none"
    """none, or cbgs: samples of rare classes are shown more often, drawn once."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 1000
    """Steps between validations, 0 for none but the last."""
    validate_samples: int = 48
    """Samples of the validation drives that are scored, evenly spaced."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""

    def __post_init__(self) -> None:
        if self.stage not in ("pretrain", "finetune", "adapt"):
            raise ConfigError(f"stage {self.stage!r}: must be pretrain, finetune or adapt")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r}: must be one of {PRECISIONS}")
        if self.frame not in ("base_link", "published"):
            raise ConfigError(f"frame {self.frame!r}: must be base_link or published")
        if self.balance not in ("none", "cbgs"):
            raise ConfigError(f"balance {self.balance!r}: must be none or cbgs")
        least = {
            **dict.fromkeys(("steps", "batch", "accumulate", "log_every", "validate_samples"), 1),
            **dict.fromkeys(("epochs", "workers", "past_after", "unseen_voxels"), 0),
            "history": -1,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least {value}")
