"""Adapt a package to unlabelled drives: occupancy and depth learn from LiDAR, boxes and classes on simulated streets.

The network keeps all heads. Held-out drives decide when training stops.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from occbev.config import ConfigError, ModelConfig, to_record
from occbev.files import replace_file
from occbev.grid import xyz_from_volume
from occbev.inference.model_package import ModelPackage
from occbev_training.data.cache import CacheError
from occbev_training.data.datasets import SampleDataset, sample_of
from occbev_training.data.pair_samples import PairSamples
from occbev_training.data.samples import Samples
from occbev_training.engine.config import TrainingConfig
from occbev_training.engine.stages import make_loader, network_outputs, predictor, semantic_counts, world_size
from occbev_training.engine.trainer import Loader, Trainer, tune_process
from occbev_training.evaluation.frames import Priors, evaluate
from occbev_training.evaluation.label_scores import LabelScores, believed_depth
from occbev_training.losses import objectives
from occbev_training.losses import voxels_and_centres as losses
from occbev_training.losses.adaptation import AdaptObjective, SourcedBatch
from occbev_training.models.build import build_for_weights, with_geometry
from occbev_training.models.checkpoints import load_strictly, read_weights, save_weights
from occbev_training.models.heads.record import learns_from
from occbev_training.models.network import NetworkOutput

logger = logging.getLogger(__name__)

BEST = "best.safetensors"
"""Weights of the validation that scored best, in the folder of the run."""

DONE = "adapted.json"
"""Steps and seconds of a run that ended, and the steps that were wanted."""

BEGUN_ON = "begun_on.json"
"""The package and the pairs that a run was begun on."""

MANY_DRIVES = 5
"""With at least this many drives, whole drives are held out; with fewer, the end of each."""

FITTED = 8
"""Held-out pairs that the threshold is fitted on, at most."""

SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Shares of the adapted weights that are tried, beside those that they began from."""

FORGOTTEN = ("occupancy_iou", "car_AP_2m_30m")
"""Scores on simulated streets by which forgetting is judged."""

THRESHOLDS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Least probabilities of free that are tried for the package's `occupancy.min_free`."""


@dataclass(frozen=True)
class AdaptConfig:
    """How a package is adapted: the schema of `config/training/adapt.yaml`."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Steps, losses, rates and augmentation; `accumulate` passes make a step, the last of them of rehearsed frames."""
    rehearsal: float = 0.5
    """Weight of the losses on simulated frames; with 0 boxes and classes are forgotten."""
    taught: float = 1.0
    """Weight of the boxes that the source network finds on the user's frames when it is given the LiDAR's depth; 0 looks
    for none."""
    rehearsal_drives: int = 12
    """Simulated drives in the training: half of them through the user's rig, half through the simulator's own."""
    rehearsal_keys: int = 4
    """Key frames of each."""
    held_out: float = 0.2
    """Share of the drives held out for early stopping and scores: whole drives, or the end of each of a few."""
    patience: int = 3
    """Training stops after this many validations without a better score."""
    max_forgotten: float = 0.1
    """Largest relative loss of a score on simulated streets: the weights are averaged with the source's to stay within it."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out {self.held_out}: must be between 0 and 1")
        if not 0 <= self.max_forgotten <= 1:
            raise ConfigError(f"max_forgotten {self.max_forgotten}: must be between 0 and 1")
        if min(self.rehearsal, self.taught, self.rehearsal_drives) < 0:
            raise ConfigError("rehearsal, taught and rehearsal_drives must be at least 0")
        if min(self.rehearsal_keys, self.patience) < 1:
            raise ConfigError("rehearsal_keys and patience must be at least 1")


@dataclass(frozen=True)
class AdaptData:
    """Pairs to learn from, with the boxes that were found in them if any were looked for, and pairs to be scored on;
    rehearsed samples and others that show what is forgotten, None without."""

    train: PairSamples
    held_out: PairSamples
    rehearsal: Samples | None
    forgotten: Samples | None


@dataclass(frozen=True)
class Adapted:
    """What came of it.

    before, after: records of `LabelScores` on the held-out pairs; before is empty of a package without voxels. share: of the adapted weights, see `average_weights`.
    """

    network: nn.Module
    model: ModelConfig
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    share: float
    steps: int
    seconds: float
    processor_seconds: float


def divide(samples: PairSamples, window: float, share: float) -> tuple[PairSamples, PairSamples]:
    """Divide pairs into those to learn from and those held out; no sweep of a training label is from a held-out time.

    window: seconds of sweeps on either side of a label.
    Raises:
        CacheError: nothing would be left to learn from.
    """
    drives, stamps = samples.drives, samples.stamp_ns
    if len(drives) >= MANY_DRIVES:
        away = set(drives[:: max(2, round(1 / share))])
        held = np.array([drive in away for drive, _ in samples.pairs])
        return samples.only(np.flatnonzero(~held)), samples.only(np.flatnonzero(held))
    learned, held_out = [], []
    for drive in drives:
        of = np.array([i for i, (name, _) in enumerate(samples.pairs) if name == drive])
        cut = stamps[of].min() + (1 - share) * (stamps[of].max() - stamps[of].min())
        held_out += of[stamps[of] > cut].tolist()
        learned += of[stamps[of] + window * 1e9 <= cut].tolist()
    if not learned or not held_out:
        seconds = (stamps.max() - stamps.min()) / 1e9
        raise CacheError(
            f"{samples.root}: {len(samples)} pairs over {seconds:.1f} s are too few to hold {share:.0%} of the time out, "
            f"with labels that look {window:g} s ahead; record for longer, or make pairs with a shorter --window"
        )
    return samples.only(np.array(learned)), samples.only(np.array(held_out))


def adapt(
    package: ModelPackage,
    data: AdaptData,
    config: AdaptConfig,
    folder: Path,
    minutes: float | None = None,
    report: Callable[[Mapping[str, Any]], None] = lambda line: None,
    prepared: Callable[[Trainer], None] = lambda trainer: None,
) -> Adapted | None:
    """Adapt a package's network in `folder`, going on where an earlier run stopped; None after a request to stop.

    A run that ended is not repeated, unless other steps are wanted. A package without voxels gets the geometric decoder
    of pre-training.
    Raises:
        ConfigError: its voxels are not in base_link, the axes of labels.
        CacheError: the folder was begun on another package or other pairs.
    """
    network, grid = load_network(package), package.model.grid
    if grid.frame != "base_link":
        raise ConfigError(f"{package.model.name}: its voxels are in {grid.frame!r} axes, labels in base_link")
    _require_same_beginning(folder / BEGUN_ON, package, data)
    before: dict[str, Any] = {}
    if learns_from(network, "voxels"):
        before = _kept_scores(folder / "before.json", lambda: score_pairs(network, package, data.held_out))
    else:
        network = with_geometry(network, package.model).eval()
    done, wanted = folder / DONE, config.training.steps
    if not done.exists() or json.loads(done.read_text()).get("wanted", wanted) != wanted:
        # Validations look at some of the pairs: what they have to beat is of the same ones.
        some = score_pairs(network, package, data.held_out, config.training.validate_samples) if before else {}
        trainer = _trainer(package, network, data, config, folder, some.get("iou", 0.0))
        prepared(trainer)
        if not trainer.run(minutes, report):
            return None
        progress = trainer.progress
        with replace_file(done) as path:
            spent = {"seconds": progress.seconds, "processor_seconds": progress.processor_seconds}
            path.write_text(json.dumps({"steps": progress.step, "wanted": wanted, **spent}))
    adapted = load_network(package, folder / BEST if (folder / BEST).exists() else None)
    best, share = keep_source(load_network(package), adapted, package.model, data.forgotten, config.max_forgotten)
    model, after = fit_threshold(best, package, data.held_out)
    ended = json.loads(done.read_text())
    took = ended["steps"], ended["seconds"], ended["processor_seconds"]
    return Adapted(best, model, before, after, share, *took)


def _require_same_beginning(path: Path, package: ModelPackage, data: AdaptData) -> None:
    """Refuse to go on in a folder that was begun on another package or other pairs: its results are not of these."""
    train, held_out = data.train, data.held_out
    now = {"package": package.hash, "pairs": train.hash, "learned": len(train), "held_out": len(held_out)}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now))
    begun = json.loads(path.read_text())
    if begun != now:
        raise CacheError(f"{path.parent}: was begun on {begun}, now are given {now}; name another --out, or remove it")


def keep_source(
    source: nn.Module, adapted: nn.Module, model: ModelConfig, samples: Samples | None, max_forgotten: float
) -> tuple[nn.Module, float]:
    """Return the network with the largest share of the adapted weights that keeps the source's scores, and that share.

    samples: simulated streets; without them nothing is averaged. Where no share of SHARES keeps enough, it is the one
    that keeps most.
    """
    before = {} if samples is None else simulated_scores(source, model, samples)
    kept: dict[float, float] = {}
    for share in SHARES:
        network = average_weights(source, adapted, share)
        if samples is None or not any(before.values()):
            return network, share
        after = simulated_scores(network, model, samples)
        kept[share] = min(after[name] / score for name, score in before.items() if score)
        if kept[share] >= 1 - max_forgotten:
            return network, share
    most = max(kept, key=lambda share: kept[share])
    return average_weights(source, adapted, most), most


def simulated_scores(network: nn.Module, model: ModelConfig, samples: Samples) -> dict[str, float]:
    """Return those of the scores `FORGOTTEN` that the network has on simulated streets."""
    scores = evaluate(samples, predictor(network, model, samples), model).summary()
    return {name: scores[name] for name in FORGOTTEN if name in scores}


def average_weights(source: nn.Module, adapted: nn.Module, share: float) -> nn.Module:
    """Return a network of `share` of the adapted weights and the rest of the source's (Wortsman et al. 2022)."""
    network, old = copy.deepcopy(adapted), source.state_dict()
    state = {
        name: torch.lerp(old.get(name, new), new, share) if new.is_floating_point() else new
        for name, new in adapted.state_dict().items()
    }
    network.load_state_dict(state)
    return network.eval()


def _trainer(
    package: ModelPackage, network: nn.Module, data: AdaptData, config: AdaptConfig, folder: Path, begun: float
) -> Trainer:
    """Put the trainer together; begun: the IoU that it has to beat."""
    training, model = config.training, package.model
    training = replace(training, optim=replace(training.optim, scales=_known_scales(network, training.optim.scales)))
    if package.model.family != "lss" and not torch.cuda.is_available():
        training = replace(training, precision="fp32")  # deformable convolutions know no bf16 on CPUs
    tune_process(training.threads)
    torch.manual_seed(training.seed)
    if training.channels_last:
        objectives.prefer_channels_last(network)
    if training.precision == "bf16" and not torch.cuda.is_available():
        objectives.keep_large_depthwise_in_float32(network)
    stop = EarlyStop(folder / BEST, config.patience, begun)
    validate = stop.watch(lambda bare: score_pairs(bare, package, data.held_out, training.validate_samples))
    objective = _objective(model, config, data)
    stop.trainer = Trainer(training, network, objective, _loader(data, config, model), folder, validate)
    return stop.trainer


def _known_scales(network: nn.Module, scales: Mapping[str, float]) -> dict[str, float]:
    """Return the factors of those parts that the network has: one config adapts every family."""
    names = [name for name, _ in network.named_parameters()]
    return {part: scale for part, scale in scales.items() if any(name.startswith(f"{part}.") for name in names)}


def load_network(package: ModelPackage, weights: Path | None = None) -> nn.Module:
    """Build a package's network, in evaluation mode, with its weights or those of another file."""
    path = weights or package.path("weights.safetensors")
    state, _ = read_weights(path)
    network = build_for_weights(package.model, state)
    load_strictly(network, state, str(path))
    return network.eval()


class EarlyStop:
    """Keeps the weights of the best validation and ends the plan when none is better for a while."""

    def __init__(self, best: Path, patience: int, begun: float) -> None:
        """begun: the score before training, which a validation must beat for its weights to be kept."""
        self._path, self._patience = best, patience
        self._best, self._since = begun, 0
        self.trainer: Trainer | None = None

    def watch(self, score: Callable[[nn.Module], Mapping[str, Any]]) -> Callable[[nn.Module], Mapping[str, float]]:
        """Return a validation function that scores, keeps and stops."""

        def validate(network: nn.Module) -> Mapping[str, float]:
            record = score(network)
            self._since += 1
            known = _kept_iou(self._path) if self._path.exists() else self._best
            if record["iou"] > known:
                self._since = 0
                save_weights(self._path, network.state_dict(), {"iou": record["iou"]})
            if self._since >= self._patience and self.trainer is not None:
                self.trainer.progress.planned = self.trainer.progress.step
            return {name: value for name, value in record.items() if isinstance(value, float)}

        return validate


def score_pairs(
    network: nn.Module,
    package: ModelPackage,
    samples: PairSamples,
    most: int | None = None,
    min_free: float | None = None,
) -> dict[str, Any]:
    """Score a network's occupancy and depth on pairs, of which at most `most` evenly spaced ones count.

    min_free: as `occupancy.min_free`; the package's by default.
    """
    model = package.model
    least = model.occupancy.min_free if min_free is None else min_free
    scores = LabelScores(model.grid, mean_grid(package))
    look = network_outputs(network, model, samples)
    for index in evenly(len(samples), most):
        output, sample = look(index), samples[index]
        depth, lift = None, getattr(model, "lift", None)
        if output.depth_logits is not None and lift is not None:
            depth = believed_depth(output.depth_logits[0].float().cpu().numpy(), lift, sample.intrinsic)
        scores.add(sample, occupied_voxels(output, least), depth, lift.stride if lift else 1)
    return scores.as_record()


def fit_threshold(
    network: nn.Module, package: ModelPackage, samples: PairSamples
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the model with the `occupancy.min_free` that has the best IoU on the pairs, and its scores there."""
    look, model = network_outputs(network, package.model, samples), package.model
    scores = {least: LabelScores(model.grid) for least in THRESHOLDS}
    for index in evenly(len(samples), FITTED):
        output, sample = look(index), samples[index]
        for least, score in scores.items():
            score.add(sample, occupied_voxels(output, least))
    best = max(THRESHOLDS, key=lambda least: scores[least].as_record()["iou"])
    fitted = replace(model, occupancy=replace(model.occupancy, min_free=best))
    return fitted, score_pairs(network, package, samples, min_free=best)


def mean_grid(package: ModelPackage) -> NDArray[np.bool_] | None:
    """Return the mean grid (X, Y, Z) of the data that a package came from, None where it does not ship it."""
    return Priors.load(package.path("priors.npz")).occupancy() if package.has("priors.npz") else None


def occupied_voxels(output: NetworkOutput, min_free: float) -> NDArray[np.bool_]:
    """Return (X, Y, Z) what the first sample's voxels are decided to be, as the runtime decides with this `min_free`."""
    if "occupancy_logits" not in output.answers:
        free = output.answers["reconstruction_logits"][0].float().softmax(0)[0]
        is_free = free >= (min_free or 0.5)
    else:
        share = output.answers["occupancy_logits"][0].float().softmax(0)
        is_free = (share[-1] > share[:-1].amax(0)) & (share[-1] >= min_free)
    return xyz_from_volume(~is_free.cpu().numpy())


def evenly(count: int, most: int | None) -> list[int]:
    """Return at most `most` evenly spaced indices."""
    return np.unique(np.linspace(0, count - 1, min(most or count, count)).round().astype(int)).tolist()


def _objective(model: ModelConfig, config: AdaptConfig, data: AdaptData) -> AdaptObjective:
    counts = np.ones(len(model.occupancy_classes), np.int64)
    if data.rehearsal is not None:
        counts = semantic_counts(data.rehearsal, len(counts), most=30)
    weights = config.training.loss
    class_weight = losses.balanced_weights(torch.from_numpy(counts), weights.max_class_weight)
    finetune = objectives.FinetuneObjective(model, weights, class_weight)
    taught = 0.0 if data.train.taught is None else config.taught
    return AdaptObjective(model, weights, finetune, config.rehearsal, taught)


def _loader(data: AdaptData, config: AdaptConfig, model: ModelConfig) -> Loader:
    """Return batches of the user's pairs, every last pass of a step being rehearsed."""
    training = config.training
    own = SampleDataset(data.train, model, training.augment, training.seed, history=training.history)
    if data.rehearsal is None or not config.rehearsal:
        load = make_loader(own, training)
        return lambda first: (SourcedBatch(batch, False) for batch in load(first))
    if training.accumulate < 2:
        raise ConfigError("training.accumulate must be at least 2: the last pass of a step is of rehearsed frames")
    old = SampleDataset(data.rehearsal, model, training.augment, training.seed + 1, history=training.history)
    load_own, load_old = make_loader(own, training), make_loader(old, training)

    def load_both(first: int) -> Iterator[SourcedBatch]:
        step, passes = first // training.accumulate, training.accumulate - 1
        mine, rehearsed = iter(load_own(step * passes)), iter(load_old(step))
        while True:
            for _ in range(passes):
                yield SourcedBatch(next(mine), False)
            yield SourcedBatch(next(rehearsed), True)

    return load_both


def shown_pairs(train: PairSamples, config: AdaptConfig, rehearsed: bool) -> list[int]:
    """Return which pairs a run shows at all, by number: of many, fewer than there are. rehearsed: in every last pass."""
    training = config.training
    passes = training.accumulate - rehearsed
    positions = range(training.steps * passes * training.batch * world_size())
    return sorted({sample_of(position, len(train), training.seed) for position in positions})


def _kept_scores(path: Path, score: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds, or score and write it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(score(), indent=1))
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def _kept_iou(path: Path) -> float:
    record = read_weights(path)[1]
    return float(str(record["iou"]))


def provenance_of(package: ModelPackage, data: AdaptData, config: AdaptConfig, found: Adapted) -> dict[str, Any]:
    """Return the provenance of an adapted package: that of the package it came from, and what was learned since."""
    added = {
        "from": {"name": package.model.name, "hash": package.hash},
        "pairs": len(data.train),
        "drives": list(data.train.drives),
        "data_hash": data.train.hash,
        "held_out_pairs": len(data.held_out),
        "rehearsed": 0 if data.rehearsal is None else len(data.rehearsal),
        "share_of_adapted_weights": found.share,
        "steps": found.steps,
        "seconds": round(found.seconds, 1),
        "processor_seconds": round(found.processor_seconds, 1),
        "seed": config.training.seed,
        "config": to_record(config),
    }
    drives = ", ".join(data.train.drives[:4]) + (" and more" if len(data.train.drives) > 4 else "")
    told = f"{package.trained_on}; adapted without labels to {len(data.train)} image-LiDAR pairs of {drives}"
    kept = {
        name: value for name, value in package.provenance.items() if name not in ("int8", "exported_with", "operators")
    }
    return {**kept, "data": told, "adapted": added}
