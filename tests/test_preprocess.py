"""Network input: pixels, intrinsics and failures of decode, rectify, scale, crop, normalise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest

from occbev.config import ConfigError, ImageConfig
from occbev.geometry import make_transform
from occbev.inference.preprocess import (
    Fit,
    ImageError,
    Preprocessor,
    _scale,
    decode_image,
    network_camera,
)
from occbev.messages.image_headers import jpeg_size
from occbev.results import CameraFrame, FrameSet
from occbev.rig import Camera, CameraRig

SMALL = ImageConfig(width=64, height=32, mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0))
FORWARD = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def camera(name: str = "front", width: int = 640, height: int = 360, **optics: object) -> Camera:
    intrinsic = [[0.8 * width, 0, 0.5 * width], [0, 0.8 * width, 0.55 * height], [0, 0, 1]]
    return Camera(name, width, height, intrinsic, make_transform(FORWARD, [1.5, 0.2, 1.6]), **optics)


def smooth_image(width: int, height: int) -> np.ndarray:
    u, v = np.meshgrid(np.linspace(0, 4, width), np.linspace(0, 3, height))
    return np.stack([127 + 100 * np.sin(u + v), 127 + 90 * np.cos(2 * u), 127 + 80 * np.sin(3 * v)], -1).astype(
        np.uint8
    )


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def blob_at(width: int, height: int, u: float, v: float, sigma: float) -> np.ndarray:
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    spot = 255 * np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * sigma**2))
    return np.repeat(spot[..., None], 3, axis=2).astype(np.uint8)


def centroid(pixels: np.ndarray) -> np.ndarray:
    weight = pixels[..., 0].astype(float)
    columns, rows = np.meshgrid(np.arange(weight.shape[1]) + 0.5, np.arange(weight.shape[0]) + 0.5)
    return np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()


def test_fit_of_the_training_size_equals_the_documented_camera() -> None:
    fitted = network_camera(camera(width=1600, height=900), ImageConfig())
    expected = camera(width=1600, height=900).resize(0.22, 0.22, (0, 70), (352, 128))
    np.testing.assert_allclose(fitted.intrinsic, expected.intrinsic, rtol=1e-12)
    assert Fit.cover(1600, 900, ImageConfig()) == Fit((352, 198), (0, 70))


@pytest.mark.parametrize(("width", "height"), [(640, 360), (1600, 900), (500, 200), (64, 32), (40, 30), (303, 211)])
def test_a_point_stays_on_its_pixel(width: int, height: int) -> None:
    source = camera(width=width, height=height)
    point = np.array([[9.0, -0.4, 1.1]])
    pixel = source.project(point)[0][0]
    pixels, fitted = Preprocessor(SMALL).network_image(blob_at(width, height, *pixel, sigma=width / 25), source)
    assert pixels.shape == (32, 64, 3)
    np.testing.assert_allclose(centroid(pixels), fitted.project(point)[0][0], atol=0.12)


@pytest.mark.parametrize("size", [(800, 450), (640, 480), (817, 461)])
def test_rows_that_are_cut_away_need_not_be_scale(size: tuple[int, int]) -> None:
    config = ImageConfig(width=352, height=128)
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    camera = Camera("c", *size, [[300, 0, 200], [0, 300, 120], [0, 0, 1]], np.eye(4))
    fit = Fit.cover(*size, config)
    whole = _scale(image, fit.scaled)
    pixels, _ = Preprocessor(config).network_image(image, camera)
    np.testing.assert_array_equal(pixels, whole[fit.crop[1] : fit.crop[1] + 128])


def a_picture(width: int, height: int) -> np.ndarray:
    """Shapes with sharp edges and a little noise."""
    random, image = np.random.default_rng(0), np.full((height, width, 3), 90, np.uint8)
    for _ in range(60):
        corner, extent = random.integers(0, (width, height)), random.integers(4, 90, 2)
        colour = random.integers(0, 256, 3).tolist()
        cv2.rectangle(image, corner.tolist(), (corner + extent).tolist(), colour, -1)
    noisy = image + random.normal(0, 2, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(640, 360), (704, 396), (400, 225), (353, 199)])
def test_scaling_by_up_to_two_averages_nearly_as_areas_do(size: tuple[int, int]) -> None:
    image, wanted = a_picture(*size), (352, 198)
    areas = cv2.resize(image, wanted, interpolation=cv2.INTER_AREA).astype(int)
    plain = cv2.resize(image, wanted, interpolation=cv2.INTER_LINEAR).astype(int)
    got = _scale(image, wanted)
    assert np.abs(got - areas).mean() < 1
    assert np.abs(got.mean((0, 1)) - image.mean((0, 1))).max() < 0.5
    if size == (640, 360):
        assert np.abs(got - areas).mean() < 0.7 * np.abs(plain - areas).mean()


def test_a_flat_image_covers_the_height_and_keeps_its_middle_columns() -> None:
    assert Fit.cover(400, 100, SMALL) == Fit((128, 32), (32, 0))


@pytest.mark.parametrize("order", ["rgb", "bgr_swapped"])
def test_a_flat_image_can_be_padded_below_and_keeps_all_columns(order: str) -> None:
    config = replace(SMALL, fit="pad", channel_order=order, mean=(10.0, 20.0, 30.0))
    assert Fit.cover(400, 100, config) == Fit((64, 16), (0, 0))
    assert Fit.cover(64, 64, config) == Fit.cover(64, 64, SMALL)  # nothing to pad
    source = camera(width=400, height=100)
    point = np.array([[9.0, -0.4, 1.1]])
    image = blob_at(400, 100, *source.project(point)[0][0], sigma=8)
    pixels, fitted = Preprocessor(config).network_image(image, source)
    np.testing.assert_allclose(centroid(pixels[:16]), fitted.project(point)[0][0], atol=0.12)
    normalised = Preprocessor(config).normalise(pixels)
    assert not normalised[:, 16:].any()  # the mean colour says nothing
    with pytest.raises(ConfigError, match=r"image\.fit 'stretch'"):
        replace(SMALL, fit="stretch")


@pytest.mark.parametrize(
    ("model", "coefficients"),
    [("plumb_bob", (-0.28, 0.08, 0.001, -0.0005, 0.0)), ("equidistant", (-0.02, 0.005, 0.0, 0.0))],
)
def test_a_distorted_camera_is_rectified(model: str, coefficients: tuple[float, ...]) -> None:
    source = camera(distortion_model=model, distortion=coefficients)
    point_ego = np.array([[6.0, 1.2, 1.0]])
    ray = (source.ego2cam @ np.r_[point_ego[0], 1])[:3]
    half = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    matrix, rest = source.intrinsic - half, (np.zeros(3), np.zeros(3))
    if model == "equidistant":
        seen = cv2.fisheye.projectPoints(ray[None, None], *rest, matrix, np.array(coefficients))[0]
    else:
        seen = cv2.projectPoints(ray[None], *rest, matrix, np.array(coefficients))[0]
    image = blob_at(640, 360, *(seen.ravel() + 0.5), sigma=20)
    pixels, fitted = Preprocessor(SMALL).network_image(image, source)
    ideal = fitted.project(point_ego)[0][0]
    assert np.abs(ideal - seen.ravel() * 0.1 + [0, fitted.height - 36]).max() > 0.3, "distortion must matter here"
    np.testing.assert_allclose(centroid(pixels), ideal, atol=0.25)
    assert fitted.distortion == ()


def test_the_rectification_map_follows_a_new_calibration() -> None:
    preprocessor, image = Preprocessor(SMALL), smooth_image(640, 360)
    first, _ = preprocessor.network_image(image, camera(distortion_model="plumb_bob", distortion=(-0.3, 0, 0, 0, 0)))
    second, _ = preprocessor.network_image(image, camera(distortion_model="plumb_bob", distortion=(0.3, 0, 0, 0, 0)))
    assert np.abs(first.astype(int) - second).max() > 10


@pytest.mark.parametrize("order", ["rgb", "bgr_swapped"])
def test_what_rectification_does_not_see_says_nothing(order: str) -> None:
    config = replace(SMALL, channel_order=order, mean=(10.0, 20.0, 200.0))
    bent = camera(distortion_model="plumb_bob", distortion=(0.6, 0, 0, 0, 0))
    preprocessor = Preprocessor(config)
    pixels, _ = preprocessor.network_image(np.full((360, 640, 3), 90, np.uint8), bent)
    assert not (pixels[0, 0] == 90).all(), "the corner lies outside the image"
    assert not preprocessor.normalise(pixels)[:, 0, 0].any()


def test_normalisation_and_channel_order() -> None:
    pixels = smooth_image(64, 32)
    plain = Preprocessor(SMALL).normalise(pixels)
    expected = (pixels.astype(np.float32) - SMALL.mean) / SMALL.std
    np.testing.assert_allclose(plain, np.moveaxis(expected, -1, 0), rtol=1e-5, atol=1e-5)
    swapped = ImageConfig(64, 32, SMALL.mean, SMALL.std, "bgr_swapped")
    expected = (pixels[..., ::-1].astype(np.float32) - SMALL.mean) / SMALL.std
    np.testing.assert_allclose(
        Preprocessor(swapped).normalise(pixels), np.moveaxis(expected, -1, 0), rtol=1e-5, atol=1e-5
    )


def test_prepare_orders_by_rig_and_marks_missing_cameras() -> None:
    rig = CameraRig((camera("left"), camera("front"), camera("right")))
    frames = {
        "right": CameraFrame("right", 5, jpeg(smooth_image(640, 360))),
        "front": None,
        "left": CameraFrame("left", 3, smooth_image(640, 360)),
    }
    images, valid, network_rig = Preprocessor(SMALL).prepare(FrameSet(5, frames, {"front": "silent"}), rig)
    assert images.shape == (3, 3, 32, 64)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(valid, [1, 0, 1])
    assert not images[1].any()
    assert np.abs(images[0] - images[2]).mean() < 1.0  # JPEG loss only
    assert network_rig.names == rig.names
    assert {(c.width, c.height) for c in network_rig.cameras} == {(64, 32)}


def test_decoding_ahead_in_threads_changes_nothing() -> None:
    rig = CameraRig((camera("left"), camera("right")))
    frames = {name: CameraFrame(name, 1, jpeg(smooth_image(640, 360))) for name in rig.names}
    preprocessor, frame_set = Preprocessor(SMALL), FrameSet(1, frames)
    with ThreadPoolExecutor(2) as pool:
        decoded = preprocessor.decode_all(frame_set, rig, pool)
    assert all(isinstance(frame.image, np.ndarray) for frame in decoded.frames.values() if frame)
    np.testing.assert_array_equal(preprocessor.prepare(decoded, rig)[0], preprocessor.prepare(frame_set, rig)[0])


def test_reduced_decode_is_close_and_keeps_the_intrinsics() -> None:
    image, preprocessor, source = smooth_image(640, 360), Preprocessor(SMALL), camera()
    reduced = decode_image(jpeg(image), "front", (64, 36))
    assert reduced.shape == (90, 160, 3)
    pixels, fitted = preprocessor.network_image(reduced, source)
    full, full_camera = preprocessor.network_image(decode_image(jpeg(image), "front"), source)
    assert np.abs(pixels.astype(int) - full).mean() < 1.5
    np.testing.assert_allclose(fitted.intrinsic, full_camera.intrinsic, atol=1e-12)
    assert decode_image(jpeg(smooth_image(641, 361)), "front", (64, 36)).shape == (361, 641, 3)


def test_oversampling_chooses_the_size_that_is_decoded_and_little_else_changes() -> None:
    data, source = jpeg(smooth_image(640, 360)), camera()
    images, fitted = {}, []
    for oversampling in (1.0, 2.0):
        preprocessor = Preprocessor(replace(SMALL, oversampling=oversampling))
        decoded = preprocessor.decode(CameraFrame("front", 0, data), source)
        shape = {1.0: (45, 80, 3), 2.0: (90, 160, 3)}[oversampling]
        assert isinstance(decoded.image, np.ndarray)
        assert decoded.image.shape == shape, "at least 64 columns, and at least 128"
        images[oversampling], network = preprocessor.network_image(decoded.image, source)
        fitted.append(network.intrinsic)
    assert np.abs(images[1.0].astype(int) - images[2.0]).mean() < 2.0
    np.testing.assert_allclose(*fitted, atol=1e-12)
    with pytest.raises(ConfigError, match=r"image.oversampling 0.5: must be at least 1"):
        replace(SMALL, oversampling=0.5)


def test_a_new_calibration_of_a_camera_holds_at_once() -> None:
    preprocessor, image = Preprocessor(SMALL), smooth_image(640, 360)
    first, other = camera(), replace(camera(), intrinsic=camera().intrinsic + np.diag([50.0, 50.0, 0.0]))
    for source in (first, other, first):
        _, network = preprocessor.network_image(image, source)
        np.testing.assert_array_equal(network.intrinsic, network_camera(source, SMALL).intrinsic)
    frames = FrameSet(0, {"front": CameraFrame("front", 0, image)})
    rigs = [preprocessor.prepare(frames, CameraRig((source,)))[2] for source in (first, first, other)]
    assert rigs[0] is rigs[1], "the rig of the same cameras is the same, its hash is not made again"
    assert rigs[2].hash != rigs[0].hash


def test_a_frame_of_another_size_and_equal_aspect_is_scale() -> None:
    source = camera(width=1280, height=720)
    _, fitted = Preprocessor(SMALL).network_image(smooth_image(640, 360), source)
    np.testing.assert_allclose(fitted.intrinsic, network_camera(source, SMALL).intrinsic, atol=1e-9)


def test_a_cropped_frame_is_refused_with_both_sizes() -> None:
    with pytest.raises(ImageError, match="front.*640x300.*1280x720"):
        Preprocessor(SMALL).network_image(smooth_image(640, 300), camera(width=1280, height=720))
    with pytest.raises(ImageError, match="uint8"):
        Preprocessor(SMALL).network_image(np.zeros((360, 640), np.uint8), camera())


def test_jpeg_size_reads_the_frame_header() -> None:
    assert jpeg_size(jpeg(smooth_image(642, 358))) == (642, 358)
    assert jpeg_size(b"\xff\xd8\xff") is None


def test_png_and_grey_images_decode_to_rgb() -> None:
    image = smooth_image(31, 17)
    png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode_image(png, "front"), image)
    grey = cv2.imencode(".png", image[..., 0])[1].tobytes()
    np.testing.assert_array_equal(decode_image(grey, "front"), np.repeat(image[..., :1], 3, 2))


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_cut_image_is_an_error_naming_the_camera(extension: str, share: float) -> None:
    noisy = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    data = cv2.imencode(extension, noisy)[1].tobytes()
    with pytest.raises(ImageError, match="camera back: .* cut short") as caught:
        decode_image(data[: int(len(data) * share)], "back")
    assert caught.value.camera == "back"


@pytest.mark.parametrize("data", [b"", b"GIF89a.......", b"\xff\xd8\xff\xe0garbage\xff\xd9"])
def test_bytes_that_are_no_image_are_an_error(data: bytes) -> None:
    with pytest.raises(ImageError, match="camera back"):
        decode_image(data, "back")
