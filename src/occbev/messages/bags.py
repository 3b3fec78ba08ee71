"""Read and write ROS 2 bags, sqlite3 or MCAP, without ROS; what was read is held against what the bag promises.

Storage files are opened one by one: joined through metadata.yaml, rosbags yields nothing at all of some bags
that rosbag2 wrote, because it wants the quality of service texts of both to be equal.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.rosbag2.errors import ReaderError
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

INTERFACES = Path(__file__).parent / "interfaces"
"""Message definitions, one folder per package, written from the field lists of the upstream packages."""

BAG_VERSION: Literal[8] = 8
"""Metadata version that Humble's tools read as well as newer ones."""


class BagError(ValueError):
    """A bag that cannot be used; names the file or topic, what was found and what would be right."""


@dataclass(frozen=True)
class BagMessage:
    """One recorded message, still serialised (CDR)."""

    topic: str
    type: str
    log_ns: int
    data: bytes


class BagReader:
    """An open bag folder or storage file.

    topics: topic -> type. promised: topic -> messages according to metadata.yaml or the file's own index.
    """

    def __init__(self, path: Path) -> None:
        """Raises BagError, naming the path and what is wrong with it."""
        self.path = path
        self._stack = ExitStack()
        files, promised = _files_and_promises(path)
        self._readers = []
        try:
            for file in files:
                self._readers.append(self._stack.enter_context(Reader(file)))
        except (ReaderError, OSError, ValueError, AssertionError) as error:
            self._stack.close()
            raise BagError(f"{path}: no readable ROS 2 bag: {error}") from error
        connections = [c for reader in self._readers for c in reader.connections]
        self.topics = {c.topic: c.msgtype for c in connections}
        counted: Counter[str] = Counter()
        for connection in connections:
            counted[connection.topic] += connection.msgcount
        self.promised = promised if promised is not None else dict(counted)

    def __enter__(self) -> BagReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def span_ns(self) -> tuple[int, int]:
        """First and last log time; (0, 0) for an empty bag."""
        filled = [reader for reader in self._readers if reader.message_count]
        if not filled:
            return 0, 0
        return min(r.start_time for r in filled), max(r.end_time for r in filled)

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Yield messages of the named topics, or of all, in the order of their log times.

        Raises:
            BagError: at the end, where fewer or more messages came than the bag promises.
        """
        wanted = set(self.topics if topics is None else topics)
        read: Counter[str] = Counter()
        for message in heapq.merge(*(self._of(reader, wanted) for reader in self._readers), key=_log_ns):
            read[message.topic] += 1
            yield message
        self._check(read, wanted)

    def _of(self, reader: Reader, wanted: set[str]) -> Iterator[BagMessage]:
        connections = [c for c in reader.connections if c.topic in wanted]
        if connections:
            for connection, log_ns, data in reader.messages(connections):
                yield BagMessage(connection.topic, connection.msgtype, log_ns, bytes(data))

    def _check(self, read: Counter[str], wanted: set[str]) -> None:
        for topic in sorted(wanted & set(self.promised)):
            if read[topic] != self.promised[topic]:
                raise BagError(
                    f"{self.path}: {topic}: the bag promises {self.promised[topic]} messages but {read[topic]} were "
                    "read; it is cut or damaged (`ros2 bag reindex` writes its metadata anew)"
                )


class BagWriter:
    """Writes serialised messages to a new MCAP bag folder; topics are registered as they come."""

    def __init__(self, path: Path) -> None:
        """Raises BagError where something is at `path` already."""
        if path.exists():
            raise BagError(f"{path} exists already; remove it or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = Writer(path, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._connections: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, message: BagMessage) -> None:
        """Append one message."""
        connection = self._connections.get(message.topic)
        if connection is None:
            connection = self._writer.add_connection(message.topic, message.type, typestore=type_store())
            self._connections[message.topic] = connection
        self._writer.write(connection, message.log_ns, message.data)
        self.counts[message.topic] += 1


def type_store() -> Typestore:
    """Return the message definitions of the standard packages and vision_msgs."""
    if not _STORES:
        store = get_typestore(Stores.ROS2_JAZZY)
        for file in sorted((INTERFACES / "vision_msgs/msg").glob("*.msg")):
            store.register(get_types_from_msg(file.read_text(), f"vision_msgs/msg/{file.stem}"))
        _STORES.append(store)
    return _STORES[0]


_STORES: list[Typestore] = []

_log_ns = attrgetter("log_ns")


def _files_and_promises(path: Path) -> tuple[list[Path], dict[str, int] | None]:
    """Find the storage files of a bag, and topic -> message count where metadata.yaml tells it."""
    if not path.exists():
        raise BagError(f"{path}: no such bag")
    if path.is_file():
        return [path], None
    metadata = path / "metadata.yaml"
    if not metadata.is_file():
        found = sorted([*path.glob("*.mcap"), *path.glob("*.db3")])
        if not found:
            raise BagError(f"{path}: holds no metadata.yaml, *.mcap or *.db3, so it is no ROS 2 bag")
        return found, None
    try:
        record = yaml.safe_load(metadata.read_text())["rosbag2_bagfile_information"]
        promised: Counter[str] = Counter()
        for entry in record["topics_with_message_count"]:
            promised[entry["topic_metadata"]["name"]] += int(entry["message_count"])
        files = [path / Path(name).name for name in record["relative_file_paths"]]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise BagError(f"{metadata}: not the metadata of a bag: {error!r}") from error
    if str(record.get("compression_mode") or "none").lower() != "none":
        return [path], dict(promised)  # only the joined reader unpacks compressed bags
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise BagError(f"{metadata}: names {absent}, which are not there")
    return files, dict(promised)
