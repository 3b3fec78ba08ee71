"""Headers of encoded images: they agree with the decoder, and bombs are refused without decoding."""

from __future__ import annotations

import random
import time

import cv2
import numpy as np
import pytest
from tests.hostile_images import progressive

from occbev.config import ImageConfig
from occbev.inference.preprocess import ImageError, Preprocessor, decode_image
from occbev.messages.image_headers import MAX_SCANS, count_scans, decoding_fault, encoded_size, image_fault
from occbev.results import CameraFrame
from occbev.rig import Camera

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
JPEG = cv2.imencode(".jpg", PIXELS)[1].tobytes()
PROGRESSIVE = cv2.imencode(".jpg", PIXELS, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
PNG = cv2.imencode(".png", PIXELS)[1].tobytes()


def test_sizes_agree_with_the_decoder_wherever_it_decodes() -> None:
    rng, agreed = random.Random(0), 0
    for _ in range(3000):
        data = bytearray(rng.choice((JPEG, PROGRESSIVE, PNG)))
        for _ in range(rng.randint(0, 4)):
            data[rng.randrange(rng.choice((30, 300, len(data))))] = rng.choice(
                (0xFF, 0, 0xC0, 0xC2, rng.randrange(256))
            )
        size = encoded_size(bytes(data))
        if size is not None and size[0] * size[1] > 10**7:
            continue
        image = cv2.imdecode(np.frombuffer(bytes(data), np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is not None:
            assert size == image.shape[1::-1]
            agreed += 1
    assert agreed > 500


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE, PNG], ids=["jpeg", "progressive", "png"])
def test_whole_images_are_decoded(data: bytes) -> None:
    assert encoded_size(data) == (56, 40)
    assert decoding_fault(data) is None
    assert decode_image(data, "A").shape == (40, 56, 3)


def test_a_progressive_bomb_is_refused_at_once() -> None:
    data = progressive(2000, 2000, 6000)
    assert len(data) < 200_000
    assert count_scans(data) > MAX_SCANS
    began = time.process_time()
    with pytest.raises(ImageError, match="a JPEG of 6000 scans; at most 64"):
        decode_image(data, "A")
    assert image_fault(data, (2000, 2000)) == "a JPEG of 6000 scans; at most 64 are decoded", "in training, too"
    assert time.process_time() - began < 0.1


def test_an_image_of_one_scan_is_told_without_a_search_and_hidden_scans_are_not_decoded() -> None:
    assert count_scans(JPEG) == 1
    assert count_scans(PROGRESSIVE) > 1
    scan = JPEG[JPEG.index(b"\xff\xda") : -2]
    more = JPEG[:-2] + 100 * scan + JPEG[-2:]
    assert count_scans(more) == 1, "libjpeg goes through the first one and no other"
    decoded = cv2.imdecode(np.frombuffer(more, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is None or np.array_equal(decoded, cv2.imdecode(np.frombuffer(JPEG, np.uint8), cv2.IMREAD_COLOR))
    parts = JPEG.index(b"\xff\xda") + 4
    several = JPEG[:parts] + b"\x01" + JPEG[parts + 1 :] + 100 * scan
    assert count_scans(several) > MAX_SCANS, "a first scan of one component of three"
    grey = cv2.imencode(".jpg", PIXELS[..., 0])[1].tobytes()
    assert count_scans(grey) == 1


def test_scans_over_many_pixels_are_refused_and_an_encoders_own_are_not() -> None:
    assert decoding_fault(progressive(6000, 6000, 10)) is None
    with pytest.raises(ImageError, match="a JPEG of 12 scans over 6000x6000 pixels; at most 400000000"):
        decode_image(progressive(6000, 6000, 12), "A")
    assert decode_image(progressive(320, 240, MAX_SCANS), "A").shape == (240, 320, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_pixels_are_limited_in_every_format(suffix: str) -> None:
    data = cv2.imencode(suffix, np.zeros((7000, 7000), np.uint8))[1].tobytes()
    with pytest.raises(ImageError, match="7000x7000 pixels exceeds max_image_pixels = 40000000"):
        decode_image(data, "A")


def test_an_image_of_another_size_than_calibrated_is_refused_before_it_is_decoded() -> None:
    camera = Camera("A", 640, 360, [[500.0, 0, 320], [0, 500, 180], [0, 0, 1]], np.eye(4))
    preprocessor = Preprocessor(ImageConfig())
    data = progressive(4000, 4000, 20)
    began = time.process_time()
    with pytest.raises(ImageError, match="4000x4000 but the calibration is for 640x360"):
        preprocessor.decode(CameraFrame("A", 0, data), camera)
    wide = cv2.imencode(".jpg", np.zeros((1800, 3200), np.uint8))[1].tobytes()
    with pytest.raises(ImageError, match="over 4 times as wide"):
        preprocessor.decode(CameraFrame("A", 0, wide), camera)
    assert time.process_time() - began < 0.5
