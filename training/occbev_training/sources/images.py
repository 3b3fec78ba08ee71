"""Encoded images as recordings hold them: their size and whether they are whole, read from their headers alone."""

from __future__ import annotations

import struct

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers that begin a frame and so hold its size."""


def encoded_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG or PNG from its header, or None where it has none."""
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return width, height
    if not data.startswith(_JPEG):
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if 0xD0 <= marker <= 0xD9 or marker == 0x01:  # markers without a length
            at += 2
            continue
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def image_fault(data: bytes, size: tuple[int, int]) -> str | None:
    """Return what is wrong with an encoded image that should have `size` (width, height), or None."""
    found = encoded_size(data)
    if found is None:
        return "neither a JPEG nor a PNG with a whole header"
    if found != size:
        return f"{found[0]}x{found[1]} pixels, the calibration is for {size[0]}x{size[1]}"
    end = b"\xff\xd9" if data.startswith(_JPEG) else b"IEND"
    if end not in data[-256:]:
        return f"cut off after {len(data)} bytes"
    return None
