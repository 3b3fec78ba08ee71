"""The `occbev-train` console command."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from occbev.cli import dispatch

COMMANDS: Mapping[str, str] = {
    "simulate": "write simulated drives as nuScenes tables, as ROS 2 bags, or as both",
    "nuscenes-to-bag": "turn a nuScenes data root into ROS 2 bags",
    "bag-check": "check whether a bag can become training pairs",
    "pairs": "turn unlabelled drives into image-LiDAR pairs of measured quality",
    "view": "show training pairs in 3D, or draw one as a picture: the same as `occbev view`",
    "label-truth": "compare labels with the simulator's truth and with the published recipe",
    "labels": "take your own boxes for bags, from a topic or from files",
    "prepare": "decode and label key frames once, into a sample cache",
    "pretrain": "stage 1: learn to reconstruct occupancy from image-LiDAR pairs",
    "reconstruct": "show what a pre-training run predicts for samples: IoU and a picture",
    "finetune": "stage 2: learn boxes and semantic occupancy",
    "learn": "all steps in one command: bags to pairs to a package that the node runs",
    "adapt": "adapt a package to your own drives, without labels",
    "evaluate": "score a model package on evaluation drives, or score result files",
    "calibrate": "calibrate a package's occupancy probabilities on evaluation drives",
    "export": "turn a run's folder or weights into a model package",
    "convert": "turn a published checkpoint into a model package",
    "families": "list every network: parameters, converted keys, parity of its exported graph",
    "experiment": "test whether occupancy pre-training pays, by a registered plan",
    "bench": "measure parts of training, beside plain baselines",
    "fuzz": "read damaged images, rigs, results, packages and bags: none may crash or hang",
}
"""Sub-command -> one line of help. `occbev_training.cli.arguments.<name>` has its `add_arguments` and its help,
`occbev_training.cli.<name>` its `run`."""

FIRST_STEPS = """\
From your own bags to a package that the node runs, without a label:
  occbev rig BAG --out vehicle                                        # write topics, rig and parameters from a bag
  occbev-train bag-check BAG --topics vehicle/topics.yaml             # check what the bag holds
  occbev-train learn BAGS --topics vehicle/topics.yaml --out out/mine # make pairs, adapt, score, export
  occbev replay BAG --params-file vehicle/perception.yaml --model out/mine/package

The steps one by one:
  occbev-train pairs BAGS --out out/pairs                             # labels from LiDAR rays
  occbev-train pretrain config/training/pretrain_tiny.yaml --data out/pairs --out out/stage1
  occbev-train finetune config/training/finetune_tiny.yaml --data CACHE --out out/stage2 --from out/stage1
  occbev-train export out/stage2 --out out/package
  occbev-train evaluate out/package --data CACHE

No data yet: occbev-train simulate --out out/drives --format bag

All commands: occbev-train --help. One command with its options: occbev-train COMMAND --help."""
"""What `occbev-train` alone prints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `occbev-train COMMAND ...`; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return dispatch("occbev-train", "occbev_training.cli", COMMANDS, given, FIRST_STEPS)
