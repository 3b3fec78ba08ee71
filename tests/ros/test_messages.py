"""Incoming messages, made with rosbags' classes from real CDR bytes so that no ROS is needed."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from occbev.geometry import make_transform, rotation_from_rpy
from occbev.messages.readers import (
    MessageError,
    camera_from_info,
    cloud_from_message,
    compressed_from_message,
    image_from_message,
    pose_from_message,
)

typesys = pytest.importorskip("rosbags.typesys", reason="rosbags reads and writes CDR")
STORE = typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)
TYPES = STORE.types
HEADER = TYPES["std_msgs/msg/Header"](TYPES["builtin_interfaces/msg/Time"](5, 6), "cam")


def through_cdr(kind: str, *fields: Any) -> Any:
    """Make a message and send it through the wire format."""
    message = TYPES[kind](*fields)
    return STORE.deserialize_cdr(STORE.serialize_cdr(message, kind), kind)


def image(encoding: str, array: np.ndarray, padding: int = 0, height: int | None = None) -> Any:
    rows = array.reshape(array.shape[0], -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    width = array.shape[1]
    return through_cdr(
        "sensor_msgs/msg/Image", HEADER, height or array.shape[0], width, encoding, 0, rows.shape[1], rows.reshape(-1)
    )


def scene(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("padding", [0, 5])
def test_every_byte_encoding_becomes_rgb(padding: int) -> None:
    rgb = scene()
    alpha = np.full((6, 8, 1), 9, np.uint8)
    cases = {
        "rgb8": rgb,
        "bgr8": rgb[..., ::-1],
        "8UC3": rgb[..., ::-1],
        "rgba8": np.concatenate([rgb, alpha], -1),
        "bgra8": np.concatenate([rgb[..., ::-1], alpha], -1),
    }
    for encoding, array in cases.items():
        np.testing.assert_array_equal(image_from_message(image(encoding, array, padding)), rgb)
    grey = image_from_message(image("mono8", rgb[..., 0], padding))
    np.testing.assert_array_equal(grey, np.repeat(rgb[..., :1], 3, -1))


@pytest.mark.parametrize(
    ("encoding", "pattern"),
    [
        ("bayer_rggb8", "rggb"),
        ("bayer_bggr8", "bggr"),
        ("bayer_gbrg8", "gbrg"),
        ("bayer_grbg8", "grbg"),
    ],
)
def test_bayer_patterns_keep_their_colours(encoding: str, pattern: str) -> None:
    colour = {"r": 200, "g": 120, "b": 30}
    mosaic = np.tile(np.array([colour[c] for c in pattern], np.uint8).reshape(2, 2), (4, 4))
    rgb = image_from_message(image(encoding, mosaic))
    np.testing.assert_allclose(rgb[2:-2, 2:-2].reshape(-1, 3).mean(0), [200, 120, 30], atol=1)


def test_yuv_images_keep_their_brightness() -> None:
    rgb = np.full((4, 8, 3), 0, np.uint8)
    rgb[:, 4:] = 180
    yuv = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV)
    uyvy = np.stack([np.full((4, 8), 128, np.uint8), yuv[..., 0]], -1)
    out = image_from_message(image("yuv422", uyvy))
    assert out.shape == (4, 8, 3)
    assert out[:, 5:].mean() - out[:, :3].mean() > 100
    yuyv = image_from_message(image("yuv422_yuy2", uyvy[..., ::-1]))
    np.testing.assert_array_equal(yuyv, out)
    nv12 = np.concatenate([yuv[..., 0], np.full((2, 8), 128, np.uint8)])
    planar = image_from_message(image("nv12", nv12, height=4))
    np.testing.assert_allclose(planar, out, atol=3)


def test_bad_images_are_named() -> None:
    rgb = scene()
    with pytest.raises(MessageError, match="encoding 'mono16' is not understood; known are rgb8"):
        image_from_message(image("mono16", rgb))
    short = image("rgb8", rgb)
    short.data = short.data[:-10]
    with pytest.raises(MessageError, match="134 bytes, but 6 rows of 24 bytes need 144"):
        image_from_message(short)
    narrow = image("rgb8", rgb)
    narrow.step = 20
    with pytest.raises(MessageError, match="step 20 is shorter than a rgb8 row of 24"):
        image_from_message(narrow)
    huge = image("rgb8", rgb)
    huge.width = huge.height = 60_000
    with pytest.raises(MessageError, match="60000x60000 pixels exceeds max_image_pixels"):
        image_from_message(huge)
    huge.width = 0
    with pytest.raises(MessageError, match="no content"):
        image_from_message(huge)


def compressed(data: bytes, kind: str = "jpeg") -> Any:
    return through_cdr("sensor_msgs/msg/CompressedImage", HEADER, kind, np.frombuffer(data, np.uint8))


def test_compressed_images_are_checked_before_they_are_decoded() -> None:
    for suffix in (".jpg", ".png"):
        data = cv2.imencode(suffix, scene(32, 48))[1].tobytes()
        assert compressed_from_message(compressed(data, "rgb8; jpeg compressed bgr8")) == data
        with pytest.raises(MessageError, match="48x32 pixels exceeds max_image_pixels = 100"):
            compressed_from_message(compressed(data), max_pixels=100)
        with pytest.raises(MessageError, match=r"image header|only JPEG and PNG|no content|cut or damaged"):
            compressed_from_message(compressed(data[:14]))
    with pytest.raises(MessageError, match="only JPEG and PNG"):
        compressed_from_message(compressed(b"GIF89a" + bytes(30), "gif"))


def test_a_jpeg_that_claims_gigapixels_is_refused() -> None:
    data = bytearray(cv2.imencode(".jpg", scene(32, 48))[1].tobytes())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = (65500).to_bytes(2, "big") * 2
    with pytest.raises(MessageError, match="65500x65500"):
        compressed_from_message(compressed(bytes(data)))


def test_a_png_whose_chunks_claim_gigabytes_is_refused() -> None:
    data = bytearray(cv2.imencode(".png", scene(32, 48))[1].tobytes())
    assert compressed_from_message(compressed(bytes(data), "png")) == data
    place = data.index(b"IDAT") - 4
    data[place : place + 4] = (2**31).to_bytes(4, "big")
    with pytest.raises(MessageError, match="b'IDAT' chunk that claims 2147483648"):
        compressed_from_message(compressed(bytes(data), "png"))
    data[12:16] = b"tEXt"
    with pytest.raises(MessageError, match="not with its header"):
        compressed_from_message(compressed(bytes(data), "png"))


def info(
    d: tuple[float, ...] = (),
    model: str = "plumb_bob",
    fx: float = 500.0,
    p_fx: float = 450.0,
    binning: int = 0,
    roi: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Any:
    k = np.array([fx, 0, 320, 0, fx, 240, 0, 0, 1.0])
    p = np.array([p_fx, 0, 310, 0, 0, p_fx, 235, 0, 0, 0, 1.0, 0])
    region = TYPES["sensor_msgs/msg/RegionOfInterest"](*roi, False)
    return through_cdr(
        "sensor_msgs/msg/CameraInfo",
        HEADER,
        480,
        640,
        model,
        np.array(d),
        k,
        np.eye(3).reshape(-1),
        p,
        binning,
        binning,
        region,
    )


CAM2EGO = make_transform(rotation_from_rpy(-np.pi / 2, 0, -np.pi / 2), (1.5, 0, 1.6))


def test_camera_info_chooses_the_right_matrix() -> None:
    raw = camera_from_info("c", info((0.1, 0.01, 0, 0, 0)), CAM2EGO)
    assert (raw.intrinsic[0, 0], raw.distortion_model, len(raw.distortion)) == (500, "plumb_bob", 5)
    rectified = camera_from_info("c", info((0.1, 0.01, 0, 0, 0)), CAM2EGO, rectified=True)
    assert (rectified.intrinsic[0, 0], rectified.distortion_model) == (450, "none")
    plain = camera_from_info("c", info((0.0,) * 5), CAM2EGO)
    assert plain.intrinsic[0, 0] == 450
    without_p = camera_from_info("c", info(p_fx=0.0), CAM2EGO)
    assert without_p.intrinsic[0, 0] == 500
    fisheye = camera_from_info("c", info((0.1, 0, 0, 0), "equidistant"), CAM2EGO)
    assert fisheye.distortion_model == "equidistant"
    ideal = camera_from_info("c", info((0.0,) * 4, "equidistant"), CAM2EGO, rectified=False)
    assert (ideal.intrinsic[0, 0], ideal.lens.is_fisheye) == (500, True)
    straight = camera_from_info("c", info((0.0,) * 5), CAM2EGO, rectified=False)
    assert (straight.intrinsic[0, 0], straight.lens.is_pinhole) == (500, True)


def test_binning_and_region_follow_the_image() -> None:
    binned = camera_from_info("c", info(fx=500, p_fx=500, binning=2), CAM2EGO)
    assert (binned.width, binned.height, binned.intrinsic[0, 0]) == (320, 240, 250)
    cut = camera_from_info("c", info(roi=(100, 50, 200, 300)), CAM2EGO)
    assert (cut.width, cut.height) == (300, 200)
    assert cut.intrinsic[0, 2] == 310 - 100
    assert cut.intrinsic[1, 2] == 235 - 50


def test_useless_camera_info_is_refused() -> None:
    with pytest.raises(MessageError, match="not calibrated"):
        camera_from_info("c", info(fx=0.0, p_fx=0.0), CAM2EGO)
    with pytest.raises(MessageError, match="'omni' is not understood"):
        camera_from_info("c", info((0.1, 0, 0, 0), "omni"), CAM2EGO)
    with pytest.raises(MessageError, match="takes .* coefficients, CameraInfo has 2"):
        camera_from_info("c", info((0.1, 0.2)), CAM2EGO)
    sizeless = info()
    sizeless.width = 0
    with pytest.raises(MessageError, match="size of 0x480"):
        camera_from_info("c", sizeless, CAM2EGO)


def odometry(qw: float = 1.0, x: float = 3.0) -> Any:
    g = "geometry_msgs/msg/"
    pose = TYPES[g + "Pose"](TYPES[g + "Point"](x, 4.0, 5.0), TYPES[g + "Quaternion"](0.0, 0.0, 0.0, qw))
    zero = TYPES[g + "Vector3"](0.0, 0.0, 0.0)
    twist = TYPES[g + "TwistWithCovariance"](TYPES[g + "Twist"](zero, zero), np.zeros(36))
    with_covariance = TYPES[g + "PoseWithCovariance"](pose, np.zeros(36))
    return through_cdr("nav_msgs/msg/Odometry", HEADER, "base_link", with_covariance, twist)


def test_odometry_gives_a_pose_or_says_why_not() -> None:
    np.testing.assert_allclose(pose_from_message(odometry()).child2parent[:3, 3], [3, 4, 5])
    with pytest.raises(MessageError, match="not a unit quaternion"):
        pose_from_message(odometry(qw=0.0))
    with pytest.raises(MessageError, match="not finite"):
        pose_from_message(odometry(x=float("inf")))


def cloud(points: np.ndarray, height: int = 1, padding: int = 0, big: bool = False) -> Any:
    kinds = {"f4": 7, "u1": 2, "u2": 4}
    assert points.dtype.names is not None
    fields = [
        TYPES["sensor_msgs/msg/PointField"](n, points.dtype.fields[n][1], kinds[points.dtype[n].str[1:]], 1)
        for n in points.dtype.names
    ]
    width = len(points) // height
    rows = points.view(np.uint8).reshape(height, -1)
    rows = np.pad(rows, ((0, 0), (0, padding)))
    return through_cdr(
        "sensor_msgs/msg/PointCloud2",
        HEADER,
        height,
        width,
        fields,
        big,
        points.itemsize,
        rows.shape[1],
        rows.reshape(-1),
        True,
    )


def test_clouds_are_read_by_their_fields() -> None:
    dtype = np.dtype(
        {"names": ["x", "y", "ring"], "formats": ["<f4", "<f4", "<u2"], "offsets": [0, 4, 10], "itemsize": 16}
    )
    points = np.zeros(6, dtype)
    points["x"], points["ring"] = np.arange(6), np.arange(6) * 300
    for height, padding in ((1, 0), (2, 4)):
        read = cloud_from_message(cloud(points, height, padding))
        np.testing.assert_array_equal(read["x"], points["x"])
        np.testing.assert_array_equal(read["ring"], points["ring"])
    swapped = points.astype(dtype.newbyteorder(">"))
    np.testing.assert_array_equal(cloud_from_message(cloud(swapped, big=True))["x"], points["x"])
    one_row = cloud(points)
    one_row.row_step = 0  # as some drivers leave it: there is no next row
    np.testing.assert_array_equal(cloud_from_message(one_row), points)
    short = cloud(points)
    short.data = short.data[:-3]
    with pytest.raises(MessageError, match="93 bytes for 1 rows of 6 points"):
        cloud_from_message(short)
