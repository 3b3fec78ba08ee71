"""What `occbev-train finetune` does; its arguments and its help are in arguments/finetune.py."""

from __future__ import annotations

import argparse

from occbev_training.cli.pretrain import run_stage

STAGE = "finetune"


def run(args: argparse.Namespace) -> int:
    """Train; exits with 0 when the plan was finished and 130 when it was stopped."""
    return run_stage(args, STAGE, args.start)
