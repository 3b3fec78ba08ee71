"""Worker processes: fresh interpreters with one thread each, which end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def start_workers(count: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Return a pool of `count` spawned processes. prepare: called once in each, with `arguments`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, _begin_worker, (prepare, arguments))


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
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
