"""What `occbev-train reconstruct` does; its arguments and its help are in arguments/reconstruct.py."""

from __future__ import annotations

import argparse
import json

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from occbev.config import ConfigError, load_config
from occbev.inference.families import load_model
from occbev.reports.rendering import stack_pictures
from occbev_training.data.samples import open_samples
from occbev_training.engine.config import TrainingConfig
from occbev_training.engine.stages import predictor
from occbev_training.evaluation.reconstruction import reconstruct, reconstruction_picture
from occbev_training.models.build import build_model
from occbev_training.models.checkpoints import load_strictly, read_weights


def run(args: argparse.Namespace) -> int:
    """Print the IoU of every sample and draw them."""
    model = load_model(args.run / "model.yaml")
    network = build_model(model, "pretrain")
    weights = args.run / "weights.safetensors"
    load_strictly(network, read_weights(weights)[0], str(weights))
    samples = open_samples(args.data, model, "pretrain", args.split)
    config = load_config(args.run / "config.yaml", TrainingConfig)
    predict = predictor(network.eval(), model, samples, config.history)
    chosen = np.unique(np.linspace(0, len(samples) - 1, args.samples).round().astype(int))
    scores, pictures = {}, []
    for index in chosen.tolist():
        sample = samples[index]
        found = reconstruct(sample, predict(index))
        if not found.scored.any():
            continue  # no sweep near it: nothing is known of this key frame
        scores[samples.name(index)] = found.iou
        if args.out:
            pictures.append(reconstruction_picture(samples.name(index), sample, found, model.grid))
    if not scores:
        raise ConfigError(f"{args.data}: no sample has a voxel that was observed and seen")
    if args.out and not cv2.imwrite(str(args.out), stack_pictures(pictures)[..., ::-1]):
        raise ConfigError(f"{args.out}: cannot be written; name a .png")
    if args.json:
        print(json.dumps({"iou": scores, "picture": str(args.out) if args.out else None}))
        return 0
    table = Table("sample", "IoU of occupied voxels that a camera sees")
    for name, iou in scores.items():
        table.add_row(name, f"{iou:.3f}")
    Console().print(table)
    return 0
