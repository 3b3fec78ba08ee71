"""The frame log: one record for every key time, processed or dropped and why."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from occbev.frame_job import FrameJob

PROCESSED = "processed"


class FrameLog:
    """Counts outcomes and, if it has a file, writes one JSON line for each; safe to use from several threads."""

    def __init__(self, path: str | Path = "") -> None:
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        self._path = ""
        self.open(path)

    def open(self, path: str | Path) -> None:
        """Write to a new file from now on, none for ""; the one of before, closed meanwhile, is continued."""
        self.close()
        mode = "a" if str(path) == self._path else "w"
        self._path = str(path)
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._file = Path(path).open(mode, buffering=1)  # noqa: SIM115 - it lives as long as the node

    def record(self, stamp_ns: int, outcome: str, **details: Any) -> None:
        """Enter what became of one key time; `at_ns`, on the steady clock, tells the passes of a looped bag apart."""
        with self._lock:
            self.outcomes[outcome] += 1
            if self._file is not None:
                now_ns = time.monotonic_ns()
                line = {"stamp_ns": stamp_ns, "outcome": outcome, "at_ns": now_ns, **details}
                self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    @property
    def drops(self) -> dict[str, int]:
        """Reason -> key times that were not processed."""
        return {reason: count for reason, count in self.outcomes.items() if reason != PROCESSED}

    def close(self) -> None:
        """Close the file; counting goes on."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


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
        with self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        return [json.loads(line) for line in data.splitlines()]


def read_frame_log(path: Path) -> list[dict[str, Any]]:
    """Read a whole frame log, nothing where there is no file."""
    return FrameLogReader(path).new()
