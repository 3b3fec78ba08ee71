"""Protobuf messages of foxglove, as nuscenes2mcap writes them, as objects with the fields of their ROS counterparts.

Needs the optional extra `foxglove` of the training package: mcap-protobuf-support.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from occbev.messages.storage import Channel

ROS_TYPE = {
    "foxglove.CompressedImage": "sensor_msgs/msg/CompressedImage",
    "foxglove.CameraCalibration": "sensor_msgs/msg/CameraInfo",
    "foxglove.PointCloud": "sensor_msgs/msg/PointCloud2",
    "foxglove.FrameTransform": "tf2_msgs/msg/TFMessage",
    "foxglove.PoseInFrame": "geometry_msgs/msg/PoseStamped",
    "foxglove.LocationFix": "sensor_msgs/msg/NavSatFix",
}
"""Message types that are read -> the ROS type whose fields they get. Others keep their own name and stay bytes."""

ROS_DATATYPE = {1: 2, 2: 1, 3: 4, 4: 3, 5: 6, 6: 5, 7: 7, 8: 8}
"""foxglove.NumericType -> sensor_msgs/PointField datatype: signed and unsigned are swapped."""

INSTALL = "pip install 'occbev-training[foxglove]'"


class FoxgloveError(ValueError):
    """A message of foxglove that cannot be read; the text says why, or what to install."""


def decode(channel: Channel, data: bytes) -> Any:
    """Turn protobuf bytes into an object with the fields of the ROS message; raises FoxgloveError."""
    convert = _CONVERT.get(channel.type)
    if convert is None:
        raise FoxgloveError(f"{channel.type} is not read; {', '.join(_CONVERT)} are")
    try:
        return convert(_decoder(channel)(data))
    except FoxgloveError:
        raise
    except Exception as error:  # protobuf's implementations raise exceptions of their own
        raise FoxgloveError(f"no {channel.type}: {type(error).__name__}: {error}") from error


def _decoder(channel: Channel) -> Callable[[bytes], Any]:
    if channel not in _DECODERS:
        try:
            from mcap.records import Schema
            from mcap_protobuf.decoder import DecoderFactory
        except ImportError as error:
            raise FoxgloveError(f"messages of foxglove need mcap-protobuf-support: {INSTALL}") from error
        schema = Schema(1, channel.schema, channel.schema_encoding, channel.type)
        found = DecoderFactory().decoder_for(channel.encoding, schema)
        if found is None:
            raise FoxgloveError(f"{channel.type} in {channel.encoding} with a schema in {channel.schema_encoding!r}")
        _DECODERS[channel] = found
    return _DECODERS[channel]


_DECODERS: dict[Channel, Callable[[bytes], Any]] = {}


def _header(stamp: Any, frame: str) -> SimpleNamespace:
    return SimpleNamespace(stamp=SimpleNamespace(sec=stamp.seconds, nanosec=stamp.nanos), frame_id=frame)


def _image(message: Any) -> SimpleNamespace:
    header = _header(message.timestamp, message.frame_id)
    return SimpleNamespace(header=header, format=message.format, data=message.data)


def _calibration(message: Any) -> SimpleNamespace:
    return SimpleNamespace(
        header=_header(message.timestamp, message.frame_id),
        width=message.width,
        height=message.height,
        distortion_model=message.distortion_model,
        d=np.array(message.D, np.float64),
        k=np.array(message.K, np.float64),
        p=np.array(message.P or np.zeros(12), np.float64),
        binning_x=0,
        binning_y=0,
        roi=None,
    )


def _cloud(message: Any) -> SimpleNamespace:
    fields = [
        SimpleNamespace(name=f.name, offset=f.offset, datatype=ROS_DATATYPE.get(f.type, 0), count=1)
        for f in message.fields
    ]
    data = np.frombuffer(message.data, np.uint8)
    width = len(data) // max(1, message.point_stride)
    return SimpleNamespace(
        header=_header(message.timestamp, message.frame_id),
        height=1,
        width=width,
        fields=fields,
        is_bigendian=False,
        point_step=message.point_stride,
        row_step=len(data),
        data=data,
    )


def _transform(message: Any) -> SimpleNamespace:
    header = _header(message.timestamp, message.parent_frame_id)
    transform = SimpleNamespace(translation=message.translation, rotation=message.rotation)
    stamped = SimpleNamespace(header=header, child_frame_id=message.child_frame_id, transform=transform)
    return SimpleNamespace(header=header, transforms=[stamped])


def _pose(message: Any) -> SimpleNamespace:
    pose = SimpleNamespace(position=message.pose.position, orientation=message.pose.orientation)
    return SimpleNamespace(header=_header(message.timestamp, message.frame_id), pose=pose)


_CONVERT: dict[str, Callable[[Any], SimpleNamespace]] = {
    "foxglove.CompressedImage": _image,
    "foxglove.CameraCalibration": _calibration,
    "foxglove.PointCloud": _cloud,
    "foxglove.FrameTransform": _transform,
    "foxglove.PoseInFrame": _pose,
}
