"""A drive is simulated once for each content, its bag and truth belong together, and half a drive is made anew."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("embreex", reason="the simulator casts rays with embreex")

from occbev.grid import GRIDS
from occbev.messages.bags import BagReader
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.simulator.drive_cache import content_hash, keep_drive, keep_pictures
from occbev_training.simulator.lidar import LidarConfig
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.truth import read_truth

CONFIG = DriveConfig(keys=2, key_rate=5.0, image=(96, 32), lidar=LidarConfig(columns=120), grid=GRIDS["tiny"])
SEED = 20_002


def test_a_drive_is_made_once_and_its_bag_and_truth_agree(tmp_path: Path) -> None:
    seen: set[str] = set()
    (tmp_path / "drive-of-another-time").mkdir()
    first = keep_drive(tmp_path, SEED, CONFIG, 1, lambda step, done, total: seen.add(step))
    assert first.made
    assert seen == {"simulate", "write the bag"}
    assert not (tmp_path / "drive-of-another-time").exists()
    again = keep_drive(tmp_path, SEED, CONFIG, 1)
    assert (again.bag, again.truth, again.made) == (first.bag, first.truth, False)

    truth, recording = read_truth(first.truth), BagRecording(first.bag)
    np.testing.assert_allclose(recording.rig["CAM_BACK"].cam2ego, truth.rig["CAM_BACK"].cam2ego, atol=1e-9)
    assert len(truth.key_stamp_ns) == len(recording.key_stamp_ns) == 2
    assert all(truth.nearest_key(int(stamp)) is not None for stamp in recording.key_stamp_ns)

    shutil.rmtree(first.truth)
    assert keep_drive(tmp_path, SEED, CONFIG, 1).made, "a bag without truth is not a drive"


def test_pictures_alone_are_those_of_the_drive_and_made_once(tmp_path: Path) -> None:
    seen: list[int] = []
    bag = keep_pictures(tmp_path, SEED, CONFIG, 1, lambda _, done, total: seen.append(done))
    assert keep_pictures(tmp_path, SEED, CONFIG, 1, lambda _, done, total: seen.append(done)) == bag
    assert seen == [1, 2]
    with BagReader(bag) as reader:
        assert not [topic for topic in reader.topics if "lidar" in topic]
        front = list(reader.messages(["/cam_front/image/compressed"]))
        images = [bytes(reader.decode(message).data) for message in front]
    drive = SimulatedDrive(SEED, CONFIG)
    assert images == [drive.frame_set(key).frames["CAM_FRONT"].image for key in range(2)]


def test_the_name_follows_the_content() -> None:
    names = {
        content_hash(SEED, CONFIG),
        content_hash(SEED + 1, CONFIG),
        content_hash(SEED, replace(CONFIG, keys=3)),
    }
    assert len(names) == 3
    assert content_hash(SEED, replace(CONFIG)) in names
