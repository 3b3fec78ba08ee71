"""A real drive instead of simulated test drives: its first half has labels, its second half is scored.

Both halves are divided into blocks of time, which are used as drives: for shares of labels and for bootstrap intervals.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from occbev.files import replace_file
from occbev.inference.preprocess import Preprocessor, network_camera
from occbev.rig import CameraRig
from occbev_training.data.cache import CachedSample, write_sample
from occbev_training.data.shards import LabelVolumes
from occbev_training.experiment.network import GRID, MODEL
from occbev_training.experiment.plan import PlanError, RecordedPlan, WorldPlan
from occbev_training.experiment.pool import drive_folder, sample_file
from occbev_training.occupancy.prepare import PrepareConfig, make_sample
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.discovery import OpenBag
from occbev_training.sources.labelled import OpenLabelled
from occbev_training.sources.recording import Recording, leave_out

BOXES = "boxes.json"
"""File with the boxes of a recording, in its folder."""


def rig_file(folder: Path) -> Path:
    """File of the recording's cameras as the network sees them: simulated drives get them, too."""
    return folder / "rig.yaml"


def make_blocks(folder: Path, world: WorldPlan, recording: Path | None) -> None:
    """Write the samples of every block that is not there yet, and the cameras.

    recording: a bag, or a folder that holds one, with `boxes.json` beside it.
    Raises:
        PlanError: no recording is given, it has another name than the plan says, or too few key frames.
    """
    recorded = world.recorded
    assert recorded is not None, "the plan has a recording"
    wanted = [
        (split, number)
        for split in ("labelled", "test")
        for number in range(recorded.blocks)
        if not (drive_folder(folder, split, number, world) / "done.json").exists()
    ]
    if not wanted:
        return
    drive = _open(recording, recorded)
    CameraRig(tuple(network_camera(camera, MODEL.image) for camera in drive.rig.cameras)).save(rig_file(folder))
    samples, problems = _whole_samples(drive)
    for split, number in wanted:
        target = drive_folder(folder, split, number, world)
        target.mkdir(parents=True, exist_ok=True)
        try:
            keys = block_keys(split, number, len(samples), recorded)
        except PlanError as error:
            reasons = "; ".join(f"{key}: {reason}" for key, reason in problems.items())
            raise PlanError(f"{error}; left out: {reasons or 'none'}") from error
        hashes = [write_sample(sample_file(target, place), samples[key]) for place, key in enumerate(keys)]
        with replace_file(target / "done.json") as temporary:
            temporary.write_text(json.dumps(hashes))


def _whole_samples(drive: Recording) -> tuple[list[CachedSample], dict[str, str]]:
    """Make the samples of all key frames that have every image and pose; returns also why the others have none."""
    config, preprocessor = PrepareConfig(MODEL.image, GRID), Preprocessor(MODEL.image)
    nothing = np.zeros(GRID.shape, np.uint8)  # phase 1 never sees the recording, so its LiDAR labels are not made
    unlabelled = LabelVolumes(nothing, nothing, nothing, nothing, GRID.hash)
    samples, problems = [], dict[str, str]()
    for key in range(len(drive.key_stamp_ns)):
        with leave_out(problems, f"key {key}"):
            frames = drive.frame_set(key)
            missing = dict(frames.missing)
            if not missing:
                sample, missing = make_sample(drive, key, config, preprocessor, lambda *_: unlabelled, frames)
            if missing:
                problems[f"key {key}"] = str(missing)
            else:
                samples.append(sample)
    return samples, problems


def block_keys(split: str, number: int, keys: int, recorded: RecordedPlan) -> range:
    """Return the key frames of a block: of the first ones, or of the last ones; what is between is in no block.

    Raises:
        PlanError: the halves would share a key frame.
    """
    half = recorded.blocks * recorded.block_keys
    if 2 * half > keys:
        raise PlanError(f"recorded: {keys} key frames, want {2 * half} for two halves of {recorded.blocks} blocks")
    first = (0 if split == "labelled" else keys - half) + number * recorded.block_keys
    return range(first, first + recorded.block_keys)


def _open(path: Path | None, recorded: RecordedPlan) -> Recording:
    """Open the recording with its boxes."""
    if path is None:
        raise PlanError(f"the plan is scored on {recorded.name}: give --recording with the bag and its {BOXES}")
    bags = [path] if path.is_file() else sorted(path.glob("*.mcap"))
    if len(bags) != 1:
        raise PlanError(f"--recording {path}: {len(bags)} MCAP files, want one")
    (bag,) = bags
    if bag.stem != recorded.name:
        raise PlanError(f"--recording {path}: is {bag.stem}, the plan is scored on {recorded.name}")
    opener = OpenBag(bag, BagOptions(key_interval=recorded.key_interval), check_clocks="ignore")
    return OpenLabelled(opener, bag.parent / BOXES)()
