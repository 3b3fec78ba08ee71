"""Containers of bags: packed, cut, split, without or with a wrong index. Each is read, or the remedy is named."""

from __future__ import annotations

import shutil
import sqlite3
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("rosbags", reason="reads and writes bags")

from lz4.frame import compress as lz4_compress
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from occbev.messages.bags import BagError, BagReader, type_store
from occbev.messages.storage import CHUNK, MAX_CHUNK_BYTES, MCAP_START
from occbev_training.sources.discovery import find_recordings

STRING = "std_msgs/msg/String"
STORAGES = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}
SHORT_QOS = "- history: 3\n  depth: 0\n  reliability: 1\n  durability: 2\n"


def text(value: str) -> bytes:
    return bytes(type_store().serialize_cdr(type_store().types[STRING](value), STRING))


def make_bag(path: Path, storage: str = "mcap", packed: str = "", first: int = 0, count: int = 40) -> Path:
    writer = Writer(path, version=8, storage_plugin=STORAGES[storage])
    if packed:
        writer.set_compression(CompressionMode[packed.upper()], CompressionFormat.ZSTD)
    with writer:
        known = [writer.add_connection(topic, STRING, typestore=type_store()) for topic in ("/a", "/b")]
        for i in range(first, first + count):
            writer.write(known[i % 2], 1000 + i, text(f"{i} " * 500))
    return path


def read(path: Path) -> list[int]:
    with BagReader(path) as bag:
        return [int(bag.decode(message).data.split()[0]) for message in bag.messages()]


def edit_metadata(path: Path, **changes: object) -> None:
    file = path / "metadata.yaml"
    document = yaml.safe_load(file.read_text())
    document["rosbag2_bagfile_information"].update(changes)
    file.write_text(yaml.safe_dump(document))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("packed", ["file", "message"])
def test_packed_bags_are_read_whatever_the_texts_of_quality_say(tmp_path: Path, storage: str, packed: str) -> None:
    path = make_bag(tmp_path / "bag", storage, packed)
    file = path / "metadata.yaml"
    record = yaml.safe_load(file.read_text())
    for entry in record["rosbag2_bagfile_information"]["topics_with_message_count"]:
        entry["topic_metadata"]["offered_qos_profiles"] = SHORT_QOS
    file.write_text(yaml.safe_dump(record))
    assert read(path) == list(range(40))
    if packed == "file":
        (alone,) = path.glob("*.zstd")
        assert read(alone) == list(range(40))


def test_a_quality_of_service_with_fewer_keys_than_usual_costs_nothing(tmp_path: Path) -> None:
    path = make_bag(tmp_path / "bag", "sqlite3")
    (file,) = path.glob("*.db3")
    with sqlite3.connect(file) as database:
        database.execute("UPDATE topics SET offered_qos_profiles = ?", (SHORT_QOS,))
    assert read(path) == read(file) == list(range(40))


def records(path: Path) -> list[tuple[int, int, int]]:
    """Opcode, place and length of each record outside chunks."""
    data, place, found = path.read_bytes(), len(MCAP_START), []
    while place + 9 <= len(data) and data[place:] != MCAP_START:
        length = struct.unpack_from("<Q", data, place + 1)[0]
        found.append((data[place], place, length))
        place += 9 + length
    return found


@pytest.fixture
def mcap(tmp_path: Path) -> Path:
    """An MCAP file of several chunks, alone."""
    chunks = []
    for part in range(4):
        folder = make_bag(tmp_path / f"part{part}", first=10 * part, count=10)
        (file,) = folder.glob("*.mcap")
        data = file.read_bytes()
        entries = records(file)
        chunk = next(i for i, entry in enumerate(entries) if entry[0] == CHUNK)
        end = next(place for opcode, place, _ in entries[chunk + 1 :] if opcode != 7)
        chunks.append(data[entries[chunk][1] : end])
    made = data[: entries[chunk][1]] + b"".join(chunks) + data[end:]
    path = tmp_path / "drive.mcap"
    path.write_bytes(made)
    return path


def test_an_index_that_lies_is_not_believed(mcap: Path) -> None:
    """The index knows the last part's chunk alone, and at another place; the statistics promise ten messages."""
    with pytest.raises(BagError, match=r"/a: its statistics promise 5 messages, it holds 20; `mcap recover"):
        read(mcap)
    whole = b"".join(
        mcap.read_bytes()[place : place + 9 + length] for opcode, place, length in records(mcap) if opcode != 11
    )
    mcap.write_bytes(MCAP_START + whole + MCAP_START)
    assert read(mcap) == list(range(40))


def test_a_recording_that_a_crash_cut_is_read_up_to_the_cut(mcap: Path) -> None:
    entries = [entry for entry in records(mcap) if entry[0] == CHUNK]
    mcap.write_bytes(mcap.read_bytes()[: entries[3][1] + 100])
    assert read(mcap) == list(range(30))
    with BagReader(mcap) as bag:
        assert bag.promised == {"/a": 15, "/b": 15}
        (note,) = bag.notes
    assert note.startswith(
        f"drive.mcap: the file is cut at byte {entries[3][1]}: what is before is read; `mcap recover"
    )


def test_a_write_ahead_log_that_a_crash_left_is_read(tmp_path: Path) -> None:
    path = make_bag(tmp_path / "bag", "sqlite3")
    (file,) = path.glob("*.db3")
    database = sqlite3.connect(file)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA wal_autocheckpoint = 0")
    database.execute("INSERT INTO messages (topic_id, timestamp, data) VALUES (1, 2000, ?)", (text("40 "),))
    database.commit()
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for name in (file.name, file.name + "-wal"):
        shutil.copy(path / name, crashed / name)
    database.close()
    assert read(crashed) == list(range(41))
    assert sorted(entry.name for entry in crashed.iterdir()) == [file.name, file.name + "-wal"], "nothing is changed"


def test_a_profile_that_is_empty_is_one_of_ros_2_by_its_messages(mcap: Path) -> None:
    data = bytearray(mcap.read_bytes())
    place = data.index(b"ros2")
    whole = data[:8] + data[8:9] + struct.pack("<Q", struct.unpack_from("<Q", data, 9)[0] - 4)
    whole += struct.pack("<I", 0) + data[place + 4 :]
    cut = whole[: next(p for o, p, _ in records(mcap) if o == 15) - 4]  # its places are all four bytes off
    mcap.write_bytes(bytes(cut))
    assert read(mcap) == list(range(40))


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_chunk_that_claims_more_is_refused_before_it_is_made(tmp_path: Path, compression: str) -> None:
    """Small files that unpack to 4 GB; a process that may have 1 GB of memory refuses them all."""
    for claim in (2**32, 1000):
        bomb = lz4_compress(bytes(2**26)) if compression == "lz4" else zstd_of(2**26)
        name = compression.encode()
        chunk = struct.pack("<QQQI", 0, 1, claim, 0) + struct.pack("<I", len(name)) + name
        chunk += struct.pack("<Q", len(bomb)) + bomb
        path = tmp_path / f"{claim}.mcap"
        head = struct.pack("<BQ", 1, 12) + struct.pack("<I4sI", 4, b"ros2", 0)
        path.write_bytes(MCAP_START + head + struct.pack("<BQ", CHUNK, len(chunk)) + chunk)
        program = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, ({MAX_CHUNK_BYTES * 5}, {MAX_CHUNK_BYTES * 5}))
from occbev.messages.bags import BagError, BagReader
try:
    BagReader({str(path)!r})
except BagError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert "claims to unpack to 4096 MB" in done.stdout or "unpacks to 1001 bytes or more" in done.stdout, done


def zstd_of(size: int) -> bytes:
    from occbev.messages.storage import zstd

    return bytes(zstd.compress(bytes(size)))


def test_a_damaged_chunk_is_named(mcap: Path) -> None:
    data = bytearray(mcap.read_bytes())
    _, place, length = next(entry for entry in records(mcap) if entry[0] == CHUNK)
    data[place + 9 + length - 30] ^= 255
    struct.pack_into("<I", data, place + 9 + 24, zlib.crc32(b"another"))
    mcap.write_bytes(bytes(data))
    with pytest.raises(BagError, match=r"drive.mcap: its chunk at byte \d+: .*; `mcap recover"):
        read(mcap)


def test_splits_are_one_recording_with_or_without_metadata(tmp_path: Path) -> None:
    folder = make_bag(tmp_path / "drive")
    (first,) = folder.glob("*.mcap")
    first.rename(folder / "drive_0.mcap")
    for number in range(1, 12):
        (file,) = make_bag(tmp_path / f"other{number}", first=40 * number).glob("*.mcap")
        shutil.copy(file, folder / f"drive_{number}.mcap")
        shutil.rmtree(file.parent)
    (folder / "metadata.yaml").unlink()
    assert read(folder) == list(range(480))
    assert [opener.name for opener in find_recordings(tmp_path)] == ["drive"]
    (folder / "extra.mcap").write_bytes((folder / "drive_0.mcap").read_bytes())
    assert len(find_recordings(tmp_path)) == 13, "with a file of another name each is one of its own"


def test_files_that_metadata_names_packed_or_unpacked_are_found(tmp_path: Path) -> None:
    path = make_bag(tmp_path / "bag", packed="file")
    (file,) = path.glob("*.zstd")
    edit_metadata(path, relative_file_paths=[file.stem])
    assert read(path) == list(range(40))


def test_what_is_not_read_is_named_with_its_remedy(tmp_path: Path) -> None:
    old = tmp_path / "drive.bag"
    old.write_bytes(b"#ROSBAG V2.0\n" + bytes(100))
    with pytest.raises(BagError, match=r"a bag of ROS 1: `rosbags-convert --src drive.bag --dst drive`"):
        BagReader(old)
    assert [opener.name for opener in find_recordings(tmp_path)] == ["drive.bag"]
    (tmp_path / "empty.mcap").touch()
    with pytest.raises(BagError, match="an empty file"):
        BagReader(tmp_path / "empty.mcap")


def test_types_that_a_bag_defines_itself_are_decoded(tmp_path: Path) -> None:
    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg("string name\nint32[] counts\n", "own_msgs/msg/Found"))
    for storage in STORAGES:
        with Writer(tmp_path / storage, version=8, storage_plugin=STORAGES[storage]) as writer:
            connection = writer.add_connection("/found", "own_msgs/msg/Found", typestore=store)
            made = store.types["own_msgs/msg/Found"]("cars", np.array([3, 4], np.int32))
            writer.write(connection, 1, store.serialize_cdr(made, "own_msgs/msg/Found"))
        with BagReader(tmp_path / storage) as bag:
            (message,) = bag.messages()
            assert bag.decode(message).counts.tolist() == [3, 4]


def test_reading_leaves_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    bag = make_bag(tmp_path / "bag", packed="file")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    assert len(read(bag)) == 40
    assert list((tmp_path / "scratch").iterdir()) == []
