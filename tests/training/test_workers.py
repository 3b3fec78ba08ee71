"""Worker processes end with the process that started them, and builders that share a folder do not meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from occbev.files import partial_path, remove_abandoned, replace_file

ROOT = Path(__file__).parents[2]

PARENT = """
import os, sys, time
from pathlib import Path
from occbev_training.workers import start_workers

def work(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    with start_workers(2) as pool:
        jobs = [pool.submit(work, sys.argv[1]) for _ in range(2)]
        [job.result() for job in jobs]
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc, which is not there")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL leaves the parent no time to tell them."""
    pytest.importorskip("cv2", reason="workers keep OpenCV to one thread")
    script, started = tmp_path / "parent.py", tmp_path / "started"
    script.write_text(PARENT)
    started.mkdir()
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "training")])
    parent = subprocess.Popen([sys.executable, script, started], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while len(workers := [int(entry.name) for entry in started.iterdir()]) < 2:
        assert parent.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    assert parent.wait() == -signal.SIGKILL
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_write_one_file_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard.tar"
    with replace_file(path) as mine:
        mine.write_text("mine")
        with monkeypatch.context() as other_process:
            other_process.setattr(os, "getpid", lambda: 1)
            with replace_file(path) as other:
                other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_partial_files_of_processes_that_are_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive = partial_path(tmp_path / "one-000000-0000.tar")
    monkeypatch.setattr(os, "getpid", lambda: gone.pid)
    left, of_another_unit = (partial_path(tmp_path / name) for name in ("one-000000-0001.tar", "two-000000-0000.tar"))
    for path in (alive, left, of_another_unit):
        path.touch()
    remove_abandoned(tmp_path, "one-000000")
    assert sorted(tmp_path.iterdir()) == sorted([alive, of_another_unit])
