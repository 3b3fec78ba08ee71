"""The worker's mailbox and its end; needs no ROS."""

from __future__ import annotations

import threading
import time

from occbev.ros.worker import Worker

SECONDS = 30.0


def never(job: int) -> None:
    raise AssertionError(job)


def fail(job: int, error: Exception) -> None:
    raise AssertionError(job) from error


def test_the_newest_job_wins_and_the_oldest_is_handed_back() -> None:
    started, go, done = threading.Event(), threading.Event(), []

    def begin(job: int) -> bool:
        started.set()
        go.wait(SECONDS)
        done.append(job)
        return False

    worker = Worker(begin, never, fail, slots=2)
    assert worker.put(1) is None
    assert started.wait(SECONDS)
    assert [worker.put(job) for job in (2, 3, 4)] == [None, None, 2]
    threading.Timer(0.05, go.set).start()
    assert worker.stop(SECONDS) == [3, 4]
    assert (done, worker.ended) == ([1], True)
    assert worker.put(5) == 5


def test_a_job_that_outlasts_the_end_is_given_up() -> None:
    started, go, claims = threading.Event(), threading.Event(), []

    def begin(job: int) -> bool:
        started.set()
        go.wait(SECONDS)
        claims.append(worker.claim(job))
        raise ValueError("nobody is told of it")

    worker = Worker(begin, never, fail)
    worker.put(1)
    assert started.wait(SECONDS)
    worker.put(2)
    assert worker.stop(0.05) == [1, 2]
    assert not worker.ended
    go.set()
    for thread in worker._threads:
        thread.join(SECONDS)
    assert (worker.ended, claims) == (True, [False])


def test_the_end_waits_for_results_that_are_on_their_way_out() -> None:
    claimed, go, done = threading.Event(), threading.Event(), []

    def begin(job: int) -> bool:
        assert worker.claim(job)
        claimed.set()
        go.wait(SECONDS)
        done.append(job)
        return False

    worker = Worker(begin, never, fail)
    worker.put(1)
    assert claimed.wait(SECONDS)
    threading.Timer(0.2, go.set).start()
    assert worker.stop(0.05) == []
    assert (done, worker.ended) == ([1], True)


def test_an_error_is_reported_and_the_next_job_is_done() -> None:
    errors, done = [], threading.Event()

    def begin(job: int) -> bool:
        done.set() if job else 1 // job
        return False

    worker = Worker(begin, never, lambda *e: errors.append(e))
    worker.put(0)
    while not errors:
        time.sleep(0.01)
    worker.put(1)
    assert done.wait(SECONDS)
    worker.stop(SECONDS)
    assert [(job, type(error)) for job, error in errors] == [(0, ZeroDivisionError)]


def test_a_job_ends_beside_the_next_one_but_never_beside_the_one_after() -> None:
    go, events, done = threading.Event(), [], threading.Event()

    def begin(job: int) -> bool:
        assert worker.claim(job)
        events.append(f"begin {job}")
        return True

    def end(job: int) -> None:
        if job == 1:
            go.wait(SECONDS)
        events.append(f"end {job}")
        if job == 3:
            done.set()

    worker = Worker(begin, end, fail, slots=3)
    for job in (1, 2, 3):
        worker.put(job)
    while "begin 2" not in events:
        time.sleep(0.01)
    time.sleep(0.1)
    assert events == ["begin 1", "begin 2"]
    go.set()
    assert done.wait(SECONDS)
    assert worker.stop(SECONDS) == []
    assert [e for e in events if e.startswith("end")] == ["end 1", "end 2", "end 3"]
    assert events.index("end 1") < events.index("begin 3")


def test_stop_waits_for_jobs_that_end_and_their_errors_are_reported() -> None:
    begun, errors = threading.Event(), []

    def end(job: int) -> None:
        begun.set()
        time.sleep(0.2)
        raise ValueError("nobody listens")

    worker = Worker(lambda job: worker.claim(job), end, lambda *e: errors.append(e))
    worker.put(7)
    assert begun.wait(SECONDS)
    assert worker.stop(0.05) == []
    assert [(job, str(error)) for job, error in errors] == [(7, "nobody listens")]


def test_a_job_whose_end_outlasts_stop_is_given_up_as_well() -> None:
    begun, go, claims = threading.Event(), threading.Event(), []

    def end(job: int) -> None:
        begun.set()
        go.wait(SECONDS)
        claims.append(worker.claim(1))

    worker = Worker(lambda job: True, end, fail)
    worker.put(1)
    assert begun.wait(SECONDS)
    assert worker.stop(0.05) == [1]
    assert not worker.ended
    go.set()
    for thread in worker._threads:
        thread.join(SECONDS)
    assert (worker.ended, claims) == (True, [False])
