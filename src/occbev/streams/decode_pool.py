"""Threads that decode images as they arrive."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from occbev.threads import name_thread

Image = TypeVar("Image")


class DecodePool(Generic[Image]):
    """Threads that decode at most one image of each camera at a time: large images of one do not hold up the others."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "decode", name_thread, ("decode",))
        self._unfinished: defaultdict[str, deque[tuple[Future[Image], Callable[[], Image]]]] = defaultdict(deque)
        self._lock = threading.Lock()

    def submit(self, camera: str, decode: Callable[[], Image]) -> Future[Image]:
        """Decode an image after those of its camera that came before."""
        future: Future[Image] = Future()
        with self._lock:
            images = self._unfinished[camera]
            images.append((future, decode))
            if len(images) == 1:
                self._threads.submit(self._run_first, camera)
        return future

    def count(self, camera: str) -> int:
        """Return how many images of a camera wait or are being decoded."""
        return len(self._unfinished[camera])

    def close(self) -> None:
        """End the threads; images that wait are not decoded, their futures are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for images in self._unfinished.values():
                for future, _ in images:
                    future.cancel()

    def _run_first(self, camera: str) -> None:
        future, decode = self._unfinished[camera][0]
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(decode())
            except BaseException as error:
                future.set_exception(error)
        del (
            future,
            decode,
        )  # the exception's traceback holds this frame: its images would live until the next collection
        with self._lock, suppress(RuntimeError):  # the threads have ended
            self._unfinished[camera].popleft()
            if self._unfinished[camera]:
                self._threads.submit(self._run_first, camera)
