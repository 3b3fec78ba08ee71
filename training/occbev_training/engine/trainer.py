"""The training loop of both stages, written out: batches in, weights, metrics and resumable checkpoints out.

One process or many (accelerate). What is trained is decided by the network and the objective it is given.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from occbev.allocator import keep_large_blocks
from occbev.config import save_config
from occbev.files import one_line, replace_file, sync_folder
from occbev_training.engine.config import TrainingConfig
from occbev_training.engine.distributed import broadcast_decision, gather_values, random_state, restore_random_state
from occbev_training.engine.optim import Pace, WeightAverage, build_optimizer, learning_rate_factor
from occbev_training.models.checkpoints import save_weights

logger = logging.getLogger(__name__)

AUTOCAST = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_SCALE = 2.0**-10
"""fp16: a loss scale that fell below this means gradients that are never finite."""

HELD_BYTES = 2**31 - 1
"""Freed memory that a training process may hold, as much as glibc allows."""


CHECKPOINTS = ("checkpoint", "checkpoint.old")
"""Folders of the last checkpoint and of the one before it."""


class TrainingError(ValueError):
    """Training cannot go on, saying at which step and on which samples."""


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
    """Where a run stands. wanted: the config's steps. planned: those after which it ends, fewer if time is short.

    seconds: wall time of the steps so far. processor_seconds: of all threads of the first process, validations included.
    """

    step: int = 0
    wanted: int = 0
    planned: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0


class Trainer:
    """Trains one network on one objective, in one folder.

    The folder holds `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoint/` (to resume), `checkpoint.old/`
    (the one before) and at the end `weights.safetensors`, the averaged weights with `record`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        network: nn.Module,
        objective: Objective,
        loader: Loader,
        folder: Path,
        validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        epoch_passes: float | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """epoch_passes: forward passes of one epoch, for schedules that count epochs; None without an end."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder, self.objective, self.loader = config, folder, objective, loader
        self.validate, self.record = validate, record or {}
        # A part that sees nothing in one batch (a camera without queries) gets no gradient in it.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])
        if config.freeze_norms:
            hold_norms(network)
        optimizer = build_optimizer(network, config.optim)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=config.precision == "fp16")
        self.ema = WeightAverage(self._bare(), config.optim)
        self.epoch_steps = None if epoch_passes is None else max(1, math.ceil(epoch_passes / config.accumulate))
        self.progress = Progress(wanted=self.wanted_steps, planned=self.wanted_steps)
        self.stop_requested = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Where the time of all steps went: data, forward, backward, optimiser and, around them, step."""
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def wanted_steps(self) -> int:
        """Steps that the config asks for."""
        if self.config.epochs and self.epoch_steps:
            return max(1, round(self.config.epochs * self.epoch_steps))
        return self.config.steps

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
            TrainingError: a loss or gradient is not finite, or the checkpoint is of another batch size.
        """
        config_file = self.folder / "config.yaml"
        with hold_folder(self.folder) if self.accelerator.is_main_process else nullcontext():
            self._resume()
            is_over = self.progress.step >= self.progress.planned
            if self.accelerator.is_main_process and not (is_over and config_file.exists()):
                save_config(config_file, self.config)  # what a finished run was trained with stays as it is
            log = MetricsLog(self.folder, report, self.accelerator.is_main_process, self.progress.step)
            try:
                finished = self._steps(log, minutes)
                # Not after an error: a step that failed has left its traces in the network.
                self.save_checkpoint()
            finally:
                log.close()
            if finished:
                self._save_weights()
            return finished

    def save_checkpoint(self) -> None:
        """Write everything needed to go on, atomically; all processes call it together."""
        states = gather_values(random_state())
        if self.accelerator.is_main_process:
            self._write_checkpoint(states)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, random_states: list[dict[str, Any]]) -> None:
        """Write a folder beside the last one, then change their names; the one before stays as checkpoint.old."""
        temporary, final, old = (self.folder / name for name in ("checkpoint.tmp", *CHECKPOINTS))
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self._write_parts(temporary, random_states)
            sync_folder(temporary)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library names a full disk its own way
            shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(
                f"{final}: step {self.progress.step} cannot be saved: {one_line(error)}; "
                f"{shutil.disk_usage(self.folder).free >> 20} MB are free; the previous checkpoint is intact"
            ) from error
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        sync_folder(self.folder)

    def _write_parts(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        folder.mkdir()
        save_file(_contiguous(self._bare().state_dict()), folder / "weights.safetensors")
        save_file(_contiguous(self.ema.state), folder / "ema.safetensors")
        torch.save(
            {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": random_states,
            },
            folder / "optimizer.pt",
        )
        record = vars(self.progress) | {"ema_updates": self.ema.updates, "order": self._order()}
        (folder / "progress.json").write_text(json.dumps(record))

    def _order(self) -> dict[str, int]:
        """What the data position counts in: with other values a resumed run would see other samples."""
        config = self.config
        return {
            "batch": config.batch,
            "accumulate": config.accumulate,
            "seed": config.seed,
            "processes": self.accelerator.num_processes,
        }

    def _steps(self, log: MetricsLog, minutes: float | None) -> bool:
        config, progress = self.config, self.progress
        begun, seconds_before, saved = time.monotonic(), progress.seconds, time.monotonic()
        worked = progress.processor_seconds - time.process_time()
        batches = iter(self.loader(progress.step * config.accumulate))
        pace = None if minutes is None else Pace(minutes * 60)
        self.network.train()
        while progress.step < progress.planned:
            if self._stop_asked():
                return False
            with self._time_step("step"):
                log.add(self._step(batches))
            progress.step += 1
            progress.seconds = seconds_before + time.monotonic() - begun
            progress.processor_seconds = worked + time.process_time()
            due = False
            if progress.step % config.log_every == 0:
                if pace is not None:
                    progress.planned = pace.plan_groups(progress.step, self.wanted_steps)
                due = time.monotonic() - saved > config.checkpoint_minutes * 60
                # All processes follow the first one: they must take the same steps and save together.
                progress.planned, due = broadcast_decision([progress.planned, due])
                log.write(progress, {"lr": self.optimizer.param_groups[0]["lr"]})
            last = progress.step >= progress.planned
            if self.validate and (last or (config.validate_every and progress.step % config.validate_every == 0)):
                log.write_validation(progress, self._validate())
            if due:
                log.flush()
                self.save_checkpoint()
                saved = time.monotonic()
        return True

    def _stop_asked(self) -> bool:
        """Tell whether any process was asked to stop: after a signal there are seconds, not log lines."""
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        flag = torch.tensor(float(self.stop_requested), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, "sum")) > 0

    def _step(self, batches: Iterator[Any]) -> dict[str, float]:
        """Do one optimiser step; returns the loss terms, gradient norm, samples, and seconds waited for data."""
        factor = learning_rate_factor(self.progress.step, self.progress.planned, self.config.optim, self.epoch_steps)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, float] = {}
        waited, samples, names = 0.0, 0, []
        for number in range(self.config.accumulate):
            asked = time.monotonic()
            with self._time_step("data"):
                batch = next(batches).to(self.accelerator.device)
            waited += time.monotonic() - asked
            samples += len(batch.names)
            names += batch.names
            with self._gradients_shared(number == self.config.accumulate - 1):
                terms = self._pass(batch, names)
            for name, term in terms.items():
                values[name] = values.get(name, 0.0) + term / self.config.accumulate
        with self._time_step("optimiser"):
            norm = self._update(names)
        self.ema.update(self._bare())
        return values | {"gradient_norm": norm, "samples": samples, "wait": waited}

    def _pass(self, batch: Any, names: list[str]) -> dict[str, float]:
        """Run the network forward and back; returns the loss terms and their sum."""
        with self._time_step("forward"), self._autocast():
            terms = self.objective(self.network, batch)
            total = torch.stack(list(terms.values())).sum()
            values = torch.stack([*terms.values(), total]).detach().tolist()  # one wait for the device
        named = dict(zip((*terms, "total"), values, strict=True))
        self._require_finite(named, names)
        with self._time_step("backward"):
            self.scaler.scale(total / self.config.accumulate).backward()
        return named

    def _update(self, names: list[str]) -> float:
        self.scaler.unscale_(self.optimizer)
        clip = self.config.optim.clip
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), clip))
        if self.config.precision != "fp16":
            self._require_finite({"gradient norm": norm}, names)
        self.scaler.step(self.optimizer)  # in fp16 a step that overflowed is left out
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise TrainingError(
                f"step {self.progress.step}: gradients overflow at every loss scale; "
                f"the batch was {names}; train in bf16 or fp32"
            )
        return norm if math.isfinite(norm) else 0.0

    def _gradients_shared(self, last: bool) -> AbstractContextManager[Any]:
        """Add up gradients between processes in the last pass of a step only."""
        if last or self.accelerator.num_processes == 1:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(self.network)
        return context

    def _require_finite(self, values: Mapping[str, float], samples: list[str]) -> None:
        """Stop all processes together where one has a value that is not finite."""
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(bool(bad)), device=self.accelerator.device)
            if not float(self.accelerator.reduce(flag, "sum")):
                return
            found = [(b, s) for b, s in gather_values((bad, samples)) if b]
            bad, samples = found[0]
        if bad:
            raise TrainingError(
                f"step {self.progress.step}: {bad} is not finite; the batch was {samples}; "
                f"the last checkpoint is in {self.folder / 'checkpoint'}"
            )

    def _validate(self) -> Mapping[str, float]:
        assert self.validate is not None
        scores: Mapping[str, float] = {}
        if self.accelerator.is_main_process:
            bare = self._bare()
            with self.ema.applied(bare):
                bare.eval()
                with torch.no_grad(), self._autocast():
                    scores = self.validate(bare)
        self.accelerator.wait_for_everyone()
        self.network.train()
        return scores

    def _resume(self) -> None:
        found = [self.folder / name for name in CHECKPOINTS if (self.folder / name).exists()]
        rank = self.accelerator.process_index
        if not found:
            if rank:  # dropout and the like must differ between processes; the first keeps the run's seed
                torch.manual_seed(torch.initial_seed() + rank)
            return
        folder = found[0]  # the second where the process died between two renames
        try:
            self._load(folder, rank)
        except TrainingError:
            raise
        except Exception as error:  # a damaged file makes each library raise its own
            way = f"remove it to go on from {found[1]}" if len(found) > 1 else "remove it to begin anew"
            raise TrainingError(f"{folder}: the checkpoint is damaged: {one_line(error)}; {way}") from error
        logger.info("resumed at step %d of %d", self.progress.step, self.progress.planned)

    def _load(self, folder: Path, rank: int) -> None:
        record = json.loads((folder / "progress.json").read_text())
        ema_updates, order = record.pop("ema_updates"), record.pop("order", self._order())
        if order != self._order():
            raise TrainingError(
                f"{folder}: made with {order}, this run has {self._order()}; go on with the same, "
                "or begin a new run from its weights with --from"
            )
        weights, ema = load_file(folder / "weights.safetensors"), load_file(folder / "ema.safetensors")
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        for name, value in [*weights.items(), *ema.items()]:
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"the weights {name} are not finite")
        self.progress, self.ema.updates = self._gone_on(Progress(**record)), ema_updates
        self._bare().load_state_dict(weights)
        self.ema.state = {name: value.to(self.accelerator.device) for name, value in ema.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        restore_random_state(state["random"][rank])

    def _gone_on(self, before: Progress) -> Progress:
        """Return the plan of a run that goes on: what the config wants now, unless that was finished in time."""
        finished = before.step >= before.planned
        if finished and before.wanted in (0, self.wanted_steps):  # 0: written before it was kept
            return before
        return replace(before, wanted=self.wanted_steps, planned=self.wanted_steps)

    def _save_weights(self) -> None:
        if self.accelerator.is_main_process:
            with replace_file(self.folder / "weights.safetensors") as temporary:
                save_weights(temporary, _contiguous(self.ema.state), dict(self.record))
        self.accelerator.wait_for_everyone()

    def _autocast(self) -> torch.autocast:
        # Not accelerate's own: its precision is fixed for the whole process.
        kind, precision = self.accelerator.device.type, self.config.precision
        return torch.autocast(kind, AUTOCAST[precision], enabled=precision != "fp32")

    @contextmanager
    def _time_step(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begun

    def _bare(self) -> nn.Module:
        network: nn.Module = self.accelerator.unwrap_model(self.network)
        return network


class MetricsLog:
    """Averages loss terms between lines; writes metrics.jsonl and TensorBoard."""

    def __init__(
        self,
        folder: Path,
        report: Callable[[Mapping[str, Any]], None],
        active: bool = True,
        step: int = 0,
    ) -> None:
        """step: where the run goes on; what an earlier process wrote beyond it is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        self._report, self._active = report, active
        if active:
            _cut_after(folder / "metrics.jsonl", step)
        self._file = (folder / "metrics.jsonl").open("a") if active else None
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1) if active else None
        self._clear()

    def add(self, values: Mapping[str, float]) -> None:
        """Take in one step's numbers."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def write(self, progress: Progress, extra: Mapping[str, float]) -> None:
        """Write the means since the last line, the speed, and the share of time spent waiting for data."""
        seconds = time.monotonic() - self._since
        every = gather_values(self._sums)
        sums = {name: sum(one.get(name, 0.0) for one in every) for name in self._sums}
        samples, waited = sums.pop("samples", 0.0), sums.pop("wait", 0.0) / len(every)
        means = {name: value / max(1, self._steps) / len(every) for name, value in sums.items()}
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


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of later steps and one that was cut off, which a killed process leaves."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        path.write_text("".join(kept))


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other trainers while the block runs; raises TrainingError where one is at work."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{folder}: another process trains in this folder; stop it, or take another") from None
        yield


def hold_norms(network: nn.Module) -> None:
    """Keep batch normalisation at its present statistics, whatever mode the network is put in."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = partial(_stay, module)  # type: ignore[method-assign, assignment]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def tune_process(threads: int = 0) -> None:
    """Keep freed memory in the process (glibc) and set the number of compute threads.

    Batches of volumes are tens of megabytes: giving them back to the kernel after every step costs more
    in page faults than some layers cost to compute.
    """
    if threads:
        torch.set_num_threads(threads)
    if not keep_large_blocks(HELD_BYTES):
        logger.info("no glibc: memory settings are left as they are")


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy into the plain layout that safetensors wants."""
    return {
        name: value.detach().contiguous().clone(memory_format=torch.contiguous_format) for name, value in state.items()
    }
