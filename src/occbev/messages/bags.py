"""Read and write ROS 2 bags, sqlite3 or MCAP, without ROS; the messages read are counted against the bag's metadata.

The node's offline replay, the player and the sources of training open bags here and nowhere else.
"""

from __future__ import annotations

import heapq
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, TypesysError, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from occbev.files import read_yaml
from occbev.messages import foxglove
from occbev.messages.readers import MessageError, header_stamp, stamp_to_ns
from occbev.messages.storage import Channel, Storage, StorageError, open_storage, unpack_message
from occbev.results import RecordingError

INTERFACES = Path(__file__).parent / "interfaces"
"""Message definitions, one folder per package, written from the field lists of the upstream packages."""

BAG_VERSION: Literal[8] = 8
"""Metadata version that Humble's tools read as well as newer ones."""

STORAGE_NAMES = ("*.mcap", "*.db3", "*.mcap.zst*", "*.db3.zst*")
"""Names of a bag's storage files."""

TF_TYPE = "tf2_msgs/msg/TFMessage"

TF_STATIC = "/tf_static"

_BROKEN = (SerdeError, TypesysError, ValueError, AssertionError, LookupError, TypeError, struct.error, MemoryError)
"""What rosbags raises at bytes that are no message."""


class BagError(RecordingError):
    """A bag that cannot be used; names the file or topic, what was found and what would be right."""


@dataclass(frozen=True)
class BagMessage:
    """One recorded message, still serialised (CDR, or protobuf of foxglove)."""

    topic: str
    type: str
    log_ns: int
    data: bytes


class BagReader:
    """An open bag: every storage file of a bag folder, or one storage file alone.

    topics: topic -> type of ROS 2. encodings: topic -> how its messages are written: cdr, or protobuf of foxglove.
    promised: topic -> messages according to metadata.yaml or the files' own indexes.
    notes: what the user should know, such as that a file is cut.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises BagError, naming the path and what is wrong with it."""
        self.path = Path(path)
        self._stack = ExitStack()
        files, promised = _files_and_promises(self.path)
        self._storages: list[tuple[Path, Storage]] = []
        self.notes: list[str] = []
        for file in files:
            self._open(file)
        channels = [channel for _, storage in self._storages for channel in storage.channels.values()]
        self._channels = {channel.topic: channel for channel in channels}
        self.topics: Mapping[str, str] = {c.topic: foxglove.ROS_TYPE.get(c.type, c.type) for c in channels}
        self.encodings: Mapping[str, str] = {c.topic: c.encoding for c in channels}
        self.promised: Mapping[str, int] = promised if promised is not None else self._counted()
        self._store: Typestore | None = None
        if channels and all(channel.encoding == "ros1" for channel in channels):
            self.close()
            raise BagError(
                f"{path}: holds messages of ROS 1; convert its .bag with `rosbags-convert --src ... --dst ...`"
            )

    def __enter__(self) -> BagReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    @property
    def span_ns(self) -> tuple[int, int]:
        """First and last log time; (0, 0) for an empty bag."""
        spans = [storage.span_ns for _, storage in self._storages if any(storage.counts.values())]
        return (min(first for first, _ in spans), max(last for _, last in spans)) if spans else (0, 0)

    def messages(
        self, topics: Collection[str] | None = None, start: int | None = None, stop: int | None = None
    ) -> Iterator[BagMessage]:
        """Yield messages of the named topics, or of all, in the order of their log times.

        start, stop: log times in ns, from the first to before the second.
        Raises:
            BagError: where the bag is damaged, and at the end of a whole bag, where fewer or more messages came
                than it promises.
        """
        wanted = set(self.topics if topics is None else topics)
        read: Counter[str] = Counter()
        for message in heapq.merge(*(self._of(*one, wanted, start, stop) for one in self._storages), key=_log_ns):
            read[message.topic] += 1
            yield message
        if start is None and stop is None:
            self._check(read, wanted)

    def decode(self, message: BagMessage) -> Any:
        """Return a message as an object with the fields of its ROS type; raises BagError where its bytes are none."""
        channel = self._channels[message.topic]
        try:
            if channel.encoding == "protobuf":
                return foxglove.decode(channel, message.data)
            if channel.encoding != "cdr":
                raise BagError(f"its messages are written as {channel.encoding!r}; cdr and protobuf are read")
            return self._store_of(channel).deserialize_cdr(message.data, message.type)
        except _BROKEN as error:
            reason = str(error) if isinstance(error, (BagError, foxglove.FoxgloveError)) else _described(message, error)
            raise BagError(f"{self.path}: {message.topic}: {reason}") from error

    def stamp_ns(self, message: BagMessage) -> int:
        """Return header.stamp, or that of the first transform; raises BagError without one."""
        if self.encodings[message.topic] == "protobuf":
            return stamp_to_ns(self.decode(message).header.stamp)
        place = 8 if message.type == TF_TYPE else 4  # after the number of transforms
        try:
            return header_stamp(message.data, place)
        except (IndexError, struct.error) as error:
            raise BagError(f"{self.path}: {message.topic}: a message without stamp: {error}") from error

    def _open(self, file: Path) -> None:
        try:
            storage = open_storage(file)
        except (StorageError, OSError, MemoryError) as error:
            self._stack.close()
            raise BagError(f"{file}: {_text(error)}") from error
        self._stack.callback(storage.close)
        self._storages.append((file, storage))
        self.notes += [f"{file.name}: {note}" for note in storage.notes]

    def _counted(self) -> dict[str, int]:
        counted: Counter[str] = Counter(dict.fromkeys(self.topics, 0))
        for _, storage in self._storages:
            for number, count in storage.counts.items():
                if number in storage.channels:
                    counted[storage.channels[number].topic] += count
        return dict(counted)

    def _of(
        self, file: Path, storage: Storage, wanted: set[str], start: int | None, stop: int | None
    ) -> Iterator[BagMessage]:
        channels = {number: channel for number, channel in storage.channels.items() if channel.topic in wanted}
        if not channels:
            return
        try:
            for log_ns, number, data in storage.messages(channels, start, stop):
                topic = channels[number].topic
                yield BagMessage(topic, self.topics[topic], log_ns, unpack_message(data))
        except (StorageError, OSError, struct.error, MemoryError) as error:
            raise BagError(f"{file}: {_text(error)}") from error

    def _check(self, read: Counter[str], wanted: set[str]) -> None:
        for topic in sorted(wanted & set(self.promised)):
            if read[topic] != self.promised[topic]:
                raise BagError(
                    f"{self.path}: {topic}: the bag promises {self.promised[topic]} messages but {read[topic]} were "
                    "read; it is cut or damaged (`ros2 bag reindex` writes its metadata anew)"
                )

    def _store_of(self, channel: Channel) -> Typestore:
        """Return message definitions that know a channel's type: the standard ones, or the bag's own."""
        if channel.type in type_store().fielddefs or not channel.schema or channel.schema_encoding != "ros2msg":
            return type_store()
        self._store = self._store or new_type_store()
        if channel.type not in self._store.fielddefs:
            types = get_types_from_msg(channel.schema.decode("utf-8", "replace"), channel.type)
            self._store.register({name: fields for name, fields in types.items() if name not in self._store.fielddefs})
        return self._store


class BagWriter:
    """Writes serialised messages to a new MCAP bag folder, its chunks packed by zstd; topics are registered as they come.

    latched: topics that a player offers to late comers, too (durability "transient local"); all are reliable.
    """

    def __init__(self, path: Path, latched: Collection[str] = (TF_STATIC,)) -> None:
        """Raises BagError where something is at `path` already."""
        from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer  # 8 MB for who writes

        if path.exists():
            raise BagError(f"{path} exists already; remove it or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.latched = set(latched)
        self._writer = Writer(path, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
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
            connection = self._writer.add_connection(
                message.topic,
                message.type,
                typestore=type_store(),
                offered_qos_profiles=[_offered(message.topic in self.latched)],
            )
            self._connections[message.topic] = connection
        self._writer.write(connection, message.log_ns, message.data)
        self.counts[message.topic] += 1


def serialise(kind: str, *fields: Any) -> bytes:
    """Return the CDR bytes of a message of a standard type from its fields in their order."""
    store = type_store()
    return bytes(store.serialize_cdr(store.types[kind](*fields), kind))


def latched_topics(path: Path) -> set[str]:
    """Return the topics that metadata.yaml of a bag folder says were offered to late comers; /tf_static without one."""
    try:
        entries = read_yaml(path / "metadata.yaml")["rosbag2_bagfile_information"]["topics_with_message_count"]
        qualities = {e["topic_metadata"]["name"]: str(e["topic_metadata"]["offered_qos_profiles"]) for e in entries}
    except (OSError, KeyError, TypeError, ValueError):
        return {TF_STATIC}
    return {TF_STATIC} | {topic for topic, quality in qualities.items() if _LATCHED.search(quality)}


_LATCHED = re.compile(r"durability['\"]?: *['\"]?(1\b|transient_local)")
"""How the texts of quality of service of all versions say "transient local"."""


def _offered(latched: bool) -> Qos:
    forever = QosTime(2_147_483_647, 4_294_967_295)
    durability = QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE
    depth, live = 100 if latched else 10, QosLiveliness.AUTOMATIC
    return Qos(QosHistory.KEEP_LAST, depth, QosReliability.RELIABLE, durability, forever, forever, live, forever, False)


def prepare_decoding(kinds: Iterable[str]) -> None:
    """Make what `decode_message` needs of each type, so that no first message pays for it."""
    for kind in kinds:
        type_store().get_msgdef(kind)


def decode_message(data: bytes, kind: str) -> Any:
    """Return a serialised message of a standard type as an object with its fields, arrays as views of the bytes.

    Raises:
        MessageError: the bytes are no such message.
    """
    try:
        return type_store().deserialize_cdr(data, kind)
    except _BROKEN as error:
        raise MessageError(f"{len(data)} bytes are no {kind}: {_text(error)}") from error


def type_store() -> Typestore:
    """Return the message definitions of the standard packages, vision_msgs and autoware_perception_msgs."""
    if not _STORES:
        _STORES.append(new_type_store())
    return _STORES[0]


def new_type_store() -> Typestore:
    """Return a store of its own with those definitions, to add others to."""
    store = get_typestore(Stores.ROS2_JAZZY)
    for package in ("vision_msgs", "autoware_perception_msgs"):
        types: dict[str, Any] = {}
        for file in sorted((INTERFACES / package / "msg").glob("*.msg")):
            types |= get_types_from_msg(file.read_text(), f"{package}/msg/{file.stem}")
        store.register(types)
    return store


_STORES: list[Typestore] = []

_log_ns = attrgetter("log_ns")


def _described(message: BagMessage, error: BaseException) -> str:
    """Return why bytes are no message."""
    if isinstance(error, TypesysError) or message.type not in type_store().fielddefs:
        return f"{message.type} is not known here, and the bag holds no definition of it that can be read"
    return f"no {message.type}: {type(error).__name__}: {error}"


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _files_and_promises(path: Path) -> tuple[list[Path], dict[str, int] | None]:
    """Find the storage files of a bag, and topic -> message count where metadata.yaml tells it."""
    if not path.exists():
        raise BagError(f"{path}: no such bag")
    if path.is_file():
        return [path], None
    metadata = path / "metadata.yaml"
    if metadata.is_file():
        return _read_metadata(metadata)
    found = sorted({file for pattern in STORAGE_NAMES for file in path.glob(pattern)}, key=split_order)
    if not found:
        raise BagError(f"{path}: holds no metadata.yaml, *.mcap or *.db3, so it is no ROS 2 bag")
    return found, None


def split_order(file: Path) -> tuple[str, int, str]:
    """Sort the parts of one recording by their numbers: drive_2.mcap comes before drive_10.mcap."""
    stem, _, number = file.name.split(".")[0].rpartition("_")
    return (stem, int(number), file.name) if number.isdigit() else (file.name.split(".")[0], -1, file.name)


def _read_metadata(metadata: Path) -> tuple[list[Path], dict[str, int]]:
    try:
        record = read_yaml(metadata)["rosbag2_bagfile_information"]
        promised: Counter[str] = Counter()
        for entry in record["topics_with_message_count"]:
            promised[str(entry["topic_metadata"]["name"])] += int(entry["message_count"])
        files = [_as_stored(metadata.parent / Path(name).name) for name in record["relative_file_paths"]]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BagError(
            f"{metadata}: not the metadata of a bag: {error!r}; remove it to read the files alone"
        ) from error
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise BagError(f"{metadata}: names {absent}, which are not there")
    return files, dict(promised)


def _as_stored(file: Path) -> Path:
    """Return a file as it lies there: packed or unpacked, whichever of the two metadata.yaml names."""
    packed, unpacked = file.with_name(file.name + ".zstd"), file.with_suffix("")
    if file.is_file() or not (packed.is_file() or (file.suffix in (".zstd", ".zst") and unpacked.is_file())):
        return file
    return packed if packed.is_file() else unpacked
