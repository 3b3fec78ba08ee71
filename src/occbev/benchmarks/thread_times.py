"""Processor time of a process by thread, read from /proc (Linux)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ThreadTimes:
    """Milliseconds that each thread of a process has run: thread id -> (name, milliseconds)."""

    pid: int
    threads: dict[int, tuple[str, float]]

    @classmethod
    def of(cls, pid: int) -> ThreadTimes:
        """Read the times of a process; raises OSError if it has ended."""
        threads = {}
        for folder in Path(f"/proc/{pid}/task").iterdir():
            name = (folder / "comm").read_text().strip()
            threads[int(folder.name)] = name, int((folder / "schedstat").read_text().split()[0]) / 1e6
        return cls(pid, threads)

    def since(self, earlier: ThreadTimes) -> ThreadTimes:
        """Return the time since an earlier reading; threads that have ended in between are left out."""
        none = ("", 0.0)
        spent = {tid: (name, ms - earlier.threads.get(tid, none)[1]) for tid, (name, ms) in self.threads.items()}
        return ThreadTimes(self.pid, spent)

    def sum_ms(self, of_runtime: bool) -> float:
        """Add up the threads of the network's runtime, or all others.

        A runtime's threads inherit the name of the thread that loads the network, the node's first one; threads of
        ours and of the middleware have names of their own.
        """
        first = self.threads[self.pid][0]
        return sum(ms for tid, (name, ms) in self.threads.items() if (name == first and tid != self.pid) == of_runtime)

    def by_name(self) -> dict[str, float]:
        """Add up the threads of each name, the busiest first."""
        first, sums = self.threads[self.pid][0], dict[str, float]()
        for tid, (name, ms) in self.threads.items():
            group = "executor" if tid == self.pid else "runtime" if name == first else name.split(".")[0]
            sums[group] = sums.get(group, 0.0) + ms
        return dict(sorted(sums.items(), key=lambda item: -item[1]))
