"""The boxes variant: what annotated boxes hold is carried to the key time, and the label says so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from tests.training.traced_drive import GRID, KEY_NS, Block, TracedDrive

from occbev.results import Boxes3D
from occbev_training.occupancy.boxes import read_tracks
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig
from occbev_training.occupancy.pairs import PairConfig
from occbev_training.sources.recording import Annotations, RecordingError

OCCUPIED = 2
MOVER = Block((-2.2, -5.0, 0.8), (4.0, 1.8, 1.6), velocity=(-8.0, 0.0))
PARKED = Block((6.2, 5.0, 0.8), (4.0, 1.8, 1.6))


class Annotated(TracedDrive):
    """A traced drive with the boxes of its blocks at key frames half a second apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.key_stamp_ns = KEY_NS + np.arange(-2, 3) * 500_000_000

    def annotations(self, key: int) -> Annotations:
        t = (int(self.key_stamp_ns[key]) - KEY_NS) / 1e9
        rows = []
        for block in self.blocks:
            centre = np.array(block.centre) + (*(t * np.array(block.velocity)), 0.0)
            rows.append([*(centre - [self.speed * t, 0, 0]), *block.size, 0.0, *block.velocity])
        boxes = Boxes3D(
            np.array(rows, np.float32),
            np.zeros(len(rows), np.int64),
            np.ones(len(rows), np.float32),
        )
        return Annotations(boxes, tuple(f"block {i}" for i in range(len(rows))), np.ones(len(rows), np.int64))


def label_of(drive: TracedDrive, objects: str):
    return LabelBuilder(drive, LabelConfig(objects=objects), GRID).build(2)


def inside(block: Block, grown: float = 0.0) -> np.ndarray:
    away = np.abs(GRID.centres() - block.centre)
    return np.all(away <= np.array(block.size) / 2 + grown, axis=-1)


def test_tracks_join_boxes_over_the_keys() -> None:
    tracks = read_tracks(Annotated([MOVER, PARKED]))
    assert set(tracks) == {"block 0", "block 1"}
    at = tracks["block 0"].at(KEY_NS + 250_000_000)
    before = tracks["block 0"].at(KEY_NS)
    np.testing.assert_allclose(np.linalg.norm(at[:3, 3] - before[:3, 3]), 2.0, atol=1e-4)
    assert tracks["block 0"].at(KEY_NS + 1_100_000_000) is None
    sparse = dataclasses.replace(tracks["block 0"], stamp_ns=tracks["block 0"].stamp_ns * np.int64(1))
    far = dataclasses.replace(sparse, stamp_ns=np.array([0, 2_000_000_000]), place=sparse.place[:2])
    assert far.at(500_000_000) is None, "two annotations too far apart"
    with pytest.raises(RecordingError, match="no annotated boxes"):
        read_tracks(TracedDrive())


def test_a_mover_is_whole_and_leaves_no_trail() -> None:
    drive = Annotated([MOVER, PARKED])
    evidence, boxes = (label_of(drive, objects) for objects in ("evidence", "boxes"))
    body = inside(MOVER, 0.6)
    assert (boxes.state[body] == OCCUPIED).sum() > 1.1 * (evidence.state[body] == OCCUPIED).sum()
    along = (np.abs(GRID.centres()[..., 1] + 5.0) < 0.8) & (GRID.centres()[..., 2] > 0.5) & ~inside(MOVER, 1.0)
    assert not (boxes.state[along] == OCCUPIED).any()
    elsewhere = ~body & ~inside(PARKED, 1.0) & ~along
    same = boxes.state[elsewhere] == evidence.state[elsewhere]
    assert same.mean() > 0.98


def test_an_object_that_is_gone_at_the_key_is_dropped() -> None:
    class Leaves(Annotated):
        def annotations(self, key: int) -> Annotations:
            whole = super().annotations(key)
            return whole if key < 2 else Annotations(whole.boxes[1:], whole.instance[1:], whole.lidar_points[1:])

    label = label_of(Leaves([MOVER, PARKED]), "boxes")
    assert (label.state[inside(PARKED, 0.6)] == OCCUPIED).sum() > 20


def test_the_variant_is_part_of_every_hash_and_says_whether_it_is_free_of_boxes() -> None:
    plain, boxes = PairConfig(), PairConfig(variant="boxes")
    assert boxes.label.objects == "boxes"
    assert plain.label.objects == "evidence"
    assert len({plain.hash, boxes.hash, PairConfig(variant="occbev_paper").hash}) == 3
    with pytest.raises(ValueError, match="known are occbev, boxes, occbev_paper"):
        PairConfig(variant="other")
    with pytest.raises(ValueError, match="evidence or boxes"):
        LabelConfig(objects="magic")
