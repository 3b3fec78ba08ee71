"""Boxes as the bytes of a vision_msgs/Detection3DArray, without the objects of its messages.

Making, filling and serialising the objects of a hundred detections takes several times as long.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.results import Boxes3D

ENCAPSULATION = b"\x00\x01\x00\x00"
"""Begin of a CDR message of little-endian numbers; places are counted from behind it."""

NUMBERS = 54
"""float64 values of a detection: score, pose and covariance of its hypothesis, then pose and size of its box."""

POSE, BOX_POSE, BOX_SIZE = slice(1, 8), slice(44, 51), slice(51, 54)
"""Where they stand; a pose is x, y, z and a quaternion x, y, z, w."""


def detections_bytes(boxes: Boxes3D, stamp_ns: int, frame: str) -> bytes:
    """Return the message: centre and size as in `Boxes3D`, one hypothesis each, whose pose is the box's.

    frame: of header.frame_id. Ids are those of the tracks, empty where boxes are not tracked.
    """
    numbers = _numbers(boxes).tobytes()
    header = struct.pack("<iI", *divmod(stamp_ns, 1_000_000_000)) + _text(frame)
    ids = [""] * len(boxes) if boxes.track is None else boxes.track.astype(str).tolist()
    size = 8 * NUMBERS
    message = bytearray(_padded(header, 4) + struct.pack("<I", len(boxes)))
    for index, (label, identity) in enumerate(zip(boxes.label.tolist(), ids, strict=True)):
        message += _begin(header, DETECTION_CLASSES[label], len(message) % 8)
        message += numbers[index * size : (index + 1) * size]
        message += _text(identity)
    return ENCAPSULATION + bytes(message)


def _numbers(boxes: Boxes3D) -> NDArray[np.float64]:
    """Return the numbers of each detection (M, 54)."""
    numbers = np.zeros((len(boxes), NUMBERS), "<f8")
    box = boxes.box.astype(np.float64)
    numbers[:, 0] = boxes.score
    pose = numbers[:, POSE]
    pose[:, :3], pose[:, 5], pose[:, 6] = box[:, :3], np.sin(box[:, 6] / 2), np.cos(box[:, 6] / 2)
    numbers[:, BOX_POSE], numbers[:, BOX_SIZE] = pose, box[:, 3:6]
    return numbers


@lru_cache(maxsize=64)
def _begin(header: bytes, name: str, at: int) -> bytes:
    """Return a detection up to its numbers: header, one result, its class; at: where it begins, modulo eight."""
    before = at + -at % 4
    begin = _padded(header, 4) + struct.pack("<I", 1) + _text(name)
    return bytes(-at % 4) + begin + bytes(-(before + len(begin)) % 8)


def _text(text: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("<I", len(data)) + data


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)
