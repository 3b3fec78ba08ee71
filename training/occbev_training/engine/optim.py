"""Optimiser, learning-rate schedules, and the running average of the weights."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from occbev.config import ConfigError
from occbev_training.engine.config import OptimConfig


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Group the trainable weights by prefix (learning rate) and by shape (decay or none); freeze those of factor 0.

    Raises:
        ConfigError: `scales` names a prefix that no weight has.
    """
    names = [name for name, _ in network.named_parameters()]
    unknown = [prefix for prefix in config.scales if not any(name.startswith(f"{prefix}.") for name in names)]
    if unknown:
        parts = sorted({name.split(".")[0] for name in names})
        raise ConfigError(f"optim.scales: the network has no weights under {unknown}; its parts are {parts}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in network.named_parameters():
        scale = _scale_of(name, config.scales)
        if scale == 0:
            weight.requires_grad_(False)  # nothing is computed for a part that stays as it is
        if weight.requires_grad:
            decay = config.weight_decay if weight.ndim > 1 or config.decay_all else 0.0
            groups.setdefault((scale, decay), []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": config.lr * scale, "weight_decay": decay}
            for (scale, decay), weights in sorted(groups.items(), key=lambda g: g[0])
        ]
    )


def _scale_of(name: str, scales: Mapping[str, float]) -> float:
    matching = [prefix for prefix in scales if name.startswith(f"{prefix}.")]
    return scales[max(matching, key=len)] if matching else 1.0


def learning_rate_factor(step: int, planned: int, config: OptimConfig, epoch_steps: int | None = None) -> float:
    """Return the factor on every learning rate at a step; 1 is the peak.

    epoch_steps: optimiser steps of one epoch, which the step schedule and `by_epoch` count in.
    """
    warmup = config.warmup_steps or max(1, round(config.warmup * planned))
    regular = _schedule(step, planned, warmup, config, epoch_steps)
    if step >= warmup:
        return regular
    if config.warmup_from:
        return regular * (config.warmup_from + (1 - config.warmup_from) * step / warmup)
    return regular * (step + 1) / warmup


def _schedule(step: int, planned: int, warmup: int, config: OptimConfig, epoch_steps: int | None) -> float:
    if config.schedule == "constant":
        return 1.0
    counts_epochs = config.schedule == "step" or config.by_epoch
    if counts_epochs and not epoch_steps:
        raise ConfigError("optim: step and by_epoch count epochs, but the data has no end")
    epoch = step // epoch_steps if epoch_steps else 0
    if config.schedule == "step":
        return float(config.gamma ** sum(epoch >= milestone for milestone in config.milestones))
    if config.by_epoch and epoch_steps:
        share = epoch / max(1.0, planned / epoch_steps)
    else:
        share = max(0, step - warmup) / max(1, planned - warmup)
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class WeightAverage:
    """Exponential moving average of weights and normalisation statistics (every floating entry of the state)."""

    def __init__(self, network: nn.Module, config: OptimConfig) -> None:
        self.config, self.updates = config, 0
        self.state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def decay(self) -> float:
        """Return the share of the average that is kept in the next update."""
        config, done = self.config, self.updates + self.config.ema_begin
        if config.ema_ramp:
            return config.ema * (1 - math.exp(-done / config.ema_ramp))
        return min(config.ema, (1 + done) / (10 + done))

    def update(self, network: nn.Module) -> None:
        """Move towards the network's state, faster in the first steps."""
        self.updates += 1
        decay = self.decay() if self.config.ema else 0.0
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
        self._kept = {name: value.detach().clone() for name, value in self._network.state_dict().items()}
        self._network.load_state_dict(dict(self._state))

    def __exit__(self, *_: object) -> None:
        self._network.load_state_dict(self._kept)


class Pace:
    """How many steps fit into the time that a run may take, at the speed of the last lines of the log."""

    def __init__(self, seconds: float, lines: int = 10) -> None:
        self._end = time.monotonic() + seconds
        self._marks: deque[tuple[int, float]] = deque(maxlen=lines)

    def plan_groups(self, step: int, wanted: int) -> int:
        """Return after how many steps to end: `wanted`, or fewer if the time is too short for it."""
        now = time.monotonic()
        self._marks.append((step, now))
        first_step, first_time = self._marks[0]
        if step == first_step:
            return wanted
        fits = step + int((self._end - now) * (step - first_step) / (now - first_time))
        return max(step, min(wanted, fits))
