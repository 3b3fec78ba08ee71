"""Who makes the units of work: this process, local processes, or a Ray cluster; the result is the same bytes."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from occbev.trajectory import PoseError
from occbev_training.data.shards import ShardError
from occbev_training.occupancy.pairs import PairConfig, Unit, UnitFailure, UnitReport, make_unit
from occbev_training.sources.discovery import Opener
from occbev_training.sources.recording import RecordingError

logger = logging.getLogger(__name__)

Job = tuple[Opener, Unit]
Result = UnitReport | UnitFailure

EXECUTORS = ("local", "ray")


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    config: PairConfig,
    workers: int = 1,
    executor: str = "local",
    ray_address: str | None = None,
    on_key: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Make units and yield what became of each, in the order in which they end.

    on_key: called in this process for every key frame that is done; on Ray, for all of a unit at its end.
    A unit that fails because of its recording is reported; the others go on.
    """
    if executor == "ray":
        yield from _on_ray(jobs, out, config, workers, ray_address, on_key)
    elif workers <= 1:
        yield from (make_job(job, out, config, on_key) for job in jobs)
    else:
        yield from _in_processes(jobs, out, config, workers, on_key)


def make_job(job: Job, out: Path, config: PairConfig, on_key: Callable[[], None] = lambda: None) -> Result:
    """Make one unit in this process."""
    opener, unit = job
    try:
        recording = opener()
        unit = replace(unit, last=min(unit.last, len(recording.key_stamp_ns)))
        return make_unit(recording, unit, out, config, on_key, opener.fingerprint)
    except (RecordingError, PoseError, ShardError) as error:
        logger.warning("%s: %s", unit.name, error)
        return UnitFailure(unit, str(error))


def _in_processes(
    jobs: Sequence[Job], out: Path, config: PairConfig, workers: int, on_key: Callable[[], None]
) -> Iterator[Result]:
    """Run the jobs in fresh interpreters, which tell of every key frame over a queue."""
    context = get_context("spawn")
    told = context.Queue()
    with ProcessPoolExecutor(workers, context, _begin, (told,)) as pool:
        open_jobs: set[Future[Result]] = {pool.submit(_run_job_and_report, job, out, config) for job in jobs}
        try:
            while open_jobs:
                done, open_jobs = wait(open_jobs, 0.2, FIRST_COMPLETED)
                _pass_on(told, on_key)
                for future in done:
                    yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _pass_on(told, on_key)


def _pass_on(told: Any, on_key: Callable[[], None]) -> None:
    while True:
        try:
            told.get_nowait()
        except queue.Empty:
            return
        on_key()


_TOLD: list[Any] = []
"""This worker's way to tell of key frames."""


def _begin(told: Any) -> None:
    """Prepare a worker: processes are the unit of parallel work, so libraries add no threads of their own."""
    import cv2

    cv2.setNumThreads(1)
    _TOLD[:] = [told]


def _run_job_and_report(job: Job, out: Path, config: PairConfig) -> Result:
    return make_job(job, out, config, lambda: _TOLD[0].put(None))


def _on_ray(
    jobs: Sequence[Job],
    out: Path,
    config: PairConfig,
    workers: int,
    address: str | None,
    on_key: Callable[[], None],
) -> Iterator[Result]:
    """Hand the jobs to a Ray cluster, each on one processor, a few more than it has at a time.

    address: of a running cluster; None starts one here with `workers` processors. `out` must be a
    folder that every node shares.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--executor ray needs Ray: pip install 'occbev-training[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(
            address=address,
            num_cpus=None if address else workers,
            log_to_driver=False,
            include_dashboard=None if address else False,
        )
    remote = ray.remote(num_cpus=1, max_retries=3)(make_job)
    at_most = 2 * max(1, int(ray.cluster_resources().get("CPU", workers)))
    left = iter(jobs)
    running: dict[Any, Unit] = {}
    try:
        while True:
            while len(running) < at_most and (job := next(left, None)) is not None:
                running[remote.remote(job, out.absolute(), config)] = job[1]
            if not running:
                return
            (done, *_), _ = ray.wait(list(running))
            unit = running.pop(done)
            for _ in range(unit.first, unit.last):
                on_key()
            yield ray.get(done)
    finally:
        if started:
            ray.shutdown()
