"""What the header of an encoded image says before anything is decoded: its kind, its size, whether it is whole."""

from __future__ import annotations

import struct

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

TRAILER_BYTES = 4096
"""Padding that some cameras leave behind the end marker of an encoded image."""

FRAME_MARKERS = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA})
"""JPEG markers that begin a frame that libjpeg decodes, and so hold its size."""

OTHER_FRAMES = frozenset(range(0xC5, 0xD0)) - {0xC8, 0xC9, 0xCA, 0xCC}
"""JPEG markers that begin a frame of a kind that libjpeg does not decode."""

SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
"""Those of `FRAME_MARKERS` that are not progressive."""

MAX_IMAGE_PIXELS = 40_000_000
"""Most pixels of an image where no parameter says otherwise."""

MAX_SCANS = 64
"""Most scans of a JPEG: each is a pass over the whole image, and encoders write 1 to 20. A file of 68 kB can hold
thousands of empty ones, which take ten seconds to decode."""

MAX_SCANNED_PIXELS = 10 * MAX_IMAGE_PIXELS
"""Most pixels times scans of a JPEG: half a second of decoding."""


def encoded_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG or PNG from its header, or None where it has none."""
    if data.startswith(JPEG_START):
        return jpeg_size(data)
    if data.startswith(PNG_START) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return width, height
    return None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the frame header of a JPEG, found as libjpeg finds it; None where there is none."""
    at = _find_frame(data)
    if at is None:
        return None
    height, width = struct.unpack_from(">HH", data, at + 5)
    return width, height


def _find_frame(data: bytes) -> int | None:
    """Return where the frame header of a JPEG begins; None where libjpeg finds none."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 9 <= len(data):  # libjpeg skips what is no marker
        marker = data[at + 1]
        if marker in FRAME_MARKERS:
            return at
        if marker in OTHER_FRAMES or marker in (0xD8, 0xD9, 0xDA):  # begins again, ends, or has pixels without a frame
            return None
        at = _next_marker(data, at)
    return None


def _next_marker(data: bytes, at: int) -> int:
    """Return where to look for the marker after the one at `at`."""
    marker = data[at + 1]
    if marker == 0xFF:  # a fill byte
        return at + 1
    if 0xD0 <= marker <= 0xD7 or marker in (0x00, 0x01):  # without a length
        return at + 2
    return int(at + 2 + max(2, struct.unpack_from(">H", data, at + 2)[0]))


def count_scans(data: bytes) -> int:
    """Return how many scans a JPEG may have; a thumbnail in its header counts as well.

    A sequential one whose first scan holds all components has one: libjpeg goes through no second, and nothing need be
    searched.
    """
    return 1 if _has_one_scan(data) else data.count(b"\xff\xda")


def _has_one_scan(data: bytes) -> bool:
    at = _find_frame(data)
    if at is None or data[at + 1] not in SEQUENTIAL or len(data) <= at + 9:
        return False
    components, at = data[at + 9], _next_marker(data, at)
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 < len(data):
        if data[at + 1] == 0xDA:
            return data[at + 4] == components
        if data[at + 1] in FRAME_MARKERS | OTHER_FRAMES or data[at + 1] in (0xD8, 0xD9):
            return False
        at = _next_marker(data, at)
    return False


def decoding_fault(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS, size: tuple[int, int] | None = None) -> str | None:
    """Return why an encoded image must not be given to a decoder, or None; only its headers are read.

    size: its `encoded_size`, where that was read already.
    """
    size = size or encoded_size(data)
    if size is None:
        return f"{len(data)} bytes without a readable image header"
    if min(size) <= 0:
        return f"an image of {size[0]}x{size[1]} pixels has no content"
    if size[0] * size[1] > max_pixels:
        return f"an image of {size[0]}x{size[1]} pixels exceeds max_image_pixels = {max_pixels}"
    if data.startswith(JPEG_START) and (scans := count_scans(data)) > MAX_SCANS:
        return f"a JPEG of {scans} scans; at most {MAX_SCANS} are decoded"
    if data.startswith(JPEG_START) and scans * size[0] * size[1] > MAX_SCANNED_PIXELS:
        return f"a JPEG of {scans} scans over {size[0]}x{size[1]} pixels; at most {MAX_SCANNED_PIXELS} are gone through"
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
    return decoding_fault(data) or (None if is_whole(data) else f"cut off after {len(data)} bytes")
