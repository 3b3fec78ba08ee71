"""The allocator's settings, in processes of their own, since they hold from the moment of the call."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
met = threading.Barrier(4)

def allocate():
    met.wait()  # all of them are alive at once
    for _ in range(100):
        libc.malloc(1000)
    met.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w")))
libc.fflush(None)
"""


def count_heaps(before: str) -> int:
    """Return how many heaps a process has whose four threads allocate after the lines of `before`."""
    program = PROGRAM.format(before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if "malloc_info" in done.stderr:
        pytest.skip("this C library is not glibc")
    assert done.returncode == 0, done.stderr
    return done.stdout.count("<heap nr=")


def test_all_threads_share_one_heap() -> None:
    assert count_heaps("") > 1
    assert count_heaps("from occbev.allocator import keep_large_blocks; keep_large_blocks()") == 1


def test_a_command_settles_it_before_libraries_start_threads() -> None:
    assert count_heaps("from occbev.cli import main; main([]); import numpy") == 1
