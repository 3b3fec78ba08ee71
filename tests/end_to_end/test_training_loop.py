"""The whole offline loop by its commands, tiny and on a CPU.

simulate -> pairs -> pretrain -> kill -> resume -> finetune -> evaluate -> export; two processes beside one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")
pytest.importorskip("embreex")
pytest.importorskip("pyarrow")

import torch
from safetensors.torch import load_file
from torch import Tensor

from occbev.inference.families import load_model
from occbev.inference.model_package import ModelPackage
from occbev_training.cli import main

pytestmark = pytest.mark.skipif("OCCBEV_LONG_TESTS" not in os.environ, reason="takes minutes; 'make test-loop' runs it")

MODEL = """
name: loop
family: lss
image: {width: 64, height: 32, mean: [127.0, 127.0, 127.0], std: [128.0, 128.0, 128.0]}
encoder: {channels: 16}
lift: {channels: 8, depth: {lo: 1.0, hi: 21.0, step: 2.0}, max_points: 4096}
bev: {lo: [-16.0, -16.0], pitch: [1.6, 1.6], shape: [20, 20]}
bev_encoder: {channels: [8, 12], blocks: [1, 1], out_channels: 12}
grid: tiny
occupancy: {channels: 8}
detection: {channels: 8}
"""
# Held norms: two processes would otherwise each take the statistics of their own half.
TRAINING = """
stage: %s
model: %s
steps: %d
batch: 2
workers: 0
threads: 1
log_every: 1
validate_every: 0
freeze_norms: true
checkpoint_minutes: 0.0
optim: {lr: 3.0e-3, ema: 0.9}
augment: {camera_drop: 0.5}
"""
STEPS, KILLED_AFTER = 14, 5


def _run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    paths = [str(root / "src"), str(root / "training")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")


def _equal(one: Path, other: Path) -> bool:
    first, second = _weights(one), _weights(other)
    return set(first) == set(second) and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs, a drive to train on as pairs and as a cache, and one that is never trained on."""
    root = tmp_path_factory.mktemp("loop")
    (root / "model.yaml").write_text(MODEL)
    for stage, steps in (("pretrain", STEPS), ("finetune", 3)):
        text = TRAINING % (stage, root / "model.yaml", steps)
        (root / f"{stage}.yaml").write_text(text)
    for name, seed in (("train", 0), ("held", 10000)):
        _run(
            "simulate",
            root / name,
            "--drives",
            1,
            "--first-seed",
            seed,
            "--keys",
            2,
            "--image",
            "64x32",
            "--sweep-rate",
            4,
            "--workers",
            1,
        )
        _run(
            "prepare", root / f"{name}_cache", "--nuscenes", root / name, "--model", root / "model.yaml", "--no-labels"
        )
    _run(
        "pairs",
        root / "pairs",
        root / "train",
        "--grid",
        "tiny",
        "--window",
        0.5,
        "--no-gate",
        "--validation",
        0,
        "--lidar",
    )
    return root


def test_from_simulation_to_a_scored_package(place: Path) -> None:
    whole, parts, again = place / "whole", place / "parts", place / "again"
    command = ["pretrain", place / "pretrain.yaml", "--data", place / "pairs"]
    _run(*command, "--out", whole)
    totals = [line["total"] for line in _lines(whole)]
    assert len(totals) == STEPS
    assert np.mean(totals[-4:]) < 0.9 * np.mean(totals[:4])

    _kill_in_the_middle([*command, "--out", parts], parts)
    assert not (parts / "weights.safetensors").exists()
    _run(*command, "--out", parts)
    assert _equal(whole, parts)  # to the bit

    _run("pretrain", whole, "--out", again)  # a run repeats itself from its own files
    assert _equal(whole, again)

    _two_processes(command, place / "two")
    both = zip(_lines(whole), _lines(place / "two"), strict=True)
    for one, two in both:
        assert two["total"] == pytest.approx(one["total"], rel=2e-3)
    difference, change = _distance(whole, place / "two"), _distance(whole, None)
    assert difference < 0.05 * change

    fine = place / "fine"
    _run(
        "finetune",
        place / "finetune.yaml",
        "--data",
        place / "train_cache",
        "--out",
        fine,
        "--from",
        whole / "weights.safetensors",
        "--validation",
        place / "held_cache",
    )
    carried = json.loads((fine / "run.json").read_text())["begun_from"]["transfer"]["carried"]
    assert {"image_encoder", "view_transform", "bev_encoder"} <= {n.split(".")[0] for n in carried}
    assert "validation" in _lines(fine)[-1]

    package = place / "package"
    _run("export", fine / "weights.safetensors", package, "--model", place / "model.yaml")
    assert ModelPackage.load(package).model.name == "loop"
    _run("evaluate", package, "--data", place / "held_cache")


def _kill_in_the_middle(command: list[object], folder: Path) -> None:
    """Start a run of its own, and kill it without warning once it has done some steps and saved one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "occbev_training", *map(str, command)],
        env=_environment(),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        progress = folder / "checkpoint" / "progress.json"
        try:
            if json.loads(progress.read_text())["step"] >= KILLED_AFTER:
                break
        except (FileNotFoundError, json.JSONDecodeError):
            pass  # between two renames
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"


def _two_processes(command: list[object], folder: Path) -> None:
    """The same run by torchrun, each process with half of every batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run(
        [
            *torchrun,
            "--master-port",
            str(port),
            "-m",
            "occbev_training",
            *map(str, command),
            "--out",
            str(folder),
            "--batch",
            "1",
        ],
        env=_environment(),
        check=True,
        timeout=900,
        stdout=subprocess.DEVNULL,
    )


def _distance(one: Path, other: Path | None) -> float:
    """Return how far apart the weights of two runs are, or how far a run came from where it began."""
    if other is None:
        state = load_file(one / "checkpoint" / "weights.safetensors")
        begun = _begin_of(one)
        pairs = [(state[name], begun[name]) for name in begun]
    else:
        first, second = _weights(one), _weights(other)
        pairs = [(first[name], second[name]) for name in first]
    return float(sum((a.double() - b.double()).square().sum() for a, b in pairs) ** 0.5)


def _begin_of(run: Path) -> dict[str, Tensor]:
    """Build the network as the run did before its first step."""
    from occbev_training.engine.stages import begin_from
    from occbev_training.models.build import build_model

    torch.manual_seed(0)
    network = build_model(load_model(run / "model.yaml"), "pretrain")
    begin_from(network, next(run.glob("start.*")))
    return {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
