"""From the outputs of object queries to boxes in base_link, for networks of the BEVFormer and DETR3D families.

Queries are trained to predict each object once, so there is no non-maximum suppression.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occbev.geometry import wrap_angle
from occbev.inference.postprocess import LARGEST_SIZE, OutputError, move_boxes
from occbev.results import Boxes3D

CODE_VALUES = 10
"""x, y, log w, log l, z, log h, sin r, cos r, vx, vy with r = -yaw - pi / 2, in the frame of the BEV."""


@dataclass(frozen=True)
class QueryDecoding:
    """How the outputs of queries become boxes."""

    threshold: float = 0.0
    """Least score of a box."""
    max_boxes: int = 300
    """Most boxes; one query may give several, of different classes."""
    lo: tuple[float, float, float] = (-61.2, -61.2, -10.0)
    """Centres below are left out; metres in the frame of the BEV."""
    hi: tuple[float, float, float] = (61.2, 61.2, 10.0)
    """Centres above are left out."""


def decode_queries(
    class_logits: NDArray[np.float32],
    box_codes: NDArray[np.float32],
    frame2ego: NDArray[np.float64],
    decoding: QueryDecoding | None = None,
    cameras: tuple[str, ...] = (),
) -> Boxes3D:
    """Turn the outputs of the last decoder layer into boxes in base_link, best first.

    class_logits: (Q, K). box_codes: (Q, 10). frame2ego: (4, 4), where the BEV's frame is on the vehicle;
        upright, as `occbev.geometry.frame2ego` gives it.
    Raises:
        OutputError: shapes do not fit each other, or a value is not finite.
    """
    decoding = decoding or QueryDecoding()
    _check(class_logits, box_codes)
    classes = class_logits.shape[1]
    flat = class_logits.reshape(-1).astype(np.float64)
    best = np.argsort(-flat, kind="stable")[: decoding.max_boxes]
    score = 1 / (1 + np.exp(-flat[best]))
    codes = box_codes[best // classes].astype(np.float64)
    centre = codes[:, [0, 1, 4]]
    kept = np.all((centre >= decoding.lo) & (centre <= decoding.hi), 1)
    kept &= score >= decoding.threshold
    label = (best % classes)[kept].astype(np.int64)
    boxes = Boxes3D(_to_boxes(codes[kept]), label, score[kept].astype(np.float32), cameras)
    return move_boxes(boxes, np.asarray(frame2ego, np.float64))


def _to_boxes(codes: NDArray[np.float64]) -> NDArray[np.float32]:
    """Turn (M, 10) codes into (M, 9) boxes of the same frame."""
    size = np.exp(np.clip(codes[:, [3, 2, 5]], None, np.log(LARGEST_SIZE)))
    yaw = wrap_angle(-np.arctan2(codes[:, 6], codes[:, 7]) - np.pi / 2)
    box = np.concatenate([codes[:, [0, 1, 4]], size, np.asarray(yaw)[:, None], codes[:, 8:]], 1)
    return box.astype(np.float32)


def _check(class_logits: NDArray[np.float32], box_codes: NDArray[np.float32]) -> None:
    if class_logits.ndim != 2 or box_codes.shape != (len(class_logits), CODE_VALUES):
        raise OutputError(f"query logits {class_logits.shape} and codes {box_codes.shape}: want (Q, K) and (Q, 10)")
    if not (np.isfinite(class_logits).all() and np.isfinite(box_codes).all()):
        raise OutputError("query logits or codes are not finite")
