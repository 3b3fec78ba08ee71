"""Images that a stranger sends to keep a decoder busy."""

from __future__ import annotations

import cv2
import numpy as np

SCAN = b"\xff\xda"


def progressive(width: int, height: int, scans: int) -> bytes:
    """A black progressive JPEG of so many scans, of 100 bytes to 200 kB; libjpeg goes through all pixels for each."""
    black = np.zeros((height, width, 3), np.uint8)
    image = cv2.imencode(".jpg", black, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    last = image[image.rindex(SCAN) : -2]
    return image[:-2] + last * (scans - image.count(SCAN)) + image[-2:]
