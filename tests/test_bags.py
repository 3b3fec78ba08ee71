"""Bags are read completely or refused; what is written reads back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("rosbags", reason="reads and writes bags")

from rosbags.rosbag2 import StoragePlugin, Writer

from occbev.messages.bags import BagError, BagMessage, BagReader, BagWriter, decode_message, type_store
from occbev.messages.readers import MessageError

STRING = "std_msgs/msg/String"


def text(value: str) -> bytes:
    store = type_store()
    return bytes(store.serialize_cdr(store.types[STRING](value), STRING))


def make_bag(path: Path, storage: StoragePlugin = StoragePlugin.MCAP, count: int = 6) -> Path:
    with Writer(path, version=8, storage_plugin=storage) as writer:
        connections = [writer.add_connection(t, STRING, typestore=type_store()) for t in ("/a", "/b")]
        for i in range(count):
            writer.write(connections[i % 2], 1000 + i, text(f"number {i}"))
    return path


@pytest.mark.parametrize("storage", list(StoragePlugin))
def test_all_messages_come_in_order(tmp_path: Path, storage: StoragePlugin) -> None:
    folder = make_bag(tmp_path / "bag", storage).rename(tmp_path / "odd #%20[1]? \u00fc bag")
    with BagReader(folder) as bag:
        messages = list(bag.messages())
        assert [m.log_ns for m in messages] == list(range(1000, 1006))
        assert messages[3] == BagMessage("/b", STRING, 1003, text("number 3"))
        assert [m.topic for m in bag.messages(["/a"])] == ["/a"] * 3
        assert bag.topics == {"/a": STRING, "/b": STRING}
        assert bag.span_ns[0] == 1000


def test_a_split_bag_is_merged_by_time(tmp_path: Path) -> None:
    folder = make_bag(tmp_path / "bag")
    other = make_bag(tmp_path / "other")
    (first,) = folder.glob("*.mcap")
    shutil.copy(next(other.glob("*.mcap")), folder / "second.mcap")
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    record = metadata["rosbag2_bagfile_information"]
    record["relative_file_paths"] = [first.name, "second.mcap"]
    for entry in record["topics_with_message_count"]:
        entry["message_count"] *= 2
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    with BagReader(folder) as bag:
        times = [m.log_ns for m in bag.messages()]
    assert times == sorted(times)
    assert len(times) == 12


def test_a_count_that_disagrees_is_refused(tmp_path: Path) -> None:
    folder = make_bag(tmp_path / "bag")
    metadata = (folder / "metadata.yaml").read_text()
    assert "message_count: 3" in metadata
    (folder / "metadata.yaml").write_text(metadata.replace("message_count: 3", "message_count: 4", 1))
    with (
        BagReader(folder) as bag,
        pytest.raises(BagError, match="promises 4 messages but 3 were read"),
    ):
        list(bag.messages())


def test_what_is_no_bag_is_named(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="no such bag"):
        BagReader(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BagError, match=r"no metadata\.yaml"):
        BagReader(tmp_path / "empty")
    (tmp_path / "text.mcap").write_text("not a bag at all")
    with pytest.raises(BagError, match="no readable ROS 2 bag"):
        BagReader(tmp_path / "text.mcap")
    folder = make_bag(tmp_path / "bag")
    next(folder.glob("*.mcap")).unlink()
    with pytest.raises(BagError, match="which are not there"):
        BagReader(folder)


def test_written_messages_read_back_with_their_definitions(tmp_path: Path) -> None:
    sent = [BagMessage("/x", STRING, 5, text("one")), BagMessage("/x", STRING, 6, text("two"))]
    with BagWriter(tmp_path / "out") as writer:
        for message in sent:
            writer.write(message)
    assert writer.counts == {"/x": 2}
    with BagReader(tmp_path / "out") as bag:
        assert list(bag.messages()) == sent
    with pytest.raises(BagError, match="exists already"):
        BagWriter(tmp_path / "out")


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_bags_of_rosbag2_itself_are_read_completely(shared: Path, tmp_path: Path, storage: str) -> None:
    folder = shutil.copytree(shared / "data/rosbag2-talker" / storage, tmp_path / storage)
    with BagReader(folder) as bag:
        messages = list(bag.messages())
    assert len(messages) == 20
    assert sum(m.topic == "/topic" for m in messages) == 10


def test_bytes_of_a_message_are_read_as_the_bag_reads_them_and_others_are_refused() -> None:
    store = type_store()
    header = store.types["std_msgs/msg/Header"](store.types["builtin_interfaces/msg/Time"](3, 4), "front")
    kind = "sensor_msgs/msg/CompressedImage"
    data = bytes(store.serialize_cdr(store.types[kind](header, "jpeg", np.arange(5, dtype=np.uint8)), kind))
    message = decode_message(data, kind)
    assert (message.header.stamp.sec, message.header.frame_id, message.format) == (3, "front", "jpeg")
    assert bytes(message.data) == bytes(range(5))
    for broken in (b"", data[:20]):
        with pytest.raises(MessageError, match=f"{len(broken)} bytes are no {kind}"):
            decode_message(broken, kind)
