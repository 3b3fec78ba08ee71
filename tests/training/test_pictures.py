"""Pictures of stored pairs: the right things are in the right places."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from occbev.grid import GRIDS
from occbev_training.data.shards import LabelVolumes, PairSample
from occbev_training.occupancy.pictures import _SEEN, grid_of, pair_picture

GRID = GRIDS["tiny"]


def sample(**changes) -> PairSample:
    state = np.ones(GRID.shape, np.uint8)
    state[:, :, :2] = 0
    state[36:, 30:, 3:] = 2  # ahead and to the left
    visible = np.where(state == 2, 1, 0).astype(np.uint8)
    label = LabelVolumes(state, visible, (state == 2).astype(np.uint8) * 9, state, GRID.hash)
    record = {
        "name": "FRONT",
        "width": 64,
        "height": 40,
        "intrinsic": [[40.0, 0, 32], [0, 40.0, 20], [0, 0, 1]],
        "cam2ego": {"translation": [1.0, 0, 1.5], "rotation_xyzw": [-0.5, 0.5, -0.5, 0.5]},
        "cam2ego_at_key": [[0, 0, 1, 1.0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]],
    }
    jpeg = bytes(cv2.imencode(".jpg", np.full((40, 64, 3), 90, np.uint8))[1])
    meta = {"grid": GRID.as_record()}
    return PairSample(
        "d/1",
        {"FRONT": jpeg},
        {"order": ["FRONT"], "cameras": {"FRONT": record}},
        meta,
        label,
        **changes,
    )


def test_what_is_ahead_and_left_is_drawn_up_and_left() -> None:
    picture = pair_picture(sample(), 900)
    assert picture.dtype == np.uint8
    assert picture.shape[1] >= 880
    blue = np.all(picture == _SEEN, axis=-1)
    first = blue[: picture.shape[0] // 2, :280]
    rows, columns = np.nonzero(first)
    assert len(rows) > 100
    assert columns.max() < 140
    assert np.ptp(rows) < 60


def test_a_camera_that_is_missing_is_no_trouble() -> None:
    blind = PairSample("d/1", {}, sample().calibration, sample().meta, sample().label)
    assert pair_picture(blind, 900).shape[0] < pair_picture(sample(), 900).shape[0]


def test_a_label_of_another_grid_is_refused() -> None:
    wrong = PairSample("d/1", {}, {}, {"grid": GRIDS["det"].as_record()}, sample().label)
    with pytest.raises(ValueError, match="record of"):
        grid_of(wrong)
