"""The frame log: one record for every key time, processed or dropped and why."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from occbev.frame_job import FrameJob

PROCESSED = "processed"

MAX_BYTES = 64 * 2**20
"""A frame log that has grown beyond this begins anew; the one before stays as FILE.1."""

log = logging.getLogger(__name__)


class FrameLog:
    """Counts outcomes and, if it has a file, writes one JSON line for each; safe to use from several threads."""

    def __init__(self, path: str | Path = "") -> None:
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        self._path, self._bytes = "", 0
        self.problem = ""
        """Why nothing is written any more, "" where all is well."""
        self.open(path)

    def open(self, path: str | Path) -> None:
        """Write to a new file from now on, none for ""; the one of before, closed meanwhile, is continued."""
        self.close()
        self.problem = ""
        mode = "a" if str(path) == self._path else "w"
        self._path = str(path)
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._file, self._bytes = open_lines(path, mode), Path(path).stat().st_size

    def record(self, stamp_ns: int, outcome: str, **details: Any) -> None:
        """Enter what became of one key time; `at_ns`, on the steady clock, tells the passes of a looped bag apart."""
        with self._lock:
            self.outcomes[outcome] += 1
            if self._file is not None:
                now_ns = time.monotonic_ns()
                line = {"stamp_ns": stamp_ns, "outcome": outcome, "at_ns": now_ns, **details}
                self._write(json.dumps(line, separators=(",", ":")) + "\n")

    def _write(self, line: str) -> None:
        """Write a line; where that fails the file is given up with a warning and counting goes on."""
        assert self._file is not None
        try:
            self._file.write(line)
            self._bytes += len(line)
            if self._bytes > MAX_BYTES:
                self._file.close()
                os.replace(self._path, f"{self._path}.1")
                self._file, self._bytes = open_lines(self._path, "w"), 0
        except (OSError, ValueError) as error:
            self.problem = f"frame log {self._path} is not written any more: {error}"
            log.warning("%s", self.problem)
            self._give_up()

    def _give_up(self) -> None:
        """Let go of the file; what it could not write is lost."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None

    @property
    def drops(self) -> dict[str, int]:
        """Reason -> key times that were not processed."""
        return {reason: count for reason, count in self.outcomes.items() if reason != PROCESSED}

    def close(self) -> None:
        """Close the file; counting goes on."""
        with self._lock:
            self._give_up()


def open_lines(path: str | Path, mode: str) -> IO[str]:
    """Open a file that is written line by line."""
    return Path(path).open(mode, buffering=1, encoding="utf-8")


def describe_job(job: FrameJob, stages_ms: Mapping[str, float]) -> dict[str, Any]:
    """Return the details of a processed job: its images, missing cameras, boxes and latencies."""
    assert job.perception is not None
    return {
        "images": dict(job.stamps_ns),
        "cameras": list(job.perception.boxes.cameras),
        "missing": dict(job.perception.missing),
        "motion": job.motion is not None,
        "boxes": len(job.perception.boxes),
        "stages_ms": dict(stages_ms),
        "published_ns": job.published_ns,
    }


class FrameLogReader:
    """Follows a frame log that a node writes."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> list[dict[str, Any]]:
        """Return the lines since the last call, without one that is still being written."""
        if not self._path.exists():
            return []
        data = b""
        if self._path.stat().st_size < self._read:  # it began anew: the rest of the one before is in FILE.1
            data, self._read = self._read_from(Path(f"{self._path}.1"), self._read), 0
        rest = self._read_from(self._path, self._read)
        self._read += len(rest)
        return [json.loads(line) for line in (data + rest).splitlines()]

    @staticmethod
    def _read_from(path: Path, start: int) -> bytes:
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        return data[: data.rfind(b"\n") + 1]


def read_frame_log(path: Path) -> list[dict[str, Any]]:
    """Read a whole frame log, nothing where there is no file."""
    return FrameLogReader(path).new()
