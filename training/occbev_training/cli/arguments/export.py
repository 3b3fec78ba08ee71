"""Turn a training run of either stage, its weights, or a converted checkpoint into a model package with graphs.

    occbev-train export out/stage2 --out out/package
    occbev-train export out/stage1 --out out/voxels
    occbev-train export weights.safetensors --model config/models/occbev-tiny.yaml --out out/package
    occbev-train convert bevformer_tiny.pth --family bevformer_tiny --out out/converted
    occbev-train export out/converted --out out/bevformer_tiny
    occbev-train export out/package --out out/package-int8 --int8 out/cache
    occbev-train export config/models/occbev-small.yaml --untrained --out out/occbev-small
    occbev-train export out/package --out out/package-gpu --gpu

The folder of a run has its own model configuration, and its run.json fills the card: data, steps, seed, first weights.
A package of stage 1 predicts voxels that are free, occupied or unknown, without classes and without boxes; a head that
was not trained is not exported. Every graph is compared with torch in double precision before the package is sealed.
An earlier package in OUT is replaced.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from occbev.share import here_or_shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "weights",
        type=here_or_shipped,
        help="folder of a run of either stage, its weights.safetensors, a package of weights; with --untrained a"
        " configuration",
    )
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="random weights, quantised where that can be, to measure latency; the card says so",
    )
    parser.add_argument("position", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder where the package is written")
    parser.add_argument(
        "--model", type=here_or_shipped, help="model configuration (YAML); a run and a package have their own"
    )
    parser.add_argument("--provenance", type=Path, help="JSON: data, steps, seeds of the training, for the card")
    parser.add_argument("--metrics", type=Path, help="JSON: scores on evaluation drives, for the card")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="JSON of 'occbev-train evaluate --calibrate': its occupancy.min_free goes into the package",
    )
    parser.add_argument(
        "--add", type=Path, nargs="*", default=[], help="files to add to the package, such as priors.npz"
    )
    parser.add_argument("--cameras", type=int, nargs="*", help="numbers of cameras that graphs are checked with")
    parser.add_argument(
        "--int8",
        type=Path,
        metavar="CACHE",
        help="quantise the OpenVINO graph on frames of 'occbev-train prepare' that the network was trained on",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="also write the graph in fp16 that TensorRT reads; --int8 is for OpenVINO alone",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
