"""Boxes from object queries: codes, axes, ranking, what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from occbev.geometry import frame2ego
from occbev.inference.postprocess import OutputError
from occbev.inference.query_boxes import QueryDecoding, decode_queries


def code(x: float, y: float, z: float, yaw: float, vx: float = 0.0, vy: float = 0.0) -> list[float]:
    """A car of 4 x 2 x 1.5 m as a network says it."""
    r = -yaw - math.pi / 2
    return [x, y, math.log(2), math.log(4), z, math.log(1.5), math.sin(r), math.cos(r), vx, vy]


CODES = np.array([code(5, 2, 0, 0.3, 1, -1), code(-7, 1, 1, 3.0), code(70, 0, 0, 0)], np.float32)
LOGITS = np.array([[-1.0, 2.0], [0.5, -9.0], [5.0, 5.0]], np.float32)


def test_answers_become_boxes_best_first() -> None:
    boxes = decode_queries(LOGITS, CODES, np.eye(4), QueryDecoding(threshold=0.1), ("CAM_FRONT",))
    assert boxes.label.tolist() == [1, 0, 0]  # the third query is out of range
    np.testing.assert_allclose(boxes.score, 1 / (1 + np.exp([-2, -0.5, 1])), rtol=1e-6)
    np.testing.assert_allclose(boxes.box[0], (5, 2, 0, 4, 2, 1.5, 0.3, 1, -1), atol=1e-6)
    np.testing.assert_allclose(boxes.box[1, 6], 3.0, atol=1e-6)
    assert boxes.cameras == ("CAM_FRONT",)


def test_lidar_axes_turn_into_those_of_the_vehicle() -> None:
    # 10 m ahead of the LiDAR, heading forward (+y there) at 5 m/s.
    codes = np.array([code(0, 10, -1.0, math.pi / 2, 0, 5)], np.float32)
    boxes = decode_queries(np.ones((1, 1), np.float32), codes, frame2ego("lidar"))
    np.testing.assert_allclose(boxes.box[0], (10.94, 0, 0.84, 4, 2, 1.5, 0, 5, 0), atol=1e-5)


def test_at_most_so_many_boxes() -> None:
    boxes = decode_queries(LOGITS[:2], CODES[:2], np.eye(4), QueryDecoding(max_boxes=2))
    assert boxes.label.tolist() == [1, 0]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(broken: float) -> None:
    codes = CODES.copy()
    codes[1, 3] = broken
    with pytest.raises(OutputError, match="not finite"):
        decode_queries(LOGITS, codes, np.eye(4))
    with pytest.raises(OutputError, match=r"\(3, 2\)"):
        decode_queries(LOGITS, CODES[:2], np.eye(4))
