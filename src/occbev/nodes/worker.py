"""One worker thread behind a small mailbox: the newest job wins, a replaced one is handed back to be counted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Worker(Generic[T]):
    """Runs `handle(job)` in its own thread; `handle` must not raise, what it raises goes to `on_error`."""

    def __init__(
        self, handle: Callable[[T], None], on_error: Callable[[T, Exception], None], slots: int = 1
    ) -> None:
        self._handle, self._on_error, self._slots = handle, on_error, slots
        self._changed = threading.Condition()
        self._jobs: deque[T] = deque()
        self._stopping = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="perception", daemon=True)
        self._thread.start()

    def put(self, job: T) -> T | None:
        """Hand in a job; return the oldest one if the mailbox was full, or this one after `stop`."""
        with self._changed:
            if self._stopping:
                return job
            replaced = self._jobs.popleft() if len(self._jobs) >= self._slots else None
            self._jobs.append(job)
            self._changed.notify_all()
            return replaced

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing waits and nothing runs."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def stop(self, timeout_s: float = 1.5) -> list[T]:
        """End the thread after the running job; return the jobs that were waiting."""
        with self._changed:
            self._stopping = True
            left = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return left

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or bool(self._jobs))
                if self._stopping:
                    return
                job = self._jobs.popleft()
                self._busy = True
            try:
                self._handle(job)
            except Exception as error:  # the thread must outlive any one frame
                self._on_error(job, error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
