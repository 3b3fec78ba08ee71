"""The frame log: rotation, a full disk, and following it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from occbev.streams import frame_log
from occbev.streams.frame_log import FrameLog, FrameLogReader


def test_a_log_that_grew_begins_anew_and_a_reader_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_log, "MAX_BYTES", 1000)
    path = tmp_path / "logs" / "frames.jsonl"
    log, reader, seen = FrameLog(path), FrameLogReader(path), []
    for stamp in range(100):
        log.record(stamp, "processed", note="x" * 20)
        if stamp % 7 == 0:
            seen += reader.new()
    seen += reader.new()
    log.close()
    assert [line["stamp_ns"] for line in seen] == list(range(100))
    assert sorted(file.name for file in path.parent.iterdir()) == ["frames.jsonl", "frames.jsonl.1"]
    assert all(file.stat().st_size < 1100 for file in path.parent.iterdir())


def test_a_full_disk_ends_the_file_not_the_count() -> None:
    log = FrameLog("/dev/full")
    with contextlib.closing(log):
        for stamp in range(3):
            log.record(stamp, "processed")
    assert log.outcomes["processed"] == 3
    assert "/dev/full is not written any more" in log.problem
