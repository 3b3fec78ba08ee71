"""Where units of work run: in this process, in local processes, or on a Ray cluster. The results are the same bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from occbev_training.occupancy.pairs import PairConfig, Unit, UnitFailure, UnitReport, make_unit
from occbev_training.sources.discovery import Opener
from occbev_training.sources.recording import leave_out
from occbev_training.workers import KILLED, TaskRunner

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
    A unit that fails, whatever the reason, is reported; the others go on.
    """
    if executor == "ray":
        yield from _on_ray(jobs, out, config, workers, ray_address, on_key)
    elif workers <= 1:
        yield from (make_job(job, out, config, on_key) for job in jobs)
    else:
        work = partial(_run_job_and_report, out=out, config=config)
        yield from TaskRunner(work, _report_death, _listen, on_key).run(jobs, workers)


def make_job(job: Job, out: Path, config: PairConfig, on_key: Callable[[], None] = lambda: None) -> Result:
    """Make one unit in this process."""
    opener, unit = job
    problems: dict[str, str] = {}
    with leave_out(problems, unit.name):
        recording = opener()
        unit = replace(unit, last=min(unit.last, len(recording.key_stamp_ns)))
        return make_unit(recording, unit, out, config, on_key, opener.fingerprint)
    logger.warning("%s: %s", unit.name, problems[unit.name])
    return UnitFailure(unit, problems[unit.name])


def _report_death(job: Job) -> Result:
    logger.warning("%s: %s", job[1].name, KILLED)
    return UnitFailure(job[1], KILLED)


_REPORTS: list[Any] = []
"""This worker's way to report key frames."""


def _listen(reports: Any) -> None:
    _REPORTS[:] = [reports]


def _run_job_and_report(job: Job, out: Path, config: PairConfig) -> Result:
    return make_job(job, out, config, lambda: _REPORTS[0].put(None))


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
            yield _result_on_ray(done, unit)
    finally:
        if started:
            ray.shutdown()


def _result_on_ray(task: Any, unit: Unit) -> Result:
    """Return what became of a unit; one whose worker died more often than it is tried again has failed."""
    import ray

    problems: dict[str, str] = {}
    with leave_out(problems, unit.name):
        result: Result = ray.get(task)
        return result
    return UnitFailure(unit, problems[unit.name])
