"""The same units made here, by processes, on a Ray cluster, after a kill and by tasks of an array: the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")
pytest.importorskip("pyarrow", reason="shards need pyarrow: training environment")

from tests.training.test_pairs import CONFIG, drive

from occbev.files import file_hash
from occbev_training.occupancy.executors import Job, run_jobs
from occbev_training.occupancy.pairs import UnitFailure, join_units, my_share, units_of
from occbev_training.sources.recording import RecordingError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class OpenTraced:
    """Opens a traced drive; with `slow`, key frames take long enough to be killed between."""

    name: str
    slow: float = 0.0
    broken: bool = False
    deadly: bool = False
    fingerprint: str = "traced"

    def keys(self) -> int:
        return 5

    def __call__(self):
        if self.broken:
            raise RecordingError(f"{self.name}: cannot be opened")
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        made = drive(self.name)
        if self.slow:
            frame_set = made.frame_set
            made.frame_set = lambda key: (time.sleep(self.slow), frame_set(key))[1]
        return made


def jobs(slow: float = 0.0) -> list[Job]:
    """Two drives of two units."""
    openers = [OpenTraced("one", slow), OpenTraced("two", slow)]
    return [(opener, unit) for opener in openers for unit in units_of(opener.name, 5, CONFIG.segment)]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """The bytes that this process makes."""
    out = tmp_path_factory.mktemp("here")
    told: list[None] = []
    reports = list(run_jobs(jobs(), out, CONFIG, on_key=lambda: told.append(None)))
    assert [report.samples for report in reports] == [4, 1, 4, 1]
    assert len(told) == 10
    join_units(out, {"train": 1.0})
    return hashes(out)


def test_two_processes_make_the_same_bytes_and_tell_of_every_key(made, tmp_path: Path) -> None:
    told: list[None] = []
    results = list(run_jobs(jobs(), tmp_path, CONFIG, 2, on_key=lambda: told.append(None)))
    assert sum(result.samples for result in results) == 10
    assert len(told) == 10
    join_units(tmp_path, {"train": 1.0})
    assert hashes(tmp_path) == made


def test_tasks_of_an_array_make_the_same_bytes(made, tmp_path: Path) -> None:
    for task in (2, 0, 1):
        list(run_jobs(my_share(jobs(), task, 3), tmp_path, CONFIG))
    join_units(tmp_path, {"train": 1.0})
    assert hashes(tmp_path) == made


def test_a_run_killed_for_good_resumes_to_the_same_bytes(made, tmp_path: Path) -> None:
    """SIGKILL leaves no time to clean up: what is half written must not count."""
    script = (
        "from pathlib import Path; from tests.training.test_executors import *\n"
        f"list(run_jobs(jobs(0.3), Path({str(tmp_path)!r}), CONFIG))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), str(ROOT / "training")])
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 300
    while not ((tmp_path / "one-000000.json").exists() and list(tmp_path.glob(".two*.partial"))):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "two-000000.json").exists()
    kept = (tmp_path / "one-000000-0000.tar").stat().st_mtime_ns
    results = list(run_jobs(jobs(), tmp_path, CONFIG))
    assert [result.samples for result in results] == [4, 1, 4, 1]
    assert (tmp_path / "one-000000-0000.tar").stat().st_mtime_ns == kept, "finished units are not made again"
    join_units(tmp_path, {"train": 1.0})
    assert hashes(tmp_path) == made


def test_a_unit_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    opener = OpenTraced("broken", broken=True)
    work = [(opener, units_of("broken", 5, 4)[0]), *jobs()[:1]]
    failed, report = run_jobs(work, tmp_path, CONFIG)
    assert isinstance(failed, UnitFailure)
    assert failed.reason == "broken: cannot be opened"
    assert report.samples == 4


def test_a_unit_whose_process_dies_does_not_stop_the_others(tmp_path: Path) -> None:
    opener = OpenTraced("deadly", deadly=True)
    results = list(run_jobs([(opener, units_of("deadly", 5, 4)[0]), *jobs()[:1]], tmp_path, CONFIG, 2))
    (failed,) = [result for result in results if isinstance(result, UnitFailure)]
    assert failed.unit.drive == "deadly"
    assert "ended from outside" in failed.reason
    assert [result.samples for result in results if not isinstance(result, UnitFailure)] == [4]


ON_RAY = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from tests.training.test_executors import CONFIG, jobs, run_jobs

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print("started", flush=True)
told = []
results = list(run_jobs(jobs(), Path(sys.argv[1]), CONFIG, executor="ray", ray_address=cluster.address,
                        on_key=lambda: told.append(None)))
print(sum(result.samples for result in results), len(told), ray.is_initialized(), flush=True)
cluster.shutdown()
"""


def test_a_ray_cluster_of_two_workers_makes_the_same_bytes(made, tmp_path: Path) -> None:
    """In a process of its own, so that a cluster that does not come up cannot hold up the other tests."""
    pytest.importorskip("ray", reason="the optional extra ray is not installed")
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), str(ROOT / "training")])
    process = subprocess.Popen(
        [sys.executable, "-c", ON_RAY, str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    if "started" not in output.splitlines():
        pytest.skip(f"Ray brought no cluster up on this machine: {output[-300:]}")
    assert process.returncode == 0, output
    assert "10 10 False" in output.splitlines(), output
    join_units(tmp_path / "out", {"train": 1.0})
    assert hashes(tmp_path / "out") == made
