"""Two threads behind a small mailbox: the newest job wins, a replaced one is handed back to be counted.

One thread does the work of a job, the other hands out its result while the next job is worked on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


Rest = Callable[[], None]
"""What is left to do of a job when the next one may begin."""


class Worker(Generic[T]):
    """Runs `handle(job)` in its own thread, and what it returns, if anything, in a second one.

    Rests run one at a time and in order; the one of a job ends before the next job but one begins.
    What either raises goes to `on_error`. `handle` calls `claim` before anyone else learns of its result: a job that
    outlasts `stop` is given up there.
    """

    def __init__(
        self,
        handle: Callable[[T], Rest | None],
        on_error: Callable[[T, Exception], None],
        slots: int = 1,
    ) -> None:
        self._handle, self._on_error, self._slots = handle, on_error, slots
        self._changed = threading.Condition()
        self._jobs: deque[T] = deque()
        self._running: list[T] = []
        self._claimed = False
        self._stopping = False
        self._given_up = False
        self._finisher = ThreadPoolExecutor(1, "results")
        self._rest: Future[None] | None = None
        self._thread = threading.Thread(target=self._run, name="perception", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the thread is over; after `stop` it is not where the running job takes too long."""
        return not self._thread.is_alive()

    def put(self, job: T) -> T | None:
        """Hand in a job; return the oldest one if the mailbox was full, or this one after `stop`."""
        with self._changed:
            if self._stopping:
                return job
            replaced = self._jobs.popleft() if len(self._jobs) >= self._slots else None
            self._jobs.append(job)
            self._changed.notify_all()
            return replaced

    def claim(self) -> bool:
        """From within `handle`: whether the running job may still have results; from now on `stop` waits for it."""
        with self._changed:
            self._claimed = not self._given_up
            return self._claimed

    def stop(self, timeout_s: float = 1.5) -> list[T]:
        """End the threads after the running job; return what waited, and before it the running job if it was given up."""
        with self._changed:
            self._stopping = True
            left = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self._given_up = not self._claimed
            if self._given_up:
                left = self._running + left
        if not self._given_up:
            self._thread.join()
        self._finisher.shutdown()
        return left

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or bool(self._jobs))
                if self._stopping:
                    return
                job = self._jobs.popleft()
                self._running, self._claimed = [job], False
            try:
                rest = self._handle(job)
                if self._rest is not None:
                    self._rest.result()
                if rest is not None:
                    self._rest = self._finisher.submit(self._finish, job, rest)
            except Exception as error:  # the thread must outlive any one frame
                if self.claim():
                    self._on_error(job, error)
            with self._changed:
                self._running, self._claimed = [], False

    def _finish(self, job: T, rest: Rest) -> None:
        try:
            rest()
        except Exception as error:
            self._on_error(job, error)
