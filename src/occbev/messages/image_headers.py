"""What the header of an encoded image says before anything is decoded: its kind, its size, whether it is whole."""

from __future__ import annotations

import struct

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

TRAILER_BYTES = 4096
"""Padding that some cameras leave behind the end marker of an encoded image."""

FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers that begin a frame and so hold its size."""


def encoded_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG or PNG from its header, or None where it has none."""
    if data.startswith(JPEG_START):
        return jpeg_size(data)
    if data.startswith(PNG_START) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return width, height
    return None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the frame header of a JPEG, or None where there is none."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xD0 <= marker <= 0xD9 or marker == 0x01:  # markers without a length
            at += 2
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def is_whole(data: bytes) -> bool:
    """Whether a JPEG or PNG has its end marker, behind which a camera may have left some padding."""
    end = JPEG_END if data.startswith(JPEG_START) else PNG_END
    return end in data[-TRAILER_BYTES:]


def image_fault(data: bytes, size: tuple[int, int]) -> str | None:
    """Return what is wrong with an encoded image that should have `size` (width, height), or None."""
    found = encoded_size(data)
    if found is None:
        return "neither a JPEG nor a PNG with a whole header"
    if found != size:
        return f"{found[0]}x{found[1]} pixels, the calibration is for {size[0]}x{size[1]}"
    return None if is_whole(data) else f"cut off after {len(data)} bytes"
