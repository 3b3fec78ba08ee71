"""MCAP files with foxglove's protobuf messages, as nuscenes2mcap writes them, read like bags of ROS 2.

Needs the optional extra `foxglove`. Messages become objects with the fields of their ROS counterparts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from occbev_training.sources.recording import RecordingError

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

_MAGIC = b"\x89MCAP0\r\n"


def is_foxglove(path: Path) -> bool:
    """Tell whether a file is an MCAP whose profile is not that of ROS 2, from its first bytes."""
    if path.suffix != ".mcap" or not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head.startswith(_MAGIC) or len(head) < 21 or head[8] != 1:
        return False
    length = int.from_bytes(head[17:21], "little")
    return head[21 : 21 + length] in (b"", b"foxglove")


class FoxgloveBag:
    """One MCAP file with protobuf messages, with the interface of `bags.Bag`."""

    def __init__(self, path: Path) -> None:
        """Raises RecordingError naming the path and what is wrong, or what to install."""
        self.path = path
        self.expected: dict[str, int] | None = None
        self._stack = ExitStack()
        try:
            from mcap.exceptions import McapError
            from mcap.reader import make_reader
            from mcap_protobuf.decoder import DecoderFactory
        except ImportError as error:
            raise RecordingError(
                f"{path}: holds protobuf messages of foxglove, which need the packages mcap and "
                "mcap-protobuf-support: pip install 'occbev-training[foxglove]'"
            ) from error
        try:
            stream = self._stack.enter_context(path.open("rb"))
            self._reader = make_reader(stream)
            summary = self._reader.get_summary()
        except (McapError, OSError, ValueError) as error:
            self.close()
            raise RecordingError(f"{path}: no readable MCAP: {error}") from error
        if summary is None:
            self.close()
            raise RecordingError(f"{path}: has no summary section: the file was cut off")
        self._decoder = DecoderFactory()
        self._schema = {c.topic: summary.schemas.get(c.schema_id) for c in summary.channels.values()}
        self._encoding = {c.topic: c.message_encoding for c in summary.channels.values()}
        names = {topic: "" if s is None else s.name for topic, s in self._schema.items()}
        self.topics: Mapping[str, str] = {t: ROS_TYPE.get(name, name) for t, name in names.items()}
        if summary.statistics is not None:
            counts = summary.statistics.channel_message_counts
            self.expected = {c.topic: counts.get(i, 0) for i, c in summary.channels.items()}

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def messages(
        self, topics: Sequence[str] | None = None, start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[str, int, bytes]]:
        """Yield (topic, log time in ns, protobuf bytes) in log order."""
        found = self._reader.iter_messages(topics, starting_at=start, ending_before=stop)
        while True:
            try:
                _, channel, message = next(found)
            except StopIteration:
                return
            except Exception as error:  # every decompressor has exceptions of its own
                raise RecordingError(
                    f"{self.path}: breaks off while it is read: {type(error).__name__}: {error}"
                ) from error
            yield channel.topic, message.log_time, message.data

    def parse(self, topic: str, data: bytes) -> Any:
        """Turn protobuf bytes into an object with the fields of the ROS message."""
        schema = self._schema[topic]
        decode = self._decoder.decoder_for(self._encoding[topic], schema)
        if schema is None or decode is None or schema.name not in _CONVERT:
            raise RecordingError(f"{self.path}: {topic}: {self.topics[topic]} is not read")
        try:
            return _CONVERT[schema.name](decode(data))
        except Exception as error:  # protobuf's implementations raise exceptions of their own
            raise RecordingError(f"{self.path}: {topic}: no {schema.name}: {type(error).__name__}: {error}") from error

    def stamp(self, topic: str, data: bytes) -> int:
        """Return the message's own stamp in ns."""
        header = self.parse(topic, data).header.stamp
        return int(header.sec) * 1_000_000_000 + int(header.nanosec)


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
        distortion_model=message.distortion_model or "plumb_bob",
        d=np.array(message.D, np.float64),
        k=np.array(message.K, np.float64),
        p=np.array(message.P or np.zeros(12), np.float64),
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


_CONVERT = {
    "foxglove.CompressedImage": _image,
    "foxglove.CameraCalibration": _calibration,
    "foxglove.PointCloud": _cloud,
    "foxglove.FrameTransform": _transform,
    "foxglove.PoseInFrame": _pose,
}
