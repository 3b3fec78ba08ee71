"""The training loop of both stages, written out: batches in, weights, metrics and resumable checkpoints out.

One process or many (accelerate). What is trained is decided by the network and the objective it is given.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from occbev.config import ConfigError, save_config
from occbev_training.data.augment import AugmentConfig

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on, saying at which step and on which samples."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and a cosine."""

    lr: float = 1e-3
    """Peak learning rate of the parts that start from random weights."""
    scales: Mapping[str, float] = field(default_factory=lambda: {"image_encoder.trunk": 0.3})
    """Factor on the learning rate by prefix of the weights' names; the longest prefix counts."""
    weight_decay: float = 0.01
    """Decay of weights with two or more axes; biases and normalisation are not decayed."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    floor: float = 0.01
    """Share of the peak that the cosine ends at."""
    clip: float = 10.0
    """Largest gradient norm."""
    ema: float = 0.998
    """Decay of the averaged weights that are evaluated and shipped; ramps up over the first steps."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms."""

    reconstruction: float = 1.0
    """Three-state occupancy of stage 1."""
    depth: float = 1.0
    """LiDAR depth along image rays."""
    heatmap: float = 1.0
    """Box centres."""
    box: float = 0.25
    """Box offsets, height, size and heading."""
    velocity: float = 0.2
    """Factor on the two velocity terms among the box terms."""
    semantics: float = 1.0
    """Semantic occupancy."""
    occupied: float = 0.5
    """Lovasz surrogate of the occupied IoU, beside the semantic term."""
    most: float = 3.0
    """Largest weight of a rare semantic class relative to the commonest."""


@dataclass(frozen=True)
class TrainingConfig:
    """One stage of training."""

    stage: str = "pretrain"
    """pretrain (occupancy from LiDAR) or finetune (boxes and semantic occupancy)."""
    model: str = "config/models/occbev-tiny.yaml"
    """Model config, relative to the working directory."""
    steps: int = 1000
    """Optimiser steps."""
    batch: int = 4
    """Samples per forward pass and process."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    seed: int = 0
    """Seed of the weights, the order of the samples and their augmentation."""
    precision: str = "fp32"
    """fp32, or bf16 autocast (losses and softmax stay in fp32)."""
    threads: int = 0
    """Compute threads; 0 leaves torch's choice."""
    workers: int = 1
    """Processes that prepare batches; 0 prepares them in the training process."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss weights."""
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
        if self.stage not in ("pretrain", "finetune"):
            raise ConfigError(f"stage {self.stage!r}: must be pretrain or finetune")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision {self.precision!r}: must be fp32 or bf16")
        if min(self.steps, self.batch, self.accumulate, self.log_every) < 1:
            raise ConfigError("steps, batch, accumulate and log_every must be at least 1")


class Batch(Protocol):
    """What the loop needs to know of a batch: who is in it, for messages."""

    names: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Move every tensor."""
        ...


Objective = Callable[[nn.Module, Any], Mapping[str, Tensor]]
"""Runs the network on a batch and returns the weighted loss terms."""

Loader = Callable[[int], Iterable[Any]]
"""Batches from the given forward pass on: the data position is all that is needed to resume."""


@dataclass
class Progress:
    """Where a run stands. planned: steps after which it ends, at most the config's."""

    step: int = 0
    planned: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains one network on one objective, in one folder.

    The folder holds `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoint/` (to resume) and at the
    end `weights.safetensors`, the averaged weights.
    """

    def __init__(self, config: TrainingConfig, network: nn.Module, objective: Objective, loader: Loader,
                 folder: Path, validate: Callable[[nn.Module], Mapping[str, float]] | None = None) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder, self.objective, self.loader = config, folder, objective, loader
        self.validate = validate
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        optimizer = build_optimizer(network, config.optim)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.ema = WeightAverage(self._bare(), config.optim.ema)
        self.progress = Progress(planned=config.steps)
        self.stop_requested = False
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]

    def run(
        self,
        minutes: float | None = None,
        report: Callable[[Mapping[str, Any]], None] = lambda line: None,
    ) -> bool:
        """Train to the end, resuming from the folder's checkpoint if there is one.

        minutes: wall time this run may take; the plan is shortened to fit, as the speed asks for it, and
            the learning rate follows the plan.
        report: called with every line that goes to metrics.jsonl.
        Returns: whether the plan was finished; False after `stop_requested`. A checkpoint exists either way.
        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        self._resume()
        if self.accelerator.is_main_process:
            save_config(self.folder / "config.yaml", self.config)
        log = MetricsLog(self.folder, report, self.accelerator.is_main_process)
        finished = False
        try:
            finished = self._steps(log, minutes)
        finally:
            log.close()
            # A step that failed has left its traces in the network: keep the checkpoint before it.
            if finished or self.stop_requested:
                self.save_checkpoint()
        if finished:
            self._save_weights()
        return finished

    def save_checkpoint(self) -> None:
        """Write everything needed to go on, atomically."""
        if not self.accelerator.is_main_process:
            return
        temporary, final = self.folder / "checkpoint.tmp", self.folder / "checkpoint"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(_contiguous(self._bare().state_dict()), temporary / "weights.safetensors")
        save_file(_contiguous(self.ema.state), temporary / "ema.safetensors")
        torch.save(
            {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()},
            temporary / "optimizer.pt",
        )
        (temporary / "progress.json").write_text(
            json.dumps(vars(self.progress) | {"ema_updates": self.ema.updates})
        )
        old = self.folder / "checkpoint.old"
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def _steps(self, log: MetricsLog, minutes: float | None) -> bool:
        config, progress = self.config, self.progress
        begun, seconds_before, saved = time.monotonic(), progress.seconds, time.monotonic()
        batches = iter(self.loader(progress.step * config.accumulate))
        pace = None if minutes is None else Pace(minutes * 60)
        alone = self.accelerator.num_processes == 1
        self.network.train()
        while progress.step < progress.planned:
            if self.stop_requested and alone:
                return False
            log.add(self._step(batches))
            progress.step += 1
            progress.seconds = seconds_before + time.monotonic() - begun
            if progress.step % config.log_every == 0:
                if pace is not None:
                    progress.planned = pace.planned(progress.step, config.steps)
                # All processes follow the first one's plan: they must take the same steps.
                progress.planned, self.stop_requested = self._agreed(
                    progress.planned, self.stop_requested
                )
                if self.stop_requested:
                    return False
                log.write(progress, {"lr": self.optimizer.param_groups[0]["lr"]})
            last = progress.step >= progress.planned
            if self.validate and (
                last or (config.validate_every and progress.step % config.validate_every == 0)
            ):
                log.write_validation(progress, self._validated())
            if time.monotonic() - saved > config.checkpoint_minutes * 60:
                log.flush()
                self.save_checkpoint()
                saved = time.monotonic()
        return True

    def _step(self, batches: Iterator[Any]) -> dict[str, float]:
        """Do one optimiser step; returns the loss terms, gradient norm, samples, and seconds waited for data."""
        factor = learning_rate_factor(self.progress.step, self.progress.planned, self.config.optim)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, float] = {}
        waited, samples, names = 0.0, 0, []
        for _ in range(self.config.accumulate):
            asked = time.monotonic()
            batch = next(batches).to(self.accelerator.device)
            waited += time.monotonic() - asked
            samples += len(batch.names)
            names += batch.names
            with self._autocast():
                terms = self.objective(self.network, batch)
            total = torch.stack(list(terms.values())).sum()
            self._require_finite(
                total, {name: float(term.detach()) for name, term in terms.items()}, names
            )
            self.accelerator.backward(total / self.config.accumulate)
            for name, term in {**terms, "total": total}.items():
                values[name] = values.get(name, 0.0) + float(term.detach()) / self.config.accumulate
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.optim.clip)
        self._require_finite(norm, {"gradient norm": float(norm)}, names)
        self.optimizer.step()
        self.ema.update(self._bare())
        return values | {"gradient_norm": float(norm), "samples": samples, "wait": waited}

    def _require_finite(
        self, value: Tensor, named: Mapping[str, float], samples: list[str]
    ) -> None:
        if not bool(torch.isfinite(value)):
            raise TrainingError(f"step {self.progress.step}: {dict(named)} is not finite; the batch was {samples}; "
                                f"the last checkpoint is in {self.folder / 'checkpoint'}")  # fmt: skip

    def _agreed(self, planned: int, stop: bool) -> tuple[int, bool]:
        if self.accelerator.num_processes > 1:
            planned, stop = broadcast_object_list([planned, stop])
        return planned, stop

    def _validated(self) -> Mapping[str, float]:
        assert self.validate is not None
        if not self.accelerator.is_main_process:
            return {}
        bare = self._bare()
        with self.ema.applied(bare):
            bare.eval()
            with torch.no_grad(), self._autocast():
                scores = self.validate(bare)
        self.network.train()
        return scores

    def _resume(self) -> None:
        folder = self.folder / "checkpoint"
        if not folder.exists():
            folder = self.folder / "checkpoint.old"  # the process died between two renames
        if not folder.exists():
            return
        record = json.loads((folder / "progress.json").read_text())
        self.ema.updates = record.pop("ema_updates")
        self.progress = Progress(**record)
        self._bare().load_state_dict(load_file(folder / "weights.safetensors"))
        self.ema.state = load_file(folder / "ema.safetensors")
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        logger.info("resumed at step %d of %d", self.progress.step, self.progress.planned)

    def _save_weights(self) -> None:
        if self.accelerator.is_main_process:
            temporary = self.folder / "weights.tmp"
            save_file(_contiguous(self.ema.state), temporary)
            os.replace(temporary, self.folder / "weights.safetensors")

    def _autocast(self) -> torch.autocast:
        # Not accelerate's own: its precision is fixed for the whole process.
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16)

    def _bare(self) -> nn.Module:
        network: nn.Module = self.accelerator.unwrap_model(self.network)
        return network


class WeightAverage:
    """Exponential moving average of weights and normalisation statistics (every floating entry of the state)."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def update(self, network: nn.Module) -> None:
        """Move towards the network's state, faster in the first steps."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, values = [], []
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[name])
                values.append(value.detach())
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def applied(self, network: nn.Module) -> _Swapped:
        """Return a context in which the network has the averaged weights."""
        return _Swapped(network, self.state)


class _Swapped:
    def __init__(self, network: nn.Module, state: Mapping[str, Tensor]) -> None:
        self._network, self._state = network, state

    def __enter__(self) -> None:
        self._kept = {
            name: value.detach().clone() for name, value in self._network.state_dict().items()
        }
        self._network.load_state_dict(dict(self._state))

    def __exit__(self, *_: object) -> None:
        self._network.load_state_dict(self._kept)


class MetricsLog:
    """Averages loss terms between lines; writes metrics.jsonl and TensorBoard."""

    def __init__(
        self, folder: Path, report: Callable[[Mapping[str, Any]], None], active: bool = True
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._report, self._active = report, active
        self._file = (folder / "metrics.jsonl").open("a") if active else None
        self._board = SummaryWriter(str(folder / "tensorboard")) if active else None
        self._clear()

    def add(self, values: Mapping[str, float]) -> None:
        """Take in one step's numbers."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def write(self, progress: Progress, extra: Mapping[str, float]) -> None:
        """Write the means since the last line, the speed, and the share of time spent waiting for data."""
        seconds = time.monotonic() - self._since
        samples, waited = self._sums.pop("samples", 0.0), self._sums.pop("wait", 0.0)
        means = {name: value / max(1, self._steps) for name, value in self._sums.items()}
        speed = {"samples_per_s": samples / seconds, "data_wait": waited / seconds}
        self._line({"step": progress.step, "planned": progress.planned, **means, **extra, **speed})
        self._clear()

    def write_validation(self, progress: Progress, scores: Mapping[str, float]) -> None:
        """Write scores on validation drives; the time they took is not counted as training speed."""
        self._line({"step": progress.step, "planned": progress.planned, "validation": dict(scores)})
        self._since = time.monotonic()

    def close(self) -> None:
        """Close both files."""
        if self._file and self._board:
            self._file.close()
            self._board.close()

    def flush(self) -> None:
        """Write what TensorBoard still holds."""
        if self._board:
            self._board.flush()

    def _line(self, record: Mapping[str, Any]) -> None:
        if not (self._active and self._file and self._board):
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            group = (
                {f"validation/{k}": v for k, v in value.items()}
                if isinstance(value, dict)
                else {f"train/{name}": value}
            )
            for tag, number in group.items():
                self._board.add_scalar(tag, number, record["step"])
        self._report(record)

    def _clear(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps, self._since = 0, time.monotonic()


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Group the trainable weights by prefix (learning rate) and by shape (decay or none).

    Raises:
        ConfigError: `scales` names a prefix that no weight has.
    """
    names = [name for name, _ in network.named_parameters()]
    unknown = [
        prefix
        for prefix in config.scales
        if not any(name.startswith(f"{prefix}.") for name in names)
    ]
    if unknown:
        parts = sorted({name.split(".")[0] for name in names})
        raise ConfigError(
            f"optim.scales: the network has no weights under {unknown}; its parts are {parts}"
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            decay = config.weight_decay if weight.ndim > 1 else 0.0
            groups.setdefault((_scale_of(name, config.scales), decay), []).append(weight)
    return torch.optim.AdamW([{"params": weights, "lr": config.lr * scale, "weight_decay": decay}
                              for (scale, decay), weights in sorted(groups.items(), key=lambda g: g[0])])  # fmt: skip


def _scale_of(name: str, scales: Mapping[str, float]) -> float:
    matching = [prefix for prefix in scales if name.startswith(f"{prefix}.")]
    return scales[max(matching, key=len)] if matching else 1.0


def learning_rate_factor(step: int, planned: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine down to `floor`; 1 is the peak."""
    warmup = max(1, round(config.warmup * planned))
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, planned - warmup))
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * share))


class Pace:
    """How many steps fit into the time that a run may take, at the speed of the last lines of the log."""

    def __init__(self, seconds: float, lines: int = 10) -> None:
        self._end = time.monotonic() + seconds
        self._marks: deque[tuple[int, float]] = deque(maxlen=lines)

    def planned(self, step: int, wanted: int) -> int:
        """Return after how many steps to end: `wanted`, or fewer if the time is too short for it."""
        now = time.monotonic()
        self._marks.append((step, now))
        first_step, first_time = self._marks[0]
        if step == first_step:
            return wanted
        fits = step + int((self._end - now) * (step - first_step) / (now - first_time))
        return max(step, min(wanted, fits))


def tune_process(threads: int = 0) -> None:
    """Keep freed memory in the process (glibc) and set the number of compute threads.

    Batches of volumes are tens of megabytes: giving them back to the kernel after every step costs more
    in page faults than some layers cost to compute.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        logger.info("no glibc: memory settings are left as they are")
        return
    options = {
        "M_MMAP_THRESHOLD": (-3, 1 << 30),
        "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
        "M_TOP_PAD": (-2, 64 << 20),
    }
    for name, (option, value) in options.items():
        if libc.mallopt(option, value) != 1:
            logger.warning("glibc refused %s", name)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy into the plain layout that safetensors wants."""
    return {
        name: value.detach().contiguous().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
