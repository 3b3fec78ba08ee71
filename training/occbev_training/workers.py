"""Worker processes: fresh interpreters with one thread each, which end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

KILLED = "its worker process was ended from outside, or by a library that crashed: is there memory enough for it?"
"""Why a task failed whose process died."""


def start_workers(count: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Return a pool of `count` spawned processes. prepare: called once in each, with `arguments`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, _begin_worker, (prepare, arguments))


class TaskRunner(Generic[Task, Result]):
    """Runs tasks in worker processes; one that ends its process costs no other."""

    def __init__(
        self,
        work: Callable[[Task], Result],
        killed: Callable[[Task], Result],
        listen: Callable[[Any], None] | None = None,
        on_report: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a runner.

        work: picklable, done in a worker. killed: what becomes of a task whose process dies. listen: called in each
        new worker with a queue; on_report is called here for everything that is put there.
        """
        self._work, self._killed, self._listen, self._on_report = work, killed, listen, on_report

    def run(self, tasks: Sequence[Task], workers: int) -> Iterator[Result]:
        """Yield the result of every task, in the order in which they end."""
        waiting = deque(tasks)
        while waiting:
            for task in (yield from self._drain(waiting, workers)):
                if (yield from self._drain(deque([task]), 1)):
                    yield self._killed(task)

    def _drain(self, waiting: deque[Task], workers: int) -> Generator[Result, None, list[Task]]:
        """Run tasks until none waits or a worker process dies; returns the tasks that were running then."""
        reports = multiprocessing.get_context("spawn").Queue()
        running: dict[Future[Result], Task] = {}
        with start_workers(workers, *(() if self._listen is None else (self._listen, reports))) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < workers:
                        future = pool.submit(self._work, waiting[0])
                        running[future] = waiting.popleft()
                    done, _ = wait(running, 0.2, FIRST_COMPLETED)
                    self._pass_on(reports)
                    for future in done:
                        result = future.result()
                        del running[future]
                        yield result
            except BrokenProcessPool:
                return list(running.values())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._pass_on(reports)
        return []

    def _pass_on(self, reports: Any) -> None:
        while True:
            try:
                reports.get_nowait()
            except queue.Empty:
                return
            self._on_report()


def _begin_worker(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Processes are the unit of parallel work, so OpenCV and numba add no threads of their own."""
    import cv2

    cv2.setNumThreads(1)
    os.environ["NUMBA_NUM_THREADS"] = "1"
    end_with_parent()
    if prepare is not None:
        prepare(*arguments)


def end_with_parent() -> None:
    """End this process as soon as its parent is gone, also where the parent was killed with SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
