"""The `occbev-train` console command."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from occbev.cli import dispatch

COMMANDS: Mapping[str, str] = {
    "simulate": "write simulated drives as nuScenes tables and as ROS 2 bags",
    "nuscenes-to-bag": "turn a nuScenes data root into ROS 2 bags",
    "bag-check": "tell whether a bag can become training pairs",
    "pairs": "turn unlabelled drives into measured image-LiDAR pairs",
    "view": "draw a stored pair: images, label, visibility, evidence",
    "label-truth": "compare labels with the simulator's truth and with the published recipe",
    "labels": "take boxes of one's own for bags, from a topic or from files",
    "prepare": "decode and label key frames once, into a sample cache",
    "pretrain": "stage 1: learn to reconstruct occupancy from image-LiDAR pairs",
    "reconstruct": "what a pre-training run says of samples: scores and a picture",
    "finetune": "stage 2: learn boxes and semantic occupancy",
    "learn": "the whole way: bags to pairs to a package that the node runs",
    "adapt": "adapt a package to your own drives, without labels",
    "evaluate": "score a model package on held-out drives",
    "calibrate": "make a package's probabilities of occupancy honest, on held-out drives",
    "export": "turn a training checkpoint into a model package",
    "convert": "turn a published checkpoint into a model package",
    "families": "every network: parameters, published keys, parity of its exported graph",
    "bench": "parts of networks, side by side with plain baselines",
    "fuzz": "damaged images, rigs, results, packages and bags: each is read or refused in one line",
}
"""Sub-command -> one line of help. Each is `occbev_training.cli.<name>` with `add_arguments` and `run`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `occbev-train COMMAND ...`; returns the exit status."""
    return dispatch(
        "occbev-train",
        "occbev_training.cli",
        COMMANDS,
        sys.argv[1:] if arguments is None else arguments,
    )
