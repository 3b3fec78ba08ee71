"""The files of ROS 2 bags, MCAP and sqlite3, record by record.

Only the records themselves are trusted: a missing or wrong index, a missing end and unusual QoS texts do no harm, and
the size that a record claims is checked before memory is allocated for it.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import shutil
import sqlite3
import struct
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

from lz4.frame import LZ4FrameDecompressor

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MCAP_START, SQLITE_START, ZSTD_START = b"\x89MCAP0\r\n", b"SQLite format 3\x00", b"\x28\xb5\x2f\xfd"
ROS1_START = b"#ROSBAG"

MAX_CHUNK_BYTES = 192 * 2**20
"""Largest size that a compressed chunk or message may unpack to; rosbag2 writes chunks of one megabyte."""

MAX_GROWTH, FREE_BYTES = 200, 2**30
"""How many times its size a compressed file may unpack to, beyond `FREE_BYTES`."""

CACHE_BYTES = 64 * 2**20
"""Unpacked chunks that stay in memory, since the images of one key frame lie side by side."""

ALWAYS = (0, 2**63 - 1)


class StorageError(ValueError):
    """A file that cannot be read, or only in part; the text says where, and what would help."""


@dataclass(frozen=True)
class Channel:
    """One topic of a file.

    encoding: of its messages, such as cdr. schema_encoding, schema: the definition of its type, empty if none is stored.
    """

    topic: str
    type: str
    encoding: str = "cdr"
    schema_encoding: str = ""
    schema: bytes = b""


class Storage(Protocol):
    """An open file. counts: channel -> messages by the file's own account. notes: what the user should know."""

    channels: Mapping[int, Channel]
    counts: Mapping[int, int]
    span_ns: tuple[int, int]
    notes: list[str]

    def messages(
        self, channels: Collection[int], start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield (log time in ns, channel, encoded message) in the order of log times, from `start` to before `stop`."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_storage(path: Path) -> Storage:
    """Open a file as what its first bytes say it is; raises StorageError."""
    with path.open("rb") as stream:
        head = stream.read(16)
    if head.startswith(MCAP_START):
        return McapFile(path)
    if head == SQLITE_START:
        return SqliteFile(path)
    if head.startswith(ZSTD_START):
        return CompressedFile(path)
    if head.startswith(ROS1_START):
        raise StorageError(f"a bag of ROS 1: `rosbags-convert --src {path.name} --dst {path.stem}` makes one of ROS 2")
    what = f"bytes beginning {head[:8].hex(' ')!r}" if head else "an empty file"
    raise StorageError(f"no readable ROS 2 bag: {what}, neither MCAP nor sqlite3")


def unpack_message(data: bytes) -> bytes:
    """Unpack a message that was compressed by itself; others, which begin with the zero byte of CDR, stay."""
    return _unpack_zstd(data, None) if data.startswith(ZSTD_START) else data


def _unpack_zstd(data: bytes, size: int | None) -> bytes:
    """Unpack zstd of a known or at most the largest size."""
    unpacker = zstd.ZstdDecompressor()
    try:
        made = unpacker.decompress(data, max_length=(MAX_CHUNK_BYTES if size is None else size) + 1)
    except zstd.ZstdError as error:
        raise StorageError(f"cannot be unpacked: {error}") from error
    if len(made) > MAX_CHUNK_BYTES:
        raise StorageError(f"unpacks to more than {MAX_CHUNK_BYTES >> 20} MB")
    if not unpacker.eof and (size is None or len(made) <= size):
        raise StorageError("its compressed bytes end too early")
    return bytes(made)


def _unpack_lz4(data: bytes, size: int) -> bytes:
    try:
        return bytes(LZ4FrameDecompressor().decompress(data, max_length=size + 1))
    except RuntimeError as error:
        raise StorageError(f"cannot be unpacked: {error}") from error


@dataclass(frozen=True)
class _Chunk:
    """Where a chunk's records lie. counts: channel -> messages; None until they are known."""

    place: int
    packed: int
    size: int
    compression: str
    checksum: int
    start: int
    end: int
    counts: Counter[int] | None = None


@dataclass
class _Contents:
    """What the records of an MCAP file say. loose: messages outside chunks as log time, place, size, channel."""

    schemas: dict[int, tuple[str, str, bytes]] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    chunks: list[_Chunk] = field(default_factory=list)
    loose: list[tuple[int, int, int, int]] = field(default_factory=list)
    promised: dict[int, int] | None = None
    profile: str = ""
    cut_at: int | None = None


class McapFile:
    """An MCAP file, whole or cut by a crash."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError where a record cannot be understood."""
        self.path = path
        self.notes: list[str] = []
        self._descriptor = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._descriptor).st_size
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        try:
            self._contents = self._scan()
            self._count()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            self.close()
            raise StorageError(f"holds a record that cannot be understood ({error}); {RECOVER}") from error
        except StorageError:
            self.close()
            raise
        self.channels: Mapping[int, Channel] = self._contents.channels
        promised = self._contents.promised
        self.counts: Mapping[int, int] = self._counted if promised is None else promised
        self.span_ns = self._span()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def messages(
        self, channels: Collection[int], start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield messages in order; raises StorageError at a chunk that is damaged, or at the end for a wrong count."""
        wanted, span = frozenset(channels), (ALWAYS[0] if start is None else start, ALWAYS[1] if stop is None else stop)
        streams = [
            self._of_chunk(chunk, wanted, span) for chunk in self._contents.chunks if _holds(chunk, wanted, span)
        ]
        streams.append(self._of_loose(wanted, span))
        read: Counter[int] = Counter()
        for log_ns, channel, data in heapq.merge(*streams, key=lambda entry: entry[0]):
            if data is not None:
                read[channel] += 1
                yield log_ns, channel, data
        if start is None and stop is None:
            self._hold_against_promises(read, wanted)

    def _hold_against_promises(self, read: Counter[int], wanted: frozenset[int]) -> None:
        for channel in sorted(wanted & set(self.channels)):
            if self.counts.get(channel, 0) != read[channel]:
                raise StorageError(
                    f"{self.channels[channel].topic}: its statistics promise {self.counts.get(channel, 0)} messages, "
                    f"it holds {read[channel]}; {RECOVER}"
                )

    def _scan(self) -> _Contents:
        """Read the head of every record outside chunks."""
        found, place = _Contents(), len(MCAP_START)
        while place < self._size:
            head = self._read(place, 9)
            length = struct.unpack_from("<Q", head, 1)[0] if len(head) == 9 else 0
            if len(head) < 9 or length > self._size - place - 9:
                found.cut_at = place
                break
            if head[0] == FOOTER:
                return found
            self._take(found, head[0], place + 9, length)
            place += 9 + length
        found.cut_at = place if found.cut_at is None else found.cut_at
        return found

    def _take(self, found: _Contents, opcode: int, place: int, length: int) -> None:
        """Book one record."""
        if opcode == CHUNK:
            found.chunks.append(self._chunk(place, length))
        elif opcode == MESSAGE_INDEX and found.chunks:
            channel, size = struct.unpack("<HI", self._read(place, 6))
            counts = found.chunks[-1].counts
            if counts is not None:
                counts[channel] += size // 16
        elif opcode == MESSAGE:
            channel, _, log_ns = struct.unpack("<HIQ", self._read(place, 14))
            found.loose.append((log_ns, place + 22, length - 22, channel))
        elif opcode in (HEADER, SCHEMA, CHANNEL, STATISTICS):
            _book(found, opcode, self._read(place, length))

    def _chunk(self, place: int, length: int) -> _Chunk:
        head = self._read(place, min(length, 64))
        start, end, size, checksum, name = struct.unpack_from("<QQQII", head)
        compression = head[32 : 32 + name].decode()
        packed = struct.unpack_from("<Q", head, 32 + name)[0]
        where = f"its chunk at byte {place - 9}"
        if packed > length - 40 - name:
            raise StorageError(f"{where} claims {packed} bytes in a record of {length}; {RECOVER}")
        if compression and size > MAX_CHUNK_BYTES:
            raise StorageError(
                f"{where} claims to unpack to {size >> 20} MB, {MAX_CHUNK_BYTES >> 20} MB at most are read"
            )
        return _Chunk(place + 40 + name, packed, size, compression, checksum, start, end, Counter())

    def _count(self) -> None:
        """Find channels and counts within chunks where the file's end does not tell them, or tells them wrongly."""
        found = self._contents
        if found.cut_at is not None:
            self.notes.append(
                f"the file is cut at byte {found.cut_at}: what is before is read; `mcap recover {self.path.name} "
                "-o NEW.mcap` makes a whole file of it"
            )
        self._counted = _total(found)
        known = all(channel in found.channels for channel in self._counted)
        if (
            known
            and found.promised is not None
            and dict(self._counted) == {c: n for c, n in found.promised.items() if n}
        ):
            return
        found.chunks = [self._look_into(chunk) for chunk in found.chunks]
        self._counted = _total(found)

    def _look_into(self, chunk: _Chunk) -> _Chunk:
        counts: Counter[int] = Counter()
        for opcode, begin, end, data in _records(self._unpack(chunk)):
            if opcode == MESSAGE:
                counts[struct.unpack_from("<H", data, begin)[0]] += 1
            elif opcode in (SCHEMA, CHANNEL):
                _book(self._contents, opcode, data[begin:end])
        return replace(chunk, counts=counts)

    def _unpack(self, chunk: _Chunk) -> bytes:
        """Return the records of a chunk."""
        if chunk.place in self._cache:
            self._cache.move_to_end(chunk.place)
            return self._cache[chunk.place]
        try:
            data = self._unpacked(chunk)
        except StorageError as error:
            raise StorageError(f"its chunk at byte {chunk.place}: {error}; {RECOVER}") from error
        self._cache[chunk.place] = data
        while len(self._cache) > 1 and sum(map(len, self._cache.values())) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return data

    def _unpacked(self, chunk: _Chunk) -> bytes:
        packed = self._read(chunk.place, chunk.packed)
        if chunk.compression == "":
            data = packed
        elif chunk.compression == "zstd":
            data = _unpack_zstd(packed, chunk.size)
        elif chunk.compression == "lz4":
            data = _unpack_lz4(packed, chunk.size)
        else:
            raise StorageError(f"compression {chunk.compression!r} is not known; lz4 and zstd are")
        if len(data) != chunk.size:
            raise StorageError(f"unpacks to {len(data)} bytes or more, {chunk.size} are claimed")
        if chunk.checksum and crc32(data) != chunk.checksum:
            raise StorageError("its checksum is wrong")
        return data

    def _of_chunk(
        self, chunk: _Chunk, wanted: frozenset[int], span: tuple[int, int]
    ) -> Iterator[tuple[int, int, bytes | None]]:
        yield chunk.start, 0, None  # so that a chunk is unpacked when its time has come
        yield from sorted(self._within(chunk, wanted, span), key=lambda entry: entry[0])

    def _within(self, chunk: _Chunk, wanted: frozenset[int], span: tuple[int, int]) -> Iterator[tuple[int, int, bytes]]:
        for opcode, begin, end, data in _records(self._unpack(chunk)):
            if opcode == MESSAGE:
                channel, _, log_ns = struct.unpack_from("<HIQ", data, begin)
                if channel in wanted and span[0] <= log_ns < span[1]:
                    yield log_ns, channel, data[begin + 22 : end]

    def _of_loose(self, wanted: frozenset[int], span: tuple[int, int]) -> Iterator[tuple[int, int, bytes | None]]:
        for log_ns, place, size, channel in sorted(self._contents.loose):
            if channel in wanted and span[0] <= log_ns < span[1]:
                yield log_ns, channel, self._read(place, size)

    def _span(self) -> tuple[int, int]:
        filled = [chunk for chunk in self._contents.chunks if chunk.counts]
        times = [entry[0] for entry in self._contents.loose]
        ends = [time for chunk in filled for time in (chunk.start, chunk.end)] + times
        return (min(ends), max(ends)) if ends else (0, 0)

    def _read(self, place: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, place)


HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, STATISTICS = 1, 2, 3, 4, 5, 6, 7, 11
"""Opcodes of MCAP's records."""

RECOVER = "`mcap recover FILE -o NEW.mcap` saves what can be saved"


def _holds(chunk: _Chunk, wanted: frozenset[int], span: tuple[int, int]) -> bool:
    inside = chunk.start < span[1] and span[0] <= chunk.end
    return inside and bool(chunk.counts and not wanted.isdisjoint(chunk.counts))


def _total(found: _Contents) -> Counter[int]:
    total = Counter(entry[3] for entry in found.loose)
    for chunk in found.chunks:
        total.update(chunk.counts or {})
    return Counter({channel: count for channel, count in total.items() if count})


def _records(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (opcode, begin, end, data) of each record of a chunk; raises StorageError at one that does not fit."""
    place = 0
    while place < len(data):
        length = struct.unpack_from("<Q", data, place + 1)[0] if place + 9 <= len(data) else len(data)
        begin = place + 9
        if length > len(data) - begin:
            raise StorageError(
                f"a record of its chunk claims {length} bytes, {max(0, len(data) - begin)} are left; {RECOVER}"
            )
        yield data[place], begin, begin + length, data
        place = begin + length


def _book(found: _Contents, opcode: int, record: bytes) -> None:
    """Book a header, schema, channel or statistics record."""
    if opcode == HEADER:
        found.profile = _text(_strings(record, 0, 1)[0])
    elif opcode == SCHEMA:
        number = struct.unpack_from("<H", record)[0]
        kind, written, schema = _strings(record, 2, 3)
        found.schemas[number] = _text(kind), _text(written), schema
    elif opcode == CHANNEL:
        number, schema_number = struct.unpack_from("<HH", record)
        topic, encoding = map(_text, _strings(record, 4, 2))
        name, schema_encoding, schema_data = found.schemas.get(schema_number, ("", "", b""))
        found.channels[number] = Channel(topic, name, encoding, schema_encoding, schema_data)
    else:
        counts = record[46 : 46 + struct.unpack_from("<I", record, 42)[0]]
        found.promised = dict(struct.iter_unpack("<HQ", counts))


def _strings(record: bytes, place: int, count: int) -> list[bytes]:
    """Read strings that follow each other, each after its length."""
    found = []
    for _ in range(count):
        size = struct.unpack_from("<I", record, place)[0]
        found.append(record[place + 4 : place + 4 + size])
        place += 4 + size
    return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


class SqliteFile:
    """A .db3 file. Where a crash left a write-ahead log beside it, a copy of both is read."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError."""
        self.path, self.notes = path, list[str]()
        self._stack = ExitStack()
        try:
            self._database = self._connect(path)
            self._read_tables()
        except (sqlite3.Error, OSError, UnicodeDecodeError, TypeError) as error:
            self.close()
            raise StorageError(f"no readable ROS 2 bag: {error}; {SQLITE_RECOVER}") from error

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def messages(
        self, channels: Collection[int], start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield messages in order; raises StorageError where the file is damaged."""
        wanted = ",".join(str(int(channel)) for channel in channels)
        span = ALWAYS[0] if start is None else start, ALWAYS[1] if stop is None else stop
        query = (
            f"SELECT timestamp, topic_id, data FROM messages WHERE topic_id IN ({wanted}) "
            "AND timestamp >= ? AND timestamp < ? ORDER BY timestamp, id"
        )
        try:
            for log_ns, channel, data in self._database.execute(query, span):
                yield int(log_ns), int(channel), bytes(data)
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise StorageError(f"breaks off while it is read: {error}; {SQLITE_RECOVER}") from error

    def _connect(self, path: Path) -> sqlite3.Connection:
        log = path.with_name(path.name + "-wal")
        options = "?mode=ro&immutable=1"
        if log.is_file() and log.stat().st_size:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            for file in (path, log):
                shutil.copyfile(file, folder / file.name)
            path, options = folder / path.name, ""
            self.notes.append(
                f"{log.name} beside it holds messages of a recording that did not end: they are read, too"
            )
        connection = sqlite3.connect(f"{path.absolute().as_uri()}{options}", uri=True, check_same_thread=False)
        self._stack.callback(connection.close)
        return connection

    def _read_tables(self) -> None:
        topics = self._database.execute("SELECT id, name, type, serialization_format FROM topics").fetchall()
        schemas: dict[str, bytes] = {}
        with contextlib.suppress(sqlite3.Error):  # older files have no such table
            query = "SELECT topic_type, encoded_message_definition FROM message_definitions WHERE encoding = 'ros2msg'"
            schemas = {str(kind): str(text).encode() for kind, text in self._database.execute(query)}
        self.channels: Mapping[int, Channel] = {
            int(number): Channel(str(name), str(kind), str(encoding), "ros2msg", schemas.get(str(kind), b""))
            for number, name, kind, encoding in topics
        }
        query = "SELECT topic_id, count(*), min(timestamp), max(timestamp) FROM messages GROUP BY topic_id"
        rows = self._database.execute(query).fetchall()
        self.counts: Mapping[int, int] = {int(row[0]): int(row[1]) for row in rows}
        self.span_ns = (min(int(row[2]) for row in rows), max(int(row[3]) for row in rows)) if rows else (0, 0)


SQLITE_RECOVER = "`sqlite3 FILE .recover | sqlite3 NEW.db3` saves what can be saved"


class CompressedFile:
    """A storage file that rosbag2 compressed as a whole; it is unpacked into a temporary folder."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError."""
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            inner = open_storage(_unpack_file(path, folder / path.stem))
        except Exception:
            self._stack.close()
            raise
        self._inner: Any = inner
        self.channels, self.counts, self.span_ns, self.notes = inner.channels, inner.counts, inner.span_ns, inner.notes

    def close(self) -> None:
        """Close the file and remove what was unpacked."""
        self._inner.close()
        self._stack.close()

    def messages(
        self, channels: Collection[int], start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield messages in order."""
        yield from self._inner.messages(channels, start, stop)


def _unpack_file(source: Path, target: Path) -> Path:
    """Unpack a zstd file piece by piece."""
    limit, made = max(FREE_BYTES, MAX_GROWTH * source.stat().st_size), 0
    try:
        with zstd.open(source, "rb") as packed, target.open("wb") as stream:
            while block := packed.read(2**22):
                made += len(block)
                if made > limit:
                    raise StorageError(f"unpacks to more than {limit >> 20} MB, {MAX_GROWTH} times its size")
                stream.write(block)
    except (zstd.ZstdError, EOFError) as error:
        raise StorageError(f"cannot be unpacked: {error}; copy it again, or `zstd -d` it by hand") from error
    return target
