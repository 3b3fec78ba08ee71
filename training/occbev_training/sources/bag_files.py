"""Open ROS 2 bags message by message: every storage file of a bag folder, or one file alone.

What was read is compared with the count that the bag promises, since a bag that silently yields less than it
holds would make silent holes in the data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import yaml
from rosbags.rosbag2 import Reader
from rosbags.rosbag2.errors import ReaderError
from rosbags.serde import SerdeError

from occbev.messages.readers import header_stamp
from occbev_training.sources.bag_writer import TYPESTORE
from occbev_training.sources.foxglove import FoxgloveBag, is_foxglove
from occbev_training.sources.recording import RecordingError

TF_TYPE = "tf2_msgs/msg/TFMessage"

_BROKEN = (
    ReaderError,
    OSError,
    ValueError,
    AssertionError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
)
"""What rosbags raises at damaged bytes, beside its own errors."""


class AnyBag(Protocol):
    """An open recording of messages, whatever its container."""

    path: Path

    @property
    def topics(self) -> Mapping[str, str]:
        """Topic -> type."""
        ...

    @property
    def expected(self) -> Mapping[str, int] | None:
        """Topic -> messages that the container promises, None where it does not say."""
        ...

    def messages(
        self, topics: Sequence[str] | None = None, start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[str, int, bytes]]:
        """Yield (topic, log time in ns, encoded message)."""
        ...

    def parse(self, topic: str, data: bytes) -> Any:
        """Turn an encoded message into an object with the fields of the ROS message."""
        ...

    def stamp(self, topic: str, data: bytes) -> int:
        """Return the stamp of an encoded message in ns."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


def open_bag(path: Path | str) -> AnyBag:
    """Open a bag of ROS 2 or an MCAP file of foxglove; raises RecordingError."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.mcap")) if path.is_dir() else []
    if len(files) == 1 and is_foxglove(files[0]):
        return FoxgloveBag(files[0])
    return Bag(path)


def check_counts(bag: AnyBag, read: Mapping[str, int]) -> None:
    """Raise RecordingError where fewer or more messages were read than the bag promises."""
    for topic, count in read.items():
        promised = bag.expected.get(topic) if bag.expected is not None else None
        if promised is not None and promised != count:
            raise RecordingError(
                f"{bag.path}: {topic}: metadata promises {promised} messages, "
                f"{count} were read; the bag is damaged or was cut"
            )


class Bag:
    """An open bag: every storage file of a bag folder, or one storage file alone.

    Storage files are read directly: joined through `metadata.yaml`, bags of ROS 2 itself can yield
    no message at all where the QoS texts of the two differ.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises RecordingError naming the path and what is wrong with it."""
        self.path = Path(path)
        self._stack = ExitStack()
        self.expected: dict[str, int] | None = None
        """Promised messages by topic, or None where there is no metadata."""
        files = self._files()
        self._readers = []
        try:
            for file in files:
                self._readers.append(self._stack.enter_context(Reader(file)))
        except _BROKEN as error:
            self.close()
            raise RecordingError(f"{file}: no readable ROS 2 bag: {str(error) or type(error).__name__}") from error
        self.topics: Mapping[str, str] = {c.topic: c.msgtype for reader in self._readers for c in reader.connections}

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def messages(
        self, topics: Sequence[str] | None = None, start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[str, int, bytes]]:
        """Yield (topic, log time in ns, CDR bytes) of the named topics, or of all, file after file."""
        for reader in self._readers:
            wanted = [c for c in reader.connections if topics is None or c.topic in topics]
            if not wanted or _outside(reader, start, stop):
                continue
            try:
                for connection, log_ns, data in reader.messages(wanted, start, stop):
                    yield connection.topic, log_ns, bytes(data)
            except _BROKEN as error:
                raise RecordingError(
                    f"{self.path}: breaks off while it is read: {type(error).__name__}: {error}"
                ) from error

    def parse(self, topic: str, data: bytes) -> Any:
        """Turn CDR bytes into a message object; raises RecordingError where they are none."""
        try:
            return TYPESTORE.deserialize_cdr(data, self.topics[topic])
        except (*_BROKEN, SerdeError) as error:
            raise RecordingError(
                f"{self.path}: {topic}: no {self.topics[topic]}: {type(error).__name__}: {error}"
            ) from error

    def stamp(self, topic: str, data: bytes) -> int:
        """Read header.stamp in ns, or that of the first transform; raises RecordingError without one."""
        at = 8 if self.topics[topic] == TF_TYPE else 4  # after the number of transforms
        try:
            return header_stamp(data, at)
        except (IndexError, struct.error) as error:
            raise RecordingError(f"{self.path}: {topic}: a message without stamp: {error}") from error

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise RecordingError(f"{self.path}: no such bag")
        if self.path.is_file():
            return [self.path]
        metadata = self.path / "metadata.yaml"
        if not metadata.is_file():
            found = sorted([*self.path.glob("*.mcap"), *self.path.glob("*.db3")])
            if not found:
                raise RecordingError(f"{self.path}: no metadata.yaml, *.mcap or *.db3 in it, so it is no bag folder")
            return found
        return self._read_metadata(metadata)

    def _read_metadata(self, metadata: Path) -> list[Path]:
        try:
            record = yaml.safe_load(metadata.read_text())["rosbag2_bagfile_information"]
            self.expected = {
                entry["topic_metadata"]["name"]: int(entry["message_count"])
                for entry in record["topics_with_message_count"]
            }
            names = [Path(name).name for name in record["relative_file_paths"]]
            compressed = record.get("compression_mode", "")
        except (yaml.YAMLError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordingError(f"{metadata}: not the metadata of a bag: {error}") from error
        if compressed and compressed.lower() != "none":
            return [self.path]  # only the joined reader unpacks compressed bags
        absent = [name for name in names if not (self.path / name).is_file()]
        if absent:
            raise RecordingError(f"{metadata}: names {absent}, which are not there")
        return [self.path / name for name in names]


def _outside(reader: Reader, start: int | None, stop: int | None) -> bool:
    return (start is not None and reader.end_time <= start) or (stop is not None and reader.start_time >= stop)
