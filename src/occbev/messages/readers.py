"""Incoming ROS messages to arrays and records, by duck typing: any class with the right fields will do.

Nothing here imports ROS, so the same code reads live messages and those that rosbags decodes. Sizes are
checked before anything is allocated or decoded.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.geometry import pose_from_xyzw
from occbev.lens import COEFFICIENTS
from occbev.messages.image_headers import JPEG_START, MAX_IMAGE_PIXELS, PNG_START, decoding_fault
from occbev.messages.tf import Buffer, TransformException, clean_frame
from occbev.rig import Camera

CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1, "8UC3": 3}
"""Encodings whose pixels are whole bytes -> bytes per pixel. 8UC3 is taken as bgr8, as OpenCV means it."""

TO_RGB = {
    "bgr8": cv2.COLOR_BGR2RGB,
    "8UC3": cv2.COLOR_BGR2RGB,
    "rgba8": cv2.COLOR_RGBA2RGB,
    "bgra8": cv2.COLOR_BGRA2RGB,
    "mono8": cv2.COLOR_GRAY2RGB,
    "8UC1": cv2.COLOR_GRAY2RGB,
}

# OpenCV names a Bayer pattern by the second row's second and third pixel, ROS by the first two rows.
BAYER_TO_RGB = {
    "bayer_rggb8": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr8": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg8": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg8": cv2.COLOR_BayerGB2RGB,
}

YUV_TO_RGB = {
    "yuv422": cv2.COLOR_YUV2RGB_UYVY,
    "uyvy": cv2.COLOR_YUV2RGB_UYVY,
    "yuv422_yuy2": cv2.COLOR_YUV2RGB_YUY2,
    "yuyv": cv2.COLOR_YUV2RGB_YUY2,
}

ENCODINGS = (*CHANNELS, *BAYER_TO_RGB, *YUV_TO_RGB, "nv12")
"""Encodings of raw images that are understood."""

DISTORTION_MODELS = {
    "": "plumb_bob",
    "plumb_bob": "plumb_bob",
    "rational_polynomial": "rational_polynomial",
    "equidistant": "equidistant",
    "fisheye": "equidistant",
    "kannala_brandt": "equidistant",
}
"""CameraInfo's name -> that of a lens."""

FIELD_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
"""PointField.datatype -> numpy's code."""


class MessageError(ValueError):
    """A message that cannot be used; the text says which value and what would be right."""


class EncodingError(MessageError):
    """An image of a kind that is not read, which holds for all images of its topic."""


def header_stamp(data: bytes, at: int = 4) -> int:
    """Read header.stamp, the first field of every stamped message, from its CDR bytes; at: where it begins."""
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, at)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def stamp_to_ns(stamp: Any) -> int:
    """Read a builtin_interfaces Time."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


@dataclass(frozen=True)
class StampedPose:
    """Where one frame was in another: child2parent (4, 4). child: "" where the message names none.

    twist: (6,) velocity and rotation rate of the child frame in its own axes, None where the message holds no finite one.
    """

    stamp_ns: int
    parent: str
    child: str
    child2parent: NDArray[np.float64]
    twist: NDArray[np.float64] | None = None


def read_image(message: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> NDArray[np.uint8] | bytes:
    """Read a CompressedImage as its bytes, an Image as (H, W, 3) RGB; raises MessageError as these two do."""
    read = image_from_message if hasattr(message, "encoding") else compressed_from_message
    return read(message, max_pixels)


def image_from_message(message: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> NDArray[np.uint8]:
    """Read a sensor_msgs/Image as (H, W, 3) uint8 RGB; for rgb8 a view of the message where that is possible.

    Raises:
        MessageError: unknown encoding, a size over `max_pixels`, or fewer bytes than the size needs.
    """
    height, width, step = int(message.height), int(message.width), int(message.step)
    encoding = str(message.encoding)
    if encoding not in ENCODINGS:
        raise EncodingError(f"encoding {encoding!r} is not understood; known are {', '.join(ENCODINGS)}")
    _require_size(width, height, max_pixels)
    data = np.frombuffer(message.data, np.uint8)
    if encoding == "nv12":
        return _nv12(data, width, height, step)
    per_pixel = CHANNELS.get(encoding, 2 if encoding in YUV_TO_RGB else 1)
    rows = _rows(data, height, step, width * per_pixel, encoding)
    if encoding in BAYER_TO_RGB:
        return _convert(np.ascontiguousarray(rows), BAYER_TO_RGB[encoding])
    pixels = rows.reshape(height, width, per_pixel)
    if encoding in YUV_TO_RGB:
        return _convert(np.ascontiguousarray(pixels), YUV_TO_RGB[encoding])
    return pixels if encoding == "rgb8" else _convert(np.ascontiguousarray(pixels), TO_RGB[encoding])


def compressed_from_message(message: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> bytes:
    """Return the JPEG or PNG bytes of a sensor_msgs/CompressedImage, its size checked in the header.

    Raises:
        MessageError: neither JPEG nor PNG, or what `decoding_fault` says.
    """
    stated = str(message.format)
    head = bytes(message.data[:16])
    if not head.startswith((JPEG_START, PNG_START)):
        video = any(kind in stated.lower() for kind in ("264", "265", "hevc", "av1"))
        hint = "; decode video to images with `ros2 run image_transport republish`" if video else ""
        known = not stated or any(kind in stated.lower() for kind in ("jp", "png"))
        raise (MessageError if known else EncodingError)(
            f"format {stated!r} with bytes beginning {head[:8].hex(' ')!r}: only JPEG and PNG are understood{hint}"
        )
    data = bytes(message.data)
    fault = decoding_fault(data, max_pixels)
    if fault is not None:
        raise MessageError(f"format {stated!r}: {fault}")
    if data.startswith(PNG_START):
        _require_sound_chunks(data)
    return data


def camera_from_info(name: str, info: Any, cam2ego: NDArray[np.float64], rectified: bool | None = None) -> Camera:
    """Read a sensor_msgs/CameraInfo.

    rectified: True takes P and no distortion, False K and D, None decides by D: all zero means rectified.
    A fisheye ("equidistant") whose D is zero is therefore one only with False.
    Binning and region of interest are applied, so that the camera fits the image that is sent.
    Raises:
        MessageError: uncalibrated (K is zero), no size, or an unknown distortion model.
    """
    if int(info.width) <= 0 or int(info.height) <= 0:
        raise MessageError(f"CameraInfo states a size of {info.width}x{info.height}; both must be positive")
    k, p = (
        np.array(_field(info, "k")).reshape(3, 3),
        np.array(_field(info, "p")).reshape(3, 4)[:, :3],
    )
    coefficients = tuple(float(v) for v in _field(info, "d"))
    if rectified is None:
        rectified = not any(coefficients)
    intrinsic = p if rectified and p[0, 0] > 0 else k
    if not np.all(np.isfinite(intrinsic)) or intrinsic[0, 0] <= 0 or intrinsic[1, 1] <= 0:
        raise MessageError("CameraInfo holds no focal length (K is zero): the camera is not calibrated")
    model, kept = "none", tuple[float, ...]()
    # Without coefficients a lens is a pinhole; a fisheye is one with zeros as well.
    is_fisheye = DISTORTION_MODELS.get(str(info.distortion_model)) == "equidistant"
    if not rectified and (any(coefficients) or (is_fisheye and coefficients)):
        model, kept = _distortion(str(info.distortion_model), coefficients)
    camera = Camera(name, int(info.width), int(info.height), intrinsic, cam2ego, model, kept)
    return _apply_binning(camera, info)


def calibration_key(info: Any) -> tuple[Any, ...]:
    """Return everything in a CameraInfo that makes its camera: all but the stamp and the rectification matrix."""
    roi = info.roi  # a Foxglove calibration has none
    return (
        info.width,
        info.height,
        info.distortion_model,
        *(tuple(map(float, _field(info, name))) for name in ("k", "p", "d")),
        info.binning_x,
        info.binning_y,
        None if roi is None else (roi.x_offset, roi.y_offset, roi.width, roi.height),
        info.header.frame_id,
    )


def is_calibrated(info: Any) -> bool:
    """Whether a CameraInfo has a size and a focal length; drivers send zeros until their calibration is loaded."""
    k = _field(info, "k")
    return bool(info.width > 0 and info.height > 0 and k[0] > 0 and k[4] > 0)


def is_rectified(topic: str) -> bool | None:
    """Whether an image topic says that its images are rectified: True, or None where its name does not tell."""
    return True if any(part.startswith("rect") for part in re.split("[/_]", topic.lower())) else None


def pose_from_message(message: Any) -> StampedPose:
    """Read an Odometry, a PoseStamped or a PoseWithCovarianceStamped.

    Raises:
        MessageError: not finite, or the quaternion is not of unit length.
    """
    parent = clean_frame(str(message.header.frame_id))
    child = clean_frame(str(getattr(message, "child_frame_id", "")))
    pose, twist = _pose(getattr(message.pose, "pose", message.pose)), None
    if hasattr(message, "twist"):
        linear, angular = message.twist.twist.linear, message.twist.twist.angular
        values = linear.x, linear.y, linear.z, angular.x, angular.y, angular.z
        twist = np.array(values) if all(map(math.isfinite, values)) else None
    return StampedPose(stamp_to_ns(message.header.stamp), parent, child, pose, twist)


def _pose(pose: Any) -> NDArray[np.float64]:
    p, q = pose.position, pose.orientation
    try:
        return pose_from_xyzw((p.x, p.y, p.z), (q.x, q.y, q.z, q.w))
    except ValueError as error:
        raise MessageError(str(error)) from error


def base_pose(pose: StampedPose, base_frame: str, buffer: Buffer) -> NDArray[np.float64]:
    """Return base2global (4, 4) of a pose that may be of another frame of the vehicle, such as base_footprint.

    Raises:
        MessageError: poses in the base frame itself, or no transform joins their frame to it.
    """
    if pose.parent == base_frame:
        raise MessageError(
            f"poses in {base_frame!r} itself do not tell where the vehicle is: header.frame_id must be a fixed frame"
        )
    if pose.child in ("", base_frame):
        return pose.child2parent
    return pose.child2parent @ base_in_child(pose.child, base_frame, buffer)


def base_in_child(child: str, base_frame: str, buffer: Buffer) -> NDArray[np.float64]:
    """Return base2child (4, 4) of the frame that an odometry tells the pose of; raises MessageError."""
    try:
        return buffer.lookup_matrix(child, base_frame, 0)
    except TransformException as error:
        raise MessageError(
            f"child_frame_id {child!r} is not {base_frame!r}, and no transform joins them: {error}"
        ) from error


def base_twist(
    pose: StampedPose, base_frame: str, buffer: Buffer
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return velocity (3,) and rotation rate (3,) of the base frame in its own axes; None where they are not known.

    Raises:
        MessageError: no transform joins the frame of the twist to the base frame.
    """
    if pose.twist is None:
        return None
    velocity, rate = pose.twist[:3], pose.twist[3:]
    if pose.child in ("", base_frame):
        return velocity, rate
    base2child = base_in_child(pose.child, base_frame, buffer)
    child2base = base2child[:3, :3].T
    return child2base @ (velocity + np.cross(rate, base2child[:3, 3])), child2base @ rate


def cloud_from_message(message: Any) -> NDArray[Any]:
    """Read a sensor_msgs/PointCloud2 as a structured array (M,), one field per PointField, without copying.

    Raises:
        MessageError: a field type is unknown, fields do not fit into a point, or the data are shorter than the header
            states.
    """
    order = ">" if message.is_bigendian else "<"
    formats = []
    for entry in message.fields:
        if entry.datatype not in FIELD_TYPES:
            raise MessageError(f"field {entry.name!r} has the unknown datatype {entry.datatype}")
        code = order + FIELD_TYPES[entry.datatype]
        formats.append(code if entry.count <= 1 else (code, (int(entry.count),)))
    layout: Any = {
        "names": [f.name for f in message.fields],
        "formats": formats,
        "offsets": [int(f.offset) for f in message.fields],
        "itemsize": int(message.point_step),
    }
    try:
        dtype = np.dtype(layout)
    except (ValueError, OverflowError) as error:
        fields = [(f.name, f.offset, f.datatype) for f in message.fields]
        raise MessageError(f"no cloud of {message.point_step} bytes a point can have the fields {fields}") from error
    height, width = int(message.height), int(message.width)
    row_step = int(message.row_step) if height > 1 else width * dtype.itemsize  # of one row some drivers leave it at 0
    data = np.frombuffer(message.data, np.uint8)
    if len(data) < height * row_step or row_step < width * dtype.itemsize:
        raise MessageError(
            f"{len(data)} bytes for {height} rows of {width} points, {row_step} bytes a row, {dtype.itemsize} a point"
        )
    rows = data[: height * row_step].reshape(height, row_step)[:, : width * dtype.itemsize]
    return np.ascontiguousarray(rows).reshape(-1).view(dtype)


def points_of_cloud(cloud: NDArray[Any]) -> NDArray[np.float32]:
    """Return the places (M, 3) of a structured cloud (M,); raises MessageError where it has no x, y and z."""
    names = cloud.dtype.names or ()
    absent = [axis for axis in "xyz" if axis not in names]
    if absent:
        raise MessageError(f"a cloud without field {absent}; it has {sorted(names)}")
    return np.stack([cloud[axis] for axis in "xyz"], 1).astype(np.float32)


def _convert(image: NDArray[np.uint8], code: int) -> NDArray[np.uint8]:
    """Change the colour space of a contiguous image."""
    try:
        return np.asarray(cv2.cvtColor(image, code), np.uint8)
    except cv2.error as error:  # such as an odd width where chroma is shared by two columns
        height, width = image.shape[:2]
        raise MessageError(f"an image of {width}x{height} pixels cannot be converted: {error}") from error


def _require_sound_chunks(data: bytes) -> None:
    """Refuse a PNG whose chunks do not fit its bytes: OpenCV allocates what a chunk claims, up to 4 GB.

    Animated ones are refused as well, since their frames have sizes of their own.
    """
    position = len(PNG_START)
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if position == len(PNG_START) and (kind, length) != (b"IHDR", 13):
            raise MessageError(f"a PNG that begins with a {kind!r} chunk of {length} bytes, not with its header")
        if kind == b"acTL":
            raise MessageError("an animated PNG; only still images are understood")
        position += length + 12
        if position > len(data):
            raise MessageError(
                f"a PNG of {len(data)} bytes with a {kind!r} chunk that claims {length}: it is cut or damaged"
            )
        if kind == b"IEND":
            return


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise MessageError(f"an image of {width}x{height} pixels has no content")
    if width * height > max_pixels:
        raise MessageError(f"an image of {width}x{height} pixels exceeds max_image_pixels = {max_pixels}")


def _rows(data: NDArray[np.uint8], height: int, step: int, used: int, encoding: str) -> NDArray[np.uint8]:
    """Return the used part of each row (height, used), a view that skips the padding."""
    if step < used:
        raise MessageError(f"step {step} is shorter than a {encoding} row of {used} bytes")
    if len(data) < height * step - (step - used):
        raise MessageError(f"{len(data)} bytes, but {height} rows of {step} bytes need {height * step}")
    return np.lib.stride_tricks.as_strided(data, (height, used), (step, 1), writeable=False)


def _nv12(data: NDArray[np.uint8], width: int, height: int, step: int) -> NDArray[np.uint8]:
    if width % 2 or height % 2:
        raise MessageError(f"nv12 needs an even size, got {width}x{height}")
    rows = _rows(data, height * 3 // 2, step, width, "nv12")
    return _convert(np.ascontiguousarray(rows), cv2.COLOR_YUV2RGB_NV12)


def _field(info: Any, name: str) -> Any:
    """Read a field that ROS 1 and rosbags spell in capitals."""
    return getattr(info, name) if hasattr(info, name) else getattr(info, name.upper())


def _distortion(model: str, coefficients: tuple[float, ...]) -> tuple[str, tuple[float, ...]]:
    if not re.fullmatch("[a-z_]*", model) or model not in DISTORTION_MODELS:
        known = ", ".join(sorted(set(DISTORTION_MODELS) - {""}))
        raise MessageError(f"distortion model {model!r} is not understood; known are {known}")
    ours = DISTORTION_MODELS[model]
    if len(coefficients) not in COEFFICIENTS[ours]:
        raise MessageError(
            f"distortion model {ours} takes {COEFFICIENTS[ours]} coefficients, CameraInfo has {len(coefficients)}"
        )
    return ours, coefficients


def _apply_binning(camera: Camera, info: Any) -> Camera:
    """Apply CameraInfo's region of interest (in full-resolution pixels), then its binning."""
    roi = getattr(info, "roi", None)
    if roi is not None and roi.width and roi.height:
        camera = camera.resize(1, 1, (roi.x_offset, roi.y_offset), (int(roi.width), int(roi.height)))
    bin_x, bin_y = max(1, int(info.binning_x)), max(1, int(info.binning_y))
    if (bin_x, bin_y) == (1, 1):
        return camera
    return camera.resize(1 / bin_x, 1 / bin_y, (0, 0), (camera.width // bin_x, camera.height // bin_y))
