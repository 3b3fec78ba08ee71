"""Progress of long commands: bars on a terminal, one line a minute in a file or pipe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import ProgressColumn

PERIOD_S = 60.0
"""Seconds between two lines where there is no terminal."""


class Progress(Bars):
    """rich's progress bars on a terminal; elsewhere one line a minute for each task that is not finished."""

    def __init__(self, *columns: str | ProgressColumn, console: Console | None = None, transient: bool = False) -> None:
        """Take what rich's `Progress` takes."""
        console = console or Console()
        super().__init__(*columns, console=console, transient=transient, disable=not console.is_terminal)
        self._ticker = None if console.is_terminal else Ticker(self._print_lines)

    def start(self) -> None:
        """Show the bars, or begin to print lines."""
        super().start()
        if self._ticker is not None:
            self._ticker.start()

    def stop(self) -> None:
        """Hide the bars, or print no more lines."""
        if self._ticker is not None:
            self._ticker.stop()
        super().stop()

    def _print_lines(self, seconds: float) -> None:
        for task in self.tasks:
            if not task.finished:
                count = f"{task.completed:g} of {task.total:g} after " if task.total is not None else ""
                self.console.print(
                    f"{task.description}: {count}{describe_time(seconds)}", highlight=False, markup=False
                )


@contextmanager
def status(console: Console, text: str) -> Iterator[None]:
    """Show that work without steps goes on: a spinner on a terminal, else the text at once and then every minute."""
    if console.is_terminal:
        with console.status(text):
            yield
        return
    console.print(f"{text} ...", highlight=False, markup=False)
    with Ticker(lambda seconds: console.print(f"{text}: {describe_time(seconds)}", highlight=False, markup=False)):
        yield


class Ticker:
    """Calls a function with the seconds since the start, once a period, from a thread of its own."""

    def __init__(self, tick: Callable[[float], None]) -> None:
        self._tick, self._ended = tick, threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        """Begin to call."""
        self._thread.start()

    def stop(self) -> None:
        """Call no more; may be called twice, and before the start."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Ticker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        begin = time.monotonic()
        while not self._ended.wait(PERIOD_S):
            self._tick(time.monotonic() - begin)


def describe_time(seconds: float) -> str:
    """Return a time in words, such as "3 min"."""
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
