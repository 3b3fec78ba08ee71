"""Two threads behind a small mailbox: a newer job replaces the oldest, which is returned to be counted as dropped.

One thread begins a job, the other ends it and hands out its result while the next job has begun.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from occbev.threads import name_thread

T = TypeVar("T")


class Worker(Generic[T]):
    """Runs `begin(job)` in its own thread and, where that returns true, `end(job)` in a second one.

    Jobs end one at a time and in order; a job has ended before the next but one begins.
    What either raises goes to `on_error`. Either calls `claim` before anyone else learns of the job's result: a job
    that outlasts `stop` is given up there.
    """

    def __init__(
        self,
        begin: Callable[[T], bool],
        end: Callable[[T], None],
        on_error: Callable[[T, Exception], None],
        slots: int = 1,
    ) -> None:
        self._begin, self._end, self._on_error, self._slots = begin, end, on_error, slots
        self._changed = threading.Condition()
        self._jobs: deque[T] = deque()
        self._unclaimed: list[T] = []
        self._given_up: list[T] = []
        self._stopping = self._all_begun = False
        self._begun: list[T] = []
        self._threads = [
            threading.Thread(target=self._run_as, args=(name, target), name=name, daemon=True)
            for target, name in ((self._begin_jobs, "perception"), (self._end_jobs, "results"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ended(self) -> bool:
        """Whether the threads are over; after `stop` they are not where a job that has begun takes too long."""
        return not any(thread.is_alive() for thread in self._threads)

    def put(self, job: T) -> T | None:
        """Hand in a job; return the oldest one if the mailbox was full, or this one after `stop`."""
        with self._changed:
            if self._stopping:
                return job
            replaced = self._jobs.popleft() if len(self._jobs) >= self._slots else None
            self._jobs.append(job)
            self._changed.notify_all()
            return replaced

    def claim(self, job: T) -> bool:
        """Whether a job may still have results, asked by `begin` or `end`; from now on `stop` waits for it."""
        with self._changed:
            if any(job is other for other in self._given_up):
                return False
            self._forget(job)
            return True

    def stop(self, timeout_s: float = 1.5) -> list[T]:
        """End the threads after the jobs that have begun; return those that were given up, then those that waited."""
        with self._changed:
            self._stopping = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._unclaimed, timeout_s)
            self._given_up, self._unclaimed = self._unclaimed, []
        if not self._given_up:
            for thread in self._threads:
                thread.join()
        return self._given_up + waiting

    @staticmethod
    def _run_as(name: str, target: Callable[[], None]) -> None:
        name_thread(name)
        target()

    def _begin_jobs(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or bool(self._jobs))
                if self._stopping:
                    self._all_begun = True
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
                self._unclaimed.append(job)
            has_begun = self._attempt(self._begin, job)
            with self._changed:
                self._changed.wait_for(lambda: not self._begun)
                if has_begun:
                    self._begun.append(job)
                    self._changed.notify_all()
                else:
                    self._forget(job)
            del job  # the next one may be long in coming, and this one holds images

    def _end_jobs(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._begun) or self._all_begun)
                if not self._begun:
                    return
                job = self._begun[0]
            self._attempt(self._end, job)
            with self._changed:
                self._begun.clear()
                self._forget(job)
            del job

    def _attempt(self, step: Callable[[T], bool | None], job: T) -> bool:
        """Do one step of a job; return what it returned, False where it raised."""
        try:
            return bool(step(job))
        except Exception as error:  # the threads must outlive any one job
            if self.claim(job):
                self._on_error(job, error)
            return False

    def _forget(self, job: T) -> None:
        """Wait for a job no longer; called with the lock."""
        self._unclaimed = [other for other in self._unclaimed if other is not job]
        self._changed.notify_all()
